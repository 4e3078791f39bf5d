"""The figures as a table: for the terminal, and the words that the page uses too."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from benchmarks.result import Figure, Measured, Run


def amount(value: float, unit: str) -> str:
    """A figure for people."""
    if unit == "s":
        return f"{value * 1000:,.1f} ms" if value < 1 else f"{value:,.2f} s"
    if unit.endswith("/s"):
        return f"{value:,.0f} {unit}"
    return f"{value:,.2f} {unit}"


def spread(figure: Figure, unit: str) -> str:
    """Its quartiles, or its lowest and highest."""
    low, high = figure.spread
    word = unit if unit != "s" else ("ms" if high < 1 else "s")
    return f"{amount(low, unit).removesuffix(word).strip()} – {amount(high, unit).removesuffix(word).strip()}"


def compared(measured: Measured, figure: Figure) -> str:
    """How fast it is, beside leases on PostgreSQL."""
    ratio = measured.ratio(figure.contestant, "leases-postgresql")
    if ratio is None or figure.contestant == "leases-postgresql":
        return ""
    return f"{ratio[0]:.2f}×" if ratio[0] >= 0.1 else f"{ratio[0]:.3f}×"


def show(run: Run, console: Console) -> None:
    """Print all figures, and who was absent."""
    kept = {each.name: each.durability for each in run.entrants}
    for measured in run.measured:
        table = Table(title=f"{measured.workload}: {measured.variant}", title_justify="left")
        for heading in ("contestant", "median", "spread", "speed beside leases", "durable by", "rounds"):
            table.add_column(heading, justify="left" if heading in ("contestant", "durable by") else "right")
        for figure in measured.figures:
            title = run.title(figure.contestant)
            if figure.rounds:
                table.add_row(
                    title, amount(figure.median, measured.unit), spread(figure, measured.unit),
                    compared(measured, figure), kept[figure.contestant], str(len(figure.rounds)),
                )  # fmt: skip
            else:
                table.add_row(title, "–", figure.none or "", "", kept[figure.contestant], "")
        console.print(table)
    for entrant in run.entrants:
        if entrant.absent is not None:
            console.print(f"[bold]absent[/]: {entrant.title}: {entrant.absent}")
    for line in run.complaints:
        console.print(f"[bold red]in the server's log[/]: {line}")
