"""The commands about workers: workers lists them, drain asks one to leave and waits until it has."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import click
from rich.progress import BarColumn, Progress, TextColumn
from sqlalchemy import Connection

from leases import administration, balance, fleet
from leases.cli.command import REFUSED, Command, Failed, say
from leases.cli.context import (
    OWNER,
    PAUSE,
    POOL,
    Settings,
    actor_option,
    ask,
    can_ask,
    common_options,
    where,
    yes_option,
)
from leases.cli.render import as_object, print_json, print_line
from leases.cli.tables import print_human, worker_table
from leases.cli.text import plural
from leases.errors import LeaseNotHeld
from leases.model import WorkerInfo
from leases.store import LeaseStore

COUNT_UP_TO = 1_000_000
LOOK_EVERY_S = 0.2


@click.command(
    "workers",
    cls=Command,
    short_help="List the workers: held, share, last beat.",
    example="""\
leases workers
leases workers --pool orders --json
""",
)
@click.option("--pool", type=POOL, metavar="POOL", help="Only the workers of this pool.")
@click.option("--dead", is_flag=True, help="Also those that are dead and not yet forgotten.")
@common_options
@click.pass_obj
def workers(settings: Settings, pool: str | None, dead: bool) -> None:
    """List the workers: how many streams each holds, how many are its share, and when it was last heard of.

    A process that holds leases without competing for streams (`leases run`, an election) has no pool and no share.
    """
    with settings.opened() as store:
        found = [info for info in store.workers(pool=pool) if info.live or dead]
        shares: dict[str, int] = {}
        for name in sorted({info.pool for info in found if info.pool is not None}):
            shares |= store.run(_shares_of(name), read_only=True)
    if not found:
        say(
            "no worker is alive" + (f" in pool {pool!r}" if pool else "") + ("" if dead else "; --dead shows dead ones")
        )
    elif settings.json:
        for info in found:
            print_json({**as_object(info), "live": info.live, "share": shares.get(info.worker_id)})
    else:
        print_human(worker_table(found, shares))


def _shares_of(pool: str) -> Callable[[Connection], dict[str, int]]:
    def call(connection: Connection) -> dict[str, int]:
        view = fleet.observe(connection, pool, "", count_up_to=COUNT_UP_TO, patience_s=0)
        return dict(balance.targets(view))

    return call


# --- drain -----------------------------------------------------------------------------------------------------


@click.command(
    "drain",
    cls=Command,
    short_help="Ask a worker to let all go and to leave.",
    example="""\
leases drain host-1:4121:9f3a2b1c
leases drain host-1:4121:9f3a2b1c --timeout 5m --yes
""",
)
@click.argument("worker", type=OWNER)
@click.option("--timeout", type=PAUSE, default="1m", show_default=True, help="How long to wait until it has left.")
@click.option("--no-wait", is_flag=True, help="Only ask it.")
@yes_option
@actor_option
@common_options
@click.pass_obj
def drain(settings: Settings, worker: str, timeout: timedelta, no_wait: bool, yes: bool, actor: str) -> None:
    """Ask a worker to finish what it has in hand, to let all its streams go, and to end.

    WORKER is a name that `leases workers` shows. Others take its streams over as it lets them go. Waits until it has
    left; interrupted, the worker leaves all the same. Exit code 1 if it has not left in time, or died before it had.
    """
    can_ask(yes)
    with settings.opened() as store:
        info = _worker(store, worker)
        held = plural(info.lease_count, "stream")
        ask(yes, f"{worker}: {info.state}, pool {info.pool}, {held}", f"Ask it to leave, on {where(store)}?")
        if not store.run(lambda connection: _ask(connection, worker, actor)):
            raise Failed(REFUSED, f"{worker} is dead by now; its streams go to others by themselves")
        if no_wait:
            print_line(f"{worker}: asked to leave; it holds {held}")
            return
        left = _wait(store, info, timeout)
    if settings.json:
        print_json({"worker_id": worker, "held_before": info.lease_count, "left": left is None, "held": left or 0})
    if left is not None:
        raise Failed(
            REFUSED,
            f"{worker} has not left within {timeout.total_seconds():g} s: it holds {plural(left, 'stream')} still",
        )
    if not settings.json:
        print_line(f"{worker}: has left; it held {held}")


def _worker(store: LeaseStore, name: str) -> WorkerInfo:
    known = {info.worker_id: info for info in store.workers() if info.live}
    if name not in known:
        alive = [info.worker_id for info in known.values() if info.pool is not None]
        hint = f"alive: {', '.join(alive[:5])}" if alive else "none is alive"
        raise LeaseNotHeld(f"no live worker is called {name!r}; {hint}", stream_id=name)
    if known[name].pool is None:
        raise Failed(
            REFUSED, f"{name} is no worker of a pool (`leases run`, an election): end that process, or expire its lease"
        )
    return known[name]


def _ask(connection: Connection, worker: str, actor: str) -> bool:
    asked = fleet.drain(connection, worker)
    if asked:
        administration.record(connection, "drain", actor, None, None, None, f"worker {worker}")
    return asked


def _wait(store: LeaseStore, info: WorkerInfo, timeout: timedelta) -> int | None:
    """Wait until a worker has left; None if it has, else how many streams it holds still."""
    give_up_at_s = time.monotonic() + timeout.total_seconds()
    held = most = info.lease_count
    with _progress(most) as show:
        while True:
            now = next((each for each in store.workers(pool=info.pool) if each.worker_id == info.worker_id), None)
            if now is None:
                show(0)
                return None
            if not now.live:
                raise Failed(
                    REFUSED, f"{info.worker_id} died before it had left; its streams go to others by themselves"
                )
            held = now.lease_count
            show(held)
            if time.monotonic() >= give_up_at_s:
                return held
            time.sleep(LOOK_EVERY_S)


@contextmanager
def _progress(most: int) -> Iterator[Callable[[int], None]]:
    """Show how much is left to let go, on stderr, where somebody looks on."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console

    columns: Sequence[TextColumn | BarColumn] = (
        TextColumn("draining"), BarColumn(), TextColumn("{task.completed:.0f} of {task.total:.0f} streams let go"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("drain", total=max(1, most))

        def show(held: int) -> None:
            progress.update(task, total=max(1, most), completed=max(0, most - held))

        yield show
