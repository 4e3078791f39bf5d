"""Which way a store goes: by statements that are transactions by themselves, or by transactions."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

from sqlalchemy import event

from leases import LeaseStore


def pooled(store: LeaseStore) -> Any:
    """The driver's connection that the store uses next; it is the only one. It is in the pool from now on."""
    store._shortcut.let_go()
    connection = store.engine.raw_connection()
    try:
        return connection.driver_connection
    finally:
        connection.close()


def exchanged(store: LeaseStore, deed: Callable[[], object]) -> tuple[int, str]:
    """How often a deed waited for the server, and what was said on the wire."""
    driver = pooled(store)
    with tempfile.TemporaryFile("w+") as file:
        driver.pgconn.trace(file.fileno())
        deed()
        driver.pgconn.untrace()
        file.seek(0)
        said = file.read()
    sent = [line.split("\t") for line in said.splitlines()]
    return sum("F" in line and ("Sync" in line or "Query" in line) for line in sent), said


def in_transactions(store: LeaseStore) -> LeaseStore:
    """The same store, none of whose calls goes the direct way any more: somebody listens."""
    event.listen(store.engine, "before_cursor_execute", lambda *_: None)
    return store


def attempted(store: LeaseStore) -> bool:
    """Whether a call that may go the direct way does."""
    direct = store._shortcut.take()
    if direct is not None:
        direct.give_back()
    return direct is not None
