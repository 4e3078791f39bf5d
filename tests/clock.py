"""A database clock that stands still until a test moves it, so that no test of an expiry sleeps.

The SQL under test stays as it is; the clock's functions are put in the way of the engine's own:

- SQLite: a `strftime` of the test's is registered on every connection that is opened meanwhile; triggers use it too.
- PostgreSQL: functions of the same names in schema public, which the database's search_path puts before pg_catalog, so
  that triggers find them too. Their time is in a sequence, which no transaction's snapshot hides.

Mind that on PostgreSQL a connection opened before the clock keeps the server's own; and that the statement's clock here
moves within a statement, as the server's does not. Races therefore use the real one.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.pool import Pool

START = datetime(2031, 5, 17, 12, 0, 0, tzinfo=UTC)
"""Far from the real time, so that a statement that reads another clock is found out."""


class Clock(ABC):
    """The database's clock, in the test's hand."""

    def __init__(self) -> None:
        self.at = START

    def now(self) -> datetime:
        return self.at

    def advance(self, seconds: float) -> None:
        """Move the clock on; back if negative."""
        self.set(self.at + timedelta(seconds=seconds))

    def set(self, at: datetime) -> None:
        """Put the clock to a time."""
        self.at = at
        self._set()

    @abstractmethod
    def _set(self) -> None: ...


class SqliteClock(Clock):
    """The engine's callback reads it at each call."""

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[tuple[str, ...], str] = {}

    def _set(self) -> None:
        self._said.clear()

    def strftime(self, *asked: str) -> str:
        """SQLite's own, as the product calls it; of one time the same is asked again and again."""
        said = self._said.get(asked)
        if said is None:
            said = self._said[asked] = self._strftime(*asked)
        return said

    def _strftime(self, form: str, when: str, *modifiers: str) -> str:
        assert when == "now", f"the test's clock knows no other time than now: {when}"
        at = self.at
        for modifier in modifiers:
            found = re.fullmatch(r"([+-][0-9.]+) seconds", modifier)
            assert found, f"the test's clock does not know the modifier {modifier!r}"
            at += timedelta(seconds=float(found[1]))
        assert form == "%Y-%m-%d %H:%M:%f", f"the test's clock does not know the format {form!r}"
        return at.strftime("%Y-%m-%d %H:%M:%S.") + f"{at.microsecond // 1000:03}"


class PostgresqlClock(Clock):
    """The time is in a sequence of the database."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.engine = create_engine(url, isolation_level="AUTOCOMMIT")
        database = self.engine.dialect.identifier_preparer.quote_identifier(make_url(url).database or "")
        with self.engine.connect() as connection:
            for statement in (
                "CREATE SEQUENCE public.test_clock",
                *(
                    f"CREATE FUNCTION public.{name}() RETURNS timestamptz LANGUAGE sql {volatility} AS "
                    "'SELECT timestamptz ''epoch'' + last_value * interval ''1 microsecond'' FROM public.test_clock'"
                    for name, volatility in (("statement_timestamp", "STABLE"), ("clock_timestamp", "VOLATILE"))
                ),
                f"ALTER DATABASE {database} SET search_path = public, pg_catalog",
            ):
                connection.execute(text(statement))
        self._set()

    def _set(self) -> None:
        since = self.at - datetime(1970, 1, 1, tzinfo=UTC)
        with self.engine.connect() as connection:
            connection.execute(
                text("SELECT setval('public.test_clock', :at)"), {"at": since // timedelta(microseconds=1)}
            )


@contextmanager
def standing(url: str) -> Iterator[Clock]:
    """Make the clock of a database stand still, for the connections opened from here on."""
    if not url.startswith("sqlite"):
        clock = PostgresqlClock(url)
        yield clock
        clock.engine.dispose()
        return
    local = SqliteClock()

    def connected(connection: Any, _record: Any) -> None:
        if hasattr(connection, "create_function"):
            connection.create_function("strftime", -1, local.strftime)

    event.listen(Pool, "connect", connected)
    try:
        yield local
    finally:
        event.remove(Pool, "connect", connected)
