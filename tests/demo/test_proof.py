"""The proof: each thing that it looks for, put into a finished database by hand, is found."""

from __future__ import annotations

from collections.abc import Callable, Collection
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, delete, insert, select, update

from leases import Event, EventLog, Lease, LeaseStore
from leases.cli.demo import ground
from leases.cli.demo.proof import Proof, Strike, prove
from leases.cli.demo.source import SourceEvent
from leases.schema import lease_events, lease_grants, leases

TTL = timedelta(seconds=15)
FILE = [SourceEvent(stream, n, f"{stream}{n}", {"n": str(n)}) for stream in ("a", "b") for n in range(1, 7)]
EVENTS, GRANTS = lease_events.c, lease_grants.c
SECOND = timedelta(seconds=1)


def acquire(store: LeaseStore, stream_id: str, owner: str) -> Lease:
    lease = store.acquire(stream_id, owner=owner, ttl=TTL)
    assert lease is not None
    return lease


def expire(store: LeaseStore, stream_id: str) -> None:
    """Let the lease have expired a moment ago, as its owner's death would."""
    past = datetime.now(UTC) - timedelta(hours=1)
    store.run(lambda c: c.execute(update(leases).where(leases.c.stream_id == stream_id).values(expires_at=past)))


@pytest.fixture
def finished(store: LeaseStore) -> LeaseStore:
    """A run of two streams: `a` was worked on by one and, after a release, by two; `b` by one alone."""
    ground_of = store.run(lambda connection: ground.take(connection, ["a", "b"]))
    assert ground_of == ground.Ground({"a": 0, "b": 0}, 0)
    log = EventLog(store)
    for stream_id, first, last, owner in (("a", 0, 3, "one"), ("a", 3, 6, "two"), ("b", 0, 6, "one")):
        lease = acquire(store, stream_id, owner)
        of_stream = [event for event in FILE if event.stream_id == stream_id][first:last]
        log.append(lease, [Event(event.event_id, event.payload) for event in of_stream])
        assert store.release(lease)
    return store


def proof_of(store: LeaseStore, strikes: Collection[Strike] = ()) -> Proof:
    return store.run(lambda connection: prove(connection, FILE, {"a": 0, "b": 0}, strikes), read_only=True)


def test_a_whole_log_is_proved_whole(finished: LeaseStore) -> None:
    proof = proof_of(finished)
    assert proof == Proof(12, 12, 0, 0, 0, 0, 0, 0.0, 1)
    assert proof.holds


def one(stream_id: str, seq: int) -> tuple[Any, Any]:
    return EVENTS.stream_id == stream_id, EVENTS.seq == seq


def recorded_at(connection: Connection, stream_id: str, seq: int) -> datetime:
    found: datetime = connection.execute(select(EVENTS.recorded_at).where(*one(stream_id, seq))).scalar_one()
    return found


def lose_the_last(connection: Connection) -> None:
    connection.execute(delete(lease_events).where(*one("b", 6)))


def lose_one_in_between(connection: Connection) -> None:
    connection.execute(delete(lease_events).where(*one("b", 3)))


def change_contents(connection: Connection) -> None:
    connection.execute(update(lease_events).where(*one("b", 3)).values(payload={"n": "4"}))


def repeat_in_another_stream(connection: Connection) -> None:
    at = recorded_at(connection, "b", 6)
    connection.execute(
        insert(lease_events).values(
            stream_id="b", event_id="a1", seq=7, fencing_token=1, recorded_at=at, payload={"n": "1"}
        )
    )


def move_to_another_stream(connection: Connection) -> None:
    connection.execute(update(lease_events).where(*one("a", 6)).values(stream_id="b", seq=7, fencing_token=1))


def add_one_that_the_file_has_not(connection: Connection) -> None:
    at = recorded_at(connection, "b", 6)
    connection.execute(
        insert(lease_events).values(stream_id="b", event_id="x", seq=7, fencing_token=1, recorded_at=at, payload={})
    )


def use_a_token_that_was_never_granted(connection: Connection) -> None:
    connection.execute(update(lease_events).where(*one("b", 6)).values(fencing_token=7))


def use_an_old_token_after_a_new_one(connection: Connection) -> None:
    at = recorded_at(connection, "a", 1)
    connection.execute(update(lease_events).where(*one("a", 6)).values(fencing_token=1, recorded_at=at))


def write_after_a_later_grant(connection: Connection) -> None:
    at = recorded_at(connection, "a", 6) + SECOND
    connection.execute(update(lease_grants).where(GRANTS.stream_id == "a").values(ended_at=None, end_reason=None))
    connection.execute(update(lease_events).where(*one("a", 3)).values(recorded_at=at))


def write_after_the_end_of_its_grant(connection: Connection) -> None:
    at = recorded_at(connection, "b", 6) + SECOND
    connection.execute(update(lease_events).where(*one("b", 6)).values(recorded_at=at))


def swap(connection: Connection) -> None:
    for seq, to in ((5, 99), (6, 5), (99, 6)):
        connection.execute(update(lease_events).where(*one("b", seq)).values(seq=to))


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (lose_the_last, {"events_in_log": 11, "missing": 1}),
        (lose_one_in_between, {"events_in_log": 11, "missing": 1, "misplaced": 1}),
        (change_contents, {"missing": 1}),
        (repeat_in_another_stream, {"events_in_log": 13, "duplicated": 1, "misplaced": 1}),
        (move_to_another_stream, {"missing": 1}),
        (add_one_that_the_file_has_not, {"events_in_log": 13, "misplaced": 1}),
        (use_a_token_that_was_never_granted, {"stale_accepted": 1}),
        (use_an_old_token_after_a_new_one, {"stale_accepted": 1}),
        (write_after_a_later_grant, {"stale_accepted": 1}),
        (write_after_the_end_of_its_grant, {"stale_accepted": 1}),
        (swap, {"misplaced": 1}),
    ],
)
def test_the_proof_finds(finished: LeaseStore, harm: Callable[[Connection], None], expected: dict[str, int]) -> None:
    finished.run(harm)
    proof = proof_of(finished)
    assert not proof.holds
    found = {name: getattr(proof, name) for name in expected}
    assert found == expected


def test_a_takeover_is_a_grant_after_a_dead_owners_expiry(store: LeaseStore) -> None:
    store.run(lambda connection: ground.take(connection, ["a", "b"]))
    for stream_id in ("a", "b"):
        acquire(store, stream_id, "victim")
    struck = Strike("victim", store.run(ground.clock, read_only=True))
    for stream_id in ("a", "b"):
        expire(store, stream_id)
    acquire(store, "a", "heir")
    acquire(store, "b", "victim")  # it woke up and took its own stream back: nobody took it over
    assert proof_of(store).takeovers == 1
    # It was made to expire by hand: give its grant the end that it would have had.
    store.run(
        lambda c: c.execute(update(lease_grants).where(GRANTS.fencing_token == 1).values(ended_at=struck.at + SECOND))
    )
    store.run(
        lambda c: c.execute(
            update(lease_grants)
            .where(GRANTS.stream_id == "a", GRANTS.fencing_token == 2)
            .values(granted_at=struck.at + 3 * SECOND)
        )
    )
    assert proof_of(store, [struck]).takeover_seconds_max == pytest.approx(3, abs=0.01)


def test_takeovers_of_an_earlier_run_do_not_count(store: LeaseStore) -> None:
    acquire(store, "a", "one")
    expire(store, "a")
    acquire(store, "a", "two")
    proof = store.run(lambda connection: prove(connection, FILE, {"a": 2, "b": 0}, []), read_only=True)
    assert proof.takeovers == 0
