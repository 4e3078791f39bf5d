"""The clock of a run's server, which can be set: by libfaketime (a Debian package), where it is present."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

LIBRARY = "libfaketimeMT.so.1"
PLACES = ("/usr/lib", "/usr/lib64", "/usr/local/lib", "/opt/homebrew/lib")


def library() -> Path | None:
    """Where libfaketime is, if anywhere."""
    for place in PLACES:
        for found in (*Path(place).glob(f"faketime/{LIBRARY}"), *Path(place).glob(f"*/faketime/{LIBRARY}")):
            return found
    return None


class ServerClock:
    """Shows the machine's time and an offset, kept in a file that each process of the server reads when it looks."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._offset_s = self._furthest_s = 0.0
        self._write()

    @property
    def environment(self) -> Mapping[str, str]:
        """What the server is started with. Its monotonic clock is not touched, as a machine's is not when it is set."""
        found = library()
        if found is None:
            raise RuntimeError("no libfaketime: apt-get install libfaketime")
        return {
            "LD_PRELOAD": str(found),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_DONT_RESET": "1",
        }

    def step(self, seconds: float) -> None:
        """Set it on, or back."""
        self._offset_s += seconds
        self._furthest_s = max(self._furthest_s, self._offset_s)
        self._write()

    def heal(self) -> None:
        """Set it to the furthest that it has shown, so that nothing lies in the future that was written before."""
        self.step(self._furthest_s - self._offset_s)

    def _write(self) -> None:
        fresh = self._file.with_suffix(".new")
        fresh.write_text(f"{self._offset_s:+.3f}\n")
        fresh.chmod(0o644)
        os.replace(fresh, self._file)
