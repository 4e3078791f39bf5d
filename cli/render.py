"""What the commands print, but for tables: a line for people, or JSON for programs.

Every text that came from a database passes through `shown`. In JSON, times are ISO in UTC, durations are seconds, and
what is not ASCII is escaped.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import click

from leases.cli.text import shown
from leases.model import Lease, LeaseInfo


def print_line(text: str) -> None:
    """Print one line to stdout."""
    click.echo(shown(text))


def print_json(value: Mapping[str, Any]) -> None:
    """Print one object on a line of its own."""
    click.echo(json.dumps(value, default=_plain))


def _plain(value: object) -> object:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, timedelta):
        return round(value.total_seconds(), 6)
    if isinstance(value, UUID):
        return str(value)
    raise TypeError(f"{type(value).__name__} in JSON")


def as_object(value: Any) -> dict[str, Any]:
    """One of the model's values as a JSON object; a stream's also has its `state`, a lease's the time left on it."""
    fields = dataclasses.asdict(value)
    if isinstance(value, LeaseInfo):
        fields["state"] = value.state
    if isinstance(value, LeaseInfo | Lease):
        fields.pop("remaining", None)
        fields["remaining_s"] = value.remaining
    return fields
