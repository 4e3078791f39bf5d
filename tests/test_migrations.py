"""The migrations agree with `leases.schema`, happen once, wholly or not at all, and refuse what they do not know."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.pool import NullPool

from alembic import command
from leases import AsyncLeaseStore, ConfigError, LeaseStore, SchemaOutdated, StoreError, migrate
from leases.engine import create_engine as leases_engine
from leases.schema import VERSION, VERSION_TABLE, metadata

ROOT = Path(__file__).parent.parent
TTL = timedelta(seconds=15)

ODD_SCHEMAS = [
    "Mixed Case",
    'quo"te',
    "it's",
    "50%",
    "%s%(a)s",
    "a:b",
    "dotted.name",
    "semi;colon--",
    "[brackets]",
    "ünïcode",
    "select",
    "back\\slash",
    "{curly}",
    "$1",
]


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database of its own without tables, on each engine in turn."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'empty.db'}"
    result: str = request.getfixturevalue("empty_postgresql_url")
    return result


@pytest.fixture
def engine(empty_url: str) -> Iterator[Engine]:
    """The database of `empty_url`, with DDL in transactions."""
    engine = leases_engine(empty_url, poolclass=NullPool)
    yield engine
    engine.dispose()


# --- what a database has -----------------------------------------------------------------------------------------

INVENTORY_POSTGRESQL = """
WITH here AS (SELECT oid, relname, relkind, reloptions FROM pg_class WHERE relnamespace = to_regnamespace(:schema))
SELECT 'table', relname, '', coalesce(array_to_string(reloptions, ','), '') FROM here WHERE relkind = 'r'
UNION ALL
SELECT 'column', relname, to_char(attnum, '00 ') || attname,
       concat_ws(' ', format_type(atttypid, atttypmod), CASE WHEN attnotnull THEN 'NOT NULL' END,
                 pg_get_expr(adbin, adrelid), collname)
FROM here JOIN pg_attribute ON attrelid = here.oid AND attnum > 0 AND NOT attisdropped
LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
LEFT JOIN pg_collation c ON c.oid = attcollation
WHERE relkind = 'r'
UNION ALL
SELECT 'constraint', relname, conname, pg_get_constraintdef(c.oid) FROM here JOIN pg_constraint c ON conrelid = here.oid
UNION ALL
SELECT 'index', relname, '', pg_get_indexdef(oid) FROM here WHERE relkind = 'i'
UNION ALL
SELECT 'trigger', relname, tgname, pg_get_triggerdef(t.oid)
FROM here JOIN pg_trigger t ON tgrelid = here.oid AND NOT tgisinternal
UNION ALL
SELECT 'function', proname, '', pg_get_functiondef(oid) FROM pg_proc WHERE pronamespace = to_regnamespace(:schema)
"""

INVENTORY_SQLITE = "SELECT type, name, tbl_name, coalesce(sql, '') FROM sqlite_master"

Inventory = list[tuple[str, str, str, str]]


def inventory(engine: Engine, *, schema: str = "public") -> Inventory:
    """Everything that a database's schema has, as its own catalogue tells it, but for the version table."""
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            rows = connection.execute(text(INVENTORY_SQLITE))
        else:
            quoted = connection.scalar(text("SELECT quote_ident(:schema)"), {"schema": schema})
            rows = connection.execute(text(INVENTORY_POSTGRESQL), {"schema": quoted})
        return sorted(
            (kind, name, part, " ".join(definition.split()))
            for kind, name, part, definition in rows
            if VERSION_TABLE not in name and part != VERSION_TABLE
        )


def tables_and_indexes(found: Inventory) -> Inventory:
    return [row for row in found if row[0] not in ("trigger", "function")]


def found_version(engine: Engine, schema: str | None = None) -> str | None:
    with engine.connect() as connection:
        return migrate.version(connection, schema)


def upgrade(engine: Engine) -> None:
    with LeaseStore(engine) as store:
        store.migrate()


def downgrade(engine: Engine, schema: str | None = None) -> None:
    config = Config()
    config.set_main_option("script_location", str(ROOT / "alembic").replace("%", "%%"))
    with engine.begin() as connection:
        config.attributes.update(connection=connection, schema=schema)
        command.downgrade(config, "base")


# --- migrations and schema.py ------------------------------------------------------------------------------------


def test_alembic_finds_nothing_to_change(engine: Engine) -> None:
    upgrade(engine)
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"compare_type": True, "compare_server_default": True, "version_table": VERSION_TABLE}
        )
        assert compare_metadata(context, metadata) == []


def test_migrations_make_what_the_schema_says(engine: Engine, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Also what alembic does not compare: checks, collations, predicates of indexes, STRICT, room in the pages."""
    metadata.create_all(engine)
    said = inventory(engine)
    metadata.drop_all(engine)
    assert inventory(engine) == []
    upgrade(engine)
    made = inventory(engine)
    assert tables_and_indexes(made) == said
    assert len(made) > len(said), "the triggers are in the migration only"


def test_what_is_compared_shows_each_kind_of_difference(engine: Engine) -> None:
    """The comparison above would see a lost check, predicate, collation, STRICT or fillfactor."""
    upgrade(engine)
    definitions = "\n".join(" ".join(row) for row in inventory(engine))
    for words in (
        ("STRICT", "CHECK (fencing_token >= 0)", "WHERE owner IS NOT NULL", "leases_record")
        if engine.dialect.name == "sqlite"
        else (
            "fillfactor=50",
            "CHECK ((fencing_token >= 0))",
            "WHERE (owner IS NOT NULL)",
            "NOT NULL C",
            "'active'::text",
        )
    ):
        assert words in definitions


def test_down_and_up_again_makes_the_same(engine: Engine) -> None:
    upgrade(engine)
    first = inventory(engine)
    downgrade(engine)
    assert inventory(engine) == []
    assert found_version(engine) is None
    upgrade(engine)
    assert inventory(engine) == first


def test_down_and_up_again_makes_the_same_in_a_named_schema(empty_postgresql_url: str) -> None:
    engine = leases_engine(empty_postgresql_url, poolclass=NullPool)
    with LeaseStore(engine, schema="elsewhere") as store:
        store.migrate()
        first = inventory(engine, schema="elsewhere")
        downgrade(engine, "elsewhere")
        assert inventory(engine, schema="elsewhere") == []
        store.migrate()
    assert inventory(engine, schema="elsewhere") == first


def test_a_second_migration_changes_nothing(engine: Engine) -> None:
    with LeaseStore(engine) as store:
        assert store.migrate() == (None, VERSION)
        first = inventory(engine)
        assert store.migrate() == (VERSION, VERSION)
    assert inventory(engine) == first


def test_migrating_keeps_what_the_tables_hold(engine: Engine) -> None:
    with LeaseStore(engine) as store:
        store.migrate()
        lease = store.acquire("a", owner="one", ttl=TTL)
        store.migrate()
        info = store.get("a")
    assert lease is not None
    assert info is not None
    assert info.fencing_token == lease.fencing_token


def test_sqlite_readers_do_not_wait_for_the_writer_after_a_migration(tmp_path: Path) -> None:
    with LeaseStore(f"sqlite:///{tmp_path / 'leases.db'}") as store:
        store.migrate()
        with store.engine.connect() as connection:
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"


# --- at once -----------------------------------------------------------------------------------------------------

MIGRATES_WHEN_TOLD = """
import json, sys
from leases import LeaseStore
for line in sys.stdin:
    url, schema = json.loads(line)
    with LeaseStore(url, schema=schema) as store:
        print(json.dumps(store.migrate()), flush=True)
"""

ROUNDS = 5


@pytest.mark.parametrize("schema", [None, "shared place"])
def test_of_two_processes_at_once_one_migrates_and_both_end_well_on_postgresql(
    empty_postgresql_url: str, schema: str | None
) -> None:
    engine = create_engine(empty_postgresql_url, poolclass=NullPool)
    with two_migrating_processes() as both:
        for _ in range(ROUNDS):
            assert both.migrate(empty_postgresql_url, schema) == [[None, VERSION], [VERSION, VERSION]]
            with engine.begin() as connection:
                connection.execute(text('DROP SCHEMA IF EXISTS public, "shared place" CASCADE'))
                connection.execute(text("CREATE SCHEMA public"))


def test_of_two_processes_at_once_one_migrates_and_both_end_well_on_sqlite(tmp_path: Path) -> None:
    with two_migrating_processes() as both:
        for number in range(ROUNDS):
            url = f"sqlite:///{tmp_path / f'{number}.db'}"
            assert both.migrate(url, None) == [[None, VERSION], [VERSION, VERSION]]


class two_migrating_processes:
    def __enter__(self) -> two_migrating_processes:
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", MIGRATES_WHEN_TOLD],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
            )
            for _ in range(2)
        ]
        return self

    def __exit__(self, *raised: object) -> None:
        codes = []
        for process in self.processes:
            with process:
                if raised[0] is not None:
                    process.kill()
                assert process.stdin is not None
                process.stdin.close()
            codes.append(process.returncode)
        assert raised[0] is not None or codes == [0, 0]

    def migrate(self, url: str, schema: str | None) -> list[list[str | None]]:
        """Tell both; return what each answered, the one that did it first."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps([url, schema]) + "\n")
            process.stdin.flush()
        answers = []
        for process in self.processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, "a process ended without an answer"
            answers.append(json.loads(line))
        return sorted(answers, key=lambda answer: answer[0] is not None)


@pytest.mark.parametrize("isolation_level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE", "AUTOCOMMIT"])
def test_who_waits_for_a_migration_finds_it_done_whatever_its_isolation(
    empty_postgresql_url: str, isolation_level: str
) -> None:
    holder = create_engine(empty_postgresql_url, poolclass=NullPool)
    waiter = create_engine(empty_postgresql_url, poolclass=NullPool, isolation_level=isolation_level)
    key = {"key": migrate.MIGRATION_LOCK}
    with ThreadPoolExecutor(1) as thread, holder.connect() as connection:
        connection.execute(text("SELECT pg_advisory_lock(:key)"), key)
        connection.commit()
        answer = thread.submit(LeaseStore(waiter).migrate)
        wait_until_somebody_waits_for_an_advisory_lock(connection)
        assert migrate.migrate_on(connection) == (None, VERSION)
        connection.execute(text("SELECT pg_advisory_unlock(:key)"), key)
        connection.commit()
        assert answer.result(timeout=30) == (VERSION, VERSION)


def wait_until_somebody_waits_for_an_advisory_lock(connection: Connection) -> None:
    deadline = time.monotonic() + 30
    while not connection.scalar(text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")):
        connection.rollback()
        assert time.monotonic() < deadline
    connection.rollback()


def test_threads_migrate_several_databases_at_once(tmp_path: Path) -> None:
    def one(number: int) -> tuple[str | None, str]:
        with LeaseStore(f"sqlite:///{tmp_path / f'{number}.db'}") as store:
            return store.migrate()

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(one, range(8))) == [(None, VERSION)] * 8


# --- asyncio -----------------------------------------------------------------------------------------------------


def test_an_async_store_migrates(empty_url: str) -> None:
    async def run() -> None:
        async with AsyncLeaseStore(empty_url) as store:
            assert await store.migrate() == (None, VERSION)
            assert await store.migrate() == (VERSION, VERSION)
            assert await store.acquire("a", owner="one", ttl=TTL) is not None

    asyncio.run(run())
    engine = leases_engine(empty_url, poolclass=NullPool)
    by_async = inventory(engine)
    downgrade(engine)
    upgrade(engine)
    assert inventory(engine) == by_async


def test_async_tasks_migrate_several_databases_at_once(empty_postgresql_url: str, tmp_path: Path) -> None:
    async def one(url: str, schema: str | None) -> tuple[str | None, str]:
        async with AsyncLeaseStore(url, schema=schema) as store:
            return await store.migrate()

    async def run() -> list[tuple[str | None, str]]:
        places: list[tuple[str, str | None]] = [(f"sqlite:///{tmp_path / name}", None) for name in ("a", "b")]
        places += [(empty_postgresql_url, schema) for schema in ("c", "d", "d")]
        return list(await asyncio.gather(*(one(*place) for place in places)))

    answers = asyncio.run(run())
    assert answers[:3] == [(None, VERSION)] * 3
    assert sorted(answers[3:], key=str) == [(VERSION, VERSION), (None, VERSION)]


# --- in the middle -----------------------------------------------------------------------------------------------


def test_a_migration_that_fails_in_the_middle_leaves_nothing_behind(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE lease_audit (theirs integer)"))  # the last table that is made
    before = inventory(engine)
    with LeaseStore(engine) as store:
        with pytest.raises(StoreError, match=r"lease_audit.* already exists"):
            store.migrate()
        assert inventory(engine) == before
        assert found_version(engine) is None
        with engine.begin() as connection:
            connection.execute(text("DROP TABLE lease_audit"))
        assert store.migrate() == (None, VERSION)


def test_a_failed_migration_leaves_no_schema_behind(empty_postgresql_url: str) -> None:
    engine = create_engine(empty_postgresql_url, poolclass=NullPool)

    @event.listens_for(engine, "before_cursor_execute")
    def fail(_connection: Connection, _cursor: object, statement: str, *_: object) -> None:
        if "CREATE TRIGGER leases_record" in statement:
            raise RuntimeError("pulled the plug")

    with pytest.raises(RuntimeError, match="pulled the plug"):
        LeaseStore(engine, schema="elsewhere").migrate()
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT to_regnamespace('elsewhere')")) is None


def driver_begins_late(engine: Engine) -> None:
    """The recipe of SQLAlchemy's own pages for SQLite: transactions by BEGIN."""

    @event.listens_for(engine, "connect")
    def connect(connection: sqlite3_connection, _record: object) -> None:
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN")


class sqlite3_connection:
    isolation_level: str | None


@pytest.mark.parametrize("begins", ["by itself", "late"])
def test_a_failed_migration_leaves_nothing_behind_on_a_callers_sqlite_engine(tmp_path: Path, begins: str) -> None:
    engine = create_engine(f"sqlite:///{tmp_path / 'theirs.db'}", poolclass=NullPool)
    if begins == "late":
        driver_begins_late(engine)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE lease_audit (theirs integer)"))
    before = inventory(engine)
    with pytest.raises(StoreError, match="already exists"):
        LeaseStore(engine).migrate()
    assert inventory(engine) == before


# --- other versions ----------------------------------------------------------------------------------------------


def set_version(engine: Engine, to: str) -> None:
    with engine.begin() as connection:
        connection.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = :to"), {"to": to})


def test_no_tables_are_refused_with_what_to_do(engine: Engine) -> None:
    with engine.connect():
        pass  # so that a SQLite file is there
    with (
        LeaseStore(engine) as store,
        pytest.raises(SchemaOutdated, match=r"has no lease tables; run `leases migrate( --schema nowhere)?`"),
    ):
        store.get("a")
    assert inventory(engine) == []


def test_a_missing_file_is_refused_and_not_made(tmp_path: Path) -> None:
    file = tmp_path / "leases.db"
    for url in (f"sqlite:///{file}", f"sqlite:///file:{file}?uri=true", f"sqlite:///{file}?uri=true&mode=rwc"):
        with LeaseStore(url) as store, pytest.raises(SchemaOutdated, match=r"there is no database .*`leases migrate`"):
            store.get("a")
    assert not file.exists()


def test_a_missing_schema_is_refused_with_what_to_do(postgresql_url: str) -> None:
    with LeaseStore(postgresql_url, schema="nowhere") as store:
        with pytest.raises(SchemaOutdated, match=r"has no lease tables; run `leases migrate( --schema nowhere)?`"):
            store.get("a")


def test_dropped_tables_are_found_missing_by_a_store_that_knew_them(engine: Engine) -> None:
    with LeaseStore(engine) as store:
        store.migrate()
        assert store.get("a") is None
        downgrade(engine)
        with pytest.raises(SchemaOutdated, match="run `leases migrate`"):
            store.get("a")


def test_older_tables_are_refused_until_they_are_migrated(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    upgrade(engine)
    monkeypatch.setattr(migrate, "VERSION", "9999")  # as code of a later version
    with LeaseStore(engine) as store:
        with pytest.raises(
            SchemaOutdated, match=f"version {VERSION}, older than this code's 9999; run `leases migrate`"
        ):
            store.get("a")


@pytest.mark.parametrize("newer", ["0003", "9999", "0000_by_another_name"])
def test_newer_tables_are_refused_and_stay_as_they_are(engine: Engine, newer: str) -> None:
    upgrade(engine)
    set_version(engine, newer)
    before = inventory(engine)
    with LeaseStore(engine) as store:
        for act in (lambda: store.get("a"), store.migrate):
            with pytest.raises(SchemaOutdated, match=rf"version {newer}, .* does not know; upgrade the leases package"):
                act()
    assert found_version(engine) == newer
    assert inventory(engine) == before


# --- beside others -----------------------------------------------------------------------------------------------


def test_a_users_own_migrations_are_left_alone(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)"))
        connection.execute(text("INSERT INTO alembic_version VALUES ('theirs')"))
        connection.execute(text("CREATE TABLE orders (id integer)"))
    before = inventory(engine)
    upgrade(engine)
    after = inventory(engine)
    downgrade(engine)
    assert set(before) < set(after)
    assert inventory(engine) == before
    with engine.connect() as connection:
        assert connection.scalars(text("SELECT version_num FROM alembic_version")).all() == ["theirs"]


@pytest.mark.parametrize("schema", ODD_SCHEMAS)
def test_a_schema_may_have_any_name(empty_postgresql_url: str, schema: str) -> None:
    engine = create_engine(empty_postgresql_url, poolclass=NullPool)
    with LeaseStore(empty_postgresql_url, schema=schema) as store:
        assert store.migrate() == (None, VERSION)
        assert store.migrate() == (VERSION, VERSION)
        lease = store.acquire("a", owner="one", ttl=TTL)
        assert lease is not None
        assert store.release(lease)
        assert [info.stream_id for info in store.list()] == ["a"]
        assert [grant.end_reason for grant in store.grants("a")] == ["released"]
    assert inventory(engine) == [], "nothing of it is in public"
    assert len(inventory(engine, schema=schema)) > 20
    assert found_version(engine, schema) == VERSION


def test_schemas_of_one_database_have_tables_of_their_own(postgresql_url: str) -> None:
    with LeaseStore(postgresql_url, schema="one") as one, LeaseStore(postgresql_url) as public:
        one.migrate()
        assert one.acquire("a", owner="one", ttl=TTL) is not None
        assert public.get("a") is None


@pytest.mark.parametrize("schema", ["", "x" * 64, "ü" * 32, "a\0b", "a\nb", "pg_mine", "a$$b"])
def test_a_schema_that_cannot_be_is_refused(postgresql_url: str, schema: str) -> None:
    with pytest.raises(ConfigError, match="schema"):
        LeaseStore(postgresql_url, schema=schema)


def test_sqlite_has_no_schemas(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="schema= is for PostgreSQL"):
        LeaseStore(f"sqlite:///{tmp_path / 'leases.db'}", schema="mine")
