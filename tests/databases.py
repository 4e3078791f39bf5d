"""Databases of PostgreSQL for tests, each as freshly migrated; used again after a test that changed nothing but rows.

To make one costs the server a fifth of a second, to empty it a fifth of that. A database is used again only if nobody
is connected to it any more, and if its catalog, its settings and the version of its tables are to the letter what they
were at first: else it is dropped.
"""

from __future__ import annotations

import itertools
import time

from sqlalchemy import Connection, Engine, create_engine, make_url, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from leases.schema import VERSION_TABLE, metadata

NUMBER = itertools.count()

FIRST_OF_USERS = 16_384
"""PostgreSQL gives its own objects lower oids."""

LEAVING_S = 0.5

OTHERS = text(
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() "
    "UNION ALL SELECT count(*) FROM pg_prepared_xacts WHERE database = current_database()"
)

# Where a table's rows are, and how many they were at the last ANALYZE, is not its definition.
DEFINITION = text(
    f"""
    SELECT string_agg(line, chr(10) ORDER BY line) FROM (
        SELECT 'class ' || jsonb_strip_nulls(to_jsonb(c) - 'relfilenode' - 'relpages' - 'reltuples' - 'relallvisible'
            - 'relallfrozen' - 'relfrozenxid' - 'relminmxid')::text AS line
            FROM pg_class c WHERE oid >= {FIRST_OF_USERS}
        UNION ALL SELECT 'attribute ' || a::text FROM pg_attribute a WHERE attrelid >= {FIRST_OF_USERS}
        UNION ALL SELECT 'default ' || d::text FROM pg_attrdef d
        UNION ALL SELECT 'constraint ' || c::text FROM pg_constraint c WHERE oid >= {FIRST_OF_USERS}
        UNION ALL SELECT 'index ' || i::text FROM pg_index i WHERE indexrelid >= {FIRST_OF_USERS}
        UNION ALL SELECT 'trigger ' || t::text FROM pg_trigger t
        UNION ALL SELECT 'function ' || p::text FROM pg_proc p WHERE oid >= {FIRST_OF_USERS}
        UNION ALL SELECT 'type ' || t::text FROM pg_type t WHERE oid >= {FIRST_OF_USERS}
        UNION ALL SELECT 'schema ' || n::text FROM pg_namespace n
        UNION ALL SELECT 'extension ' || e::text FROM pg_extension e
        UNION ALL SELECT 'policy ' || p::text FROM pg_policy p
        UNION ALL SELECT 'statistic ' || starelid FROM pg_statistic WHERE starelid >= {FIRST_OF_USERS}
        UNION ALL SELECT 'setting ' || setrole || setconfig::text FROM pg_db_role_setting JOIN pg_database d
            ON d.oid = setdatabase WHERE datname = current_database()
        UNION ALL SELECT 'database ' || datallowconn || datconnlimit || coalesce(datacl::text, '') FROM pg_database
            WHERE datname = current_database()
        UNION ALL SELECT 'version ' || v::text FROM {VERSION_TABLE} v
    ) AS of_all
    """
)


def create(maintenance: Engine, template: str) -> str:
    """Make a database; return its URL."""
    name = f"leases_test_{next(NUMBER)}"
    with maintenance.connect() as connection:
        connection.execute(text(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)"))
        connection.execute(text(f"CREATE DATABASE {name} TEMPLATE {template}"))
    return maintenance.url.set(database=name).render_as_string(hide_password=False)


def drop(maintenance: Engine, url: str) -> None:
    with maintenance.connect() as connection:
        connection.execute(text(f"DROP DATABASE IF EXISTS {url.rpartition('/')[2]} WITH (FORCE)"))


class Databases:
    """Copies of a migrated database, lent to one test after the other."""

    def __init__(self, maintenance: Engine, template: str) -> None:
        self.maintenance = maintenance
        self.template = template
        self.free: list[str] = []
        self._definition: str | None = None

    def lend(self) -> str:
        """The URL of a database with empty tables."""
        return self.free.pop() if self.free else create(self.maintenance, self.template)

    def take_back(self, url: str) -> None:
        """Keep it for the next, if it can be made as it was."""
        if self._made_as_it_was(url):
            self.free.append(url)
        else:
            drop(self.maintenance, url)

    def close(self) -> None:
        while self.free:
            drop(self.maintenance, self.free.pop())

    def _made_as_it_was(self, url: str) -> bool:
        if self._definition is None:
            template = make_url(url).set(database=self.template).render_as_string(hide_password=False)
            self._definition = definition(template)
        engine = create_engine(url, poolclass=NullPool)
        try:
            with engine.connect() as connection:
                if not _left_alone(connection) or connection.scalar(DEFINITION) != self._definition:
                    return False
                connection.exec_driver_sql("SET LOCAL session_replication_role = replica")  # past the guards
                connection.exec_driver_sql(f"TRUNCATE {', '.join(metadata.tables)} RESTART IDENTITY")
                connection.commit()
        except SQLAlchemyError:  # a test may have dropped it, or have let nobody in
            return False
        return True


def _left_alone(connection: Connection) -> bool:
    """Whether all others have left it; the server takes a moment to see that a client has gone."""
    give_up_at = time.monotonic() + LEAVING_S
    while any(connection.execute(OTHERS).scalars()):
        connection.rollback()  # else it would be shown the same
        if time.monotonic() > give_up_at:
            return False
        time.sleep(0.01)
    return True


def definition(url: str) -> str | None:
    """All that a database is, but for the rows of its tables."""
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        found: str | None = connection.scalar(DEFINITION)
    return found
