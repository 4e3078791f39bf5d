"""Mutants of the fence: of its lock, its check, its refusal, and of what stands behind it in the schema."""

from __future__ import annotations

from tests.mutants.mutant import Edit, Mutant

FENCING = "leases/fencing.py"
STATEMENTS = "leases/statements.py"
EVENTS = "leases/events.py"
ALONE = "tests/postgresql/direct/test_append.py"
WAYS = "tests/postgresql/direct/test_ways.py"
CONNECTIONS = "tests/postgresql/direct/test_connections.py"
MIGRATION = "alembic/versions/0001_lease_tables.py"

HELD_FOR = "held.with_for_update(read=True, key_share=True)."

IN_SAVEPOINT = """    if connection.in_nested_transaction():
        raise ConfigError("fence inside a savepoint"""

BEHIND_SAVEPOINT = "    if not checked.outermost and connection.execute(SAVEPOINTS).scalar_one():"

OF_THE_FENCE = (
    Mutant(
        "fence-no-lock",
        "the fence only looks: a grant passes a fenced write in flight",
        (Edit(FENCING, HELD_FOR, "held."),),
        ("tests/postgresql/test_takeover.py", "tests/postgresql/test_fence.py"),
    ),
    Mutant(
        "fence-for-share",
        "the fence locks FOR SHARE: heartbeats wait for fenced writes",
        (Edit(FENCING, HELD_FOR, "held.with_for_update(read=True)."),),
        ("tests/postgresql/test_heartbeat.py",),
    ),
    Mutant(
        "fence-in-savepoint",
        "the fence is allowed within a savepoint, whose rollback gives its lock back",
        (
            Edit(FENCING, IN_SAVEPOINT, IN_SAVEPOINT.replace("connection.in_nested_transaction()", "False")),
            Edit(FENCING, BEHIND_SAVEPOINT, "    if False:"),
        ),
        ("tests/conformance/test_fence.py",),
    ),
    Mutant(
        "fence-in-raw-savepoint",
        "a savepoint that SQLAlchemy does not know is overlooked",
        (Edit(FENCING, BEHIND_SAVEPOINT, "    if False:"),),
        ("tests/conformance/test_fence.py",),
    ),
    Mutant(
        "fence-clock-before-lock",
        "the expiry is compared with the time before the fence waited",
        (
            Edit(
                FENCING,
                "seconds(held.c.expires_at, wall())",
                "seconds(held.c.expires_at, now())",
            ),
        ),
        ("tests/postgresql/test_fence.py -k while_it_waited",),
    ),
    Mutant(
        "fence-no-expiry",
        "the fence passes on a lease that has expired",
        (
            Edit(FENCING, "shortened).where(remaining.c.left_s > 0)", "shortened)"),
            Edit(FENCING, "limit).where(remaining.c.left_s > 0)", "limit)"),
            Edit(FENCING, "update(leases).where(MINE, leases.c.expires_at > now())", "update(leases).where(MINE)"),
        ),
        ("model", "tests/conformance/test_fence.py"),
    ),
    Mutant(
        "fence-at-expiry",
        "the fence still passes at the moment of the expiry",
        (
            Edit(FENCING, "shortened).where(remaining.c.left_s > 0)", "shortened).where(remaining.c.left_s >= 0)"),
            Edit(FENCING, "limit).where(remaining.c.left_s > 0)", "limit).where(remaining.c.left_s >= 0)"),
            Edit(FENCING, "where(MINE, leases.c.expires_at > now())", "where(MINE, leases.c.expires_at >= now())"),
        ),
        ("model", "tests/conformance/test_fence.py"),
    ),
    Mutant(
        "token-at-most",
        "a token is good if the row's is at most it: one that nobody was granted passes",
        (Edit(STATEMENTS, "leases.c.fencing_token == TOKEN, func", "leases.c.fencing_token <= TOKEN, func"),),
        ("model",),
    ),
    Mutant(
        "token-at-least",
        "a token is good if the row's is at least it: an owner's earlier grants pass",
        (Edit(STATEMENTS, "leases.c.fencing_token == TOKEN, func", "leases.c.fencing_token >= TOKEN, func"),),
        ("model", "tests/conformance/test_release.py"),
    ),
    Mutant(
        "token-without-owner",
        "a grant is named by stream and token, not by its owner",
        (
            Edit(
                STATEMENTS,
                'leases.c.fencing_token == TOKEN, func.coalesce(leases.c.owner, "") == HOLDER)',
                "leases.c.fencing_token == TOKEN)",
            ),
        ),
        ("model", "tests/conformance/test_release.py"),
    ),
    Mutant(
        "refusal-leaves-transaction",
        "who swallows a refusal can commit what was written before it, and go on",
        (
            Edit(FENCING, "        transaction._connection_rollback_impl()\n", ""),
            Edit(FENCING, "        transaction._deactivate_from_connection()\n", "        pass\n"),
        ),
        ("tests/conformance/test_fence.py",),
    ),
    Mutant(
        "fence-no-idle-limit",
        "the server does not end a writer that is frozen between statements",
        (
            Edit(
                FENCING,
                '["idle_in_transaction_session_timeout"] + [TRANSACTION_TIMEOUT] * (postgresql_version >= 17)',
                "list[str]()",
            ),
        ),
        ("tests/postgresql/test_fence.py -k frozen",),
    ),
    Mutant(
        "fence-lengthens-limits",
        "the fence replaces the caller's own, shorter time limits",
        (Edit(FENCING, 'or_(setting == "0", cast(setting, Interval) > left)', "true()"),),
        ("tests/postgresql/test_fence.py -k lengthen",),
    ),
    Mutant(
        "statement-not-from-its-fence",
        "the events of a statement that fences do not come from the fence's row: a stale owner's are written",
        (
            Edit(EVENTS, "STREAM if fenced is None else fenced.c.stream_id", "STREAM"),
            Edit(EVENTS, "offered if fenced is None else fenced.join(offered, true())", "offered"),
        ),
        (f"{ALONE} -k granted_meanwhile", "tests/conformance/test_events.py"),
    ),
    Mutant(
        "statement-checkpoint-not-from-its-fence",
        "the checkpoint of a statement that fences does not come from the fence's row",
        (Edit(EVENTS, "select(new.c.stream_id, TOKEN,", "select(STREAM, TOKEN,"),),
        (f"{ALONE} -k while_it_waited",),
    ),
    Mutant(
        "statement-fences-each-event",
        "a statement that fences does so anew for each event of a batch: those after the lease's end are dropped",
        (
            Edit(
                FENCING, 'row.subquery("fenced") if single else row.cte', 'row.subquery("fenced") if True else row.cte'
            ),
        ),
        ("tests/test_plans.py -k appends", f"{ALONE} -k as_a_whole"),
    ),
    Mutant(
        "statement-takes-refusal-for-known",
        "a statement that fences, and writes nothing, is said to have found its events in the log",
        (Edit(EVENTS, "max(new.values())) if new else NOT_TAKEN", "max(new.values(), default=0))"),),
        (f"{ALONE} -k granted_meanwhile",),
    ),
    Mutant(
        "statement-without-lock",
        "a statement that fences only looks: a grant passes it in flight",
        (Edit(FENCING, HELD_FOR, "held."),),
        (f"{ALONE} -k nobody_is_granted",),
    ),
    Mutant(
        "statement-clock-before-lock",
        "a statement that fences compares the expiry with the time before it waited",
        (Edit(FENCING, "seconds(held.c.expires_at, wall())", "seconds(held.c.expires_at, now())"),),
        (f"{ALONE} -k while_it_waited",),
    ),
    Mutant(
        "statement-outlives-lease",
        "a statement that fences, and hangs, is not ended with its lease",
        (Edit(FENCING, "    limit = _shortened(timeout, remaining)\n", '    limit = literal("").label(timeout)\n'),),
        (f"{ALONE} -k hangs",),
    ),
    Mutant(
        "statement-not-durable",
        "a statement that fences commits without waiting for the disk, where that is the default",
        (Edit(FENCING, 'durably().label("durable"), limit', "limit"),),
        (f"{WAYS} -k durable",),
    ),
    Mutant(
        "direct-at-any-isolation",
        "statements run by themselves also where the default is not READ COMMITTED",
        (Edit("leases/direct.py", 'return bool(level == "read committed")', "return True"),),
        (f"{WAYS} -k another_isolation",),
    ),
    Mutant(
        "direct-lost-answer-is-refusal",
        "a statement whose answer was lost is said to have failed",
        (
            Edit(
                "leases/transaction.py",
                "        raise committed_or_not(error, tables.url) from None",
                "        raise translate(error, tables.url) from None",
            ),
        ),
        (f"{CONNECTIONS} -k no_refusal",),
    ),
    Mutant(
        "direct-keeps-interrupted",
        "a connection that was interrupted goes back to its pool",
        (Edit("leases/direct.py", "        if interrupted:\n", "        if False:\n"),),
        (f"{CONNECTIONS} -k interrupted",),
    ),
    Mutant(
        "direct-trusts-what-is-kept",
        "the connection that a store keeps is used without a look whether the server has ended it",
        (Edit("leases/direct.py", "        if direct.is_quiet:\n", "        if True:\n"),),
        (f"{CONNECTIONS} -k replaced_before",),
    ),
    Mutant(
        "direct-never-lets-go",
        "a store keeps its connection while somebody else waits for one of its pool",
        (Edit("leases/direct.py", "        while self._kept:\n", "        while False:\n"),),
        (f"{CONNECTIONS} -k last_of_its_pool",),
    ),
    Mutant(
        "direct-of-the-parent",
        "a forked child uses the connection that its parent keeps",
        (Edit("leases/direct.py", "        self._kept.clear()\n", ""),),
        (f"{CONNECTIONS} -k forked",),
    ),
    Mutant(
        "no-unique-index",
        "without the index over stream and token a grant does not wait for a fenced write",
        (
            Edit(
                MIGRATION,
                '        sa.UniqueConstraint("stream_id", "fencing_token", name="leases_fence"),\n',
                "",
            ),
        ),
        ("tests/postgresql/test_takeover.py", "tests/test_migrations.py"),
    ),
    Mutant(
        "guard-lets-token-fall",
        "the triggers let a token fall",
        (
            Edit(MIGRATION, "ELSIF NEW.fencing_token < OLD.fencing_token THEN", "ELSIF false THEN"),
            Edit(MIGRATION, "        WHERE NEW.fencing_token < OLD.fencing_token;", "        WHERE false;"),
        ),
        ("tests/conformance/test_guard.py",),
    ),
    Mutant(
        "guard-lets-owner-change",
        "the triggers let an owner be replaced under its token",
        (
            Edit(MIGRATION, "ELSIF NEW.owner IS NOT NULL AND NEW.owner IS DISTINCT FROM OLD.owner", "ELSIF false"),
            Edit(MIGRATION, "WHERE NEW.owner IS NOT NULL AND NEW.owner IS NOT OLD.owner AND", "WHERE false AND"),
        ),
        ("tests/conformance/test_guard.py",),
    ),
    Mutant(
        "grants-not-recorded",
        "a grant that follows another of the same stream is not recorded",
        (
            Edit(
                MIGRATION,
                "IF NEW.owner IS NOT NULL AND NEW.fencing_token > OLD.fencing_token THEN\n            INSERT",
                "IF NEW.owner IS NOT NULL AND OLD.fencing_token = 0 THEN\n            INSERT",
            ),
            Edit(
                MIGRATION,
                "WHERE NEW.owner IS NOT NULL AND NEW.fencing_token > OLD.fencing_token;",
                "WHERE NEW.owner IS NOT NULL AND OLD.fencing_token = 0;",
            ),
        ),
        ("model", "model-postgresql"),
    ),
    Mutant(
        "grant-outlives-lease",
        "a grant is recorded to have ended when somebody noticed, not when its lease did",
        (
            Edit(MIGRATION, "least(statement_timestamp(), OLD.expires_at)", "statement_timestamp()"),
            Edit(MIGRATION, "min({NOW}, OLD.expires_at)", "{NOW}"),
        ),
        ("model", "model-postgresql"),
    ),
    Mutant(
        "guard-lets-row-go",
        "the triggers let a lease's row, and its token with it, be deleted",
        (
            Edit(MIGRATION, "BEFORE INSERT OR DELETE OR UPDATE OF", "BEFORE INSERT OR UPDATE OF"),
            Edit(
                MIGRATION,
                "    CREATE TRIGGER leases_guard_delete BEFORE DELETE ON leases\n",
                "    CREATE TRIGGER leases_guard_delete BEFORE DELETE ON leases WHEN false\n",
            ),
        ),
        ("tests/conformance/test_guard.py",),
    ),
    Mutant(
        "protect-no-lock",
        "the trigger on a user's table only looks: a grant passes a protected write in flight",
        (
            Edit(
                "leases/protection.py", "l.stream_id = write.stream_id FOR KEY SHARE;", "l.stream_id = write.stream_id;"
            ),
        ),
        ("tests/test_protection.py",),
    ),
    Mutant(
        "protect-ignores-updates",
        "the trigger on a user's table lets updates pass",
        (
            Edit("leases/protection.py", "AFTER {event} ON {target}", "AFTER INSERT ON {target}"),
            Edit("leases/protection.py", "BEFORE {event} ON {quote(table)}", "BEFORE INSERT ON {quote(table)}"),
        ),
        ("tests/test_protection.py",),
    ),
    Mutant(
        "protect-no-expiry",
        "the trigger on a user's table lets the rows of an expired lease pass",
        (
            Edit("leases/protection.py", " OR coalesce(left_s, 0) <= 0 THEN", " THEN"),
            Edit("leases/protection.py", " AND expires_at > {SQLITE_NOW})", ")"),
        ),
        ("model", "tests/test_protection.py"),
    ),
    Mutant(
        "watermark-lets-equal-pass",
        "a sink takes an equal token of another owner",
        (
            Edit(
                FENCING,
                "            and_(seen.fencing_token == offered.fencing_token, seen.owner == offered.owner),",
                "            seen.fencing_token == offered.fencing_token,",
            ),
        ),
        ("model", "tests/conformance/test_fence.py"),
    ),
)
