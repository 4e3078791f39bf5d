"""The SQL of the protocol: pure, built once, run by `operations`. Nothing here touches a database.

Every statement that changes who owns a stream is a compare-and-swap: the rule is in its WHERE, the answer in its
RETURNING. On PostgreSQL the rows are first locked in a MATERIALIZED CTE, then updated, in one statement:

- *skip locked*: whoever claims never waits for a fenced write in flight, nor for another claimer;
- *lock first*: a plain UPDATE that waited for a lock does not look at its WHERE again when the lock's holder rolled
  back, and so would revive a lease that expired while it waited.

SQLite has one writer, who holds the whole file (BEGIN IMMEDIATE), so that the same statements, without their lock
clauses, say the same.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from sqlalchemy import (
    CTE,
    ColumnElement,
    CompoundSelect,
    Double,
    FromClause,
    Integer,
    Label,
    Select,
    Text,
    Update,
    and_,
    bindparam,
    case,
    except_,
    exists,
    func,
    insert,
    literal,
    literal_column,
    not_,
    null,
    or_,
    select,
    true,
    tuple_,
    union_all,
    update,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.sql.dml import ReturningInsert, ReturningUpdate

from leases import limits
from leases.dialects import (
    POSTGRESQL,
    durably,
    endings_asked,
    freed,
    grants_asked,
    later,
    names_given,
    now,
    one_of,
    seconds,
)
from leases.schema import lease_checkpoints, lease_workers, leases
from leases.types import Document, Identity

# Parameters, named as no column is (SQLAlchemy keeps those names for itself).
STREAM: ColumnElement[str] = bindparam("stream", type_=Text)
HOLDER: ColumnElement[str] = bindparam("holder", type_=Text)
TOKEN: ColumnElement[int] = bindparam("token", type_=leases.c.fencing_token.type)
TTL: ColumnElement[float] = bindparam("ttl", type_=Double)
CLAIM: ColumnElement[Any] = bindparam("claim", type_=Identity)
IN_POOL: ColumnElement[str] = bindparam("in_pool", type_=Text)
AT_MOST: ColumnElement[int] = bindparam("at_most", type_=Integer)

LIVE = and_(leases.c.owner.is_not(None), leases.c.expires_at > now())
"""Held and unexpired: at `expires_at == now` a lease has expired."""

LONGEST: ColumnElement[float] = literal_column(str(limits.MAX_TTL.total_seconds() + 3600))
"""No lease ends later than this from now, in seconds. An hour more than the greatest TTL: a statement that began before
a grant was made sees it end a little later than its own now + TTL."""

EXPIRED = or_(
    leases.c.expires_at <= now(),
    leases.c.expires_at > later(LONGEST),
)
"""Past its end; or further away than any lease can be: the clock was set back, and nobody was promised that."""

ALIVE = and_(lease_workers.c.expires_at > now(), lease_workers.c.expires_at <= later(LONGEST))
"""A worker that has been heard of in time, and not from before the clock was set back."""

OPEN = and_(leases.c.paused_at.is_(None), leases.c.retired_at.is_(None))
"""Neither paused nor retired: may be granted."""

MINE = and_(leases.c.stream_id == STREAM, leases.c.fencing_token == TOKEN, func.coalesce(leases.c.owner, "") == HOLDER)
"""The grant that the caller names: stream, token and owner, never the owner alone. And never by the index on owner:
where the planner believes that an owner has few, it would read all that it has."""

DURABLE: Label[Any] = durably().label("durable")
"""Make this transaction's commit durable on a server that commits without waiting for its disk."""

REMAINING: Label[float] = seconds(leases.c.expires_at, now()).label("remaining_s")

GRANTED = (
    leases.c.stream_id,
    leases.c.owner,
    leases.c.fencing_token,
    leases.c.expires_at,
    leases.c.acquired_at,
    leases.c.pool,
    REMAINING,
    leases.c.failures,
)
"""The columns of which `operations` makes a `Lease`."""


def _locked(rows: Select[Any], name: str) -> CTE:
    """The rows, locked for a grant without waiting; those that somebody else has locked are not among them."""
    cte = rows.with_for_update(skip_locked=True, of=leases).cte(name)
    return cte.prefix_with("MATERIALIZED", dialect=POSTGRESQL)


def _grant(candidates: CTE) -> ReturningUpdate[Any]:
    return (
        update(leases)
        .where(one_of(leases.c.stream_id, select(candidates.c.stream_id).scalar_subquery()))
        .values(
            owner=HOLDER,
            expires_at=later(TTL),
            fencing_token=leases.c.fencing_token + 1,
            acquired_at=now(),
            claim_id=CLAIM,
        )
        .returning(*GRANTED)
    )


# --- grants ----------------------------------------------------------------------------------------------------

ACQUIRE = _grant(
    _locked(
        select(leases.c.stream_id).where(leases.c.stream_id == STREAM, OPEN, or_(leases.c.owner.is_(None), EXPIRED)),
        "candidate",
    )
)
"""Take one stream if nobody holds it."""

GRANTED_BEFORE = select(*GRANTED).where(
    leases.c.stream_id == STREAM, leases.c.claim_id == CLAIM, leases.c.owner == HOLDER, LIVE
)
"""The grant that an earlier attempt of the same acquire got, its answer lost."""

CLAIMED_BEFORE = select(*GRANTED).where(leases.c.owner == HOLDER, leases.c.claim_id == CLAIM, LIVE)
"""The same for a claim."""


def free_rows() -> Select[Any]:
    """The streams of a pool that nobody holds and anybody may, those that have been free longest first; since when."""
    return (
        select(leases.c.stream_id, leases.c.available_at.label("since"))
        .where(leases.c.pool == IN_POOL, leases.c.owner.is_(None), OPEN, leases.c.available_at <= now())
        .order_by(leases.c.available_at, leases.c.stream_id)
    )


def left_behind() -> Select[Any]:
    """The streams of a pool whose lease has expired, and whose owner is not there any more; since when.

    The owners are found by one index look-up each: nothing here reads all leases. A live worker looks after its own
    rows; the one who asks (`HOLDER`) is that worker for its own.
    """
    first = select(func.min(leases.c.owner).label("owner")).where(leases.c.owner.is_not(None))
    owners = first.cte("owners", recursive=True)
    following = select(func.min(leases.c.owner)).where(leases.c.owner > owners.c.owner).scalar_subquery()
    owners = owners.union_all(select(following).where(owners.c.owner.is_not(None)))
    alive = exists().where(lease_workers.c.worker_id == owners.c.owner, ALIVE)
    dead = select(owners.c.owner).where(owners.c.owner.is_not(None), or_(owners.c.owner == HOLDER, not_(alive)))
    return select(leases.c.stream_id, leases.c.expires_at.label("since")).where(
        one_of(leases.c.owner, dead.scalar_subquery()), leases.c.pool == IN_POOL, OPEN, EXPIRED
    )


def _claim() -> ReturningUpdate[Any]:
    free = _locked(free_rows().limit(AT_MOST), "free")
    still = AT_MOST - select(func.count()).select_from(free).scalar_subquery()
    left = _locked(left_behind().limit(still), "left_behind")
    candidates = union_all(select(free.c.stream_id), select(left.c.stream_id)).cte("candidate")
    return _grant(candidates)


CLAIM_FREE = _claim()
"""Take up to so many streams of a pool: those that are free first, then those whose dead owner's lease expired."""


@cache
def register(dialect: str) -> ReturningInsert[Any]:
    """Insert the streams that the table does not know. Those that it knows are not touched, nor locked."""
    named = names_given(dialect, "stream_ids").subquery("given")
    (name,) = named.c
    unknown = select(name, IN_POOL, now(), now()).where(not_(exists().where(leases.c.stream_id == name))).order_by(name)
    columns = ["stream_id", "pool", "available_at", "registered_at"]
    # SQLite's guard against INSERT OR REPLACE forbids any insert of a stream that is there; NOT EXISTS keeps away.
    build = postgresql.insert(leases).from_select(columns, unknown)
    statement = (
        build.on_conflict_do_nothing() if dialect == POSTGRESQL else insert(leases).from_select(columns, unknown)
    )
    return statement.returning(leases.c.stream_id)


@cache
def reinstate(dialect: str) -> ReturningUpdate[Any]:
    """Bring back the retired among the streams, into the pool that is asked for."""
    return (
        update(leases)
        .where(
            one_of(leases.c.stream_id, names_given(dialect, "stream_ids").scalar_subquery()),
            leases.c.retired_at.is_not(None),
        )
        .values(retired_at=None, pool=IN_POOL, available_at=now())
        .returning(leases.c.stream_id)
    )


# --- heartbeat -------------------------------------------------------------------------------------------------

RENEWABLE = and_(leases.c.owner == HOLDER, leases.c.expires_at > now())

# The moment itself: SQLite 3.40 says 1 for any `x IS NOT NULL` in RETURNING.
ENDING: Label[Any] = func.coalesce(leases.c.paused_at, leases.c.retired_at).label("ending")


OWN_ROW = (
    select(lease_workers.c.worker_id)
    .where(lease_workers.c.worker_id == HOLDER)
    .with_for_update(key_share=True, skip_locked=True)
)
"""The worker's own row, locked; nothing where somebody else has locked it."""

HELD: ColumnElement[int] = bindparam("held", type_=Integer)

BEAT = update(lease_workers).values(
    expires_at=later(TTL), beaten_at=now(), lease_count=func.coalesce(HELD, lease_workers.c.lease_count)
)

OWN_BEAT = BEAT.where(lease_workers.c.worker_id == HOLDER)
"""The worker's own row alone: what a heartbeat does on SQLite beside its leases."""

REPORT = update(lease_workers).where(lease_workers.c.worker_id == HOLDER).values(lease_count=HELD)
"""How many leases the worker holds, told by the transaction that changes it. Only a heartbeat extends the row."""


def _locked_by_key(asked: FromClause, *conditions: ColumnElement[bool]) -> CTE:
    """Those of a batch of the holder's grants that still are so, locked; the locked ones of others are left out.

    Row by row, each found by its key: no statistics of who owns how many can lead PostgreSQL's planner to anything
    else. (A plan made before the first ANALYZE took the index on owner, and compared all of its rows with all that are
    asked.)
    """
    row = (
        select(leases.c.stream_id)
        .where(
            leases.c.stream_id == asked.c.stream_id,
            leases.c.fencing_token == asked.c.fencing_token,
            func.coalesce(leases.c.owner, "") == HOLDER,
            *conditions,
        )
        .with_for_update(key_share=True, skip_locked=True, of=leases)
        .lateral("row")
    )
    return select(*asked.c).select_from(asked.join(row, true())).cte("locked").prefix_with("MATERIALIZED")


@cache
def renew(dialect: str) -> Select[Any] | ReturningUpdate[Any]:
    """Extend a batch of leases, and the worker's own row.

    PostgreSQL answers with what went otherwise than hoped, as rows `(stream_id, renewed, ending)`: `renewed` is null
    for a row in the holder's name that was not asked for. And with a last row whose stream_id is null and whose
    `renewed` says whether the worker's row was there. SQLite, which cannot update inside a CTE, answers with a row for
    each lease that it extended; `strays` has the rest.
    """
    asked = grants_asked(dialect)
    if dialect != POSTGRESQL:
        return (
            update(leases)
            .where(
                tuple_(leases.c.stream_id, leases.c.fencing_token).in_(
                    select(asked.c.stream_id, asked.c.fencing_token)
                ),
                RENEWABLE,
            )
            .values(expires_at=later(TTL))
            .returning(leases.c.stream_id, ENDING)
        )
    locked = _locked_by_key(asked, leases.c.expires_at > now())
    renewed = (
        update(leases)
        .where(leases.c.stream_id == locked.c.stream_id)
        .values(expires_at=later(TTL))
        .returning(leases.c.stream_id, ENDING)
        .cte("renewed")
    )
    own = OWN_ROW.cte("own").prefix_with("MATERIALIZED")
    worker = BEAT.where(lease_workers.c.worker_id == own.c.worker_id).returning(lease_workers.c.worker_id).cte("worker")
    # Nearly always all is as hoped. Counts tell, and then nothing is gone through again to find what is not.
    counts = (
        select(func.count().label("renewed"), func.count(renewed.c.ending).label("ending"))
        .cte("counts")
        .prefix_with("MATERIALIZED")
    )
    as_hoped = select(counts.c.renewed - counts.c.ending).scalar_subquery()
    otherwise = (
        select(asked.c.stream_id, renewed.c.stream_id.is_not(None).label("renewed"), renewed.c.ending)
        .select_from(asked.outerjoin(renewed, renewed.c.stream_id == asked.c.stream_id))
        .where(
            as_hoped < select(func.count()).select_from(asked).scalar_subquery(),
            or_(renewed.c.stream_id.is_(None), renewed.c.ending.is_not(None)),
        )
    )
    known = select(null(), exists(select(worker.c.worker_id)), null())
    stray = strays(dialect).subquery("stray")
    held = select(func.count()).where(leases.c.owner == HOLDER).scalar_subquery()
    unasked = select(stray.c.stream_id, null(), null()).where(select(counts.c.renewed).scalar_subquery() < held)
    return select(union_all(otherwise, unasked, known).subquery("answer"), DURABLE)


@cache
def strays(dialect: str) -> CompoundSelect[Any]:
    """The rows in the holder's name that are not among the grants asked for.

    By EXCEPT, which hashes or sorts whatever the planner believes: an anti-join may compare all with all.
    """
    asked = grants_asked(dialect)
    mine = select(leases.c.stream_id, leases.c.fencing_token).where(leases.c.owner == HOLDER)
    return except_(mine, select(asked.c.stream_id, asked.c.fencing_token))


@cache
def look(dialect: str) -> Select[Any]:
    """Who has the grants of a batch now: what became of those that a heartbeat did not extend."""
    asked = grants_asked(dialect)
    return select(
        asked.c.stream_id,
        asked.c.fencing_token,
        leases.c.owner,
        leases.c.fencing_token.label("current_token"),
        func.coalesce(leases.c.expires_at > now(), literal(False)).label("live"),
    ).select_from(asked.outerjoin(leases, leases.c.stream_id == asked.c.stream_id))


# --- release ---------------------------------------------------------------------------------------------------


def _let_go(backoff: ColumnElement[float], error: ColumnElement[str | None]) -> Update:
    return update(leases).values(
        owner=None,
        expires_at=None,
        available_at=later(backoff),
        failures=case((error.is_not(None), leases.c.failures + 1), else_=0),
        last_error=error,
    )


_AWAITED = exists().where(
    ALIVE,
    or_(
        lease_workers.c.pool == leases.c.pool,
        and_(lease_workers.c.pool.is_(None), lease_workers.c.worker_id != HOLDER),
    ),
)
"""Whether anybody may be waiting for a stream of the pool: a worker of it, or another process that competes for none.

PostgreSQL lets only one transaction that notifies commit at a time, its wait for the disk included. Where all take and
release streams that nobody waits for, that would be most of what a release costs.
"""

_LET_GO = (leases.c.stream_id, case((_AWAITED, freed(leases.c.pool))).label("notified"))

RELEASE = _let_go(bindparam("backoff", type_=Double), bindparam("error", type_=Text)).where(MINE).returning(*_LET_GO)
"""Let one grant go. The token stays. Does not wait for fenced writes in flight: they commit before the next grant."""


@cache
def release_all(dialect: str) -> ReturningUpdate[Any]:
    """Let a batch of one owner's grants go. A row that somebody has locked is left out, and not in the answer."""
    asked = endings_asked(dialect)
    locked = _locked_by_key(asked) if dialect == POSTGRESQL else asked
    return (
        _let_go(locked.c.backoff, locked.c.error)
        .where(
            leases.c.stream_id == locked.c.stream_id,
            leases.c.fencing_token == locked.c.fencing_token,
            func.coalesce(leases.c.owner, "") == HOLDER,  # not by the index on owner, here too
        )
        .returning(*_LET_GO)
    )


_FAILED_HERE = (
    select(leases.c.stream_id)
    .where(MINE, leases.c.failures > 0)
    .with_for_update(key_share=True, skip_locked=True, of=leases)
    .cte("failed_here")
    .prefix_with("MATERIALIZED", dialect=POSTGRESQL)
)

RECOVER = (
    update(leases)
    .where(one_of(leases.c.stream_id, select(_FAILED_HERE.c.stream_id).scalar_subquery()))
    .values(failures=0, last_error=None)
    .returning(leases.c.stream_id)
)
"""Forget the failures of a stream on which the work goes on well; not now, if somebody has locked its row."""


# --- checkpoint --------------------------------------------------------------------------------------------------


def put_checkpoint_of(rows: Select[Any]) -> ReturningInsert[Any]:
    """Write the checkpoints of rows `(stream_id, fencing_token, checkpoint, now)`; those of a later token stay."""
    columns = ("stream_id", "fencing_token", "checkpoint", "updated_at")
    build = postgresql.insert(lease_checkpoints).from_select(columns, rows)
    return build.on_conflict_do_update(
        index_elements=[lease_checkpoints.c.stream_id],
        set_={name: build.excluded[name] for name in columns[1:]},
        where=lease_checkpoints.c.fencing_token <= build.excluded.fencing_token,
    ).returning(lease_checkpoints.c.fencing_token, DURABLE)


def _put_checkpoint() -> Any:
    build = postgresql.insert(lease_checkpoints).values(
        stream_id=STREAM,
        fencing_token=TOKEN,
        checkpoint=bindparam("position", type_=Document),
        updated_at=now(),
    )
    return build.on_conflict_do_update(
        index_elements=[lease_checkpoints.c.stream_id],
        set_={name: build.excluded[name] for name in ("fencing_token", "checkpoint", "updated_at")},
        where=lease_checkpoints.c.fencing_token <= build.excluded.fencing_token,
    ).returning(lease_checkpoints.c.fencing_token, DURABLE)


PUT_CHECKPOINT = _put_checkpoint()
"""Write a stream's checkpoint. The caller has fenced; a row of a later token is left alone all the same."""
