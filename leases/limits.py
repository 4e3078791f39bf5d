"""What an argument may be: each check returns the value or raises `ConfigError`; nothing is sent anywhere.

The same limits stand as CHECKs in the schema; they are checked here first because the message can then say
what to do, and because SQLite accepts a NUL in text and PostgreSQL's driver does not.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from leases.errors import ConfigError
from leases.model import JSON, Ending, Event, Lease, Membership, State

MAX_TTL = timedelta(hours=24)
"""The longest lease. An `expires_at` further away than this is a clock that was set back: it counts as expired."""

MIN_TTL = timedelta(milliseconds=10)
"""The shortest lease: SQLite's clock counts milliseconds, and a heartbeat needs some."""

MAX_DURATION = timedelta(days=366)
"""The longest wait, pause or backoff; what is more is a mistake, and some clocks cannot count it."""

MAX_TOKEN = 2**63 - 1
"""The greatest integer that both engines store."""

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
    if value.isprintable():  # and so without any that is forbidden: a heartbeat asks this of thousands of names
        return value
    for position, character in enumerate(value):
        why = _FORBIDDEN.get(unicodedata.category(character))
        if why:
            raise ConfigError(f"{what} holds {why} (U+{ord(character):04X}) at position {position}; remove it")
    return value


def stream_ids(values: Iterable[str]) -> list[str]:
    """Return stream_ids, each once and in order, if every one can name a stream; a text alone is not a list of them."""
    if isinstance(values, str):
        raise ConfigError(f"stream_ids must be a list of texts, not one text; write [{values!r}]")
    return sorted({stream_id(value) for value in _many("stream_ids", values)})


def _many(what: str, values: Any) -> Iterable[Any]:
    if not isinstance(values, Iterable):
        raise ConfigError(f"{what} must be a list, not {type(values).__name__}")
    return values


def lease(value: Lease) -> Lease:
    """Return `value` if it can be a grant: whatever names one to the database calls this first."""
    if not isinstance(value, Lease):
        raise ConfigError(f"a lease is what acquire and claim return, not {type(value).__name__}")
    _name("stream_id", value.stream_id)
    _name("owner", value.owner)
    fencing_token(value.fencing_token)
    return value


def leases(values: Iterable[Lease]) -> list[Lease]:
    """Return a list of the leases, if each can be a grant."""
    given = list(_many("leases", values))
    return given if _sound(given) else [lease(value) for value in given]


def _sound(given: list[Any]) -> bool:
    """Whether all leases of a batch can be grants, looked at as a whole: a heartbeat has tens of thousands of them."""
    if any(type(value) is not Lease for value in given):
        return False
    names = [value.stream_id for value in given] + [value.owner for value in given]
    tokens = [value.fencing_token for value in given]
    return (
        all(type(name) is str for name in names)
        and all(type(token) is int for token in tokens)
        and all(map(str.isprintable, names))
        and min(map(len, names), default=1) >= 1
        and max(map(len, names), default=1) <= 255
        and min(tokens, default=0) >= 0
        and max(tokens, default=0) <= MAX_TOKEN
    )


def endings(values: Iterable[Ending]) -> list[Ending]:
    """Return a list of the grants to let go, if each can be one."""
    given = list(_many("endings", values))
    for value in given:
        if not isinstance(value, Ending):
            raise ConfigError(f"an ending is an Ending, not {type(value).__name__}")
        lease(value.lease)
        backoff_s(value.backoff)
        if value.error is not None:
            text("error", value.error)
    return given


def events(values: Iterable[Event] | Mapping[str, JSON]) -> Iterator[tuple[str, JSON]]:
    """The events' ids and payloads, if every id can name an event. Of a payload `payload` and `payloads` tell."""
    pairs = values.items() if isinstance(values, Mapping) else map(_event, _many("events", values))
    return ((event_id(name), payload) for name, payload in pairs)


def payload(name: str, value: JSON) -> str:
    """Return an event's payload as JSON text."""
    return document(f"the payload of event {name!r}", value)


def payloads(pairs: Sequence[tuple[str, JSON]]) -> str:
    """Return events as one JSON text, an array of arrays of id and payload."""
    try:
        return document("a batch of events", pairs)
    except ConfigError:
        for pair in pairs:
            payload(*pair)  # which of them it is
        raise


def _event(value: Event) -> tuple[str, JSON]:
    if not isinstance(value, Event):
        raise ConfigError(f"events must be Events, or a mapping of event_id to payload, not {type(value).__name__}")
    return value.event_id, value.payload


def member(value: Membership) -> Membership:
    """Return what a process says of itself, if it can stand in the table of workers."""
    if not isinstance(value, Membership):
        raise ConfigError(f"a member is a Membership, not {type(value).__name__}")
    owner(value.worker_id)
    text("host", value.host)
    text("version", value.version)
    count("pid", value.pid, least=0, most=MAX_TOKEN)
    if value.pool is not None:
        pool(value.pool)
    if value.capacity is not None:
        count("capacity", value.capacity, least=0)
    weight(value.weight)
    return value


def weight(value: float) -> float:
    """Return a worker's weight as a float: more than 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1e6:
        raise ConfigError(f"weight must be a number greater than 0, 1000000 at most, not {_shown(value)}")
    return float(value)


def held(value: int | None) -> int | None:
    """Return how many leases an owner says that it holds, if it says so."""
    return None if value is None else count("held", value, least=0)


def sequence(value: int) -> int:
    """Return the number of an event to read on from; 0 is before the first."""
    return count("after_seq", value, least=0, most=MAX_TOKEN)


def state(value: State | str) -> State:
    """Return a stream's state, by its name."""
    try:
        return State(value)
    except ValueError:
        raise ConfigError(f"state must be one of {', '.join(State)}, not {_shown(value)}") from None


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


def duration(what: str, value: timedelta, *, least: timedelta = timedelta(0)) -> timedelta:
    """Return a `timedelta` between `least` and MAX_DURATION, both included."""
    if not isinstance(value, timedelta):
        raise ConfigError(f"{what} must be a timedelta, not {_shown(value)}")
    if not least <= value <= MAX_DURATION:
        raise ConfigError(
            f"{what} must be between {least.total_seconds():g} s and {MAX_DURATION.days} days, "
            f"not {value.total_seconds():g} s"
        )
    return value


def backoff_s(value: timedelta) -> float:
    """Return how long a stream rests when it is released, in seconds; a negative rest is none."""
    return max(0.0, duration("backoff", value, least=-MAX_DURATION).total_seconds())


def instant(what: str, value: datetime) -> datetime:
    """Return a time that has a zone: the database's times are in UTC."""
    if not isinstance(value, datetime):
        raise ConfigError(f"{what} must be a datetime, not {_shown(value)}")
    if value.tzinfo is None:
        raise ConfigError(f"{what} needs a time zone: the database's times are in UTC")
    return value


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


_JSON = json.JSONEncoder(allow_nan=False, ensure_ascii=False)

_ESCAPED_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


def identifier(what: str, value: str) -> str:
    """Return `value` if it can name a table or a column, or part of one, and be quoted."""
    if not text(what, value, longest=255):
        raise ConfigError(f"{what} is empty")
    if "$leases$" in value:  # it would end the text of the trigger's function
        raise ConfigError(f"{what} holds $leases$; choose another name")
    return value


def document(what: str, value: Any) -> str:
    """Return `value` as JSON text that both engines store alike: no NaN, no NUL, no lone surrogate."""
    try:
        result = _JSON.encode(value)
        result.encode()
    except (TypeError, ValueError, RecursionError) as error:  # UnicodeEncodeError is a ValueError
        raise ConfigError(f"{what} cannot be stored as JSON: {type(error).__name__}: {error}") from None
    if "\\u0000" in result and _ESCAPED_NUL.search(result):
        raise ConfigError(f"{what} holds a NUL (U+0000) in a text; remove it")
    return result
