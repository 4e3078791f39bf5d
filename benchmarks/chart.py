"""A chart of each workload as SVG: the contestants' medians as bars, with their spread."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.contestant import needed
from benchmarks.result import Measured, Run
from benchmarks.table import amount

OURS, THEIRS, FLOOR = "#1b7f5c", "#8a97a6", "#c9a227"


def draw(run: Run, workload: str, cases: Sequence[Measured], file: Path) -> None:
    """Draw a workload's cases, one under the other, on a scale of powers of ten."""
    bars = [sum(bool(figure.rounds) for figure in case.figures) for case in cases]
    mpl, canvases = needed("matplotlib", "matplotlib"), needed("matplotlib.figure", "matplotlib")
    # The same figures make the same bytes, and text stays text.
    with mpl.rc_context({"svg.hashsalt": workload, "svg.fonttype": "none", "font.size": 9}):
        canvas = canvases.Figure(figsize=(8, 0.9 * len(cases) + 0.3 * sum(bars)), layout="constrained")
        places = canvas.subplots(len(cases), 1, squeeze=False, height_ratios=[max(1, count) for count in bars])
        for (place,), case in zip(places, cases, strict=True):
            shown = [figure for figure in reversed(case.figures) if figure.rounds]
            colours = [
                OURS if figure.contestant.startswith("leases-") else FLOOR if figure.contestant == "bare" else THEIRS
                for figure in shown
            ]
            medians = [figure.median for figure in shown]
            below = [figure.median - figure.spread[0] for figure in shown]
            above = [figure.spread[1] - figure.median for figure in shown]
            drawn = place.barh([run.title(figure.contestant) for figure in shown], medians, color=colours,
                               xerr=[below, above], error_kw={"ecolor": "#333333", "elinewidth": 1})  # fmt: skip
            place.bar_label(drawn, [amount(value, case.unit) for value in medians], padding=4)
            place.set_xscale("log")
            place.margins(x=0.25)
            better = "more is better" if case.more_is_better else "less is better"
            place.set_title(f"{workload}, {case.variant}: {case.unit}, {better}", loc="left", fontsize=9)
            for side in ("top", "right"):
                place.spines[side].set_visible(False)
        canvas.savefig(file, format="svg", metadata={"Date": None})
