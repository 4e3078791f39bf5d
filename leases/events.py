"""The built-in event log: events and the checkpoint commit in one transaction with the fence.

So nothing that was accepted is lost, and nothing is written twice: an event whose `event_id` its stream has already is
left out, and a takeover resumes at the checkpoint that was committed with the last events.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import cache
from typing import Any

from sqlalchemy import (
    Connection,
    Executable,
    FromClause,
    Insert,
    Subquery,
    bindparam,
    func,
    insert,
    literal_column,
    select,
    true,
)
from sqlalchemy.sql.dml import ReturningInsert

from leases import dialects, limits
from leases.dialects import POSTGRESQL, event_offered, events_offered, now
from leases.direct import NOT_TAKEN, NotTaken
from leases.fencing import fence, fenced_row, named
from leases.model import JSON, Appended, Event, Lease, RecordedEvent
from leases.operations import put_checkpoint
from leases.schema import lease_events
from leases.statements import DURABLE, STREAM, TOKEN, put_checkpoint_of
from leases.types import Document


def append(
    connection: Connection,
    lease: Lease,
    events: Iterable[Event] | Mapping[str, JSON],
    *,
    checkpoint: JSON = None,
) -> Appended:
    """Append events to the lease's stream under the fence, in their order, and write the checkpoint if it is not None.

    Events come as `Event`s, or as a mapping of event_id to payload. One whose event_id is in the stream already (or
    earlier in this batch) is left out, and named in the answer: so a repeated call is harmless. `StaleToken` if the
    lease is not live: the transaction is then rolled back. All events of the batch commit, or none.
    """
    offered, duplicates = _offered(events, checkpoint)
    dialect = dialects.name_of(connection)
    given = dialects.events_given(dialect, list(offered.items()))
    fence(connection, lease)
    new = {row.event_id: row.seq for row in connection.execute(_append(dialect), {**named(lease), **given})}
    if checkpoint is not None:
        put_checkpoint(connection, lease, checkpoint)
    last_seq = max(new.values(), default=0) or connection.execute(LAST_SEQ, {"stream": lease.stream_id}).scalar_one()
    return _appended(offered, duplicates, new, last_seq)


def append_alone(
    connection: Connection,
    lease: Lease,
    events: Iterable[Event] | Mapping[str, JSON],
    *,
    checkpoint: JSON = None,
) -> Appended | NotTaken:
    """`append` as a transaction of its own: the fence, the events and the checkpoint in one statement (PostgreSQL).

    NOT_TAKEN, and nothing written, if the fence refuses or no event is new: only `append` can tell which.
    """
    offered, duplicates = _offered(events, checkpoint)
    if not offered:
        return NOT_TAKEN
    values: dict[str, Any] = {**named(lease), "position": checkpoint}
    single = len(offered) == 1
    if single:
        ((event_id, payload),) = offered.items()
        values["event_id"], values["payload"] = event_id, limits.payload(event_id, payload)
    else:
        values.update(dialects.events_given(POSTGRESQL, list(offered.items())))
    statement = _append_fenced(dialects.postgresql_version(connection), single, checkpoint is not None)
    new = {row.event_id: row.seq for row in connection.execute(statement, values)}
    return _appended(offered, duplicates, new, max(new.values())) if new else NOT_TAKEN


def _offered(events: Iterable[Event] | Mapping[str, JSON], checkpoint: JSON) -> tuple[dict[str, JSON], list[str]]:
    """The events' payloads by event_id, and which of them came once more."""
    offered: dict[str, JSON] = {}
    duplicates = []
    for event_id, payload in limits.events(events):
        if event_id in offered:
            duplicates.append(event_id)
        else:
            offered[event_id] = payload
    if checkpoint is not None:
        limits.document("checkpoint", checkpoint)
    return offered, duplicates


def _appended(offered: Iterable[str], duplicates: Iterable[str], new: Collection[str], last_seq: int) -> Appended:
    known = [event_id for event_id in offered if event_id not in new]
    return Appended(len(new), (*duplicates, *known), last_seq)


def read(connection: Connection, stream_id: str, *, after_seq: int = 0, limit: int = 1000) -> list[RecordedEvent]:
    """A page of a stream's events in commit order: those after `after_seq`, up to `limit`."""
    columns = lease_events.c
    chosen = (
        select(
            columns.stream_id,
            columns.event_id,
            columns.seq,
            columns.fencing_token,
            columns.recorded_at,
            columns.payload,
        )
        .where(columns.stream_id == limits.stream_id(stream_id), columns.seq > limits.sequence(after_seq))
        .order_by(columns.seq)
        .limit(limits.count("limit", limit))
    )
    return [RecordedEvent(*row) for row in connection.execute(chosen)]


# --- its statements ----------------------------------------------------------------------------------------------


# Not the parameter itself: by its value PostgreSQL's planner may believe that a stream which is younger than its
# statistics has no events, and then it takes any index on stream_id, and reads all of the stream for each event.
OF_STREAM = lease_events.c.stream_id == select(STREAM).scalar_subquery()

LAST_SEQ = select(func.coalesce(func.max(lease_events.c.seq), 0)).where(OF_STREAM)
"""The number of the stream's last event."""


def _inserted(offered: Subquery, fenced: FromClause | None = None, *, single: bool = False) -> Insert:
    """Insert those of a batch whose event_id is new to the stream, with the next numbers of its `seq`.

    All of them come from the row of the fence, if there is one in the statement: without that row there is nothing.
    """
    # A scalar, not an EXISTS: of that the planner makes a join, which, while it has no statistics, compares each event
    # that is offered with all of the stream. A scalar is looked up by its key, whatever the planner believes.
    known = (
        select(lease_events.c.event_id)
        .where(OF_STREAM, lease_events.c.event_id == offered.c.event_id)
        .scalar_subquery()
    )
    # The place of an event among those that are new; of a single one it is known.
    place = offered.c.position if single else func.row_number().over(order_by=offered.c.position)
    fresh = (
        select(
            STREAM if fenced is None else fenced.c.stream_id,
            offered.c.event_id,
            LAST_SEQ.scalar_subquery() + place,
            TOKEN,
            now(),
            offered.c.payload,
        )
        .select_from(offered if fenced is None else fenced.join(offered, true()))
        .where(known.is_(None))
        .order_by(offered.c.position)
    )
    return insert(lease_events).from_select(
        ["stream_id", "event_id", "seq", "fencing_token", "recorded_at", "payload"], fresh
    )


@cache
def _append(dialect: str) -> ReturningInsert[Any]:
    """The events, in a transaction that has fenced before, and which is durable from here on."""
    return _inserted(events_offered(dialect)).returning(lease_events.c.event_id, lease_events.c.seq, DURABLE)


@cache
def _append_fenced(postgresql_version: int, single: bool, with_checkpoint: bool) -> Executable:
    """The fence, the events and, if there are any, the checkpoint, in one statement (PostgreSQL).

    Answers with a row for each event that is new. The statement's view of the stream is as old as its beginning, and
    the lock may have been waited for. But nobody else can have appended meanwhile: under an earlier grant all has
    been committed before this one was made, under a later one this fence refuses. Two appends under one grant can
    meet; then the keys of `lease_events` let one of them begin again.
    """
    columns = lease_events.c
    offered = event_offered() if single else events_offered(POSTGRESQL)
    inserted = _inserted(offered, fenced_row(postgresql_version, single=single), single=single)
    if not with_checkpoint:
        return inserted.returning(columns.event_id, columns.seq)
    new = inserted.returning(columns.stream_id, columns.event_id, columns.seq).cte("new")
    position = select(new.c.stream_id, TOKEN, bindparam("position", type_=Document), now()).limit(literal_column("1"))
    return select(new.c.event_id, new.c.seq).add_cte(put_checkpoint_of(position).cte("put"))
