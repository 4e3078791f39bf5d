"""The fence: the check, inside the writer's own transaction, that its token is the stream's current one.

A lease alone is not safe. A process can look at its lease, be paused (a garbage collection, a SIGSTOP, a VM that
moves), lose the lease, wake up and write. The fence closes that gap, because check and write commit together:

    with engine.begin() as connection:
        fence(connection, lease)                       # StaleToken, and the transaction is rolled back; or:
        connection.execute(insert(results).values(…))  # nobody is granted the stream before this commits

What it promises: if `fence` returns, no grant, steal or expire of that stream commits before this transaction ends;
and at the moment of the check the token was current, the owner the row's, and the lease unexpired. It holds at every
isolation level, but that under REPEATABLE READ and SERIALIZABLE the check is of the transaction's snapshot: a release
or an operator's first step that was committed since is not seen. No grant commits, all the same. Heartbeats pass.

How, on PostgreSQL: the row is locked `FOR KEY SHARE`. A grant raises the token, which is a column of a unique index,
and so needs `FOR UPDATE`, which waits; a heartbeat needs `FOR NO KEY UPDATE`, which does not. After the lock the expiry
is compared with the clock as it is *then*. If it passes, the server is told to end this session should it idle in the
transaction beyond the lease's end (from PostgreSQL 17 on: should the transaction last beyond it), so that a frozen
writer blocks a takeover no longer than its lease. A caller's own, shorter limits stay. So **a fenced transaction must
fit into what is left of the lease**: fence late, write, commit.

How, on SQLite: the check is an UPDATE that changes nothing and takes the file's write lock.

What it refuses: autocommit, where the lock would be gone at once; and savepoints, where ROLLBACK TO would give the
lock back while the writer believes in it.

A sink in another database cannot share the transaction. There `advance_watermark` keeps the highest token it has
seen, and refuses lower ones.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from sqlalchemy import (
    Boolean,
    Column,
    ColumnElement,
    Connection,
    FromClause,
    Integer,
    Interval,
    MetaData,
    PrimaryKeyConstraint,
    Select,
    Subquery,
    Table,
    and_,
    bindparam,
    case,
    cast,
    column,
    func,
    literal,
    literal_column,
    or_,
    select,
    table,
    true,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from leases import dialects, limits
from leases.dialects import durably, now, seconds, wall
from leases.errors import ConfigError, StaleToken
from leases.model import Lease
from leases.schema import Whole, leases
from leases.statements import MINE, REMAINING
from leases.types import Name


def fence(connection: Connection, lease: Lease) -> None:
    """Check that `lease` is current, and keep it so until the connection's transaction ends.

    Call it in the transaction that does the fenced work, before the work. A second call is harmless.

    Raises `StaleToken` (with both tokens) after rolling the whole transaction back, so that nothing of it can be kept
    by mistake: whoever swallows the error can write nothing more before a rollback of their own. `ConfigError` outside
    a transaction, in autocommit mode or within a savepoint. Under REPEATABLE READ and SERIALIZABLE a grant that was
    committed since the transaction's first statement shows as the database's serialization failure (SQLSTATE 40001), as
    any other conflict does.
    """
    if connection.in_nested_transaction():
        raise ConfigError("fence inside a savepoint does not hold: call it in the outermost transaction")
    fencing = _fence_postgresql if dialects.name_of(connection) == dialects.POSTGRESQL else _fence_sqlite
    passed = fencing(connection, named(lease))
    if not dialects.in_transaction(connection):
        raise ConfigError("fence needs a transaction, and this connection is in autocommit mode")
    if not passed:
        raise refused(connection, lease)


def named(lease: Lease) -> dict[str, Any]:
    """The parameters by which every message names its grant; `ConfigError` if it cannot be one."""
    limits.lease(lease)
    return {"stream": lease.stream_id, "token": lease.fencing_token, "holder": lease.owner}


@cache
def _current(owners: Table) -> Select[Any]:
    return select(owners.c.fencing_token, owners.c.owner).where(owners.c.stream_id == bindparam("stream"))


def refused(connection: Connection, lease: Lease, owners: Table = leases) -> StaleToken:
    """Roll the transaction back, and return the error that says who is current."""
    current = connection.execute(_current(owners), {"stream": lease.stream_id}).one_or_none()
    token, owner = current if current is not None else (None, None)
    transaction = connection.get_transaction()
    if transaction is not None:
        # Rolled back, but left in its place, as SQLAlchemy leaves one whose COMMIT failed: until its user rolls it back
        # too, nothing can be written, also not in a transaction that would begin by itself. A plain rollback()
        # would let that happen, and the ORM's Session would warn that it cannot roll back once more.
        transaction._connection_rollback_impl()
        transaction._deactivate_from_connection()
    return StaleToken(lease.stream_id, lease.fencing_token, token, owner)


def _fence_postgresql(connection: Connection, grant: dict[str, Any]) -> bool:
    checked = connection.execute(_check(dialects.postgresql_version(connection)), grant).one_or_none()
    if checked is None:
        return False
    if not checked.outermost and connection.execute(SAVEPOINTS).scalar_one():
        raise ConfigError("fence inside a savepoint does not hold: call it in the outermost transaction")
    return True


def _fence_sqlite(connection: Connection, grant: dict[str, Any]) -> bool:
    return connection.execute(FENCE_SQLITE, grant).one_or_none() is not None


# --- its statements ----------------------------------------------------------------------------------------------


def _shortened(timeout: str, remaining: Subquery) -> ColumnElement[Any]:
    """Set one of the transaction's time limits to what is left of the lease, unless the caller's own ends earlier."""
    setting = func.current_setting(timeout)
    begun = func.transaction_timestamp() if timeout == TRANSACTION_TIMEOUT else wall()
    left = remaining.c.expires_at.op("-", return_type=Interval())(begun)
    # What is beyond all that can be counted is of a clock that was set back.
    milliseconds = func.least(func.greatest(1, func.floor(remaining.c.left_s * 1000)), 2**31 - 1)
    # By way of 0: a timer that runs is not set anew by another value. (The caller's is taken to run since the begin.)
    stopped = func.left(func.set_config(timeout, "0", true()), 0)
    anew = func.set_config(timeout, func.concat(stopped, cast(milliseconds, Integer)), true())
    return case((or_(setting == "0", cast(setting, Interval) > left), anew)).label(timeout)


TRANSACTION_TIMEOUT = "transaction_timeout"
LOCK_TIMEOUT = "lock_timeout"


def _held() -> Subquery:
    """The grant's row, if it is current, under a lock that lets no other grant commit before this transaction ends.

    OFFSET 0 keeps what is asked of the row, its expiry, above the lock. A CTE would too, and cost more to run.
    """
    held = select(leases.c.stream_id, leases.c.expires_at).where(MINE)
    return held.with_for_update(read=True, key_share=True).offset(_ZERO).subquery("held")


def _remaining() -> Subquery:
    """That row, with the seconds that are left of it, by the clock as it is after the lock."""
    held = _held()
    left_s = seconds(held.c.expires_at, wall()).label("left_s")
    return select(held.c.stream_id, held.c.expires_at, left_s).offset(_ZERO).subquery("remaining")


_ZERO: ColumnElement[int] = literal_column("0")


@cache
def fenced_row(postgresql_version: int, *, single: bool) -> FromClause:
    """The fence of one grant within a statement that is a transaction of its own: one row if it passes (PostgreSQL).

    What the statement writes must come from this row: so it is locked, and found to be current, before. The lock is
    held until the statement has committed. A statement cannot idle; at its lease's end it is ended, or, before version
    17, its wait for a lock.

    It is evaluated once: for a `single` row there is no second time; a batch is joined with it, and then only a
    MATERIALIZED CTE is sure not to be evaluated for each row of the batch, of which the lease's end would drop some.
    """
    timeout = TRANSACTION_TIMEOUT if postgresql_version >= 17 else LOCK_TIMEOUT
    remaining = _remaining()
    limit = _shortened(timeout, remaining)
    row = select(remaining.c.stream_id, durably().label("durable"), limit).where(remaining.c.left_s > 0)
    return row.subquery("fenced") if single else row.cte("fenced").prefix_with("MATERIALIZED")


@cache
def _check(postgresql_version: int) -> Select[Any]:
    """Check one grant under a lock that lets no other grant commit before this transaction ends (PostgreSQL).

    The lock comes first, the clock is read after it: an expiry that happened while this waited is seen. Only if
    the check passes are the transaction's time limits shortened, so that the server itself ends a writer at its
    lease's end: one that is idle between statements, and from version 17 on one that is busy too. `outermost` says
    that the row's locker is the transaction itself. A savepoint has an id of its own, and where others have locked the
    row as well there is one for all of them: then `SAVEPOINTS` tells.
    """
    remaining = _remaining()
    same = leases.alias("same")
    locker = (
        select(literal_column("same.xmax = pg_current_xact_id()::xid", Boolean))
        .where(same.c.stream_id == remaining.c.stream_id)
        .scalar_subquery()
    )
    timeouts = ["idle_in_transaction_session_timeout"] + [TRANSACTION_TIMEOUT] * (postgresql_version >= 17)
    shortened = [_shortened(timeout, remaining) for timeout in timeouts]
    return select(func.coalesce(locker, literal(False)).label("outermost"), *shortened).where(remaining.c.left_s > 0)


SAVEPOINTS = (
    select(func.count() - 1)
    .select_from(table("pg_locks", column("pid"), column("locktype"), column("mode")))
    .where(
        column("pid") == func.pg_backend_pid(),
        column("locktype") == "transactionid",
        column("mode") == "ExclusiveLock",
    )
)
"""How many savepoints with work in them surround a lock that this transaction has just taken (PostgreSQL)."""

FENCE_SQLITE = (
    update(leases).where(MINE, leases.c.expires_at > now()).values(expires_at=leases.c.expires_at).returning(REMAINING)
)
"""Check one grant and take the file's write lock in one step: nobody can grant anything before this commits."""


# --- a sink in another database --------------------------------------------------------------------------------


def watermark_table(metadata: MetaData, name: str = "lease_watermarks", *, schema: str | None = None) -> Table:
    """Define the table of watermarks for a sink: add it to that database's own migrations."""
    return Table(
        name,
        metadata,
        Column("stream_id", Name, nullable=False),
        Column("fencing_token", Whole, nullable=False),
        Column("owner", Name, nullable=False),
        PrimaryKeyConstraint("stream_id", name=f"{name}_pkey"),
        schema=schema,
        sqlite_strict=True,
    )


def advance_watermark(connection: Connection, watermarks: Table, lease: Lease) -> None:
    """Accept a write in a sink that cannot see the lease table, if no later token has written there before.

    Call it in the sink's own transaction, before the write. It lets a token pass that is higher than any before, or
    equal and of the same owner; it raises `StaleToken` otherwise, after rolling the transaction back. It
    cannot know of an expiry: until the next owner's first write, an expired owner's writes still pass.
    """
    if connection.in_nested_transaction():
        raise ConfigError("a watermark inside a savepoint does not hold: advance it in the outermost transaction")
    limits.lease(lease)
    build: Any = postgresql.insert if dialects.name_of(connection) == dialects.POSTGRESQL else sqlite.insert
    statement = build(watermarks).values(
        stream_id=lease.stream_id, fencing_token=lease.fencing_token, owner=lease.owner
    )
    seen, offered = watermarks.c, statement.excluded
    statement = statement.on_conflict_do_update(
        index_elements=[seen.stream_id],
        set_={"fencing_token": offered.fencing_token, "owner": offered.owner},
        where=or_(
            seen.fencing_token < offered.fencing_token,
            and_(seen.fencing_token == offered.fencing_token, seen.owner == offered.owner),
        ),
    ).returning(seen.fencing_token)
    advanced = connection.execute(statement).one_or_none()
    if not dialects.in_transaction(connection):
        raise ConfigError("a watermark needs a transaction, and this connection is in autocommit mode")
    if advanced is None:
        raise refused(connection, lease, watermarks)
