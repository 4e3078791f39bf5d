"""Broken protocols: the product with one thing taken away. What catches none of them sees nothing.

Most are a rewriting of the SQL that the product sends; some replace one of its functions, or take away a constraint.
Each names the scenario that shows it, and the promise that it breaks there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from sqlalchemy import Connection, Row, update

from leases import administration, events
from leases.model import LeaseInfo
from leases.schema import leases
from leases.statements import GRANTED
from tests.interleavings.client import Rewrite
from tests.interleavings.database import Database
from tests.interleavings.scenarios import READ_COMMITTED

REPEATABLE_READ = "REPEATABLE READ"

Breaking = Callable[[Database], Any]


@dataclass(frozen=True)
class Mutant:
    """One defect, and where it shows."""

    name: str
    scenario: str
    promise: str
    level: str = READ_COMMITTED
    rewrite: Rewrite | None = None
    breaking: Breaking = lambda _: nullcontext()


class Replaced:
    """Rewrites those statements of the product that begin so, and counts how often it did."""

    def __init__(self, beginning: str, what: str, by: str) -> None:
        self.beginning, self.what, self.by = beginning, what, by
        self.count = 0

    def __call__(self, statement: str) -> str:
        if not statement.startswith(self.beginning):
            return statement
        result, count = re.subn(self.what, self.by, statement, flags=re.DOTALL)
        self.count += count
        return result


# How the product's statements begin, and parts of them.
FENCE = "SELECT coalesce((SELECT same.xmax"
ACQUIRE = "WITH candidate AS"
CLAIM = "WITH RECURSIVE free AS"
RENEW = "WITH locked AS"
LET_GO = "WITH expired_here AS"
RELEASE = "UPDATE leases SET owner="
OPERATOR = "SELECT leases.stream_id"
APPEND = "INSERT INTO lease_events"
FENCED_APPEND = 'WITH "new" AS'

TOKEN = r"leases\.fencing_token = \S+ AND "
EXPIRED = r" AND \(leases\.expires_at <= statement_timestamp\(\) OR .*?\)\)(?= \s*(?:FOR|LIMIT))"
LOCK = r" \s*FOR UPDATE OF leases SKIP LOCKED"
LEFT = r"held\.expires_at - clock_timestamp\(\)"
BUMP = r"fencing_token=\(leases\.fencing_token \+ \S+\)"
UNEXPIRED = r" AND leases\.expires_at > statement_timestamp\(\)"
LOCKED_ROWS = r"FROM locked WHERE leases\.stream_id = locked\.stream_id"
ASKED_ROWS = (
    "FROM unnest(string_to_array(%(stream_ids)s, chr(31)), CAST(%(tokens)s AS BIGINT[])) AS given(stream_id, token) "
    "WHERE leases.stream_id = given.stream_id AND leases.fencing_token = given.token "
    "AND leases.owner = %(holder)s AND leases.expires_at > statement_timestamp()"
)


@contextmanager
def without_the_unique_index(database: Database) -> Iterator[None]:
    database.execute("ALTER TABLE public.leases DROP CONSTRAINT leases_fence")
    try:
        yield
    finally:
        database.execute("ALTER TABLE public.leases ADD CONSTRAINT leases_fence UNIQUE (stream_id, fencing_token)")


def swap_without_a_new_token(connection: Connection, info: LeaseInfo, **values: Any) -> Row[Any]:
    """What `administration._swap` does, but for the token."""
    changed = update(leases).where(leases.c.stream_id == info.stream_id).values(**values)
    return connection.execute(changed.returning(*GRANTED)).one()


def _sql(
    name: str, scenario: str, promise: str, beginning: str, what: str, by: str, *, level: str = READ_COMMITTED
) -> Mutant:
    return Mutant(name, scenario, promise, level, Replaced(beginning, what, by))


def _as_heartbeats(name: str, scenario: str) -> Mutant:
    """The operators' second step locks as a heartbeat does, and no index makes its UPDATE lock as a grant does."""
    weaker = Replaced(OPERATOR, r"FOR UPDATE$", "FOR NO KEY UPDATE")
    return Mutant(name, scenario, "fenced", rewrite=weaker, breaking=without_the_unique_index)


MUTANTS: Sequence[Mutant] = (
    # The fence.
    _sql("fence: no lock", "write-takeover", "fenced", FENCE, " FOR KEY SHARE", ""),
    _sql(
        "fence: no lock (snapshot)",
        "write-takeover-snapshot",
        "fenced",
        FENCE,
        " FOR KEY SHARE",
        "",
        level="REPEATABLE READ",
    ),
    _sql("fence: FOR SHARE", "write-heartbeat", "live", FENCE, "FOR KEY SHARE", "FOR SHARE"),
    _sql("fence: FOR UPDATE", "write-release", "live", FENCE, "FOR KEY SHARE", "FOR UPDATE"),
    _sql(
        "fence: expiry read before the lock",
        "write-grant-rolled-back",
        "fenced",
        FENCE,
        LEFT,
        "held.expires_at - statement_timestamp()",
    ),
    _sql("fence: no expiry", "write-takeover", "fenced", FENCE, LEFT, "interval '1 hour'"),
    _sql("fence: owner, but no token", "late-write-reacquire", "fenced", FENCE, TOKEN, ""),
    Mutant("schema: no unique index", "write-raise-tokens", "fenced", breaking=without_the_unique_index),
    # Grants.
    _sql("acquire: no SKIP LOCKED", "write-takeover", "live", ACQUIRE, " SKIP LOCKED", ""),
    _sql("acquire: no lock before the update", "acquire-acquire", "exclusive", ACQUIRE, LOCK, ""),
    _sql("acquire: locks as a heartbeat", "write-takeover", "live", ACQUIRE, "FOR UPDATE", "FOR NO KEY UPDATE"),
    _sql(
        "acquire: the token stays",
        "late-write-reacquire",
        "no resurrection",
        ACQUIRE,
        BUMP,
        "fencing_token=leases.fencing_token",
    ),
    _sql(
        "acquire: takes what is live",
        "acquire-acquire",
        "exclusive",
        ACQUIRE,
        r"leases\.expires_at <= statement_timestamp\(\)",
        "true",
    ),
    _sql("claim: no SKIP LOCKED", "claim-claim", "live", CLAIM, " SKIP LOCKED", ""),
    _sql("claim: no lock before the update", "claim-claim", "exclusive", CLAIM, LOCK, ""),
    _sql("claim: no look at each row's own expiry", "batch-claim-unlisted", "exclusive", CLAIM, EXPIRED, ""),
    # Heartbeats and releases.
    _sql("renew: a plain UPDATE", "heartbeat-release-rolled-back", "no resurrection", RENEW, LOCKED_ROWS, ASKED_ROWS),
    _sql("renew: no SKIP LOCKED", "batch-grant-rolled-back", "live", RENEW, " SKIP LOCKED", ""),
    _sql(
        "renew: no lock before the update",
        "heartbeat-release-rolled-back",
        "no resurrection",
        RENEW,
        r"\s*FOR NO KEY UPDATE OF leases SKIP LOCKED",
        "",
    ),
    _sql(
        "renew: by owner only",
        "late-heartbeat-reacquire",
        "truthful",
        RENEW,
        r"leases\.fencing_token = \S+\.fencing_token AND ",
        "",
    ),
    _sql("renew: no expiry", "heartbeat-takeover-rolled-back", "no resurrection", RENEW, UNEXPIRED, ""),
    _sql("release: by owner only", "late-release-reacquire", "named", RELEASE, TOKEN, ""),
    _sql("let go: what is live", "heartbeat-let-go-takeover", "named", LET_GO, EXPIRED, ""),
    # Operators.
    Mutant(
        "expire: the token stays",
        "write-expire",
        "monotonic",
        breaking=lambda _: patch.object(administration, "_swap", swap_without_a_new_token),
    ),
    _sql(
        "steal: its TTL counts from before the wait",
        "write-steal",
        "truthful",
        OPERATOR,
        "FOR UPDATE$",
        "FOR NO KEY UPDATE",
    ),
    _as_heartbeats("steal: does not wait for writers", "write-steal"),
    _as_heartbeats("expire: does not wait for writers", "write-expire"),
    # The event log.
    Mutant(
        "append: no fence",
        "append-takeover",
        "fenced",
        breaking=lambda _: patch.object(events, "fence", lambda *_: None),
    ),
    _sql(
        "append: does not look for duplicates",
        "append-append",
        "live",
        APPEND,
        r"\(SELECT lease_events\.event_id .*?offered\.event_id\) IS NULL",
        "true",
    ),
    _sql("append: leaves a gap", "append-append", "nothing lost", APPEND, r"\(SELECT coalesce", "(SELECT 1 + coalesce"),
    _sql(
        "append: drops what conflicts",
        "append-append",
        "nothing lost",
        APPEND,
        "RETURNING",
        "ON CONFLICT DO NOTHING RETURNING",
    ),
    _sql(
        "append alone: writes without the fence's row",
        "alone-takeover",
        "fenced",
        FENCED_APPEND,
        r"SELECT fenced\.stream_id AS stream_id, one\.(.+?)FROM \(SELECT remaining.+?\) AS fenced JOIN (.+?) ON true",
        r"SELECT %(stream)s::VARCHAR AS stream_id, one.\1FROM \2",
    ),
    _sql("append alone: no lock", "alone-steal", "fenced", FENCED_APPEND, "FOR KEY SHARE", ""),
    _sql("append alone: looks at no clock", "alone-takeover", "fenced", FENCED_APPEND, LEFT, "interval '1 hour'"),
    _sql(
        "append: numbers from 1",
        "append-append",
        "live",
        APPEND,
        r"\(SELECT coalesce\(max.+?stream_id = \(SELECT \S+ AS \w+\)\)",
        "0",
    ),
)
