"""What a mutant is: lines of the product, replaced while they are imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class DoesNotFit(Exception):
    """The product has moved on: what the mutant replaces is not in it, or not once."""


@dataclass(frozen=True)
class Edit:
    """One piece of a file, and what stands in its place."""

    file: str
    old: str
    new: str

    def apply(self, source: str) -> str:
        """The source with the piece replaced; it must be there exactly once."""
        count = source.count(self.old)
        if count != 1:
            raise DoesNotFit(f"{self.file} has {count} times, not once: {self.old!r}")
        return source.replace(self.old, self.new)


@dataclass(frozen=True)
class Mutant:
    """A defect: its name, what it breaks, how, and which layers should catch it, the quickest first."""

    name: str
    breaks: str
    edits: tuple[Edit, ...]
    layers: tuple[str, ...]

    @property
    def files(self) -> dict[Path, tuple[Edit, ...]]:
        """The files that it changes, with its edits to each."""
        names = dict.fromkeys(edit.file for edit in self.edits)
        return {(ROOT / name).resolve(): tuple(edit for edit in self.edits if edit.file == name) for name in names}

    def apply(self, file: Path, source: str) -> str:
        """A file's source as this mutant has it."""
        for edit in self.files.get(file, ()):
            source = edit.apply(source)
        return source

    def check(self) -> None:
        """Raise `DoesNotFit`, or a SyntaxError, unless it can be applied."""
        for file in self.files:
            compile(self.apply(file, file.read_text()), str(file), "exec")
