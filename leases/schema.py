"""The tables, as statements see them. The migrations make them, and a test proves that both agree.

The invariants that no CREATE TABLE can hold (a token never falls, a lease row is never deleted, every grant is
recorded) are triggers, and stand in the migration only: see `alembic/versions/`.

Why the columns are where they are:

- `leases` has **no index on `expires_at`** and spare room in its pages, so that a heartbeat is a heap-only update.
- The unique index over `(stream_id, fencing_token)` looks redundant beside the primary key. It is what makes a
  grant take `FOR UPDATE` (it changes a column of a unique index) while a heartbeat takes `FOR NO KEY UPDATE`:
  so a grant waits for fenced writes in flight, which hold `FOR KEY SHARE`, and a heartbeat does not.
- Checkpoints are not in `leases`: a write to that row at every append would make the heartbeats skip it.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    REAL,
    BigInteger,
    CheckConstraint,
    Column,
    Double,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.types import TypeEngine

from leases.types import Document, Identity, Name, Timestamp

VERSION: Final = "0002"
"""The revision of the migrations that this code is written for."""

VERSION_TABLE: Final = "leases_alembic_version"
"""Alembic's own table, named so that a user's migrations in the same database keep theirs."""

metadata = MetaData()

Whole = BigInteger().with_variant(Integer, "sqlite")
Real: TypeEngine[float] = Double().with_variant(REAL, "sqlite")

leases = Table(
    "leases",
    metadata,
    Column("stream_id", Name, nullable=False),
    Column("owner", Name),
    Column("expires_at", Timestamp),
    Column("fencing_token", Whole, nullable=False, server_default=text("0")),
    Column("pool", Name, nullable=False, server_default=text("'default'")),
    Column("acquired_at", Timestamp),
    Column("claim_id", Identity),
    Column("available_at", Timestamp, nullable=False),
    Column("failures", Integer, nullable=False, server_default=text("0")),
    Column("last_error", Text),
    Column("paused_at", Timestamp),
    Column("paused_by", Text),
    Column("pause_reason", Text),
    Column("registered_at", Timestamp, nullable=False),
    Column("retired_at", Timestamp),
    PrimaryKeyConstraint("stream_id", name="leases_pkey"),
    UniqueConstraint("stream_id", "fencing_token", name="leases_fence"),
    CheckConstraint("length(stream_id) BETWEEN 1 AND 255", name="leases_stream_id_length"),
    CheckConstraint("(owner IS NULL) = (expires_at IS NULL)", name="leases_owner_has_expiry"),
    CheckConstraint("fencing_token >= 0", name="leases_token_not_negative"),
    Index(
        "leases_free",
        "pool",
        "available_at",
        "stream_id",
        postgresql_where=text("owner IS NULL AND paused_at IS NULL AND retired_at IS NULL"),
        sqlite_where=text("owner IS NULL AND paused_at IS NULL AND retired_at IS NULL"),
    ),
    Index(
        "leases_owned",
        "owner",
        "pool",
        postgresql_where=text("owner IS NOT NULL"),
        sqlite_where=text("owner IS NOT NULL"),
    ),
    postgresql_with={"fillfactor": 50},
    sqlite_strict=True,
)
"""One row a stream, for ever. Only grants, releases, operators and heartbeats update it."""

lease_checkpoints = Table(
    "lease_checkpoints",
    metadata,
    Column("stream_id", Name, nullable=False),
    Column("fencing_token", Whole, nullable=False),
    Column("checkpoint", Document, nullable=False),
    Column("updated_at", Timestamp, nullable=False),
    PrimaryKeyConstraint("stream_id", name="lease_checkpoints_pkey"),
    postgresql_with={"fillfactor": 70},
    sqlite_strict=True,
)
"""The worker's position in each stream, kept across owners."""

lease_grants = Table(
    "lease_grants",
    metadata,
    Column("stream_id", Name, nullable=False),
    Column("fencing_token", Whole, nullable=False),
    Column("owner", Name, nullable=False),
    Column("granted_at", Timestamp, nullable=False),
    Column("ended_at", Timestamp),
    Column("end_reason", Text),
    PrimaryKeyConstraint("stream_id", "fencing_token", name="lease_grants_pkey"),
    CheckConstraint("(ended_at IS NULL) = (end_reason IS NULL)", name="lease_grants_end_has_reason"),
    CheckConstraint("end_reason IN ('released', 'expired', 'stolen', 'revoked')", name="lease_grants_end_reason"),
    postgresql_with={"fillfactor": 80},
    sqlite_strict=True,
)
"""One row a grant, written by a trigger: the audit trail, and a second guard against a token granted twice."""

lease_workers = Table(
    "lease_workers",
    metadata,
    Column("worker_id", Name, nullable=False),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("version", Text, nullable=False),
    Column("started_at", Timestamp, nullable=False),
    Column("expires_at", Timestamp, nullable=False),
    Column("state", Text, nullable=False, server_default=text("'active'")),
    Column("pool", Name),
    Column("capacity", Integer),
    Column("weight", Real, nullable=False, server_default=text("1.0")),
    Column("lease_count", Integer, nullable=False, server_default=text("0")),
    Column("beaten_at", Timestamp),
    Column("incarnation", Identity),
    PrimaryKeyConstraint("worker_id", name="lease_workers_pkey"),
    CheckConstraint("state IN ('active', 'draining')", name="lease_workers_state"),
    postgresql_with={"fillfactor": 50},
    sqlite_strict=True,
)
"""The processes that keep leases. `pool` is null for those that do not compete for streams."""

lease_events = Table(
    "lease_events",
    metadata,
    Column("stream_id", Name, nullable=False),
    Column("event_id", Name, nullable=False),
    Column("seq", Whole, nullable=False),
    Column("fencing_token", Whole, nullable=False),
    Column("recorded_at", Timestamp, nullable=False),
    Column("payload", Document, nullable=False),
    PrimaryKeyConstraint("stream_id", "event_id", name="lease_events_pkey"),
    UniqueConstraint("stream_id", "seq", name="lease_events_seq"),
    sqlite_strict=True,
)
"""The built-in event log."""

lease_audit = Table(
    "lease_audit",
    metadata,
    Column("audit_id", Whole, nullable=False),
    Column("at", Timestamp, nullable=False),
    Column("actor", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("stream_id", Name),
    Column("token_before", Whole),
    Column("token_after", Whole),
    Column("reason", Text),
    PrimaryKeyConstraint("audit_id", name="lease_audit_pkey"),
    Index("lease_audit_stream", "stream_id"),
    sqlite_strict=True,
)
"""What operators did."""
