"""A password that no output may show: it is in the URL of every PostgreSQL database of the tests, and looked for.

The server of the tests trusts whoever comes, so that it may be anything. What a test leaves on stdout, on stderr and in
the log is searched by the hook below, which `tests/conftest.py` installs; what a command prints into pipes of a test is
searched by the tests of the command.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

CANARY = "canary-hunter2"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail a test whose output shows the password."""
    report = yield
    shown = [title for title, text in report.sections if CANARY in text]
    if shown and report.passed:
        report.outcome = "failed"
        report.longrepr = f"the password of the database is in: {', '.join(shown)}"
    return report
