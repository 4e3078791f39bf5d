"""What is attacked: every public name, by which test; and what may come out that is none of our errors.

A new name of `leases.__all__` is put into `ATTACKED`, unless it is a value; a new method of a store is attacked by
itself, as soon as `values.parameters` knows each name of its parameters. A new command is attacked too, unless
it stands in `test_commands.OTHERWISE`.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
from collections.abc import Collection, Mapping
from typing import Any

import leases
from leases import AsyncEventLog, AsyncLeaseStore, EventLog, LeaseStore

ATTACKED = {
    "LeaseStore": "test_functions.test_each_value_alone",
    "AsyncLeaseStore": "test_functions.test_values_together",
    "EventLog": "test_functions.test_each_value_alone",
    "AsyncEventLog": "test_functions.test_values_together",
    "fence": "test_functions.test_a_fence",
    "advance_watermark": "test_functions.test_a_watermark",
    "watermark_table": "test_functions.test_a_watermark",
    "protect": "test_functions.test_a_trigger",
    "unprotect": "test_functions.test_a_trigger",
    "SessionRegistry": "test_registry.test_a_registry",
    "StreamSession": "test_registry.test_a_session",
    "AsyncStreamSession": "test_workers.test_an_async_session",
    "Worker": "test_workers.test_what_works_is_made",
    "LeaderElection": "test_workers.test_what_works_is_made",
    "Backoff": "test_workers.test_a_backoff",
}
"""The public functions and classes, and the test that attacks each."""

OTHERWISE = {
    "run": "runs a function of the caller's: what it raises passes",
    "fenced": "test_functions.test_a_fenced_block",
    "migrate": "test_surroundings.test_many_migrate_at_once",
    "close": "takes nothing, and is called at each test's end",
    "sync_store": "takes nothing",
    "orphan": "takes nothing: forgets the connections, in a forked child",
}
"""The methods of the stores that are not attacked by their parameters, and why or where."""


def is_value(public: Any) -> bool:
    """Whether a public name only carries values: an error, an enumeration, a frozen record, a text."""
    if isinstance(public, str):
        return True
    return isinstance(public, type) and (
        issubclass(public, Exception | enum.Enum)
        or (dataclasses.is_dataclass(public) and vars(public)["__dataclass_params__"].frozen)
    )


def unattacked() -> set[str]:
    """The public names that nobody attacks."""
    return {name for name in leases.__all__ if name not in ATTACKED and not is_value(getattr(leases, name))}


def methods(kind: type) -> Mapping[str, inspect.Signature]:
    """The methods of a store or a log that are attacked by their parameters."""
    return {
        name: inspect.signature(member)
        for name, member in vars(kind).items()
        if not name.startswith("_") and callable(member) and name not in OTHERWISE
    }


STORES = (LeaseStore, EventLog, AsyncLeaseStore, AsyncEventLog)

Escape = tuple[str, str, str]
"""A method, its parameter, and the name of what comes out of it that is none of ours."""

ACCEPTED: frozenset[Escape] = frozenset(
    {
        ("acquire", "before_send", "TypeError"),
        ("claim", "before_send", "TypeError"),
    }
)
"""What comes out all the same, as Python has it: a function of the caller's that is none cannot be called."""


def compare(found: Mapping[Escape, str], *, tried: Collection[str]) -> None:
    """What escapes of those that were tried is what may: a new one fails, and so does one that is mended."""
    new = {escape: story for escape, story in found.items() if escape not in ACCEPTED}
    assert not new, "not one of ours:\n" + "\n".join(f"{escape}: {story}" for escape, story in new.items())
    mended = {escape for escape in ACCEPTED if escape[0] in tried} - found.keys()
    assert not mended, f"mended; take out of ACCEPTED: {sorted(mended)}"
