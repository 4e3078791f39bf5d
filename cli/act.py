"""The commands that end or move a lease: steal, expire, release.

Each shows what it is about to do and asks, unless --yes; and acts on that very grant which it has shown: if the stream
has been granted anew meanwhile, it refuses.
"""

from __future__ import annotations

from datetime import timedelta

import click
from sqlalchemy import Connection

from leases import administration, operations
from leases.cli.command import REFUSED, Command, Failed, say
from leases.cli.context import (
    OWNER,
    PAUSE,
    REASON,
    STREAM,
    TTL,
    Settings,
    Token,
    actor_option,
    ask,
    can_ask,
    common_options,
    where,
    yes_option,
)
from leases.cli.render import as_object, print_json, print_line
from leases.cli.text import ago, duration
from leases.cli.watch import every, look
from leases.errors import LeaseHeld, LeaseNotHeld
from leases.model import Lease, LeaseInfo, State
from leases.store import LeaseStore

SHOWN = 20
"""How many streams are named before asking."""

timeout_option = click.option(
    "--timeout", type=PAUSE, default="10s", show_default=True, help="How long to wait for fenced writes in flight."
)
force_option = click.option("--force", is_flag=True, help="End the sessions that are in the way (PostgreSQL).")
reason_option = click.option("--reason", type=REASON, required=True, help="Why, for the audit.")


def _describe(info: LeaseInfo) -> str:
    """A lease as it stands, in one line."""
    if info.owner is None or info.remaining is None:
        return f"{info.stream_id}: {info.state}, token {info.fencing_token}"
    late = f"expired {duration(-info.remaining)} ago"
    return (
        f"{info.stream_id}: held by {info.owner}, token {info.fencing_token}, "
        f"{f'{duration(info.remaining)} left' if info.live else late}"
    )


def _only_where_it_works(store: LeaseStore, force: bool) -> None:
    if force and store.url.get_backend_name() != "postgresql":
        raise click.UsageError("--force is for PostgreSQL: a SQLite file has no sessions that could be ended")


@click.command(
    "steal",
    cls=Command,
    example="leases steal orders/7 --to host-2:881:5d0c11aa --reason 'host-1 is wedged'",
)
@click.argument("stream", type=STREAM)
@click.option("--to", type=OWNER, required=True, metavar="OWNER", help="The new owner.")
@reason_option
@click.option(
    "--ttl", type=TTL, default="1m", show_default=True, help="For how long; then the new owner must have renewed it."
)
@timeout_option
@force_option
@yes_option
@actor_option
@common_options
@click.pass_obj
def steal(
    settings: Settings,
    stream: str,
    to: str,
    reason: str,
    ttl: timedelta,
    timeout: timedelta,
    force: bool,
    yes: bool,
    actor: str,
) -> None:
    """Move a lease to a named owner, whoever holds it.

    When it is done, nothing under the old token can commit any more. While a fenced write is in flight it waits, up
    to --timeout, and then says who is in the way.
    """
    can_ask(yes)
    with settings.opened() as store:
        _only_where_it_works(store, force)
        info = look(store, stream)
        if info.state in (State.PAUSED, State.RETIRED):  # the store would find out only after ending the lease
            undo = "resume" if info.state is State.PAUSED else "register"
            raise Failed(REFUSED, f"{stream!r} is {info.state}; run `leases {undo}` first")
        stranger = _stranger(store, to)
        ask(yes, _describe(info), *stranger, f"Give it to {to} for {duration(ttl)}, on {where(store)}?")
        lease = store.steal(
            stream,
            to=to,
            ttl=ttl,
            actor=actor,
            reason=reason,
            fencing_token=info.fencing_token,
            timeout=timeout,
            force=force,
        )
    for warning in stranger if yes else ():
        say(warning)
    if settings.json:
        before = {"previous_owner": info.owner, "previous_token": info.fencing_token}
        print_json({**as_object(lease), **before})
    else:
        print_line(
            f"{stream}: {to} holds it for {duration(lease.remaining)}, token {lease.fencing_token}; "
            f"before: {info.owner or 'nobody'}, token {info.fencing_token}"
        )


def _stranger(store: LeaseStore, name: str) -> list[str]:
    """A warning if nobody who is known to be alive has the name: a typing error, or an owner that is on no list."""
    alive = [info.worker_id for info in store.workers() if info.live]
    if not alive or name in alive:
        return []
    return [f"no live worker is called {name!r} (alive: {', '.join(alive[:5])}); if nobody is, the lease just expires"]


@click.command(
    "expire",
    cls=Command,
    example="""\
leases expire orders/7 --reason 'wedged since 14:02'
leases expire --owner host-1:4121:9f3a2b1c --reason 'host-1 is gone' --yes
""",
)
@click.argument("streams", nargs=-1, type=STREAM, metavar="[STREAM]...")
@click.option("--owner", type=OWNER, metavar="OWNER", help="All that this owner holds, in place of streams.")
@reason_option
@timeout_option
@force_option
@yes_option
@actor_option
@common_options
@click.pass_obj
def expire(
    settings: Settings,
    streams: tuple[str, ...],
    owner: str | None,
    reason: str,
    timeout: timedelta,
    force: bool,
    yes: bool,
    actor: str,
) -> int:
    """End leases now, and leave their streams free.

    When it is done, nothing under the old token can commit any more. While a fenced write is in flight it waits, up
    to --timeout, and then says who is in the way. All streams are tried; exit code 1 if one was refused.
    """
    if bool(streams) == (owner is not None):
        raise click.UsageError("name streams, or --owner: one of the two")
    can_ask(yes)
    code = 0
    with settings.opened() as store:
        _only_where_it_works(store, force)
        chosen = []
        if owner is not None:
            chosen = every(store, owner=owner)
            if not chosen:
                raise Failed(REFUSED, f"{owner} holds nothing; `leases list` shows who does")
        for stream in dict.fromkeys(streams):
            info = store.get(stream)
            if info is None or info.owner is None:
                say(f"nobody holds {stream!r}" if info else f"no stream is called {stream!r}; `leases list` shows them")
                code = REFUSED
            else:
                chosen.append(info)
        if chosen:
            count = "this lease" if len(chosen) == 1 else f"these {len(chosen)} leases"
            more = [f"… and {len(chosen) - SHOWN} more"] if len(chosen) > SHOWN else []
            ask(yes, *map(_describe, chosen[:SHOWN]), *more, f"End {count}, on {where(store)}?")
        for info in chosen:
            try:
                token = store.expire(
                    info.stream_id,
                    actor=actor,
                    reason=reason,
                    fencing_token=info.fencing_token,
                    timeout=timeout,
                    force=force,
                )
            except (LeaseHeld, LeaseNotHeld) as error:
                say(str(error))
                code = REFUSED
                continue
            _expired(settings, info, token)
    return code


def _expired(settings: Settings, info: LeaseInfo, token: int) -> None:
    if settings.json:
        tokens = {"previous_token": info.fencing_token, "fencing_token": token}
        print_json({"stream_id": info.stream_id, "previous_owner": info.owner, **tokens})
    else:
        print_line(f"{info.stream_id}: {info.owner} no longer holds it; token {info.fencing_token} → {token}")


@click.command(
    "release",
    cls=Command,
    short_help="Let a lease go, as its owner would.",
    example="""\
leases release orders/7
leases release orders/7 --owner host-1:4121:9f3a2b1c --token 12
""",
)
@click.argument("stream", type=STREAM)
@click.option("--owner", type=OWNER, metavar="OWNER", help="Only if this is its owner.")
@click.option("--token", type=Token(), metavar="N", help="Only if this is its fencing token.")
@yes_option
@actor_option
@common_options
@click.pass_obj
def release(settings: Settings, stream: str, owner: str | None, token: int | None, yes: bool, actor: str) -> None:
    """Let a lease go, as its owner would: others may have it at once.

    For a worker that has ended without releasing. It does not wait for writes in flight, and the token stays: if the
    owner may still be at work, use `leases expire`. With both --owner and --token it does not ask.
    """
    yes = yes or (owner is not None and token is not None)
    can_ask(yes)
    with settings.opened() as store:
        info = look(store, stream)
        if info.owner is None:
            raise Failed(REFUSED, f"nobody holds {stream!r}")
        if owner not in (None, info.owner) or token not in (None, info.fencing_token):
            raise Failed(REFUSED, f"that is not the current grant; {_describe(info)}")
        ask(yes, _describe(info), f"Release it, on {where(store)}?")
        if not _release(store, info, actor):
            raise Failed(REFUSED, f"{stream!r} is no longer held under token {info.fencing_token}; look again")
    if settings.json:
        print_json({"stream_id": stream, "previous_owner": info.owner, "fencing_token": info.fencing_token})
    else:
        held = "" if info.acquired_at is None else f", acquired {ago(info.acquired_at, info.seen_at)}"
        print_line(f"{stream}: released by {info.owner}, token {info.fencing_token}{held}")


def _release(store: LeaseStore, info: LeaseInfo, actor: str) -> bool:
    """Release the grant that was shown and no other, with a line in the audit; False if it is no longer held."""
    assert info.owner is not None
    assert info.expires_at is not None
    lease = Lease(
        info.stream_id,
        info.owner,
        info.fencing_token,
        info.expires_at,
        info.acquired_at or info.seen_at,
        info.pool,
        info.remaining or timedelta(0),
    )

    def call(connection: Connection) -> bool:
        released = operations.release(connection, lease)
        if released:
            token = lease.fencing_token
            administration.record(connection, "release", actor, lease.stream_id, token, token, None)
        return released

    return store.run(call)
