"""The proxy does what its faults say: bytes are held, dropped, delayed, and connections end."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from random import Random

import psycopg
import pytest

from tests import postgres
from tests.chaos import proxy
from tests.chaos.proxy import DOWN, UP, Link, Proxy

PATIENCE_S = 20.0
A_MOMENT_S = 0.2
"""How long is looked whether something comes that should not."""


class Echo:
    """A server that answers with what it was sent, and remembers it."""

    def __init__(self, name: bytes = b"") -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self.listener.getsockname()
        self.heard = b""
        self._name = name
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            try:
                while piece := connection.recv(1000):
                    self.heard += piece
                    connection.sendall(self._name + piece)
            except OSError:
                return


@pytest.fixture
def echo() -> Iterator[Echo]:
    made = Echo()
    yield made
    made.listener.close()


@pytest.fixture
def running(echo: Echo) -> Iterator[Proxy]:
    with proxy.running(echo.address, seed=0) as made:
        yield made


@pytest.fixture
def link(running: Proxy) -> Link:
    return running.link()


def connected(link: Link) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", link.port), timeout=PATIENCE_S)
    client.sendall(b"hello ")
    assert client.recv(100) == b"hello "
    return client


def nothing_comes(client: socket.socket) -> bool:
    client.settimeout(A_MOMENT_S)
    try:
        return not client.recv(100)
    except TimeoutError:
        return True
    finally:
        client.settimeout(PATIENCE_S)


def is_reset(client: socket.socket) -> bool:
    try:
        client.recv(100)
    except ConnectionResetError:
        return True
    return False


def until_heard(echo: Echo, text: bytes) -> None:
    give_up_s = time.monotonic() + PATIENCE_S
    while text not in echo.heard:
        assert time.monotonic() < give_up_s, echo.heard
        time.sleep(0.005)


def test_what_is_held_on_the_way_up_comes_when_it_is_healed(link: Link, echo: Echo) -> None:
    with connected(link) as client:
        link.hold(UP)
        client.sendall(b"held")
        assert nothing_comes(client)
        assert b"held" not in echo.heard
        link.heal()
        assert client.recv(100) == b"held"


def test_what_is_held_on_the_way_down_has_reached_the_server(link: Link, echo: Echo) -> None:
    with connected(link) as client:
        link.hold(DOWN)
        client.sendall(b"asked")
        until_heard(echo, b"asked")
        assert nothing_comes(client)
        link.heal()
        assert client.recv(100) == b"asked"


def test_what_is_dropped_never_comes_and_its_connection_is_reset_when_healed(link: Link, echo: Echo) -> None:
    with connected(link) as client, connected(link) as other:
        link.drop()
        client.sendall(b"lost")
        assert nothing_comes(client)
        link.heal()
        assert is_reset(client)
        assert b"lost" not in echo.heard
        other.sendall(b"untouched")
        assert other.recv(100) == b"untouched"


def test_what_is_delayed_comes_later(link: Link) -> None:
    with connected(link) as client:
        link.delay(1.0)  # times a random number each way, with this seed more than a half
        assert Random(0).random() > 0.5
        client.sendall(b"late")
        began_s = time.monotonic()
        assert nothing_comes(client)
        assert client.recv(100) == b"late"
        assert time.monotonic() - began_s > 0.5


def test_a_reset_ends_every_connection_and_a_new_one_may_come(link: Link) -> None:
    with connected(link) as one, connected(link) as two:
        link.reset()
        assert is_reset(one)
        assert is_reset(two)
    connected(link).close()


def test_the_faults_of_a_link_are_not_those_of_another(running: Proxy) -> None:
    link, other = running.link(), running.link()
    link.hold(UP, DOWN)
    connected(other).close()


def test_after_it_leads_elsewhere_old_connections_are_gone_and_new_ones_go_there(running: Proxy, link: Link) -> None:
    elsewhere = Echo(b"elsewhere: ")
    with connected(link) as old:
        running.lead_to(elsewhere.address)
        assert is_reset(old)
    with socket.create_connection(("127.0.0.1", link.port), timeout=PATIENCE_S) as client:
        client.sendall(b"who")
        assert client.recv(100) == b"elsewhere: who"
    elsewhere.listener.close()


def test_the_answer_of_a_statement_that_is_its_own_transaction_is_swallowed(
    server: postgres.Server, server_link: Link
) -> None:
    with psycopg.connect(host="127.0.0.1", port=server_link.port, user="leases", dbname="postgres") as client:
        client.autocommit = True
        client.execute("CREATE TABLE swallowed (n int)")
        server_link.swallow(1)
        with pytest.raises(psycopg.OperationalError):
            client.execute("INSERT INTO swallowed VALUES (1)")
    assert server_link.swallowed == 1
    url = server.url
    with psycopg.connect(host=url.host, port=url.port, user="leases", dbname="postgres") as direct:
        assert direct.execute("SELECT count(*) FROM swallowed").fetchone() == (1,)  # it was committed
        direct.execute("DROP TABLE swallowed")


def test_within_a_transaction_only_the_answer_of_commit_is_swallowed(server_link: Link) -> None:
    with psycopg.connect(host="127.0.0.1", port=server_link.port, user="leases", dbname="postgres") as client:
        client.execute("SELECT 1")
        server_link.swallow(1)
        assert client.execute("SELECT 2").fetchone() == (2,)
        assert server_link.swallowed == 0
        with pytest.raises(psycopg.OperationalError):
            client.commit()
    assert server_link.swallowed == 1
