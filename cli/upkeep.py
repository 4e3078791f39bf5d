"""The commands that look after streams and tables: migrate, register, retire, pause, resume, prune, raise-tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import click
from sqlalchemy import Connection, func, select

from leases import administration, operations
from leases.cli.command import REFUSED, Command, say
from leases.cli.context import (
    AGE,
    POOL,
    REASON,
    STREAM,
    Settings,
    actor_option,
    ask,
    can_ask,
    clock,
    common_options,
    where,
    yes_option,
)
from leases.cli.render import print_json, print_line
from leases.cli.text import duration, plural
from leases.cli.watch import look
from leases.errors import LeaseNotHeld
from leases.model import DEFAULT_POOL, Pruned
from leases.schema import leases
from leases.statements import LIVE
from leases.store import LeaseStore

Outcome = tuple[str, dict[str, Any]]
"""What became of a stream: for people, and for programs."""

streams_argument = click.argument("streams", nargs=-1, required=True, type=STREAM, metavar="STREAM...")
reason_option = click.option("--reason", type=REASON, help="Why, for the audit.")


@click.command(
    "migrate",
    cls=Command,
    example="""\
leases migrate
leases migrate --url postgresql://leases@db.example/leases --schema ops
""",
)
@common_options
@click.pass_obj
def migrate(settings: Settings) -> None:
    """Create the tables, or bring them to this version.

    May be repeated, also by several processes at once.
    """
    with settings.opened(create=True) as store:
        before, after = store.migrate()
        place = where(store)
    if settings.json:
        print_json({"database": place, "before": before, "after": after})
    elif before == after:
        print_line(f"{place}: at version {after} already")
    else:
        print_line(f"{place}: " + (f"version {before} → {after}" if before else f"tables made, version {after}"))


# --- streams ---------------------------------------------------------------------------------------------------


@click.command(
    "register",
    cls=Command,
    short_help="Make streams known, or bring retired ones back.",
    example="leases register orders/1 orders/2 --pool orders",
)
@streams_argument
@click.option(
    "--pool", type=POOL, default=DEFAULT_POOL, show_default=True, metavar="POOL", help="Whose workers may claim them."
)
@common_options
@click.pass_obj
def register(settings: Settings, streams: tuple[str, ...], pool: str) -> None:
    """Make streams known, so that workers can claim them; or bring retired ones back.

    A stream that is known already stays in the pool that it is in.
    """

    def call(connection: Connection) -> list[int]:
        return [operations.register(connection, [stream], pool=pool) for stream in chosen]

    chosen = list(dict.fromkeys(streams))
    with settings.opened() as store:
        new = store.run(call)
    for stream, added in zip(chosen, new, strict=True):
        if settings.json:
            print_json({"stream_id": stream, "registered": bool(added)})
        else:
            print_line(f"{stream}: " + (f"registered in pool {pool}" if added else "known already"))


@click.command(
    "retire",
    cls=Command,
    short_help="Let nobody acquire streams until registered again.",
    example="leases retire orders/7 --reason 'shard merged'",
)
@streams_argument
@reason_option
@actor_option
@common_options
@click.pass_obj
def retire(settings: Settings, streams: tuple[str, ...], reason: str | None, actor: str) -> int:
    """Let nobody acquire streams until they are registered again.

    An owner is told with its next heartbeat, finishes and lets go. The rows stay, and with them their tokens.
    """

    def act(store: LeaseStore, stream: str) -> Outcome:
        done = bool(store.retire([stream], actor=actor, reason=reason))
        if not done:
            look(store, stream)
        return "retired" if done else "retired already", {"retired": done}

    return _each(settings, streams, act)


@click.command("pause", cls=Command, example="leases pause orders/7 --reason 'upstream is replaying'")
@streams_argument
@reason_option
@actor_option
@common_options
@click.pass_obj
def pause(settings: Settings, streams: tuple[str, ...], reason: str | None, actor: str) -> int:
    """Let nobody acquire streams until `leases resume`.

    An owner is told with its next heartbeat, finishes and lets go; to end its lease at once: `leases expire`.
    """

    def act(store: LeaseStore, stream: str) -> Outcome:
        store.pause(stream, actor=actor, reason=reason)
        info = look(store, stream)
        holder = info.owner if info.live else None
        return "paused" + (f"; {holder} holds it still" if holder else ""), {"paused": True, "owner": holder}

    return _each(settings, streams, act)


@click.command("resume", cls=Command, example="leases resume orders/7")
@streams_argument
@reason_option
@actor_option
@common_options
@click.pass_obj
def resume(settings: Settings, streams: tuple[str, ...], reason: str | None, actor: str) -> int:
    """Let paused streams be acquired again."""

    def act(store: LeaseStore, stream: str) -> Outcome:
        done = store.resume(stream, actor=actor, reason=reason)
        return "resumed" if done else "was not paused", {"resumed": done}

    return _each(settings, streams, act)


def _each(settings: Settings, streams: Sequence[str], act: Callable[[LeaseStore, str], Outcome]) -> int:
    """Do it to each stream and print what became of it; those that were refused are told on stderr, and make it 1."""
    code = 0
    with settings.opened() as store:
        for stream in dict.fromkeys(streams):
            try:
                text, fields = act(store, stream)
            except LeaseNotHeld as error:
                say(str(error))
                code = REFUSED
                continue
            if settings.json:
                print_json({"stream_id": stream, **fields})
            else:
                print_line(f"{stream}: {text}")
    return code


# --- tables ----------------------------------------------------------------------------------------------------


@click.command("prune", cls=Command, example="leases prune --older-than 30d")
@click.option("--older-than", type=AGE, required=True, metavar="AGE", help="30d, 12h, 90m or 45s.")
@yes_option
@common_options
@click.pass_obj
def prune(settings: Settings, older_than: timedelta, yes: bool) -> None:
    """Delete what ended longer ago than AGE.

    Grants that ended, events, lines of the audit, dead workers, and the checkpoints of retired streams. Never a row
    that carries a token. An event that is gone from the log can be appended again.
    """
    can_ask(yes)
    with settings.opened() as store:
        before = clock(store) - older_than
        if not yes:
            going = store.run(lambda connection: administration.prunable(connection, before=before))
            if any(dataclasses.astuple(going)):
                ask(
                    yes,
                    f"What ended more than {duration(older_than)} ago: {_counted(going)}",
                    f"Delete it, on {where(store)}?",
                )
        pruned = store.prune(before=before)
    if settings.json:
        print_json({**dataclasses.asdict(pruned), "before": before})
    else:
        print_line(f"deleted: {_counted(pruned)}")


def _counted(pruned: Pruned) -> str:
    names = {"audit": "audit lines"}
    return ", ".join(f"{count:,} {names.get(name, name)}" for name, count in dataclasses.asdict(pruned).items())


@click.command(
    "raise-tokens",
    cls=Command,
    short_help="Raise every token, after a backup was restored.",
    example="leases raise-tokens --reason 'restored the backup of Monday'",
)
@click.option(
    "--by",
    type=click.IntRange(1, 2**40),
    default=1_000_000,
    show_default=True,
    metavar="N",
    help="More than any stream had grants since the backup.",
)
@reason_option
@yes_option
@actor_option
@common_options
@click.pass_obj
def raise_tokens(settings: Settings, by: int, reason: str | None, yes: bool, actor: str) -> None:
    """Raise every token and end every lease: after a backup was restored.

    A backup brings old tokens back, which would then be granted a second time. Stop the workers before.
    """
    can_ask(yes)
    with settings.opened() as store:
        if not yes:
            streams, live = store.run(_counts)
            ask(
                yes,
                f"{plural(streams, 'stream')}, {live:,} of them held",
                f"Raise all tokens by {by:,} and end all leases, on {where(store)}?",
            )
        count = store.raise_tokens(by=by, actor=actor, reason=reason)
    if settings.json:
        print_json({"raised": count, "by": by})
    else:
        print_line(f"raised the tokens of {plural(count, 'stream')} by {by:,}; nobody holds a lease")


def _counts(connection: Connection) -> tuple[int, int]:
    streams, live = connection.execute(select(func.count(), func.count().filter(LIVE)).select_from(leases)).one()
    return streams, live
