"""The floor: the least SQL that does the same work as leases on the same schema, through psycopg.

Triggers, locks and the order of locking as leases has them; one statement an operation, autocommit, prepared; durable
as the server is. It checks nothing, retries nothing, and knows of no attempt's answer that was lost. For the fenced
write it is the bare INSERT: it does not fence, knows the next number, and looks for no event that is there already.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any, ClassVar
from uuid import uuid4

import psycopg
from psycopg.types.json import Jsonb

from benchmarks.contestant import OF_LEASES, TTL_S, Client, Opener, pool_of
from benchmarks.contestants.leases_store import LeasesOnPostgreSQL

_GRANT = """
    UPDATE leases SET owner = %(owner)s, expires_at = statement_timestamp() + make_interval(secs => %(ttl)s),
        fencing_token = fencing_token + 1, acquired_at = statement_timestamp(), claim_id = %(claim)s
    WHERE stream_id = ANY (ARRAY(SELECT stream_id FROM candidate))
    RETURNING stream_id, fencing_token, expires_at
"""

ACQUIRE = f"""
    WITH candidate AS MATERIALIZED (
        SELECT stream_id FROM leases WHERE stream_id = %(stream)s
        AND (owner IS NULL OR expires_at <= statement_timestamp()) AND paused_at IS NULL AND retired_at IS NULL
        FOR UPDATE SKIP LOCKED)
    {_GRANT}
"""

TAKE = f"""
    WITH candidate AS MATERIALIZED (
        SELECT stream_id FROM leases WHERE pool = %(pool)s AND owner IS NULL AND paused_at IS NULL
        AND retired_at IS NULL AND available_at <= statement_timestamp()
        ORDER BY available_at, stream_id LIMIT %(limit)s FOR UPDATE SKIP LOCKED)
    {_GRANT}
"""

REOWN = f"""
    WITH candidate AS MATERIALIZED (
        SELECT stream_id FROM leases WHERE owner = 'the dead' AND pool = %(pool)s AND paused_at IS NULL
        AND retired_at IS NULL AND expires_at <= statement_timestamp() LIMIT %(limit)s FOR UPDATE SKIP LOCKED)
    {_GRANT}
"""

# Row by row, as leases does it: as a plain join a plan made before the first ANALYZE takes the index on owner, and
# compares all of its rows with all that are asked. A slow floor would flatter.
RENEW = """
    WITH asked AS (SELECT * FROM unnest(%(streams)s::text[], %(tokens)s::bigint[]) AS asked (stream_id, token)),
    locked AS MATERIALIZED (
        SELECT found.stream_id FROM asked CROSS JOIN LATERAL (
            SELECT stream_id FROM leases WHERE stream_id = asked.stream_id AND fencing_token = asked.token
            AND coalesce(owner, '') = %(owner)s AND expires_at > statement_timestamp()
            FOR NO KEY UPDATE SKIP LOCKED) AS found)
    UPDATE leases SET expires_at = statement_timestamp() + make_interval(secs => %(ttl)s)
    FROM locked WHERE leases.stream_id = locked.stream_id
"""

RELEASE = """
    UPDATE leases SET owner = NULL, expires_at = NULL, available_at = statement_timestamp()
    WHERE stream_id = %(stream)s AND fencing_token = %(token)s AND owner = %(owner)s
"""

LET_GO = """
    WITH asked AS (SELECT * FROM unnest(%(streams)s::text[], %(tokens)s::bigint[]) AS asked (stream_id, token)),
    locked AS MATERIALIZED (
        SELECT found.stream_id FROM asked CROSS JOIN LATERAL (
            SELECT stream_id FROM leases WHERE stream_id = asked.stream_id AND fencing_token = asked.token
            AND coalesce(owner, '') = %(owner)s FOR NO KEY UPDATE) AS found)
    UPDATE leases SET owner = NULL, expires_at = NULL, available_at = statement_timestamp()
    FROM locked WHERE leases.stream_id = locked.stream_id
"""

_INSERT = "INSERT INTO lease_events (stream_id, event_id, seq, fencing_token, recorded_at, payload)"


@cache
def append_of(count: int) -> str:
    """The INSERT of so many rows. Of the usual ways to write a batch (rows, arrays, one statement each) the fastest."""
    return f"{_INSERT} VALUES {', '.join(['(%s, %s, %s, %s, statement_timestamp(), %s)'] * count)}"


APPEND_ONE_TEXT = f"""
    {_INSERT}
    SELECT %(stream)s, event ->> 0, %(seq)s + n, %(token)s, statement_timestamp(), (event -> 1)::jsonb
    FROM json_array_elements(%(events)s::json) WITH ORDINALITY AS given (event, n)
"""

Grant = tuple[str, int]


class BareClient(Client):
    def __init__(self, dsn: str, ttl_s: float) -> None:
        self.connection = psycopg.connect(dsn, autocommit=True, prepare_threshold=0)
        self.ttl_s = ttl_s
        self.owner = f"bare-{uuid4().hex}"
        self.seq = 0

    def _granted(self, statement: str, **values: Any) -> list[Grant]:
        given = {"owner": self.owner, "ttl": self.ttl_s, "claim": uuid4(), **values}
        return [(row[0], row[1]) for row in self.connection.execute(statement, given)]

    def _batch(self, held: list[Grant]) -> dict[str, Any]:
        return {"streams": [grant[0] for grant in held], "tokens": [grant[1] for grant in held], "owner": self.owner}

    def take(self, streams: Sequence[str]) -> list[Grant]:
        taken = sorted(self._granted(TAKE, pool=pool_of(streams), limit=len(streams)))
        assert len(taken) == len(streams), f"{len(taken)} of {len(streams)} were free"
        return taken

    def renew(self, held: list[Grant]) -> None:
        assert self.connection.execute(RENEW, {**self._batch(held), "ttl": self.ttl_s}).rowcount == len(held)

    def let_go(self, held: list[Grant]) -> None:
        assert self.connection.execute(LET_GO, self._batch(held)).rowcount == len(held)

    def acquire(self, stream: str) -> Grant | None:
        granted = self._granted(ACQUIRE, stream=stream)
        return granted[0] if granted else None

    def release(self, grant: Grant) -> None:
        values = {"stream": grant[0], "token": grant[1], "owner": self.owner}
        assert self.connection.execute(RELEASE, values).rowcount == 1

    def write(self, grant: Grant, events: Mapping[str, Any]) -> None:
        values: list[Any] = []
        for event_id, payload in events.items():
            self.seq += 1
            values += grant[0], event_id, self.seq, grant[1], Jsonb(payload)
        self.connection.execute(append_of(len(events)), values)

    def reown(self, streams: Sequence[str], share: Sequence[str], batch: int) -> int:
        count = 0
        while taken := self._granted(REOWN, pool=pool_of(streams), limit=batch):
            count += len(taken)
        return count

    def close(self) -> None:
        self.connection.close()


class Bare(LeasesOnPostgreSQL):
    """On a database of its own, with leases' tables: registered and abandoned as leases' are."""

    name = "bare"
    title = "bare SQL (the floor)"
    database = "bare_bench"
    client: ClassVar[type[BareClient]] = BareClient

    not_for: ClassVar[Mapping[str, str]] = {
        **OF_LEASES,
        "takeover": "it has no heartbeat of its own",
        "memory": "it keeps nothing but a list of names",
    }

    def opener(self, ttl_s: float | None = TTL_S) -> Opener:
        dsn = self.running.server.url.set(drivername="postgresql", database=self.database)
        return partial(self.client, dsn.render_as_string(hide_password=False), TTL_S if ttl_s is None else ttl_s)


class InOneTextClient(BareClient):
    def write(self, grant: Grant, events: Mapping[str, Any]) -> None:
        values = {"stream": grant[0], "token": grant[1], "seq": self.seq, "events": json.dumps(list(events.items()))}
        self.seq += len(events)
        self.connection.execute(APPEND_ONE_TEXT, values)


class BareInOneText(Bare):
    """The same, but for what a batch is handed over in: all its events in one JSON text, as leases does it."""

    name = "bare-text"
    title = "bare SQL, a batch in one text"
    client = InOneTextClient

    not_for: ClassVar[Mapping[str, str]] = {
        **Bare.not_for,
        **dict.fromkeys(("own", "cycle", "heartbeat", "herd", "fenced 1 event a transaction"), "as the floor does it"),
    }
