"""Alembic's entry: one transaction under a lock, so that two processes that migrate at once do it once.

`leases migrate` hands its connection over in `config.attributes`; `alembic upgrade head` in a checkout opens one from
`-x url=…` or $LEASES_DATABASE_URL.
"""

from __future__ import annotations

import os

from sqlalchemy import Connection, text

from alembic import context
from leases.engine import create_engine
from leases.errors import ConfigError
from leases.migrate import lock, use_wal
from leases.schema import VERSION_TABLE, metadata


def migrate(connection: Connection, schema: str | None) -> None:
    lock(connection)
    if schema is not None:
        connection.execute(text("SELECT set_config('search_path', quote_ident(:schema), true)"), {"schema": schema})
    context.configure(
        connection=connection,
        target_metadata=metadata,
        version_table=VERSION_TABLE,
        version_table_schema=schema,
        transactional_ddl=True,
    )
    with context.begin_transaction():
        context.run_migrations()


def run() -> None:
    if context.is_offline_mode():
        raise ConfigError("leases migrates a live database only: its migration takes a lock first")
    attributes = context.config.attributes
    if "connection" in attributes:
        migrate(attributes["connection"], attributes.get("schema"))
        return
    url = context.get_x_argument(as_dictionary=True).get("url") or os.environ.get("LEASES_DATABASE_URL")
    if not url:
        raise ConfigError("name the database: set LEASES_DATABASE_URL, or use `alembic -x url=… upgrade head`")
    with create_engine(url).connect() as connection:
        with connection.begin():
            migrate(connection, None)
        if connection.dialect.name == "sqlite":
            use_wal(connection)


run()
