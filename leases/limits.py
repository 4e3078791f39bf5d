"""What an argument may be: each check returns the value or raises `ConfigError`; nothing is sent anywhere.

The same limits stand as CHECKs in the schema; they are checked here first because the message can then say
what to do, and because SQLite accepts a NUL in text and PostgreSQL's driver does not.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

from leases.errors import ConfigError

MAX_TTL = timedelta(hours=24)
"""The longest lease. An `expires_at` further away than this is a clock that was set back: it counts as expired."""

MIN_TTL = timedelta(milliseconds=10)
"""The shortest lease: SQLite's clock counts milliseconds, and a heartbeat needs some."""

MAX_TOKEN = 2**63 - 1

_FORBIDDEN = {
    "Cc": "a control character",
    "Cs": "a lone surrogate",
    "Zl": "a line break",
    "Zp": "a line break",
}


def stream_id(value: str) -> str:
    """Return `value` if it can name a stream: 1 to 255 characters, none of them NUL or another control character."""
    return _name("stream_id", value)


def owner(value: str) -> str:
    """Return `value` if it can name an owner: the same rule as for a stream_id."""
    return _name("owner", value)


def pool(value: str) -> str:
    """Return `value` if it can name a pool: the same rule as for a stream_id."""
    return _name("pool", value)


def event_id(value: str) -> str:
    """Return `value` if it can name an event: the same rule as for a stream_id."""
    return _name("event_id", value)


def schema(value: str) -> str:
    """Return `value` if it can name a PostgreSQL schema: at most 63 bytes, which the server would cut off silently."""
    _name("schema", value)
    if len(value.encode()) > 63:
        raise ConfigError(f"schema must have 63 bytes at most, this one has {len(value.encode())}")
    if "$$" in value or value.startswith("pg_"):
        raise ConfigError("schema must not begin with pg_, nor hold $$; choose another name")
    return value


def _name(what: str, value: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{what} must be text, not {type(value).__name__}")
    if not 1 <= len(value) <= 255:
        raise ConfigError(f"{what} must have 1 to 255 characters, this one has {len(value)}")
    for position, character in enumerate(value):
        why = _FORBIDDEN.get(unicodedata.category(character))
        if why:
            raise ConfigError(f"{what} holds {why} (U+{ord(character):04X}) at position {position}; remove it")
    return value


def stream_ids(values: Iterable[str]) -> list[str]:
    """Return stream_ids, each once and in order, if every one can name a stream; a text alone is not a list of them."""
    if isinstance(values, str):
        raise ConfigError(f"stream_ids must be a list of texts, not one text; write [{values!r}]")
    return sorted({stream_id(value) for value in values})


def ttl(value: timedelta | float) -> timedelta:
    """Return a time-to-live (a `timedelta`, or seconds) if it is between MIN_TTL and MAX_TTL, both included."""
    if isinstance(value, timedelta):
        result = value
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"ttl must be a timedelta or seconds, not {type(value).__name__}")
    elif not abs(value) <= 1e9:  # so also NaN
        raise ConfigError(f"ttl must be a time between {MIN_TTL.total_seconds():g} s and 24 h, not {_shown(value)}")
    else:
        result = timedelta(seconds=value)
    if not MIN_TTL <= result <= MAX_TTL:
        raise ConfigError(
            f"ttl must be between {MIN_TTL.total_seconds():g} s and 24 h, not {result.total_seconds():g} s"
        )
    return result


def fencing_token(value: int) -> int:
    """Return `value` if it can be a fencing token: an integer from 0 to 2**63 - 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"a fencing token is an integer, not {_shown(value)}")
    if not 0 <= value <= MAX_TOKEN:
        raise ConfigError(f"a fencing token is between 0 and 2**63 - 1, not {_shown(value)}")
    return value


def text(what: str, value: str, *, longest: int = 2000) -> str:
    """Return free text (a reason, an error) that both engines can store: no NUL, no lone surrogate."""
    if not isinstance(value, str):
        raise ConfigError(f"{what} must be text, not {type(value).__name__}")
    if len(value) > longest:
        raise ConfigError(f"{what} may have {longest} characters, this one has {len(value)}")
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise ConfigError(f"{what} holds a NUL or a lone surrogate; remove it")
    return value


def count(what: str, value: int, *, least: int = 1, most: int = 1_000_000) -> int:
    """Return an integer between `least` and `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConfigError(f"{what} must be an integer between {least} and {most}, not {_shown(value)}")
    return value


def _shown(value: object) -> str:
    """What was given, short enough for a message; Python writes no integer of more than 4300 digits."""
    try:
        shown = repr(value)
    except ValueError:
        return "a number of thousands of digits"
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


_ESCAPED_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


def document(what: str, value: Any) -> str:
    """Return `value` as JSON text that both engines store alike: no NaN, no NUL, no lone surrogate."""
    try:
        result = json.dumps(value, allow_nan=False, ensure_ascii=False)
        result.encode()
    except (TypeError, ValueError, RecursionError) as error:  # UnicodeEncodeError is a ValueError
        raise ConfigError(f"{what} cannot be stored as JSON: {type(error).__name__}: {error}") from None
    if _ESCAPED_NUL.search(result):
        raise ConfigError(f"{what} holds a NUL (U+0000) in a text; remove it")
    return result
