"""The product's rows, read past the product, in the form of the model's; and the model's, beside them."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any
from uuid import UUID

from tests.model.model import Granted, Model, Written

Row = tuple[Any, ...]
Rows = dict[str, list[Row]]
"""The rows of each table, in the order of its key."""


@lru_cache(maxsize=4096)
def _instant(value: Any) -> datetime | None:
    return None if value is None else datetime.fromisoformat(value).replace(tzinfo=UTC)


def _identity(value: Any) -> UUID | None:
    return None if value is None else UUID(value)


INSTANTS = {
    "expires_at", "acquired_at", "available_at", "paused_at", "registered_at", "retired_at",
    "granted_at", "ended_at", "updated_at", "recorded_at", "started_at", "at",
}  # fmt: skip
DOCUMENTS = {"checkpoint", "payload"}

COLUMNS = {
    "leases": "stream_id fencing_token owner expires_at pool acquired_at claim_id available_at failures last_error "
    "paused_at paused_by pause_reason registered_at retired_at",
    "lease_grants": "stream_id fencing_token owner granted_at ended_at end_reason",
    "lease_checkpoints": "stream_id fencing_token checkpoint updated_at",
    "lease_events": "stream_id seq event_id fencing_token recorded_at payload",
    "lease_workers": "worker_id host pid version started_at expires_at state pool capacity weight lease_count",
    "lease_audit": "at actor action stream_id token_before token_after reason",
}

KEYS = {
    "leases": "stream_id",
    "lease_grants": "stream_id, fencing_token",
    "lease_checkpoints": "stream_id",
    "lease_events": "stream_id, seq",
    "lease_workers": "worker_id",
    "lease_audit": "audit_id",
}

OF_STREAMS = ("leases", "lease_grants", "lease_checkpoints", "lease_events")

RECENT = {"lease_grants": 3, "lease_events": 6}
"""How many of a stream's last rows a look at one stream takes."""


def _conversion(column: str) -> Callable[[Any], Any] | None:
    if column in INSTANTS:
        return _instant
    if column in DOCUMENTS:
        return json.loads
    return _identity if column == "claim_id" else None


CONVERSIONS = {table: [_conversion(column) for column in names.split()] for table, names in COLUMNS.items()}


@lru_cache(maxsize=16_384)
def _converted(table: str, row: Row) -> Row:
    """A row of SQLite's as the model has it. Remembered: most rows are as they were when they were last looked at."""
    pairs = zip(CONVERSIONS[table], row, strict=True)
    return tuple(value if convert is None else convert(value) for convert, value in pairs)


class Tables:
    """Reads the tables by a driver's connection that is in autocommit mode, or has no transaction open."""

    def __init__(self, pooled: Any) -> None:
        self.driver = pooled.driver_connection
        self.close = pooled.close
        self._on_sqlite = isinstance(self.driver, sqlite3.Connection)
        mark = "?" if self._on_sqlite else "%s"
        self._all, self._one = {}, {}
        for table, names in COLUMNS.items():
            head = f"SELECT {', '.join(names.split())} FROM {table}"
            self._all[table] = f"{head} ORDER BY {KEYS[table]}"
            if table in OF_STREAMS:
                last = KEYS[table].split(", ")[-1]
                limit = f" ORDER BY {last} DESC LIMIT {RECENT[table]}" if table in RECENT else ""
                self._one[table] = f"{head} WHERE stream_id = {mark}{limit}"

    def _read(self, table: str, query: str, values: tuple[str, ...] = ()) -> list[Row]:
        rows: list[Row] = self.driver.execute(query, values).fetchall()
        return [_converted(table, row) for row in rows] if self._on_sqlite else rows

    def everything(self) -> Rows:
        rows = {table: self._read(table, query) for table, query in self._all.items()}
        # One call that retires several streams writes their lines in any order.
        rows["lease_audit"].sort(key=repr)
        return rows

    def of(self, stream_id: str) -> Rows:
        """The rows of one stream: the last few of its grants and events, the latest first."""
        return {table: self._read(table, query, (stream_id,)) for table, query in self._one.items()}

    def lease(self, stream_id: str) -> Row | None:
        """One row of `leases`: stream_id, token, owner, expires_at, …"""
        rows = self._read("leases", self._one["leases"], (stream_id,))
        return rows[0] if rows else None


# --- the model's -----------------------------------------------------------------------------------------------


def everything(model: Model) -> Rows:
    """What should be in the tables."""
    names = sorted(model.streams)
    return {
        "leases": [_lease(model, name) for name in names],
        "lease_grants": [
            _grant(name, token, grant)
            for name, granted in sorted(model.grants.items())
            for token, grant in granted.items()
        ],
        "lease_checkpoints": [row for name in sorted(model.checkpoints) for row in _checkpoint(model, name)],
        "lease_events": [row for name in sorted(model.events) for row in _events(name, model.events[name])],
        "lease_workers": [
            (name, p.worker.host, p.worker.pid, p.worker.version, p.started_at, p.expires_at, "active",
             p.worker.pool, p.worker.capacity, p.worker.weight, p.lease_count)
            for name, p in sorted(model.workers.items())
        ],
        "lease_audit": sorted(model.audit_lines, key=repr),
    }  # fmt: skip


def of(model: Model, stream_id: str) -> Rows:
    """What should be in the tables of one stream, as far as `Tables.of` reads it."""
    if stream_id not in model.streams:
        return {table: [] for table in OF_STREAMS}
    granted = list(model.grants.get(stream_id, {}).items())[-RECENT["lease_grants"] :]
    last = model.events.get(stream_id, [])[-RECENT["lease_events"] :]
    return {
        "leases": [_lease(model, stream_id)],
        "lease_grants": [_grant(stream_id, token, grant) for token, grant in reversed(granted)],
        "lease_checkpoints": _checkpoint(model, stream_id),
        "lease_events": list(_events(stream_id, last))[::-1],
    }


def _lease(model: Model, name: str) -> Row:
    s = model.streams[name]
    return (
        name, s.token, s.owner, s.expires_at, s.pool, s.acquired_at, s.claim_id, s.available_at, s.failures,
        s.last_error, s.paused_at, s.paused_by, s.pause_reason, s.registered_at, s.retired_at,
    )  # fmt: skip


def _grant(name: str, token: int, grant: Granted) -> Row:
    return (name, token, grant.owner, grant.granted_at, grant.ended_at, grant.end_reason)


def _checkpoint(model: Model, name: str) -> list[Row]:
    position = model.checkpoints.get(name)
    return [] if position is None else [(name, position.token, position.checkpoint, position.updated_at)]


def _events(name: str, log: Iterable[Written]) -> Iterable[Row]:
    return ((name, event.seq, event.event_id, event.token, event.recorded_at, event.payload) for event in log)


def differences(found: Rows, expected: Rows) -> str:
    """Say what differs; nothing if nothing does."""
    lines = []
    for table in found:
        for row in found[table]:
            if row not in expected[table]:
                lines.append(f"{table}: the product has {_shown(table, row)}")
        for row in expected[table]:
            if row not in found[table]:
                lines.append(f"{table}: the model has   {_shown(table, row)}")
        if not lines and found[table] != expected[table]:
            lines.append(f"{table}: the same rows in another order, or twice")
    return "\n".join(lines)


def _shown(table: str, row: Row) -> str:
    named = zip(COLUMNS[table].split(), row, strict=True)
    return ", ".join(f"{name}={_value(value)}" for name, value in named if value is not None)


def _value(value: Any) -> str:
    return value.strftime("%d %H:%M:%S.%f")[:-3] if isinstance(value, datetime) else repr(value)
