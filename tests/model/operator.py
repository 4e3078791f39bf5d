"""What operators do to the model, and what it looks like from outside."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from leases.errors import LeaseHeld, LeaseNotHeld
from leases.model import Checkpoint, EndReason, Grant, Lease, LeaseInfo, Observed, Pruned, RecordedEvent, WorkerInfo
from tests.model.model import Model, Position, Stream


@dataclass
class Table(Model):
    """The model with its operators."""

    def known(self, stream_id: str) -> Stream:
        if stream_id not in self.streams:
            raise LeaseNotHeld("no such stream", stream_id=stream_id)
        return self.streams[stream_id]

    def record(self, action: str, stream: Stream | None, before: int | None, actor: str, reason: str | None) -> None:
        """Every action leaves a line."""
        stream_id = None if stream is None else stream.stream_id
        after = None if stream is None else stream.token
        self.audit_lines.append((self.now, actor, action, stream_id, before, after, reason))

    # --- expire is end_now, then revoke; steal is end_now, then hand_over --------------------------------------

    def end_now(self, stream_id: str, *, fencing_token: int | None, for_steal: bool) -> Observed:
        """First step: a live lease expires now, so that no new write passes. Who has it stays in the row."""
        stream = self.known(stream_id)
        if stream.owner is None and not for_steal:
            raise LeaseNotHeld("nobody holds it", stream_id=stream_id)
        if fencing_token is not None and fencing_token != stream.token:
            raise LeaseNotHeld("another grant is meant", stream_id=stream_id)
        if for_steal:
            self.refuse_closed(stream)
        live = self.live(stream)
        if live:
            stream.expires_at = self.now
        return Observed(stream_id, stream.owner, stream.token, live)

    def revoke(self, observed: Observed, *, actor: str, reason: str | None) -> int:
        """Second step of expire: a new token, and nobody's. Nothing, if somebody has been granted it since."""
        stream = self.known(observed.stream_id)
        before = stream.token
        if before > observed.fencing_token:
            return before
        self.end_grant(stream, "revoked")
        stream.token += 1
        stream.available_at = self.now
        self.record("expire", stream, before, actor, reason)
        return stream.token

    def hand_over(
        self, observed: Observed, *, to: str, ttl: timedelta, claim_id: UUID, actor: str, reason: str | None
    ) -> Lease:
        """Second step of steal: grant it, whoever has it by now. The same attempt, asked again, gets the same grant."""
        stream = self.known(observed.stream_id)
        if stream.claim_id == claim_id and stream.owner == to:
            return self.lease(stream)
        self.refuse_closed(stream)
        before = stream.token
        grant = self.current_grant(stream)
        taken_away = stream.owner is not None and (observed.live or before != observed.fencing_token)
        lease = self.begin_grant(stream, to, ttl, claim_id)
        if taken_away and grant is not None:
            grant.end_reason = "stolen"  # the first step only made it look expired
        self.record("steal", stream, before, actor, reason)
        return lease

    def refuse_closed(self, stream: Stream) -> None:
        if not stream.open:
            raise LeaseHeld("paused or retired", stream_id=stream.stream_id, owner=stream.owner)

    # --- pause, resume, retire ---------------------------------------------------------------------------------

    def pause(self, stream_id: str, *, actor: str, reason: str | None) -> None:
        """Nobody is granted it any more; its owner keeps it. A second pause changes nothing but a reason."""
        stream = self.known(stream_id)
        if stream.paused_at is None or reason is not None:
            stream.paused_at = stream.paused_at or self.now
            stream.paused_by = actor
            stream.pause_reason = reason
        self.record("pause", stream, stream.token, actor, reason)

    def resume(self, stream_id: str, *, actor: str, reason: str | None) -> bool:
        stream = self.known(stream_id)
        if stream.paused_at is None:
            return False
        stream.paused_at = stream.paused_by = stream.pause_reason = None
        self.record("resume", stream, stream.token, actor, reason)
        return True

    def retire(self, stream_ids: list[str], *, actor: str | None, reason: str | None) -> int:
        """Nobody is granted these any more; their owners keep them. Their rows, and so their tokens, stay."""
        given = [self.streams[name] for name in sorted(set(stream_ids)) if name in self.streams]
        given = [stream for stream in given if stream.retired_at is None]
        for stream in given:
            stream.retired_at = self.now
            if actor is not None:
                self.record("retire", stream, stream.token, actor, reason)
        return len(given)

    # --- repairs -----------------------------------------------------------------------------------------------

    def reset_checkpoint(self, stream_id: str, checkpoint: Any, *, actor: str, reason: str | None) -> None:
        stream = self.known(stream_id)
        if self.live(stream):
            raise LeaseHeld("its owner would overwrite it", stream_id=stream_id, owner=stream.owner)
        self.checkpoints[stream_id] = Position(stream.token, checkpoint, self.now)
        self.record("reset-checkpoint", stream, stream.token, actor, reason)

    def raise_tokens(self, *, by: int, actor: str, reason: str | None) -> int:
        """After a backup: every lease ends, and every token is passed."""
        for stream in self.streams.values():
            self.end_grant(stream, "revoked")
            stream.token += by
            stream.available_at = self.now
        self.record("raise-tokens", None, None, actor, f"by {by}: {reason}" if reason else f"by {by}")
        return len(self.streams)

    def prune(self, *, before: datetime) -> Pruned:
        """Forget what ended before; never a token, nor a stream's last event."""
        grants = [
            (name, token)
            for name, granted in self.grants.items()
            for token, grant in granted.items()
            if grant.ended_at is not None and grant.ended_at < before
        ]
        lines = [line for line in self.audit_lines if line[0] < before]
        retired = [s.stream_id for s in self.streams.values() if s.retired_at is not None and s.retired_at < before]
        positions = [stream_id for stream_id in retired if stream_id in self.checkpoints]
        dead = [name for name, process in self.workers.items() if process.expires_at < before]
        events = 0
        for stream_id, log in self.events.items():
            kept = [event for event in log if event.recorded_at >= before or event is log[-1]]
            events += len(log) - len(kept)
            self.events[stream_id] = kept
        for name, token in grants:
            del self.grants[name][token]
        self.audit_lines = [line for line in self.audit_lines if line not in lines]
        for stream_id in positions:
            del self.checkpoints[stream_id]
        for name in dead:
            del self.workers[name]
        return Pruned(len(grants), events, len(lines), len(positions), len(dead))

    # --- what only looks ---------------------------------------------------------------------------------------

    def get(self, stream_id: str) -> LeaseInfo | None:
        s = self.streams.get(stream_id)
        return None if s is None else self.info(s)

    def info(self, s: Stream) -> LeaseInfo:
        return LeaseInfo(
            s.stream_id, s.owner, s.expires_at, s.token, s.pool, s.acquired_at, s.claim_id, s.available_at,
            s.failures, s.last_error, s.paused_at, s.paused_by, s.pause_reason, s.registered_at, s.retired_at,
            self.live(s), self.now,
        )  # fmt: skip

    def list_leases(self, *, owner: str | None, pool: str | None) -> list[LeaseInfo]:
        chosen = [self.streams[stream_id] for stream_id in sorted(self.streams)]
        return [self.info(s) for s in chosen if owner in (None, s.owner) and pool in (None, s.pool)]

    def history(self, stream_id: str) -> list[Grant]:
        """The latest first."""
        stream = self.streams.get(stream_id)
        return [
            Grant(
                stream_id, token, g.owner, g.granted_at, g.ended_at,
                None if g.end_reason is None else EndReason(g.end_reason),
                stream.expires_at if stream is not None and g.ended_at is None and stream.token == token else None,
            )
            for token, g in sorted(self.grants.get(stream_id, {}).items(), reverse=True)
        ]  # fmt: skip

    def checkpoint(self, stream_id: str) -> Checkpoint | None:
        position = self.checkpoints.get(stream_id)
        if position is None:
            return None
        return Checkpoint(stream_id, position.checkpoint, position.token, position.updated_at)

    def read(self, stream_id: str, *, after_seq: int) -> list[RecordedEvent]:
        return [
            RecordedEvent(stream_id, event.event_id, event.seq, event.token, event.recorded_at, event.payload)
            for event in self.events.get(stream_id, [])
            if event.seq > after_seq
        ]

    def fleet(self) -> list[WorkerInfo]:
        return [
            WorkerInfo(
                name, p.worker.host, p.worker.pid, p.worker.version, p.started_at, p.expires_at, "active",
                p.worker.pool, p.worker.capacity, p.worker.weight, p.lease_count, p.beaten_at, None, self.now,
            )
            for name, p in sorted(self.workers.items())
        ]  # fmt: skip
