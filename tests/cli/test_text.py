"""How values read to a person, and how what a person typed is read."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from leases.cli.text import ago, duration, parse_duration, parse_time, scrub, shown

NOW = datetime(2026, 3, 1, 14, 2, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (0.44, "0.4 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 m"),
        (250, "4 m 10 s"),
        (3600, "1 h"),
        (7500, "2 h 5 m"),
        (3 * 86400 + 4 * 3600, "3 d 4 h"),
        (-12, "-12 s"),
    ],
)
def test_a_duration_reads_as_people_say_it(seconds: float, text: str) -> None:
    assert duration(timedelta(seconds=seconds)) == text


def test_an_instant_is_told_from_now() -> None:
    assert ago(NOW - timedelta(minutes=4), NOW) == "4 m ago"
    assert ago(NOW + timedelta(seconds=12), NOW) == "in 12 s"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30d", 30 * 86400), ("12h", 43200), ("90m", 5400), ("45s", 45), ("45", 45), ("1.5s", 1.5), ("500ms", 0.5)],
)
def test_a_duration_is_read_by_its_unit(text: str, seconds: float) -> None:
    assert parse_duration(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["", "x", "nan", "inf", "-1", "1e9", "1w", "9" * 400, "9999999d", "d", "٣s"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    assert parse_duration(text) is None


def test_a_time_with_a_zone_is_taken_as_it_is() -> None:
    assert parse_time("2026-03-01T14:02:00+01:00", NOW) == (datetime(2026, 3, 1, 13, 2, tzinfo=UTC), None)
    assert parse_time("2026-03-01T14:02:00Z", NOW) == (datetime(2026, 3, 1, 14, 2, tzinfo=UTC), None)


def test_a_time_without_a_zone_is_utc_and_says_so() -> None:
    read = parse_time("2026-03-01 14:02", NOW)
    assert read is not None
    assert read[0] == datetime(2026, 3, 1, 14, 2, tzinfo=UTC)
    assert "UTC is assumed" in str(read[1])


def test_a_clock_time_is_of_the_last_day() -> None:
    before, after = parse_time("14:02", NOW), parse_time("14:03", NOW)
    assert before is not None
    assert after is not None
    assert before[0] == datetime(2026, 3, 1, 14, 2, tzinfo=UTC)
    assert after[0] == datetime(2026, 2, 28, 14, 3, tzinfo=UTC)


@pytest.mark.parametrize("text", ["", "noon", "25:00", "14:60", "2026-13-01", "0001-01-01T00:00:00+14:00"])
def test_what_is_no_time_is_refused(text: str) -> None:
    assert parse_time(text, NOW) is None


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("orders/7", "orders/7"),
        ("ストリーム é 🛫", "ストリーム é 🛫"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("two\nlines\r", "two\\x0alines\\x0d"),
        ("a\u202eb", "a\\u202eb"),
        ("\x9b31m", "\\x9b31m"),
        ("\udcff", "\\udcff"),
        ("\U000e0041", "\\U000e0041"),
    ],
)
def test_nothing_that_moves_a_terminal_is_shown(text: str, safe: str) -> None:
    assert shown(text) == safe


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://u:canary-hunter2@host/db",
        "see postgresql://u:x@canary-hunter2@host/db, please",
        "postgresql:/u:canary-hunter2@host/db",
        "host=h password=canary-hunter2 user=u",
        "host=h password = 'canary-hunter2 too'",
        "postgresql://host/db?user=u&password=canary-hunter2&sslmode=require",
        "PGPASSWORD=canary-hunter2",
    ],
)
def test_a_password_is_taken_out(text: str) -> None:
    assert "canary-hunter2" not in scrub(text)
    assert "***" in scrub(text)


def test_a_url_without_a_password_stays() -> None:
    assert scrub("postgresql://leases@host:5432/db") == "postgresql://leases@host:5432/db"
