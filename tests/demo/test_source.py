"""The file: what is read, what is refused, and how that is said."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path

import pytest

from leases import Event
from leases.cli.demo.source import BadFile, Feed, Source, SourceEvent

GOOD = b"id,from,to,note\n1,a,b,x\n2,a,c,\n\n3,a,b,\xc3\xa9\n"


def source(directory: Path, content: bytes, stream_by: Sequence[str] = ("from", "to"), id_by: str = "id") -> Source:
    file = directory / "file.csv"
    file.write_bytes(content)
    return Source(file, stream_by, (id_by,))


def test_rows_become_events_of_their_streams_in_the_order_of_the_file(tmp_path: Path) -> None:
    events = list(source(tmp_path, GOOD).events())
    assert [(e.stream_id, e.position, e.event_id) for e in events] == [
        ("a-b", 1, "1"),
        ("a-c", 1, "2"),
        ("a-b", 2, "3"),
    ]
    assert events[2].payload == {"id": "3", "from": "a", "to": "b", "note": "é"}


@pytest.mark.parametrize(
    "content", [gzip.compress(GOOD, mtime=0), b"\xef\xbb\xbf" + GOOD, GOOD.replace(b"\n", b"\r\n")]
)
def test_gzip_a_byte_order_mark_and_crlf_make_no_difference(tmp_path: Path, content: bytes) -> None:
    assert list(source(tmp_path, content).events()) == list(source(tmp_path, GOOD).events())


def test_the_shipped_flights_are_all_there() -> None:
    events = list(Source(None, ("origin", "dest"), ("time_hour", "carrier", "flight")).events())
    assert len(events) == 6099
    assert len({event.stream_id for event in events}) == 186


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"id,from,to\n", "has a header and no rows"),
        (b"id,to\n1,b\n", "no column 'from'; it has id, to"),
        (b"id,from,to,id\n1,a,b,1\n", "two columns named 'id'"),
        (b"id,from,to\n1,a,b\n2,a,b\n1,c,d\n", "'1' is on line 2 and on line 4"),
        (b"id,from,to\n1,a\n", "line 2: 2 fields, but 3 columns"),
        (b"id,from,to\n1,a,b,c\n", "line 2: 4 fields, but 3 columns"),
        (b"id,from,to\n1,a\xff,b\n", "not UTF-8"),
        (b'id,from,to\n1,a,"b\n', "no proper CSV"),
        (b"id,from,to\n1,a\x00,b\n", "line 2: "),
        (b"id,from,to\n1,a\x1b,b\n", "line 2: stream_id holds a control character"),
        (b"id,from,to\n1," + b"a" * 300 + b",b\n", "line 2: stream_id must have 1 to 255 characters"),
        (b"id,from,to\n,a,b\n", "line 2: event_id must have 1 to 255 characters"),
        (b"id,from,to\n1," + b"a" * 200_000 + b",b\n", "no proper CSV"),
        (b"id,from,to\n1,a-b,c\n2,a,b-c\n", "both make 'a-b-c'"),
        (gzip.compress(GOOD, mtime=0)[:-12], "broken gzip"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_its_reason(tmp_path: Path, content: bytes, said: str) -> None:
    with pytest.raises(BadFile) as refusal:
        list(source(tmp_path, content).events())
    assert said in str(refusal.value)
    assert "file.csv" in str(refusal.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for place in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(BadFile, match="cannot read"):
            list(Source(place, ("from",), ("id",)).events())


def test_a_feed_gives_a_stream_out_in_batches(tmp_path: Path) -> None:
    given = [SourceEvent("s", position, str(position), {"n": str(position)}) for position in range(1, 6)]
    Feed.make(tmp_path / "feed.db", [*given, SourceEvent("other", 1, "6", {})]).close()
    with Feed.open(tmp_path / "feed.db") as feed:
        assert feed.streams() == {"s": 5, "other": 1}
        assert feed.length("s") == 5
        assert feed.read("s", after=2, limit=2) == [Event("3", {"n": "3"}), Event("4", {"n": "4"})]
        assert feed.read("s", after=5, limit=2) == []
