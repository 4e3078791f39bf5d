"""The promises, held against the tables and against what every member of a virtual fleet believes, after each round."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from tests.fleet.world import POLL_S, ROUND_S, Member, World

PATIENCE_S = 3 * POLL_S + ROUND_S
"""How long a stream that anybody could have may be left alone: it is kept for whoever is to have it for one and a half
polls, then the next poll takes it."""


@dataclass
class Check:
    """Looks after each round; remembers what it has seen."""

    world: World
    tokens: dict[str, int] = field(default_factory=dict)
    expired: dict[str, int] = field(default_factory=dict)
    """The token under which a stream's lease was seen expired."""
    revoked: set[tuple[str, int]] = field(default_factory=set)
    """Grants that an operator has ended before their time: their owners may not know it yet."""
    grants: int = 0
    quiet_since_s: float = 0.0

    def __call__(self) -> None:
        now = self.world.time.text(0.0)
        rows = {
            row[0]: row[1:]
            for row in self.world.raw.execute(
                "SELECT stream_id, owner, fencing_token, expires_at, paused_at, available_at FROM leases"
            )
        }
        able = any(self._able(member) for member in self.world.members.values())
        long_ago = self.world.time.text(-PATIENCE_S) if able else ""
        for stream_id, row in rows.items():
            self._stream(stream_id, row, now, long_ago)
        self._believers(rows, now)

    def _stream(self, stream_id: str, row: Any, now: str, long_ago: str) -> None:
        """A token never falls, an expired lease stays so; what anybody could have is owned again soon."""
        owner, token, expires_at, paused_at, available_at = row
        before = self.tokens.get(stream_id, 0)
        assert token >= before, f"the token of {stream_id} fell from {before} to {token}"
        self.tokens[stream_id] = token
        if owner is None:
            late = available_at <= long_ago and paused_at is None
            assert not late, f"{stream_id} is free since {available_at}, and nobody takes it"
        elif expires_at <= now:
            self.expired[stream_id] = token
            late = expires_at <= long_ago and paused_at is None and owner not in self.world.members
            assert not late, f"{stream_id} is left by {owner} since {expires_at}, and nobody takes it"
        else:
            assert self.expired.get(stream_id) != token, f"an expired lease of {stream_id} has come back to life"

    def _believers(self, rows: dict[str, Any], now: str) -> None:
        """Whoever trusts a lease has it; and so no two do."""
        for member in self.world.members.values():
            if self.world.time.now_s < member.frozen_until_s:
                continue  # it stands still, and believes nothing until it looks
            for session in member.registry.sessions.values():
                stream_id, token = session.lease.stream_id, session.lease.fencing_token
                row = rows[stream_id]
                if (row[0], row[1]) == (member.name, token) and row[2] > now:
                    continue
                if (stream_id, token) not in self.revoked and session.remaining() > timedelta(0):
                    raise AssertionError(f"{member.name} trusts {stream_id} under token {token}: it is {row}")

    def _able(self, member: Member) -> bool:
        awake_for_s = self.world.time.now_s - member.frozen_until_s
        return awake_for_s > PATIENCE_S and not member.planner.draining

    # --- when nothing has happened for a while -----------------------------------------------------------------------

    def count_grants(self) -> int:
        """How many grants there have been since the last call."""
        (count,) = self.world.raw.execute("SELECT count(*) FROM lease_grants").fetchone()
        new, self.grants = count - self.grants, count
        return int(new)

    def balanced(self) -> None:
        """All members that are active hold as many streams, but for one."""
        counts = [
            self.world.raw.execute(
                "SELECT count(*) FROM leases WHERE owner = ? AND expires_at > ?", (name, self.world.time.text(0.0))
            ).fetchone()[0]
            for name, member in self.world.members.items()
            if not member.planner.draining
        ]
        assert max(counts) - min(counts) <= 1, f"unbalanced: {sorted(counts)}"

    def whole(self) -> None:
        """At the end: the grants and the events of every stream are without gap, overlap and disorder."""
        raw = self.world.raw
        overlapping = raw.execute(
            """
            SELECT count(*) FROM lease_grants a JOIN lease_grants b
            ON b.stream_id = a.stream_id AND b.fencing_token > a.fencing_token
            WHERE a.ended_at IS NULL OR a.ended_at > b.granted_at
            """
        ).fetchone()[0]
        assert overlapping == 0, "two grants of one stream were live at once"
        per_stream = raw.execute(
            """
            SELECT e.stream_id, count(*), count(DISTINCT seq), max(seq), checkpoint
            FROM lease_events e JOIN lease_checkpoints c USING (stream_id) GROUP BY e.stream_id
            """
        ).fetchall()
        for stream_id, events, numbers, last, checkpoint in per_stream:
            assert events == numbers == last == int(checkpoint), f"{stream_id}: an event is lost, or there twice"
        assert sum(row[1] for row in per_stream) == self.world.happened["write"]
        backwards = raw.execute(
            """
            SELECT count(*) FROM lease_events a JOIN lease_events b
            ON b.stream_id = a.stream_id AND b.seq = a.seq + 1 WHERE b.fencing_token < a.fencing_token
            """
        ).fetchone()[0]
        assert backwards == 0, "an event was written under an older token than the one before it"
