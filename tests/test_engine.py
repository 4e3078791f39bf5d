"""From URLs to engines, and from a driver's errors to ours: one line, what to do next, and never a password."""

from __future__ import annotations

import asyncio
import multiprocessing
import sqlite3
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool, QueuePool

from leases import (
    AsyncLeaseStore,
    ConfigError,
    LeasesError,
    LeaseStore,
    SchemaOutdated,
    StoreError,
    StoreUnavailable,
    faults,
)
from leases import engine as engines
from tests.postgres import Server

CANARY = "canary-hunter2"
"""A password that must be seen nowhere."""

TTL = timedelta(seconds=15)
BRIEFLY = timedelta(milliseconds=1)

Attempt = Callable[[str], None]


def look(url: str) -> None:
    with LeaseStore(url, retry_for=BRIEFLY) as store:
        assert CANARY not in f"{store!r} {store.engine!r} {store.url!r} {store.engine.url}"
        store.get("a")


def look_async(url: str) -> None:
    async def run() -> None:
        async with AsyncLeaseStore(url, retry_for=BRIEFLY) as store:
            assert CANARY not in f"{store!r} {store.engine!r} {store.url!r} {store.engine.url}"
            await store.get("a")

    asyncio.run(run())


def change(url: str) -> None:
    with LeaseStore(url, retry_for=BRIEFLY) as store:
        store.acquire("a", owner="one", ttl=TTL)


def migrate(url: str) -> None:
    with LeaseStore(url, retry_for=BRIEFLY) as store:
        store.migrate()


def migrate_async(url: str) -> None:
    async def run() -> None:
        async with AsyncLeaseStore(url, retry_for=BRIEFLY) as store:
            await store.migrate()

    asyncio.run(run())


EVERY_WAY = pytest.mark.parametrize("attempt", [look, look_async, migrate, migrate_async])


def refusal(kind: type[LeasesError], attempt: Attempt, url: str) -> str:
    """The message of an attempt's refusal, which is of that very kind, one line, and without the canary anywhere."""
    with pytest.raises(LeasesError) as raised:
        attempt(url)
    assert type(raised.value) is kind, raised.value
    message = str(raised.value)
    assert message.isprintable()
    assert CANARY not in message
    assert CANARY not in repr(raised.value)
    assert CANARY not in "".join(traceback.format_exception(raised.value))
    return message


# --- URLs that cannot be -----------------------------------------------------------------------------------------


@EVERY_WAY
@pytest.mark.parametrize(
    ("url", "advice"),
    [
        ("", "this is no database URL; use sqlite:///FILE or postgresql://USER@HOST/DATABASE"),
        (None, "this is no database URL"),
        (7, "this is no database URL"),
        ("leases.db", "this is no database URL"),
        (f"user:{CANARY}@host/db", "this is no database URL"),
        (f"postgresql:/user:{CANARY}@host/db", "this is no database URL"),
        (f"postgresql//user:{CANARY}@host/db", "this is no database URL"),
        (f"postgresql:user:{CANARY}@host/db", "this is no database URL"),
        (f"postgresql://user@host:{CANARY}/db", "this is no database URL"),
        (f"host=localhost password={CANARY}", "this is no database URL"),
        (f"mysql://user:{CANARY}@host/db", "no driver for the URL scheme 'mysql'; use sqlite:///FILE or"),
        (f"postgresql+asyncpg://user:{CANARY}@host/db", "no driver for the URL scheme 'postgresql+asyncpg'"),
        (f"postgresql://user:pa@{CANARY}@host/db", "more than one @; write one in a user name or password as %40"),
        (f"postgresql://user@host/db?password={CANARY}&password=x", "gives the password twice; give it once"),
        (f"postgresql://user:{CANARY}%00@host/db", "holds a NUL"),
        (f"postgresql://user:{CANARY}@{'x' * 300}/db", "cannot be a host's name"),
        (f"postgresql://user:{CANARY}@ho..st/db", "cannot be a host's name"),
        (f"postgresql://user:{CANARY}@host/db?prepare_threshold=never", "is a number, or none (for PgBouncer)"),
        (f"postgresql://user:{CANARY}@host/db?prepare_threshold=-1", "is a number, or none (for PgBouncer)"),
        (f"postgresql://user:{CANARY}@host/db?prepare_threshold=²", "is a number, or none (for PgBouncer)"),
        (f"sqlite://user:{CANARY}@host/file", "names no host; use sqlite:///FILE, with a fourth / for an absolute"),
        ("sqlite://leases.db", "names no host; use sqlite:///FILE"),
        ("sqlite:///a\0b", "holds a NUL"),
        ("sqlite:///leases.db?mode=ro", "unknown option in the SQLite URL: 'mode' (SQLite's own also need uri=true)"),
        ("sqlite:///leases.db?timeout=soon", "the options of the database URL cannot be used"),
    ],
)
def test_a_url_that_cannot_be_is_refused(attempt: Attempt, url: Any, advice: str) -> None:
    assert advice in refusal(ConfigError, attempt, url)


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg", "postgresql+psycopg_async"])
@pytest.mark.parametrize("attempt", [look, look_async, change])
def test_every_name_of_postgresql_is_the_same_driver(attempt: Attempt, scheme: str, postgresql_url: str) -> None:
    attempt(scheme + postgresql_url[postgresql_url.index(":") :])


@pytest.mark.parametrize("scheme", ["sqlite", "sqlite+pysqlite", "sqlite+aiosqlite"])
@pytest.mark.parametrize("attempt", [look, look_async, change])
def test_every_name_of_sqlite_is_the_same_driver(attempt: Attempt, scheme: str, sqlite_url: str) -> None:
    attempt(scheme + sqlite_url[sqlite_url.index(":") :])


def test_a_url_may_be_sqlalchemys(sqlite_url: str) -> None:
    with LeaseStore(make_url(sqlite_url)) as store:
        assert store.get("a") is None


def test_other_engines_are_refused() -> None:
    engine = create_engine("sqlite://")
    engine.dialect.name = "mysql"
    with pytest.raises(ConfigError, match="runs on PostgreSQL and SQLite, not on mysql"):
        LeaseStore(engine)


# --- passwords ---------------------------------------------------------------------------------------------------


@pytest.fixture
def guarded(server: Server, postgresql_url: str) -> Iterator[URL]:
    """A database and a user whose password the server asks for; the password is odd, and begins with the canary."""
    if server.directory is None:
        pytest.skip("LEASES_TEST_POSTGRES_URL names a server whose pg_hba.conf is not the tests' to write")
    password = f"{CANARY} @:/?#%25&'\"\\"
    rules = server.directory / "data" / "pg_hba.conf"
    before = rules.read_text()
    admin = create_engine(postgresql_url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with admin.connect() as connection:
        literal = psycopg.sql.Literal(password).as_string()
        connection.exec_driver_sql(f"CREATE ROLE guarded LOGIN SUPERUSER PASSWORD {literal}".replace("%", "%%"))
        rules.write_text(f"host all guarded 127.0.0.1/32 scram-sha-256\n{before}")
        connection.execute(text("SELECT pg_reload_conf()"))
    yield make_url(postgresql_url).set(username="guarded", password=password)
    with admin.connect() as connection:
        rules.write_text(before)
        connection.execute(text("SELECT pg_reload_conf()"))
        connection.execute(text("DROP ROLE guarded"))


@pytest.mark.parametrize("attempt", [look, look_async, change])
def test_a_password_may_hold_anything_if_it_is_escaped(attempt: Attempt, guarded: URL) -> None:
    attempt(guarded.render_as_string(hide_password=False))


@pytest.mark.parametrize("attempt", [look, look_async, change])
def test_a_password_may_stand_in_the_query_and_is_not_shown(attempt: Attempt, guarded: URL) -> None:
    in_query = guarded._replace(password=None).update_query_dict({"password": guarded.password or ""})
    attempt(in_query.render_as_string(hide_password=False))


@EVERY_WAY
def test_a_wrong_password_is_refused_at_once_and_not_shown(attempt: Attempt, guarded: URL) -> None:
    wrong = guarded.set(password=f"{CANARY}-wrong").render_as_string(hide_password=False)
    message = refusal(StoreError, attempt, wrong)
    assert "password authentication failed" in message
    assert "check the user and the password in the URL" in message


@EVERY_WAY
def test_a_missing_password_is_refused_with_where_to_give_it(attempt: Attempt, guarded: URL) -> None:
    message = refusal(StoreError, attempt, guarded._replace(password=None).render_as_string())
    assert "give the password in the URL, in PGPASSWORD, or in a passfile" in message


def test_a_key_files_password_is_not_shown() -> None:
    engine = engines.create_engine(f"postgresql://user@host/db?sslpassword={CANARY}")
    assert CANARY not in f"{engine!r} {engine.url}"
    seen: dict[str, Any] = {}

    @event.listens_for(engine, "do_connect")
    def connect(_dialect: object, _record: object, _args: object, options: dict[str, Any]) -> None:
        seen.update(options)
        raise psycopg.OperationalError("enough")

    with pytest.raises(DBAPIError):
        engine.connect()
    assert seen["sslpassword"] == CANARY


@pytest.mark.parametrize("said", ["failed: {} is wrong", "a\nb {}", "{}{}"])
def test_a_password_in_a_drivers_words_is_struck_out(said: str) -> None:
    url = make_url(f"postgresql+psycopg://user:{CANARY}@host/db")
    cause = psycopg.OperationalError(said.format(CANARY, CANARY))
    error = faults.translate(DBAPIError("SELECT 1", {"password": CANARY}, cause), url)
    assert CANARY not in str(error)
    assert str(error).isprintable()


# --- servers that cannot be reached --------------------------------------------------------------------------------


@EVERY_WAY
@pytest.mark.parametrize("host", ["127.0.0.1:1", "no-such-host.invalid"])
def test_a_server_that_cannot_be_reached_is_unavailable(attempt: Attempt, host: str) -> None:
    message = refusal(StoreUnavailable, attempt, f"postgresql://user:{CANARY}@{host}/db")
    assert f"cannot use postgresql://user@{host}/db: " in message


@EVERY_WAY
def test_none_of_several_hosts_can_be_reached(attempt: Attempt) -> None:
    url = f"postgresql://user:{CANARY}@/db?host=127.0.0.1:1&host=127.0.0.1:2"
    assert "cannot use postgresql://user@" in refusal(StoreUnavailable, attempt, url)


@EVERY_WAY
def test_a_database_that_is_not_there_is_named(attempt: Attempt, server: Server) -> None:
    url = server.url.set(database="no such db").render_as_string(hide_password=False)
    message = refusal(StoreError, attempt, url)
    assert 'database "no such db" does not exist' in message
    assert "check the database's name in the URL, or create it" in message


@EVERY_WAY
def test_a_user_that_is_not_there_is_named(attempt: Attempt, server: Server) -> None:
    if server.directory is None:
        pytest.skip("LEASES_TEST_POSTGRES_URL names a server that may ask a password first")
    message = refusal(StoreError, attempt, server.url.set(username="no such user").render_as_string())
    assert "check the user's name in the URL, or create the role" in message


@EVERY_WAY
def test_an_unknown_option_of_the_server_is_named(attempt: Attempt, server: Server) -> None:
    url = server.url.update_query_dict({"colour": "blue"}).render_as_string(hide_password=False)
    assert 'invalid connection option "colour"' in refusal(StoreError, attempt, url)


# --- files that cannot be used -------------------------------------------------------------------------------------


@pytest.mark.parametrize("attempt", [migrate, migrate_async])
def test_a_file_in_a_directory_that_is_not_there_is_refused(attempt: Attempt, tmp_path: Path) -> None:
    message = refusal(StoreError, attempt, f"sqlite:///{tmp_path}/nowhere/leases.db")
    assert "check that its directory exists" in message
    assert not (tmp_path / "nowhere").exists()


@EVERY_WAY
def test_a_directory_is_refused(attempt: Attempt, tmp_path: Path) -> None:
    assert "check that its directory exists, that it is a file" in refusal(StoreError, attempt, f"sqlite:///{tmp_path}")


@EVERY_WAY
def test_a_file_that_is_no_database_is_refused_and_left_alone(attempt: Attempt, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("not a database, " * 100)
    message = refusal(StoreError, attempt, f"sqlite:///{file}")
    assert "file is not a database; name another file" in message
    assert file.read_text() == "not a database, " * 100


@pytest.mark.parametrize("url", ["sqlite:///file:{}?mode=ro&uri=true", "sqlite:///{}?mode=ro&uri=true"])
def test_a_file_opened_read_only_can_be_read_and_not_changed(url: str, sqlite_url: str) -> None:
    file = Path(sqlite_url.removeprefix("sqlite:///"))
    neighbours = {path.name for path in file.parent.iterdir()}
    look(url.format(file))
    message = refusal(StoreError, change, url.format(file))
    assert "attempt to write a readonly database; let this user write the file and its directory" in message
    assert {path.name.partition("-")[0] for path in file.parent.iterdir()} == neighbours


def test_options_of_a_sqlite_url_do_not_become_part_of_the_files_name(tmp_path: Path) -> None:
    plain = f"sqlite:///{tmp_path}/a b%23%3F%25.db"
    migrate(plain)
    migrate(f"{plain}?cache=private&uri=true")
    assert {path.name.partition("-")[0] for path in tmp_path.iterdir()} == {"a b#?%.db"}


def claim_and_release(url: str, owner: str, began: threading.Barrier, seconds: float) -> float:
    """Claim and release without a pause; return how long the longest call took."""
    longest_s = 0.0
    with LeaseStore(url) as store:
        began.wait(60)
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            before_s = time.monotonic()
            claimed = store.claim(owner=owner, ttl=timedelta(minutes=5), limit=50)
            longest_s = max(longest_s, time.monotonic() - before_s)
            for lease in claimed:
                before_s = time.monotonic()
                assert store.release(lease)
                longest_s = max(longest_s, time.monotonic() - before_s)
    return longest_s


@pytest.mark.long(12)
def test_of_eight_processes_that_write_to_a_file_none_is_kept_waiting(sqlite_url: str) -> None:
    with LeaseStore(sqlite_url) as store:
        store.register(f"s{number:03}" for number in range(400))
    spawn = multiprocessing.get_context("spawn")
    with spawn.Manager() as manager, ProcessPoolExecutor(8, spawn) as processes:
        began = manager.Barrier(8)
        calls = [processes.submit(claim_and_release, sqlite_url, f"w{n}", began, 6) for n in range(8)]
        longest_s = max(call.result(120) for call in calls)  # raises what a store has raised
    assert longest_s < 4  # by SQLite's own timeout, which looks ten times a second, 5 to 10


def test_waiting_for_a_locked_file_ends_with_retry_for(sqlite_url: str) -> None:
    other = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with LeaseStore(sqlite_url, retry_for=timedelta(seconds=0.3)) as store:
        began_s = time.monotonic()
        with pytest.raises(StoreUnavailable, match="is locked by another process's transaction; try again"):
            store.acquire("a", owner="one", ttl=TTL)
        assert 0.3 <= time.monotonic() - began_s < 4
        assert store.get("a") is None, "who only reads waits for nobody"
        other.execute("ROLLBACK")
        assert store.acquire("a", owner="one", ttl=TTL) is not None
    other.close()


def test_a_locked_file_is_unavailable(sqlite_url: str) -> None:
    other = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    engine = engines.create_engine(sqlite_url).execution_options(**{engines.BUSY_OPTION: 1})
    with LeaseStore(engine, retry_for=BRIEFLY) as store:
        with pytest.raises(StoreUnavailable, match="is locked by another process's transaction; try again"):
            store.acquire("a", owner="one", ttl=TTL)
    other.close()
    engine.dispose()


# --- pools -------------------------------------------------------------------------------------------------------


def test_an_exhausted_pool_is_unavailable(url: str) -> None:
    engine = create_engine(
        url.replace("postgresql:", "postgresql+psycopg:"),
        poolclass=QueuePool, pool_size=1, max_overflow=0, pool_timeout=0.01,
    )  # fmt: skip
    with LeaseStore(engine, retry_for=BRIEFLY) as store:
        assert store.get("a") is None
        with engine.connect(), pytest.raises(StoreUnavailable, match="all of the pool are in use; end transactions"):
            store.get("a")
        assert store.get("a") is None
    engine.dispose()


def test_a_database_in_memory_serves_threads_in_turn() -> None:
    with LeaseStore("sqlite://") as store:
        store.migrate()
        assert store.acquire("a", owner="one", ttl=TTL) is not None
        assert isinstance(store.base_engine.pool, QueuePool)
        assert store.base_engine.pool.size() == 1
        assert engines.dedicated(store.base_engine) is store.base_engine


# --- what an engine is like ----------------------------------------------------------------------------------------


def threshold_of(engine: Engine) -> int | None:
    with engine.connect() as connection:
        driver: psycopg.Connection[Any] | None = connection.connection.driver_connection
        assert driver is not None
        return driver.prepare_threshold


@pytest.mark.parametrize(("given", "used"), [("none", None), ("None", None), ("0", 0), ("7", 7)])
def test_prepare_threshold_in_the_url_is_psycopgs(postgresql_url: str, given: str, used: int | None) -> None:
    url = f"{postgresql_url}?prepare_threshold={given}"
    engine = engines.create_engine(url)
    assert threshold_of(engine) == used
    again = engines.dedicated(engine)
    assert threshold_of(again) == used
    engine.dispose()
    again.dispose()


def test_prepare_threshold_in_the_url_reaches_async_connections_too(postgresql_url: str) -> None:
    async def run() -> int | None:
        engine = engines.create_async_engine(f"{postgresql_url}?prepare_threshold=none")
        beside = engines.dedicated(engine.sync_engine)
        assert threshold_of(beside) is None
        beside.dispose()
        async with engine.connect() as connection:
            raw = await connection.get_raw_connection()
            threshold: int | None = raw.driver_connection.prepare_threshold  # type: ignore[union-attr]
        await engine.dispose()
        return threshold

    assert asyncio.run(run()) is None


def test_options_of_the_url_win_over_those_of_leases(postgresql_url: str) -> None:
    engine = engines.create_engine(f"{postgresql_url}?connect_timeout=3&application_name=mine")
    with engine.connect() as connection:
        assert connection.scalar(text("SHOW application_name")) == "mine"
        driver = connection.connection.driver_connection
        assert driver is not None
        assert driver.info.get_parameters()["connect_timeout"] == "3"
    engine.dispose()


def test_a_session_says_who_it_is(postgresql_url: str) -> None:
    engine = engines.create_engine(postgresql_url)
    with engine.connect() as connection:
        assert connection.scalar(text("SHOW application_name")) == "leases"
        assert connection.scalar(text("SHOW transaction_isolation")) == "read committed"
    engine.dispose()


def test_a_sqlite_token_survives_a_power_cut(sqlite_url: str) -> None:
    engine = engines.create_engine(sqlite_url)
    with engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2, "FULL"
    engine.dispose()


def callers_engine(url: str, begins: str) -> Engine:
    engine = create_engine(url)
    if begins == "late":  # the recipe of SQLAlchemy's own pages

        @event.listens_for(engine, "connect")
        def connect(connection: Any, _record: object) -> None:
            connection.isolation_level = None

        @event.listens_for(engine, "begin")
        def begin(connection: Connection) -> None:
            connection.exec_driver_sql("BEGIN")

    return engine


@pytest.mark.parametrize("begins", ["by itself", "late"])
def test_transactions_on_a_callers_sqlite_engine_begin_as_writers_and_the_callers_own_do_not(
    sqlite_url: str, begins: str
) -> None:
    engine = callers_engine(sqlite_url, begins)
    other = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None, timeout=0)
    with LeaseStore(engine) as store:
        with store.engine.begin():
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                other.execute("BEGIN IMMEDIATE")
        with engine.begin() as connection:
            connection.execute(text("SELECT 1"))
            other.execute("BEGIN IMMEDIATE")
            other.execute("ROLLBACK")
        assert store.acquire("a", owner="one", ttl=TTL) is not None
    other.close()
    engine.dispose()


# --- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cause", "kind"),
    [
        (psycopg.errors.SerializationFailure("x"), StoreUnavailable),
        (psycopg.errors.DeadlockDetected("x"), StoreUnavailable),
        (psycopg.errors.AdminShutdown("x"), StoreUnavailable),
        (psycopg.errors.CannotConnectNow("x"), StoreUnavailable),
        (psycopg.errors.TooManyConnections("x"), StoreUnavailable),
        (psycopg.errors.ConnectionFailure("x"), StoreUnavailable),
        (psycopg.OperationalError("the connection is closed"), StoreUnavailable),
        (psycopg.errors.UndefinedTable("x"), SchemaOutdated),
        (psycopg.errors.UndefinedColumn("x"), SchemaOutdated),
        (psycopg.errors.InvalidSchemaName("x"), SchemaOutdated),
        (psycopg.errors.InsufficientPrivilege("x"), StoreError),
        (psycopg.errors.CheckViolation("x"), StoreError),
        (psycopg.errors.ReadOnlySqlTransaction("x"), StoreError),
        (psycopg.errors.DiskFull("x"), StoreError),
        (sqlite3.OperationalError("no such table: leases"), SchemaOutdated),
        (sqlite3.OperationalError("no such column: x"), SchemaOutdated),
        (sqlite3.IntegrityError("x"), StoreError),
    ],
)
def test_a_drivers_error_becomes_ours_by_what_can_be_done(cause: Exception, kind: type[LeasesError]) -> None:
    url = make_url("sqlite:///x" if isinstance(cause, sqlite3.Error) else "postgresql+psycopg://user@host/db")
    error = faults.translate(DBAPIError("SELECT 1", {}, cause), url)
    assert type(error) is kind
    assert engines.describe(url) in str(error)
