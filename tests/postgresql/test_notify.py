"""Notifications (PostgreSQL): what becomes free, and what concerns an owner, is told; heartbeats tell nobody."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
from sqlalchemy import Engine

from leases import LeaseStore, Worker
from leases.line import Line
from leases.model import Ending, Membership, Released
from tests.postgresql.race import PATIENCE_S, Background, locking
from tests.waiting import until

TTL = timedelta(seconds=60)


@pytest.fixture
def line(store: LeaseStore) -> Iterator[Line]:
    made = Line(store, listens=True)
    made.run(lambda _: None)
    yield made
    made.close()


def heard_by(line: Line, deed: Callable[[], object]) -> set[str]:
    """What is heard of a deed; and nothing that comes later: the last thing said ends it."""
    deed()
    line.run(lambda connection: connection.exec_driver_sql("SELECT pg_notify('leases', 'end')"))
    heard: set[str] = set()
    give_up_at = time.monotonic() + PATIENCE_S
    while "end" not in heard:
        assert time.monotonic() < give_up_at, "the end was never heard"
        heard.update(line.wait(0.2))
    return heard - {"end"}


def test_what_becomes_free_is_told_to_its_pool(store: LeaseStore, line: Line) -> None:
    store.enlist(Membership("w", "h", 1, "1", "p"), ttl=TTL)
    assert heard_by(line, lambda: store.register(["a", "b"], pool="p")) == {"free:p"}
    assert heard_by(line, lambda: store.register(["a", "b"], pool="p")) == set()
    lease = store.acquire("a", owner="one", ttl=TTL)
    assert lease is not None
    assert heard_by(line, lambda: store.renew([lease], owner="one", ttl=TTL)) == set()
    assert heard_by(line, lambda: store.release(lease)) == {"free:p"}
    leases = store.claim(owner="one", ttl=TTL, limit=2, pool="p")
    assert heard_by(line, lambda: store.release_all(map(Ending, leases), owner="one")) == {"free:p"}


def test_what_an_operator_does_is_told_to_those_it_concerns(store: LeaseStore, line: Line) -> None:
    store.acquire("a", owner="one", ttl=TTL)
    assert heard_by(line, lambda: store.steal("a", to="two", ttl=TTL, actor="op")) == {"look:one", "look:two"}
    assert heard_by(line, lambda: store.pause("a", actor="op")) == {"look:two"}
    assert heard_by(line, lambda: store.resume("a", actor="op")) == {"free:default"}
    assert heard_by(line, lambda: store.expire("a", actor="op")) == {"look:two", "free:default"}
    store.acquire("a", owner="one", ttl=TTL)
    assert heard_by(line, lambda: store.retire(["a"])) == {"look:one"}
    store.enlist(Membership("w", "h", 1, "1", "default"), ttl=TTL)
    assert heard_by(line, lambda: store.drain("w")) == {"look:w"}


def test_waiting_ends_when_somebody_wakes_the_line(line: Line) -> None:
    waiting = Background(line.wait, 600.0)
    line.wake()
    assert waiting.result() == []


def test_what_was_heard_during_a_transaction_is_not_lost(store: LeaseStore, line: Line) -> None:
    store.register(["a"])
    line.run(lambda _: None)  # reads what has come, among other things
    assert "free:default" in line.wait(10.0)


def test_a_line_whose_connection_broke_is_opened_anew_and_listens_again(store: LeaseStore, line: Line) -> None:
    pid = line.run(lambda connection: connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one())
    store.run(lambda connection: connection.exec_driver_sql(f"SELECT pg_terminate_backend({pid})"))
    assert line.wait(10.0) == []  # it notices at once
    assert heard_by(line, lambda: store.register(["a"])) <= {"free:default"}
    assert heard_by(line, lambda: store.register(["b"])) == {"free:default"}


def test_a_call_that_hangs_is_cut(store: LeaseStore, line: Line) -> None:
    hangs = Background(line.run, lambda connection: connection.exec_driver_sql("SELECT pg_sleep(600)"))
    until(line.cut, "a call is running")
    with pytest.raises(Exception, match="cannot use"):
        hangs.result()
    assert not line.cut()
    line.run(lambda _: None)


def test_a_row_that_somebody_has_locked_holds_no_release_up(store: LeaseStore, engine: Engine) -> None:
    store.register(["a", "b"])
    leases = store.claim(owner="one", ttl=TTL, limit=2)
    with locking(engine, "a"):
        answer = store.release_all(map(Ending, leases), owner="one", held=0)
        assert answer == Released(frozenset("b"), frozenset("a"))
    assert store.release_all(map(Ending, leases), owner="one").released == {"a"}


def test_a_worker_that_is_never_started_keeps_no_file_open(store: LeaseStore) -> None:
    open_before = len(os.listdir("/dev/fd"))
    workers = [Worker(store, print) for _ in range(10)]
    assert len(os.listdir("/dev/fd")) == open_before
    assert workers


def test_a_closed_line_may_be_woken(store: LeaseStore) -> None:
    line = Line(store)
    line.close()
    line.wake()
    line.close()
