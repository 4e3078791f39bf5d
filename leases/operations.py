"""What a worker does with leases: plain functions of a SQLAlchemy `Connection`, within the caller's transaction.

Each runs one statement where the engine can, and every one may be repeated without harm. None commits. Losing a race
is an answer (`None`, an empty list), not an error. Times are the database's, read when the statement begins.

The operator's actions are in `administration`, what only reads is in `views`, fenced writes are in `fencing` and
`events`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import Connection, Row

from leases import dialects, limits, statements
from leases.fencing import fence, named
from leases.model import DEFAULT_POOL, JSON, Ending, Lease, Loss, Released, Renewal


def register(connection: Connection, stream_ids: Iterable[str], *, pool: str = DEFAULT_POOL) -> int:
    """Make streams known, so that workers of the pool can claim them; return how many are new or came back.

    A stream that is known already stays as it is, whatever its pool; one that was retired comes back, in `pool`. A
    second call is harmless. Tokens go on from where they were.
    """
    given = limits.stream_ids(stream_ids)
    limits.pool(pool)
    if not given:
        return 0
    dialect = dialects.name_of(connection)
    values = {"stream_ids": dialects.names(dialect, given), "in_pool": pool}
    new = connection.execute(statements.register(dialect), values).all()
    back = connection.execute(statements.reinstate(dialect), values).all()
    if new or back:
        dialects.notify(connection, dialects.freed(pool))
    return len(new) + len(back)


def _introduce(connection: Connection, stream_id: str, *, pool: str) -> bool:
    """Register a stream that the table does not know; unlike `register`, leave a retired one retired."""
    dialect = dialects.name_of(connection)
    values = {"stream_ids": dialects.names(dialect, [stream_id]), "in_pool": limits.pool(pool)}
    return bool(connection.execute(statements.register(dialect), values).all())


def acquire(
    connection: Connection,
    stream_id: str,
    *,
    owner: str,
    ttl: timedelta,
    pool: str = DEFAULT_POOL,
    claim_id: UUID | None = None,
) -> Lease | None:
    """Take the lease on one stream if nobody holds it; None if somebody does, or if it is paused or retired.

    Never waits for a lock on the lease: a fenced write in flight means that it is held. A stream that is not known is
    registered, in `pool`. An expired lease is free: at `expires_at == now` it has expired. `claim_id` names
    this attempt: repeating the call with the same one returns the grant that the first call got, if it is
    still live, and not a second one.
    """
    values = {
        "stream": limits.stream_id(stream_id),
        "holder": limits.owner(owner),
        "ttl": limits.ttl(ttl).total_seconds(),
        "claim": claim_id or uuid4(),
    }
    granted = connection.execute(statements.ACQUIRE, values).one_or_none()
    if granted is None and _introduce(connection, stream_id, pool=pool):
        granted = connection.execute(statements.ACQUIRE, values).one_or_none()
    if granted is None and claim_id is not None:
        granted = connection.execute(statements.GRANTED_BEFORE, values).one_or_none()
    return None if granted is None else as_lease(granted)


def claim(
    connection: Connection,
    *,
    owner: str,
    ttl: timedelta,
    limit: int,
    pool: str = DEFAULT_POOL,
    claim_id: UUID | None = None,
    repeated: bool = False,
    held: int | None = None,
) -> list[Lease]:
    """Take up to `limit` streams of a pool that are free, or whose dead owner's lease has expired.

    Those that have been free longest come first. Costs O(owners + streams taken), however many leases there are. With
    `repeated`, the grants of an earlier call of the same `claim_id` whose answer was lost are returned instead. With
    `held`, how many leases the owner held before, its row in `lease_workers` tells the new count in the same moment.
    """
    values = {
        "holder": limits.owner(owner),
        "ttl": limits.ttl(ttl).total_seconds(),
        "at_most": limits.count("limit", limit, least=0),
        "in_pool": limits.pool(pool),
        "claim": claim_id or uuid4(),
    }
    limits.held(held)
    granted: Sequence[Row[Any]] = ()
    if repeated:
        granted = connection.execute(statements.CLAIMED_BEFORE, values).all()
    if not granted and limit:
        granted = connection.execute(statements.CLAIM_FREE, values).all()
    if granted and held is not None:
        report(connection, owner, held=held + len(granted))
    return sorted((as_lease(row) for row in granted), key=lambda lease: lease.stream_id)


def as_lease(row: Row[Any]) -> Lease:
    """Make a `Lease` of a row of `statements.GRANTED`. What many leases share, they share in memory."""
    return Lease(
        row.stream_id,
        sys.intern(row.owner),
        row.fencing_token,
        row.expires_at,
        row.acquired_at,
        sys.intern(row.pool),
        timedelta(seconds=row.remaining_s),
        row.failures,
    )


def report(connection: Connection, worker_id: str, *, held: int) -> None:
    """Tell how many leases a worker holds, in its row, if it has one. Does not extend the row."""
    connection.execute(statements.REPORT, {"holder": worker_id, "held": held})


def renew(
    connection: Connection, leases: Iterable[Lease], *, owner: str, ttl: timedelta, held: int | None = None
) -> Renewal:
    """Extend the leases of one owner to now + ttl, and with them the owner's own row in `lease_workers`, if it has one.

    All in one statement. A lease that has expired, or is no longer this grant's, is not revived: it is `lost`. One
    whose row somebody has locked is `skipped`: it keeps the expiry it had. The others are not held up by either. What
    else is in the owner's name, live or not, is a `stray`: see `fleet.strays`. With `held`, the owner's row also tells
    how many leases it holds.
    """
    dialect = dialects.name_of(connection)
    given = {lease.stream_id: lease for lease in limits.leases(leases)}
    values = {
        **dialects.grants_given(dialect, given.values()),
        "holder": limits.owner(owner),
        "ttl": limits.ttl(ttl).total_seconds(),
        "held": limits.held(held),
    }
    answer = connection.execute(statements.renew(dialect), values).all()
    if dialect == dialects.POSTGRESQL:
        missed = {row.stream_id for row in answer if row.renewed is False and row.stream_id is not None}
        strays = frozenset(row.stream_id for row in answer if row.renewed is None)
        worker_known = any(row.renewed for row in answer if row.stream_id is None)
    else:
        missed = given.keys() - {row.stream_id for row in answer}
        strays = frozenset(row.stream_id for row in connection.execute(statements.strays(dialect), values))
        worker_known = connection.execute(statements.OWN_BEAT, values).rowcount == 1
    # One whose grant is gone by now may be there as a stray, under a later token.
    ending = frozenset(row.stream_id for row in answer if row.stream_id is not None and row.ending)
    lost = _losses(connection, [given[stream_id] for stream_id in missed], owner) if missed else {}
    return Renewal(frozenset(missed - lost.keys()), lost, ending, worker_known, strays)


def _losses(connection: Connection, missed: Sequence[Lease], owner: str) -> Mapping[str, Loss]:
    """What became of the leases that a heartbeat did not extend; those that are still held are not in the answer."""
    dialect = dialects.name_of(connection)
    lost = {}
    for row in connection.execute(statements.look(dialect), dialects.grants_given(dialect, missed)):
        if row.current_token == row.fencing_token and row.owner == owner:
            if not row.live:
                lost[row.stream_id] = Loss.EXPIRED
        elif row.current_token == row.fencing_token:
            lost[row.stream_id] = Loss.RELEASED
        else:
            lost[row.stream_id] = Loss.REVOKED if row.owner is None else Loss.TAKEN
    return lost


def release(
    connection: Connection,
    lease: Lease,
    *,
    checkpoint: JSON = None,
    backoff: timedelta = timedelta(0),
    error: str | None = None,
) -> bool:
    """Let a lease go, so that others may have it at once, or after `backoff`; False if it was not held any more.

    Names the whole grant: a release that arrives late does nothing to a later grant, even of the same owner. A
    second call is harmless. Does not wait for fenced writes in flight: they may commit after it, but before the
    next grant. With a `checkpoint` that is not None it fences first and writes it: `StaleToken` if the lease is not
    live. With an `error` the stream's `failures` are counted up, without one they return to 0.
    """
    if checkpoint is not None:
        write_checkpoint(connection, lease, checkpoint)
    values = {
        **named(lease),
        "backoff": limits.backoff_s(backoff),
        "error": None if error is None else limits.text("error", error),
    }
    return connection.execute(statements.RELEASE, values).one_or_none() is not None


def release_all(connection: Connection, endings: Iterable[Ending], *, owner: str, held: int | None = None) -> Released:
    """Let a batch of one owner's leases go, in one statement.

    As `release` for each, but that it waits for no row: one that somebody has locked, be it the owner's own heartbeat,
    is named in the answer, and still the owner's: try again. With `held`, how many leases the owner will hold when all
    are released, its row in `lease_workers` tells its count in the same moment.
    """
    dialect = dialects.name_of(connection)
    given = limits.endings(endings)
    limits.held(held)
    values = {**dialects.endings_given(dialect, given), "holder": limits.owner(owner)}
    released = frozenset(row.stream_id for row in connection.execute(statements.release_all(dialect), values))
    missed = [ending.lease for ending in given if ending.lease.stream_id not in released]
    locked = (
        {lease.stream_id for lease in missed} - _losses(connection, missed, owner).keys() if missed else frozenset()
    )
    if held is not None:
        report(connection, owner, held=held + len(locked))
    return Released(released, frozenset(locked))


def recover(connection: Connection, lease: Lease) -> bool:
    """Forget how often the work on a stream has failed: it goes on well again. False if there was nothing to forget.

    Or if somebody has locked the row: this waits for nobody.
    """
    return connection.execute(statements.RECOVER, named(lease)).one_or_none() is not None


def write_checkpoint(connection: Connection, lease: Lease, checkpoint: JSON) -> None:
    """Write where the work on the stream has got to, under the fence: `StaleToken` if the lease is not live."""
    limits.document("checkpoint", checkpoint)
    fence(connection, lease)
    put_checkpoint(connection, lease, checkpoint)


def put_checkpoint(connection: Connection, lease: Lease, checkpoint: JSON) -> None:
    """Write the checkpoint in a transaction that has fenced already."""
    connection.execute(statements.PUT_CHECKPOINT, {**named(lease), "position": checkpoint})
