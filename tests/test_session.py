"""What a session is made of: its signals, and how little memory it takes."""

from __future__ import annotations

import gc
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

from leases import LeaseStore, SessionRegistry
from leases.session import Signal

SOON_S = 10


def test_a_signal_wakes_all_who_wait_and_whoever_comes_later() -> None:
    signal = Signal()
    with ThreadPoolExecutor(8) as threads:
        waits = [threads.submit(signal.wait, timeout) for timeout in (SOON_S, 2 * SOON_S) * 4]
        assert not signal.is_set()
        signal.set()
        assert [wait.result(SOON_S) for wait in waits] == [True] * 8
    signal.set()
    assert signal.is_set()
    assert signal.wait()
    assert signal.wait(0)


def test_a_wait_for_a_signal_ends_in_time_and_leaves_nothing_behind() -> None:
    signal = Signal()
    began_s = time.monotonic()
    assert not signal.wait(0)
    assert not signal.wait(0.05)
    assert 0.05 <= time.monotonic() - began_s < SOON_S
    assert signal._waiters == []


def test_no_signal_is_missed_when_it_is_set_as_a_wait_begins() -> None:
    for _ in range(500):
        signal, start = Signal(), threading.Barrier(4)

        def wait(signal: Signal = signal, start: threading.Barrier = start) -> bool:
            start.wait(SOON_S)
            return signal.wait(SOON_S)

        with ThreadPoolExecutor(3) as threads:
            waits = [threads.submit(wait) for _ in range(3)]
            start.wait(SOON_S)
            signal.set()
            assert all(found.result() for found in waits)
        assert signal._waiters == []


class SetMeanwhile(list[threading.Event]):
    """The list of a signal's waiters, if somebody sets the signal just before another waiter is added."""

    def __init__(self, signal: Signal) -> None:
        self.signal = signal

    def append(self, waiter: threading.Event) -> None:
        self.signal.set()
        super().append(waiter)


def test_a_signal_that_was_set_before_the_waiter_was_known_is_seen() -> None:
    signal = Signal()
    signal._waiters = SetMeanwhile(signal)
    assert signal.wait(0)


def test_a_held_lease_takes_less_than_a_kibibyte_and_a_half(sqlite_url: str) -> None:
    count = 2000
    with LeaseStore(sqlite_url) as store:
        store.register(f"orders/{number:06}" for number in range(count + 10))
        with SessionRegistry(store, ttl=timedelta(minutes=1), threads=False) as registry:
            registry.claim(10)  # what is loaded once is loaded by then
            gc.collect()
            tracemalloc.start()
            try:
                sessions = registry.claim(count)
                gc.collect()
                grown = tracemalloc.get_traced_memory()[0]
            finally:
                tracemalloc.stop()
            assert len(sessions) == count
    assert grown / count < 1536
