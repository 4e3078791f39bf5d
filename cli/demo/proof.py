"""The proof, from the database and the file alone: every event is in the log once, and no stale owner wrote any.

Nothing here knows what the workers say they did. The file is read anew, the log and the grants are read from the
database, and each event of the log is held against both:

- *missing*: an event of the file that its stream's log has not, or not with the same contents;
- *duplicated*: each further time that an event of the file is in the log, in whatever stream of the demo;
- *stale*: an event whose token was never granted; or is lower than that of an event before it in its stream's commit
  order; or that was recorded after its grant had ended, or after a later grant began;
- *misplaced*: a number missing in a stream's `seq`, an event out of the file's order, or one that the file has not.

What the clock cannot tell (the same instant) is not called stale; there the commit order decides.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any

from sqlalchemy import Connection, Row, select

from leases.cli.demo.ground import named, names
from leases.cli.demo.source import SourceEvent
from leases.schema import lease_events, lease_grants


@dataclass(frozen=True, slots=True)
class Strike:
    """A worker that was killed or frozen, and when by the database's clock."""

    owner: str
    at: datetime


@dataclass(frozen=True, slots=True)
class Proof:
    """What the database and the file say of a run."""

    events_in_file: int
    events_in_log: int
    missing: int
    duplicated: int
    stale_accepted: int
    misplaced: int
    takeovers: int
    takeover_seconds_max: float
    moved: int

    @property
    def holds(self) -> bool:
        """Whether every event is in the log exactly once, in order, and none under a stale token."""
        return self.events_in_file == self.events_in_log and not (
            self.missing or self.duplicated or self.stale_accepted or self.misplaced
        )


@dataclass(frozen=True, slots=True)
class _Grant:
    token: int
    owner: str
    granted_at: datetime
    ended_at: datetime | None
    end_reason: str | None


def prove(
    connection: Connection, events: Iterable[SourceEvent], tokens: Mapping[str, int], strikes: Collection[Strike]
) -> Proof:
    """Compare the log with the file and with the grants. `tokens` are the streams' from before the run."""
    expected = {event.event_id: (event.stream_id, event.position, _digest(event.payload)) for event in events}
    streams = {stream_id for stream_id, _, _ in expected.values()}
    grants = _grants(connection, streams)
    log = _Log(expected, grants)
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
        .where(named(connection, columns.stream_id))
        .order_by(columns.stream_id, columns.seq)
        .execution_options(yield_per=2000)
    )
    for row in connection.execute(chosen, names(connection, streams)):
        log.add(row)
    of_run = {
        stream_id: [grant for grant in given if grant.token > tokens.get(stream_id, 0)]
        for stream_id, given in grants.items()
    }
    return Proof(
        events_in_file=len(expected),
        events_in_log=log.count,
        missing=len(expected) - len(log.found),
        duplicated=sum(times - 1 for event_id, times in log.times.items() if event_id in expected),
        stale_accepted=log.stale,
        misplaced=log.misplaced,
        takeovers=sum(_takeovers(given) for given in of_run.values()),
        takeover_seconds_max=max((_longest(given, strikes) for given in of_run.values()), default=0.0),
        moved=sum(_moves(given) for given in of_run.values()),
    )


def _digest(payload: object) -> bytes:
    """What stands for a payload: one engine keeps the order of its keys, the other does not."""
    return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).digest()


def _grants(connection: Connection, streams: Collection[str]) -> dict[str, list[_Grant]]:
    """The grants of each stream, in the order of their tokens."""
    columns = lease_grants.c
    chosen = (
        select(
            columns.stream_id,
            columns.fencing_token,
            columns.owner,
            columns.granted_at,
            columns.ended_at,
            columns.end_reason,
        )
        .where(named(connection, columns.stream_id))
        .order_by(columns.stream_id, columns.fencing_token)
    )
    grants = defaultdict(list)
    for stream_id, *grant in connection.execute(chosen, names(connection, streams)):
        grants[stream_id].append(_Grant(*grant))
    return dict(grants)


class _Log:
    """Takes the events of the log in the order of stream and seq, and counts what is wrong with them."""

    def __init__(self, expected: Mapping[str, tuple[str, int, bytes]], grants: Mapping[str, Sequence[_Grant]]) -> None:
        self.count = 0
        self.stale = 0
        self.misplaced = 0
        self.found: set[str] = set()
        self.times: Counter[str] = Counter()
        self._expected = expected
        self._ends = {
            (stream_id, grant.token): (grant.ended_at, None if later is None else later.granted_at)
            for stream_id, given in grants.items()
            for grant, later in zip(given, [*given[1:], None], strict=True)
        }
        self._stream_id = ""
        self._seq = self._position = self._token = 0

    def add(self, row: Row[*tuple[Any, ...]]) -> None:
        if row.stream_id != self._stream_id:
            self._stream_id = row.stream_id
            self._seq = self._position = self._token = 0
        self.count += 1
        self.times[row.event_id] += 1
        stream_id, position, digest = self._expected.get(row.event_id, ("", 0, b""))
        if stream_id == row.stream_id and digest == _digest(row.payload):
            self.found.add(row.event_id)
        self.misplaced += row.seq != self._seq + 1 or position <= self._position
        self.stale += row.fencing_token < self._token or self._outlived(row)
        self._seq = row.seq
        self._position = max(self._position, position)
        self._token = max(self._token, row.fencing_token)

    def _outlived(self, row: Row[*tuple[Any, ...]]) -> bool:
        """Whether an event was recorded under no grant, or after its grant's end."""
        grant = self._ends.get((row.stream_id, row.fencing_token))
        return grant is None or any(end is not None and row.recorded_at > end for end in grant)


def _takeovers(grants: Sequence[_Grant]) -> int:
    """How many of a stream's grants took it from an owner who had let it expire."""
    return sum(before.end_reason == "expired" and before.owner != after.owner for before, after in pairwise(grants))


def _moves(grants: Sequence[_Grant]) -> int:
    """How many of a stream's grants followed on another owner's release: a share that was given up in good order."""
    return sum(before.end_reason == "released" and before.owner != after.owner for before, after in pairwise(grants))


def _longest(grants: Sequence[_Grant], strikes: Collection[Strike]) -> float:
    """The longest time that a stream was without a working owner, from the strike to the next grant, in seconds."""
    return max(
        (
            (after.granted_at - strike.at).total_seconds()
            for strike in strikes
            for before, after in pairwise(grants)
            if before.owner == strike.owner
            and before.granted_at <= strike.at
            and (before.ended_at is None or before.ended_at > strike.at)
        ),
        default=0.0,
    )
