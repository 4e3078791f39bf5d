"""The scenarios: who meets whom, from which state. Every client runs the product's own functions.

The letters of the clients: W a fenced writer, L an append to the event log, H a heartbeat, T a taker, C a claimer, R a
release, O and P operators; `*` is the clock.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import Connection, text

from leases import Lease, events, fence, operations, recipes
from leases import administration as admin
from leases.model import Appended, Renewal, Worker
from leases.recipes import Do, Recipe, Wait
from tests.interleavings.client import Client
from tests.interleavings.database import TTL
from tests.interleavings.explorer import Body
from tests.interleavings.promises import Part, Violation
from tests.interleavings.schedule import Trace

READ_COMMITTED = "READ COMMITTED"
LEVELS = (READ_COMMITTED, "REPEATABLE READ", "SERIALIZABLE")

Held = Mapping[str, Lease]
"""The leases that are held at the beginning, by stream."""

Expect = Callable[[Trace], Sequence[Violation]]


@dataclass(frozen=True)
class Actor:
    """One client of a scenario."""

    body: Callable[[Held], Body]
    own: bool = True
    """Whether its transactions are the protocol's own, at READ COMMITTED; else the caller's, at the level walked."""
    waits: bool = True
    names: Sequence[str] | None = None
    """The streams whose grants its messages name; None if it may change others."""
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
                claims=actor.claims,
            )
            for key, actor in self.actors.items()
        }

    def bodies(self, held: Held) -> Mapping[str, Body]:
        return {key: actor.body(held) for key, actor in self.actors.items()}


# --- how the world begins ----------------------------------------------------------------------------------------


def held(*stream_ids: str, owner: str = "one") -> Callable[[Connection], Held]:
    """Streams that one worker has acquired."""

    def build(connection: Connection) -> Held:
        found = {}
        for stream_id in stream_ids:
            lease = operations.acquire(connection, stream_id, owner=owner, ttl=TTL)
            assert lease is not None
            found[stream_id] = lease
        return found

    return build


def free(*stream_ids: str) -> Callable[[Connection], Held]:
    """Streams that were held once, and are free."""

    def build(connection: Connection) -> Held:
        for lease in held(*stream_ids)(connection).values():
            operations.release(connection, lease)
        return {}

    return build


def nothing(_: Connection) -> Held:
    """No stream is known."""
    return {}


def fleet(connection: Connection) -> Held:
    """Worker `one` is on the list and holds two streams; a third is free."""
    operations.enlist(connection, Worker(worker_id="one", host="h", pid=1, version="0", pool="default"), ttl=TTL)
    found = held("a", "b")(connection)
    operations.register(connection, ["c"])
    return found


# --- what clients do ---------------------------------------------------------------------------------------------


def write(*, reads_first: bool = False) -> Callable[[Held], Body]:
    """A transaction of the caller's, fenced, which writes under the token."""

    def run(held: Held) -> Body:
        lease = held["a"]

        def body(client: Client) -> None:
            def call(connection: Connection) -> None:
                if reads_first:  # which is where a snapshot is taken
                    connection.execute(text("SELECT count(*) FROM work")).scalar_one()
                with client.fencing(lease):
                    fence(connection, lease)
                connection.execute(
                    text("INSERT INTO work VALUES (:stream, :token, :owner)"),
                    {"stream": lease.stream_id, "token": lease.fencing_token, "owner": lease.owner},
                )

            client.transact(call)

        return body

    return run


def append(*event_ids: str, checkpoint: bool = False) -> Callable[[Held], Body]:
    """An append to the event log, in a transaction of the caller's."""

    def run(held: Held) -> Body:
        def body(client: Client) -> Appended:
            offered = {event_id: {"n": 1} for event_id in event_ids}
            position = event_ids[-1] if checkpoint else None

            def call(connection: Connection) -> Appended:
                with client.fencing(held["a"]):
                    return events.append(connection, held["a"], offered, checkpoint=position)

            return client.transact(call)

        return body

    return run


def take(
    owner: str = "two", stream_id: str = "a", *, claim: UUID | None = None, commit: bool = True
) -> Callable[[Held], Body]:
    """One attempt to acquire; without `commit` it is rolled back, as by a client that dies."""

    def run(_: Held) -> Body:
        def body(client: Client) -> Lease | None:
            lease = client.transact(
                lambda connection: operations.acquire(connection, stream_id, owner=owner, ttl=TTL, claim_id=claim),
                commit=commit,
            )
            return lease if commit else None

        return body

    return run


def claim(owner: str = "two", limit: int = 2) -> Callable[[Held], Body]:
    def run(_: Held) -> Body:
        return lambda client: client.transact(
            lambda connection: operations.claim(connection, owner=owner, ttl=TTL, limit=limit)
        )

    return run


def renew(*stream_ids: str) -> Callable[[Held], Body]:
    def run(held: Held) -> Body:
        batch = [held[stream_id] for stream_id in stream_ids]
        return lambda client: client.transact(
            lambda connection: operations.renew(connection, batch, owner=batch[0].owner, ttl=TTL)
        )

    return run


def release(*, checkpoint: str | None = None, commit: bool = True) -> Callable[[Held], Body]:
    def run(held: Held) -> Body:
        lease = held["a"]

        def body(client: Client) -> bool:
            def call(connection: Connection) -> bool:
                return operations.release(connection, lease, checkpoint=checkpoint)

            return client.transact(call, commit=commit)

        return body

    return run


def follow(client: Client, recipe: Recipe) -> object:
    """Act on a recipe's steps as the stores do, each in a transaction of its own."""
    answer: object = None
    while True:
        try:
            step = recipe.send(answer)
        except StopIteration as done:
            return done.value
        assert isinstance(step, Do | Wait)
        call = step.call
        answer = client.transact(lambda connection, call=call: call(connection, 1))  # type: ignore[misc]


def expire(actor: str = "ops") -> Callable[[Held], Body]:
    return lambda _: lambda client: follow(client, recipes.expire(lambda: 0.0, "a", actor=actor))


def steal(to: str = "three", actor: str = "ops") -> Callable[[Held], Body]:
    return lambda _: lambda client: follow(client, recipes.steal(lambda: 0.0, "a", to=to, ttl=TTL, actor=actor))


def raise_tokens(*, commit: bool) -> Callable[[Held], Body]:
    """Raise all tokens, which locks rows of live leases as a grant does."""
    return lambda _: (
        lambda client: client.transact(
            lambda connection: admin.raise_tokens(connection, by=10, actor="ops"), commit=commit
        )
    )


def pause() -> Callable[[Held], Body]:
    return lambda _: lambda client: client.transact(lambda connection: admin.pause(connection, "a", actor="ops"))


def let_go(owner: str = "one") -> Callable[[Held], Body]:
    return lambda _: (
        lambda client: client.transact(lambda connection: operations.let_go_expired(connection, owner=owner))
    )


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

_WRITER = Actor(write(), own=False, names=())
_READER = Actor(write(reads_first=True), own=False, names=())
_TAKER = Actor(take(), waits=False)
_HEARTBEAT = Actor(renew("a"), waits=False, names=("a",))
_BATCH = Actor(renew("a", "b"), waits=False, names=("a", "b"))

SCENARIOS: Sequence[Scenario] = (
    # A fenced write and whoever would take its stream.
    Scenario("write-takeover", {"W": _WRITER, "T": _TAKER}, held("a")),
    Scenario("write-takeover-snapshot", {"W": _READER, "T": _TAKER}, held("a")),
    Scenario("write-steal", {"W": _WRITER, "O": Actor(steal())}, held("a"), clock_steps=0),
    Scenario("write-expire", {"W": _WRITER, "O": Actor(expire())}, held("a"), clock_steps=0),
    Scenario("write-steal-snapshot", {"W": _READER, "O": Actor(steal())}, held("a"), clock_steps=0),
    Scenario("write-expire-snapshot", {"W": _READER, "O": Actor(expire())}, held("a"), clock_steps=0),
    Scenario("write-grant-rolled-back", {"W": _WRITER, "O": Actor(raise_tokens(commit=False))}, held("a")),
    Scenario("write-raise-tokens", {"W": _READER, "O": Actor(raise_tokens(commit=True))}, held("a")),
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
    Scenario("heartbeat-pause", {"H": _HEARTBEAT, "O": Actor(pause())}, held("a")),
    Scenario("heartbeat-expire", {"H": _HEARTBEAT, "O": Actor(expire())}, held("a"), clock_steps=0),
    Scenario(
        "batch-grant-rolled-back",
        {"H": _BATCH, "R": Actor(release(commit=False), names=("a",))},
        held("a", "b"),
        expect=the_other_rows_are_renewed,
    ),
    Scenario("batch-claim", {"H": _BATCH, "C": Actor(claim(limit=3), waits=False)}, fleet, clock_steps=2),
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
        clock_steps=0,
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
    Scenario("expire-expire", {"O": Actor(expire("o")), "P": Actor(expire("p"))}, held("a"), clock_steps=0),
    Scenario("steal-expire", {"O": Actor(steal("three", "o")), "P": Actor(expire("p"))}, held("a"), clock_steps=0),
    Scenario(
        "steal-steal", {"O": Actor(steal("three", "o")), "P": Actor(steal("four", "p"))}, held("a"), clock_steps=0
    ),
    Scenario("steal-takeover", {"O": Actor(steal()), "T": _TAKER}, held("a")),
    Scenario("expire-takeover", {"O": Actor(expire()), "T": _TAKER}, held("a")),
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
        "append-append-takeover",
        {
            "L": Actor(append("e1", checkpoint=True), own=False, names=()),
            "M": Actor(append("e1", "e2", checkpoint=True), own=False, names=()),
        },
        held("a"),
    ),
    Scenario(
        "append-steal",
        {"L": Actor(append("e1", checkpoint=True), own=False, names=()), "O": Actor(steal())},
        held("a"),
        clock_steps=0,
    ),
)

BY_NAME: Mapping[str, Scenario] = {scenario.name: scenario for scenario in SCENARIOS}
