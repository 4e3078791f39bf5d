"""Broken products, by name: `LEASES_CHAOS_MUTANT` makes the client processes use one. To show that the checker sees."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from sqlalchemy import Connection, Engine, event, select, update

from leases import administration, events
from leases.model import LeaseInfo
from leases.schema import leases
from leases.statements import GRANTED, STREAM

VARIABLE = "LEASES_CHAOS_MUTANT"

REWRITES = {
    "no-lock": (r" FOR KEY SHARE(?= OF leases|\))", ""),
    "not-durable": (r"set_config\('synchronous_commit'[^)]*\)", "'on'"),
    "revive": (r" AND leases\.expires_at > statement_timestamp\(\)(?=\s+FOR NO KEY UPDATE)", ""),
}
"""Mutants of a statement's text."""

MUTANTS = {
    "no-fence": "events.append does not fence",
    "no-bump": "steal and expire do not raise the token",
    "no-lock": "the fence looks, and locks nothing",
    "not-durable": "commits are as durable as the server's default",
    "revive": "a heartbeat extends what has expired",
}


def _swap_without_a_new_token(connection: Connection, info: LeaseInfo, **values: Any) -> Any:
    changed = update(leases).where(leases.c.stream_id == info.stream_id).values(**values)
    return connection.execute(changed.returning(*GRANTED)).one()


def _rewriting(name: str) -> None:
    what, by = REWRITES[name]

    def rewrite(_c: Any, _cursor: Any, statement: str, parameters: Any, _context: Any, _many: bool) -> tuple[str, Any]:
        return re.sub(what, by, statement), parameters

    event.listen(Engine, "before_cursor_execute", rewrite, retval=True)


def break_product(name: str | None = None) -> None:
    """Break this process's copy of the product, for the rest of its life."""
    name = name if name is not None else os.environ.get(VARIABLE, "")
    if name == "no-fence":
        patch.object(events, "fence", lambda *_: None).start()
        patch.object(
            events, "fenced_row", lambda *_, **__: select(STREAM.label("stream_id")).subquery("fenced")
        ).start()
    elif name == "no-bump":
        patch.object(administration, "_swap", _swap_without_a_new_token).start()
    elif name in REWRITES:
        _rewriting(name)
    elif name and name not in MUTANTS:
        raise ValueError(f"no mutant {name!r}; there are {', '.join(MUTANTS)}")


@contextmanager
def chosen(name: str) -> Iterator[None]:
    """Let the client processes that are started meanwhile use a broken product."""
    with patch.dict(os.environ, {VARIABLE: name}):
        yield
