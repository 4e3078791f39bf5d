"""Bring a database's tables to the version of this code, with the migration scripts that the package carries."""

from __future__ import annotations

import shlex
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from typing import TYPE_CHECKING

from sqlalchemy import Connection, Engine, column, inspect, select, table, text
from sqlalchemy.schema import CreateSchema
from tenacity import retry, retry_if_exception, stop_after_delay, wait_random

from leases import limits
from leases.engine import BUSY_OPTION, begin_immediate, describe
from leases.errors import ConfigError, SchemaOutdated, StoreUnavailable
from leases.faults import is_busy
from leases.schema import VERSION, VERSION_TABLE

if TYPE_CHECKING:  # alembic is imported where it is used: only a migration has to wait for it
    from alembic.config import Config

MIGRATION_LOCK = 0x6C65617365730001
"""The advisory lock's key: "leases", and 1."""

PATIENCE_MS = 60_000
"""How long to wait on SQLite while another process migrates."""

TURN = threading.Lock()
"""Held while this process migrates: alembic keeps what it works on in globals of the process."""


def migrate(engine: Engine, *, schema: str | None = None) -> tuple[str | None, str]:
    """Upgrade to this code's version; return the versions before and after. A second call is harmless.

    One transaction under a lock: of two processes that migrate at once one does it, and the other waits and finds
    it done; a failure leaves everything as it was, and so does a database whose tables are newer than this code. On
    PostgreSQL a `schema` that does not exist is created.
    """
    with TURN, engine.connect() as connection:
        return migrate_on(connection, schema=schema)


def migrate_on(connection: Connection, *, schema: str | None = None) -> tuple[str | None, str]:
    """`migrate`, on a connection that has no transaction open; so also by `run_sync` on an async one. Hold TURN."""
    from alembic.util import CommandError

    from alembic import command

    if schema is not None:
        limits.schema(schema)
    on_sqlite = connection.dialect.name == "sqlite"
    if on_sqlite:
        if schema is not None:
            raise ConfigError("schema= is for PostgreSQL; SQLite has one schema per file")
        connection = connection.execution_options(**{BUSY_OPTION: PATIENCE_MS})
    else:
        # A snapshot as old as the transaction would not show what was migrated while it waited for the lock.
        connection = connection.execution_options(isolation_level="READ COMMITTED")
    with connection.begin(), _configured() as config:
        if on_sqlite:
            begin_immediate(connection)  # the engine may be the caller's, which begins late or not at all
        lock(connection)
        before = version(connection, schema)
        if before is None or before != VERSION:
            if before is not None and before not in _known(config):
                raise SchemaOutdated(_newer(before))
            if schema is not None:
                connection.execute(CreateSchema(schema, if_not_exists=True))
            config.attributes.update(connection=connection, schema=schema)
            try:
                command.upgrade(config, "head")
            except CommandError as error:
                raise SchemaOutdated(f"the migration failed, and nothing was changed: {error}") from None
    if on_sqlite:
        use_wal(connection)
    return before, VERSION


@contextmanager
def _configured() -> Iterator[Config]:
    from alembic.config import Config

    with as_file(files("leases").joinpath("migrations")) as scripts:
        config = Config()
        config.set_main_option("script_location", str(scripts).replace("%", "%%"))
        yield config


def lock(connection: Connection) -> None:
    """Let one process migrate at a time, to the end of its transaction (BEGIN IMMEDIATE does it on SQLite)."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})


def use_wal(connection: Connection) -> None:
    """Switch a SQLite file to write-ahead logging, for good: readers no longer wait for the writer."""
    try:
        _set_journal_mode(connection)
    except sqlite3.OperationalError as error:
        raise StoreUnavailable(
            f"cannot switch {describe(connection.engine.url)} to write-ahead logging: {error}; try again"
        ) from None


@retry(retry=retry_if_exception(is_busy), wait=wait_random(0.01, 0.05), stop=stop_after_delay(10), reraise=True)
def _set_journal_mode(connection: Connection) -> None:
    cursor = connection.connection.cursor()  # not by SQLAlchemy: it would begin a transaction
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.close()


def _known(config: Config) -> set[str]:
    from alembic.script import ScriptDirectory

    return {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}


def _newer(found: str) -> str:
    return (
        f"the tables are of version {found}, which this code (version {VERSION}) does not know; "
        "upgrade the leases package"
    )


def version(connection: Connection, schema: str | None = None) -> str | None:
    """The version of the tables in a database, or None if there are none."""
    if not inspect(connection).has_table(VERSION_TABLE, schema=schema):
        return None
    found: str | None = connection.scalar(
        select(column("version_num")).select_from(table(VERSION_TABLE, schema=schema))
    )
    return found


def check(connection: Connection, schema: str | None = None) -> None:
    """Raise `SchemaOutdated`, with what to do, unless the tables are of this code's version."""
    found = version(connection, schema)
    if found == VERSION:
        return
    if found is None:
        place, option = (
            ("this database", "") if schema is None else (f"the schema {schema!r}", f" --schema {shlex.quote(schema)}")
        )
        raise SchemaOutdated(f"{place} has no lease tables; run `leases migrate{option}`")
    with _configured() as config:
        known = found in _known(config)
    if not known:
        raise SchemaOutdated(_newer(found))
    raise SchemaOutdated(f"the tables are of version {found}, older than this code's {VERSION}; run `leases migrate`")
