"""The database of a run: made ready in one transaction, given back at the end, and asked for its clock.

A database may hold other people's streams. The demo keeps to a pool of its own, and to streams that are in that pool
or in none. Of an earlier run it clears away the events and the checkpoints, never a lease row: tokens go on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from sqlalchemy import ColumnElement, Connection, delete, func, or_, select, update
from sqlalchemy.exc import SQLAlchemyError

from leases import LeaseStore, administration, dialects, migrate, operations
from leases.dialects import now, one_of, wall
from leases.faults import translate
from leases.schema import lease_checkpoints, lease_events, lease_workers, leases
from leases.statements import LIVE

POOL: Final = "demo"
"""The pool of the demo's streams."""


class Refused(Exception):
    """The database is in use for something else; the message says what to do. Nothing was changed."""


@dataclass(frozen=True, slots=True)
class Ground:
    """What a run begins with: each stream's token, and how many events of an earlier run were cleared away."""

    tokens: Mapping[str, int]
    cleared: int


def make_tables(store: LeaseStore) -> bool:
    """Migrate a database that has no lease tables; say whether it was so. One of another version is left alone."""
    try:
        with store.base_engine.connect() as connection:
            if migrate.version(connection) is not None:
                return False
    except SQLAlchemyError as error:
        raise translate(error, store.url) from None
    store.migrate()
    return True


def named(connection: Connection, column: ColumnElement[str]) -> ColumnElement[bool]:
    """The streams whose names are the parameter `stream_ids`."""
    return one_of(column, dialects.names_given(dialects.name_of(connection), "stream_ids").scalar_subquery())


def names(connection: Connection, stream_ids: Collection[str]) -> dict[str, object]:
    """The parameter of `named`."""
    return {"stream_ids": dialects.names(dialects.name_of(connection), list(stream_ids))}


def take(connection: Connection, stream_ids: Collection[str]) -> Ground:
    """Make the streams ready to be shared from their beginning, in the demo's pool; `Refused` if they are not ours.

    Streams of the pool that are not among them are retired, so that no worker claims them.
    """
    given = names(connection, stream_ids)
    ours = leases.c.pool == POOL
    _refuse_what_is_not_ours(connection, given, ours)
    cleared = 0
    for table in (lease_events, lease_checkpoints):
        gone = connection.execute(delete(table).where(named(connection, table.c.stream_id)), given).rowcount
        cleared += gone if table is lease_events else 0
    # What a run that was cut short has left: dead owners' leases and unfinished streams.
    connection.execute(
        update(leases).where(ours, leases.c.owner.is_not(None)).values(owner=None, expires_at=None, available_at=now())
    )
    connection.execute(update(leases).where(ours, leases.c.retired_at.is_(None)).values(retired_at=now()))
    operations.register(connection, stream_ids, pool=POOL)
    tokens = select(leases.c.stream_id, leases.c.fencing_token).where(named(connection, leases.c.stream_id))
    return Ground({row.stream_id: row.fencing_token for row in connection.execute(tokens, given)}, cleared)


def _refuse_what_is_not_ours(connection: Connection, given: dict[str, object], ours: ColumnElement[bool]) -> None:
    where = named(connection, leases.c.stream_id)
    chosen = select(leases.c.stream_id, leases.c.pool, leases.c.owner, leases.c.paused_at, LIVE.label("live"))
    for row in connection.execute(chosen.where(or_(ours, where)).order_by(leases.c.stream_id), given):
        if row.pool != POOL:
            raise Refused(f"stream {row.stream_id!r} is there already, in pool {row.pool!r}; use another database")
        if row.live:
            raise Refused(f"another demo is running here ({row.owner}); wait for its end, or use another database")
        if row.paused_at is not None:
            raise Refused(f"stream {row.stream_id!r} is paused; run `leases resume {row.stream_id}` first")


def hold_back(connection: Connection, stream_ids: Collection[str]) -> None:
    """Let nobody claim the streams yet: their workers are to be there first, so that each begins with its share."""
    administration.retire(connection, stream_ids)


def offer(connection: Connection, stream_ids: Collection[str]) -> None:
    """Let the workers claim the streams that were held back."""
    operations.register(connection, stream_ids, pool=POOL)


def unfinished(connection: Connection) -> int:
    """How many streams of the demo are not done."""
    chosen = select(func.count()).select_from(leases).where(leases.c.pool == POOL, leases.c.retired_at.is_(None))
    return connection.execute(chosen).scalar_one()


def give_back(connection: Connection, owners: Collection[str]) -> None:
    """Take the workers of a run off the list, and release what dead ones still hold: the next run need not wait."""
    connection.execute(
        update(leases)
        .where(leases.c.pool == POOL, leases.c.owner.in_(owners))
        .values(owner=None, expires_at=None, available_at=now())
    )
    connection.execute(delete(lease_workers).where(lease_workers.c.worker_id.in_(owners)))


def clock(connection: Connection) -> datetime:
    """The database's clock."""
    read: datetime = connection.execute(select(wall())).scalar_one()
    return read
