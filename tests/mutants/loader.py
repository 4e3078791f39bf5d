"""Applies a mutant while Python imports the product: in this process, and in every Python that it starts.

`environment` says how to run a command under a mutant: a `sitecustomize` is put on the path, which calls `install`
before anything else is imported. No compiled file of a mutated module is read or written. Each time that mutated
source is handed out, a line is added to the file that `APPLIED` names: no line, no mutant.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import source_from_cache
from pathlib import Path

from tests.mutants.mutant import ROOT, Mutant
from tests.mutants.registry import find

NAME = "LEASES_TEST_MUTANT"
APPLIED = "LEASES_TEST_MUTANT_APPLIED"


def environment(mutant: Mutant, applied: Path) -> dict[str, str]:
    """The environment of a command that is to run under a mutant."""
    path = [str(ROOT / "tests" / "mutants" / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        NAME: mutant.name,
        APPLIED: str(applied),
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def install_from_environment() -> None:
    """Apply the mutant that the environment names, if it names one."""
    name = os.environ.get(NAME)
    if name:
        sys.dont_write_bytecode = True
        install(find(name), Path(os.environ[APPLIED]))


def install(mutant: Mutant, applied: Path) -> None:
    """Hand out the mutant's source for its files from now on."""
    files = mutant.files
    read = SourceFileLoader.get_data

    def get_data(self: SourceFileLoader, path: str) -> bytes:
        compiled = path.endswith(".pyc")
        file = Path(source_from_cache(path) if compiled else path).resolve()
        if file not in files:
            return read(self, path)
        if compiled:
            raise OSError(f"{path} is not of the mutant {mutant.name}")
        source = mutant.apply(file, read(self, path).decode())
        with applied.open("a") as log:
            log.write(f"{mutant.name} {path}\n")
        return source.encode()

    SourceFileLoader.get_data = get_data  # type: ignore[method-assign, assignment]  # that is the point
