"""What a client asked and what it was told: a line each, in a file of its own, written before the next step.

A line is one `write` to a file opened for appending: a process that is killed loses none that it wrote.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leases.errors import LeaseNotHeld, LeasesError, OutcomeUnknown, StoreUnavailable

OK, UNKNOWN, REFUSED, UNAVAILABLE = "ok", "unknown", "refused", "unavailable"


@dataclass
class Asked:
    """One request. `answer` is None if its client never heard one: it was killed, or is still waiting."""

    id: str
    what: str
    stream_id: str | None
    details: dict[str, Any]
    answer: str | None = None
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def may_have_happened(self) -> bool:
        return self.answer in (OK, UNKNOWN, None)


def answer_of(error: BaseException) -> str:
    """What an error tells its caller. All but `unknown` say that nothing was written."""
    if isinstance(error, OutcomeUnknown):
        return UNKNOWN
    if isinstance(error, LeaseNotHeld):
        return REFUSED
    if isinstance(error, StoreUnavailable):
        return UNAVAILABLE
    return f"error {type(error).__name__}"


class Recorder:
    """Writes one process's record. Safe to share between threads."""

    def __init__(self, file: Path, name: str) -> None:
        self._name = name
        self._number = itertools.count(1)
        self._file = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def note(self, **line: Any) -> None:
        os.write(self._file, (json.dumps(line) + "\n").encode())

    def ask(self, what: str, stream_id: str | None, **details: Any) -> str:
        request = f"{self._name}-{next(self._number)}"
        self.note(ask=request, what=what, stream=stream_id, **details)
        return request

    def told(self, request: str, answer: str, **result: Any) -> None:
        self.note(told=request, answer=answer, **result)

    def failed(self, request: str, error: BaseException) -> None:
        text = str(error) if isinstance(error, LeasesError) else ""
        self.told(request, answer_of(error), text=text[:300])


def lines(file: Path) -> Iterator[dict[str, Any]]:
    for line in file.read_text().splitlines():
        yield json.loads(line)


def read(directory: Path) -> dict[str, Asked]:
    """Everything that was asked in a run, by its id."""
    asked: dict[str, Asked] = {}
    for file in sorted(directory.glob("*.jsonl")):
        for line in lines(file):
            if "ask" in line:
                request = line.pop("ask")
                asked[request] = Asked(request, line.pop("what"), line.pop("stream"), line)
            elif "told" in line:
                one = asked[line.pop("told")]
                one.answer = line.pop("answer")
                one.result = line
    return asked
