"""Handlers for workers that are processes of their own."""

from __future__ import annotations

from datetime import timedelta

from leases import StreamSession


def idle(session: StreamSession) -> timedelta:
    """Hold the stream."""
    return timedelta(minutes=10)


def count_up(session: StreamSession) -> timedelta:
    """Write the stream's next number."""
    at = session.checkpoint or 0
    session.append({f"e{at}": at}, checkpoint=at + 1)
    return timedelta(seconds=0.1)
