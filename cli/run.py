"""`leases run`: hold a lease while a command runs, and end the command when the lease is lost.

The exit code is the command's (128 + n if signal n ended it), or one of these:

    2         usage
    120       the stream is held by another, paused or retired; the command was not started
    121       the lease was lost, and the command ended; or found lost when the command had ended by itself
    123       the store is unavailable, or its tables are not of this version; the command was not started
    126, 127  the command cannot be executed, is not there; the lease was let go

Should `leases run` itself be killed (SIGKILL), a guard ends the command at once. Should the whole machine stand still,
only a fence on what the command writes, by LEASE_TOKEN, protects. Pausing the stream does not end the command: the next
one has to wait.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from datetime import timedelta

import click

from leases.cli.child import Guard, Signalled, Signals
from leases.cli.command import USAGE, Command, Failed, advice, code_of, say
from leases.cli.context import OWNER, PAUSE_OR_NONE, STREAM, TTL, URL_VARIABLE, Settings, common_options
from leases.errors import LeaseHeld, LeasesError
from leases.registry import SessionRegistry
from leases.session import StreamSession

HELD, LOST, NO_STORE, NOT_EXECUTABLE, NOT_FOUND = 120, 121, 123, 126, 127

POOL = "run"
"""The pool of streams that nobody but `leases run` knows, so that no worker claims them."""


class _Run(Command):
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if "--" in given:
                raise
            raise click.UsageError(f"{error.message.rstrip('.')}; write -- before the command", ctx) from None


@click.command(
    "run",
    cls=_Run,
    example="""\
leases run nightly-report -- ./report.sh --full
leases run orders/7 --wait 1m --ttl 30s -- python worker.py
""",
)
@click.argument("stream", type=STREAM)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND...")
@click.option(
    "--wait", type=PAUSE_OR_NONE, default="0s", show_default=True, help="How long to wait while another holds it."
)
@click.option("--ttl", type=TTL, default="15s", show_default=True, help="How long the lease outlives a crash of ours.")
@click.option(
    "--grace", type=PAUSE_OR_NONE, default="5s", show_default=True, help="When the lease is lost: from TERM to KILL."
)
@click.option("--owner", type=OWNER, metavar="OWNER", help="Our name. [default: host:pid:random]")
@click.option("--quiet", "-q", is_flag=True, help="Do not say that the lease is got.")
@common_options
@click.pass_obj
def run(
    settings: Settings,
    stream: str,
    command: tuple[str, ...],
    wait: timedelta,
    ttl: timedelta,
    grace: timedelta,
    owner: str | None,
    quiet: bool,
) -> int:
    """Hold a lease while a command runs.

    The command finds LEASE_STREAM_ID, LEASE_TOKEN and LEASE_OWNER in its environment. If the lease is lost, it and
    what it has started are ended: TERM, then KILL.

    Exit code: the command's; 120 if another holds the lease, 121 if it was lost, 123 if the store is unavailable, 126
    or 127 if the command cannot be run.
    """

    if any("\0" in part for part in command):
        raise click.UsageError("the command holds a NUL; remove it")
    told = _Told(stream, as_json=settings.json, quiet=quiet)
    try:
        with Signals() as signals, settings.opened() as store:
            registry = SessionRegistry(
                store,
                owner=owner,
                ttl=ttl,
                pool=POOL,
                on_renewed=told.renewed,
                on_lost=lambda _session, _loss: told.woken.set(),
                on_released=lambda _session: told.released.set(),
            )
            with registry:
                session = registry.open(stream, wait=wait)
                told.granted(session)
                return _hold(session, told, signals, command, _environment(session, settings), grace)
    except Signalled as caught:
        raise Failed(128 + caught.number, "interrupted") from None
    except LeaseHeld as error:
        raise Failed(HELD, str(error)) from None
    except LeasesError as error:
        raise Failed(USAGE if code_of(error) == USAGE else NO_STORE, f"{error}{advice(error)}") from None


def _environment(session: StreamSession, settings: Settings) -> dict[str, str]:
    added = {
        "LEASE_STREAM_ID": session.stream_id,
        "LEASE_TOKEN": str(session.token),
        "LEASE_OWNER": session.lease.owner,
    }
    url = settings.database_given()
    return {**os.environ, **added, **({} if url is None else {URL_VARIABLE: url})}


def _hold(
    session: StreamSession,
    told: _Told,
    signals: Signals,
    command: Sequence[str],
    environment: Mapping[str, str],
    grace: timedelta,
) -> int:
    """Run the command to its end, or to the lease's, whichever comes first; return the exit code."""
    try:
        child = signals.start(command, environment, told.woken)
    except OSError as error:
        found = not isinstance(error, FileNotFoundError)
        raise Failed(NOT_EXECUTABLE if found else NOT_FOUND, f"cannot run {command[0]!r}: {error.strerror}") from None
    guard = Guard(child.group, grace.total_seconds())
    try:
        told.woken.wait()
    finally:
        ended_by_itself = not child.running
        if ended_by_itself:
            code = child.result()
        else:
            told.lost(session, "the command is ended")
            child.end(grace.total_seconds())
        guard.dismiss()
        signals.ended()
    try:
        session.close()
    except LeasesError as error:
        say(f"the lease could not be let go, and expires by itself: {error}")
    else:
        if ended_by_itself and not told.released.is_set():
            told.lost(session, "it was found so when the command had ended")
            return LOST
    if not ended_by_itself:
        return LOST
    if session.loss is not None:
        told.lost(session, "the command ended at the same time")
        return LOST
    return code


class _Told:
    """What the heartbeats tell, and what of it is told on stderr: a line each, or a JSON object each."""

    def __init__(self, stream: str, *, as_json: bool, quiet: bool) -> None:
        self.woken = threading.Event()
        """Set when the command has ended, or the lease is lost."""
        self.released = threading.Event()
        self._stream = stream
        self._json = as_json
        self._quiet = quiet
        self._ending = False

    def granted(self, session: StreamSession) -> None:
        token, owner = session.token, session.lease.owner
        if not self._quiet:
            text = f"holding {self._stream!r} under token {token} as {owner}"
            self._tell(text, event="granted", fencing_token=token, owner=owner)

    def renewed(self, session: StreamSession) -> None:
        if session.stopping.is_set() and not self._ending:
            self._ending = True
            text = f"{self._stream!r} was paused or retired: this command goes on, the next one has to wait"
            self._tell(text, event="ending", fencing_token=session.token)

    def lost(self, session: StreamSession, so: str) -> None:
        reason = str(session.loss or "revoked")
        text = f"lost the lease on {self._stream!r}, token {session.token} ({reason}): {so}"
        self._tell(text, event="lost", fencing_token=session.token, reason=reason)

    def _tell(self, text: str, **fields: object) -> None:
        if self._json:
            click.echo(json.dumps({**fields, "stream_id": self._stream}), err=True)
        else:
            say(text)
