"""What leases set out to reach, as ratios within one run, and whether a run reached it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.contestant import POLL_S
from benchmarks.result import Measured, Run

OURS = "leases-postgresql"
SQLITE = "leases-sqlite"
FLOOR = "bare"


@dataclass(frozen=True)
class Aim:
    """One aim: in words, what was measured of it, and whether that is enough."""

    workload: str
    words: str
    found: str
    met: bool


def aims(run: Run) -> list[Aim]:
    """Every aim that the run has the figures for."""
    of_each = (aim for each in run.measured if each.workload in _RULES for aim in _RULES[each.workload](each))
    quiet = Aim("all", "no deadlock in the server's log", f"{len(run.complaints)} lines", not run.complaints)
    return [*of_each, *linear(run), *level(run), quiet]


def _at_least(measured: Measured, words: str, least: float, one: str = OURS, other: str = FLOOR) -> Iterator[Aim]:
    ratio = measured.ratio(one, to=other)
    if ratio is not None:
        found = f"{ratio[0]:.2f}× ({ratio[1]:.2f} – {ratio[2]:.2f})"
        yield Aim(measured.workload, f"{measured.variant}: {words}", found, ratio[0] >= least)


def _own(measured: Measured) -> Iterator[Aim]:
    for peer in ("etcd", "zookeeper"):
        yield from _at_least(measured, f"at least 10 times as fast as {peer}, which is durable", 10, other=peer)
    for peer in ("redis", "pottery"):
        yield from _at_least(measured, f"faster than {peer}, which keeps nothing", 1, other=peer)
    yield from _at_least(measured, "SQLite at least a third as fast as PostgreSQL", 1 / 3, SQLITE, OURS)


def _cycle(measured: Measured) -> Iterator[Aim]:
    yield from _at_least(measured, "at least 0.7 of the floor", 0.7)
    for peer in ("etcd", "zookeeper", "pottery"):
        yield from _at_least(measured, f"ahead of {peer}", 1, other=peer)


def _heartbeat(measured: Measured) -> Iterator[Aim]:
    yield from _at_least(measured, "at least 0.8 of the floor", 0.8)
    ours = measured.of(OURS)
    if ours is not None and measured.variant.startswith("10,000 "):
        words = f"{measured.variant}: at least 100,000 leases/s on one connection"
        yield Aim(measured.workload, words, f"{ours.median:,.0f} leases/s", ours.median >= 100_000)


def _herd(measured: Measured) -> Iterator[Aim]:
    yield from _at_least(measured, "at least 0.6 of the floor", 0.6)
    for name in (OURS, SQLITE):
        figure = next((each for each in measured.figures if each.contestant == name), None)
        if figure is not None:
            words = f"{measured.variant}: no worker of {name} fails"
            yield Aim(measured.workload, words, figure.none or "none failed", not figure.failed)


def _takeover(measured: Measured) -> Iterator[Aim]:
    if not measured.variant.startswith("ttl "):
        return
    most = float(measured.variant.split()[1]) + POLL_S
    for name in (OURS, SQLITE):
        figure = measured.of(name)
        if figure is not None:
            worst = max(figure.rounds)
            yield Aim(
                measured.workload,
                f"{measured.variant}: {name} at most TTL + one poll interval, {most:g} s",
                f"{worst:.2f} s at worst",
                worst <= most,
            )


def _fenced(measured: Measured) -> Iterator[Aim]:
    least = 0.75 if measured.variant.startswith("1 ") else 0.95
    yield from _at_least(measured, f"at least {least} of the bare INSERT", least)


def _memory(measured: Measured) -> Iterator[Aim]:
    figure = measured.of(OURS)
    if figure is not None:
        words = f"{measured.variant}: {OURS} at most 1.5 KiB a lease"
        yield Aim(measured.workload, words, f"{figure.median:.2f} KiB", figure.median <= 1.5)


def _crowd(measured: Measured) -> Iterator[Aim]:
    figure = next((each for each in measured.figures if each.contestant == SQLITE), None)
    if figure is not None:
        words = f"{measured.variant} on SQLite: no `database is locked`, nor any other error, reaches a caller"
        yield Aim(measured.workload, words, figure.none or f"none in {len(figure.rounds)} rounds", not figure.failed)


_RULES: dict[str, Callable[[Measured], Iterator[Aim]]] = {
    "own": _own,
    "cycle": _cycle,
    "heartbeat": _heartbeat,
    "herd": _herd,
    "takeover": _takeover,
    "fenced": _fenced,
    "crowd": _crowd,
    "memory": _memory,
}


def linear(run: Run) -> Iterator[Aim]:
    """The time of a heartbeat grows as the leases do: a lease costs the same in the greatest batch as in the middle."""
    some, many = (run.case("heartbeat", f"{count} leases") for count in ("10,000", "100,000"))
    few, lot = (case.of(OURS) if case else None for case in (some, many))
    if few is not None and lot is not None:
        ratio = lot.median / few.median
        words = "100,000 leases: the rate is at least 0.7 of that at 10,000 (time linear in leases)"
        yield Aim("heartbeat", words, f"{ratio:.2f}×", ratio >= 0.7)


def level(run: Run) -> Iterator[Aim]:
    """A planning round costs no more where there are many leases than where there are few.

    The two were measured minutes apart, so each counts by its fastest round: what else the machine did is in neither.
    """
    few, many = (run.case("plan", f"{count} leases") for count in ("1,000", "100,000"))
    for name in (OURS, SQLITE):
        little, lot = (case.of(name) if case else None for case in (few, many))
        if little is not None and lot is not None:
            ratio = min(lot.rounds) / min(little.rounds)
            words = f"100,000 leases: {name} at most 1.5 times as long as with 1,000 (the fastest rounds)"
            yield Aim("plan", words, f"{ratio:.2f}×", ratio <= 1.5)
