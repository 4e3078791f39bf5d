"""The checker: does what the database tells agree with the promises, and with what the clients were told? Pure.

It walks the ledger in commit order, and keeps of each stream only the token, the owner, and the number of the last
event. No clock decides anything here, but for promise 5: a worker's trust is compared with the expiry in the row.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from tests.chaos.ledger import CHANGE, CUT, EVENT, REVIVED, Entry, History
from tests.chaos.record import OK, Asked

CHAIN = "e"
"""How the names of the events begin that a stream's handlers count up, each from the checkpoint of the one before."""


@dataclass(frozen=True)
class Violation:
    """A promise that was broken, and where."""

    promise: str
    stream_id: str | None
    story: str

    def __str__(self) -> str:
        return f"{self.promise}: {self.stream_id}: {self.story}"


@dataclass
class _Stream:
    token: int = 0
    owner: str | None = None
    seq: int = 0
    chain: int = 0
    granted: dict[int, str] = field(default_factory=dict)
    claims: dict[str, int] = field(default_factory=dict)
    tokens: set[int] = field(default_factory=set)
    cut: set[int] = field(default_factory=set)
    recent: list[str] = field(default_factory=list)

    def told(self, line: str) -> None:
        self.recent.append(line)
        del self.recent[:-6]


BY_THE_CLOCK = ("2 exclusive", "5 trust")
"""What is not promised while the database's clock is set."""


def check(history: History, asked: Mapping[str, Asked], *, stepped: bool = False) -> list[Violation]:
    """Everything that is broken, in commit order, and then what was told wrongly; `stepped`: the clock was set."""
    found = _Walk(history, asked).run()
    return [each for each in found if not (stepped and each.promise in BY_THE_CLOCK)]


class _Walk:
    def __init__(self, history: History, asked: Mapping[str, Asked]) -> None:
        self.history = history
        self.asked = asked
        self.streams: dict[str, _Stream] = defaultdict(_Stream)
        self.written: Counter[str] = Counter()
        self.trusted: dict[tuple[str, int], float] = {}
        for one in asked.values():
            until = one.details.get("until")
            if one.stream_id is not None and until is not None:
                key = (one.stream_id, one.details["token"])
                self.trusted[key] = max(until, self.trusted.get(key, 0.0))

    def run(self) -> Iterator[Violation]:
        for entry in self.history.entries:
            stream = self.streams[entry.stream_id]
            before = list(stream.recent)
            found = self._event(entry, stream) if entry.kind == EVENT else self._lease(entry, stream)
            for promise, story in found:
                yield Violation(promise, entry.stream_id, f"{story}; before it: {' | '.join(before) or 'nothing'}")
        yield from self._tables()
        yield from self._writes()
        yield from self._operators()

    # --- in commit order -------------------------------------------------------------------------------------------

    def _lease(self, entry: Entry, stream: _Stream) -> Iterator[tuple[str, str]]:
        if entry.kind == REVIVED:
            yield (
                "4 no resurrection",
                f"the lease of {entry.owner} under token {entry.token} was extended, and had ended",
            )
            return
        if entry.kind == CUT:
            stream.cut.add(entry.token)
            stream.told(f"token {entry.token} cut")
            return
        line = f"{entry.owner} under token {entry.token} after {entry.old_owner} under {entry.old_token}"
        if (entry.old_token, entry.old_owner) != (stream.token, stream.owner):
            yield "1 monotonic", f"{line}, but {stream.owner} under {stream.token} was committed last"
        if entry.token < stream.token:
            yield "1 monotonic", f"the token fell: {line}"
        yield from self._trust(entry, stream)
        if entry.granted:
            assert entry.owner is not None
            if entry.granted and entry.token <= max(stream.granted, default=0):
                yield "1 monotonic", f"a grant without a new token: {line}"
            if entry.old_owner is not None and entry.was_live and not entry.by_operator:
                yield "2 exclusive", f"granted while the lease before it was live: {line}"
            if entry.was_live and entry.claim_id and stream.claims.get(entry.claim_id) == entry.old_token:
                yield "6 not doubled", f"a claim was granted {entry.old_token}, still live, and again: {line}"
            stream.claims[entry.claim_id or ""] = entry.token
            stream.granted[entry.token] = entry.owner
        stream.token, stream.owner = entry.token, entry.owner
        stream.tokens.add(entry.token)
        stream.told(f"{'grant to' if entry.granted else 'end by'} {entry.owner} {entry.token}")

    def _trust(self, entry: Entry, stream: _Stream) -> Iterator[tuple[str, str]]:
        if entry.old_owner is None or entry.old_token is None or entry.old_expires_s is None:
            return
        until = self.trusted.get((entry.stream_id, entry.old_token))
        if until is not None and entry.old_token not in stream.cut and until > entry.old_expires_s:
            late = until - entry.old_expires_s
            yield (
                "5 trust",
                f"{entry.old_owner} trusted {entry.old_token} until {until:.3f}, {late:.3f} s too long: {entry}",
            )

    def _event(self, entry: Entry, stream: _Stream) -> Iterator[tuple[str, str]]:
        ask = self.asked.get(entry.ask or "")
        line = f"event {entry.event_id} of {entry.ask} under token {entry.token}"
        if entry.token != stream.token:
            yield "3 fenced", f"{line} was committed after the stream had come to token {stream.token}"
        if ask is None:
            yield "6 nothing twice", f"{line}: nobody asked for it"
        elif stream.granted.get(entry.token) != ask.details["owner"]:
            yield "3 fenced", f"{line} by {ask.details['owner']}, granted to {stream.granted.get(entry.token)}"
        if entry.seq != stream.seq + 1:
            yield "6 seq without gaps", f"{line} has seq {entry.seq} after {stream.seq}"
        assert entry.event_id is not None
        if entry.event_id.startswith(CHAIN):
            if entry.event_id != f"{CHAIN}{stream.chain + 1}":
                yield "6 nothing lost", f"{line} came after {CHAIN}{stream.chain}"
            stream.chain += 1
        stream.seq = entry.seq or 0
        self.written[entry.ask or ""] += 1
        stream.told(f"event {entry.event_id} {entry.token}")

    # --- at the end ------------------------------------------------------------------------------------------------

    def _tables(self) -> Iterator[Violation]:
        written = (entry for entry in self.history.entries if entry.kind == EVENT)
        ledger = Counter((entry.stream_id, entry.event_id or "", entry.seq or 0, entry.token) for entry in written)
        table = Counter(self.history.events)
        for key in (ledger - table).keys() | (table - ledger).keys():
            yield Violation(
                "6 nothing lost", str(key[0]), f"event {key} is in the log {table[key]} times, {ledger[key]} written"
            )
        for stream_id, (token, owner) in self.history.tokens.items():
            stream = self.streams[stream_id]
            if (token, owner) != (stream.token, stream.owner):
                yield Violation(
                    "1 monotonic",
                    stream_id,
                    f"ends with {owner} {token}; committed last was {stream.owner} {stream.token}",
                )
            position = self.history.checkpoints.get(stream_id, 0)
            if position != stream.chain:
                yield Violation("6 nothing lost", stream_id, f"checkpoint {position}, but {stream.chain} events")

    def _writes(self) -> Iterator[Violation]:
        """What every writer was told is so."""
        known = {(stream_id, event_id) for stream_id, event_id, *_ in self.history.events}
        for one in self.asked.values():
            events = one.details.get("events")
            if events is None:
                continue
            count = self.written[one.id]
            if one.answer == OK and one.result.get("duplicates"):
                if any((one.stream_id, event_id) not in known for event_id in events):
                    yield Violation("6 nothing lost", one.stream_id, f"{one.id} was told that {events} are there: no")
                if count not in (0, len(events)):
                    yield Violation("6 all or none", one.stream_id, f"{one.id}: {count} of {len(events)} events")
            elif one.answer == OK and count != len(events):
                yield Violation("6 nothing lost", one.stream_id, f"{one.id} was told ok; {count} of {events} are there")
            elif not one.may_have_happened and count:
                yield Violation(
                    "6 told the truth", one.stream_id,
                    f"{one.id} ({one.what}) was told {one.answer!r} ({one.result.get('text')}), "
                    f"but {count} of {events} are there",
                )  # fmt: skip
            elif count not in (0, len(events)):
                yield Violation("6 all or none", one.stream_id, f"{one.id}: {count} of {len(events)} events")

    def _operators(self) -> Iterator[Violation]:
        """An operator's answer names a token that was committed; what it ended, it ended under a new one."""
        for action, stream_id, before, after in self.history.audit:
            if after <= before:
                yield Violation("1 monotonic", stream_id, f"{action} left token {before} at {after}")
        for one in self.asked.values():
            if one.answer != OK or one.what not in ("steal", "expire", "acquire") or "token" not in one.result:
                continue
            assert one.stream_id is not None
            stream, token = self.streams[one.stream_id], one.result["token"]
            owner = one.details.get("owner")
            if token not in stream.tokens or (owner is not None and stream.granted.get(token) != owner):
                yield Violation(
                    "6 nothing lost", one.stream_id, f"{one.id} was told {one.what} to {owner} under token {token}: no"
                )


def figures(history: History, asked: Mapping[str, Asked]) -> dict[str, int]:
    """What a run has done, in numbers."""
    kinds = Counter(entry.kind for entry in history.entries)
    answers = Counter(one.answer or "no answer" for one in asked.values())
    changes = [entry for entry in history.entries if entry.kind == CHANGE]
    return {
        "grants": sum(entry.granted for entry in changes),
        "takeovers of an expired lease": sum(entry.granted and entry.old_owner is not None for entry in changes),
        "operators' grants and revocations": len(history.audit),
        "events": kinds[EVENT],
        "requests": len(asked),
        **{f"answered {answer}": count for answer, count in sorted(answers.items())},
    }
