"""What the clients of a schedule do, and how its world begins: every one runs the product's own functions.

What is here but not in the product is the caller's: a transaction, a table `work`, a rollback in place of a crash.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from uuid import UUID

from sqlalchemy import Connection, text

from leases import Lease, events, fence, operations, recipes
from leases import administration as admin
from leases import fleet as members
from leases.direct import NOT_TAKEN, NotTaken
from leases.model import Appended, Membership
from leases.recipes import Do, Recipe, Wait
from tests.interleavings.client import Client
from tests.interleavings.database import TTL
from tests.interleavings.explorer import Body

Held = Mapping[str, Lease]
"""The leases that are held at the beginning, by stream."""

Does = Callable[[Held], Body]
"""What a client does, given those."""

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
    members.enlist(connection, Membership(worker_id="one", host="h", pid=1, version="0", pool="default"), ttl=TTL)
    found = held("a", "b")(connection)
    operations.register(connection, ["c"])
    return found


# --- what clients do ---------------------------------------------------------------------------------------------


def write(*, reads_first: bool = False) -> Does:
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


def append(*event_ids: str, checkpoint: bool = False, alone: bool = False) -> Does:
    """An append to the event log: in a transaction of the caller's, or as the one statement that the stores make of it.

    That statement commits by itself; here, so that others can come between, it has a COMMIT of its own. Where it has
    nothing to tell, the stores go on with a transaction.
    """

    def run(held: Held) -> Body:
        def body(client: Client) -> Appended:
            offered = {event_id: {"n": 1} for event_id in event_ids}
            position = event_ids[-1] if checkpoint else None

            def call(connection: Connection) -> Appended:
                with client.fencing(held["a"]):
                    return events.append(connection, held["a"], offered, checkpoint=position)

            def call_alone(connection: Connection) -> Appended | NotTaken:
                nth = client.statements + 1
                answer = events.append_alone(connection, held["a"], offered, checkpoint=position)
                if answer is not NOT_TAKEN:  # its fence has passed
                    client.fences.append((nth, held["a"]))
                return answer

            answer = client.transact(call_alone) if alone else NOT_TAKEN
            return client.transact(call) if isinstance(answer, NotTaken) else answer

        return body

    return run


def take(owner: str = "two", stream_id: str = "a", *, claim: UUID | None = None, commit: bool = True) -> Does:
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


def claim(owner: str = "two", limit: int = 2) -> Does:
    def run(_: Held) -> Body:
        return lambda client: client.transact(
            lambda connection: operations.claim(connection, owner=owner, ttl=TTL, limit=limit)
        )

    return run


def renew(*stream_ids: str) -> Does:
    def run(held: Held) -> Body:
        batch = [held[stream_id] for stream_id in stream_ids]
        return lambda client: client.transact(
            lambda connection: operations.renew(connection, batch, owner=batch[0].owner, ttl=TTL)
        )

    return run


def release(*, checkpoint: str | None = None, commit: bool = True) -> Does:
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


def expire(actor: str = "ops") -> Does:
    return lambda _: lambda client: follow(client, recipes.expire(lambda: 0.0, "a", actor=actor))


def steal(to: str = "three", actor: str = "ops") -> Does:
    return lambda _: lambda client: follow(client, recipes.steal(lambda: 0.0, "a", to=to, ttl=TTL, actor=actor))


def raise_tokens(*, commit: bool) -> Does:
    """Raise all tokens, which locks rows of live leases as a grant does."""
    return lambda _: (
        lambda client: client.transact(
            lambda connection: admin.raise_tokens(connection, by=10, actor="ops"), commit=commit
        )
    )


def pause() -> Does:
    return lambda _: lambda client: client.transact(lambda connection: admin.pause(connection, "a", actor="ops"))


def let_go(owner: str = "one") -> Does:
    return lambda _: lambda client: client.transact(lambda connection: members.let_go_expired(connection, owner=owner))
