"""The processes that keep leases: their rows in `lease_workers`, a view of a pool, and what is found in one's own name.

Functions of a `Connection`, as in `operations`. A worker's row is live while its heartbeats extend it. Whoever is live
looks after its own rows itself: nobody else claims what has expired in its name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from datetime import timedelta
from functools import cache
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Connection,
    Double,
    Select,
    Text,
    bindparam,
    case,
    delete,
    exists,
    func,
    literal,
    not_,
    select,
    true,
    union_all,
    update,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.sql.dml import ReturningUpdate

from leases import dialects, limits
from leases.balance import Peer, View
from leases.dialects import POSTGRESQL, concerns, freed, later, names_given, now, one_of
from leases.model import Lease, Membership, Stray
from leases.operations import as_lease
from leases.schema import lease_workers, leases
from leases.statements import (
    ALIVE,
    AT_MOST,
    CLAIM,
    EXPIRED,
    GRANTED,
    HOLDER,
    LIVE,
    OPEN,
    OWN_ROW,
    TTL,
    free_rows,
    left_behind,
)
from leases.types import Identity

ACTIVE, DRAINING = "active", "draining"


def enlist(connection: Connection, member: Membership, *, ttl: timedelta) -> None:
    """Add the worker's row, live for `ttl`: its leases are its own to look after. A second call extends it.

    The row of an earlier process of that name is taken over. Waits for nobody: a row that is locked is left alone.
    """
    limits.member(member)
    values = {f"its_{name}": value for name, value in asdict(member).items()}
    values |= {"holder": member.worker_id, "ttl": limits.ttl(ttl).total_seconds()}
    if connection.execute(ENLIST, values).one_or_none() is None:
        connection.execute(ENLIST_AGAIN, values)


def namesake(connection: Connection, member: Membership) -> tuple[str, int] | None:
    """The host and pid of another live process of the worker's name, or None: two must not share one."""
    row = connection.execute(NAMESAKE, {"holder": member.worker_id}).one_or_none()
    return None if row is None or row.incarnation == member.incarnation else (row.host, row.pid)


def dismiss(connection: Connection, worker_id: str) -> None:
    """Delete the worker's row: whatever it still holds is anybody's when it expires. A second call is harmless."""
    connection.execute(delete(lease_workers).where(lease_workers.c.worker_id == limits.owner(worker_id)))


def bury(connection: Connection, *, dead_for: timedelta) -> int:
    """Delete the rows of workers that have been dead for so long and hold nothing; return how many."""
    columns = lease_workers.c
    return connection.execute(
        delete(lease_workers).where(
            columns.expires_at < later(-dead_for.total_seconds()),
            not_(exists().where(leases.c.owner == columns.worker_id)),
        )
    ).rowcount


def drain(connection: Connection, worker_id: str) -> bool:
    """Ask a worker to let all its streams go and to leave; False if it is not live. A second call is harmless."""
    return connection.execute(DRAIN, {"holder": limits.owner(worker_id)}).one_or_none() is not None


def observe(connection: Connection, pool: str, worker_id: str, *, count_up_to: int, patience_s: float) -> View:
    """See a pool as it is at one moment: its live workers, and how many streams could be claimed, or for longer.

    One statement; costs O(workers + owners + streams counted), however many leases there are.
    """
    values = {"in_pool": pool, "holder": worker_id, "at_most": count_up_to, "patience": -patience_s}
    rows = connection.execute(OBSERVE, values).all()
    peers = [Peer(name, held, weight, capacity, state == DRAINING) for name, held, weight, capacity, state, *_ in rows]
    available, overdue = rows[0][-2:] if rows else (0, 0)
    return View(peers, available, overdue, counted_all=available < count_up_to)


# --- what is found in one's own name -----------------------------------------------------------------------------


def strays(connection: Connection, stream_ids: Iterable[str], *, owner: str) -> list[Stray]:
    """What those rows are that a heartbeat has found in the owner's name, and did not know of."""
    dialect = dialects.name_of(connection)
    values = {"stream_ids": dialects.names(dialect, sorted(stream_ids)), "holder": owner}
    return [Stray(*row) for row in connection.execute(_strays(dialect), values)]


def adopt(connection: Connection, stray: Stray, *, owner: str, ttl: timedelta, claim_id: UUID) -> Lease | None:
    """Extend a live stray and make it the attempt `claim_id`'s; None if it is no longer so, or locked.

    A compare-and-swap on the claim_id: of two that try, one has it.
    """
    values = {
        "stream": stray.stream_id,
        "token": stray.fencing_token,
        "holder": owner,
        "found": stray.claim_id,
        "claim": claim_id,
        "ttl": limits.ttl(ttl).total_seconds(),
    }
    row = connection.execute(ADOPT, values).one_or_none()
    return None if row is None else as_lease(row)


def let_go_expired(connection: Connection, *, owner: str) -> int:
    """Free the rows in this owner's name that have expired; return how many. Others leave a live owner's rows to it.

    Its sessions have ended before (trust is shorter than the lease), or it never knew of them: an operator moved
    them here, or a claim's answer was lost. A row that somebody has locked is passed over.
    """
    return len(connection.execute(LET_GO_EXPIRED, {"holder": limits.owner(owner)}).all())


# --- its statements ----------------------------------------------------------------------------------------------

_DESCRIPTION = ("worker_id", "host", "pid", "version", "pool", "capacity", "weight", "incarnation")
_ITS = {name: bindparam(f"its_{name}", type_=lease_workers.c[name].type) for name in _DESCRIPTION}

ENLIST = (
    postgresql.insert(lease_workers)
    .values(_ITS | {"started_at": now(), "expires_at": later(TTL), "beaten_at": now()})
    .on_conflict_do_nothing(index_elements=[lease_workers.c.worker_id])
    .returning(lease_workers.c.worker_id)
)
"""Insert the worker's row. One that is there, perhaps locked, is left alone: this waits for nobody."""


def _enlist_again() -> Any:
    columns = lease_workers.c
    same = columns.incarnation.is_not_distinct_from(_ITS["incarnation"])

    def kept(column: ColumnElement[Any], otherwise: Any) -> ColumnElement[Any]:
        return case((same, column), else_=otherwise)

    return (
        update(lease_workers)
        .where(one_of(columns.worker_id, OWN_ROW.scalar_subquery()))
        .values(
            {name: value for name, value in _ITS.items() if name != "worker_id"}
            | {
                "started_at": kept(columns.started_at, now()),
                "state": kept(columns.state, literal(ACTIVE)),
                "lease_count": kept(columns.lease_count, literal(0)),
                "expires_at": later(TTL),
                "beaten_at": now(),
            }
        )
    )


ENLIST_AGAIN = _enlist_again()
"""Extend the worker's row where it is there, and nobody has locked it; of an earlier process nothing is kept."""

NAMESAKE = select(lease_workers.c.host, lease_workers.c.pid, lease_workers.c.incarnation).where(
    lease_workers.c.worker_id == HOLDER, ALIVE
)

DRAIN = (
    update(lease_workers)
    .where(lease_workers.c.worker_id == HOLDER, ALIVE)
    .values(state=DRAINING)
    .returning(lease_workers.c.worker_id, concerns(lease_workers.c.worker_id).label("notified"))
)


def _observe() -> Select[Any]:
    free = free_rows().order_by(None).limit(AT_MOST).subquery("free")
    left = left_behind().limit(AT_MOST).subquery("left")
    there = union_all(select(free.c.since), select(left.c.since)).subquery("there")
    counted = select(
        func.count().label("available"),
        func.count().filter(there.c.since <= later(bindparam("patience", type_=Double))).label("overdue"),
    ).subquery("counted")
    columns = lease_workers.c
    return (
        select(columns.worker_id, columns.lease_count, columns.weight, columns.capacity, columns.state, *counted.c)
        .select_from(lease_workers.join(counted, true()))
        .where(columns.pool == bindparam("in_pool", type_=Text), ALIVE)
        .order_by(columns.worker_id)
    )


OBSERVE = _observe()


@cache
def _strays(dialect: str) -> Select[Any]:
    given = names_given(dialect, "stream_ids").scalar_subquery()
    return select(
        leases.c.stream_id, leases.c.fencing_token, leases.c.claim_id, func.coalesce(LIVE, literal(False)).label("live")
    ).where(one_of(leases.c.stream_id, given), leases.c.owner == HOLDER)


def _adopt() -> ReturningUpdate[Any]:
    # Locked first, as ever: an UPDATE that waited for a lock would not look at the expiry again.
    row = (
        select(leases.c.stream_id)
        .where(
            leases.c.stream_id == bindparam("stream", type_=Text),
            leases.c.fencing_token == bindparam("token", type_=leases.c.fencing_token.type),
            leases.c.owner == HOLDER,
            leases.c.claim_id == bindparam("found", type_=Identity),
            LIVE,
            OPEN,
        )
        .with_for_update(key_share=True, skip_locked=True, of=leases)
        .cte("row")
        .prefix_with("MATERIALIZED", dialect=POSTGRESQL)
    )
    return (
        update(leases)
        .where(one_of(leases.c.stream_id, select(row.c.stream_id).scalar_subquery()))
        .values(expires_at=later(TTL), claim_id=CLAIM)
        .returning(*GRANTED)
    )


ADOPT = _adopt()

_EXPIRED_HERE = (
    select(leases.c.stream_id)
    .where(leases.c.owner == HOLDER, EXPIRED)
    .with_for_update(skip_locked=True, of=leases)
    .cte("expired_here")
    .prefix_with("MATERIALIZED", dialect=POSTGRESQL)
)

LET_GO_EXPIRED = (
    update(leases)
    .where(one_of(leases.c.stream_id, select(_EXPIRED_HERE.c.stream_id).scalar_subquery()))
    .values(owner=None, expires_at=None, available_at=now())
    .returning(leases.c.stream_id, freed(leases.c.pool).label("notified"))
)
"""Free what has expired in one owner's name."""
