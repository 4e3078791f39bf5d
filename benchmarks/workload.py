"""What is measured: each case is one workload in one size, with a round that a contestant does again and again.

A case's `open` prepares a contestant, untimed, and yields the function that does one round and answers with its
figure. What is prepared stays until the case is over: contestants alternate within a round.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.contestant import POLL_S, Client, Contestant, Opener
from benchmarks.crew import Crew

NUMBER = itertools.count(1)

Round = Callable[[], float]


@dataclass(frozen=True)
class Case:
    """One row of figures. `unit` is a rate (more is better) where it ends in `/s`, and an amount otherwise."""

    workload: str
    variant: str
    unit: str
    rounds: int
    open: Callable[[Contestant], AbstractContextManager[Round]]

    @property
    def warms_up(self) -> bool:
        """Whether its first round, of statements that nobody has prepared yet, would tell less than the others."""
        return self.workload not in ("takeover", "memory")

    @property
    def more_is_better(self) -> bool:
        return self.unit.endswith("/s")


WORKLOADS = {
    "own": "take 1,000 streams, renew each once, let them go",
    "cycle": "acquire one stream and release it, again and again; each client on a stream of its own",
    "heartbeat": "renew all leases that a process holds, on one connection",
    "herd": "10,000 leases of a dead owner have expired; 8 processes own them anew",
    "takeover": "from the SIGKILL of an owner to its 10 streams owned by another process",
    "fenced": "append events to a stream's log under the fence; the floor is the bare INSERT of as many rows",
    "plan": "one planning round of one of 100 workers, which hold all leases: it sees the pool, and has nothing to do",
    "crowd": "each process acquires its streams one by one, renews them all, writes an event to each and releases it",
    "memory": "what a process's memory grows by when it owns 10,000 streams",
}


def streams(workload: str, count: int) -> list[str]:
    """Names that no case has used before; their pool is what stands before the slash."""
    pool = f"{workload}-{next(NUMBER)}"
    return [f"{pool}/{n:06}" for n in range(count)]


# --- own ---------------------------------------------------------------------------------------------------------


@contextmanager
def own(contestant: Contestant, count: int) -> Iterator[Round]:
    names = streams("own", count)
    contestant.register(names)
    with closing(contestant.opener()()) as client:

        def once() -> float:
            began = time.perf_counter()
            held = client.take(names)
            client.renew(held)
            client.let_go(held)
            return time.perf_counter() - began

        yield once


# --- cycle -------------------------------------------------------------------------------------------------------


def cycle_for(client: Client, stream: str, seconds: float) -> int:
    count = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        grant = client.acquire(stream)
        assert grant is not None, f"{stream} is held by somebody else"
        client.release(grant)
        count += 1
    return count


@contextmanager
def cycle(contestant: Contestant, clients: int, seconds: float) -> Iterator[Round]:
    names = streams("cycle", clients)
    contestant.register(names)
    with Crew(contestant.opener(), clients) as crew:

        def once() -> float:
            done = crew.do(cycle_for, [(name, seconds) for name in names])
            return float(sum(done.answers)) / done.elapsed_s

        yield once


# --- heartbeat ---------------------------------------------------------------------------------------------------


@contextmanager
def heartbeat(contestant: Contestant, count: int) -> Iterator[Round]:
    names = streams("heartbeat", count)
    contestant.register(names)
    with closing(contestant.opener()()) as client:
        held = client.take(names)
        beats = max(1, 10_000 // count)

        def once() -> float:
            began = time.perf_counter()
            for _ in range(beats):
                client.renew(held)
            return beats * count / (time.perf_counter() - began)

        yield once
        client.let_go(held)


# --- herd --------------------------------------------------------------------------------------------------------


def reown(client: Client, names: Sequence[str], share: Sequence[str], batch: int) -> int:
    return client.reown(names, share, batch)


@contextmanager
def herd(contestant: Contestant, count: int, clients: int, batch: int) -> Iterator[Round]:
    names = streams("herd", count)
    contestant.register(names)
    with Crew(contestant.opener(), clients) as crew:

        def once() -> float:
            contestant.abandon(names)
            done = crew.do(reown, [(names, names[n::clients], batch) for n in range(clients)])
            assert sum(done.answers) == count, f"{sum(done.answers)} of {count} were owned anew"
            return count / done.elapsed_s

        yield once


# --- takeover ----------------------------------------------------------------------------------------------------


def _serve_until_killed(opener: Opener, names: Sequence[str], pipe: Connection) -> None:
    client = opener()
    served = client.serve(names)
    while True:
        pipe.send(served is not None)
        pipe.recv()
        client.beaten()


@contextmanager
def takeover(contestant: Contestant, ttl_s: float | None) -> Iterator[Round]:
    context = get_context("spawn")
    with closing(contestant.opener(ttl_s)()) as heir:

        def once() -> float:
            names = streams("takeover", 10 * contestant.serving)
            contestant.register(names)
            ours, theirs = context.Pipe()
            owner = context.Process(target=_serve_until_killed, args=(contestant.opener(ttl_s), names, theirs))
            owner.start()
            theirs.close()
            try:
                ours.recv()
                heir.stand_by(names)
                ours.send("tell of the next heartbeat")
                ours.recv()
            finally:
                owner.kill()
            began = time.monotonic()
            heir.take_over(names, POLL_S)
            elapsed = time.monotonic() - began
            owner.join()
            return elapsed

        yield once


# --- fenced write ------------------------------------------------------------------------------------------------


@contextmanager
def fenced(contestant: Contestant, batch: int, seconds: float) -> Iterator[Round]:
    (name,) = streams("fenced", 1)
    contestant.register([name])
    payload = {"flight": "UA 1545", "from": "EWR", "to": "IAH", "delay": 2}
    with closing(contestant.opener()()) as client:
        grant = client.acquire(name)
        numbers = itertools.count()

        def once() -> float:
            began = time.perf_counter()
            written = 0
            while time.perf_counter() - began < seconds:
                client.write(grant, {f"event-{next(numbers)}": payload for _ in range(batch)})
                written += batch
            return written / (time.perf_counter() - began)

        yield once
        client.release(grant)


# --- plan --------------------------------------------------------------------------------------------------------


@contextmanager
def plan(contestant: Contestant, count: int, workers: int) -> Iterator[Round]:
    names = streams("plan", count)
    contestant.register(names)
    with contestant.planning(names, workers) as plan_once:
        plans = 25

        def once() -> float:
            began = time.perf_counter()
            for _ in range(plans):
                plan_once()
            return (time.perf_counter() - began) / plans

        yield once


# --- crowd -------------------------------------------------------------------------------------------------------


def crowd_for(client: Client, share: Sequence[str], seconds: float) -> int:
    count = 0
    numbers = itertools.count()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        held = [client.acquire(stream) for stream in share]
        assert None not in held, "a stream of its own is held by somebody else"
        client.renew(held)
        for grant in held:
            client.write(grant, {f"{grant.fencing_token}-{next(numbers)}": "written"})
            client.release(grant)
        count += 3 * len(share) + 1
    return count


@contextmanager
def crowd(contestant: Contestant, count: int, clients: int, seconds: float) -> Iterator[Round]:
    names = streams("crowd", count)
    contestant.register(names)
    with Crew(contestant.opener(), clients) as crew:

        def once() -> float:
            done = crew.do(crowd_for, [(names[n::clients], seconds) for n in range(clients)])
            return float(sum(done.answers)) / done.elapsed_s

        yield once


# --- memory ------------------------------------------------------------------------------------------------------


def grow(client: Client, few: Sequence[str], many: Sequence[str]) -> float:
    """KiB a lease, above the same process when it owns only a few: what loads once is loaded by then."""
    kept = [client.hold(few)]
    before = _own_memory()
    kept.append(client.hold(many))
    return (_own_memory() - before) / 1024 / len(many)


def _own_memory() -> int:
    """What the system would get back if this process ended, in bytes (Linux)."""
    gc.collect()
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


@contextmanager
def memory(contestant: Contestant, count: int) -> Iterator[Round]:
    def once() -> float:
        few, many = streams("memory", 10), streams("memory", count)
        contestant.register(few)
        contestant.register(many)
        with Crew(contestant.opener(), 1) as crew:
            (grown,) = crew.do(grow, [(few, many)]).answers
        return float(grown)

    yield once


# --- all ---------------------------------------------------------------------------------------------------------


def cases(quick: bool, asked: int | None = None) -> list[Case]:
    """Every case, in at most so many rounds as are asked for; when `quick`, each only to see that it works."""
    return [replace(case, rounds=min(case.rounds, asked or case.rounds)) for case in _cases(quick)]


def _cases(quick: bool) -> list[Case]:
    many = 100 if quick else 1_000
    rounds = 2 if quick else 15
    seconds = 0.1 if quick else 0.5
    result = [Case("own", f"{many:,} streams", "s", rounds, partial(own, count=many))]
    for clients in (1, 2) if quick else (1, 8):
        variant = f"{clients} client{'s' if clients > 1 else ''}"
        result.append(Case("cycle", variant, "cycles/s", rounds, partial(cycle, clients=clients, seconds=seconds)))
    for count in (100,) if quick else (1_000, 10_000, 100_000):
        result.append(
            Case("heartbeat", f"{count:,} leases", "leases/s", rounds if count < 100_000 else min(rounds, 7),
                 partial(heartbeat, count=count))
        )  # fmt: skip
    count, clients, batch = (200, 2, 50) if quick else (10_000, 8, 250)
    result.append(
        Case("herd", f"{count:,} leases", "leases/s", min(rounds, 7),
             partial(herd, count=count, clients=clients, batch=batch))
    )  # fmt: skip
    for ttl_s in (1,) if quick else (1, 5, 15):
        result.append(Case("takeover", f"ttl {ttl_s} s", "s", 1 if quick else 3, partial(takeover, ttl_s=ttl_s)))
    if not quick:
        result.append(Case("takeover", "default", "s", 1, partial(takeover, ttl_s=None)))
    for batch in (1, 100):
        variant = f"{batch} event{'s' if batch > 1 else ''} a transaction"
        # Most of a write is the disk's, whose pace changes by the second: so there are more rounds.
        result.append(Case("fenced", variant, "events/s", 2 * rounds, partial(fenced, batch=batch, seconds=seconds)))
    for count in (100, 200) if quick else (1_000, 10_000, 100_000):
        result.append(
            Case("plan", f"{count:,} leases", "s", rounds, partial(plan, count=count, workers=10 if quick else 100))
        )
    count, clients = (20, 2) if quick else (400, 8)
    result.append(
        Case("crowd", f"{clients} processes, {count:,} streams", "operations/s", min(rounds, 7),
             partial(crowd, count=count, clients=clients, seconds=4 * seconds))
    )  # fmt: skip
    count = 200 if quick else 10_000
    result.append(Case("memory", f"{count:,} leases", "KiB/lease", 1 if quick else 3, partial(memory, count=count)))
    return result
