"""What only looks: streams, grants, checkpoints, the fleet, the audit, and who is in the way.

Functions of a `Connection`, as in `operations`. None changes anything; `require` can lock.
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import (
    Connection,
    Integer,
    Text,
    and_,
    any_,
    bindparam,
    case,
    cast,
    column,
    func,
    literal,
    select,
    table,
)

from leases import dialects, limits
from leases.dialects import matches_glob, now
from leases.errors import LeaseNotHeld
from leases.model import AuditEntry, Blocker, Checkpoint, EndReason, Grant, LeaseInfo, State, WorkerInfo
from leases.schema import lease_audit, lease_checkpoints, lease_grants, lease_workers, leases
from leases.statements import LIVE, STREAM

INFO = select(*leases.c, func.coalesce(LIVE, literal(False)).label("live"), now().label("seen_at"))

INFO_OF = INFO.where(leases.c.stream_id == STREAM)

LOCKED = {
    for_grant: leases.select().where(leases.c.stream_id == STREAM).with_for_update(key_share=not for_grant)
    for for_grant in (False, True)
}
"""A stream's row, locked as a grant would lock it, or as a heartbeat would."""

STATE = case(
    (leases.c.retired_at.is_not(None), State.RETIRED),
    (leases.c.paused_at.is_not(None), State.PAUSED),
    (and_(leases.c.owner.is_(None), leases.c.available_at > now()), State.RESTING),
    (leases.c.owner.is_(None), State.FREE),
    (leases.c.expires_at > now(), State.HELD),
    else_=State.EXPIRED,
)
"""`LeaseInfo.state`, for the WHERE of a list."""


def get(connection: Connection, stream_id: str) -> LeaseInfo | None:
    """One stream as it stands, or None if it is unknown."""
    return _one(connection, limits.stream_id(stream_id))


def require(connection: Connection, stream_id: str, *, locked: bool = False, for_grant: bool = False) -> LeaseInfo:
    """One stream as it stands, or `LeaseNotHeld`; `locked` to the end of the transaction, as a heartbeat would lock it.

    With `for_grant` locked as a grant would: it waits for fenced writes in flight. The answer is of after the wait.
    """
    name = limits.stream_id(stream_id)
    if locked:
        connection.execute(LOCKED[for_grant], {"stream": name}).one_or_none()
    info = _one(connection, name)
    if info is None:
        raise LeaseNotHeld(f"no stream is called {stream_id!r}; `leases list` shows them", stream_id=stream_id)
    return info


def _one(connection: Connection, stream_id: str) -> LeaseInfo | None:
    row = connection.execute(INFO_OF, {"stream": stream_id}).mappings().one_or_none()
    return None if row is None else LeaseInfo(**row)


def list_leases(
    connection: Connection,
    *,
    owner: str | None = None,
    pool: str | None = None,
    state: State | str | None = None,
    glob: str | None = None,
    after: str | None = None,
    limit: int = 100,
) -> list[LeaseInfo]:
    """A page of streams in the order of stream_id: those after `after`, up to `limit`.

    `glob` is for stream_id: `*` is any text, `?` any character. A page's last stream_id is the `after` of the next.
    """
    chosen = INFO.order_by(leases.c.stream_id).limit(limits.count("limit", limit))
    if owner is not None:
        chosen = chosen.where(leases.c.owner == limits.owner(owner))
    if pool is not None:
        chosen = chosen.where(leases.c.pool == limits.pool(pool))
    if state is not None:
        chosen = chosen.where(STATE.in_([limits.state(state).value]))
    if glob is not None:
        chosen = chosen.where(matches_glob(dialects.name_of(connection), leases.c.stream_id, limits.stream_id(glob)))
    if after is not None:
        chosen = chosen.where(leases.c.stream_id > limits.text("after", after))
    return [LeaseInfo(**row) for row in connection.execute(chosen).mappings()]


def grants(
    connection: Connection,
    stream_id: str,
    *,
    at: datetime | None = None,
    before: int | None = None,
    limit: int = 100,
) -> list[Grant]:
    """The grants of a stream, the latest first: up to `limit`, of tokens below `before`.

    With `at` (an aware time, compared by the database's clock) only the grant that was live then: none or one.
    """
    current = and_(
        leases.c.stream_id == lease_grants.c.stream_id, leases.c.fencing_token == lease_grants.c.fencing_token
    )
    chosen = (
        select(*lease_grants.c, leases.c.expires_at)
        .select_from(lease_grants.outerjoin(leases, current))
        .where(lease_grants.c.stream_id == limits.stream_id(stream_id))
        .order_by(lease_grants.c.fencing_token.desc())
        .limit(limits.count("limit", limit))
    )
    if before is not None:
        chosen = chosen.where(lease_grants.c.fencing_token < limits.fencing_token(before))
    if at is not None:
        limits.instant("at", at)
        over = func.coalesce(lease_grants.c.ended_at, leases.c.expires_at)
        chosen = chosen.where(lease_grants.c.granted_at <= at, over > at)
    return [
        Grant(
            row.stream_id,
            row.fencing_token,
            row.owner,
            row.granted_at,
            row.ended_at,
            None if row.end_reason is None else EndReason(row.end_reason),
            row.expires_at if row.ended_at is None else None,
        )
        for row in connection.execute(chosen)
    ]


def read_checkpoint(connection: Connection, stream_id: str) -> Checkpoint | None:
    """Where the work on a stream has got to, or None if nobody has written it yet."""
    columns = lease_checkpoints.c
    row = connection.execute(
        select(columns.stream_id, columns.checkpoint, columns.fencing_token, columns.updated_at).where(
            columns.stream_id == limits.stream_id(stream_id)
        )
    ).one_or_none()
    return None if row is None else Checkpoint(*row)


def audit(connection: Connection, *, stream_id: str | None = None, limit: int = 100) -> list[AuditEntry]:
    """What operators did, the latest first; of one stream, or of all."""
    columns = lease_audit.c
    chosen = (
        select(
            columns.at,
            columns.actor,
            columns.action,
            columns.stream_id,
            columns.token_before,
            columns.token_after,
            columns.reason,
        )
        .order_by(columns.audit_id.desc())
        .limit(limits.count("limit", limit))
    )
    if stream_id is not None:
        chosen = chosen.where(columns.stream_id == limits.stream_id(stream_id))
    return [AuditEntry(*row) for row in connection.execute(chosen)]


def workers(connection: Connection, *, pool: str | None = None) -> list[WorkerInfo]:
    """The processes that keep leases, the dead among them too until they are pruned."""
    chosen = select(*lease_workers.c, now().label("seen_at")).order_by(lease_workers.c.worker_id)
    if pool is not None:
        chosen = chosen.where(lease_workers.c.pool == limits.pool(pool))
    return [WorkerInfo(**row) for row in connection.execute(chosen).mappings()]


def blockers(connection: Connection, pid: int) -> list[Blocker]:
    """The sessions that the session of server process `pid` is waiting for, right now (PostgreSQL)."""
    activity = table(
        "pg_stat_activity",
        *(
            column(name)
            for name in (
                "pid",
                "application_name",
                "usename",
                "client_addr",
                "state",
                "xact_start",
                "backend_start",
            )
        ),
    )
    shown = activity.c
    chosen = select(
        shown.pid,
        func.coalesce(shown.application_name, ""),
        func.coalesce(cast(shown.usename, Text), ""),
        func.coalesce(cast(shown.client_addr, Text), "local"),
        func.coalesce(shown.state, ""),
        func.coalesce(shown.xact_start, shown.backend_start),
    ).where(shown.pid == any_(func.pg_blocking_pids(bindparam("waiting", type_=Integer))))
    return [Blocker(*row) for row in connection.execute(chosen, {"waiting": pid})]
