"""The promises (DESIGN §3) as conditions on what the product says and has in its tables. Nothing here knows the model.

A `Witness` follows the product from its first step on. It remembers what was seen, and complains:

1. **Monotonic**: a grant of a token that is not above every token that its stream was ever granted.
2. **Exclusive**: two grants of a stream whose terms overlap, by the database's clock.
3. **Fenced**: a write that was accepted while the row was another's, or its lease had ended; an event or a checkpoint
   whose token is not of a grant that was live when it was recorded.
4. **No resurrection**: a grant that lives on after it was seen expired.
6. **Nothing lost, nothing twice**: an accepted event that is gone, or not as it was; a gap in the numbers.

(5 is of the worker's clock, and 7 and 8 of several sessions and of time: other tests try those.)

Where the database's clock is set back, 2 and 4, which speak of its time, are not watched; 1, 3 and 6 hold all the same.
"""

from __future__ import annotations

from collections import defaultdict
from datetime import datetime
from itertools import pairwise
from typing import Any

from leases.model import Lease
from tests.model.tables import Row, Rows


class Witness:
    """What has been seen of one product."""

    def __init__(self) -> None:
        self.set_back = False
        self.highest: dict[str, int] = {}
        self.owner_of: dict[tuple[str, int], str] = {}
        self.expired: dict[tuple[str, int], datetime] = {}
        self.accepted: dict[tuple[str, str], tuple[int, datetime, Any]] = {}

    def granted(self, lease: Lease) -> None:
        """A lease was the answer to a request."""
        key = lease.stream_id, lease.fencing_token
        known = self.owner_of.get(key)
        if known is not None:
            assert known == lease.owner, f"1: {key} was granted to {known}, and then to {lease.owner}"
            return
        highest = self.highest.get(lease.stream_id, 0)
        assert lease.fencing_token > highest, f"1: {key} was granted after the token {highest}"
        self.highest[lease.stream_id] = lease.fencing_token
        self.owner_of[key] = lease.owner

    def passed(self, lease: Lease, row: Row | None, now: datetime) -> None:
        """A fence has passed; `row` was the lease's row before."""
        assert row is not None, f"3: a write passed for a stream that is not there: {lease}"
        _, token, owner, expires_at, *_ = row
        assert (token, owner) == (lease.fencing_token, lease.owner), f"3: a stale write passed: {lease}, row {row}"
        assert expires_at > now, f"3: a write passed after its lease had ended at {expires_at}, now {now}: {lease}"

    def accepted_event(self, stream_id: str, event_id: str, seq: int, at: datetime, payload: Any) -> None:
        """An event is in the log that was not there before."""
        assert (stream_id, event_id) not in self.accepted, f"6: {event_id} was accepted twice"
        self.accepted[stream_id, event_id] = seq, at, payload

    def pruned(self, before: datetime, rows: Rows) -> None:
        """An operator has pruned: what is older may have gone."""
        there = {(row[0], row[2]) for row in rows["lease_events"]}
        for key, (_, at, _) in list(self.accepted.items()):
            if key not in there and at < before:
                del self.accepted[key]

    def look(self, row: Row, now: datetime) -> None:
        """One row of `leases`."""
        stream_id, token, owner, expires_at, *_ = row
        assert token >= self.highest.get(stream_id, 0), f"1: the token of {stream_id} has fallen to {token}"
        if owner is None or self.set_back:
            return
        ended_at = self.expired.get((stream_id, token))
        if ended_at is not None:
            assert expires_at <= ended_at, f"4: {stream_id}, token {token}, had expired at {ended_at}, and lives again"
        elif expires_at <= now:
            self.expired[stream_id, token] = expires_at

    def look_at_all(self, rows: Rows, now: datetime) -> None:
        """All tables."""
        tokens = {}
        expiries = {}
        for row in rows["leases"]:
            self.look(row, now)
            tokens[row[0]] = row[1]
            expiries[row[0]] = row[3]
        terms = self._terms(rows, expiries)
        by_stream: dict[str, list[Row]] = defaultdict(list)
        for row in rows["lease_events"]:
            by_stream[row[0]].append(row)
        for stream_id, events in by_stream.items():
            for earlier, later in pairwise(events):
                assert later[3] >= earlier[3], f"3: an event under a stale token: {later} after {earlier}"
                if not self.set_back:  # then what is older need not have the lower numbers, and a prune leaves gaps
                    assert later[1] == earlier[1] + 1, f"6: a gap in the numbers of {stream_id}: {earlier}, {later}"
            for event in events:
                self._within(terms, stream_id, event[3], event[4])
        for stream_id, token, _, _ in rows["lease_checkpoints"]:
            assert token <= tokens[stream_id], f"3: a checkpoint of {stream_id} under the token {token} of nobody"
        there = {(row[0], row[2]): row for row in rows["lease_events"]}
        for key, (seq, at, payload) in self.accepted.items():
            found = there.get(key)
            assert found is not None, f"6: the accepted event {key} is lost"
            assert (found[1], *found[4:]) == (seq, at, payload), f"6: the accepted event {key} has changed: {found}"

    def _terms(self, rows: Rows, expiries: dict[str, datetime | None]) -> dict[tuple[str, int], tuple[Any, Any]]:
        """The terms of all grants, found not to overlap."""
        terms = {}
        previous: Row | None = None
        for row in rows["lease_grants"]:
            stream_id, token, _, granted_at, ended_at, _ = row
            if previous is not None and previous[0] == stream_id:
                assert previous[4] is not None, f"2: {previous} had not ended when {row} was granted"
                if not self.set_back:
                    assert previous[4] <= granted_at, f"2: the terms overlap of {previous} and {row}"
            terms[stream_id, token] = granted_at, ended_at if ended_at is not None else expiries[stream_id]
            previous = row
        return terms

    def _within(self, terms: dict[tuple[str, int], tuple[Any, Any]], stream_id: str, token: int, at: datetime) -> None:
        term = terms.get((stream_id, token))
        if term is None or self.set_back:
            return  # pruned
        assert term[0] <= at <= term[1], f"3: an event of {stream_id}, token {token}, of {at}, out of its term {term}"
