"""The limits of arguments: what may pass, what may not, and that a refusal is one line that says why."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leases import ConfigError, Event, EventLog, LeaseStore, limits
from leases.model import JSON

TTL = timedelta(seconds=15)
NAMES: list[Callable[[str], str]] = [limits.stream_id, limits.owner, limits.pool, limits.event_id]
HUGE = 10**5000
"""More digits than Python writes."""


def named(value: object) -> str:
    """A test's name for a value that has none."""
    return type(value).__name__


def refusal(check: Callable[..., object], *arguments: Any) -> str:
    """The message with which a check refuses; it is one line that can be printed anywhere."""
    with pytest.raises(ConfigError) as raised:
        check(*arguments)
    message = str(raised.value)
    assert message.isprintable()
    assert len(message) < 250
    assert message.encode()
    return message


# --- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", NAMES)
@pytest.mark.parametrize(
    "name",
    ["a", "x" * 255, "𝕏" * 255, "orders/7", "  ", "ü", "a%b_c*", "'; DROP TABLE leases; --", "😀", "\u200b", "{}"],
)
def test_a_name_may_be_any_text_that_can_be_seen_or_copied(check: Callable[[str], str], name: str) -> None:
    assert check(name) == name


@pytest.mark.parametrize("check", NAMES)
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "1 to 255 characters, this one has 0"),
        ("x" * 256, "1 to 255 characters, this one has 256"),
        ("x" * 100_000, "1 to 255 characters, this one has 100000"),
        ("a\0b", "a control character (U+0000) at position 1"),
        ("a\n", "a control character (U+000A) at position 1"),
        ("\t", "a control character (U+0009) at position 0"),
        ("\x1b[31m", "a control character (U+001B) at position 0"),
        ("\x7f", "a control character (U+007F)"),
        ("\x85", "a control character (U+0085)"),
        ("\u2028", "a line break (U+2028)"),
        ("\u2029", "a line break (U+2029)"),
        ("ok\ud800", "a lone surrogate (U+D800) at position 2"),
        ("\udfff", "a lone surrogate (U+DFFF)"),
        (b"bytes", "must be text, not bytes"),
        (7, "must be text, not int"),
        (None, "must be text, not NoneType"),
    ],
)
def test_a_name_that_cannot_be_stored_alike_is_refused(check: Callable[[str], str], name: Any, why: str) -> None:
    message = refusal(check, name)
    assert check.__name__ in message
    assert why in message


@given(st.text(max_size=300))
def test_what_passes_as_a_name_is_unchanged_printable_in_utf8_and_on_one_line(name: str) -> None:
    try:
        assert limits.stream_id(name) == name
    except ConfigError:
        return
    assert 1 <= len(name) <= 255
    assert len(name.encode().decode().splitlines()) == 1


@pytest.mark.parametrize("name", ["x" * 255, "𝕏" * 255, "a%b_c*[?]", "' \" \\ $1 :a", "é", "e\u0301"])
def test_both_engines_keep_a_name_as_it_is(store: LeaseStore, name: str) -> None:
    lease = store.acquire(name, owner=name, ttl=TTL, pool=name)
    assert lease is not None
    info = store.get(name)
    assert info is not None
    assert (info.stream_id, info.owner, info.pool) == (name, name, name)


# --- times -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_", "means"),
    [
        (timedelta(milliseconds=10), timedelta(milliseconds=10)),
        (timedelta(hours=24), timedelta(hours=24)),
        (15, timedelta(seconds=15)),
        (0.5, timedelta(milliseconds=500)),
        (86400, timedelta(hours=24)),
    ],
)
def test_a_ttl_is_a_timedelta_or_seconds(given_: timedelta | float, means: timedelta) -> None:
    assert limits.ttl(given_) == means


@pytest.mark.parametrize(
    "given_",
    [
        0, 0.0, -0.0, -1, -1e-9, 0.009, math.nan, math.inf, -math.inf, 1e300, 5e-324, 86400.001, 10**400, HUGE, -HUGE,
        timedelta(0), timedelta(seconds=-1), timedelta(hours=24, microseconds=1), timedelta.max, timedelta.min,
        timedelta(milliseconds=9, microseconds=999),
    ],
    ids=named,
)  # fmt: skip
def test_a_ttl_outside_its_limits_is_refused(given_: Any) -> None:
    assert "between 0.01 s and 24 h" in refusal(limits.ttl, given_)


@pytest.mark.parametrize("given_", [True, False, "15", b"15", None, [15], 15j])
def test_a_ttl_of_another_type_is_refused(given_: Any) -> None:
    assert "must be a timedelta or seconds" in refusal(limits.ttl, given_)


@given(st.one_of(st.floats(), st.integers(), st.timedeltas()))
def test_a_ttl_passes_if_and_only_if_it_is_within_the_limits(value: timedelta | float) -> None:
    try:
        passed = limits.ttl(value)
    except ConfigError:
        seconds = value.total_seconds() if isinstance(value, timedelta) else value
        assert not 0.01 <= seconds <= 86400
    else:
        assert limits.MIN_TTL <= passed <= limits.MAX_TTL


# --- numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [0, 1, 2**63 - 1])
def test_a_token_is_an_integer_that_the_database_can_hold(token: int) -> None:
    assert limits.fencing_token(token) == token


@pytest.mark.parametrize("token", [-1, 2**63, -(2**63), 10**400, HUGE], ids=named)
def test_a_token_that_the_database_cannot_hold_is_refused(token: int) -> None:
    assert "between 0 and 2**63 - 1" in refusal(limits.fencing_token, token)


@pytest.mark.parametrize("token", [True, False, 1.0, math.nan, "1", "x" * 1000, b"1", None, [1], "\ud800"], ids=named)
def test_a_token_that_is_not_an_integer_is_refused(token: Any) -> None:
    assert "is an integer, not" in refusal(limits.fencing_token, token)


@pytest.mark.parametrize("value", [0, -1, 1_000_001, HUGE, True, 1.0, "1", None], ids=named)
def test_a_count_outside_its_limits_is_refused(value: Any) -> None:
    assert "limit must be an integer between 1 and 1000000" in refusal(limits.count, "limit", value)


# --- texts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["", "two\nlines", "x" * 2000, "\t"])
def test_a_reason_may_have_lines(value: str) -> None:
    assert limits.text("reason", value) == value


@pytest.mark.parametrize("value", ["a\0", "\ud800", "x" * 2001, 7, None, b"x"])
def test_a_reason_that_cannot_be_stored_is_refused(value: Any) -> None:
    assert "reason" in refusal(limits.text, "reason", value)


# --- documents ---------------------------------------------------------------------------------------------------

DOCUMENTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def texts_in(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [text for item in value for text in texts_in(item)]
    if isinstance(value, dict):
        return [text for pair in value.items() for item in pair for text in texts_in(item)]
    return []


@given(DOCUMENTS)
def test_a_document_passes_unchanged_unless_it_holds_a_nul(value: Any) -> None:
    if any("\0" in text for text in texts_in(value)):
        assert "holds a NUL" in refusal(limits.document, "payload", value)
    else:
        assert json.loads(limits.document("payload", value)) == value


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [
        math.nan, math.inf, [-math.inf], {"a": {"b": math.nan}}, "a\0b", {"a\0": 1}, "\\\0", "\ud800", {"\udfff": 1},
        {1, 2}, b"bytes", object(), 1j, {(1, 2): 3}, TTL, [HUGE], nested(100_000),
    ],
    ids=named,
)  # fmt: skip
def test_a_document_that_cannot_be_stored_alike_is_refused(value: Any) -> None:
    assert refusal(limits.document, "payload", value).startswith("payload ")


def test_a_document_that_holds_itself_is_refused() -> None:
    value: list[Any] = []
    value.append(value)
    refusal(limits.document, "payload", value)


def test_both_engines_give_a_document_back_as_it_was(store: LeaseStore) -> None:
    documents: list[JSON] = [
        None, True, 0, -1, 2**63, 10**40, 0.1, 1e22, 5e-324, "", "\\u0000", "\\", '"', "'", "\n\t\x01\x7f", "%s", ":a",
        "ü𝕏", "\ufeff", [], {}, [[]], {"": ""}, {"a": [1, {"b": None}]}, nested(200), "x" * 100_000,
    ]  # fmt: skip
    lease = store.acquire("a", owner="one", ttl=TTL)
    assert lease is not None
    log = EventLog(store)
    log.append(lease, [Event(str(number), document) for number, document in enumerate(documents)])
    assert [recorded.payload for recorded in log.read("a")] == documents
