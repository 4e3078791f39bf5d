"""What the lease table promises to workers, without a database: a few dicts, and each rule in plain words.

Nothing here is clever, and nothing is shared with the product but its values and its errors. One thing happens at a
time, at `now`, and happens at once. `operator` has what operators do, and what only looks.

A call that is refused raises before it has changed anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from leases.errors import StaleToken
from leases.model import Appended, Lease, Loss, Membership, Renewal

LONGEST = timedelta(hours=25)
"""The longest TTL and an hour: an expiry further away than this is from before the clock was set back."""


@dataclass
class Stream:
    """What there is to know of one stream. Nobody holds it while `owner` is None."""

    stream_id: str
    pool: str
    registered_at: datetime
    available_at: datetime
    token: int = 0
    owner: str | None = None
    expires_at: datetime | None = None
    acquired_at: datetime | None = None
    claim_id: UUID | None = None
    failures: int = 0
    last_error: str | None = None
    paused_at: datetime | None = None
    paused_by: str | None = None
    pause_reason: str | None = None
    retired_at: datetime | None = None

    @property
    def open(self) -> bool:
        """May be granted."""
        return self.paused_at is None and self.retired_at is None


@dataclass
class Granted:
    """One term of ownership."""

    owner: str
    granted_at: datetime
    ended_at: datetime | None = None
    end_reason: str | None = None


@dataclass
class Written:
    """An event in the log."""

    event_id: str
    seq: int
    token: int
    recorded_at: datetime
    payload: Any


@dataclass
class Position:
    """A checkpoint."""

    token: int
    checkpoint: Any
    updated_at: datetime


@dataclass
class Process:
    """A worker on the list."""

    worker: Membership
    started_at: datetime
    expires_at: datetime
    beaten_at: datetime
    lease_count: int = 0


@dataclass
class Model:
    """The lease table of one database, and the time there."""

    now: datetime
    streams: dict[str, Stream] = field(default_factory=dict)
    grants: dict[str, dict[int, Granted]] = field(default_factory=dict)
    events: dict[str, list[Written]] = field(default_factory=dict)
    checkpoints: dict[str, Position] = field(default_factory=dict)
    watermarks: dict[str, tuple[int, str]] = field(default_factory=dict)
    workers: dict[str, Process] = field(default_factory=dict)
    audit_lines: list[tuple[datetime, str, str, str | None, int | None, int | None, str | None]] = field(
        default_factory=list
    )

    # --- what the words mean -----------------------------------------------------------------------------------

    def live(self, stream: Stream) -> bool:
        """Held and unexpired. At its expiry a lease has expired."""
        return stream.owner is not None and stream.expires_at is not None and stream.expires_at > self.now

    def may_be_taken(self, stream: Stream) -> bool:
        """Open, and nobody's: it is free, its lease has expired, or its lease ends later than any lease can."""
        if not stream.open:
            return False
        return stream.owner is None or self.past(stream.expires_at)

    def past(self, expires_at: datetime | None) -> bool:
        return expires_at is not None and (expires_at <= self.now or expires_at > self.now + LONGEST)

    def is_mine(self, stream: Stream | None, lease: Lease) -> bool:
        """The row is of the very grant that a caller names: stream, token and owner."""
        return stream is not None and stream.token == lease.fencing_token and stream.owner == lease.owner

    def lease(self, stream: Stream) -> Lease:
        """The answer to whoever holds it."""
        assert stream.owner is not None
        assert stream.expires_at is not None
        assert stream.acquired_at is not None
        return Lease(
            stream.stream_id,
            stream.owner,
            stream.token,
            stream.expires_at,
            stream.acquired_at,
            stream.pool,
            stream.expires_at - self.now,
            stream.failures,
        )

    # --- how a grant begins and ends ---------------------------------------------------------------------------

    def begin_grant(self, stream: Stream, owner: str, ttl: timedelta, claim_id: UUID) -> Lease:
        """Every grant has a new token, one higher; the grant before it ends, if nobody has ended it."""
        self.end_grant(stream, "stolen")
        stream.token += 1
        stream.owner = owner
        stream.expires_at = self.now + ttl
        stream.acquired_at = self.now
        stream.claim_id = claim_id
        self.grants.setdefault(stream.stream_id, {})[stream.token] = Granted(owner, self.now)
        return self.lease(stream)

    def end_grant(self, stream: Stream, reason: str) -> None:
        """A grant ends when it is ended, but never later than its lease. Then it has expired, unless it is revoked."""
        grant = self.current_grant(stream)
        if stream.owner is not None and stream.expires_at is not None and grant is not None and grant.ended_at is None:
            grant.ended_at = min(self.now, stream.expires_at)
            grant.end_reason = "expired" if reason != "revoked" and stream.expires_at <= self.now else reason
        stream.owner = None
        stream.expires_at = None

    def current_grant(self, stream: Stream) -> Granted | None:
        return self.grants.get(stream.stream_id, {}).get(stream.token)

    # --- streams -----------------------------------------------------------------------------------------------

    def register(self, stream_ids: list[str], *, pool: str) -> int:
        """New streams are free, without a token. Retired ones come back; their tokens, and who has them, stay."""
        count = 0
        for stream_id in set(stream_ids):
            stream = self.streams.get(stream_id)
            if stream is None:
                self.streams[stream_id] = Stream(stream_id, pool, registered_at=self.now, available_at=self.now)
                count += 1
            elif stream.retired_at is not None:
                stream.retired_at = None
                stream.pool = pool
                stream.available_at = self.now
                count += 1
        return count

    def acquire(self, stream_id: str, *, owner: str, ttl: timedelta, pool: str, claim_id: UUID) -> Lease | None:
        """Take it if nobody has it. The same attempt, asked again, gets the grant that it has got, while that lives."""
        if stream_id not in self.streams:
            self.register([stream_id], pool=pool)
        stream = self.streams[stream_id]
        if self.may_be_taken(stream):
            return self.begin_grant(stream, owner, ttl, claim_id)
        if stream.claim_id == claim_id and stream.owner == owner and self.live(stream):
            return self.lease(stream)
        return None

    def claim(
        self, *, owner: str, ttl: timedelta, limit: int, pool: str, claim_id: UUID, repeated: bool, chosen: list[str]
    ) -> list[Lease]:
        """Take what is free, the longest free first; then what the dead have left, in any order: `chosen` says which.

        The same attempt, asked again, gets what is still live of what it has got, if anything is, and nothing new.
        """
        if repeated:
            mine = [s for s in self.streams.values() if s.owner == owner and s.claim_id == claim_id and self.live(s)]
            if mine:
                return [self.lease(stream) for stream in sorted(mine, key=lambda s: s.stream_id)]
        inside = [stream for stream in self.streams.values() if stream.pool == pool and self.may_be_taken(stream)]
        free = [stream for stream in inside if stream.owner is None and stream.available_at <= self.now]
        free.sort(key=lambda stream: (stream.available_at, stream.stream_id))
        free = free[:limit]
        left = [stream for stream in inside if stream.owner is not None and not self.looks_after(stream, owner)]
        still_wanted = min(limit - len(free), len(left))
        left = [stream for stream in left if stream.stream_id in chosen]
        assert len(left) == still_wanted, f"{still_wanted} of the dead owners' streams are claimed, not {len(left)}"
        taken = sorted(free + left, key=lambda stream: stream.stream_id)
        return [self.begin_grant(stream, owner, ttl, claim_id) for stream in taken]

    def looks_after(self, stream: Stream, claimer: str) -> bool:
        """A live worker looks after its own rows, and nobody else does; the claimer is that worker for its own."""
        process = self.workers.get(stream.owner or "")
        return stream.owner != claimer and process is not None and not self.past(process.expires_at)

    def renew(self, leases: list[Lease], *, owner: str, ttl: timedelta, held: int) -> Renewal:
        """Extend those that are this owner's very grants, and live. Expired is lost. The others say what they are."""
        lost: dict[str, Loss] = {}
        ending = set()
        asked = {lease.stream_id: lease for lease in leases}
        for stream_id, lease in asked.items():
            stream = self.streams.get(stream_id)
            if stream is None:
                lost[stream_id] = Loss.REVOKED
            elif self.is_mine(stream, lease) and self.live(stream):
                stream.expires_at = self.now + ttl
                if not stream.open:
                    ending.add(stream_id)
            elif self.is_mine(stream, lease):
                lost[stream_id] = Loss.EXPIRED
            elif stream.token == lease.fencing_token:
                lost[stream_id] = Loss.RELEASED
            else:
                lost[stream_id] = Loss.REVOKED if stream.owner is None else Loss.TAKEN
        process = self.workers.get(owner)
        if process is not None:
            process.expires_at = self.now + ttl
            process.beaten_at = self.now
            process.lease_count = held
        known = {(lease.stream_id, lease.fencing_token) for lease in asked.values()}
        strays = {
            s.stream_id for s in self.streams.values() if s.owner == owner and (s.stream_id, s.token) not in known
        }
        return Renewal(frozenset(), lost, frozenset(ending), process is not None, frozenset(strays))

    def release(self, lease: Lease, *, checkpoint: Any, backoff: timedelta, error: str | None) -> bool:
        """Let this very grant go, also if it has expired. A checkpoint is a fenced write, and so needs a live lease."""
        if checkpoint is not None:
            self.write_checkpoint(lease, checkpoint)
        stream = self.streams.get(lease.stream_id)
        if stream is None or not self.is_mine(stream, lease):
            return False
        self.end_grant(stream, "released")
        stream.available_at = self.now + max(backoff, timedelta(0))
        stream.failures = 0 if error is None else stream.failures + 1
        stream.last_error = error
        return True

    def let_go_expired(self, owner: str) -> int:
        """Free what has expired in one owner's name."""
        strays = [s for s in self.streams.values() if s.owner == owner and self.past(s.expires_at)]
        for stream in strays:
            self.end_grant(stream, "released")
            stream.available_at = self.now
        return len(strays)

    # --- fenced writes -----------------------------------------------------------------------------------------

    def fence(self, lease: Lease) -> None:
        """Only the very grant, and only while its lease is live."""
        stream = self.streams.get(lease.stream_id)
        if stream is None:
            raise StaleToken(lease.stream_id, lease.fencing_token, None, None)
        if not self.is_mine(stream, lease) or not self.live(stream):
            raise StaleToken(lease.stream_id, lease.fencing_token, stream.token, stream.owner)

    def write_checkpoint(self, lease: Lease, checkpoint: Any) -> None:
        self.fence(lease)
        self.checkpoints[lease.stream_id] = Position(lease.fencing_token, checkpoint, self.now)

    def append(self, lease: Lease, events: list[tuple[str, Any]], *, checkpoint: Any) -> Appended:
        """Number what is new from the stream's last number on; leave out what is there already. All, or nothing."""
        self.fence(lease)
        log = self.events.setdefault(lease.stream_id, [])
        twice, known, count = [], [], 0
        offered: set[str] = set()
        before = {event.event_id for event in log}
        for event_id, payload in events:
            if event_id in offered:
                twice.append(event_id)
            elif event_id in before:
                known.append(event_id)
            else:
                log.append(Written(event_id, self.last_seq(log) + 1, lease.fencing_token, self.now, payload))
                count += 1
            offered.add(event_id)
        if checkpoint is not None:
            self.write_checkpoint(lease, checkpoint)
        return Appended(count, tuple(twice + known), self.last_seq(log))

    def last_seq(self, log: list[Written]) -> int:
        return log[-1].seq if log else 0

    def advance_watermark(self, lease: Lease) -> None:
        """A sink that sees no lease takes a token above all that it has seen, or the same of the same owner."""
        token, owner = self.watermarks.get(lease.stream_id, (-1, lease.owner))
        if lease.fencing_token < token or (lease.fencing_token == token and lease.owner != owner):
            raise StaleToken(lease.stream_id, lease.fencing_token, token, owner)
        self.watermarks[lease.stream_id] = lease.fencing_token, lease.owner

    def protected_write(self, lease: Lease) -> bool:
        """A row of a protected table carries stream and token, and no owner: is it of a live grant?"""
        stream = self.streams.get(lease.stream_id)
        return stream is not None and stream.token == lease.fencing_token and self.live(stream)

    # --- workers -----------------------------------------------------------------------------------------------

    def enlist(self, worker: Membership, *, ttl: timedelta) -> None:
        """Put a process on the list; one that is there lives on, as what it says of itself by now."""
        process = self.workers.setdefault(worker.worker_id, Process(worker, self.now, self.now, self.now))
        process.worker = worker
        process.beaten_at = self.now
        process.expires_at = self.now + ttl

    def dismiss(self, worker_id: str) -> None:
        self.workers.pop(worker_id, None)
