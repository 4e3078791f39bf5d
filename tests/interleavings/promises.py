"""The promises of DESIGN §3, checked on one schedule: pure functions of what was committed, in commit order.

The explorer lets one statement run at a time and looks at the database after every COMMIT. So the history of states
*is* the commit order; no timestamp of anybody's has a say in it.

| promise | what would break it here |
| --- | --- |
| monotonic | a token falls, a grant's token is not above all before it, a grant vanishes or changes hands |
| exclusive | a live lease changes its owner but by a steal; times of two grants overlap; two are told of one grant |
| fenced | a write commits under a token that is not current; a fence passes on what is expired or another's; |
| | a grant, steal or expire commits while a fenced transaction under a lower token is in flight |
| no resurrection | a heartbeat extends a lease that had expired when its UPDATE was done |
| named | a message changes a grant that it does not name; one that names none, and is no operator's, a live one |
| nothing lost | an event that was accepted is missing or there twice, a gap in seq, a checkpoint without its event |
| truthful | an answer that the database contradicts |
| live | a hang, a deadlock, a wait of one who never waits, an error that is no answer; a stream that nobody can have |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

from leases import Lease
from leases.errors import LeaseHeld, LeaseNotHeld
from leases.faults import sqlstate
from leases.model import Appended, Renewal
from tests.interleavings.client import described
from tests.interleavings.database import START, TTL, Committed, LeaseRow, WorkRow
from tests.interleavings.schedule import State, Step, Trace

PROMISES = (
    "monotonic", "exclusive", "fenced", "no resurrection", "named", "nothing lost", "truthful", "live",
)  # fmt: skip


class Violation(NamedTuple):
    promise: str
    what: str


@dataclass(frozen=True)
class Part:
    """What the checks must know of one client."""

    isolation: str
    waits: bool = True
    """Whether it may wait for a lock."""
    names: frozenset[tuple[str, int]] | None = None
    """The grants that its messages name, which alone they may change; None if they name none."""
    operator: bool = False
    """Whether it may change live leases that it does not name."""
    claims: str | None = None
    """What names its attempt: those of the same name may be told of the same grant."""


def check(trace: Trace, parts: Mapping[str, Part]) -> list[Violation]:
    """All that is wrong with a schedule."""
    found: list[Violation] = []
    for before, after in zip(trace.states, trace.states[1:], strict=False):
        found += _monotonic(before.rows, after.rows)
        found += _exclusive(trace, before, after)
        found += _fenced(trace, before, after)
        found += _heartbeat(trace, before, after, parts)
        found += _log(after.rows)
    found += _fences_passed(trace, parts)
    found += _answers(trace, parts)
    found += _live(trace, parts)
    return list(dict.fromkeys(found))


def _monotonic(before: Committed, after: Committed) -> Iterator[Violation]:
    for stream_id, old in before.leases.items():
        new = after.leases.get(stream_id)
        if new is None:
            yield Violation("monotonic", f"the row of {stream_id} is gone")
        elif new.token < old.token:
            yield Violation("monotonic", f"the token of {stream_id} fell from {old.token} to {new.token}")
        elif new.owner is not None and new.owner != old.owner and new.token == old.token:
            yield Violation("monotonic", f"{stream_id} has a new owner, {new.owner}, under the old token {old.token}")
    for key, grant in before.grants.items():
        kept = after.grants.get(key)
        if kept is None or kept.owner != grant.owner:
            yield Violation("monotonic", f"the grant {key} of {grant.owner} became {kept}")
        elif grant.ended_s is not None and kept.ended_s is None:
            yield Violation("monotonic", f"the grant {key} had ended, and lives again")
    for (stream_id, token), grant in after.grants.items():
        if (stream_id, token) not in before.grants:
            lease = before.leases.get(stream_id)
            highest = max([other for stream, other in before.grants if stream == stream_id], default=0)
            if token <= max(highest, lease.token if lease else 0):
                yield Violation("monotonic", f"{grant} was granted when the token had been at {lease}")
    for row in after.audit:
        if row.action in ("expire", "steal") and (row.token_after or 0) <= (row.token_before or 0):
            yield Violation("monotonic", f"{row} ended a grant, and did not raise the token")
    for lease in after.leases.values():
        if lease.owner is not None:
            current = after.grants.get((lease.stream_id, lease.token))
            if current is None or current.owner != lease.owner or current.ended_s is not None:
                yield Violation("monotonic", f"{lease} has no open grant of its own: {current}")


def _exclusive(trace: Trace, before: State, after: State) -> Iterator[Violation]:
    stolen = {(row.stream_id, row.token_after) for row in after.rows.audit if row.action == "steal"}
    for (stream_id, token), grant in after.rows.grants.items():
        old = before.rows.leases.get(stream_id)
        is_new = (stream_id, token) not in before.rows.grants
        if is_new and old is not None and old.live(_changed_s(trace, after)) and (stream_id, token) not in stolen:
            yield Violation("exclusive", f"{grant} was granted while {old} was live")
        new = after.rows.leases[stream_id]
        full_s = _changed_s(trace, after) + TTL.total_seconds()
        if is_new and new.token == token and new.expires_s is not None and new.expires_s < full_s:
            yield Violation("truthful", f"{new} is short: its TTL does not count from after the wait")
        for (other_stream, other_token), earlier in after.rows.grants.items():
            ended = earlier.ended_s is not None and earlier.ended_s <= grant.granted_s
            if other_stream == stream_id and other_token < token and not ended:
                yield Violation("exclusive", f"{earlier} and {grant} overlap")


def _changed_s(trace: Trace, state: State) -> float:
    """When the UPDATE of `leases` was done that a state came of."""
    steps = [step for step in trace.transaction(state) if "UPDATE leases SET" in step.statement]
    done = [step.done_s for step in steps if step.done_s is not None]
    return max(done, default=state.at_s)


def _fenced(trace: Trace, before: State, after: State) -> Iterator[Violation]:
    ended = {
        (row.stream_id, row.token_before): row.action
        for row in before.rows.audit
        if row.action in ("steal", "expire") and row.token_before is not None
    }
    for written in _written(before.rows, after.rows):
        lease = before.rows.leases.get(written.stream_id)
        if lease is None or lease.token != written.token:
            yield Violation("fenced", f"{written} was committed when the stream was at {lease}")
        for (stream_id, token), action in ended.items():
            if stream_id == written.stream_id and written.token <= token:
                yield Violation("fenced", f"{written} was committed after {action} had ended token {token}")
    for stream_id, lease in after.rows.leases.items():
        old = before.rows.leases.get(stream_id)
        if old is None or lease.token == old.token:
            continue
        for key, fenced in _in_flight(trace, after.after):
            if key != after.key and fenced.stream_id == stream_id and fenced.fencing_token < lease.token:
                yield Violation(
                    "fenced",
                    f"token {lease.token} of {stream_id} was committed by {after.key} while {key} was in a "
                    f"transaction fenced under {fenced.fencing_token}",
                )


def _written(before: Committed, after: Committed) -> list[WorkRow]:
    """What was written under a token between two states."""
    work = list(after.work)
    for row in before.work:
        if row in work:
            work.remove(row)
    work += [WorkRow(e.stream_id, e.token, "an event") for e in after.events if e not in before.events]
    return work + [
        WorkRow(c.stream_id, c.token, "a checkpoint") for c in after.checkpoints if c not in before.checkpoints
    ]


def _in_flight(trace: Trace, number: int) -> Iterator[tuple[str, Lease]]:
    """Who was in a fenced transaction when a step was made, and under which lease."""
    for key, answer in trace.answers.items():
        steps = trace.steps_of(key)
        for nth, lease in answer.fences:
            fence = steps[nth - 1]
            if fence.done_after is not None and fence.done_after < number:
                end = next((step for step in steps[nth:] if step.ends_transaction), None)
                if end is None or end.number > number:
                    yield key, lease


def _fences_passed(trace: Trace, parts: Mapping[str, Part]) -> Iterator[Violation]:
    """At the moment of the check the token was current, the owner the row's, the lease unexpired."""
    for key, answer in trace.answers.items():
        steps = trace.steps_of(key)
        for nth, lease in answer.fences:
            fence = steps[nth - 1]
            if fence.done_after is None or fence.done_s is None:
                continue
            seen = [trace.state_at(fence.done_after)]
            if parts[key].isolation != "READ COMMITTED":  # then the check is of the transaction's snapshot
                start = max((i + 1 for i, step in enumerate(steps[: nth - 1]) if step.ends_transaction), default=0)
                seen.append(trace.state_at(steps[start].number))
            rows = [state.rows.leases[lease.stream_id] for state in seen]
            if not any(_is(row, lease) and row.live(fence.done_s) for row in rows):
                yield Violation("fenced", f"the fence of {key} passed at {fence.done_s:g} s on {rows[0]}")


def _is(row: LeaseRow, lease: Lease) -> bool:
    return row.token == lease.fencing_token and row.owner == lease.owner


def _heartbeat(trace: Trace, before: State, after: State, parts: Mapping[str, Part]) -> Iterator[Violation]:
    part = parts[after.key]
    for stream_id, old in before.rows.leases.items():
        new = after.rows.leases.get(stream_id)
        if new is None or new == old:
            continue
        same = new.token == old.token and old.expires_s is not None
        if same and new.expires_s is not None and new.expires_s > (old.expires_s or 0):
            at_s = _changed_s(trace, after)
            if not old.live(at_s) and new.live(at_s):
                yield Violation("no resurrection", f"{old} had expired at {at_s:g} s, and became {new}")
        if part.names is None:
            wrong = old.live(_changed_s(trace, after)) and not part.operator
        else:
            wrong = (stream_id, old.token) not in part.names
        if wrong:
            yield Violation("named", f"{after.key} names {sorted(part.names or ())}, and changed {old} to {new}")


def _log(rows: Committed) -> Iterator[Violation]:
    for stream_id in {event.stream_id for event in rows.events}:
        events = sorted((event for event in rows.events if event.stream_id == stream_id), key=lambda event: event.seq)
        if [event.seq for event in events] != list(range(1, len(events) + 1)):
            yield Violation("nothing lost", f"the numbers of {stream_id}'s events are {[e.seq for e in events]}")
        if [event.token for event in events] != sorted(event.token for event in events):
            yield Violation("nothing lost", f"the tokens of {stream_id}'s events are {[e.token for e in events]}")
    for row in rows.checkpoints:
        if rows.events and (row.stream_id, row.checkpoint, row.token) not in {
            (event.stream_id, event.event_id, event.token) for event in rows.events
        }:
            yield Violation("nothing lost", f"{row} stands without its event")


# --- answers ---------------------------------------------------------------------------------------------------


def _granted(result: object) -> list[Lease]:
    given = result if isinstance(result, list) else [result]
    return [each for each in given if isinstance(each, Lease)]


def _answers(trace: Trace, parts: Mapping[str, Part]) -> Iterator[Violation]:
    first, last = trace.states[0].rows, trace.states[-1].rows
    told: dict[tuple[str, int], str] = {}
    by_claim: dict[str, set[tuple[str, int]]] = {}
    for key, answer in trace.answers.items():
        for lease in _granted(answer.result):
            grant = (lease.stream_id, lease.fencing_token)
            row = last.grants.get(grant)
            if row is None or row.owner != lease.owner:
                yield Violation("truthful", f"{key} was told of {grant} for {lease.owner}, and it is {row}")
            asked_s = next(step.began_s for step in reversed(trace.steps_of(key)) if not step.ends_transaction)
            if lease.expires_at <= START + timedelta(seconds=asked_s):
                yield Violation("truthful", f"{key} was told at {asked_s:g} s of {lease}")
            claim = parts[key].claims or key
            if told.setdefault(grant, claim) != claim:
                yield Violation("exclusive", f"{grant} was granted to {key} and to {told[grant]}")
            by_claim.setdefault(claim, set()).add(grant)
        match answer.result:
            case Renewal() as renewal:
                yield from _renewal(trace, key, renewal, parts[key].names or frozenset())
            case Appended(last_seq=last_seq) if last_seq > len(last.events):
                yield Violation("truthful", f"{key} was told of event {last_seq} of {len(last.events)}")
    for claim, grants in by_claim.items():
        streams = [stream_id for stream_id, _ in grants]
        if len(streams) != len(set(streams)) and trace.ended_s == 0:
            yield Violation("exclusive", f"the attempt {claim} was granted twice: {sorted(grants)}")
    if all(answer.error is None for answer in trace.answers.values()):
        untold = last.grants.keys() - first.grants.keys() - told.keys()
        if untold:
            yield Violation("exclusive", f"granted to nobody who knows: {sorted(untold)}")
    known = {event.event_id for event in last.events}
    appended = [answer.result for answer in trace.answers.values() if isinstance(answer.result, Appended)]
    for each in appended:
        if not known.issuperset(each.duplicates):
            yield Violation("nothing lost", f"{each} was answered, and the events are {sorted(known)}")
    if appended and sum(each.count for each in appended) != len(last.events) - len(first.events):
        yield Violation("nothing lost", f"accepted: {appended}, and there are {last.events}")


def _renewal(trace: Trace, key: str, renewal: Renewal, names: frozenset[tuple[str, int]]) -> Iterator[Violation]:
    commit = next(step for step in reversed(trace.steps_of(key)) if step.statement == "COMMIT")
    looked = next(step for step in reversed(trace.steps_of(key)) if not step.ends_transaction)
    state = next(state for state in trace.states if state.after == commit.number)
    began_s = next(step.began_s for step in trace.transaction(state))
    for stream_id in renewal.lost:
        row = trace.state_at(looked.number).rows.leases[stream_id]
        first = trace.states[0].rows.leases[stream_id]
        if (row.token, row.owner) == (first.token, first.owner) and row.live(looked.began_s):
            yield Violation("truthful", f"{key} was told that it lost {row}")
    for stream_id, token in names:
        row = state.rows.leases[stream_id]
        extended = (row.token, row.expires_s) == (token, began_s + TTL.total_seconds())
        if not (extended or stream_id in renewal.lost or stream_id in renewal.skipped):
            yield Violation("truthful", f"{key} was told that it extended {row}")


def _live(trace: Trace, parts: Mapping[str, Part]) -> Iterator[Violation]:
    if trace.failure is not None:
        yield Violation("live", trace.failure)
        return
    for key, answer in trace.answers.items():
        error = answer.error
        if error is not None and not isinstance(error, LeaseHeld | LeaseNotHeld) and sqlstate(error) != "40001":
            yield Violation("live", f"{key} ended with {described(error)}")
        if "40001" in answer.conflicts and parts[key].isolation == "READ COMMITTED":
            yield Violation("live", f"{key} was refused for a conflict at READ COMMITTED")
        if "40P01" in answer.conflicts:
            yield Violation("live", f"{key} was refused for a deadlock")
        waited: list[Step] = [step for step in trace.steps_of(key) if step.waited_for]
        if waited and not parts[key].waits:
            yield Violation("live", f"{key} never waits, and waited for {waited[0].waited_for}")
    latest_s = trace.ended_s + TTL.total_seconds()
    for row in trace.states[-1].rows.leases.values():
        if row.available_s > latest_s or (row.expires_s or 0) > latest_s:
            yield Violation("live", f"nobody can have {row} within a TTL of {trace.ended_s:g} s")
