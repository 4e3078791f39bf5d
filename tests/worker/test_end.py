"""How a worker ends, and what is refused at its beginning."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import text

from leases import ConfigError, Happening, Lease, LeaseStore, OutcomeUnknown, StreamSession, Worker
from tests.waiting import until
from tests.worker.helpers import POLL, QUICK, SOON_S, Seen, checkpoint, count_up, idle, owners


def test_draining_lets_each_handler_finish_what_it_has_in_hand(store: LeaseStore) -> None:
    begun = threading.Event()
    finished: list[str] = []

    def handle(session: StreamSession) -> timedelta:
        begun.set()
        session.stopping.wait(SOON_S)
        count_up(session)
        finished.append(session.stream_id)
        return timedelta(0)

    worker = Worker(store, handle, streams=["a", "b"], poll_interval=POLL).start()
    until(lambda: len(worker.sessions) == 2, "it has both")
    until(begun.is_set, "it works")
    worker.stop()
    assert finished
    assert all(checkpoint(store, stream_id) == 1 for stream_id in finished)
    assert owners(store) == {None}


def test_what_does_not_end_in_time_is_let_go(store: LeaseStore, seen: Seen) -> None:
    begun, let_go = threading.Event(), threading.Event()

    def handle(session: StreamSession) -> None:
        begun.set()
        let_go.wait(SOON_S)

    worker = Worker(
        store, handle, streams=["a"], poll_interval=POLL, drain_timeout=timedelta(seconds=0.2), on_event=seen
    ).start()
    assert begun.wait(SOON_S)
    worker.stop()
    assert seen.wait_for(Happening.LOST).reason == "overdue"
    assert owners(store) == {None}
    let_go.set()


def test_stopping_without_drain_waits_for_nobody(store: LeaseStore, seen: Seen) -> None:
    begun, let_go = threading.Event(), threading.Event()

    def handle(session: StreamSession) -> None:
        begun.set()
        let_go.wait(SOON_S)

    worker = Worker(store, handle, streams=["a"], poll_interval=POLL, on_event=seen).start()
    assert begun.wait(SOON_S)
    worker.stop(drain=False)
    assert owners(store) == {None}
    assert store.workers() == []
    let_go.set()


def test_a_handler_may_stop_its_own_worker(store: LeaseStore) -> None:
    workers: list[Worker] = []

    def handle(session: StreamSession) -> timedelta:
        workers[0].stop()
        return timedelta(0)

    worker = Worker(store, handle, streams=["a"], poll_interval=POLL)
    workers.append(worker)
    worker.start()
    assert worker.wait(timedelta(seconds=SOON_S))
    assert owners(store) == {None}


def test_an_operator_drains_a_worker_by_its_row(store: LeaseStore, seen: Seen) -> None:
    with Worker(store, idle, streams=["a", "b"], name="w1", poll_interval=POLL, on_event=seen) as worker:
        until(lambda: len(worker.sessions) == 2, "it has both")
        assert store.drain("w1")
        assert worker.wait(timedelta(seconds=SOON_S))
        assert worker.draining
    assert owners(store) == {None}
    assert not store.drain("w1")
    assert [each.happening for each in seen.events][-1] is Happening.STOPPED


def test_two_workers_of_one_name_are_refused(store: LeaseStore) -> None:
    member = Worker(store, idle, name="w1").registry.keeper.member
    store.enlist(type(member)("w1", "elsewhere", 7, "1", "default"), ttl=timedelta(seconds=60))
    with pytest.raises(ConfigError, match="a worker named 'w1' is alive, pid 7 on elsewhere"):
        Worker(store, idle, name="w1").start()


def test_a_worker_that_has_stopped_is_not_started_again(store: LeaseStore) -> None:
    worker = Worker(store, idle, poll_interval=POLL)
    worker.start()
    worker.start()
    worker.stop()
    worker.stop()
    with pytest.raises(ConfigError, match="has stopped"):
        worker.start()


def test_a_stream_whose_row_is_locked_is_released_as_soon_as_it_is_not(postgresql_url: str) -> None:
    with LeaseStore(postgresql_url) as store:
        worker = Worker(store, idle, streams=["a", "b"], poll_interval=POLL).start()
        until(lambda: len(worker.sessions) == 2, "it has both")
        with store.engine.connect() as connection, connection.begin():
            connection.execute(text("SELECT 1 FROM leases WHERE stream_id = 'a' FOR UPDATE"))
            stopping = threading.Thread(target=worker.stop)
            stopping.start()
            until(lambda: (info := store.get("b")) is not None and info.owner is None, "the other is released")
            assert (info := store.get("a")) is not None
            assert info.owner == worker.name
        stopping.join(SOON_S)
        assert owners(store) == {None}


def test_an_adoption_whose_answer_was_lost_is_made_once_more(
    store: LeaseStore, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.register(["moved"], pool="elsewhere")
    worker = Worker(store, count_up, name="w1", poll_interval=POLL, ttl=QUICK, on_event=seen)
    assert worker.registry.heart is not None
    line = worker.registry.heart.line
    run, lost = line.run, threading.Event()

    def loses(call: Any, **options: Any) -> Any:
        result = run(call, **options)
        if isinstance(result, Lease) and not lost.is_set():
            lost.set()
            raise OutcomeUnknown("the answer to the adoption was lost")
        return result

    monkeypatch.setattr(line, "run", loses)
    with worker:
        until(lambda: worker.health().beat_age is not None, "it beats")
        lease = store.steal("moved", to="w1", ttl=timedelta(minutes=5), actor="op")
        assert seen.wait_for(Happening.GRANTED).fencing_token == lease.fencing_token
        assert lost.is_set()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"handler": "not a function"}, "handler"),
        ({"capacity": -1}, "capacity"),
        ({"capacity": True}, "capacity"),
        ({"concurrency": 0}, "concurrency"),
        ({"weight": 0}, "weight"),
        ({"weight": float("nan")}, "weight"),
        ({"poll_interval": timedelta(0)}, "poll_interval"),
        ({"poll_interval": 1}, "poll_interval"),
        ({"stall_timeout": timedelta(seconds=-1)}, "stall_timeout"),
        ({"drain_timeout": timedelta(days=1000)}, "drain_timeout"),
        ({"ttl": timedelta(0)}, "ttl"),
        ({"pool": ""}, "pool"),
        ({"name": "a\0b"}, "owner"),
        ({"streams": "abc"}, "list of texts"),
        ({"streams": ["ok", "not\nok"]}, "stream_id"),
    ],
)
def test_nonsense_is_refused_before_anything_is_sent(sqlite_url: str, options: dict[str, Any], said: str) -> None:
    with LeaseStore(sqlite_url) as store, pytest.raises(ConfigError, match=said):
        Worker(store, options.pop("handler", idle), **options)
