"""The database under the explorer: a migrated PostgreSQL, a clock that the schedule moves, a quick way back.

- *The clock* stands at 0 s until a schedule moves it on by STEP. Its functions are put before the server's own by the
  sessions' search_path, so that the product's SQL and its triggers stay as they are. Unlike `tests.clock`'s, this
  `statement_timestamp()` is frozen while its statement waits, as the server's is: it compares when the statement began
  (by the server's own clock, which is not shown to anybody) with when the step was made.
- *Restoring* puts the saved rows back in one round trip, past the guards.
- *Observing* reads all that was committed in one statement, so that a history of commits needs no clock.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, TypeVar

import psycopg
from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.pool import NullPool, QueuePool

from leases import LeaseStore
from tests import postgres
from tests.interleavings.client import Clients

R = TypeVar("R")

START = datetime(2031, 5, 17, 12, 0, 0, tzinfo=UTC)
"""Where the clock of a schedule stands at 0 s."""

TTL = timedelta(minutes=30)
"""Longer than any schedule really takes: no real time limit, which the fence makes of it, ends a session."""

BEFORE_S = 600.0
"""How long before the schedule the state was built that it begins with: such leases end at 1,200 s."""

STEP_S = 1500.0
"""How far one move of the clock goes: past the end of those leases, not of those renewed or granted since."""

STEPS = 2
"""How often a schedule may move the clock."""

VACUUM_EVERY = 250
"""Restores between two vacuums: autovacuum is off, and the tables must stay small to be quick."""

TABLES = ("leases", "lease_checkpoints", "lease_grants", "lease_workers", "lease_events", "lease_audit", "work")

_CLIENT = {
    "search_path": "explorer,public,pg_catalog",
    # A deadlock is looked for once, so long after a session began to wait. The shortest there is: whoever closes the
    # circle is the one who is refused, whatever the machine's load.
    "deadlock_timeout": "1ms",
    # Tables of three rows need no thought.
    "plan_cache_mode": "force_generic_plan",
    "jit": "off",
}

_STEPS = range(1, STEPS + 1)

_DONE = [f"pg_sequence_last_value('explorer.step_{n}'::regclass)" for n in _STEPS]
"""When the clock's steps were made, in microseconds by the server's clock; null until then. No snapshot hides it."""

_BEGINNING = f"""
    (timestamptz '{START.isoformat()}' + CASE WHEN pg_sequence_last_value('explorer.begun'::regclass) IS NULL
        THEN make_interval(secs => {-BEFORE_S}) ELSE make_interval() END)
"""
"""Where the clock stands before its first step."""


def _copied(origin: str, to: str) -> str:
    """Statements that make the tables of one schema those of another."""
    return "".join(
        f"DELETE FROM {to}.{name}; INSERT INTO {to}.{name} SELECT * FROM {origin}.{name}; " for name in TABLES
    )


_PREPARE = (
    "CREATE TABLE public.work (stream_id text, fencing_token bigint, owner text)",
    "CREATE SCHEMA explorer",
    "CREATE SCHEMA saved",
    "CREATE SEQUENCE explorer.begun",
    *(f"CREATE SEQUENCE explorer.step_{n}" for n in _STEPS),
    *(f"CREATE TABLE saved.{name} (LIKE public.{name})" for name in TABLES),
    f"""
    CREATE FUNCTION explorer.statement_timestamp() RETURNS timestamptz STABLE LANGUAGE plpgsql AS $$
    DECLARE
        began bigint; steps int := 0;
    BEGIN
        IF {_DONE[0]} IS NOT NULL THEN
            began := (extract(epoch FROM pg_catalog.statement_timestamp()) * 1000000)::bigint;
            steps := {" + ".join(f"coalesce({done} <= began, false)::int" for done in _DONE)};
        END IF;
        RETURN {_BEGINNING} + make_interval(secs => {STEP_S} * steps);
    END $$
    """,
    f"""
    CREATE FUNCTION explorer.clock_timestamp() RETURNS timestamptz VOLATILE LANGUAGE plpgsql AS $$
    BEGIN
        RETURN {_BEGINNING} + make_interval(secs => {STEP_S} *
            ({" + ".join(f"({done} IS NOT NULL)::int" for done in _DONE)}));
    END $$
    """,
    f"""
    CREATE FUNCTION explorer.restore() RETURNS void LANGUAGE plpgsql AS $$
    BEGIN
        {_copied("saved", "public")}
        {" ".join(f"PERFORM setval('explorer.step_{n}', 1, false);" for n in _STEPS)}
    END $$
    """,
    f"""
    CREATE FUNCTION explorer.save() RETURNS void LANGUAGE plpgsql AS $$
    BEGIN
        {_copied("public", "saved")}
    END $$
    """,
)


def _since(column: str) -> str:
    return f"extract(epoch FROM {column} - timestamptz '{START.isoformat()}')::float"


def _rows(columns: str, table: str) -> str:
    return f"(SELECT coalesce(json_agg(json_build_array({columns})), '[]') FROM public.{table})"


_OBSERVE = "SELECT json_build_array({})::text".format(
    ", ".join(
        [
            _rows(f"stream_id, owner, fencing_token, {_since('expires_at')}, {_since('available_at')}", "leases"),
            _rows(
                f"stream_id, fencing_token, owner, {_since('granted_at')}, {_since('ended_at')}, end_reason",
                "lease_grants",
            ),
            _rows("stream_id, fencing_token, owner", "work"),
            _rows("stream_id, event_id, seq, fencing_token", "lease_events"),
            _rows("stream_id, fencing_token, checkpoint", "lease_checkpoints"),
            _rows("action, stream_id, token_before, token_after", "lease_audit"),
        ]
    )
)


class LeaseRow(NamedTuple):
    """A row of `leases`; times are seconds by the schedule's clock."""

    stream_id: str
    owner: str | None
    token: int
    expires_s: float | None
    available_s: float

    def live(self, at_s: float) -> bool:
        """Held and unexpired then."""
        return self.expires_s is not None and self.expires_s > at_s


class GrantRow(NamedTuple):
    stream_id: str
    token: int
    owner: str
    granted_s: float
    ended_s: float | None
    end_reason: str | None


class WorkRow(NamedTuple):
    """What a fenced transaction of the caller's wrote."""

    stream_id: str
    token: int
    owner: str


class EventRow(NamedTuple):
    stream_id: str
    event_id: str
    seq: int
    token: int


class CheckpointRow(NamedTuple):
    stream_id: str
    token: int
    checkpoint: Any


class AuditRow(NamedTuple):
    action: str
    stream_id: str
    token_before: int | None
    token_after: int | None


class Committed(NamedTuple):
    """All that was committed, at one moment."""

    leases: dict[str, LeaseRow]
    grants: dict[tuple[str, int], GrantRow]
    work: list[WorkRow]
    events: list[EventRow]
    checkpoints: list[CheckpointRow]
    audit: list[AuditRow]


class Database:
    """One migrated database, seen from outside of the schedule; and engines for those inside."""

    def __init__(self, engine: Engine) -> None:
        self.url = engine.url
        with LeaseStore(engine) as store:
            store.migrate()
        parts = self.url.translate_connect_args(username="user", database="dbname")
        self._observer: psycopg.Connection[Any] = psycopg.connect(autocommit=True, prepare_threshold=0, **parts)
        for statement in _PREPARE:
            self.execute(statement)
        self.execute("SET session_replication_role = replica")  # the observer goes past the guards
        self._restored = 0
        self._builder = self.engine("READ COMMITTED", poolclass=QueuePool, pool_size=1)
        self.clients = Clients(self.engine)
        self.at_s = 0.0

    def execute(self, statement: str) -> None:
        """Run SQL past the product, in a transaction of its own."""
        self._observer.execute(statement.encode(), prepare=False)

    def engine(self, isolation: str, **pool: Any) -> Engine:
        """An engine on the schedule's clock, at this isolation level."""
        options = " ".join(f"-c {name}={value}" for name, value in _CLIENT.items())
        return create_engine(
            self.url, isolation_level=isolation, connect_args={"options": options}, **{"poolclass": NullPool, **pool}
        )

    def set_up(self, build: Callable[[Connection], R]) -> R:
        """Build the state that schedules begin with, from nothing, and save it."""
        for name in TABLES:
            self.execute(f"DELETE FROM public.{name}")
        for name in ("begun", *(f"step_{n}" for n in _STEPS)):
            self.execute(f"SELECT setval('explorer.{name}', 1, false)")
        with self._builder.begin() as connection:
            built = build(connection)
        self.execute("SELECT explorer.save(), setval('explorer.begun', 1)")
        return built

    def restore(self) -> None:
        """Put everything back to what was saved, the clock to 0 s."""
        self._restored += 1
        if self._restored % VACUUM_EVERY == 0:
            self.execute(f"VACUUM {', '.join(f'public.{name}' for name in TABLES)}")
        self._observer.execute("SELECT explorer.restore()")
        self.at_s = 0.0

    def step_clock(self) -> None:
        """Move the clock on by STEP."""
        step = round(self.at_s / STEP_S) + 1
        self._observer.execute(
            f"SELECT setval('explorer.step_{step}', "
            "(extract(epoch FROM pg_catalog.clock_timestamp()) * 1000000)::bigint)".encode()
        )
        self.at_s += STEP_S

    def observe(self) -> Committed:
        """Read all that is committed now."""
        row = self._observer.execute(_OBSERVE.encode()).fetchone()
        assert row is not None
        leases, grants, work, events, checkpoints, audit = json.loads(row[0])
        return Committed(
            {each[0]: LeaseRow(*each) for each in leases},
            {(each[0], each[1]): GrantRow(*each) for each in grants},
            [WorkRow(*each) for each in work],
            [EventRow(*each) for each in events],
            [CheckpointRow(*each) for each in checkpoints],
            [AuditRow(*each) for each in audit],
        )

    def blockers(self, pids: Sequence[int]) -> dict[int, list[int]]:
        """Which of these sessions wait for a lock, and for whom."""
        rows = self._observer.execute(
            "SELECT pid, blockers FROM unnest(%s::int[]) AS pid, pg_blocking_pids(pid) AS blockers "
            "WHERE cardinality(blockers) > 0",
            [list(pids)],
        ).fetchall()
        return dict(rows)

    def close(self) -> None:
        self.clients.close()
        self._builder.dispose()
        self._observer.close()


@contextmanager
def opened(server: postgres.Server) -> Iterator[Database]:
    """A database of the explorer's own on a server, dropped at the end."""
    name = "leases_interleavings"
    maintenance = create_engine(server.url, isolation_level="AUTOCOMMIT", poolclass=NullPool)

    def drop() -> None:
        with maintenance.connect() as connection:
            connection.execute(text(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)"))

    drop()
    with maintenance.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name} TEMPLATE template0"))
    database = Database(create_engine(server.url.set(database=name), poolclass=NullPool))
    try:
        yield database
    finally:
        database.close()
        drop()
