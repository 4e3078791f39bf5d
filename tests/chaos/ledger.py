"""The harness's own table beside the product's: triggers write down each grant, each end of one, and each event.

A row is written by the transaction that it tells of. So on PostgreSQL its `xmin` is that transaction's id, and the WAL
says when it was committed; on SQLite, where one transaction writes at a time, the row's number is the order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, select, text

from leases.schema import lease_audit, lease_checkpoints, lease_events, leases

CHANGE, EVENT, CUT, REVIVED = "change", "event", "cut", "revived"


@dataclass(frozen=True, slots=True)
class Entry:
    """One row, in commit order. A `change` is of a stream's owner or token; `was_live` says what the row was before.

    `cut` says that somebody shortened a lease; `revived` that an expired one became live again, which must never be.
    """

    kind: str
    stream_id: str
    old_token: int | None
    token: int
    old_owner: str | None
    owner: str | None
    claim_id: str | None
    was_live: bool
    old_expires_s: float | None
    event_id: str | None
    seq: int | None
    ask: str | None

    @property
    def granted(self) -> bool:
        return self.kind == CHANGE and self.owner is not None

    @property
    def by_operator(self) -> bool:
        return self.claim_id is not None and UUID(self.claim_id).version == 5


@dataclass(frozen=True)
class History:
    """A run as the database tells it: the ledger in commit order, and what the product's tables hold at the end."""

    entries: Sequence[Entry]
    events: Sequence[tuple[str, str, int, int]]
    checkpoints: Mapping[str, Any]
    tokens: Mapping[str, tuple[int, str | None]]
    audit: Sequence[tuple[str, str, int, int]]


COLUMNS = "kind, stream_id, old_token, token, old_owner, owner, claim_id, was_live, old_expires_s, event_id, seq, ask"

OTHER = "OLD.owner IS DISTINCT FROM NEW.owner OR OLD.fencing_token <> NEW.fencing_token"
SAME = "OLD.owner = NEW.owner AND OLD.fencing_token = NEW.fencing_token"

POSTGRESQL = f"""
CREATE TABLE chaos_ledger (
    n bigint GENERATED ALWAYS AS IDENTITY, kind text, stream_id text, old_token bigint, token bigint, old_owner text,
    owner text, claim_id text, was_live boolean, old_expires_s float8, event_id text, seq bigint, ask text
);
CREATE FUNCTION chaos_lease() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO chaos_ledger ({COLUMNS}) VALUES (
        TG_ARGV[0], NEW.stream_id, OLD.fencing_token, NEW.fencing_token, OLD.owner, NEW.owner, NEW.claim_id::text,
        coalesce(OLD.expires_at > clock_timestamp(), false), extract(epoch FROM OLD.expires_at), NULL, NULL, NULL
    );
    RETURN NULL;
END $$;
CREATE FUNCTION chaos_event() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO chaos_ledger ({COLUMNS}) VALUES (
        'event', NEW.stream_id, NULL, NEW.fencing_token, NULL, NULL, NULL, false, NULL, NEW.event_id, NEW.seq,
        NEW.payload ->> 'ask'
    );
    RETURN NULL;
END $$;
CREATE TRIGGER chaos_change AFTER UPDATE OF owner, fencing_token ON leases FOR EACH ROW
    WHEN ({OTHER}) EXECUTE FUNCTION chaos_lease('change');
CREATE TRIGGER chaos_cut AFTER UPDATE OF expires_at ON leases FOR EACH ROW
    WHEN ({SAME} AND NEW.expires_at < OLD.expires_at) EXECUTE FUNCTION chaos_lease('cut');
CREATE TRIGGER chaos_revived AFTER UPDATE OF expires_at ON leases FOR EACH ROW
    WHEN ({SAME} AND OLD.expires_at <= statement_timestamp() AND NEW.expires_at > statement_timestamp())
    EXECUTE FUNCTION chaos_lease('revived');
CREATE TRIGGER chaos_event AFTER INSERT ON lease_events FOR EACH ROW EXECUTE FUNCTION chaos_event();
"""

CLOCK = "strftime('%Y-%m-%d %H:%M:%f', 'now')"


def _lease_sqlite(kind: str, of: str, condition: str) -> str:
    return f"""
    CREATE TRIGGER chaos_{kind} AFTER UPDATE OF {of} ON leases WHEN {condition} BEGIN
        INSERT INTO chaos_ledger ({COLUMNS}) VALUES (
            '{kind}', NEW.stream_id, OLD.fencing_token, NEW.fencing_token, OLD.owner, NEW.owner, NEW.claim_id,
            coalesce(OLD.expires_at > {CLOCK}, 0), (julianday(OLD.expires_at) - 2440587.5) * 86400.0, NULL, NULL, NULL
        );
    END"""


SQLITE = (
    """
    CREATE TABLE chaos_ledger (
        n INTEGER PRIMARY KEY AUTOINCREMENT, kind, stream_id, old_token, token, old_owner, owner, claim_id, was_live,
        old_expires_s, event_id, seq, ask
    )""",
    _lease_sqlite(
        "change", "owner, fencing_token", "OLD.owner IS NOT NEW.owner OR OLD.fencing_token <> NEW.fencing_token"
    ),
    _lease_sqlite("cut", "expires_at", f"{SAME} AND NEW.expires_at < OLD.expires_at"),
    _lease_sqlite("revived", "expires_at", f"{SAME} AND OLD.expires_at <= {CLOCK} AND NEW.expires_at > {CLOCK}"),
    f"""
    CREATE TRIGGER chaos_event AFTER INSERT ON lease_events BEGIN
        INSERT INTO chaos_ledger ({COLUMNS}) VALUES (
            'event', NEW.stream_id, NULL, NEW.fencing_token, NULL, NULL, NULL, 0, NULL, NEW.event_id, NEW.seq,
            json_extract(NEW.payload, '$.ask')
        );
    END""",
)


def install(connection: Connection) -> None:
    """Make the table and its triggers, in a migrated database."""
    if connection.dialect.name == "postgresql":
        driver: Any = connection.connection.driver_connection
        driver.execute(POSTGRESQL)
    else:
        for statement in SQLITE:
            connection.exec_driver_sql(statement)


def read(connection: Connection, places: Mapping[int, int] | None) -> History:
    """The whole history; `places` is the order of PostgreSQL's commits by transaction id."""
    columns = COLUMNS
    if places is None:
        rows = [tuple(row) for row in connection.execute(text(f"SELECT {columns} FROM chaos_ledger ORDER BY n"))]
    else:
        found = connection.execute(text(f"SELECT xmin::text, n, {columns} FROM chaos_ledger")).all()
        lost = sorted({int(row.xmin) for row in found} - places.keys())
        if lost:
            raise RuntimeError(f"rows of transactions that the WAL has no COMMIT of: {lost}")
        ordered = sorted(((places[int(xmin)], n, *rest) for xmin, n, *rest in found), key=lambda row: row[:2])
        rows = [tuple(row[2:]) for row in ordered]
    event = lease_events.c
    audit = lease_audit.c
    return History(
        entries=[Entry(*row) for row in rows],
        events=[
            tuple(row)
            for row in connection.execute(select(event.stream_id, event.event_id, event.seq, event.fencing_token))
        ],
        checkpoints={
            row.stream_id: row.checkpoint
            for row in connection.execute(select(lease_checkpoints.c.stream_id, lease_checkpoints.c.checkpoint))
        },
        tokens={
            row.stream_id: (row.fencing_token, row.owner)
            for row in connection.execute(select(leases.c.stream_id, leases.c.fencing_token, leases.c.owner))
        },
        audit=[
            tuple(row)
            for row in connection.execute(
                select(audit.action, audit.stream_id, audit.token_before, audit.token_after).where(
                    audit.action.in_(["steal", "expire"])
                )
            )
        ],
    )
