"""Bring a database's tables to the version of this code, with the migration scripts that the package carries."""

from __future__ import annotations

from importlib.resources import as_file, files

from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, inspect, text
from tenacity import retry, retry_if_exception, stop_after_delay, wait_random

from alembic import command
from leases.engine import is_busy
from leases.errors import ConfigError, SchemaOutdated
from leases.schema import VERSION, VERSION_TABLE

MIGRATION_LOCK = 0x6C65617365730001
"""The advisory lock's key: "leases", and 1."""


def migrate(engine: Engine, *, schema: str | None = None) -> tuple[str | None, str]:
    """Upgrade to this code's version; return the versions before and after. A second call is harmless.

    One transaction under a lock: of two processes that migrate at once one does it, and the other waits and finds
    it done; a failure leaves everything as it was. On PostgreSQL a `schema` that does not exist is created.
    """
    with engine.connect() as connection:
        return migrate_on(connection, schema=schema)


def migrate_on(connection: Connection, *, schema: str | None = None) -> tuple[str | None, str]:
    """`migrate`, on a connection that has no transaction open; so also by `run_sync` on an async one."""
    if connection.dialect.name == "sqlite":
        if schema is not None:
            raise ConfigError("schema= is for PostgreSQL; SQLite has one schema per file")
        _use_wal(connection)
    with as_file(files("leases").joinpath("migrations")) as scripts, connection.begin():
        lock(connection)
        if schema is not None:
            quoted = connection.dialect.identifier_preparer.quote_identifier(schema)
            connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {quoted}"))
        config = Config()
        config.set_main_option("script_location", str(scripts).replace("%", "%%"))
        config.attributes.update(connection=connection, schema=schema)
        before = version(connection, schema)
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            if before is not None and before not in _known(config):
                raise SchemaOutdated(_newer(before)) from None
            raise SchemaOutdated(f"the migration failed: {error}") from None
        return before, VERSION


@retry(retry=retry_if_exception(is_busy), wait=wait_random(0.01, 0.05), stop=stop_after_delay(10), reraise=True)
def _use_wal(connection: Connection) -> None:
    """Switch the file to write-ahead logging, for good: readers no longer wait for the writer."""
    cursor = connection.connection.cursor()  # not by SQLAlchemy: it would begin a transaction
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.close()


def lock(connection: Connection) -> None:
    """Let one process migrate at a time, to the end of its transaction (BEGIN IMMEDIATE does it on SQLite)."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})


def _known(config: Config) -> set[str]:
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
    place = "" if schema is None else connection.dialect.identifier_preparer.quote_identifier(schema) + "."
    found: str | None = connection.scalar(text(f"SELECT version_num FROM {place}{VERSION_TABLE}"))
    return found


def check(connection: Connection, schema: str | None = None) -> None:
    """Raise `SchemaOutdated`, with what to do, unless the tables are of this code's version."""
    found = version(connection, schema)
    if found is None:
        raise SchemaOutdated("this database has no lease tables; run `leases migrate`")
    if found < VERSION:
        raise SchemaOutdated(
            f"the tables are of version {found}, older than this code's {VERSION}; run `leases migrate`"
        )
    if found > VERSION:
        raise SchemaOutdated(_newer(found))
