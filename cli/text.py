"""Pure: how values read to a person, and how what a person typed is read.

Two promises. `shown` lets no character from a database reach the terminal that could move its cursor, colour it, or
turn its text around. `scrub` takes passwords out of whatever is about to be printed.
"""

from __future__ import annotations

import re
import unicodedata
from datetime import UTC, datetime, timedelta

_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})

_USERINFO = re.compile(r"(:/{1,3})[^\s/:@]*:[^\s]*@")
_NAMED = re.compile(r"(?i)(pass(?:word|wd)?\s*[=:]\s*)('[^']*'|\"[^\"]*\"|[^\s&'\"]+)")


def shown(text: str) -> str:
    """Return text that is safe on a terminal and stays on one line: escapes stand for what cannot be seen."""
    return "".join(
        _escaped(character) if unicodedata.category(character) in _HIDDEN else character for character in text
    )


def _escaped(character: str) -> str:
    number = ord(character)
    if number < 0x100:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def scrub(text: str) -> str:
    """Take what looks like a password out of a message: of a URL, or `password=…`."""
    return _NAMED.sub(r"\1***", _USERINFO.sub(r"\1***@", text))


# --- durations and times -----------------------------------------------------------------------------------------

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)?", re.ASCII)
_LONGEST_S = 36_500 * 86400.0


def parse_duration(text: str) -> timedelta | None:
    """Read `30d`, `12h`, `90m`, `45s`, `500ms`, or a number of seconds; None if it is none of them."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        return None
    seconds = float(match[1]) * _UNITS[match[2] or "s"]
    return timedelta(seconds=seconds) if seconds <= _LONGEST_S else None


def duration(value: timedelta) -> str:
    """Write a duration as people say it, by its two greatest units: `3.2 s`, `4 m 10 s`, `2 h 5 m`, `3 d 4 h`."""
    seconds = value.total_seconds()
    sign = "-" if seconds < 0 else ""
    seconds = abs(seconds)
    if seconds < 9.95:
        return f"{sign}{seconds:.1f} s"
    whole = round(seconds)
    for size, big, small, per in ((86400, "d", "h", 3600), (3600, "h", "m", 60), (60, "m", "s", 1)):
        if whole >= size:
            rest = whole % size // per
            return f"{sign}{whole // size} {big}" + (f" {rest} {small}" if rest else "")
    return f"{sign}{whole} s"


def ago(then: datetime, now: datetime) -> str:
    """Write how long ago an instant was, or in how long it will be."""
    age = now - then
    return f"in {duration(-age)}" if age < timedelta(0) else f"{duration(age)} ago"


_CLOCK = re.compile(r"([01]?\d|2[0-3]):([0-5]\d)(?::([0-5]\d))?", re.ASCII)


def parse_time(text: str, now: datetime) -> tuple[datetime, str | None] | None:
    """Read an ISO time, or `HH:MM` of the last 24 hours; with it a note of what was assumed. None if it is neither."""
    text = text.strip()
    clock = _CLOCK.fullmatch(text)
    if clock is not None:
        hour, minute, second = (int(part or 0) for part in clock.groups())
        at = now.astimezone(UTC).replace(hour=hour, minute=minute, second=second, microsecond=0)
        if at > now:
            at -= timedelta(days=1)
        return at, f"{text} is read as {at:%Y-%m-%d %H:%M:%S} UTC"
    try:
        at = datetime.fromisoformat(text)
        if at.tzinfo is not None:
            return at.astimezone(UTC), None
    except (ValueError, OverflowError):
        return None
    return at.replace(tzinfo=UTC), f"{text} has no time zone: UTC is assumed"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
