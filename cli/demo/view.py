"""The board, shown: live where somebody looks on, as plain lines where it is piped; and the proof."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from leases.cli.demo.board import Board, State
from leases.cli.text import plural

COLOURS: Final = {
    State.WAITING: "dim",
    State.STARTING: "dim",
    State.RUNNING: "green",
    State.FROZEN: "cyan",
    State.KILLED: "red",
    State.DRAINING: "yellow",
    State.DRAINED: "dim yellow",
    State.DONE: "dim green",
}

LATEST: Final = 8
"""How many happenings the live view shows."""

PROGRESS_EVERY_S: Final = 2.0

Refresh = Callable[[], object]


@contextmanager
def shown(board: Board, console: Console) -> Iterator[Refresh]:
    """Show a board while the block runs; what is yielded is to be called often."""
    if console.is_terminal and not console.is_dumb_terminal:
        with Live(console=console, get_renderable=lambda: picture(board), refresh_per_second=8):
            yield lambda: None
    else:
        lines = _Lines(board, console)
        yield lines.refresh
        lines.refresh(last=True)


class _Lines:
    def __init__(self, board: Board, console: Console) -> None:
        self._board = board
        self._console = console
        self._told = 0
        self._progress_at_s = time.monotonic() + PROGRESS_EVERY_S

    def refresh(self, *, last: bool = False) -> None:
        new = self._board.happenings[self._told :]
        self._told += len(new)
        for happening in new:
            self._say(happening.at_s, happening.text)
        if last or time.monotonic() >= self._progress_at_s:
            self._progress_at_s = time.monotonic() + PROGRESS_EVERY_S
            self._say(self._board.elapsed_s, progress(self._board))

    def _say(self, at_s: float, text: str) -> None:
        self._console.print(f"{at_s:6.1f} s  {text}", markup=False, highlight=False, soft_wrap=True)


def progress(board: Board) -> str:
    """How far the run is, in words."""
    return f"{board.written:,} of {board.events:,} events, {len(board.done):,} of {board.streams:,} streams done"


def picture(board: Board) -> RenderableType:
    """The board as a table, a bar and the latest happenings; 80 columns are enough."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("worker", justify="right")
    table.add_column("state", width=8)
    for name in ("streams held", "events written", "taken over", "shed", "refused"):
        table.add_column(name, justify="right")
    for seat in board.seats:
        table.add_row(
            str(seat.number),
            Text(seat.state, style=COLOURS[seat.state]),
            f"{len(seat.held):,}",
            f"{seat.events:,}",
            f"{seat.taken_over:,}" if seat.taken_over else "",
            f"{seat.shed:,}" if seat.shed else "",
            Text(f"{seat.refused:,}", style="yellow") if seat.refused else "",
        )
    bar = Table.grid(padding=(0, 2, 0, 0))
    bar.add_row(
        ProgressBar(total=max(1, board.events), completed=board.written, width=24),
        f"{board.elapsed_s:.1f} s",
        progress(board),
    )
    latest = Text(overflow="ellipsis", no_wrap=False)
    for happening in board.happenings[-LATEST:]:
        latest.append(f"{happening.at_s:5.1f} s  ", style="dim").append(f"{happening.text}\n")
    return Group(table, Text(), bar, Text(), latest)


def proof_table(figures: dict[str, int | float]) -> RenderableType:
    """The proof for people: `figures` are those of the JSON."""
    rows: list[tuple[str, str, bool | None]] = [
        ("events in the file", "events_in_file", None),
        ("events in the log", "events_in_log", figures["events_in_log"] == figures["events_in_file"]),
        ("missing", "missing", figures["missing"] == 0),
        ("duplicated", "duplicated", figures["duplicated"] == 0),
        ("written under a stale token", "stale_accepted", figures["stale_accepted"] == 0),
        ("stale writes refused", "stale_refused", None),
        ("takeovers", "takeovers", None),
        ("longest takeover", "takeover_seconds_max", None),
        ("moved in good order", "moved", None),
    ]
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(justify="right")
    for title, name, good in rows:
        value = figures[name]
        text = f"{value:,.1f} s" if isinstance(value, float) else f"{value:,}"
        table.add_row(title, Text(text, style={None: "", True: "green", False: "bold red"}[good]))
    return table


def signature(figures: dict[str, int | float]) -> str:
    """How big the run was."""
    workers, streams = int(figures["workers"]), int(figures["streams"])
    came_and_went = [f"{figures[name]} {name}" for name in ("joined", "drained") if figures[name]]
    parts = [plural(workers, "worker"), *came_and_went, plural(streams, "stream"), f"{figures['seconds']:.1f} s"]
    return ", ".join(parts)
