"""What an operator does: end or move a lease, pause, resume, retire, reset, prune. Each leaves a line in `lease_audit`.

Functions of a `Connection`, as in `operations`. To expire and to steal takes two of them, each with a commit of its own
(`recipes` puts them together):

1. `end_now` sets `expires_at` to now. It passes fenced writes in flight, and no new fence passes.
2. `revoke`, or `hand_over`, raises the token. It waits for the fenced writes in flight, so that nothing under the old
   token can commit once it is back. `bound` limits the wait.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, and_, delete, exists, func, insert, select, tuple_, update
from sqlalchemy.dialects import postgresql

from leases import dialects, limits
from leases.dialects import concerns, freed, later, now, one_of
from leases.errors import LeaseHeld, LeaseNotHeld
from leases.model import JSON, Lease, LeaseInfo, Observed, Pruned
from leases.operations import as_lease
from leases.schema import lease_audit, lease_checkpoints, lease_events, lease_grants, lease_workers, leases
from leases.statements import GRANTED, LIVE
from leases.views import require

PRUNE_BATCH = 10_000
"""How many rows one transaction of a prune deletes from each table, at the most."""


def bound(connection: Connection, timeout_s: float) -> None:
    """Limit how long each following statement of this transaction may take (PostgreSQL; SQLite: see `engine`).

    By `statement_timeout`, not `lock_timeout`, which starts anew with each of several writers that are waited for.
    """
    if dialects.name_of(connection) == dialects.POSTGRESQL:
        milliseconds = max(1, int(timeout_s * 1000))
        connection.execute(select(func.set_config("statement_timeout", f"{milliseconds}ms", True)))


def backend_pid(connection: Connection) -> int:
    """The server's process that serves this connection (PostgreSQL)."""
    return int(connection.execute(select(func.pg_backend_pid())).scalar_one())


def terminate(connection: Connection, pids: Iterable[int]) -> int:
    """End database sessions, and with them their transactions; return how many were there (PostgreSQL)."""
    return sum(bool(connection.execute(select(func.pg_terminate_backend(pid))).scalar_one()) for pid in pids)


def end_now(
    connection: Connection,
    stream_id: str,
    *,
    fencing_token: int | None = None,
    must_be_held: bool = True,
    must_be_open: bool = False,
) -> Observed:
    """First step: let no new fence pass. The lease's expiry becomes now; one that has expired already is left.

    `LeaseNotHeld` if the stream is unknown, if nobody holds it (unless that is allowed), or if the current grant is not
    the one of `fencing_token`; `LeaseHeld` if it must be open, and is paused or retired. Then nothing is changed.
    """
    info = require(connection, stream_id, locked=True)
    if info.owner is None and must_be_held:
        raise LeaseNotHeld(f"nobody holds {stream_id!r}; nothing to end", stream_id=stream_id)
    if fencing_token is not None and info.fencing_token != fencing_token:
        raise LeaseNotHeld(
            f"{stream_id!r} is at token {info.fencing_token} by now, not {fencing_token}; look again",
            stream_id=stream_id,
        )
    if must_be_open:
        _require_open(info)
    if info.live:
        # Not one that has expired meanwhile: its end would move.
        connection.execute(update(leases).where(leases.c.stream_id == stream_id, LIVE).values(expires_at=now()))
    return Observed(stream_id, info.owner, info.fencing_token, info.live)


def revoke(connection: Connection, observed: Observed, *, actor: str, reason: str | None = None) -> int:
    """Second step of expire: raise the token past the observed grant's, and leave the stream free; return the token.

    Waits for fenced writes in flight. If the stream has been granted anew since, that grant is left alone.
    """
    info = require(connection, observed.stream_id, locked=True, for_grant=True)
    if info.fencing_token > observed.fencing_token:
        # Somebody was faster. We hold the row as a grant would: nothing under the old token is in flight.
        return info.fencing_token
    token: int = _swap(connection, info, owner=None, expires_at=None, available_at=now()).fencing_token
    dialects.notify(connection, freed(info.pool), concerns(info.owner))
    record(connection, "expire", actor, info.stream_id, info.fencing_token, token, reason)
    return token


def hand_over(
    connection: Connection,
    observed: Observed,
    *,
    to: str,
    ttl: timedelta,
    claim_id: UUID,
    actor: str,
    reason: str | None = None,
) -> Lease:
    """Second step of steal: grant the stream to `to` under a new token, whoever holds it by now.

    Waits for fenced writes in flight; the new lease's `ttl` counts from after the wait. The same `claim_id` again
    returns the same grant. `LeaseHeld` if the stream is paused or retired. A UUID of version 5 marks the grant as an
    operator's: a worker of the name `to` finds it with its next heartbeat, and opens a session on it.
    """
    info = require(connection, observed.stream_id, locked=True, for_grant=True)
    if info.claim_id == claim_id and info.owner == to:
        return as_lease(connection.execute(select(*GRANTED).where(leases.c.stream_id == info.stream_id)).one())
    _require_open(info)
    swapped = _swap(
        connection,
        info,
        owner=limits.owner(to),
        expires_at=later(limits.ttl(ttl).total_seconds()),
        acquired_at=now(),
        claim_id=claim_id,
    )
    granted = as_lease(swapped)
    dialects.notify(connection, concerns(info.owner), concerns(to))
    if info.owner is not None and (observed.live or info.fencing_token != observed.fencing_token):
        # Step one made it look expired.
        connection.execute(
            update(lease_grants)
            .where(lease_grants.c.stream_id == info.stream_id, lease_grants.c.fencing_token == info.fencing_token)
            .values(end_reason="stolen")
        )
    record(connection, "steal", actor, info.stream_id, info.fencing_token, granted.fencing_token, reason)
    return granted


def _require_open(info: LeaseInfo) -> None:
    if info.paused_at is not None or info.retired_at is not None:
        undo = "leases resume" if info.retired_at is None else "leases register"
        raise LeaseHeld(
            f"{info.stream_id!r} is {info.state}; run `{undo}` first",
            stream_id=info.stream_id,
            owner=info.owner,
        )


def _swap(connection: Connection, info: LeaseInfo, **values: Any) -> Row[Any]:
    """Raise the token of a row that this transaction has locked; return its columns as `GRANTED`."""
    changed = (
        update(leases)
        .where(leases.c.stream_id == info.stream_id, leases.c.fencing_token == info.fencing_token)
        .values(fencing_token=info.fencing_token + 1, **values)
    )
    return connection.execute(changed.returning(*GRANTED)).one()


# --- pause, resume, retire -------------------------------------------------------------------------------------


def pause(connection: Connection, stream_id: str, *, actor: str, reason: str | None = None) -> None:
    """Let nobody acquire the stream until `resume`. Its owner keeps the lease, and is told with its next heartbeat.

    A second call changes nothing but the reason, if it gives one. `LeaseNotHeld` if the stream is unknown.
    """
    info = require(connection, stream_id, locked=True)
    if info.paused_at is None or reason is not None:
        connection.execute(
            update(leases)
            .where(leases.c.stream_id == stream_id)
            .values(
                paused_at=func.coalesce(leases.c.paused_at, now()),
                paused_by=limits.text("actor", actor),
                pause_reason=None if reason is None else limits.text("reason", reason),
            )
        )
    dialects.notify(connection, concerns(info.owner))
    record(connection, "pause", actor, stream_id, info.fencing_token, info.fencing_token, reason)


def resume(connection: Connection, stream_id: str, *, actor: str, reason: str | None = None) -> bool:
    """Let a paused stream be acquired again; False if it was not paused. `LeaseNotHeld` if it is unknown."""
    info = require(connection, stream_id, locked=True)
    if info.paused_at is None:
        return False
    connection.execute(
        update(leases).where(leases.c.stream_id == stream_id).values(paused_at=None, paused_by=None, pause_reason=None)
    )
    dialects.notify(connection, freed(info.pool))
    record(connection, "resume", actor, stream_id, info.fencing_token, info.fencing_token, reason)
    return True


def retire(
    connection: Connection,
    stream_ids: Iterable[str],
    *,
    pool: str | None = None,
    actor: str | None = None,
    reason: str | None = None,
) -> int:
    """Let nobody acquire these streams until they are registered again; return how many were not retired before.

    An owner keeps its lease, and is told with its next heartbeat. The rows stay, and with them their tokens. Unknown
    streams are passed over, and so are those of another `pool`, if one is given. With an `actor` each leaves a line in
    the audit.
    """
    given = limits.stream_ids(stream_ids)
    dialect = dialects.name_of(connection)
    rows = connection.execute(
        update(leases)
        .where(
            one_of(leases.c.stream_id, dialects.names_given(dialect, "stream_ids").scalar_subquery()),
            leases.c.retired_at.is_(None),
            *([] if pool is None else [leases.c.pool == limits.pool(pool)]),
        )
        .values(retired_at=now())
        .returning(leases.c.stream_id, leases.c.fencing_token, concerns(leases.c.owner).label("notified")),
        {"stream_ids": dialects.names(dialect, given)},
    ).all()
    if actor is not None:
        for row in rows:
            record(connection, "retire", actor, row.stream_id, row.fencing_token, row.fencing_token, reason)
    return len(rows)


# --- repairs ---------------------------------------------------------------------------------------------------


def reset_checkpoint(
    connection: Connection, stream_id: str, checkpoint: JSON, *, actor: str, reason: str | None = None
) -> None:
    """Set a stream's checkpoint by hand. `LeaseHeld` while somebody holds the lease: pause or expire it first."""
    limits.document("checkpoint", checkpoint)
    info = require(connection, stream_id, locked=True, for_grant=True)
    if info.live:
        raise LeaseHeld(
            f"{info.owner} holds {stream_id!r} and would overwrite it; pause the stream, expire the lease, try again",
            stream_id=stream_id,
            owner=info.owner,
        )
    new = postgresql.insert(lease_checkpoints).values(
        stream_id=stream_id, fencing_token=info.fencing_token, checkpoint=checkpoint, updated_at=now()
    )
    connection.execute(
        new.on_conflict_do_update(
            index_elements=[lease_checkpoints.c.stream_id],
            set_={name: new.excluded[name] for name in ("fencing_token", "checkpoint", "updated_at")},
        )
    )
    record(connection, "reset-checkpoint", actor, stream_id, info.fencing_token, info.fencing_token, reason)


def raise_tokens(connection: Connection, *, by: int = 1_000_000, actor: str, reason: str | None = None) -> int:
    """Raise every token by so much and end every lease: to be done after a backup was restored. Return how many.

    A backup brings back old tokens, which would then be granted a second time. `by` must be more than the number of
    grants that any stream can have had since the backup was taken. Repeating it does no harm.
    """
    limits.count("by", by, most=2**40)
    if reason is not None:
        limits.text("reason", reason)
    count = connection.execute(
        update(leases).values(
            fencing_token=leases.c.fencing_token + by, owner=None, expires_at=None, available_at=now()
        )
    ).rowcount
    record(connection, "raise-tokens", actor, None, None, None, f"by {by}: {reason}" if reason else f"by {by}")
    return count


def prune(connection: Connection, *, before: datetime, limit: int = PRUNE_BATCH) -> Pruned:
    """Delete what ended before an instant, up to `limit` rows a table: call again until it deletes nothing.

    Grants that ended, events, audit lines, dead workers, and the checkpoints of streams that were retired
    before it. Never a row of `leases`: it carries the token; nor a stream's last event: the next `seq` goes on from it.
    An event that is gone can be appended again.
    """
    limits.count("limit", limit)

    def old(table: Any, condition: Any) -> int:
        keys = list(table.primary_key.columns)
        chosen = select(*keys).where(condition).limit(limit)
        return connection.execute(delete(table).where(tuple_(*keys).in_(chosen))).rowcount

    return Pruned(**{name: old(table, condition) for name, (table, condition) in _ended(before).items()})


def prunable(connection: Connection, *, before: datetime) -> Pruned:
    """Count what `prune` would delete, and delete nothing."""

    def old(table: Any, condition: Any) -> int:
        return connection.execute(select(func.count()).select_from(table).where(condition)).scalar_one()

    return Pruned(**{name: old(table, condition) for name, (table, condition) in _ended(before).items()})


def _ended(before: datetime) -> dict[str, tuple[Any, Any]]:
    """What a prune deletes: tables and their conditions, by the names of `Pruned`."""
    retired = select(leases.c.stream_id).where(leases.c.retired_at < before)
    later_event = lease_events.alias("later")
    not_last = exists().where(
        later_event.c.stream_id == lease_events.c.stream_id, later_event.c.seq > lease_events.c.seq
    )
    return {
        "grants": (lease_grants, lease_grants.c.ended_at < before),
        "events": (lease_events, and_(lease_events.c.recorded_at < before, not_last)),
        "audit": (lease_audit, lease_audit.c.at < before),
        "checkpoints": (lease_checkpoints, lease_checkpoints.c.stream_id.in_(retired)),
        "workers": (lease_workers, lease_workers.c.expires_at < before),
    }


def record(
    connection: Connection,
    action: str,
    actor: str,
    stream_id: str | None,
    before: int | None,
    after: int | None,
    reason: str | None,
) -> None:
    """Write one line of the audit."""
    connection.execute(
        insert(lease_audit).values(
            at=now(),
            actor=limits.text("actor", actor),
            action=action,
            stream_id=stream_id,
            token_before=before,
            token_after=after,
            reason=None if reason is None else limits.text("reason", reason),
        )
    )
