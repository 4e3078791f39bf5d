"""The commands that end or move a lease, and those that look after streams and tables."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import text, update

from leases import LeaseStore, StoreError, administration
from leases.model import State
from leases.schema import lease_grants
from tests.cli.conftest import Leases

TTL = timedelta(seconds=60)


def token_of(store: LeaseStore, stream: str) -> int:
    info = store.get(stream)
    assert info is not None
    return info.fencing_token


def owner_of(store: LeaseStore, stream: str) -> str | None:
    info = store.get(stream)
    assert info is not None
    return info.owner


def test_steal_moves_a_lease_and_says_what_was_before(store: LeaseStore, leases: Leases) -> None:
    assert store.acquire("s", owner="w1", ttl=TTL)
    done = leases("steal", "s", "--to", "w2", "--reason", "wedged", "--yes", "--json", "--ttl", "5m").object
    assert (done["owner"], done["fencing_token"], done["previous_owner"], done["previous_token"]) == ("w2", 2, "w1", 1)
    assert 290 < done["remaining_s"] <= 300
    assert owner_of(store, "s") == "w2"
    (entry,) = store.audit()
    assert (entry.action, entry.reason) == ("steal", "wedged")
    assert "@" in entry.actor


def test_steal_of_a_paused_stream_is_refused_before_anything_ends(store: LeaseStore, leases: Leases) -> None:
    assert store.acquire("s", owner="w1", ttl=TTL)
    store.pause("s", actor="ann")
    outcome = leases("steal", "s", "--to", "w2", "--reason", "x", "--yes")
    assert outcome.code == 1
    assert "leases resume" in outcome.err
    info = store.get("s")
    assert info is not None
    assert info.live


def test_expire_ends_every_stream_named_and_reports_those_refused(store: LeaseStore, leases: Leases) -> None:
    assert store.acquire("a", owner="w1", ttl=TTL)
    assert store.acquire("b", owner="w2", ttl=TTL)
    store.register(["free"])
    outcome = leases("expire", "a", "free", "nope", "b", "a", "--reason", "x", "--yes", "--json")
    assert outcome.code == 1
    assert [(done["stream_id"], done["fencing_token"]) for done in outcome.objects] == [("a", 2), ("b", 2)]
    assert len(outcome.err.splitlines()) == 2
    assert owner_of(store, "a") is owner_of(store, "b") is None


def test_expire_ends_all_that_an_owner_holds(store: LeaseStore, leases: Leases) -> None:
    for stream in ("a", "b"):
        assert store.acquire(stream, owner="w1", ttl=TTL)
    assert store.acquire("c", owner="w2", ttl=TTL)
    outcome = leases("expire", "--owner", "w1", "--reason", "gone", "--yes")
    assert outcome.code == 0
    assert outcome.out == "a: w1 no longer holds it; token 1 → 2\nb: w1 no longer holds it; token 1 → 2\n"
    assert owner_of(store, "c") == "w2"
    assert leases("expire", "--owner", "w1", "--reason", "gone", "--yes").code == 1


def test_expire_takes_streams_or_an_owner(leases: Leases) -> None:
    for arguments in ((), ("s", "--owner", "w")):
        outcome = leases("expire", *arguments, "--reason", "x", "--yes")
        assert outcome.code == 2
        assert "one of the two" in outcome.err


@pytest.mark.parametrize(
    "command", [("expire", "s", "--reason", "x"), ("steal", "s", "--to", "w3", "--reason", "x"), ("release", "s")]
)
def test_a_grant_made_meanwhile_is_left_alone(
    command: tuple[str, ...], store: LeaseStore, leases: Leases, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = store.acquire("s", owner="w1", ttl=TTL)
    assert first is not None

    def answered_late(*_: object) -> None:
        store.release(first)
        assert store.acquire("s", owner="w2", ttl=TTL)

    monkeypatch.setattr("leases.cli.act.ask", answered_late)
    outcome = leases(*command, "--yes")
    assert outcome.code == 1
    assert "look again" in outcome.err
    assert (owner_of(store, "s"), token_of(store, "s")) == ("w2", 2)


def test_release_lets_the_named_grant_go(store: LeaseStore, leases: Leases) -> None:
    assert store.acquire("s", owner="w1", ttl=TTL)
    for wrong in (("--owner", "w2"), ("--token", "2"), ("--owner", "w1", "--token", "7")):
        outcome = leases("release", "s", "--yes", *wrong)
        assert outcome.code == 1
        assert "held by w1, token 1" in outcome.err
    assert leases("release", "s", "--owner", "w1", "--token", "1").code == 0
    assert owner_of(store, "s") is None
    assert [entry.action for entry in store.audit()] == ["release"]
    assert [grant.end_reason for grant in store.grants("s")] == ["released"]
    assert leases("release", "s", "--yes").code == 1


@pytest.mark.parametrize(
    "command",
    [
        ("steal", "s", "--to", "w", "--reason", "x"),
        ("expire", "s", "--reason", "x"),
        ("release", "s"),
        ("prune", "--older-than", "1d"),
        ("raise-tokens",),
    ],
)
def test_without_a_terminal_nobody_is_asked(command: tuple[str, ...], store: LeaseStore, leases: Leases) -> None:
    assert store.acquire("s", owner="w1", ttl=TTL)
    outcome = leases(*command)
    assert outcome.code == 2
    assert "pass --yes" in outcome.err
    assert outcome.err.count("\n") == 1
    assert (owner_of(store, "s"), token_of(store, "s")) == ("w1", 1)


def test_the_actor_can_be_named(store: LeaseStore, leases: Leases) -> None:
    store.register(["s"])
    assert leases("pause", "s", "--actor", "cron").code == 0
    assert [entry.actor for entry in store.audit()] == ["cron"]


# --- fenced writes in flight -----------------------------------------------------------------------------------


def test_expire_says_who_blocks_it(postgresql_url: str, bare: Leases) -> None:
    with LeaseStore(postgresql_url) as store:
        lease = store.acquire("s", owner="w1", ttl=TTL)
        assert lease is not None
        with store.fenced(lease) as connection:
            pid = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
            outcome = bare("expire", "s", "--reason", "x", "--yes", "--timeout", "400ms", "--url", postgresql_url)
        assert outcome.code == 1
        assert f"pid {pid} (leases, " in outcome.err
        assert "since" in outcome.err
        assert "expired, not yet fenced" in outcome.err
        assert outcome.err.count("\n") == 1


def test_force_ends_the_session_that_blocks(postgresql_url: str, bare: Leases) -> None:
    with LeaseStore(postgresql_url, retry_for=timedelta(0)) as store:
        lease = store.acquire("s", owner="w1", ttl=TTL)
        assert lease is not None
        with pytest.raises(StoreError):  # noqa: PT012  # the transaction that is ended is open around the command
            with store.fenced(lease):
                steal = ("steal", "s", "--to", "w2", "--reason", "x", "--yes", "--force")
                outcome = bare(*steal, "--url", postgresql_url)
        assert outcome.code == 0
        assert owner_of(store, "s") == "w2"


def test_a_busy_file_is_refused_after_the_timeout(sqlite_url: str, bare: Leases) -> None:
    with LeaseStore(sqlite_url) as store:
        lease = store.acquire("s", owner="w1", ttl=TTL)
        assert lease is not None
        with store.fenced(lease):
            outcome = bare("expire", "s", "--reason", "x", "--yes", "--timeout", "100ms", "--url", sqlite_url)
        assert outcome.code == 1
        assert "nothing was changed" in outcome.err
        assert (
            "--force is for PostgreSQL"
            in bare("expire", "s", "--reason", "x", "--yes", "--force", "--url", sqlite_url).err
        )


# --- streams and tables ----------------------------------------------------------------------------------------


def test_migrate_makes_the_tables_and_may_be_repeated(tmp_path: Path, empty_postgresql_url: str, bare: Leases) -> None:
    for url in (f"sqlite:///{tmp_path / 'new.db'}", empty_postgresql_url):
        assert "tables made" in bare("migrate", "--url", url).out
        assert "already" in bare("migrate", "--url", url).out
        done = bare("migrate", "--url", url, "--json").object
        assert done["before"] == done["after"]


def test_a_schema_may_be_named(empty_postgresql_url: str, bare: Leases) -> None:
    bare("--schema", "ops", "migrate", "--url", empty_postgresql_url)
    assert bare("register", "s", "--url", empty_postgresql_url, "--schema", "ops").code == 0
    assert bare("list", "--url", empty_postgresql_url, "--schema", "other").code == 4
    assert bare("list", "--url", empty_postgresql_url).code == 4


def test_without_a_url_the_database_is_in_the_data_directory(tmp_path: Path, bare: Leases) -> None:
    outcome = bare("migrate")
    assert outcome.code == 0
    file = tmp_path / "data" / "leases" / "leases.db"
    assert file.exists()
    assert str(file) in outcome.err
    assert "register" in bare("list").err


def test_register_says_what_is_new(store: LeaseStore, leases: Leases) -> None:
    store.register(["b"])
    done = leases("register", "a", "b", "a", "--pool", "p", "--json").objects
    assert done == [{"stream_id": "a", "registered": True}, {"stream_id": "b", "registered": False}]
    assert [info.pool for info in store.list()] == ["p", "default"]


def test_what_is_paused_resumes(store: LeaseStore, leases: Leases) -> None:
    assert store.acquire("s", owner="w1", ttl=TTL)
    assert leases("pause", "s", "--reason", "bad data").out == "s: paused; w1 holds it still\n"
    info = store.get("s")
    assert info is not None
    assert (info.state, info.pause_reason) == (State.PAUSED, "bad data")
    assert leases("resume", "s").out == "s: resumed\n"
    assert leases("resume", "s", "--json").object == {"stream_id": "s", "resumed": False}


def test_what_is_retired_comes_back(store: LeaseStore, leases: Leases) -> None:
    store.register(["s"])
    assert leases("retire", "s").out == "s: retired\n"
    assert leases("retire", "s").out == "s: retired already\n"
    assert leases("register", "s").out == "s: registered in pool default\n"


@pytest.mark.parametrize("command", ["pause", "resume", "retire"])
def test_one_unknown_stream_does_not_stop_the_others(command: str, store: LeaseStore, leases: Leases) -> None:
    store.register(["a", "c"])
    outcome = leases(command, "a", "b", "c")
    assert outcome.code == 1
    assert [line[0] for line in outcome.out.splitlines()] == ["a", "c"]
    assert "'b'" in outcome.err


def test_prune_deletes_what_ended_before(store: LeaseStore, leases: Leases) -> None:
    lease = store.acquire("s", owner="w1", ttl=TTL)
    assert lease is not None
    store.release(lease)
    assert leases("prune", "--older-than", "1h", "--yes", "--json").object["grants"] == 0
    store.run(lambda connection: connection.execute(LONG_AGO))
    assert "1 grants, 0 events" in leases("prune", "--older-than", "1h", "--yes").out
    assert store.grants("s") == []
    assert token_of(store, "s") == 1


LONG_AGO = update(lease_grants).values(ended_at=datetime(2001, 1, 1, tzinfo=UTC))


def test_prunable_counts_what_prune_deletes(store: LeaseStore) -> None:
    lease = store.acquire("s", owner="w1", ttl=TTL)
    assert lease is not None
    store.pause("s", actor="ann")
    store.release(lease, checkpoint=1)
    store.retire(["s"])
    before = datetime.now(UTC) + timedelta(days=1)
    counted = store.run(lambda connection: administration.prunable(connection, before=before))
    assert counted == store.prune(before=before)
    assert (counted.grants, counted.audit, counted.checkpoints) == (1, 1, 1)


def test_raise_tokens_ends_every_lease_above_what_was(store: LeaseStore, leases: Leases) -> None:
    assert store.acquire("s", owner="w1", ttl=TTL)
    assert leases("raise-tokens", "--yes", "--by", "50", "--json").object == {"raised": 1, "by": 50}
    assert (owner_of(store, "s"), token_of(store, "s")) == (None, 51)
    assert leases("raise-tokens", "--yes", "--by", "0").code == 2
