"""The witness sees every promise broken: each by a story of its own, of rows that no sound product has."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest

from leases.model import Lease
from tests.clock import START
from tests.model.invariants import Witness
from tests.model.tables import COLUMNS, Row, Rows


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def lease(token: int, owner: str = "one", until: float = 15) -> Lease:
    return Lease("a", owner, token, at(until), at(0), "default", timedelta(seconds=until))


def row(token: int, owner: str | None = "one", until: float | None = 15) -> Row:
    return ("a", token, owner, None if until is None else at(until), *[None] * 11)


def tables(token: int = 2, until: float | None = 15, **rows: list[Row]) -> Rows:
    """A stream at a token, with these rows of grants, events and checkpoints."""
    return {**{table: [] for table in COLUMNS}, "leases": [row(token, "one", until)]} | {
        f"lease_{name}": given for name, given in rows.items()
    }


def grant(token: int, since: float, until: float | None) -> Row:
    return ("a", token, "one", at(since), None if until is None else at(until), None if until is None else "released")


def event(seq: int, token: int, when: float, payload: Any = None) -> Row:
    return ("a", seq, f"e{seq}", token, at(when), payload)


def test_a_sound_story_is_not_complained_of() -> None:
    witness = Witness()
    witness.granted(lease(1))
    witness.granted(lease(1))
    witness.granted(lease(2))
    witness.passed(lease(2), row(2), at(14.999))
    witness.accepted_event("a", "e1", 1, at(3), "x")
    witness.look(row(2), at(1))
    witness.look(row(2, until=20), at(2))
    sound = tables(
        until=20,
        grants=[grant(1, 0, 2), grant(2, 2, None)],
        events=[event(1, 2, 3, "x"), event(2, 2, 4)],
        checkpoints=[("a", 2, 0, at(4))],
    )
    witness.look_at_all(sound, at(5))


@pytest.mark.parametrize("second", [lease(1, "two"), lease(0)], ids=["twice", "lower"])
def test_1_a_token_that_is_granted_twice_or_falls_is_seen(second: Lease) -> None:
    witness = Witness()
    witness.granted(lease(1))
    with pytest.raises(AssertionError, match=r"^1: "):
        witness.granted(second)


def test_1_a_row_below_a_granted_token_is_seen() -> None:
    witness = Witness()
    witness.granted(lease(2))
    with pytest.raises(AssertionError, match=r"^1: "):
        witness.look(row(1), at(0))


@pytest.mark.parametrize("ended", [None, 3], ids=["not ended", "ended late"])
def test_2_terms_that_overlap_are_seen(ended: float | None) -> None:
    with pytest.raises(AssertionError, match=r"^2: "):
        Witness().look_at_all(tables(grants=[grant(1, 0, ended), grant(2, 2, None)]), at(4))


@pytest.mark.parametrize(
    ("before", "now"),
    [(None, 1), (row(2), 1), (row(1, "two"), 1), (row(1), 15)],
    ids=["unknown", "stale", "another's", "expired"],
)
def test_3_a_write_that_must_not_pass_is_seen(before: Row | None, now: float) -> None:
    with pytest.raises(AssertionError, match=r"^3: "):
        Witness().passed(lease(1), before, at(now))


@pytest.mark.parametrize(
    "broken",
    [
        tables(events=[event(1, 2, 3), event(2, 1, 3)], grants=[grant(2, 2, None)]),
        tables(events=[event(1, 2, 1)], grants=[grant(2, 2, None)]),
        tables(events=[event(1, 2, 16)], grants=[grant(2, 2, None)]),
        tables(checkpoints=[("a", 3, 0, at(4))]),
    ],
    ids=["stale", "too early", "too late", "checkpoint of nobody"],
)
def test_3_rows_under_a_token_out_of_its_term_are_seen(broken: Rows) -> None:
    with pytest.raises(AssertionError, match=r"^3: "):
        Witness().look_at_all(broken, at(17))


def test_4_a_lease_that_lives_again_is_seen() -> None:
    witness = Witness()
    witness.look(row(1, until=15), at(15))
    with pytest.raises(AssertionError, match=r"^4: "):
        witness.look(row(1, until=30), at(16))


@pytest.mark.parametrize(
    "events",
    [[], [event(1, 2, 3, "y")], [event(1, 2, 3, "x"), event(3, 2, 3)]],
    ids=["lost", "changed", "a gap"],
)
def test_6_an_accepted_event_that_is_gone_or_changed_is_seen(events: list[Row]) -> None:
    witness = Witness()
    witness.accepted_event("a", "e1", 1, at(3), "x")
    with pytest.raises(AssertionError, match=r"^6: "):
        witness.look_at_all(tables(grants=[grant(2, 2, None)], events=events), at(5))


def test_6_an_event_that_is_accepted_twice_is_seen() -> None:
    witness = Witness()
    witness.accepted_event("a", "e1", 1, at(3), "x")
    with pytest.raises(AssertionError, match=r"^6: "):
        witness.accepted_event("a", "e1", 2, at(3), "x")


def test_where_the_clock_was_set_back_terms_may_overlap_and_leases_live_again() -> None:
    witness = Witness()
    witness.set_back = True
    witness.look(row(2, until=15), at(15))
    witness.look(row(2, until=30), at(16))
    witness.look_at_all(tables(until=30, grants=[grant(1, 0, 3), grant(2, 2, None)]), at(16))
