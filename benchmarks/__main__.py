"""The command: `python -m benchmarks`."""

from __future__ import annotations

import os
import platform
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import measure
from benchmarks.contestants import CONTESTANTS
from benchmarks.result import Run
from benchmarks.servers import Servers
from benchmarks.table import show
from benchmarks.workload import WORKLOADS, cases
from leases import __version__


@click.command()
@click.option("--only", multiple=True, type=click.Choice(list(WORKLOADS)), help="Only this workload; may be repeated.")
@click.option(
    "--contestants", "names", multiple=True, type=click.Choice(list(CONTESTANTS)),
    help="Only this contestant; may be repeated.",
)  # fmt: skip
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures to this file.")
@click.option("--quick", is_flag=True, help="Small and short: to see that it works, not how fast.")
@click.option("--rounds", type=click.IntRange(1), help="At most so many rounds of each case.")
@click.option(
    "--docs", "run_file", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Measure nothing: write docs/performance.md and its charts from this JSON file.",
)  # fmt: skip
def main(
    only: Sequence[str], names: Sequence[str], file: Path | None, quick: bool, rounds: int | None, run_file: Path | None
) -> None:
    """Measure leases beside the alternatives, on the same work, in one run."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # on the way out the servers are stopped
    console = Console()
    if run_file is not None:
        from benchmarks.page import write  # matplotlib is slow to load

        try:
            run = Run.load(run_file)
        except (ValueError, KeyError, TypeError) as error:
            raise click.UsageError(f"{run_file} is no run's file ({type(error).__name__}: {error})") from None
        if run.quick:
            raise click.UsageError(f"{run_file} is of a quick run, which shows that it works, and not how fast")
        for written in write(run, Path("docs")):
            console.print(f"wrote {written}")
        return
    if file is not None and not file.parent.is_dir():
        raise click.UsageError(f"there is no directory {file.parent}")
    for run in perform(console, only or list(WORKLOADS), names or list(CONTESTANTS), quick, rounds):
        if file is not None:
            run.save(file)  # after each case: a long run that is ended keeps what it has
    show(run, console)


def perform(
    console: Console, workloads: Sequence[str], names: Sequence[str], quick: bool, rounds: int | None
) -> Iterator[Run]:
    """Run what is asked for; yield the run so far, at its beginning and after each case."""
    load = os.getloadavg()[0]  # of others: ours has not begun
    chosen = [case for case in cases(quick, rounds) if case.workload in workloads]
    bar = Progress(
        BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"), TimeElapsedColumn(),
        TextColumn("{task.description}"), console=console, transient=True,
    )  # fmt: skip
    with Servers() as servers, bar:
        task = bar.add_task("the servers start", total=len(chosen))
        present, entrants = measure.start([CONTESTANTS[name] for name in CONTESTANTS if name in names], servers)
        run = Run(
            at=datetime.now(UTC).isoformat(timespec="seconds"),
            version=__version__,
            machine={
                "cores": str(os.cpu_count()),
                "system": f"{platform.system()} {platform.machine()}",
                "python": platform.python_version(),
                "load": f"{load:.1f}",
            },
            quick=quick,
            entrants=tuple(entrants),
        )
        yield run
        for case in chosen:
            measured = measure.measure(case, present, lambda what: bar.update(task, description=what))
            complaints = sorted({line for contestant in present for line in contestant.complaints()})
            run = replace(run, measured=(*run.measured, measured), complaints=tuple(complaints))
            bar.advance(task)
            yield run


if __name__ == "__main__":
    main()
