"""An answer that nothing was changed must be true: stories that chaos has led to, one each."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from sqlalchemy import event

from leases import EventLog, Lease, LeaseStore, OutcomeUnknown
from tests.chaos.proxy import Link

TTL = timedelta(seconds=30)


@pytest.fixture
def far(postgresql_url: str, server_link: Link) -> Iterator[LeaseStore]:
    """A store on the other side of the link, that gives up soon."""
    before, _, database = postgresql_url.rpartition("/")
    url = f"{before.rpartition(':')[0]}:{server_link.port}/{database}"
    with LeaseStore(url, retry_for=timedelta(seconds=3)) as store:
        yield store


def warmed(store: LeaseStore, lease: Lease) -> None:
    """The store has a connection of which it knows what its default is: the next statement is the one that is meant."""
    assert store.renew([lease], owner=lease.owner, ttl=TTL).lost == {}


def away_once_swallowed(store: LeaseStore, server_link: Link) -> None:
    """From the moment that an answer was swallowed, the server cannot be reached any more."""

    @event.listens_for(store.base_engine, "do_connect")
    def refuse(*_: Any) -> None:
        if server_link.swallowed:
            raise psycopg.OperationalError("the server is away")


def test_a_lost_answer_is_asked_for_again(far: LeaseStore, server_link: Link) -> None:
    lease = far.acquire("s", owner="a", ttl=TTL)
    assert lease is not None
    warmed(far, lease)
    server_link.swallow(1)
    appended = EventLog(far).append(lease, {"e": 1})
    assert server_link.swallowed == 1
    assert appended.duplicates == ("e",)


def test_a_lost_answer_is_unknown_although_the_last_try_could_not_connect(
    far: LeaseStore, server_link: Link, postgresql_url: str
) -> None:
    lease = far.acquire("s", owner="a", ttl=TTL)
    assert lease is not None
    warmed(far, lease)
    away_once_swallowed(far, server_link)
    server_link.swallow(1)
    with pytest.raises(OutcomeUnknown):
        EventLog(far).append(lease, {"e": 1})
    with LeaseStore(postgresql_url) as near:  # it had happened
        assert len(EventLog(near).read("s")) == 1
