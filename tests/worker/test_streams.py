"""What a worker works on: its streams, its share, and what it tells of them."""

from __future__ import annotations

import logging
from datetime import timedelta

import pytest
from sqlalchemy import text

from leases import Happening, LeaseStore, StreamSession, Worker, WorkerEvent, fleet
from leases.model import State
from tests.waiting import until
from tests.worker.helpers import POLL, QUICK, Seen, checkpoint, count_up, idle, owners


def test_a_source_is_asked_again_and_what_it_has_no_more_is_retired(store: LeaseStore, seen: Seen) -> None:
    streams = {"a", "b"}
    with Worker(
        store, idle, streams=lambda: sorted(streams), poll_interval=POLL, discover_every=POLL, on_event=seen
    ) as worker:
        until(lambda: set(worker.sessions) == {"a", "b"}, "it has what there is")
        streams.add("c")
        streams.discard("a")
        until(lambda: set(worker.sessions) == {"b", "c"}, "it has what there is now")
        assert seen.wait_for(Happening.RETIRED).stream_id == "a"
    info = store.get("a")
    assert info is not None
    assert info.state is State.RETIRED


def test_a_source_that_fails_is_asked_again(store: LeaseStore) -> None:
    calls = 0

    def source() -> list[str]:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise OSError("not there yet")
        return ["a"]

    with Worker(store, idle, streams=source, poll_interval=POLL, discover_every=POLL) as worker:
        until(lambda: set(worker.sessions) == {"a"}, "it has what there is")


def test_a_handler_ends_a_stream_by_retiring_it(store: LeaseStore) -> None:
    def handle(session: StreamSession) -> timedelta:
        count_up(session)
        store.retire([session.stream_id])
        session.close()
        return timedelta(0)

    with Worker(store, handle, streams=["a", "b", "c"], poll_interval=POLL) as worker:
        until(lambda: {info.state for info in store.list()} == {State.RETIRED}, "all are done")
        until(lambda: not worker.sessions, "it has nothing")
    assert [checkpoint(store, each) for each in "abc"] == [1, 1, 1]


def test_a_paused_stream_is_let_go_in_good_order(store: LeaseStore, seen: Seen) -> None:
    with Worker(store, count_up, streams=["a"], poll_interval=POLL, ttl=QUICK, on_event=seen) as worker:
        until(lambda: checkpoint(store, "a") > 0, "it works")
        store.pause("a", actor="op")
        until(lambda: not worker.sessions and owners(store) == {None}, "it has let it go")
        assert seen.of(Happening.LOST) == []
        store.resume("a", actor="op")
        until(lambda: "a" in worker.sessions, "it has it again")


# --- shares ---------------------------------------------------------------------------------------------------------


def test_workers_share_by_weight_and_capacity(store: LeaseStore) -> None:
    streams = [f"s{number:02}" for number in range(30)]
    with (
        Worker(store, idle, streams=streams, name="one", poll_interval=POLL) as one,
        Worker(store, idle, name="two", poll_interval=POLL, weight=2) as two,
        Worker(store, idle, name="few", poll_interval=POLL, capacity=3) as few,
    ):
        until(
            lambda: [len(each.sessions) for each in (one, two, few)] == [9, 18, 3],
            "each has its share",
        )
    assert owners(store) == {None}


def test_handlers_that_loop_are_given_no_more_streams_than_there_are_threads(
    store: LeaseStore, caplog: pytest.LogCaptureFixture
) -> None:
    def loops(session: StreamSession) -> None:
        while not session.stopping.wait(0.02):
            session.progress()

    streams = [f"s{number}" for number in range(6)]
    with Worker(store, loops, streams=streams, poll_interval=POLL, ttl=QUICK, concurrency=2) as worker:
        until(lambda: len(worker.sessions) == 2, "it keeps what it can serve")
        with Worker(store, idle, poll_interval=POLL) as other:
            until(lambda: len(other.sessions) == 4, "another has the rest")
    assert any("its capacity is 2 until they end" in record.message for record in caplog.records)


# --- what it tells --------------------------------------------------------------------------------------------------


def test_events_tell_all_that_metrics_need(store: LeaseStore, seen: Seen) -> None:
    with Worker(store, count_up, streams=["a"], name="w1", poll_interval=POLL, ttl=QUICK, on_event=seen):
        seen.wait_for(Happening.RENEWED, 2)
        granted = seen.wait_for(Happening.GRANTED)
        assert granted == WorkerEvent(Happening.GRANTED, "w1", "a", 1)
    happened = [each.happening for each in seen.events if each.happening is not Happening.RENEWED]
    assert happened == [
        Happening.STARTED, Happening.GRANTED, Happening.DRAINING, Happening.RELEASED, Happening.STOPPED,
    ]  # fmt: skip


def test_a_listener_that_raises_ends_nothing(store: LeaseStore) -> None:
    def raises(_: WorkerEvent) -> None:
        raise ZeroDivisionError

    with Worker(store, count_up, streams=["a"], poll_interval=POLL, on_event=raises):
        until(lambda: checkpoint(store, "a") > 2, "it works")


def test_what_is_logged_has_its_parts_as_fields(store: LeaseStore, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "leases")
    with Worker(store, idle, streams=["a"], name="w1", poll_interval=POLL) as worker:
        until(lambda: "a" in worker.sessions, "it has it")
    granted = next(record for record in caplog.records if record.message.startswith("granted"))
    assert (granted.__dict__["stream_id"], granted.__dict__["fencing_token"], granted.__dict__["owner"]) == (
        "a",
        1,
        "w1",
    )


def test_rows_of_workers_that_are_long_dead_are_forgotten(store: LeaseStore) -> None:
    def enlist(name: str) -> None:
        member = Worker(store, idle, name=name).registry.keeper.member
        store.enlist(member, ttl=timedelta(milliseconds=10))

    enlist("dead")
    enlist("holds")
    lease = store.acquire("a", owner="holds", ttl=timedelta(milliseconds=10))
    assert lease is not None
    until(lambda: not any(info.live for info in store.workers()), "both are dead")
    store.run(lambda connection: connection.execute(text("UPDATE lease_workers SET lease_count = 0")))
    until(lambda: store.run(lambda connection: fleet.bury(connection, dead_for=timedelta(0))) == 1, "one is forgotten")
    assert [info.worker_id for info in store.workers()] == ["holds"]
