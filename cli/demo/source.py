"""The file: a CSV, checked whole before anything else happens, and cut into streams of events.

Every fault of the file is a `BadFile`, whose message says where it is and what to do. `events` reads the file; `Feed`
is what the workers read from: the same events, in a small SQLite file of the run's own, so that a worker holds one
batch in memory and not the file.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sqlite3
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Self

from leases import ConfigError, Event, limits

FLIGHTS = "flights-week1.csv.gz"
"""The data that come with the package."""

GZIP = b"\x1f\x8b"


class BadFile(Exception):
    """The file cannot be used; the message says why, where, and what to do."""


@dataclass(frozen=True, slots=True)
class SourceEvent:
    """One row of the file. `position` counts the events of its stream from 1, in the order of the file."""

    stream_id: str
    position: int
    event_id: str
    payload: dict[str, str]


@dataclass(frozen=True, slots=True)
class Source:
    """A file, and the columns that say which stream a row belongs to and what its event is called."""

    file: Path | None
    stream_by: Sequence[str]
    id_by: Sequence[str]

    @property
    def name(self) -> str:
        return FLIGHTS if self.file is None else str(self.file)

    def events(self) -> Iterator[SourceEvent]:
        """Read the file from its beginning, and check it on the way."""
        with self._opened() as text:
            yield from _events(self, text)

    @contextmanager
    def _opened(self) -> Iterator[io.TextIOBase]:
        place: Traversable | Path = files("leases.cli.demo").joinpath(FLIGHTS) if self.file is None else self.file
        try:
            with place.open("rb") as raw:
                zipped = raw.read(2) == GZIP
                raw.seek(0)
                plain = gzip.GzipFile(fileobj=raw) if zipped else raw
                # UTF-8 with or without a byte order mark.
                with io.TextIOWrapper(plain, encoding="utf-8-sig", newline="") as text:
                    yield text
        except UnicodeDecodeError as error:
            raise BadFile(f"{self.name} is not UTF-8 ({error.reason}); save it as UTF-8") from None
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise BadFile(f"{self.name} is a broken gzip file ({error}); make it anew") from None
        except OSError as error:
            raise BadFile(f"cannot read {self.name}: {error.strerror or error}; name a CSV file") from None


def _events(source: Source, text: io.TextIOBase) -> Iterator[SourceEvent]:
    reader = csv.reader(text, strict=True)
    try:
        header = next(reader, None)
        if not header:
            raise BadFile(f"{source.name} is empty; it needs a line with the names of the columns, and rows")
        streams = _Joined(source, header, "--stream-by", source.stream_by)
        ids = _Joined(source, header, "--id-by", source.id_by)
        positions: dict[str, int] = {}
        lines: dict[str, int] = {}
        for row in reader:
            if not row:
                continue
            line = reader.line_num
            if len(row) != len(header):
                raise BadFile(
                    f"{source.name}, line {line}: {len(row)} fields, but {len(header)} columns; mend that row"
                )
            stream_id, event_id = streams.of(row, line), ids.of(row, line)
            if event_id in lines:
                raise BadFile(
                    f"{source.name}: the id {event_id!r} is on line {lines[event_id]} and on line {line}; "
                    "name more columns in --id-by, or remove one of the rows"
                )
            lines[event_id] = line
            payload = dict(zip(header, row, strict=True))
            try:
                limits.stream_id(stream_id)
                limits.event_id(event_id)
                limits.document("the row", payload)
            except ConfigError as error:
                raise BadFile(f"{source.name}, line {line}: {error}") from None
            positions[stream_id] = position = positions.get(stream_id, 0) + 1
            yield SourceEvent(stream_id, position, event_id, payload)
        if not lines:
            raise BadFile(f"{source.name} has a header and no rows; there is nothing to share")
    except csv.Error as error:
        raise BadFile(f"{source.name}, line {reader.line_num}: no proper CSV ({error}); mend it") from None


def _few(names: Sequence[str]) -> str:
    """The names, as many as a line can bear."""
    return ", ".join(names[:30]) + (f" and {len(names) - 30} more" if len(names) > 30 else "")


class _Joined:
    """Joins some columns of a row with `-`, and sees to it that two different rows do not look alike by that."""

    def __init__(self, source: Source, header: Sequence[str], option: str, columns: Sequence[str]) -> None:
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            raise BadFile(f"{source.name} has two columns named {twice[0]!r}; rename one")
        for name in columns:
            if name not in header:
                raise BadFile(f"{option}: {source.name} has no column {name!r}; it has {_few(header)}")
        self._where = f"{option}: {source.name}"
        self._places = [header.index(name) for name in columns]
        self._parts: dict[str, tuple[str, ...]] = {}

    def of(self, row: Sequence[str], line: int) -> str:
        parts = tuple(row[place] for place in self._places)
        joined = "-".join(parts)
        if "-" in joined and len(parts) > 1 and self._parts.setdefault(joined, parts) != parts:
            raise BadFile(
                f"{self._where}, line {line}: {parts} and {self._parts[joined]} both make {joined!r}; "
                "name the columns in another order"
            )
        return joined


class Feed:
    """The events of a file by stream and position, in a SQLite file that the run makes and removes.

    >>> with Feed.make(":memory:", [SourceEvent("EWR-IAH", 1, "UA-1545", {"dest": "IAH"})]) as feed:
    ...     feed.streams(), feed.read("EWR-IAH", after=0, limit=10)
    ({'EWR-IAH': 1}, [Event(event_id='UA-1545', payload={'dest': 'IAH'})])
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._turn = threading.Lock()

    @classmethod
    def make(cls, place: Path | str, events: Iterable[SourceEvent]) -> Self:
        """Write a feed. If the events raise, so does this."""
        connection = sqlite3.connect(place)
        try:
            connection.execute("PRAGMA synchronous = OFF")  # it lives as long as the run
            connection.execute(
                "CREATE TABLE feed (stream_id TEXT, position INTEGER, event_id TEXT, payload TEXT, "
                "PRIMARY KEY (stream_id, position)) WITHOUT ROWID"
            )
            with connection:
                connection.executemany(
                    "INSERT INTO feed VALUES (?, ?, ?, ?)",
                    ((e.stream_id, e.position, e.event_id, limits.document("the row", e.payload)) for e in events),
                )
        except BaseException:
            connection.close()
            raise
        return cls(connection)

    @classmethod
    def open(cls, place: Path) -> Self:
        """Open a feed to read, from any thread."""
        return cls(sqlite3.connect(f"{place.absolute().as_uri()}?mode=ro", uri=True, check_same_thread=False))

    def streams(self) -> dict[str, int]:
        """How many events each stream has."""
        return dict(self._connection.execute("SELECT stream_id, count(*) FROM feed GROUP BY stream_id"))

    def length(self, stream_id: str) -> int:
        """How many events a stream has."""
        with self._turn:
            counted = self._connection.execute("SELECT count(*) FROM feed WHERE stream_id = ?", (stream_id,))
            return int(counted.fetchone()[0])

    def read(self, stream_id: str, *, after: int, limit: int) -> list[Event]:
        """The events of a stream after a position, up to `limit`."""
        with self._turn:
            rows = self._connection.execute(
                "SELECT event_id, payload FROM feed WHERE stream_id = ? AND position > ? ORDER BY position LIMIT ?",
                (stream_id, after, limit),
            ).fetchall()
        return [Event(event_id, json.loads(payload)) for event_id, payload in rows]

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
