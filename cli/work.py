"""`leases work`: runs a worker from the command line, as one runs an app server."""

from __future__ import annotations

import importlib
import logging
import os
import queue
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import click

from leases import limits
from leases.cli.command import USAGE, Command, Failed, say
from leases.cli.context import OWNER, PAUSE, PAUSE_OR_NONE, POOL, TTL, Settings, common_options
from leases.cli.render import as_object, print_json
from leases.cli.text import plural
from leases.errors import ConfigError
from leases.model import DEFAULT_POOL, Happening, WorkerEvent
from leases.worker import Worker

RETRY_FOR = timedelta(seconds=10)

LEVELS = ("debug", "info", "warning", "error")

TOLD = {
    Happening.FAILED: "the handler failed on {stream}, which rests: {reason}",
    Happening.STALLED: "the handler of {stream} stalls: it {reason}",
    Happening.LOST: "lost {stream}, token {token}: {reason}",
    Happening.RETIRED: "retired {stream}",
    Happening.DRAINING: "draining: asked to leave",
}
"""What is worth a line of its own; grants and releases are counted."""

COUNT_EVERY_S = 1.0
WAITED_LONG_S = 5.0
LAST_WORDS_S = 2.0
MOST_IN_LINE = 10_000


@click.command(
    "work",
    cls=Command,
    short_help="Run a worker that shares streams with others.",
    example="""\
leases work orders.handlers:handle
leases work orders.handlers:handle --streams streams.txt --concurrency 16
leases work feeds:poll --streams - --capacity 50
""",
)
@click.argument("handler", metavar="MODULE:HANDLER")
@click.option("--streams", metavar="FILE|-", help="Streams to register first, one a line. [default: those that are]")
@click.option("--pool", type=POOL, default=DEFAULT_POOL, show_default=True, metavar="POOL", help="Whose streams.")
@click.option("--name", type=OWNER, metavar="NAME", help="Our name, that no other has. [default: host:pid:random]")
@click.option("--capacity", type=click.IntRange(0, 1_000_000), metavar="N", help="At most so many streams.")
@click.option("--weight", type=float, default=1.0, show_default=True, metavar="X", help="Our part of the pool.")
@click.option("--concurrency", type=click.IntRange(1, 10_000), metavar="N", help="Calls at once. [default: 8 threads]")
@click.option("--ttl", type=TTL, default="15s", show_default=True, help="How long a lease outlives a crash.")
@click.option("--poll-interval", type=PAUSE, default="1s", show_default=True, help="How often to look for streams.")
@click.option("--stall-timeout", type=PAUSE, help="A handler without progress for so long loses its stream.")
@click.option(
    "--drain-timeout", type=PAUSE_OR_NONE, default="30s", show_default=True, help="How long handlers may take to end."
)
@click.option("--quiet", "-q", is_flag=True, help="Say only what goes wrong.")
@click.option("--log", "log_level", type=click.Choice(LEVELS), help="Also the log, with failing handlers' tracebacks.")
@common_options
@click.pass_obj
def work(
    settings: Settings,
    handler: str,
    streams: str | None,
    pool: str,
    name: str | None,
    capacity: int | None,
    weight: float,
    concurrency: int | None,
    ttl: timedelta,
    poll_interval: timedelta,
    stall_timeout: timedelta | None,
    drain_timeout: timedelta,
    quiet: bool,
    log_level: str | None,
) -> None:
    """Run a worker: share the streams of a pool with other workers, and call a handler for each of ours.

    HANDLER is a function in the Python module MODULE, which is looked for in this directory first: `def` or `async
    def`, of a StreamSession. It is called again and again, one batch of one stream a call; or it loops until
    `session.stopping`. TERM or INT, or `leases drain`, let it finish what it has in hand, release all, and end; a
    second signal ends at once.
    """
    if log_level is not None:
        logging.basicConfig(
            level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
        )
    call = _load(handler)
    given = None if streams is None else _streams(streams)
    told = _Told(as_json=settings.json, quiet=quiet)
    with settings.opened(retry_for=RETRY_FOR) as store:
        worker = Worker(
            store,
            call,
            streams=given,
            pool=pool,
            name=name,
            capacity=capacity,
            weight=weight,
            concurrency=concurrency,
            ttl=ttl,
            poll_interval=poll_interval,
            stall_timeout=stall_timeout,
            drain_timeout=drain_timeout,
            on_event=told.hear,
        )
        with told.counting(worker):
            worker.run()


def _load(reference: str) -> Callable[[Any], Any]:
    """Import the handler that MODULE:HANDLER names."""
    module_name, colon, path = reference.partition(":")
    if not (module_name and colon and path):
        raise click.UsageError(f"{reference!r} is not MODULE:HANDLER; write e.g. orders.handlers:handle")
    sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise Failed(USAGE, f"there is no module {module_name!r} here ({os.getcwd()}), nor installed") from None
        raise Failed(USAGE, f"the module {module_name!r} needs {error.name!r}, which is not installed") from None
    except (Exception, SystemExit) as error:  # noqa: BLE001  # whatever the module does
        raise Failed(USAGE, f"the module {module_name!r} cannot be imported: {_where(error)}") from None
    for part in path.split("."):
        if not hasattr(found, part):
            raise Failed(USAGE, f"the module {module_name!r} has no {path!r}")
        found = getattr(found, part)
    if not callable(found):
        raise Failed(USAGE, f"{reference!r} is no function, but {type(found).__name__}")
    handler: Callable[[Any], Any] = found
    return handler


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    line = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{line}"


def _streams(name: str) -> Sequence[str]:
    """Read stream_ids from a file, or from stdin, one a line."""
    try:
        if name == "-" and sys.stdin is None:
            raise Failed(USAGE, "stdin is closed; name a file in --streams")
        text = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        lines = text.decode().splitlines()
    except OSError as error:
        raise Failed(USAGE, f"cannot read the streams from {name!r}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise Failed(USAGE, f"the streams of {name!r} are not UTF-8") from None
    except ValueError:
        raise Failed(USAGE, f"{name!r} can be no file's name: it holds a NUL") from None
    given = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                given.append(limits.stream_id(line.strip()))
            except ConfigError as error:
                raise Failed(USAGE, f"{name}, line {number}: {error}") from None
    if not given:
        raise Failed(USAGE, f"{name!r} names no stream; write one a line")
    return given


class _Told:
    """What the worker tells, as lines on stderr; or all of it, as JSON on stdout."""

    def __init__(self, *, as_json: bool, quiet: bool) -> None:
        self._json = as_json
        self._quiet = quiet
        self._since: Counter[Happening] = Counter()
        self._held = False
        self._events: queue.Queue[tuple[float, WorkerEvent] | None] = queue.Queue(MOST_IN_LINE)
        self._dropped = 0
        self._worker: Worker | None = None
        self._printer = threading.Thread(target=self._print_on, name="leases-printer", daemon=True)

    def counting(self, worker: Worker) -> _Told:
        self._worker = worker
        return self

    def __enter__(self) -> None:
        self._printer.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with suppress(queue.Full):
            self._events.put_nowait(None)
        self._printer.join(LAST_WORDS_S)
        if self._printer.is_alive():  # it waits for a reader who does not read; so would the interpreter, for ever
            os._exit(0 if kind is None else 1)

    def hear(self, event: WorkerEvent) -> None:
        """Hear of an event, on whatever thread: it is only put in line, since who reads us may have stopped to read."""
        try:
            self._events.put_nowait((time.time(), event))
        except queue.Full:
            self._dropped += 1

    def _print_on(self) -> None:
        """Print what is in line, until the worker has ended and all is told."""
        waited_since_s = time.monotonic()
        while True:
            try:
                told = self._events.get(timeout=COUNT_EVERY_S)
            except queue.Empty:
                self._count()
                late = time.monotonic() - waited_since_s > WAITED_LONG_S
                if late and self._worker is not None and not (self._held or self._quiet or self._json):
                    waited_since_s = float("inf")
                    pool = self._worker.registry.pool
                    say(f"holds no stream yet: none is free in pool {pool!r}; `leases list` shows all")
                continue
            if told is None:
                return
            try:
                self._print(*told)
            except OSError:  # whoever read us has gone; the worker works on
                return

    def _print(self, at_s: float, event: WorkerEvent) -> None:
        if self._dropped:
            dropped, self._dropped = self._dropped, 0
            say(f"{plural(dropped, 'event')} not shown: nobody read fast enough")
        if self._json:
            if event.happening is not Happening.RENEWED:
                print_json({"at_s": round(at_s, 3), **as_object(event)})
            return
        self._since[event.happening] += event.count
        self._held |= event.happening is Happening.GRANTED
        if event.happening is Happening.STARTED and not self._quiet and self._worker is not None:
            say(f"{event.owner} works on pool {self._worker.registry.pool!r}; INT or TERM drains it")
        line = TOLD.get(event.happening)
        if line is not None and not (self._quiet and event.happening in (Happening.DRAINING, Happening.RETIRED)):
            say(line.format(stream=event.stream_id, token=event.fencing_token, reason=event.reason))
        if event.happening is Happening.STOPPED and not self._quiet:
            self._count()
            say(f"{event.owner} has ended")

    def _count(self) -> None:
        counts, self._since = self._since, Counter()
        granted, released, shed = (counts[each] for each in (Happening.GRANTED, Happening.RELEASED, Happening.SHED))
        if self._quiet or self._json or self._worker is None or not (granted or released):
            return
        parts = [f"{granted} granted"] * bool(granted) + [f"{released} released"] * bool(released)
        more = f", {shed} of them to balance" if shed else ""
        say(f"holds {plural(len(self._worker.sessions), 'stream')} ({', '.join(parts)}{more})")
