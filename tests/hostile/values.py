"""What is passed: for each parameter that a public function has, good values, odd ones, and impossible ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from itertools import count
from typing import Any
from uuid import UUID

from hypothesis import strategies as st

from leases import Event, Lease
from leases.model import Ending, Membership, State

HUGE = 10**5000
"""An integer that Python itself does not print."""

SQL = "'; DROP TABLE leases; --"
STREAMS = ("held", "free", "paused", "retired", "expired")
"""The streams of the world: see `world`."""


class Opaque:
    """An object that nobody knows."""

    def __repr__(self) -> str:
        return "Opaque()"


class Endless:
    """What says that it is iterable, and fails in the middle."""

    def __iter__(self) -> Any:
        yield "a"
        raise OSError("the caller's own")


ODD_NAMES = (
    "x" * 255,
    SQL,
    "%s %(x)s {0} :name ? $1",
    "\\' \" `",
    "\u202eabc\u2066",  # bidi
    "e\u0301\u200d\U0001f468\u200d\U0001f469",
    "../../etc/passwd",
    " ",
)
BAD_NAMES = ("", "x" * 256, "a\0b", "a\nb", "a\x1b[31mb", "a\x85b", "a\ud800b", "a\u2028b")
NOT_TEXT: tuple[Any, ...] = (None, 7, True, 1.5, b"bytes", ["a"], {"a": 1}, math.nan, HUGE, Opaque())

NAMES: tuple[Any, ...] = (*STREAMS, "w", *ODD_NAMES, *BAD_NAMES, *NOT_TEXT)
FEW_NAMES: tuple[Any, ...] = (
    "w", SQL, ODD_NAMES[2], "", "x" * 256, "a\0b", "a\ud800b", None, 7, b"bytes", ["a"], HUGE, Opaque(),
)  # fmt: skip
"""One of each kind: a function that has forgotten the check falls over one of these."""
SOME_NAMES: tuple[Any, ...] = (
    ["free", "new"],
    [],
    ("a",),
    {"b"},
    "abc",
    [None],
    ["a\0"],
    [b"x"],
    [HUGE],
    None,
    7,
    [["a"]],
)
TEXTS: tuple[Any, ...] = (
    "why", "", SQL, "two\nlines\u202e", "x" * 2001, "a\0b", "\ud800", None, 7, b"bytes", HUGE, Opaque(),
)  # fmt: skip

TTLS = (
    timedelta(seconds=15), 15, 0.01, timedelta(hours=24),
    0, -1, 1e308, math.nan, math.inf, HUGE, timedelta.max, timedelta.min, timedelta(0),
    timedelta(hours=24, microseconds=1),
    "15", b"15", None, True, Decimal(15), 15j, [15], Opaque(),
)  # fmt: skip
WAITS = (timedelta(0), timedelta(microseconds=1), timedelta(-1), timedelta.min, 0, 1.0, "1", None, math.nan, Opaque())
TIMEOUTS: tuple[Any, ...] = (
    timedelta(seconds=5),
    timedelta(0),
    timedelta(-1),
    timedelta.max,
    5,
    "5",
    None,
    math.nan,
    Opaque(),
)
BACKOFFS: tuple[Any, ...] = (
    timedelta(0),
    timedelta(seconds=1),
    timedelta(-1),
    timedelta.max,
    timedelta.min,
    5,
    "5",
    None,
    Opaque(),
)

TOKENS: tuple[Any, ...] = (0, 1, 2, 2**63 - 1, -1, 2**63, HUGE, True, 1.0, "1", None, Opaque())
COUNTS = (1, 100, 0, -1, 1_000_001, 2**63, HUGE, True, 1.5, "5", None, Opaque())
TIMES = (
    datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 1), datetime.max, datetime.min.replace(tzinfo=UTC),
    datetime.max.replace(tzinfo=UTC), date(2026, 1, 1), "2026-01-01", 5, None, math.nan, Opaque(),
)  # fmt: skip
IDENTITIES = (UUID(int=7), None, "7", str(UUID(int=7)), b"7", 7, Opaque())
STATES = ("held", State.FREE, "bogus", "", SQL, "a\0", 5, None, Opaque())
FLAGS = (True, False, None, "yes", 0)


def nested(depth: int) -> Any:
    """Lists in lists."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def circular() -> Any:
    value: list[Any] = []
    value.append(value)
    return value


DOCUMENTS: tuple[Any, ...] = (
    None, {}, {"a": [1, -0.0, 1e308, "ü", None, True]}, 2**63, 10**400, "x" * 100_000, {"'": SQL}, {1: 2}, {None: 1},
    nested(300), nested(3_000), nested(100_000), circular(), math.nan, [math.inf], HUGE, "a\0", {"a\0": 1}, "\ud800",
    {"a": {"\udfff": 1}}, "\\u0000", b"bytes", {1, 2}, {(1, 2): 3}, Opaque(), Decimal(1), datetime(2026, 1, 1),
)  # fmt: skip


def events(number: Any) -> list[Any]:
    """Batches of events. Ids differ, so that what is accepted is also written."""
    return [
        [Event(f"e{next(number)}", document)] for document in DOCUMENTS
    ] + [
        [Event(name, 1)] for name in FEW_NAMES
    ] + [
        {f"e{next(number)}": 1}, {"a\0": 1}, {7: 1}, [], {}, None, 7, "abc", [None], [("e", 1)], [Event("e", 1)] * 3,
        Endless(), Opaque(),
    ]  # fmt: skip


def leases(held: Lease) -> list[Any]:
    """The lease that is held, and forged ones."""
    lengths: tuple[Any, ...] = (timedelta(0), timedelta.max, None, Opaque())
    forged = (
        [replace(held, stream_id=name) for name in ("free", "expired", *FEW_NAMES)]
        + [replace(held, owner=name) for name in FEW_NAMES]
        + [replace(held, fencing_token=token) for token in TOKENS]
        + [replace(held, remaining=length) for length in lengths]
    )
    return [held, *forged, None, "held", 7, {}, Opaque()]


def endings(held: Lease) -> list[Any]:
    """Batches of grants to let go."""
    bad: list[Any] = (
        [Ending(lease) for lease in leases(held)]
        + [Ending(held, backoff=backoff) for backoff in BACKOFFS]
        + [Ending(held, error=error) for error in TEXTS]
    )
    return [
        [Ending(held)],
        [],
        [Ending(held)] * 2,
        *([each] for each in (*bad, held, None, 7)),
        None,
        7,
        "held",
        Endless(),
    ]


def members() -> list[Any]:
    """The rows of processes."""
    good = Membership("w9", "host", 1, "1")
    fields: dict[str, tuple[Any, ...]] = {
        "worker_id": FEW_NAMES, "host": TEXTS, "pid": COUNTS, "version": TEXTS, "pool": FEW_NAMES, "capacity": COUNTS,
        "weight": (0.0, -1.0, math.nan, math.inf, "1", None, HUGE, Opaque()),
    }  # fmt: skip
    return [good, None, "w", Opaque()] + [
        replace(good, **{name: value}) for name, values in fields.items() for value in values
    ]


def parameters(held: Lease) -> Mapping[str, list[Any]]:
    """The values for each name of a parameter; the first of each is good."""
    number = count()
    some = leases(held)
    kinds: dict[str, Any] = {
        "stream_id": (*STREAMS, *FEW_NAMES), "owner": FEW_NAMES, "to": ("w2", *FEW_NAMES),
        "pool": ("default", *FEW_NAMES), "worker_id": ("w9", *FEW_NAMES), "glob": ("*", *FEW_NAMES),
        "after": ("a", *FEW_NAMES), "stream_ids": SOME_NAMES,
        "actor": TEXTS, "reason": TEXTS, "error": (None, *TEXTS), "ttl": TTLS, "wait": WAITS, "timeout": TIMEOUTS,
        "backoff": BACKOFFS, "fencing_token": TOKENS, "before": (TIMES[0], 2, *TOKENS, *TIMES[1:]), "by": COUNTS,
        "limit": COUNTS, "after_seq": TOKENS, "at": TIMES, "claim_id": IDENTITIES, "state": STATES,
        "force": (False, *FLAGS),
        "checkpoint": (None, *DOCUMENTS), "events": events(number), "lease": some,
        "leases": [[held], [], *([each] for each in some), None, "held", 7, Endless()],
        "table": ("work", *FEW_NAMES), "schema": (None, *FEW_NAMES), "lease_schema": (None, *FEW_NAMES),
        "member": members(), "endings": endings(held), "held": (None, *COUNTS), "before_send": (lambda: None, None, 7),
    }  # fmt: skip
    return {name: list(values) for name, values in kinds.items()}


def drawn(values: list[Any]) -> st.SearchStrategy[Any]:
    """One of the values; good ones often, so that a call gets to its end with one bad value among them."""
    return st.one_of(st.just(values[0]), st.just(values[0]), st.sampled_from(values))


TEXT_ARGUMENTS: tuple[str, ...] = (
    *STREAMS, *ODD_NAMES, *BAD_NAMES, *(text for text in TEXTS if isinstance(text, str)),
    "0", "-1", "1", "15s", "1e3", "nan", "inf", "٣", "9" * 5000, "2**63", "--", "-", "--yes", "@/nowhere", "@",
    "2026-01-01", "14:02", "25:61", "9999-12-31T23:59:59+14:00", "*", "[", "held", "\udcff",
)  # fmt: skip
"""What an operator may type where a command wants anything."""


SOME_LEASE = Lease(
    "held", "w", 1, datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 1, tzinfo=UTC), "default", timedelta(hours=1)
)
"""A lease for those who only want to know which values there are."""
