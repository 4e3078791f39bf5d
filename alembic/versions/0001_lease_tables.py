"""The lease table, its triggers, and what stands beside it.

A migration is frozen: it does not import the tables of `leases.schema`, which move on. `tests/test_migrations.py`
proves that the two agree.

The triggers hold what must never break, whoever writes: this library, psql, another language, a later version.

| trigger | refuses | records |
| --- | --- | --- |
| leases_guard_insert | a stream that is born owned; SQLite's INSERT OR REPLACE | |
| leases_guard_update | a changed stream_id, a falling token, a new owner without a new token | |
| leases_guard_delete, _truncate | that a row, and with it a token, is forgotten | |
| leases_record | | every grant, its end and the reason, in lease_grants |

None of them fires on a heartbeat: they are on UPDATE OF stream_id, owner, fencing_token.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    on_postgresql = op.get_bind().dialect.name == "postgresql"
    key = sa.Text(collation="C") if on_postgresql else sa.Text()
    instant = postgresql.TIMESTAMP(timezone=True) if on_postgresql else sa.Text()
    document = postgresql.JSONB() if on_postgresql else sa.Text()
    identity = sa.Uuid() if on_postgresql else sa.Text()
    whole = sa.BigInteger() if on_postgresql else sa.Integer()
    real: sa.types.TypeEngine[float] = sa.Double() if on_postgresql else sa.REAL()

    def table(name: str, *parts: sa.schema.SchemaItem, fillfactor: int | None = None) -> None:
        spare = {"fillfactor": fillfactor} if fillfactor else {}
        op.create_table(name, *parts, sqlite_strict=True, postgresql_with=spare)

    table(
        "leases",
        sa.Column("stream_id", key, nullable=False),
        sa.Column("owner", key),
        sa.Column("expires_at", instant),
        sa.Column("fencing_token", whole, nullable=False, server_default=sa.text("0")),
        sa.Column("pool", key, nullable=False, server_default=sa.text("'default'")),
        sa.Column("acquired_at", instant),
        sa.Column("claim_id", identity),
        sa.Column("available_at", instant, nullable=False),
        sa.Column("failures", sa.Integer(), nullable=False, server_default=sa.text("0")),
        sa.Column("last_error", sa.Text()),
        sa.Column("paused_at", instant),
        sa.Column("paused_by", sa.Text()),
        sa.Column("pause_reason", sa.Text()),
        sa.Column("registered_at", instant, nullable=False),
        sa.Column("retired_at", instant),
        sa.PrimaryKeyConstraint("stream_id", name="leases_pkey"),
        # Not redundant: it makes a grant take FOR UPDATE, which waits for fenced writes (FOR KEY SHARE).
        sa.UniqueConstraint("stream_id", "fencing_token", name="leases_fence"),
        sa.CheckConstraint("length(stream_id) BETWEEN 1 AND 255", name="leases_stream_id_length"),
        sa.CheckConstraint("(owner IS NULL) = (expires_at IS NULL)", name="leases_owner_has_expiry"),
        sa.CheckConstraint("fencing_token >= 0", name="leases_token_not_negative"),
        # Room in each page for the next version of a row, so that a heartbeat touches no index.
        fillfactor=50,
    )
    free = sa.text("owner IS NULL AND paused_at IS NULL AND retired_at IS NULL")
    op.create_index(
        "leases_free",
        "leases",
        ["pool", "available_at", "stream_id"],
        postgresql_where=free,
        sqlite_where=free,
    )
    owned = sa.text("owner IS NOT NULL")
    op.create_index("leases_owned", "leases", ["owner", "pool"], postgresql_where=owned, sqlite_where=owned)

    table(
        "lease_checkpoints",
        sa.Column("stream_id", key, nullable=False),
        sa.Column("fencing_token", whole, nullable=False),
        sa.Column("checkpoint", document, nullable=False),
        sa.Column("updated_at", instant, nullable=False),
        sa.PrimaryKeyConstraint("stream_id", name="lease_checkpoints_pkey"),
        fillfactor=70,
    )
    table(
        "lease_grants",
        sa.Column("stream_id", key, nullable=False),
        sa.Column("fencing_token", whole, nullable=False),
        sa.Column("owner", key, nullable=False),
        sa.Column("granted_at", instant, nullable=False),
        sa.Column("ended_at", instant),
        sa.Column("end_reason", sa.Text()),
        sa.PrimaryKeyConstraint("stream_id", "fencing_token", name="lease_grants_pkey"),
        sa.CheckConstraint("(ended_at IS NULL) = (end_reason IS NULL)", name="lease_grants_end_has_reason"),
        sa.CheckConstraint(
            "end_reason IN ('released', 'expired', 'stolen', 'revoked')", name="lease_grants_end_reason"
        ),
        fillfactor=80,
    )
    table(
        "lease_workers",
        sa.Column("worker_id", key, nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column("started_at", instant, nullable=False),
        sa.Column("expires_at", instant, nullable=False),
        sa.Column("state", sa.Text(), nullable=False, server_default=sa.text("'active'")),
        sa.Column("pool", key),
        sa.Column("capacity", sa.Integer()),
        sa.Column("weight", real, nullable=False, server_default=sa.text("1.0")),
        sa.Column("lease_count", sa.Integer(), nullable=False, server_default=sa.text("0")),
        sa.PrimaryKeyConstraint("worker_id", name="lease_workers_pkey"),
        sa.CheckConstraint("state IN ('active', 'draining')", name="lease_workers_state"),
        fillfactor=50,
    )
    table(
        "lease_events",
        sa.Column("stream_id", key, nullable=False),
        sa.Column("event_id", key, nullable=False),
        sa.Column("seq", whole, nullable=False),
        sa.Column("fencing_token", whole, nullable=False),
        sa.Column("recorded_at", instant, nullable=False),
        sa.Column("payload", document, nullable=False),
        sa.PrimaryKeyConstraint("stream_id", "event_id", name="lease_events_pkey"),
        sa.UniqueConstraint("stream_id", "seq", name="lease_events_seq"),
    )
    table(
        "lease_audit",
        sa.Column("audit_id", whole, nullable=False),
        sa.Column("at", instant, nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("stream_id", key),
        sa.Column("token_before", whole),
        sa.Column("token_after", whole),
        sa.Column("reason", sa.Text()),
        sa.PrimaryKeyConstraint("audit_id", name="lease_audit_pkey"),
    )
    op.create_index("lease_audit_stream", "lease_audit", ["stream_id"])

    if on_postgresql:
        schema = op.get_bind().scalar(sa.text("SELECT quote_ident(current_schema())"))
        schema = schema.replace(":", "\\:")  # else alembic would take it for a parameter
        for statement in TRIGGERS_POSTGRESQL:
            op.execute(statement.replace("SCHEMA.", f"{schema}."))
    else:
        for statement in TRIGGERS_SQLITE:
            op.execute(statement)


def downgrade() -> None:
    for name in (
        "lease_audit",
        "lease_events",
        "lease_workers",
        "lease_grants",
        "lease_checkpoints",
        "leases",
    ):
        op.drop_table(name)
    if op.get_bind().dialect.name == "postgresql":
        for name in ("leases_guard", "leases_record"):
            op.execute(f"DROP FUNCTION {name}()")


TRIGGERS_POSTGRESQL = (
    # The tables are named with their schema: a writer's search_path must not lead the record astray. The clock is
    # not, so that a test can put one of its own before it.
    """
    CREATE FUNCTION SCHEMA.leases_guard() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF TG_OP IN ('DELETE', 'TRUNCATE') THEN
            RAISE EXCEPTION 'leases: a lease row keeps its stream''s token and is never deleted; retire it';
        ELSIF TG_OP = 'INSERT' THEN
            IF NEW.owner IS NOT NULL THEN
                RAISE EXCEPTION 'leases: a stream is born free; insert it without an owner, then grant it';
            END IF;
        ELSIF NEW.stream_id <> OLD.stream_id THEN
            RAISE EXCEPTION 'leases: a stream_id never changes (was %)', OLD.stream_id;
        ELSIF NEW.fencing_token < OLD.fencing_token THEN
            RAISE EXCEPTION 'leases: a fencing token never falls (% from % to %)',
                OLD.stream_id, OLD.fencing_token, NEW.fencing_token;
        ELSIF NEW.owner IS NOT NULL AND NEW.owner IS DISTINCT FROM OLD.owner
              AND NEW.fencing_token = OLD.fencing_token THEN
            RAISE EXCEPTION 'leases: a new owner needs a new fencing token (%)', OLD.stream_id;
        END IF;
        RETURN NEW;
    END $$
    """,
    """
    CREATE FUNCTION SCHEMA.leases_record() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF current_setting('synchronous_commit') = 'off' THEN
            -- A crash must not forget a token that somebody was told.
            PERFORM set_config('synchronous_commit', 'on', true);
        END IF;
        IF OLD.owner IS NOT NULL
           AND (NEW.owner IS DISTINCT FROM OLD.owner OR NEW.fencing_token <> OLD.fencing_token) THEN
            UPDATE SCHEMA.lease_grants SET
                ended_at = least(statement_timestamp(), OLD.expires_at),
                end_reason = CASE
                    WHEN NEW.owner IS NULL AND NEW.fencing_token > OLD.fencing_token THEN 'revoked'
                    WHEN OLD.expires_at <= statement_timestamp() THEN 'expired'
                    WHEN NEW.owner IS NULL THEN 'released'
                    ELSE 'stolen'
                END
            WHERE stream_id = OLD.stream_id AND fencing_token = OLD.fencing_token AND ended_at IS NULL;
        END IF;
        IF NEW.owner IS NOT NULL AND NEW.fencing_token > OLD.fencing_token THEN
            INSERT INTO SCHEMA.lease_grants (stream_id, fencing_token, owner, granted_at)
            VALUES (NEW.stream_id, NEW.fencing_token, NEW.owner, statement_timestamp());
        END IF;
        RETURN NULL;
    END $$
    """,
    """
    CREATE TRIGGER leases_guard_row BEFORE INSERT OR DELETE OR UPDATE OF stream_id, owner, fencing_token
    ON SCHEMA.leases FOR EACH ROW EXECUTE FUNCTION SCHEMA.leases_guard()
    """,
    """
    CREATE TRIGGER leases_guard_truncate BEFORE TRUNCATE
    ON SCHEMA.leases FOR EACH STATEMENT EXECUTE FUNCTION SCHEMA.leases_guard()
    """,
    """
    CREATE TRIGGER leases_record AFTER UPDATE OF owner, fencing_token
    ON SCHEMA.leases FOR EACH ROW EXECUTE FUNCTION SCHEMA.leases_record()
    """,
)

NOW = "strftime('%Y-%m-%d %H:%M:%f', 'now')"

TRIGGERS_SQLITE = (
    """
    CREATE TRIGGER leases_guard_insert BEFORE INSERT ON leases
    BEGIN
        SELECT RAISE(ABORT, 'leases: a stream is born free; insert it without an owner, then grant it')
        WHERE NEW.owner IS NOT NULL;
        SELECT RAISE(ABORT, 'leases: the stream is there already, and its token is never forgotten')
        WHERE EXISTS (SELECT 1 FROM leases WHERE stream_id = NEW.stream_id);
    END
    """,
    """
    CREATE TRIGGER leases_guard_update BEFORE UPDATE OF stream_id, owner, fencing_token ON leases
    BEGIN
        SELECT RAISE(ABORT, 'leases: a stream_id never changes')
        WHERE NEW.stream_id <> OLD.stream_id;
        SELECT RAISE(ABORT, 'leases: a fencing token never falls')
        WHERE NEW.fencing_token < OLD.fencing_token;
        SELECT RAISE(ABORT, 'leases: a new owner needs a new fencing token')
        WHERE NEW.owner IS NOT NULL AND NEW.owner IS NOT OLD.owner AND NEW.fencing_token = OLD.fencing_token;
    END
    """,
    """
    CREATE TRIGGER leases_guard_delete BEFORE DELETE ON leases
    BEGIN
        SELECT RAISE(ABORT, 'leases: a lease row keeps its stream''s token and is never deleted; retire it');
    END
    """,
    f"""
    CREATE TRIGGER leases_record AFTER UPDATE OF owner, fencing_token ON leases
    BEGIN
        UPDATE lease_grants SET
            ended_at = min({NOW}, OLD.expires_at),
            end_reason = CASE
                WHEN NEW.owner IS NULL AND NEW.fencing_token > OLD.fencing_token THEN 'revoked'
                WHEN OLD.expires_at <= {NOW} THEN 'expired'
                WHEN NEW.owner IS NULL THEN 'released'
                ELSE 'stolen'
            END
        WHERE OLD.owner IS NOT NULL
          AND (NEW.owner IS NOT OLD.owner OR NEW.fencing_token <> OLD.fencing_token)
          AND stream_id = OLD.stream_id AND fencing_token = OLD.fencing_token AND ended_at IS NULL;
        INSERT INTO lease_grants (stream_id, fencing_token, owner, granted_at)
        SELECT NEW.stream_id, NEW.fencing_token, NEW.owner, {NOW}
        WHERE NEW.owner IS NOT NULL AND NEW.fencing_token > OLD.fencing_token;
    END
    """,
)
