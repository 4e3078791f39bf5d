"""The specification in `spec/`: its promises hold, and each breaks when what protects it is taken away."""

from __future__ import annotations

import re
import shutil

import pytest

from spec import check

QUICK = [variant for variant in check.VARIANTS if not variant.deep]
"""`python -m spec.check` takes away the others' protections too."""

needs_java = pytest.mark.skipif(
    shutil.which("java") is None, reason="NO JAVA: the specification in spec/ WAS NOT CHECKED; install one for TLC"
)


@pytest.mark.long(20)
@needs_java
@pytest.mark.parametrize("config", ["Lease.cfg", "Live.cfg"])
def test_the_promises_hold(config: str) -> None:
    verdict = check.check(config, check.SMALL, workers=1)  # the other core has other tests to run
    assert verdict.broken is None, verdict.output
    assert verdict.distinct > 2_000  # TLC has looked at more than the beginning


@pytest.mark.long(11)
@needs_java
def test_each_protection_is_needed() -> None:
    for variant, verdict in check.harm(QUICK):
        assert verdict.broken == variant.breaks, (variant, verdict.output)


def test_no_protection_is_forgotten() -> None:
    """Each name that the specification asks for has a variant, and each promise is broken by one."""
    text = (check.HERE / "Lease.tla").read_text()
    assert set(re.findall(r'Sound\("([\w-]+)"\)', text)) == {variant.name for variant in check.VARIANTS}
    promised = {
        name
        for config in ("Lease.cfg", "Live.cfg")
        for line in re.findall(r"(?m)^(?:INVARIANTS|PROPERTIES) (.*)$", (check.HERE / config).read_text())
        for name in line.split()
    }
    assert promised - {"TypeOK"} == {variant.breaks for variant in QUICK}
