"""The explorer itself: it walks every order, and each once; it sees waits, deadlocks and hangs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import pytest
from sqlalchemy import Connection, text

from tests.interleavings import explorer as explorer_module
from tests.interleavings.client import Client
from tests.interleavings.database import START, STEP_S, Database
from tests.interleavings.explorer import Body, Choose, Explorer, follow, walk
from tests.interleavings.scenarios import READ_COMMITTED
from tests.interleavings.schedule import CLOCK, Trace

Run = Callable[[Choose], Trace]


@contextmanager
def running(database: Database, bodies: Mapping[str, Body], clock_steps: int = 0) -> Iterator[Run]:
    """Clients that do what they are told, on two rows of `work`, `a` and `b`."""

    def build(connection: Connection) -> None:
        connection.execute(text("INSERT INTO work VALUES ('a', 0, ''), ('b', 0, '')"))

    database.set_up(build)
    explorer = Explorer(database, dict.fromkeys(bodies, READ_COMMITTED))
    yield lambda choose: explorer.run(bodies, clock_steps, choose)


def executing(*statements: str) -> Body:
    """One transaction of these statements."""

    def body(client: Client) -> list[object]:
        return client.transact(
            lambda connection: [
                row[0] for statement in statements for row in connection.execute(text(statement)).all()
            ],
        )

    return body


def changing(*rows: str) -> Body:
    change = "UPDATE work SET owner = owner || '!' WHERE stream_id = '{}' RETURNING owner"
    return executing(*(change.format(row) for row in rows))


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize(("ours", "theirs", "clock_steps"), [(2, 2, 0), (2, 4, 0), (2, 2, 1), (3, 2, 2)])
def test_every_order_is_walked_once(
    database: Database, ours: int, theirs: int, clock_steps: int, seed: int | None
) -> None:
    looks = [executing(*["SELECT 1"] * (count - 1)) for count in (ours, theirs)]
    with running(database, {"A": looks[0], "B": looks[1]}, clock_steps) as run:
        orders = [trace.order for trace, _ in walk(run, seed=seed)]
    assert len(orders) == len(set(orders))
    # When all have finished, the clock moves no more: so each order ends with a client's statement.
    full = ours + theirs
    moves = sum(math.comb(full - 1 + moved, moved) for moved in range(clock_steps + 1))
    assert len(orders) == math.comb(full, ours) * moves
    assert len({order.replace(CLOCK, "") for order in orders}) == math.comb(full, ours)


def test_a_wait_is_seen_and_ends_with_the_other_transaction(database: Database) -> None:
    with running(database, {"A": changing("a"), "B": changing("a")}) as run:
        trace = run(follow("ABAB"))
    assert [step.waited_for for step in trace.steps] == [[], ["A"], [], []]
    assert trace.steps[1].done_after == 2, "done when A had committed"
    assert [trace.answers[key].result for key in "AB"] == [["!"], ["!!"]]


def test_who_waits_cannot_be_let_go(database: Database) -> None:
    with running(database, {"A": changing("a"), "B": changing("a")}) as run:
        orders = {trace.order for trace, _ in walk(run)}
    assert orders == {"AABB", "ABAB", "BBAA", "BABA"}


def test_a_deadlock_is_resolved_by_the_server_and_the_one_refused_begins_again(database: Database) -> None:
    with running(database, {"A": changing("a", "b"), "B": changing("b", "a")}) as run:
        traces = [(trace, tree.diverged) for trace, tree in walk(run)]
    refused = [trace for trace, _ in traces if any("40P01" in answer.conflicts for answer in trace.answers.values())]
    assert refused
    assert all(trace.failure is None for trace, _ in traces)
    assert all(answer.error is None for trace, _ in traces for answer in trace.answers.values())


def test_a_hang_is_reported_and_leaves_nothing_behind(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explorer_module, "PATIENCE_S", 0.3)
    with running(database, {"A": executing("SELECT pg_sleep(600)"), "B": changing("a")}) as run:
        trace = run(follow("BA"))
        assert trace.failure is not None
    monkeypatch.undo()
    with running(database, {"A": changing("a"), "B": changing("a")}) as run:
        assert run(follow("AABB")).failure is None


def test_the_clock_is_the_schedules_and_frozen_for_a_statement_that_waits(database: Database) -> None:
    since = f"extract(epoch FROM {{}}() - '{START.isoformat()}'::timestamptz)::int"
    clock = f"UPDATE work SET owner = '' WHERE stream_id = 'a' RETURNING {since}"
    statement, wall = (executing(clock.format(f"{name}_timestamp")) for name in ("statement", "clock"))
    with running(database, {"A": changing("a"), "S": statement, "W": wall}, clock_steps=1) as run:
        assert run(follow("AS*ASWW")).answers["S"].result == [0], "it began before the clock moved"
        assert run(follow("AW*AWSS")).answers["W"].result == [STEP_S], "it looked after its wait"
        assert run(follow("*AASSWW")).answers["S"].result == [STEP_S]


def test_a_schedule_that_cannot_be_is_refused(database: Database) -> None:
    with running(database, {"A": changing("a"), "B": changing("a")}) as run:
        with pytest.raises(ValueError, match="only A can go on"):
            run(follow("ABB"))
