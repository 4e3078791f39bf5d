"""`leases demo`: parse, run, show, judge."""

from __future__ import annotations

import json
import math
import signal
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from leases import ConfigError, LeaseStore, limits
from leases.cli.command import REFUSED, USAGE, Command, Failed, say
from leases.cli.context import Settings, common_options
from leases.cli.demo import ground, supervisor, view
from leases.cli.demo.board import Board
from leases.cli.demo.plan import Plan, owners
from leases.cli.demo.proof import Proof, prove
from leases.cli.demo.source import BadFile, Feed, Source
from leases.cli.text import plural, shown
from leases.engine import describe

MOST_WORKERS: Final = 64
SHORTEST_TTL_S: Final = 0.5


class _Console(Console):
    """A console whose reader may go: then the command ends as every other one does."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class Interrupted(BaseException):
    """A signal asks for the end. Not an Exception: nothing on the way may take it for an error of its own."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class FileName(click.Path):
    """A path; one with a NUL in it, which only a program can pass, is a usage error."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return super().convert(value, param, ctx)
        except ValueError as error:
            self.fail(f"{value!r} cannot be the name of a file: {error}", param, ctx)


@click.command(
    "demo",
    cls=Command,
    short_help="Kill and freeze workers; prove the event log whole.",
    example="""
leases demo
leases demo --workers 6 --kill 2 --freeze 1 --join 2 --drain 1
leases demo --url postgresql://me@localhost/mine --json
leases demo orders.csv --stream-by customer --id-by order_id --workers 8
""",
)
@click.argument("file", type=FileName(path_type=Path), required=False, metavar="[FILE.csv]")
@click.option(
    "--stream-by",
    metavar="COLUMN[,COLUMN]",
    default="origin,dest",
    show_default=True,
    help="Columns that name an event's stream.",
)
@click.option(
    "--id-by",
    metavar="COLUMN[,COLUMN]",
    default="time_hour,carrier,flight",
    show_default=True,
    help="Columns that tell one event from another.",
)
@click.option("--workers", type=click.IntRange(1, MOST_WORKERS), default=4, show_default=True, help="Worker processes.")
@click.option("--ttl", type=float, default=3.0, show_default=True, metavar="S", help="Seconds that a lease lasts.")
@click.option("--kill", type=click.IntRange(0), default=1, show_default=True, help="Workers to kill (SIGKILL).")
@click.option(
    "--freeze", type=click.IntRange(0), default=1, show_default=True, help="Workers to freeze past their TTL (SIGSTOP)."
)
@click.option(
    "--join", type=click.IntRange(0, MOST_WORKERS), default=0, show_default=True, help="Workers that come later."
)
@click.option(
    "--drain", type=click.IntRange(0), default=0, show_default=True, help="Workers to ask to leave, in good order."
)
@partial(common_options, url_default="a temporary file")
@click.pass_obj
def demo(
    settings: Settings,
    file: Path | None,
    stream_by: str,
    id_by: str,
    workers: int,
    ttl: float,
    kill: int,
    freeze: int,
    join: int,
    drain: int,
) -> None:
    """Let worker processes share the streams of a file; kill and freeze some; prove that the log is whole.

    FILE is a CSV, gzipped or not, in UTF-8, with a header; without it, a week of flights out of New York, whose
    streams are the routes. The workers append each stream's events, in order, to the event log. Some are killed, and
    some frozen, between their own last look at the lease and their write, where only the fence in the database can
    stop them. Workers may also join and leave while the run is under way: the streams are shared anew, and no work is
    cut short. At the end the log is compared with the file and with the record of who was granted what. Exit code 1
    if an event is missing, is there twice, or was written under a stale token.

    Runs on a temporary SQLite file, or on the database of --url; never on that of the environment. With --json the
    view goes to stderr, and stdout ends with one object.
    """
    if not math.isfinite(ttl) or ttl < SHORTEST_TTL_S:
        raise ConfigError(f"--ttl must be {SHORTEST_TTL_S:g} seconds or more, up to 24 h, not {ttl:g}")
    plan = Plan(workers, limits.ttl(ttl).total_seconds(), kill, freeze, join, drain)
    if kill + freeze + drain >= workers:
        drained = f" and --drain {drain}" if drain else ""
        raise ConfigError(
            f"--kill {kill}{',' if drain else ' and'} --freeze {freeze}{drained} leave none of "
            f"{plural(workers, 'worker')} at work; use --workers {kill + freeze + drain + 1} or more, "
            f"or strike{' and drain' if drain else ''} fewer"
        )
    if settings.schema is not None:
        raise ConfigError("the demo uses the database's default schema; leave --schema away")
    url = settings.database_given() if settings.url else None
    try:
        source = Source(file, _columns("--stream-by", stream_by), _columns("--id-by", id_by))
        with _signals(), tempfile.TemporaryDirectory(prefix="leases-demo-") as directory:
            code = _run(source, plan, url, Path(directory), settings.json)
    except BadFile as error:
        raise Failed(USAGE, str(error)) from None
    except (ground.Refused, supervisor.RunFailed) as error:
        raise Failed(REFUSED, str(error)) from None
    except Interrupted as error:
        raise Failed(128 + error.number, "interrupted; the workers have been ended") from None
    if code:
        raise click.exceptions.Exit(code)


def _columns(option: str, value: str) -> Sequence[str]:
    names = tuple(name.strip() for name in value.split(","))
    if not all(names):
        raise ConfigError(f"{option} {value!r} leaves a column without a name; write them with commas between")
    return names


@contextmanager
def _signals() -> Iterator[None]:
    """Turn the signals that ask for the end into `Interrupted`, once; what comes after it is not heard."""
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]

    def interrupt(number: int, _frame: object) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted(number)

    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(source: Source, plan: Plan, url: str | None, directory: Path, as_json: bool) -> int:
    """Run the demo in a directory of its own; show what happens; return the exit code."""
    began_s = time.monotonic()
    console = _Console(stderr=as_json)
    feed_file = directory / "feed.db"
    with Feed.make(feed_file, source.events()) as feed:
        lengths = feed.streams()
    events = sum(lengths.values())
    database = f"sqlite:///{directory / 'leases.db'}" if url is None else url
    with LeaseStore(database) as store:
        if store.url.get_backend_name() == "sqlite" and store.url.database in (None, "", ":memory:"):
            raise ConfigError("processes cannot share a database in memory; name a file: sqlite:///FILE")
        where = "a temporary SQLite file" if url is None else describe(store.url)
        ground.make_tables(store)
        taken = store.run(lambda connection: _take(connection, lengths.keys()))
        if taken.cleared:
            say(f"cleared away {plural(taken.cleared, 'event')} of an earlier demo in {where}")
        _print(console, f"{source.name}: {plural(events, 'event')} in {plural(len(lengths), 'stream')}")
        _print(console, f"{plural(plan.workers, 'worker')} on {where}, {_fates(plan)}")
        names = owners(plan.workers + plan.join)
        board = Board(names, joiners=plan.join, events=events, streams=len(lengths))
        crew = supervisor.Crew(store, database, feed_file, plan, board, lengths.keys())
        try:
            with view.shown(board, console) as refresh, crew:
                crew.run(refresh)
        finally:
            with suppress(SQLAlchemyError), store.engine.begin() as connection:  # if not, it expires by itself
                ground.give_back(connection, names)
        proof = store.run(
            lambda connection: prove(connection, source.events(), taken.tokens, crew.strikes), read_only=True
        )
    figures = _figures(proof, board, plan, time.monotonic() - began_s)
    good = proof.holds and not crew.unrefused
    console.print()
    console.print(view.proof_table(figures))
    _print(console, view.signature(figures))
    if good:
        console.print("Every event is in the log exactly once, and no stale write got in.", style="green")
    for complaint in _complaints(proof, crew, plan):
        say(complaint)
    if as_json:
        click.echo(json.dumps(figures))
    return 0 if good else REFUSED


def _take(connection: Connection, stream_ids: Collection[str]) -> ground.Ground:
    taken = ground.take(connection, stream_ids)
    ground.hold_back(connection, stream_ids)
    return taken


def _fates(plan: Plan) -> str:
    later = [(plan.join, "more to join"), (plan.drain, "to drain")]
    fates = [(plan.kill, "to kill"), (plan.freeze, "to freeze"), *(fate for fate in later if fate[0])]
    return ", ".join(f"{count} {what}" for count, what in fates)


def _print(console: Console, text: str) -> None:
    console.print(shown(" ".join(text.split())), markup=False, highlight=False, soft_wrap=True)


def _figures(proof: Proof, board: Board, plan: Plan, seconds: float) -> dict[str, int | float]:
    return {
        "events_in_file": proof.events_in_file,
        "events_in_log": proof.events_in_log,
        "missing": proof.missing,
        "duplicated": proof.duplicated,
        "stale_accepted": proof.stale_accepted,
        "stale_refused": board.refused,
        "takeovers": proof.takeovers,
        "takeover_seconds_max": round(proof.takeover_seconds_max, 3),
        "moved": proof.moved,
        "joined": board.joined,
        "drained": board.drained,
        "workers": plan.workers,
        "streams": board.streams,
        "seconds": round(seconds, 3),
    }


def _complaints(proof: Proof, crew: supervisor.Crew, plan: Plan) -> list[str]:
    """What there is to say about a run that was not as it should be."""
    complaints = []
    if not proof.holds:
        complaints.append("the proof does not hold: an event is missing, twice there, misplaced or stale")
    if proof.misplaced:
        complaints.append(f"{plural(proof.misplaced, 'event')} in the log out of order, or not of the file")
    if crew.unrefused:
        complaints.append(f"a frozen worker's write was not refused, to {', '.join(crew.unrefused)}")
    if len(crew.strikes) < plan.struck:
        complaints.append(
            f"only {len(crew.strikes)} of {plan.struck} workers could be struck: "
            "the file has too few streams for each of them to hold one"
        )
    return complaints
