"""The trust window: a worker stops believing before the database lets anybody else in."""

from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leases.errors import ConfigError
from leases.trust import Window

seconds = st.floats(0, 3600, allow_nan=False)


@given(
    ttl_s=st.floats(0.01, 86_400),
    sent_at_s=st.floats(0, 1e6),
    on_the_way_s=seconds,
    drift=st.floats(-0.09, 0.09),
)
def test_the_deadline_comes_before_the_expiry_however_long_the_way_and_whatever_the_clocks_show(
    ttl_s: float, sent_at_s: float, on_the_way_s: float, drift: float
) -> None:
    # In true time from the send: the database counts from when the request has arrived; this machine's
    # clock runs at (1 + drift) times the true rate.
    window = Window.of(timedelta(seconds=ttl_s))
    expires_after_s = on_the_way_s + window.ttl_s
    stops_after_s = (window.deadline(sent_at_s) - sent_at_s) / (1 + drift)
    assert stops_after_s < expires_after_s


@given(ttl_s=st.floats(0.01, 86_400), left=st.floats(0, 1))
def test_an_older_grant_is_trusted_only_for_what_it_has_left(ttl_s: float, left: float) -> None:
    window = Window.of(timedelta(seconds=ttl_s))
    assert window.deadline(100.0, left * window.ttl_s) < 100.0 + left * window.ttl_s


def test_there_is_time_for_another_beat_before_the_deadline() -> None:
    window = Window.of(timedelta(seconds=15))
    assert window.interval_s * 2 < window.trust_s


@pytest.mark.parametrize("interval_s", [0, -1, 13.5, 15, 20])
def test_a_beat_must_come_before_the_trust_ends(interval_s: float) -> None:
    with pytest.raises(ConfigError, match="interval"):
        Window.of(timedelta(seconds=15), timedelta(seconds=interval_s))
