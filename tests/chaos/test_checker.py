"""The checker sees each promise broken, in a history that is otherwise sound."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.chaos.checker import check, figures
from tests.chaos.ledger import CHANGE, CUT, EVENT, REVIVED, Entry, History
from tests.chaos.record import OK, REFUSED, UNAVAILABLE, UNKNOWN, Asked

BY_STEAL = "6fa459ea-ee8a-5ca4-894e-db77e160355e"
BY_CLAIM = "16fd2706-8baf-433b-82eb-8c7fada847da"


def change(before: tuple[int, str | None], after: tuple[int, str | None], **other: Any) -> Entry:
    entry = Entry(CHANGE, "s", before[0], after[0], before[1], after[1], None, False, 100.0, None, None, None)
    return replace(entry, **other)


def event(event_id: str, seq: int, token: int, ask: str) -> Entry:
    return Entry(EVENT, "s", None, token, None, None, None, False, None, event_id, seq, ask)


def wrote(request: str, token: int, owner: str, *events: str, answer: str | None = OK, **details: Any) -> Asked:
    values = {"token": token, "owner": owner, "events": list(events), **details}
    return Asked(request, "append", "s", values, answer)


ENTRIES = [
    change((0, None), (1, "a"), claim_id=BY_CLAIM),
    event("e1", 1, 1, "q1"),
    change((1, "a"), (2, "b")),
    event("r7", 2, 2, "q2"),
    change((2, "b"), (3, None)),
    change((3, None), (4, "a")),
    event("e2", 3, 4, "q3"),
]
ASKED = {
    "q1": wrote("q1", 1, "a", "e1", until=99.0),
    "q2": wrote("q2", 2, "b", "r7", answer=UNKNOWN),
    "q3": wrote("q3", 4, "a", "e2"),
    "q4": wrote("q4", 1, "a", "r9", answer=REFUSED),
    "q5": wrote("q5", 4, "a", "r8", answer=None),
    "o1": Asked("o1", "expire", "s", {}, OK, {"token": 3}),
    "o2": Asked("o2", "acquire", "s", {"owner": "a"}, OK, {"token": 4}),
}


def history(entries: list[Entry], **other: Any) -> History:
    written = [entry for entry in entries if entry.kind == EVENT]
    last = next((entry for entry in reversed(entries) if entry.kind == CHANGE), None)
    values: dict[str, Any] = {
        "entries": entries,
        "events": [(each.stream_id, each.event_id, each.seq, each.token) for each in written],
        "checkpoints": {"s": sum((each.event_id or "").startswith("e") for each in written)},
        "tokens": {"s": (last.token, last.owner)} if last else {},
        "audit": [("expire", "s", 2, 3)],
    }
    return History(**{**values, **other})


def promises(entries: list[Entry], asked: dict[str, Asked] | None = None, **other: Any) -> set[str]:
    return {violation.promise for violation in check(history(entries, **other), ASKED | (asked or {}))}


def test_a_sound_history_has_no_violation() -> None:
    assert check(history(ENTRIES), ASKED) == []
    assert figures(history(ENTRIES), ASKED)["grants"] == 3


def changed(at: int, **values: Any) -> list[Entry]:
    return [replace(entry, **values) if number == at else entry for number, entry in enumerate(ENTRIES)]


def swapped(one: int, other: int) -> list[Entry]:
    entries = list(ENTRIES)
    entries[one], entries[other] = entries[other], entries[one]
    return entries


@pytest.mark.parametrize(
    ("promise", "entries"),
    [
        pytest.param("3 fenced", swapped(1, 2), id="a write is committed after the next grant"),
        pytest.param("3 fenced", swapped(3, 4), id="a write is committed after its revocation"),
        pytest.param("3 fenced", changed(0, owner="c"), id="a write is another owner's"),
        pytest.param("1 monotonic", changed(2, token=1), id="a grant without a new token"),
        pytest.param("1 monotonic", changed(5, token=2), id="a token that falls"),
        pytest.param("1 monotonic", swapped(4, 5), id="a change of what was not there"),
        pytest.param("2 exclusive", changed(2, was_live=True), id="a grant while another is live"),
        pytest.param("5 trust", changed(2, old_expires_s=98.5), id="an owner trusts beyond its expiry"),
        pytest.param("6 seq without gaps", changed(6, seq=4), id="a gap"),
        pytest.param("6 nothing lost", changed(6, event_id="e3"), id="a step is left out"),
        pytest.param("6 nothing lost", ENTRIES[:-1], id="an acknowledged event is missing"),
        pytest.param("6 nothing twice", [*ENTRIES, event("r2", 4, 4, "?")], id="an event that nobody asked for"),
        pytest.param("6 told the truth", [*ENTRIES, event("r9", 4, 4, "q4")], id="a refused write is there"),
        pytest.param("6 not doubled", changed(2, claim_id=BY_CLAIM, was_live=True), id="a claim is granted twice"),
        pytest.param("4 no resurrection", [*ENTRIES, change((4, "a"), (4, "a"), kind=REVIVED)], id="revived"),
    ],
)
def test_a_broken_promise_is_seen(promise: str, entries: list[Entry]) -> None:
    assert promise in promises(entries)


def test_an_operator_may_take_a_live_lease_and_cut_one_short() -> None:
    stolen = changed(2, was_live=True, claim_id=BY_STEAL)
    assert promises(stolen) == set()
    cut = [*ENTRIES[:2], change((1, "a"), (1, "a"), kind=CUT), *changed(2, old_expires_s=50.0)[2:]]
    assert promises(cut) == set()


def test_half_a_batch_is_seen() -> None:
    half = {"q5": wrote("q5", 4, "a", "r8", "r9", answer=None)}
    assert promises([*ENTRIES, event("r8", 4, 4, "q5")], half) == {"6 all or none"}


def test_an_answer_that_nothing_was_changed_is_held_to() -> None:
    told = {"q3": wrote("q3", 4, "a", "e2", answer=UNAVAILABLE)}
    assert promises(ENTRIES, told) == {"6 told the truth"}


def test_an_operators_answer_is_held_to() -> None:
    assert promises(ENTRIES, audit=[("expire", "s", 2, 2)]) == {"1 monotonic"}
    assert promises(ENTRIES, {"o1": Asked("o1", "expire", "s", {}, OK, {"token": 9})}) == {"6 nothing lost"}


def test_the_tables_are_compared_with_the_ledger() -> None:
    assert promises(ENTRIES, events=[]) == {"6 nothing lost"}
    assert promises(ENTRIES, tokens={"s": (5, "a")}) == {"1 monotonic"}
    assert promises(ENTRIES, checkpoints={"s": 1}) == {"6 nothing lost"}
