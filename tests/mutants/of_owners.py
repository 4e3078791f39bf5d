"""Mutants of what owners do: acquire, claim, renew, release, append."""

from __future__ import annotations

from tests.mutants.mutant import Edit, Mutant

STATEMENTS = "leases/statements.py"
OPERATIONS = "leases/operations.py"
EVENTS = "leases/events.py"

RENEWABLE = "RENEWABLE = and_(leases.c.owner == HOLDER, leases.c.expires_at > now())"

SKIPPED = "cte = rows.with_for_update(skip_locked=True, of=leases).cte(name)"

OF_OWNERS = (
    Mutant(
        "acquire-takes-live",
        "an acquire takes a lease that is live",
        (Edit(STATEMENTS, "OPEN, or_(leases.c.owner.is_(None), EXPIRED)),", "OPEN),"),),
        ("model", "tests/conformance/test_acquire.py"),
    ),
    Mutant(
        "grant-no-bump",
        "a grant keeps the token of the one before",
        (
            Edit(
                STATEMENTS,
                "            fencing_token=leases.c.fencing_token + 1,",
                "            fencing_token=case((leases.c.owner == HOLDER, leases.c.fencing_token), "
                "else_=leases.c.fencing_token + 1),",
            ),
        ),
        ("model",),
    ),
    Mutant(
        "live-at-expiry",
        "at its expiry a lease is said to be live still",
        (
            Edit(
                STATEMENTS,
                "LIVE = and_(leases.c.owner.is_not(None), leases.c.expires_at > now())",
                "LIVE = and_(leases.c.owner.is_not(None), leases.c.expires_at >= now())",
            ),
        ),
        ("model",),
    ),
    Mutant(
        "not-free-at-expiry",
        "at its expiry a lease is not free yet",
        (Edit(STATEMENTS, "    leases.c.expires_at <= now(),", "    leases.c.expires_at < now(),"),),
        ("model", "tests/conformance/test_acquire.py"),
    ),
    Mutant(
        "clock-set-back-blocks",
        "a lease of a clock that was set back holds its stream for hours",
        (Edit(STATEMENTS, "    leases.c.expires_at > later(LONGEST),\n", ""),),
        ("model", "tests/conformance/test_acquire.py"),
    ),
    Mutant(
        "acquire-forgets-attempt",
        "a repeated acquire is not recognised by its claim_id",
        (Edit(OPERATIONS, "    if granted is None and claim_id is not None:", "    if False:"),),
        ("model", "tests/postgresql/test_commit.py"),
    ),
    Mutant(
        "attempt-of-anybody",
        "a repeated acquire gets the grant of its claim_id, whoever's it is",
        (
            Edit(
                STATEMENTS,
                "leases.c.claim_id == CLAIM, leases.c.owner == HOLDER, LIVE",
                "leases.c.claim_id == CLAIM, LIVE",
            ),
        ),
        ("tests/conformance/test_acquire.py",),
    ),
    Mutant(
        "acquire-waits",
        "an acquire or a claim waits for a row that somebody has locked",
        (Edit(STATEMENTS, SKIPPED, "cte = rows.with_for_update(of=leases).cte(name)"),),
        ("tests/postgresql/test_takeover.py",),
    ),
    Mutant(
        "acquire-brings-back",
        "an acquire brings a retired stream back",
        (
            Edit(
                OPERATIONS,
                "    if granted is None and _introduce(connection, stream_id, pool=pool):",
                "    if granted is None and register(connection, [stream_id], pool=pool):",
            ),
        ),
        ("model", "tests/conformance/test_operator.py"),
    ),
    Mutant(
        "claim-no-expiry",
        "a claim takes the live leases of an owner that is on no list",
        (Edit(STATEMENTS, "leases.c.pool == IN_POOL, OPEN, EXPIRED\n", "leases.c.pool == IN_POOL, OPEN\n"),),
        ("model", "tests/conformance/test_claim.py"),
    ),
    Mutant(
        "claim-from-the-living",
        "a claim takes expired rows from a live worker, which looks after them itself",
        (
            Edit(
                STATEMENTS,
                "or_(owners.c.owner == HOLDER, not_(alive))",
                "or_(owners.c.owner == HOLDER, alive, not_(alive))",
            ),
        ),
        ("model", "tests/conformance/test_claim.py"),
    ),
    Mutant(
        "claim-ignores-backoff",
        "a claim takes a stream whose backoff is not over",
        (Edit(STATEMENTS, ", OPEN, leases.c.available_at <= now())", ", OPEN)"),),
        ("model", "tests/conformance/test_claim.py"),
    ),
    Mutant(
        "claim-takes-paused",
        "a claim takes the paused and retired streams of a dead owner",
        (Edit(STATEMENTS, "leases.c.pool == IN_POOL, OPEN, EXPIRED\n", "leases.c.pool == IN_POOL, EXPIRED\n"),),
        ("model", "tests/conformance/test_claim.py"),
    ),
    Mutant(
        "claim-forgets-attempt",
        "a claim whose answer was lost is made a second time",
        (Edit(OPERATIONS, "    if repeated:\n", "    if False:\n"),),
        ("model", "tests/postgresql/test_commit.py"),
    ),
    Mutant(
        "renew-by-owner-only",
        "a heartbeat names the owner, not the grant: a late one of an earlier grant extends the next",
        (
            Edit(STATEMENTS, "            leases.c.fencing_token == asked.c.fencing_token,\n", ""),
            Edit(
                STATEMENTS,
                """                tuple_(leases.c.stream_id, leases.c.fencing_token).in_(
                    select(asked.c.stream_id, asked.c.fencing_token)
                ),""",
                "                leases.c.stream_id.in_(select(asked.c.stream_id)),",
            ),
        ),
        ("model", "tests/conformance/test_renew.py"),
    ),
    Mutant(
        "renew-expired",
        "a heartbeat revives a lease that has expired",
        (
            Edit(STATEMENTS, RENEWABLE, "RENEWABLE = leases.c.owner == HOLDER"),
            Edit(
                STATEMENTS,
                "_locked_by_key(asked, leases.c.expires_at > now())",
                "_locked_by_key(asked)",
            ),
        ),
        ("model", "tests/conformance/test_renew.py"),
    ),
    Mutant(
        "renew-waits",
        "a heartbeat waits for a row that somebody has locked",
        (
            Edit(
                STATEMENTS,
                ".with_for_update(key_share=True, skip_locked=True, of=leases)\n        .lateral",
                ".with_for_update(key_share=True, of=leases)\n        .lateral",
            ),
        ),
        ("tests/postgresql/test_heartbeat.py",),
    ),
    Mutant(
        "renew-no-lock",
        "a heartbeat updates without locking first: after a wait it revives what expired meanwhile",
        (Edit(STATEMENTS, "        .with_for_update(key_share=True, skip_locked=True, of=leases)\n", ""),),
        ("tests/postgresql/test_heartbeat.py -k revives",),
    ),
    Mutant(
        "renew-says-all-is-well",
        "a heartbeat says of a lost lease that it was only skipped",
        (
            Edit(
                OPERATIONS,
                "for stream_id in missed], owner) if missed else {}",
                "for stream_id in missed], owner) if False else {}",
            ),
        ),
        ("model", "tests/conformance/test_renew.py"),
    ),
    Mutant(
        "release-without-token",
        "a release names the owner, not the grant: a late one ends the next grant",
        (
            Edit(
                STATEMENTS,
                ".where(MINE).returning(*_LET_GO)",
                ".where(leases.c.stream_id == STREAM, leases.c.owner == HOLDER).returning(*_LET_GO)",
            ),
        ),
        ("model", "tests/conformance/test_release.py"),
    ),
    Mutant(
        "release-resets-token",
        "a released stream begins at token 0 again",
        (
            Edit(
                STATEMENTS,
                "        available_at=later(backoff),",
                "        fencing_token=0,\n        available_at=later(backoff),",
            ),
        ),
        ("model",),
    ),
    Mutant(
        "strays-live",
        "what is live in an owner's name is freed together with what has expired",
        (
            Edit(
                "leases/fleet.py",
                ".where(leases.c.owner == HOLDER, EXPIRED)",
                ".where(leases.c.owner == HOLDER)",
            ),
        ),
        ("model",),
    ),
    Mutant(
        "append-unfenced",
        "events are appended without a fence",
        (Edit(EVENTS, "    fence(connection, lease)\n", ""),),
        ("model", "tests/conformance/test_events.py"),
    ),
    Mutant(
        "append-counts-known",
        "an event that the stream has already takes a number, which nobody finds",
        (Edit(EVENTS, "func.row_number().over(order_by=offered.c.position)", "offered.c.position + 1"),),
        ("model", "tests/conformance/test_events.py"),
    ),
    Mutant(
        "checkpoint-unfenced",
        "a checkpoint is written without a fence",
        (Edit(OPERATIONS, "    fence(connection, lease)\n", ""),),
        ("model", "tests/conformance/test_events.py"),
    ),
    Mutant(
        "checkpoint-left-out",
        "a checkpoint that comes with events is not written",
        (Edit(EVENTS, "        put_checkpoint(connection, lease, checkpoint)\n", "        pass\n"),),
        ("model", "tests/conformance/test_events.py"),
    ),
)
