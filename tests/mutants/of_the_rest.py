"""Mutants of operators, of transactions and retries, and of the keeper."""

from __future__ import annotations

from tests.mutants.mutant import Edit, Mutant

ADMINISTRATION = "leases/administration.py"
RECIPES = "leases/recipes.py"
KEEPER = "leases/keeper.py"
HEART = "leases/heart.py"

HANDED = """    call = partial(
        administration.hand_over, to=to, ttl=ttl, claim_id=uuid5(uuid4(), "steal"), actor=actor, reason=reason
    )"""


OF_THE_REST = (
    Mutant(
        "expire-no-bump",
        "an operator's expire leaves the token as it is",
        (
            Edit(
                ADMINISTRATION,
                ".values(fencing_token=info.fencing_token + 1, **values)",
                '.values(fencing_token=info.fencing_token + (values["owner"] is not None), **values)',
            ),
        ),
        ("model", "tests/conformance/test_operator.py"),
    ),
    Mutant(
        "steal-no-bump",
        "a steal from oneself leaves the token as it is",
        (
            Edit(
                ADMINISTRATION,
                ".values(fencing_token=info.fencing_token + 1, **values)",
                '.values(fencing_token=info.fencing_token + (values["owner"] != info.owner), **values)',
            ),
        ),
        ("model", "tests/conformance/test_operator.py"),
    ),
    Mutant(
        "expire-ends-the-next",
        "an expire ends also a grant that was made between its two steps",
        (Edit(ADMINISTRATION, "    if info.fencing_token > observed.fencing_token:", "    if False:"),),
        ("model", "tests/conformance/test_operator.py"),
    ),
    Mutant(
        "expire-in-one-step",
        "the first step of an operator's action lets new fences pass",
        (
            Edit(
                ADMINISTRATION,
                "    if info.live:\n        # Not one",
                "    if False:\n        # Not one",
            ),
        ),
        ("model", "tests/postgresql/test_takeover.py"),
    ),
    Mutant(
        "operator-does-not-wait",
        "an operator's second step looks before it has waited for the writes in flight",
        (
            Edit(
                "leases/views.py",
                "with_for_update(key_share=not for_grant)",
                "with_for_update(key_share=True)",
            ),
        ),
        ("tests/postgresql/test_takeover.py",),
    ),
    Mutant(
        "operator-lock-timeout",
        "an operator's time limit begins anew with each writer that it waits for",
        (Edit(ADMINISTRATION, 'func.set_config("statement_timeout"', 'func.set_config("lock_timeout"'),),
        ("tests/postgresql/test_takeover.py -k follow",),
    ),
    Mutant(
        "steal-paused",
        "a paused stream can be stolen",
        (
            Edit(
                ADMINISTRATION,
                "    if info.paused_at is not None or info.retired_at is not None:",
                "    if info.retired_at is not None:",
            ),
        ),
        ("model", "tests/conformance/test_operator.py"),
    ),
    Mutant(
        "steal-twice",
        "a steal whose answer was lost is made a second time",
        (
            Edit(
                RECIPES,
                HANDED,
                """    def call(connection: Connection, seen: Observed) -> Lease:
        return administration.hand_over(
            connection, seen, to=to, ttl=ttl, claim_id=uuid4(), actor=actor, reason=reason
        )
""",
            ),
        ),
        ("model", "tests/postgresql/test_commit.py"),
    ),
    Mutant(
        "raised-tokens-keep-owners",
        "owners keep their leases when the tokens are raised after a restore",
        (
            Edit(
                ADMINISTRATION,
                "fencing_token=leases.c.fencing_token + by, owner=None, expires_at=None, available_at=now()",
                "fencing_token=leases.c.fencing_token + by, available_at=now()",
            ),
        ),
        ("model", "tests/conformance/test_operator.py"),
    ),
    Mutant(
        "reset-under-owner",
        "a checkpoint is reset while its owner works on",
        (
            Edit(
                ADMINISTRATION, "    if info.live:\n        raise LeaseHeld(", "    if False:\n        raise LeaseHeld("
            ),
        ),
        ("model", "tests/conformance/test_operator.py"),
    ),
    Mutant(
        "prune-last-event",
        "a prune takes a stream's last event: its number is given out again",
        (
            Edit(
                ADMINISTRATION,
                "and_(lease_events.c.recorded_at < before, not_last)",
                "lease_events.c.recorded_at < before",
            ),
        ),
        ("model", "tests/conformance/test_operator.py"),
    ),
    Mutant(
        "prune-current-grants",
        "a prune forgets grants that have not ended",
        (
            Edit(
                ADMINISTRATION,
                "(lease_grants, lease_grants.c.ended_at < before)",
                "(lease_grants, func.coalesce(lease_grants.c.ended_at, lease_grants.c.granted_at) < before)",
            ),
        ),
        ("model",),
    ),
    Mutant(
        "worker-never-dies",
        "an enlisted worker that is told to be dismissed stays on the list",
        (
            Edit(
                "leases/fleet.py",
                "delete(lease_workers).where(lease_workers.c.worker_id == limits.owner(worker_id))",
                'delete(lease_workers).where(lease_workers.c.worker_id == "")',
            ),
        ),
        ("model", "tests/conformance/test_claim.py"),
    ),
    Mutant(
        "begin-deferred",
        "transactions on SQLite begin as readers, and fail when they turn to writing",
        (
            Edit(
                "leases/engine.py",
                '        try:\n            connection.exec_driver_sql("BEGIN IMMEDIATE")',
                '        try:\n            connection.exec_driver_sql("BEGIN")',
            ),
        ),
        ("tests/test_engine.py", "tests/test_store.py"),
    ),
    Mutant(
        "commit-not-durable",
        "a server that commits without its disk does so for tokens too",
        (
            Edit(
                "leases/dialects.py",
                "set_config('synchronous_commit', 'on', true) END",
                "set_config('synchronous_commit', 'off', true) END",
            ),
        ),
        ("tests/postgresql/test_commit.py",),
    ),
    Mutant(
        "unknown-outcome-guessed",
        "a refusal of the second try is told as the truth, although the first may have been accepted",
        (Edit("leases/store.py", "            if unknown is not None:", "            if False:"),),
        ("model", "tests/test_store.py"),
    ),
    Mutant(
        "trust-from-the-answer",
        "the worker counts its trust from the answer of a heartbeat, not from before its send",
        (
            Edit(
                KEEPER,
                "        deadline_s = self.window.deadline(sent_at_s)\n",
                "        deadline_s = self.window.deadline(self._clock())\n",
            ),
        ),
        ("keeper",),
    ),
    Mutant(
        "trust-without-margin",
        "the worker trusts a lease to its very end, whatever the rates of the clocks",
        (
            Edit(
                "leases/trust.py",
                "(self.ttl_s if remaining_s is None else remaining_s) - self.margin_s",
                "(self.ttl_s if remaining_s is None else remaining_s)",
            ),
        ),
        ("tests/test_trust.py",),
    ),
    Mutant(
        "deadline-by-the-beat",
        "a lease's deadline is looked at by the thread whose I/O may hang",
        (
            Edit(HEART, "            self._keeper.end_overdue()\n", ""),
            Edit(
                KEEPER,
                "        held = len(leases) if self._counts else None\n",
                "        self.end_overdue()\n        held = len(leases) if self._counts else None\n",
            ),
        ),
        ("keeper",),
    ),
    Mutant(
        "skipped-is-renewed",
        "a lease whose row was locked is trusted as if it had been extended",
        (Edit(KEEPER, "                elif stream_id not in renewal.skipped:", "                else:"),),
        ("keeper",),
    ),
    Mutant(
        "child-inherits",
        "a forked child takes its parent's leases for its own",
        (Edit(KEEPER, "        return os.getpid() != self._pid", "        return False"),),
        ("keeper",),
    ),
    Mutant(
        "hung-beat-not-cut",
        "a heartbeat that hangs is waited for, for ever",
        (
            Edit(
                HEART,
                ">= interval_s and self.line.cut():",
                ">= interval_s and False:",
            ),
        ),
        ("keeper",),
    ),
)
