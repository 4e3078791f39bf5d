"""LeaderElection: one leads at a time, is told so, and its writes are refused from the moment that another does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta

import pytest

from leases import (
    ConfigError,
    EventLog,
    LeaderElection,
    LeaseHeld,
    LeaseLost,
    LeaseStore,
    Loss,
    StaleToken,
    StreamSession,
    Worker,
)
from tests.waiting import until

SOON_S = 20.0
QUICK = timedelta(seconds=1)
POLL = timedelta(seconds=0.1)


Candidate = Callable[..., LeaderElection]


@pytest.fixture
def candidate(store: LeaseStore) -> Iterator[Candidate]:
    with ExitStack() as stack:

        def make(name: str, *, ttl: timedelta = QUICK, poll: timedelta = POLL) -> LeaderElection:
            made = LeaderElection(store, "billing", candidate=name, ttl=ttl, poll_interval=poll)
            return stack.enter_context(made)

        yield make


class Campaign:
    """A candidate's `run`, in a thread, and what it was told."""

    def __init__(self, election: LeaderElection, work: Callable[[StreamSession], object] = lambda _: None) -> None:
        self.election = election
        self.told: list[str] = []
        self.leadership: StreamSession | None = None
        self.failure: BaseException | None = None
        self.started = threading.Event()
        self._work = work
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.election.run(
                self._started, lambda: self.told.append("stopped"), lambda who: self.told.append(f"leader {who}")
            )
        except BaseException as error:  # noqa: BLE001  # for the test to look at
            self.failure = error

    def _started(self, leadership: StreamSession) -> None:
        self.leadership = leadership
        self.told.append("started")
        self.started.set()
        self._work(leadership)

    def stop(self) -> None:
        self.election.stop()
        self.thread.join(SOON_S)
        assert not self.thread.is_alive()


def test_one_leads_and_the_other_follows_when_it_resigns(candidate: Candidate, store: LeaseStore) -> None:
    first = Campaign(candidate("one"))
    assert first.started.wait(SOON_S)
    second = Campaign(candidate("two"))
    until(lambda: "leader one" in second.told, "the second sees who leads")
    assert (first.election.is_leader, second.election.is_leader) == (True, False)
    assert second.election.leader() == "one"
    first.stop()
    assert first.told == ["leader one", "started", "stopped"]
    assert second.started.wait(SOON_S)
    assert second.election.is_leader
    second.stop()
    assert second.told == ["leader one", "leader two", "started", "stopped"]
    assert second.election.leader() is None


def test_the_leaders_writes_are_refused_when_another_leads(candidate: Candidate, store: LeaseStore) -> None:
    election = candidate("one", ttl=timedelta(seconds=60))
    with election.leading() as leadership:
        assert election.is_leader
        assert election.leadership is leadership
        leadership.append({"by one": 1})
        token = leadership.token
        stolen = store.steal("billing", to="two", ttl=timedelta(seconds=60), actor="op")
        assert stolen.fencing_token == token + 1
        with pytest.raises(StaleToken):
            EventLog(store).append(leadership.lease, {"late": 1})  # whatever it believes
        with pytest.raises((StaleToken, LeaseLost)):
            leadership.append({"late too": 1})
        assert leadership.stopping.is_set()
        assert not election.is_leader


def test_a_leader_that_dies_is_succeeded_within_the_ttl_and_a_poll(store: LeaseStore, candidate: Candidate) -> None:
    dead = store.acquire("billing", owner="dead", ttl=QUICK, pool="election")
    assert dead is not None
    began = time.monotonic()
    with candidate("heir").leading() as leadership:
        assert leadership.token == dead.fencing_token + 1
        assert time.monotonic() - began > 0.5


def test_a_lost_leadership_is_told_at_once_and_campaigned_for_again(candidate: Candidate, store: LeaseStore) -> None:
    campaign = Campaign(candidate("one"), work=lambda leadership: leadership.stopping.wait(SOON_S))
    assert campaign.started.wait(SOON_S)
    first = campaign.leadership
    assert first is not None
    store.expire("billing", actor="op")
    until(lambda: campaign.told.count("started") == 2, "it leads again")
    assert campaign.told[:3] == ["leader one", "started", "stopped"]
    assert first.loss in (Loss.REVOKED, Loss.EXPIRED)  # the latter, by a beat between the operator's two steps
    assert campaign.leadership is not None
    assert campaign.leadership.token > first.token
    campaign.stop()


def test_the_lease_is_not_released_while_the_leaders_work_still_runs(candidate: Candidate, store: LeaseStore) -> None:
    let_go = threading.Event()
    campaign = Campaign(candidate("one"), work=lambda _: let_go.wait(SOON_S))
    assert campaign.started.wait(SOON_S)
    campaign.election.stop()
    assert campaign.leadership is not None
    assert campaign.leadership.stopping.is_set()
    campaign.thread.join(0.5)
    assert campaign.thread.is_alive()
    assert campaign.election.leader() == "one"
    let_go.set()
    campaign.thread.join(SOON_S)
    assert campaign.election.leader() is None


def test_an_interrupted_campaign_leaves_the_leadership_to_expire(
    candidate: Candidate, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go, began = threading.Event(), threading.Event()

    def work(_: StreamSession) -> None:
        began.set()
        let_go.wait(SOON_S)

    election = candidate("one")

    def interrupted(_: StreamSession) -> object:
        class Interrupts:
            def wait(self) -> None:
                assert began.wait(SOON_S)
                raise KeyboardInterrupt

            def set(self) -> None: ...

            def is_set(self) -> bool:
                return False

        return Interrupts()

    opened = election._registry.try_open

    def opens(name: str) -> StreamSession | None:
        leadership = opened(name)
        if leadership is not None:
            monkeypatch.setattr(leadership, "stopping", interrupted(leadership))
        return leadership

    monkeypatch.setattr(election._registry, "try_open", opens)
    with pytest.raises(KeyboardInterrupt):
        election.run(work)
    with candidate("two").leading(wait=timedelta(seconds=SOON_S)) as leadership:
        assert leadership.token == 2  # not before the first one's lease had expired
    let_go.set()


def test_work_that_raises_resigns(candidate: Candidate) -> None:
    def fails(_: StreamSession) -> None:
        raise ZeroDivisionError

    campaign = Campaign(candidate("one"), work=fails)
    campaign.thread.join(SOON_S)
    assert isinstance(campaign.failure, ZeroDivisionError)
    assert campaign.told == ["leader one", "started", "stopped"]
    assert campaign.election.leader() is None


def test_leading_gives_up_after_a_while(candidate: Candidate) -> None:
    with candidate("one").leading():
        with pytest.raises(LeaseHeld, match="held by one"):
            with candidate("two").leading(wait=timedelta(seconds=0.2)):
                raise AssertionError("both lead")


def test_a_worker_claims_no_leadership(store: LeaseStore, candidate: Candidate) -> None:
    with candidate("one").leading():
        pass
    with Worker(store, lambda _: timedelta(seconds=1), streams=["a"], poll_interval=POLL) as worker:
        until(lambda: "a" in worker.sessions, "it works")
        assert set(worker.sessions) == {"a"}


def test_a_resignation_is_heard_at_once_where_there_are_notifications(postgresql_url: str) -> None:
    with LeaseStore(postgresql_url) as store:
        waits = timedelta(minutes=10)
        with LeaderElection(store, "x", candidate="one") as one, LeaderElection(
            store, "x", candidate="two", poll_interval=waits
        ) as two:  # fmt: skip
            with one.leading():
                campaign = Campaign(two)
                until(lambda: "leader one" in campaign.told, "the second waits")
            assert campaign.started.wait(SOON_S)
            campaign.stop()


def test_one_candidate_campaigns_once_at_a_time(candidate: Candidate) -> None:
    election = candidate("one")
    with election.leading():
        with pytest.raises(ConfigError, match="campaigns already"):
            with election.leading():
                raise AssertionError("twice")
    with election.leading():  # one after the other is well
        pass


def test_a_candidate_that_has_been_stopped_says_so(candidate: Candidate) -> None:
    election = candidate("one")
    election.stop()
    with pytest.raises(ConfigError, match="stopped"), election.leading():
        raise AssertionError("it leads")


@pytest.mark.parametrize("poll", [timedelta(0), timedelta(seconds=-1), 1, None])
def test_nonsense_is_refused(store: LeaseStore, poll: object) -> None:
    with pytest.raises(ConfigError, match="poll_interval"):
        LeaderElection(store, "x", poll_interval=poll)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="stream_id"):
        LeaderElection(store, "")
