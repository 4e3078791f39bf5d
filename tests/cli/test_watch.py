"""The commands that only look: list, show, history, audit."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from rich.cells import cell_len

from leases import LeaseStore
from tests.cli.conftest import Leases
from tests.waiting import until

TTL = timedelta(seconds=60)


@pytest.fixture
def world(store: LeaseStore) -> LeaseStore:
    """One stream in each state."""
    store.register(["free", "paused", "retired"])
    store.register(["elsewhere"], pool="other")
    store.pause("paused", actor="ann", reason="bad data")
    store.retire(["retired"], actor="ann")
    assert store.acquire("held", owner="w1", ttl=TTL)
    assert store.acquire("expired", owner="w2", ttl=timedelta(milliseconds=10))
    until(lambda: store.list(state="expired"))
    return store


def names(leases: Leases, *arguments: str) -> list[str]:
    return [info["stream_id"] for info in leases("list", "--json", *arguments).objects]


def test_list_shows_every_stream_and_its_state(world: LeaseStore, leases: Leases) -> None:
    outcome = leases("list")
    assert outcome.code == 0
    lines = {line.split()[0]: line for line in outcome.out.splitlines()}
    assert lines["STREAM"].split() == ["STREAM", "STATE", "OWNER", "TOKEN", "LEFT", "AGE", "POOL"]
    for stream in ("free", "paused", "retired", "held", "expired"):
        assert lines[stream].split()[1] == stream
    assert " w1 " in lines["held"]
    assert "other" in lines["elsewhere"]


def test_list_chooses(world: LeaseStore, leases: Leases) -> None:
    assert names(leases) == ["elsewhere", "expired", "free", "held", "paused", "retired"]
    assert names(leases, "--owner", "w1") == ["held"]
    assert names(leases, "--pool", "other") == ["elsewhere"]
    assert names(leases, "--state", "expired") == ["expired"]
    assert names(leases, "*d", "--state", "paused") == ["paused"]
    assert names(leases, "h?ld") == ["held"]
    assert names(leases, "--limit", "2") == ["elsewhere", "expired"]


def test_list_goes_through_all_pages(store: LeaseStore, leases: Leases, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leases.cli.watch.PAGE", 3)
    store.register([f"s{number}" for number in range(8)])
    assert names(leases) == [f"s{number}" for number in range(8)]
    assert len(names(leases, "--limit", "6")) == 6
    assert len(names(leases, "--limit", "7")) == 7
    assert leases("list").out.count("STREAM") == 3


def test_a_list_that_is_empty_says_what_to_do(leases: Leases) -> None:
    outcome = leases("list")
    assert (outcome.code, outcome.out) == (0, "")
    assert "leases register" in outcome.err
    assert "no stream matches" in leases("list", "x*").err


def test_json_has_every_field_of_a_stream(world: LeaseStore, leases: Leases) -> None:
    info = leases("list", "held", "--json").object
    assert info["state"] == "held"
    assert info["owner"] == "w1"
    assert info["fencing_token"] == 1
    assert 0 < info["remaining_s"] <= 60
    assert datetime.fromisoformat(info["expires_at"]).tzinfo is not None


def test_show_tells_all_about_a_stream(world: LeaseStore, leases: Leases) -> None:
    lease = world.acquire("busy", owner="w3", ttl=TTL)
    assert lease is not None
    world.release(lease, checkpoint={"offset": 7}, backoff=timedelta(minutes=5), error="no route\x1b[0m")
    outcome = leases("show", "busy")
    assert outcome.code == 0
    for part in (
        "resting",
        "nobody",
        '{"offset": 7}',
        "token 1",
        "no route\\x1b[0m",
        "1 in a row",
        "available",
        "released",
    ):
        assert part in outcome.out
    shown = leases("show", "busy", "--json").object
    assert shown["checkpoint"]["checkpoint"] == {"offset": 7}
    assert [grant["end_reason"] for grant in shown["grants"]] == ["released"]
    assert "ann: bad data" in leases("show", "paused").out
    assert "left" in leases("show", "held").out
    assert "expired" in leases("show", "expired").out


def test_show_cuts_a_long_checkpoint_but_json_does_not(store: LeaseStore, leases: Leases) -> None:
    lease = store.acquire("s", owner="w", ttl=TTL)
    assert lease is not None
    store.write_checkpoint(lease, "x" * 5000)
    assert "--json has all" in leases("show", "s").out.replace("\n", " ")
    assert leases("show", "s", "--json").object["checkpoint"]["checkpoint"] == "x" * 5000


def test_history_has_the_latest_grant_first(store: LeaseStore, leases: Leases) -> None:
    for owner in ("w1", "w2"):
        lease = store.acquire("s", owner=owner, ttl=TTL)
        assert lease is not None
        store.release(lease)
    assert [grant["owner"] for grant in leases("history", "s", "--json").objects] == ["w2", "w1"]
    assert [grant["owner"] for grant in leases("history", "s", "--json", "--limit", "1").objects] == ["w2"]
    assert "released" in leases("history", "s").out


def test_history_says_who_owned_a_stream_at_a_time(store: LeaseStore, leases: Leases) -> None:
    assert store.acquire("s", owner="w1", ttl=TTL)
    now = (datetime.now(UTC) + timedelta(seconds=1)).isoformat()
    assert leases("history", "s", "--at", now, "--json").object["owner"] == "w1"
    naive = leases("history", "s", "--at", now.partition("+")[0])
    assert "UTC is assumed" in naive.err
    assert "w1" in naive.out


def test_a_time_at_which_nobody_owned_it_is_exit_code_1(store: LeaseStore, leases: Leases) -> None:
    store.register(["s"])
    outcome = leases("history", "s", "--at", "2001-01-01")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.count("\n") == 1
    assert leases("history", "s").code == 0


def test_audit_has_the_latest_first_of_one_stream_or_of_all(world: LeaseStore, leases: Leases) -> None:
    assert [entry["action"] for entry in leases("audit", "--json").objects] == ["retire", "pause"]
    assert [entry["reason"] for entry in leases("audit", "paused", "--json").objects] == ["bad data"]
    assert "ann" in leases("audit").out
    assert leases("audit", "free").out == ""


@pytest.mark.parametrize("command", ["show", "history", "audit"])
def test_an_unknown_stream_is_exit_code_1(command: str, leases: Leases) -> None:
    outcome = leases(command, "nope")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err == "leases: no stream is called 'nope'; `leases list` shows them\n"


def test_tables_fit_80_columns(store: LeaseStore, leases: Leases) -> None:
    stream, owner = "ストリーム/" + "s" * 100, "a-long-host-name.example.com:1234567:0123abcd" * 2
    store.register([stream], pool="a pool with a name")
    store.steal(stream, to=owner, ttl=TTL, actor="somebody@a-long-host-name.example.com", reason="because " * 20)
    for command in (("list",), ("show", stream), ("history", stream), ("audit",)):
        outcome = leases(*command)
        assert outcome.code == 0
        assert max(map(cell_len, outcome.out.splitlines())) <= 80
        together = "".join(outcome.out.split())
        assert "0123abcd" in together or command == ("audit",)


def test_what_a_database_holds_cannot_move_the_terminal(store: LeaseStore, leases: Leases) -> None:
    store.register(["a\u202eb"])
    store.pause("a\u202eb", actor="\x1b[2J", reason="\x1b]0;owned\x07 \u2066")
    for command in (("list",), ("show", "a\u202eb"), ("audit",), ("list", "--json"), ("audit", "--json")):
        outcome = leases(*command)
        assert outcome.code == 0
        assert not set("\x1b\x07\u202e\u2066") & set(outcome.out + outcome.err)
        assert "\\u202e" in outcome.out


def test_rich_markup_in_a_name_is_only_text(store: LeaseStore, leases: Leases) -> None:
    store.register(["[bold]x[/bold]", ":smile:"])
    outcome = leases("list").out
    assert "[bold]x[/bold]" in outcome
    assert ":smile:" in outcome
