"""The event log and the checkpoint: one transaction with the fence; nothing lost, nothing twice, no gaps."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import Connection

from leases import ConfigError, Event, EventLog, LeaseStore, StaleToken
from leases.events import append
from leases.operations import write_checkpoint
from tests.clock import Clock
from tests.conformance.driver import TTL, Caller, rows, take


def checkpoint(store: LeaseStore, stream_id: str = "a") -> Any:
    found = store.checkpoint(stream_id)
    assert found is not None
    return found.checkpoint


def test_events_are_numbered_from_1_in_their_order(store: LeaseStore, log: EventLog, clock: Clock) -> None:
    lease = take(store)
    first = log.append(lease, [Event("z", 1), Event("y", 2)])
    second = log.append(lease, {"x": 3})
    assert (first.count, first.duplicates, first.last_seq) == (2, (), 2)
    assert (second.count, second.last_seq) == (1, 3)
    assert [(event.event_id, event.seq, event.payload) for event in log.read("a")] == [
        ("z", 1, 1),
        ("y", 2, 2),
        ("x", 3, 3),
    ]
    assert {(event.fencing_token, event.recorded_at) for event in log.read("a")} == {(1, clock.now())}


def test_a_second_event_of_one_name_is_left_out_and_takes_no_number(
    store: LeaseStore, log: EventLog, clock: Clock
) -> None:
    lease = take(store)
    log.append(lease, {"e1": "first"})
    again = log.append(lease, [Event("e0", 0), Event("e1", "second"), Event("e2", 2), Event("e0", "twice")])
    assert (again.count, sorted(again.duplicates), again.last_seq) == (2, ["e0", "e1"], 3)
    assert [(event.event_id, event.seq, event.payload) for event in log.read("a")] == [
        ("e1", 1, "first"),
        ("e0", 2, 0),
        ("e2", 3, 2),
    ]


def test_a_repeated_append_changes_nothing(store: LeaseStore, log: EventLog, clock: Clock) -> None:
    lease = take(store)
    log.append(lease, {"e1": 1, "e2": 2})
    before = log.read("a")
    again = log.append(lease, {"e1": 1, "e2": 2})
    assert (again.count, again.duplicates, again.last_seq) == (0, ("e1", "e2"), 2)
    assert log.read("a") == before


def test_streams_have_numbers_and_names_of_their_own(store: LeaseStore, log: EventLog, clock: Clock) -> None:
    one, two = take(store, "a"), take(store, "b")
    log.append(one, {"e": 1})
    assert log.append(two, {"e": 1}).last_seq == 1


def test_nothing_to_append_is_still_fenced(store: LeaseStore, log: EventLog, clock: Clock) -> None:
    lease = take(store)
    assert log.append(lease, []).last_seq == 0
    clock.advance(15)
    with pytest.raises(StaleToken):
        log.append(lease, [])


def test_a_stale_owner_appends_nothing(store: LeaseStore, log: EventLog, clock: Clock) -> None:
    stale = take(store)
    store.steal("a", to="two", ttl=TTL, actor="op")
    with pytest.raises(StaleToken) as refused:
        log.append(stale, {"e": 1}, checkpoint={"at": 1})
    assert (refused.value.fencing_token, refused.value.current_token) == (1, 2)
    assert log.read("a") == []
    assert store.checkpoint("a") is None


def test_the_checkpoint_commits_with_the_events(store: LeaseStore, log: EventLog, clock: Clock) -> None:
    lease = take(store)
    log.append(lease, {"e": 1}, checkpoint={"at": 1})
    assert checkpoint(store) == {"at": 1}
    log.append(lease, {"f": 1})
    assert checkpoint(store) == {"at": 1}, "none given, none written"


def test_events_and_checkpoint_are_rolled_back_together(store: LeaseStore, clock: Clock, caller: Caller) -> None:
    lease = take(store)

    class Crash(Exception):
        pass

    def body(connection: Connection) -> None:
        append(connection, lease, {"e": 1}, checkpoint=1)
        raise Crash

    with pytest.raises(Crash):
        caller.run(body)
    assert store.checkpoint("a") is None
    assert rows(store, "SELECT * FROM lease_events") == []


def test_a_takeover_goes_on_where_the_last_owner_committed(store: LeaseStore, log: EventLog, clock: Clock) -> None:
    log.append(take(store, owner="one"), {"e1": 1, "e2": 2}, checkpoint=2)
    clock.advance(15)
    successor = take(store, owner="two")
    assert checkpoint(store) == 2
    assert log.append(successor, {"e2": 2, "e3": 3}, checkpoint=3).duplicates == ("e2",)
    assert [(event.seq, event.fencing_token) for event in log.read("a")] == [(1, 1), (2, 1), (3, 2)]


def test_a_page_of_events(store: LeaseStore, log: EventLog, clock: Clock) -> None:
    log.append(take(store), {f"e{number}": number for number in range(5)})
    assert [event.seq for event in log.read("a", after_seq=1, limit=2)] == [2, 3]
    assert log.read("a", after_seq=5) == []
    assert log.read("unknown") == []


def test_thousands_of_events_in_one_batch(store: LeaseStore, log: EventLog, clock: Clock) -> None:
    lease = take(store)
    assert log.append(lease, {f"e{number}": {"n": number} for number in range(3000)}).last_seq == 3000
    assert [event.payload["n"] for event in log.read("a", limit=3000)] == list(range(3000))


DOCUMENTS: tuple[Any, ...] = (
    None,
    True,
    0,
    -1.5,
    2**62,
    10**30,
    -(10**300),
    0.1,
    1.0,
    123456789.123456789,
    1e22,
    5e-324,
    "",
    "null",
    'it\'s "quoted" \\ and 💜 ß \u2028 \x7f \x01',
    r"\u0000 is not a NUL here",
    "\\\\u0000",
    [],
    {},
    [None, [None, [{}]]],
    {"": {"nested": [1, {"deep": None}]}, "ключ": "значение"},
)


def test_every_json_value_comes_back_as_it_was(store: LeaseStore, log: EventLog, clock: Clock) -> None:
    lease = take(store)
    log.append(lease, [Event(str(number), document) for number, document in enumerate(DOCUMENTS)])
    assert [event.payload for event in log.read("a")] == list(DOCUMENTS)
    for document in DOCUMENTS:
        store.write_checkpoint(lease, document)
        assert checkpoint(store) == document


@pytest.mark.parametrize(
    "document",
    [
        float("nan"),
        [float("inf")],
        "a\0b",
        {"a\0": 1},
        ["\\\0"],
        "\ud800",
        {"\udfff": 1},
        pytest.param(object(), id="an object"),
        {1, 2},
        b"bytes",
        {("tuple",): 1},
    ],
    ids=repr,
)
def test_what_the_engines_would_not_store_alike_is_refused(
    store: LeaseStore, log: EventLog, clock: Clock, document: Any
) -> None:
    lease = take(store)
    for refuse in (
        lambda: log.append(lease, {"good": 1, "bad": document}, checkpoint=1),
        lambda: log.append(lease, {"good": 1}, checkpoint=document),
        lambda: store.write_checkpoint(lease, document),
        lambda: store.release(lease, checkpoint=document),
    ):
        with pytest.raises(ConfigError):
            refuse()
    assert log.read("a") == []
    assert store.checkpoint("a") is None
    assert store.renew([lease], owner="one", ttl=TTL).lost == {}


def test_an_event_id_that_can_never_work_is_refused(store: LeaseStore, log: EventLog, clock: Clock) -> None:
    lease = take(store)
    for bad in ("", "x" * 256, "a\0", "\ud800"):
        with pytest.raises(ConfigError):
            log.append(lease, {"good": 1, bad: 1})
    assert log.read("a") == []


def test_an_event_id_may_have_any_character_that_a_name_may(store: LeaseStore, log: EventLog, clock: Clock) -> None:
    lease = take(store)
    names = [
        '"',
        "'",
        "\\",
        '\\"',
        "a,b",
        "{a}",
        '["a",1]',
        "null",
        "NULL",
        "$1 %s %(a)s :a",
        "ключ",
        "💜",
        r"\u0041",
        "A",
    ]
    assert log.append(lease, {name: name for name in names}).count == len(names)
    assert [(event.event_id, event.payload) for event in log.read("a")] == [(name, name) for name in names]
    assert log.append(lease, dict.fromkeys(names, 2)).duplicates == tuple(names)


def test_a_checkpoint_is_written_under_the_fence_only(store: LeaseStore, clock: Clock) -> None:
    lease = take(store)
    store.write_checkpoint(lease, {"at": 1})
    found = store.checkpoint("a")
    assert found is not None
    assert (found.checkpoint, found.fencing_token, found.updated_at) == ({"at": 1}, 1, clock.now())
    clock.advance(15)
    with pytest.raises(StaleToken):
        store.write_checkpoint(lease, {"at": 2})
    assert checkpoint(store) == {"at": 1}


def test_a_checkpoint_in_the_callers_own_transaction(store: LeaseStore, clock: Clock, caller: Caller) -> None:
    lease = take(store)
    caller.run(lambda connection: write_checkpoint(connection, lease, [1]))
    assert checkpoint(store) == [1]
