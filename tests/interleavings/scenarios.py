"""The scenarios: who meets whom, and from which state.

The letters of the clients: W a fenced writer, L an append to the event log, H a heartbeat, T a taker, C a claimer, R a
release, O and P operators; `*` is the clock.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import Connection

from leases.model import Renewal
from tests.interleavings.actors import (
    Does,
    Held,
    append,
    claim,
    expire,
    fleet,
    free,
    held,
    let_go,
    nothing,
    pause,
    raise_tokens,
    release,
    renew,
    steal,
    take,
    write,
)
from tests.interleavings.explorer import Body
from tests.interleavings.promises import Part, Violation
from tests.interleavings.schedule import Trace

READ_COMMITTED = "READ COMMITTED"
LEVELS = (READ_COMMITTED, "REPEATABLE READ", "SERIALIZABLE")

Expect = Callable[[Trace], Sequence[Violation]]


@dataclass(frozen=True)
class Actor:
    """One client of a scenario."""

    does: Does
    own: bool = True
    """Whether its transactions are the protocol's own, at READ COMMITTED; else the caller's, at the level walked."""
    waits: bool = True
    names: Sequence[str] | None = None
    """The streams whose grants its messages name, which alone they may change; None if they name none."""
    operator: bool = False
    """Whether it may change live leases."""
    claims: str | None = None


@dataclass(frozen=True)
class Scenario:
    """Clients, the state that they begin with, and how often the clock may move."""

    name: str
    actors: Mapping[str, Actor]
    build: Callable[[Connection], Held]
    clock_steps: int = 1
    expect: Expect = lambda _: ()

    @property
    def levels(self) -> Sequence[str]:
        """The isolation levels that make a difference."""
        return LEVELS if any(not actor.own for actor in self.actors.values()) else LEVELS[:1]

    def isolations(self, level: str) -> Mapping[str, str]:
        return {key: READ_COMMITTED if actor.own else level for key, actor in self.actors.items()}

    def parts(self, level: str, held: Held) -> Mapping[str, Part]:
        """What the checks must know."""
        return {
            key: Part(
                isolation=self.isolations(level)[key],
                waits=actor.waits,
                names=None
                if actor.names is None
                else frozenset((stream_id, held[stream_id].fencing_token) for stream_id in actor.names),
                operator=actor.operator,
                claims=actor.claims,
            )
            for key, actor in self.actors.items()
        }

    def bodies(self, held: Held) -> Mapping[str, Body]:
        return {key: actor.does(held) for key, actor in self.actors.items()}


# --- what one scenario expects beside the promises ---------------------------------------------------------------


def heartbeats_pass_fences(trace: Trace) -> Sequence[Violation]:
    """A fenced write in flight costs its worker no heartbeat."""
    result = trace.answers["H"].result
    assert isinstance(result, Renewal)
    return [Violation("live", "a heartbeat skipped a row that only a fence holds")] if result.skipped else []


def the_other_rows_are_renewed(trace: Trace) -> Sequence[Violation]:
    """A row that somebody has locked costs a worker no other lease."""
    result = trace.answers["H"].result
    assert isinstance(result, Renewal)
    if trace.steps_of("H")[0].began_s == 0 and (result.skipped | result.lost.keys()) - {"a"}:
        return [Violation("live", f"a live batch met a lock on row a, and was answered {result}")]
    return []


CLAIM = UUID(int=1)


def _operator(does: Does) -> Actor:
    return Actor(does, operator=True)


_WRITER = Actor(write(), own=False, names=())
_READER = Actor(write(reads_first=True), own=False, names=())
_TAKER = Actor(take(), waits=False)
_HEARTBEAT = Actor(renew("a"), waits=False, names=("a",))
_ALONE = Actor(append("e1", checkpoint=True, alone=True), names=())
_BATCH = Actor(renew("a", "b"), waits=False, names=("a", "b"))

SCENARIOS: Sequence[Scenario] = (
    # A fenced write and whoever would take its stream.
    Scenario("write-takeover", {"W": _WRITER, "T": _TAKER}, held("a")),
    Scenario("write-takeover-snapshot", {"W": _READER, "T": _TAKER}, held("a")),
    Scenario("write-steal", {"W": _WRITER, "O": _operator(steal())}, held("a")),
    Scenario("write-expire", {"W": _WRITER, "O": _operator(expire())}, held("a"), clock_steps=0),
    Scenario("write-steal-snapshot", {"W": _READER, "O": _operator(steal())}, held("a"), clock_steps=0),
    Scenario("write-expire-snapshot", {"W": _READER, "O": _operator(expire())}, held("a"), clock_steps=0),
    Scenario("write-grant-rolled-back", {"W": _WRITER, "O": _operator(raise_tokens(commit=False))}, held("a")),
    Scenario("write-raise-tokens", {"W": _READER, "O": _operator(raise_tokens(commit=True))}, held("a")),
    Scenario("write-release", {"W": _WRITER, "R": Actor(release(), waits=False, names=("a",))}, held("a")),
    Scenario(
        "write-release-takeover",
        {"W": _WRITER, "R": Actor(release(), names=("a",)), "T": _TAKER},
        held("a"),
    ),
    Scenario("write-heartbeat", {"W": _WRITER, "H": _HEARTBEAT}, held("a"), expect=heartbeats_pass_fences),
    Scenario("write-heartbeat-takeover", {"W": _WRITER, "H": _HEARTBEAT, "T": _TAKER}, held("a")),
    Scenario("write-write-takeover", {"W": _WRITER, "V": _WRITER, "T": _TAKER}, held("a")),
    # A heartbeat and whoever locks its rows.
    Scenario(
        "heartbeat-takeover-rolled-back", {"H": _HEARTBEAT, "T": Actor(take(commit=False), waits=False)}, held("a")
    ),
    Scenario(
        "heartbeat-release-rolled-back",
        {"H": _HEARTBEAT, "R": Actor(release(commit=False), names=("a",))},
        held("a"),
    ),
    Scenario("heartbeat-release", {"H": _HEARTBEAT, "R": Actor(release(), names=("a",))}, held("a")),
    Scenario("heartbeat-pause", {"H": _HEARTBEAT, "O": _operator(pause())}, held("a")),
    Scenario("heartbeat-steal", {"H": _HEARTBEAT, "O": _operator(steal())}, held("a"), clock_steps=0),
    Scenario("heartbeat-expire", {"H": _HEARTBEAT, "O": _operator(expire())}, held("a"), clock_steps=0),
    Scenario(
        "batch-grant-rolled-back",
        {"H": _BATCH, "R": Actor(release(commit=False), names=("a",))},
        held("a", "b"),
        expect=the_other_rows_are_renewed,
    ),
    Scenario("batch-claim", {"H": _BATCH, "C": Actor(claim(limit=3), waits=False)}, fleet, clock_steps=2),
    Scenario(
        "batch-claim-unlisted", {"H": _BATCH, "C": Actor(claim(limit=3), waits=False)}, held("a", "b"), clock_steps=2
    ),
    Scenario(
        "batch-claim-claim",
        {"H": _BATCH, "C": Actor(claim(limit=2), waits=False), "D": Actor(claim("three", limit=2), waits=False)},
        fleet,
    ),
    Scenario("batch-batch", {"H": _BATCH, "I": Actor(renew("b", "a"), waits=False, names=("a", "b"))}, held("a", "b")),
    Scenario("heartbeat-let-go-takeover", {"H": _HEARTBEAT, "G": Actor(let_go(), waits=False), "T": _TAKER}, held("a")),
    # Grants against grants, in the caller's own transactions too.
    Scenario(
        "acquire-acquire",
        {"T": Actor(take("two"), own=False, waits=False), "U": Actor(take("three"), own=False, waits=False)},
        held("a"),
    ),
    Scenario(
        "acquire-acquire-free",
        {"T": _TAKER, "U": Actor(take("three"), waits=False), "V": Actor(take("four"), waits=False)},
        free("a"),
    ),
    Scenario(
        "acquire-acquire-new", {"T": Actor(take("two"), own=False), "U": Actor(take("three"), own=False)}, nothing
    ),
    Scenario(
        "acquire-retried",
        {
            "T": Actor(take(claim=CLAIM), waits=False, claims="one"),
            "U": Actor(take(claim=CLAIM), waits=False, claims="one"),
        },
        free("a"),
    ),
    Scenario(
        "claim-claim", {"C": Actor(claim(), waits=False), "D": Actor(claim("three"), waits=False)}, free("a", "b", "c")
    ),
    Scenario(
        "release-acquire",
        {"R": Actor(release(), own=False, names=("a",)), "T": Actor(take(), own=False, waits=False)},
        held("a"),
    ),
    Scenario(
        "release-checkpoint-acquire",
        {"R": Actor(release(checkpoint="e"), names=("a",)), "T": _TAKER},
        held("a"),
    ),
    # The same owner comes back: a message of its earlier grant is late.
    Scenario(
        "late-release-reacquire",
        {"R": Actor(release(), names=("a",)), "T": Actor(take("one"), waits=False)},
        held("a"),
    ),
    Scenario("late-heartbeat-reacquire", {"H": _HEARTBEAT, "T": Actor(take("one"), waits=False)}, held("a")),
    Scenario("late-write-reacquire", {"W": _WRITER, "T": Actor(take("one"), waits=False)}, held("a")),
    # Operators.
    Scenario(
        "expire-expire",
        {"O": _operator(expire("o")), "P": _operator(expire("p"))},
        held("a"),
        clock_steps=0,
    ),
    Scenario(
        "steal-expire",
        {"O": _operator(steal("three", "o")), "P": _operator(expire("p"))},
        held("a"),
        clock_steps=0,
    ),
    Scenario(
        "steal-steal",
        {"O": _operator(steal("three", "o")), "P": _operator(steal("four", "p"))},
        held("a"),
        clock_steps=0,
    ),
    Scenario("steal-takeover", {"O": _operator(steal()), "T": _TAKER}, held("a")),
    Scenario("expire-takeover", {"O": _operator(expire()), "T": _TAKER}, held("a")),
    # The event log.
    Scenario(
        "append-append",
        {"L": Actor(append("e1", "e2"), own=False, names=()), "M": Actor(append("e2", "e3"), own=False, names=())},
        held("a"),
        clock_steps=0,
    ),
    Scenario(
        "append-takeover",
        {"L": Actor(append("e1", checkpoint=True), own=False, names=()), "T": _TAKER},
        held("a"),
    ),
    Scenario(
        "append-append-expiry",
        {
            "L": Actor(append("e1", checkpoint=True), own=False, names=()),
            "M": Actor(append("e1", "e2", checkpoint=True), own=False, names=()),
        },
        held("a"),
    ),
    Scenario(
        "append-steal",
        {"L": Actor(append("e1", checkpoint=True), own=False, names=()), "O": _operator(steal())},
        held("a"),
        clock_steps=0,
    ),
    Scenario("alone-takeover", {"L": _ALONE, "T": _TAKER}, held("a")),
    Scenario("alone-steal", {"L": _ALONE, "O": _operator(steal())}, held("a")),
    Scenario("alone-expire", {"L": _ALONE, "O": _operator(expire())}, held("a")),
    Scenario(
        "alone-append",
        {"L": _ALONE, "M": Actor(append("e1", "e2", checkpoint=True), own=False, names=())},
        held("a"),
    ),
)

BY_NAME: Mapping[str, Scenario] = {scenario.name: scenario for scenario in SCENARIOS}
