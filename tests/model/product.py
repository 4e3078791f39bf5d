"""The product, opened for the model: a real `LeaseStore` on one connection, whose answers can be lost on their way.

Each call is the product's own, in transactions of its own that commit. Three things differ, and none is a rule of the
protocol: all transactions use one connection, so that a step costs no more than its statements; a repeated
try does not sleep before it, for time stands still here; and `lose` throws the answer of a transaction away after its
COMMIT, so that the product's own retries have to find out what happened.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from unittest import mock

from sqlalchemy import Connection, MetaData, text

import leases.store
from leases import EventLog, LeaseStore, protect
from leases.errors import OutcomeUnknown
from leases.fencing import watermark_table
from leases.schema import metadata
from leases.transaction import Call, Options, retry_options, transact
from tests.clock import START, Clock, PostgresqlClock, standing
from tests.model.tables import Tables

R = TypeVar("R")

SINKS = ("lease_watermarks", "protected")


class TriedStore(LeaseStore):
    """A store whose answers can be lost."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.log = EventLog(self)
        self.connection = self.engine.connect()
        self.answers_until_loss = 0
        self._loses_this_one = False

    def lose(self, number: int) -> None:
        """Lose the answer of the so-manieth transaction from now on; 0 loses none."""
        self.answers_until_loss = number

    def _retried(self, call: Call[R], options: Options) -> R:
        self.answers_until_loss -= 1
        self._loses_this_one = self.answers_until_loss == 0
        if self._loses_this_one:
            return super()._retried(call, options)
        return self._once(call, 1, options)

    def _once(self, call: Call[R], attempt: int, options: Options) -> R:
        try:
            answer = transact(self.connection, self._tables, call, attempt, {})
        except BaseException:
            # A refused fence leaves its dead transaction in place: a store that closes its connection ends it so.
            transaction = self.connection.get_transaction()
            if transaction is not None:
                transaction.rollback()
            raise
        if self._loses_this_one:
            self._loses_this_one = False
            raise OutcomeUnknown("the answer was lost after COMMIT")
        return answer

    def close(self) -> None:
        self.connection.close()
        super().close()


class Product:
    """A store, its clock and its tables; `reset` makes it a new one."""

    def __init__(self, store: TriedStore, clock: Clock, template: sqlite3.Connection | None) -> None:
        self.store = store
        self.clock = clock
        self._template = template
        self.tables = Tables(store.connection.connection if template else _looker(clock))

    @property
    def on_postgresql(self) -> bool:
        return self._template is None

    def reset(self) -> None:
        """Empty the tables, and put the clock back."""
        if self._template is not None:
            self._template.backup(self.tables.driver)
        else:
            deletions = "; ".join(f"DELETE FROM {table}" for table in (*metadata.tables, *SINKS))
            # In one transaction, and past the guards.
            self.tables.driver.execute(f"BEGIN; SET LOCAL session_replication_role = replica; {deletions}; COMMIT")
        self.clock.set(START)


def _make_sinks(connection: Connection) -> None:
    """Make a sink's table of watermarks, and a table of the user's that is protected."""
    watermark_table(MetaData()).create(connection)
    connection.execute(text("CREATE TABLE protected (stream_id text NOT NULL, fencing_token bigint NOT NULL)"))
    protect(connection, "protected")


def _looker(clock: Clock) -> Any:
    """A connection beside the store's, to look with (PostgreSQL)."""
    assert isinstance(clock, PostgresqlClock)
    return clock.engine.raw_connection()


@contextmanager
def on_sqlite() -> Iterator[Product]:
    """A product on SQLite in memory."""
    with TemporaryDirectory() as directory:
        file = Path(directory, "migrated.db")
        with LeaseStore(f"sqlite:///{file}") as store:
            store.migrate()
            store.run(_make_sinks)
        template = sqlite3.connect(":memory:")
        source = sqlite3.connect(file)
        source.backup(template)
        source.close()
    with standing("sqlite://") as clock, _hasty(), TriedStore("sqlite://") as tried:
        yield Product(tried, clock, template)
    template.close()


@contextmanager
def on_postgresql(url: str) -> Iterator[Product]:
    """A product on a migrated database of PostgreSQL, which must not be used for anything else: it is emptied."""
    with standing(url) as clock, _hasty(), TriedStore(url) as tried:
        tried.run(_make_sinks)
        product = Product(tried, clock, None)
        yield product
        product.tables.close()


@contextmanager
def _hasty() -> Iterator[None]:
    def options(retry_for: timedelta) -> dict[str, Any]:
        return {**retry_options(retry_for), "sleep": lambda _: None}

    with mock.patch.object(leases.store, "retry_options", options):
        yield
