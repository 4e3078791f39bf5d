"""The built-in event log: events and the checkpoint commit in one transaction with the fence.

So nothing that was accepted is lost, and nothing is written twice: an event whose `event_id` its stream has already is
left out, and a takeover resumes at the checkpoint that was committed with the last events.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from sqlalchemy import Connection, func, insert, select
from sqlalchemy.sql.dml import ReturningInsert

from leases import dialects, limits
from leases.dialects import events_offered, now
from leases.fencing import fence, named
from leases.model import JSON, Appended, Event, Lease, RecordedEvent
from leases.operations import put_checkpoint
from leases.schema import lease_events
from leases.statements import DURABLE, STREAM, TOKEN


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
    offered: dict[str, str] = {}
    duplicates = []
    for event_id, payload in limits.events(events):
        if event_id in offered:
            duplicates.append(event_id)
        else:
            offered[event_id] = payload
    if checkpoint is not None:
        limits.document("checkpoint", checkpoint)
    fence(connection, lease)
    dialect = dialects.name_of(connection)
    given = dialects.events_given(dialect, list(offered.items()))
    new = {row.event_id: row.seq for row in connection.execute(_append(dialect), {**named(lease), **given})}
    if checkpoint is not None:
        put_checkpoint(connection, lease, checkpoint)
    last_seq = max(new.values(), default=0) or connection.execute(LAST_SEQ, {"stream": lease.stream_id}).scalar_one()
    duplicates += [event_id for event_id in offered if event_id not in new]
    return Appended(len(new), tuple(duplicates), last_seq)


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


@cache
def _append(dialect: str) -> ReturningInsert[Any]:
    """Insert those of a batch whose event_id is new to the stream, with the next numbers of its `seq`."""
    offered = events_offered(dialect)
    last = (
        select(func.coalesce(func.max(lease_events.c.seq), 0).label("seq"))
        .where(lease_events.c.stream_id == STREAM)
        .cte("last")
        .prefix_with("MATERIALIZED")
    )
    # A scalar, not an EXISTS: of that the planner makes a join, which, while it has no statistics, compares each event
    # that is offered with all of the stream. A scalar is looked up by its key, whatever the planner believes.
    known = (
        select(lease_events.c.event_id)
        .where(lease_events.c.stream_id == STREAM, lease_events.c.event_id == offered.c.event_id)
        .scalar_subquery()
    )
    fresh = (
        select(
            STREAM,
            offered.c.event_id,
            select(last.c.seq).scalar_subquery() + func.row_number().over(order_by=offered.c.position),
            TOKEN,
            now(),
            offered.c.payload,
        )
        .where(known.is_(None))
        .order_by(offered.c.position)
    )
    return (
        insert(lease_events)
        .from_select(["stream_id", "event_id", "seq", "fencing_token", "recorded_at", "payload"], fresh)
        .returning(lease_events.c.event_id, lease_events.c.seq, DURABLE)
    )


LAST_SEQ = select(func.coalesce(func.max(lease_events.c.seq), 0)).where(lease_events.c.stream_id == STREAM)
"""The number of the stream's last event."""
