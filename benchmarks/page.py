"""docs/performance.md and its charts, made of one run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks.reach import aims
from benchmarks.result import Measured, Run
from benchmarks.table import amount, compared, spread
from benchmarks.workload import WORKLOADS

NOTES = {
    "own": "The streams are registered before, which is done once in a stream's life. leases and the floor claim in "
    "one statement and renew in one; peers take one lock at a time. etcd needs one keep-alive for all, and frees all "
    "by revoking its lease; for ZooKeeper and advisory locks there is nothing to renew.",
    "cycle": "Each client is a process of its own. A cycle of leases and the floor is two durable commits.",
    "heartbeat": "All in one statement for leases and the floor; one lock after the other for Redis.",
    "herd": "leases and the floor take 250 at a time, of all that is left. Peers have no list of what is free: each of "
    "their processes is told its share, and tries no other lock, which flatters them.",
    "takeover": "The owner is killed right after a heartbeat (or a grant, where there are no heartbeats), which is "
    "the worst moment; the heir looks every second. For leases both are workers of one pool, with ten streams each "
    "before. With leases' default TTL, and the peers' own.",
    "fenced": "One transaction after the other on one connection. leases checks the token, gives out the next numbers "
    "of the stream's `seq`, and leaves out what was written before; the floor does none of that. A batch goes to the "
    "server as one JSON text, which costs the client less than a value for each column of each row: so leases can be "
    "ahead of the floor, which is the INSERT of as many rows. *A batch in one text* is that INSERT with leases' way of "
    "handing its events over: what is between the two is the price of the fence, the numbers and the look.",
    "plan": "100 workers, each of which holds its share. After the set-up the database has cleaned up and counted its "
    "rows (`VACUUM ANALYZE`; `ANALYZE` on SQLite), as it does by itself in time. The cases are "
    "measured minutes apart, so the aim compares their fastest rounds.",
    "crowd": "What counts is that no error reaches a caller: on SQLite all processes write to one file.",
    "memory": "Private memory of a process that owns 10,000 streams, above the same process with 10.",
}


def write(run: Run, docs: Path) -> list[Path]:
    """Write the page and the charts; return the files."""
    from benchmarks.chart import draw  # needs the extra `bench`, which reading and measuring do not

    docs.mkdir(exist_ok=True)
    written = []
    for workload in WORKLOADS:
        cases = [case for case in run.measured if case.workload == workload and any(f.rounds for f in case.figures)]
        if cases:
            written.append(docs / f"performance-{workload}.svg")
            draw(run, workload, cases, written[-1])
    page = docs / "performance.md"
    page.write_text("\n".join(lines(run)) + "\n")
    return [*written, page]


def lines(run: Run) -> Iterator[str]:
    """The page, line by line."""
    machine = f"{run.machine['cores']} cores, {run.machine['system']}, Python {run.machine['python']}"
    yield "# How fast it is"
    yield ""
    yield (
        "Written by `python -m benchmarks --docs FILE` from one run of `python -m benchmarks --json FILE`, "
        f"leases {run.version}, {run.at[:10]}, {machine}. All servers and clients ran on this one machine; contestants "
        "alternate within each round. Compare figures with each other, not with another machine's. The spread is "
        "the quartiles of the rounds, or the lowest and the highest of fewer than four; `speed` is the median of the "
        "ratios within each round, to leases on PostgreSQL."
    )
    if float(run.machine.get("load", 0)) > 0.5:
        yield ""
        yield (
            f"**Other programs were busy on the machine** (load {run.machine['load']} when the run began): the "
            "ratios hold, the figures themselves are too slow."
        )
    yield ""
    yield "## Contestants"
    yield ""
    yield "| contestant | server | survives a power cut by |"
    yield "| --- | --- | --- |"
    for each in run.entrants:
        yield f"| {each.title} | {each.server or '–'} | {each.durability or f'absent: {each.absent}'} |"
    yield ""
    yield (
        "*bare SQL* is the floor: the least statements that do the same work on the same tables, with their triggers "
        "and in the same order of locking, autocommit and prepared, through psycopg alone."
    )
    yield ""
    yield "## What was aimed at"
    yield ""
    yield "| workload | aim | found | |"
    yield "| --- | --- | --- | --- |"
    for aim in aims(run):
        yield f"| {aim.workload} | {aim.words} | {aim.found} | {'met' if aim.met else '**missed**'} |"
    for workload, what in WORKLOADS.items():
        cases = [case for case in run.measured if case.workload == workload]
        if cases:
            yield from _section(run, workload, what, cases)


def _section(run: Run, workload: str, what: str, cases: list[Measured]) -> Iterator[str]:
    yield ""
    yield f"## {workload}"
    yield ""
    yield f"{what[0].upper()}{what[1:]}. {NOTES[workload]}"
    yield ""
    if any(figure.rounds for case in cases for figure in case.figures):
        yield f"![{workload}](performance-{workload}.svg)"
        yield ""
    kept = {each.name: each.durability for each in run.entrants}
    yield "| case | contestant | median | spread | speed | durable by | rounds |"
    yield "| --- | --- | ---: | ---: | ---: | --- | ---: |"
    for case in cases:
        for figure in case.figures:
            if figure.rounds:
                shown = f"{amount(figure.median, case.unit)} | {spread(figure, case.unit)} | {compared(case, figure)}"
                yield (
                    f"| {case.variant} | {run.title(figure.contestant)} | {shown} | {kept[figure.contestant]} "
                    f"| {len(figure.rounds)} |"
                )
    reasons = {(figure.contestant, figure.none) for case in cases for figure in case.figures if figure.none}
    if reasons:
        yield ""
        for contestant, reason in sorted(reasons, key=str):
            yield f"- {run.title(contestant)}: {reason}."
