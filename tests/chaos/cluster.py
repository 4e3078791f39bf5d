"""What the clients of a run take for the database: a primary, perhaps with a synchronous standby that takes over.

A failover is a crash of the primary, the promotion of its standby, and another standby for the new primary. Before it,
all that anybody can have seen is on the standby: PostgreSQL shows a commit whose wait for the standby was cut short
(by `pg_terminate_backend`, or by a crash) to others although no standby has it, and no client can know.

The order of all commits is that of the reigns of the primaries, and within a reign that of its WAL. What an old primary
wrote after the place where its successor's timeline begins, no later reader has seen: it is not in the order.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sqlalchemy.engine import URL

from tests import postgres
from tests.chaos.proxy import Proxy
from tests.chaos.server import SETTINGS, Connection, Postgres, settle
from tests.chaos.steps import ServerClock

OTHERS = """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"""

FOLLOWS = """SELECT sync_state = 'sync' AND flush_lsn >= %s::pg_lsn FROM pg_stat_replication
WHERE application_name = 'walreceiver'"""

PATIENCE_S = 60.0


@dataclass
class Reign:
    """A primary, from a place in the WAL of its timeline on."""

    server: Postgres
    timeline: int
    begin: str


class Cluster:
    """The database of a run. `stepped` lets its clock be set, `replicated` gives it a standby."""

    def __init__(self, server: postgres.Server, *, replicated: bool, stepped: bool) -> None:
        self._primary = Postgres.of(server)
        self._standby: Postgres | None = None
        self._followers = 0
        self.clock: ServerClock | None = None
        if stepped:
            assert server.directory is not None
            self.clock = ServerClock(server.directory / "clock")
            self._primary.environment = self.clock.environment
            self._primary.crash()  # to start it with the clock
            self._primary.start()
        if replicated:
            self._follow()
        with self.connect() as connection:
            self._reigns = [Reign(self._primary, 1, _place(connection))]

    @property
    def address(self) -> tuple[str, int]:
        """Where the primary listens."""
        return "127.0.0.1", self._primary.port

    @staticmethod
    def through(port: int) -> str:
        """The URL of the database by a port."""
        url = URL.create("postgresql+psycopg", username="leases", host="127.0.0.1", port=port, database="postgres")
        return url.render_as_string(hide_password=False)

    def connect(self) -> Connection:
        """A connection straight to the primary."""
        return self._primary.connect()

    def crash(self) -> None:
        self._primary.crash()

    def start(self) -> None:
        self._primary.start()

    # --- failover --------------------------------------------------------------------------------------------------

    @property
    def replicated(self) -> bool:
        return self._standby is not None

    def _follow(self) -> None:
        """Give the primary a standby, and let it wait for it from now on."""
        self._followers += 1
        self._standby = self._primary.standby(self._followers)
        with self.connect() as connection:
            connection.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
            connection.execute("SELECT pg_reload_conf()")
        self.synchronize()

    def synchronize(self) -> None:
        """Wait until the standby has all that is committed now, and what will be waits for it."""
        give_up_s = time.monotonic() + PATIENCE_S
        with self.connect() as connection:
            place = _place(connection)
            while not any(follows for (follows,) in connection.execute(FOLLOWS, [place])):
                if time.monotonic() > give_up_s:
                    raise RuntimeError(f"the standby has not followed its primary for {PATIENCE_S:g} s")
                time.sleep(0.02)

    def promote(self, proxy: Proxy) -> None:
        """Crash the primary, let its standby take its place, and lead the clients to it."""
        assert self._standby is not None
        self.crash()
        self._standby.promote()
        self._primary, self._standby = self._standby, None
        timeline = self._reigns[-1].timeline + 1
        self._reigns.append(Reign(self._primary, timeline, self._primary.came_at(timeline)))
        proxy.lead_to(self.address)
        self._follow()

    def close(self) -> None:
        """Stop what was started here; the first server is stopped by whoever started it."""
        if self._primary is not self._reigns[0].server:
            self._primary.crash()
        if self._standby is not None:
            self._standby.crash()

    # --- the order of commits --------------------------------------------------------------------------------------

    def commits(self) -> dict[int, int]:
        """The transactions in the order of their COMMIT records: transaction id -> place."""
        with self.connect() as connection:
            while any(connection.execute(OTHERS)):  # what a dead client has sent may still be at work
                time.sleep(0.02)
            settle(connection)
            (end,) = connection.execute("SELECT pg_current_wal_flush_lsn()").fetchone() or ("",)
        ends = [reign.begin for reign in self._reigns[1:]] + [end]
        places: dict[int, int] = {}
        for reign, until in zip(self._reigns, ends, strict=True):
            for xid in reign.server.commits(reign.timeline, reign.begin, until):
                if xid in places:
                    raise RuntimeError(f"transaction {xid} is committed twice in the WAL")
                places[xid] = len(places)
        return places


def _place(connection: Connection) -> str:
    settle(connection)
    (place,) = connection.execute("SELECT pg_current_wal_flush_lsn()").fetchone() or ("",)
    return place


@contextmanager
def running(*, replicated: bool = False, stepped: bool = False) -> Iterator[Cluster]:
    with postgres.running(SETTINGS) as server:
        cluster = Cluster(server, replicated=replicated, stepped=stepped)
        try:
            yield cluster
        finally:
            cluster.close()
