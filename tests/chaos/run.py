"""A run: build the world, let the nemesis at it, heal it, see that it lives, and check what is left."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from leases import LeasesError, LeaseStore
from tests.chaos import cluster, ledger, mutants, proxy
from tests.chaos.checker import Violation, check, figures
from tests.chaos.client import Options, stream_name
from tests.chaos.nemesis import Nemesis
from tests.chaos.process import Client, end_all
from tests.chaos.record import read
from tests.chaos.server import settle

Say = Callable[[str], object]

PLAIN, FAILOVER, STEPPED = WORLDS = ("plain", "failover", "stepped")
"""What the server of a run is: one; with a synchronous standby that takes over; with a clock that is set."""

READY_S = 60.0
"""How long all processes may take to come to their work, after the last fault: that is the machine's doing."""

WRITE_TTLS = 4
"""How many TTLs every owner then has to write an event: one that trickles may have to come to its end first."""


@dataclass(frozen=True)
class Plan:
    """What to run. The seed repeats the faults and their order, not the run: the processes are real."""

    engine: str
    seconds: float
    seed: int
    ttl_s: float = 3.0
    streams: int = 16
    workers: int = 5
    operators: int = 2
    mutant: str = ""
    faults: tuple[str, ...] = ()
    world: str = PLAIN

    @property
    def command(self) -> str:
        before = f"{mutants.VARIABLE}={self.mutant} " if self.mutant else ""
        command = f"{before}python -m tests.chaos --engine {self.engine} --seconds {self.seconds:g} --seed {self.seed}"
        command += f" --world {self.world}" if self.world != PLAIN else ""
        return command + (f" --faults {','.join(self.faults)}" if self.faults else "")


@dataclass
class Outcome:
    """What a run has shown."""

    plan: Plan
    faults: Counter[str] = field(default_factory=Counter)
    figures: dict[str, int] = field(default_factory=dict)
    violations: list[Violation] = field(default_factory=list)
    owned_after_s: float | None = None
    written_after_s: float | None = None
    kept: Path | None = None


@dataclass(frozen=True)
class World:
    """What a run is made of. `postgres` and `links` are None on SQLite."""

    store: LeaseStore
    clients: Sequence[Client]
    postgres: cluster.Cluster | None
    links: proxy.Proxy | None


@contextmanager
def _world(plan: Plan, directory: Path) -> Iterator[World]:
    with ExitStack() as stack:
        postgres = links = None
        if plan.engine == "postgresql":
            replicated, stepped = plan.world == FAILOVER, plan.world == STEPPED
            postgres = stack.enter_context(cluster.running(replicated=replicated, stepped=stepped))
            links = stack.enter_context(proxy.running(postgres.address, plan.seed))
            url = postgres.through(links.link().port)  # the harness's own, on which there are no faults
        else:
            url = f"sqlite:///{directory / 'leases.db'}"
        store = stack.enter_context(LeaseStore(url))
        store.migrate()
        with store.base_engine.begin() as connection:
            ledger.install(connection)
        store.register(stream_name(number) for number in range(plan.streams))
        if postgres is not None:
            with postgres.connect() as own:
                settle(own)
        roles = ["worker"] * plan.workers + ["operator"] * plan.operators
        clients = []
        for number, role in enumerate(roles):
            link = links.link() if links is not None else None
            path = url if link is None or postgres is None else postgres.through(link.port)
            seed = plan.seed * 1_000_000 + number * 10_000
            options = Options(role, f"{role[0]}{number}", path, "", seed, plan.ttl_s, plan.streams)
            clients.append(Client(options, directory, link))
        stack.callback(end_all, clients)
        yield World(store, clients, postgres, links)


def run(plan: Plan, say: Say) -> Outcome:
    """Run once, and return what was seen. Keeps the clients' records if there is a violation."""
    directory = Path(tempfile.mkdtemp(prefix="leases-chaos-"))
    outcome = Outcome(plan)
    try:
        with mutants.chosen(plan.mutant), _world(plan, directory) as world:
            store, clients, postgres = world.store, world.clients, world.postgres
            nemesis = Nemesis(clients, postgres, world.links, plan.seed, plan.ttl_s, plan.faults)
            outcome.faults = nemesis.faults
            _storm(plan, nemesis, say)
            nemesis.heal()
            outcome.violations += _lives(plan, store, clients, nemesis, outcome)
            end_all(clients)
            places = None if postgres is None else postgres.commits()
            with store.base_engine.connect() as connection:
                history = ledger.read(connection, places)
            _keep(history, directory)
            asked = read(directory)
            outcome.violations[:0] = check(history, asked, stepped=plan.world == STEPPED)
            outcome.figures = figures(history, asked)
            if places is not None:
                outcome.figures["COMMIT records in the WAL"] = len(places)
                outcome.figures["answers of COMMIT swallowed"] = sum(c.link.swallowed for c in clients if c.link)
            outcome.figures["processes that died"] = sum(client.deaths for client in clients)
    finally:
        if outcome.violations:
            outcome.kept = directory
        else:
            shutil.rmtree(directory, ignore_errors=True)
    return outcome


def _keep(history: ledger.History, directory: Path) -> None:
    with (directory / "ledger").open("w") as file:
        file.writelines(f"{entry}\n" for entry in history.entries)


def _storm(plan: Plan, nemesis: Nemesis, say: Say) -> None:
    began_s = said_s = time.monotonic()
    while (now_s := time.monotonic()) < began_s + plan.seconds:
        nemesis.tick()
        if now_s - said_s >= 15:
            said_s = now_s
            say(f"{now_s - began_s:5.0f} s: {sum(nemesis.faults.values())} faults")
        time.sleep(0.02)


def _lives(
    plan: Plan, store: LeaseStore, clients: Sequence[Client], nemesis: Nemesis, outcome: Outcome
) -> list[Violation]:
    """After the last fault every stream is owned within 2 TTL, and every owner can write."""
    workers = [client for client in clients if client.is_worker]
    for client in clients:
        if not client.is_worker:
            client.end()
            client.start_at_s = float("inf")
    if not _until(lambda: all(client.ready and not client.stopped for client in workers), READY_S, nemesis):
        late = ", ".join(client.name for client in workers if not client.ready or client.stopped)
        return [Violation("8 live", None, f"not at work {READY_S:g} s after the last fault: {late}")]
    streams = [stream_name(number) for number in range(plan.streams)]

    def opened() -> bool:
        for name in streams:
            store.resume(name, actor="the harness")
        store.register(streams)
        return True

    if not _until(opened, READY_S, nemesis):
        return [Violation("8 live", None, f"no operator can resume a stream {READY_S:g} s after the last fault")]
    began_s = time.monotonic()
    if not _until(lambda: all(info.live for info in store.list()), 2 * plan.ttl_s, nemesis):
        idle = [f"{info.stream_id} ({info.state}, {info.owner})" for info in store.list() if not info.live]
        return [Violation("8 live", None, f"not owned 2 TTL after the last fault: {', '.join(idle)}")] if idle else []
    outcome.owned_after_s = time.monotonic() - began_s
    counts = _positions(store, streams)
    began_s = time.monotonic()

    def written() -> bool:
        return all(position > counts[name] for name, position in _positions(store, streams).items())

    if not _until(written, WRITE_TTLS * plan.ttl_s, nemesis):
        still = [name for name, position in _positions(store, streams).items() if position <= counts[name]]
        return [Violation("8 live", None, f"no fenced write passed within {WRITE_TTLS} TTL on {', '.join(still)}")]
    outcome.written_after_s = time.monotonic() - began_s
    return []


def _positions(store: LeaseStore, streams: Sequence[str]) -> dict[str, int]:
    found = {name: store.checkpoint(name) for name in streams}
    return {name: 0 if at is None else at.checkpoint for name, at in found.items()}


def _until(condition: Callable[[], bool], seconds: float, nemesis: Nemesis) -> bool:
    give_up_s = time.monotonic() + seconds
    while True:
        nemesis.calm()
        with suppress(LeasesError, SQLAlchemyError):
            if condition():
                return True
        if time.monotonic() >= give_up_s:
            return False
        time.sleep(0.02)
