"""What a worker takes up when it is woken, or moved to it; and that it asks for no more."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import event

from leases import Happening, LeaseStore, Loss, OutcomeUnknown, SessionRegistry, StreamSession, Worker
from tests.waiting import until
from tests.worker.helpers import POLL, QUICK, SOON_S, Seen, checkpoint, count_up, idle


def test_a_lease_that_an_operator_moves_to_a_worker_is_adopted(store: LeaseStore, seen: Seen) -> None:
    store.register(["moved"], pool="elsewhere")
    with Worker(store, count_up, name="w1", poll_interval=POLL, ttl=QUICK, on_event=seen) as worker:
        until(lambda: worker.health().beat_age is not None, "it beats")
        lease = store.steal("moved", to="w1", ttl=timedelta(minutes=5), actor="op")
        granted = seen.wait_for(Happening.GRANTED)
        assert (granted.stream_id, granted.fencing_token) == ("moved", lease.fencing_token)
        until(lambda: checkpoint(store, "moved") > 1, "it works on it")
        info = store.get("moved")
        assert info is not None
        assert info.remaining is not None
        assert info.remaining <= QUICK  # renewed first, by the worker's own TTL


def test_a_claim_whose_answer_was_lost_is_adopted(
    store: LeaseStore, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(store, count_up, streams=["a", "b"], name="w1", poll_interval=POLL, ttl=QUICK, on_event=seen)
    run = worker._line.run
    lost: list[int] = []

    def loses(call: Any, **options: Any) -> Any:
        result = run(call, **options)
        if isinstance(result, list) and result and not lost:
            lost.append(len(result))
            raise OutcomeUnknown("the answer to the claim was lost")
        return result

    monkeypatch.setattr(worker._line, "run", loses)
    with worker:
        until(lambda: lost and set(worker.sessions) == {"a", "b"}, "what was granted is found")
        assert {session.token for session in worker.sessions.values()} == {1}


def test_what_an_operator_moves_to_a_worker_stays_there_though_it_has_its_share(store: LeaseStore, seen: Seen) -> None:
    streams = [f"s{number}" for number in range(6)]
    with (
        Worker(store, idle, streams=streams, name="one", poll_interval=POLL, on_event=seen) as one,
        Worker(store, idle, name="two", poll_interval=POLL) as two,
    ):
        until(lambda: len(one.sessions) == len(two.sessions) == 3, "they share")
        moved = next(iter(one.sessions))
        token = store.steal(moved, to="two", ttl=timedelta(seconds=60), actor="op").fencing_token
        until(lambda: len(one.sessions) == len(two.sessions) == 3 and moved in two.sessions, "they share again")
        assert two.sessions[moved].token == token


def test_what_was_lost_is_not_adopted_while_its_work_may_still_run(store: LeaseStore, seen: Seen) -> None:
    began, let_go = threading.Event(), threading.Event()

    def handle(session: StreamSession) -> timedelta:
        began.set()
        let_go.wait(SOON_S)
        return idle(session)

    with Worker(store, handle, streams=["a"], name="w1", poll_interval=POLL, on_event=seen) as worker:
        assert began.wait(SOON_S)
        session = worker.sessions["a"]
        worker.registry.keeper.lose(session.lease, Loss.EXPIRED)
        for _ in range(2):
            assert worker.registry.heart is not None
            beats = len(seen.of(Happening.RENEWED))
            worker.registry.heart.beat_soon()
            seen.wait_for(Happening.RENEWED, beats + 1)
        assert "a" not in worker.sessions  # though the row is still in its name
        let_go.set()
        until(lambda: "a" in worker.sessions, "it has it again")
        assert worker.sessions["a"].token == session.token + 1


def test_a_release_is_picked_up_at_once_where_there_are_notifications(postgresql_url: str) -> None:
    with LeaseStore(postgresql_url) as store:
        store.register(["a"])
        with SessionRegistry(store, owner="first") as registry:
            session = registry.open("a")
            with Worker(store, idle, name="second", poll_interval=timedelta(minutes=10)) as worker:
                until(lambda: worker._planner.view is not None, "it has looked, and found nothing")
                session.close()  # its next poll is minutes away
                until(lambda: "a" in worker.sessions, "it was woken")


def test_when_nothing_happens_a_poll_is_one_statement_and_a_beat_is_one(store: LeaseStore, seen: Seen) -> None:
    statements: list[str] = []
    streams = [f"s{number}" for number in range(5)]

    def note(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if not statement.startswith(("BEGIN", "PRAGMA", "COMMIT", "LISTEN")):
            statements.append(statement)

    worker = Worker(
        store, lambda _: timedelta(minutes=1), streams=streams, poll_interval=POLL, ttl=QUICK, on_event=seen
    )
    with worker:
        until(lambda: len(worker.sessions) == 5, "it has all")
        beats = len(seen.of(Happening.RENEWED))
        seen.wait_for(Happening.RENEWED, beats + 2)  # what happened has been told by now
        assert worker.registry.heart is not None
        for line in (worker._line, worker.registry.heart.line):
            event.listen(line._engine, "before_cursor_execute", note)
        first = len(seen.of(Happening.RENEWED))
        seen.wait_for(Happening.RENEWED, first + 5)
        counted = list(statements)
        beats = sum("UPDATE leases" in each for each in counted)
        polls = sum("lease_workers JOIN" in each for each in counted)
        assert beats >= 4
        assert polls >= 10
        extra = 2 * beats + 1 if store.url.get_backend_name() == "sqlite" else 0  # one cannot update two tables
        assert len(counted) <= beats + polls + extra
