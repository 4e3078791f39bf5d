"""What takes more than one transaction, as steps: each recipe is a generator that says what to do next.

A recipe decides; the stores act, `LeaseStore` with threads and `AsyncLeaseStore` with tasks. So each is written once:

    step            answered with
    Do(call)        what the call returned, in a transaction of its own
    Wait(call, …)   the same; if it takes too long: who blocks it, and `LeaseHeld`
    Sleep(s)        nothing, after so long
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from random import random
from typing import Any
from uuid import UUID, uuid4, uuid5

from sqlalchemy import Connection

from leases import administration, limits, operations
from leases.direct import EitherWay
from leases.errors import LeaseHeld
from leases.model import DEFAULT_POOL, Lease, Observed, Pruned

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Do:
    """Run a call in a transaction of its own; `call(connection, attempt)`, the first attempt is 1.

    One that is an `EitherWay` may run without a transaction around its statements.
    """

    call: Callable[[Connection, int], Any]


@dataclass(frozen=True, slots=True)
class Wait:
    """Run a call that may wait for other sessions, no longer than `timeout`; `refusal` says what stands if it does."""

    call: Callable[[Connection, int], Any]
    stream_id: str
    timeout_s: float
    refusal: str
    force: bool = False


@dataclass(frozen=True, slots=True)
class Sleep:
    """Wait."""

    seconds: float


Step = Do | Wait | Sleep
Recipe = Generator[Step, Any, Any]

NO_WAIT = timedelta(0)
RECORD_S = 1.0
"""How long an operator who has waited in vain may wait once more, for the audit's line of it."""
DEFAULT_TIMEOUT = timedelta(seconds=10)


def acquire(
    clock: Clock,
    stream_id: str,
    *,
    owner: str,
    ttl: timedelta,
    pool: str = DEFAULT_POOL,
    wait: timedelta = NO_WAIT,
    claim_id: UUID | None = None,
    before_send: Callable[[], object] = lambda: None,
) -> Generator[Step, Any, Lease | None]:
    """Take the lease on one stream, asking again for up to `wait` while somebody else holds it; None if that fails.

    See `operations.acquire` for what one attempt does. `claim_id` names the whole call: repeating it with the same one
    returns the same grant while that is live. `before_send` is called before each attempt: count trust from there.
    """
    give_up_at = clock() + limits.duration("wait", wait).total_seconds()
    claim = claim_id or uuid4()
    call = partial(operations.acquire, stream_id=stream_id, owner=owner, ttl=ttl, pool=pool, claim_id=claim)

    def attempt(connection: Connection, _: int) -> Lease | None:
        before_send()
        return call(connection)

    pause_s = 0.02
    while True:
        lease: Lease | None = yield Do(EitherWay(attempt, attempt))
        left_s = give_up_at - clock()
        if lease is not None or left_s <= 0:
            return lease
        yield Sleep(min(left_s, pause_s * (0.5 + random())))
        pause_s = min(pause_s * 1.5, 0.5)


def claim(
    clock: Clock,
    *,
    owner: str,
    ttl: timedelta,
    limit: int,
    pool: str = DEFAULT_POOL,
    claim_id: UUID | None = None,
    held: int | None = None,
    before_send: Callable[[], object] = lambda: None,
) -> Generator[Step, Any, list[Lease]]:
    """Take up to `limit` streams of a pool that are free, or whose dead owner's lease has expired.

    See `operations.claim`. An attempt whose answer was lost is resolved: its grants are returned, not new ones.
    """
    call = partial(
        operations.claim, owner=owner, ttl=ttl, limit=limit, pool=pool, claim_id=claim_id or uuid4(), held=held
    )
    repeated = claim_id is not None

    def attempt(connection: Connection, number: int) -> list[Lease]:
        before_send()
        return call(connection, repeated=repeated or number > 1)

    # The count that a worker tells of is changed in the same moment: that takes a transaction.
    granted: list[Lease] = yield Do(attempt if held is not None else EitherWay(attempt, attempt))
    return granted


def expire(
    clock: Clock,
    stream_id: str,
    *,
    actor: str,
    reason: str | None = None,
    fencing_token: int | None = None,
    timeout: timedelta = DEFAULT_TIMEOUT,
    force: bool = False,
) -> Generator[Step, Any, int]:
    """End a lease now and leave the stream free; return its new token. Back means: nothing stale can commit any more.

    Waits up to `timeout` for fenced writes in flight; then `LeaseHeld` names the sessions that hold the row: the
    lease has ended and no new write passes, but theirs still may; the audit says `end`. `force` ends those sessions
    (PostgreSQL). `fencing_token` names the grant that is meant: `LeaseNotHeld` if it is not the current one, or nobody
    holds it.
    """
    observed = yield from _end_now(clock, stream_id, actor, reason, fencing_token, timeout, for_steal=False)
    call = partial(administration.revoke, actor=actor, reason=reason)
    token: int = yield from _supersede(observed, call, actor, reason, timeout, force)
    return token


def steal(
    clock: Clock,
    stream_id: str,
    *,
    to: str,
    ttl: timedelta,
    actor: str,
    reason: str | None = None,
    fencing_token: int | None = None,
    timeout: timedelta = DEFAULT_TIMEOUT,
    force: bool = False,
) -> Generator[Step, Any, Lease]:
    """Move a lease to a named owner, whoever holds it; back means: nothing under the old token can commit any more.

    The new owner has the lease for `ttl`, and must renew it as any other. Waits and refuses as `expire` does.
    """
    limits.owner(to)
    limits.ttl(ttl)
    observed = yield from _end_now(clock, stream_id, actor, reason, fencing_token, timeout, for_steal=True)
    call = partial(
        administration.hand_over, to=to, ttl=ttl, claim_id=uuid5(uuid4(), "steal"), actor=actor, reason=reason
    )
    lease: Lease = yield from _supersede(observed, call, actor, reason, timeout, force)
    return lease


def _end_now(
    clock: Clock,
    stream_id: str,
    actor: str,
    reason: str | None,
    fencing_token: int | None,
    timeout: timedelta,
    *,
    for_steal: bool,
) -> Generator[Step, Any, Observed]:
    limits.text("actor", actor)
    if reason is not None:
        limits.text("reason", reason)
    if fencing_token is not None:
        limits.fencing_token(fencing_token)
    limits.duration("timeout", timeout, least=timedelta(microseconds=1))
    call = partial(
        administration.end_now,
        stream_id=stream_id,
        fencing_token=fencing_token,
        must_be_held=not for_steal,
        must_be_open=for_steal,
    )
    ended: set[int] = set()

    def attempt(connection: Connection, _: int) -> Observed:
        observed = call(connection)
        if observed.live:
            ended.add(observed.fencing_token)
        # One whose answer was lost has ended the lease, which was live then.
        return replace(observed, live=observed.fencing_token in ended)

    observed: Observed = yield Wait(attempt, stream_id, timeout.total_seconds(), "nothing was changed")
    return observed


def _supersede(
    observed: Observed,
    call: Callable[[Connection, Observed], Any],
    actor: str,
    reason: str | None,
    timeout: timedelta,
    force: bool,
) -> Generator[Step, Any, Any]:
    try:
        return (
            yield Wait(
                lambda connection, _: call(connection, observed),
                observed.stream_id,
                timeout.total_seconds(),
                "expired, not yet fenced: no new write passes, but one in flight may still commit",
                force,
            )
        )
    except LeaseHeld:
        if observed.live:  # which it is no more
            line = (observed.stream_id, observed.fencing_token, observed.fencing_token, reason)
            with suppress(LeaseHeld):  # on SQLite whoever is in the way is so here, too
                yield Wait(
                    lambda connection, _: administration.record(connection, "end", actor, *line),
                    observed.stream_id,
                    RECORD_S,
                    "ended, and not recorded",
                )
        raise


def prune(clock: Clock, *, before: datetime) -> Generator[Step, Any, Pruned]:
    """Delete what ended before an instant, a batch of rows a transaction; return how many rows of each table.

    See `administration.prune` for what goes. Never a row that carries a token.
    """
    limits.instant("before", before)
    counts = [0, 0, 0, 0, 0]
    while True:
        batch: Pruned = yield Do(lambda connection, _: administration.prune(connection, before=before))
        deleted = [batch.grants, batch.events, batch.audit, batch.checkpoints, batch.workers]
        counts = [total + more for total, more in zip(counts, deleted, strict=True)]
        if not any(deleted):
            return Pruned(*counts)
