"""Mutants of the fleet: shares, handing over, adoption, the worker's end."""

from __future__ import annotations

from tests.mutants.mutant import Edit, Mutant

BALANCE = "leases/balance.py"
PLANNER = "leases/planner.py"
RUNS = "leases/runs.py"
REGISTRY = "leases/registry.py"
FLEET = "leases/fleet.py"
VIRTUAL = "tests/fleet/test_virtual.py"

OF_THE_FLEET = (
    Mutant(
        "plan-odd-ones-by-name",
        "the odd streams go to the first by name, not to those that hold more: they move for nothing",
        (Edit(BALANCE, "rest.append((peer.lease_count <= whole, whole - share", "rest.append((False, 0.0"),),
        ("tests/test_balance.py",),
    ),
    Mutant(
        "plan-ignores-leaving",
        "what is on its way out already is shed once more",
        (Edit(BALANCE, "held - leaving - keep", "held - keep"),),
        ("tests/test_balance.py",),
    ),
    Mutant(
        "plan-ignores-capacity",
        "a worker claims beyond its capacity",
        (Edit(BALANCE, "        if capacity * weight > total * peer.weight:\n", "        if True:\n"),),
        ("tests/test_balance.py",),
    ),
    Mutant(
        "plan-waits-for-the-dead",
        "a stream that a dead worker is to have waits until that worker's row has expired",
        (Edit(BALANCE, "if own.draining or not view.overdue:", "if True:"),),
        (VIRTUAL,),
    ),
    Mutant(
        "claim-tells-no-count",
        "a worker's count is not told by the transaction that changes it: what the others see does not add up",
        (Edit("leases/operations.py", "    if granted and held is not None:\n", "    if False:\n"),),
        ("tests/conformance/test_fleet.py",),
    ),
    Mutant(
        "plan-scans-on-sqlite",
        "a plan on SQLite reads all leases: its condition is a Boolean, which SQLAlchemy compares with 1",
        (
            Edit("leases/dialects.py", "    type = NullType()", "    type = Boolean()"),
            Edit("leases/dialects.py", "    ColumnElement,\n", "    Boolean,\n    ColumnElement,\n"),
        ),
        ("tests/test_plans.py",),
    ),
    Mutant(
        "adopt-without-swap",
        "of two processes of one name both adopt a lease",
        (Edit(FLEET, '            leases.c.claim_id == bindparam("found", type_=Identity),\n', ""),),
        ("tests/conformance/test_fleet.py",),
    ),
    Mutant(
        "adopt-expired",
        "a lease that has expired is adopted, and so revived",
        (Edit(FLEET, "            LIVE,\n            OPEN,\n", "            OPEN,\n"),),
        ("tests/conformance/test_fleet.py",),
    ),
    Mutant(
        "adopt-what-was-lost",
        "a grant that was held here, and lost, is adopted while its work may still run",
        (Edit(REGISTRY, "return self._adopts and (by_operator", "return self._adopts or (by_operator"),),
        ("tests/worker -k not_adopted",),
    ),
    Mutant(
        "adopt-nothing",
        "what an operator moves to a worker is left to expire",
        (Edit(REGISTRY, "return self._adopts and (by_operator", "return False and (by_operator"),),
        ("tests/worker -k adopted",),
    ),
    Mutant(
        "release-while-it-runs",
        "what is shed or drained is given up before its work has ended",
        (
            Edit(
                RUNS,
                "            if run.stop_by_s is None:\n                run.stop_by_s = now_s + self._terms.drain_s",
                "            if run.stop_by_s is None:\n                run.stop_by_s = now_s",
            ),
        ),
        ("tests/worker -k finish_what",),
    ),
    Mutant(
        "release-forgets-the-locked",
        "a stream whose row was locked when it was to be released is left to expire",
        (Edit(RUNS, "for session in locked}", "for session in locked if False}"),),
        ("tests/worker -k locked",),
    ),
    Mutant(
        "stall-keeps-the-lease",
        "a handler that stalls keeps its stream",
        (Edit(RUNS, "            elif self._stalls(run, now_s):", "            elif False:"),),
        ("tests/worker -k stalls",),
    ),
    Mutant(
        "stalled-thread-not-replaced",
        "a handler that stalls costs the worker a thread for good",
        (
            Edit(
                "leases/runner.py",
                "                self._threads -= 1\n                if self._due",
                "                if self._due",
            ),
        ),
        ("tests/worker -k stalls",),
    ),
    Mutant(
        "exit-without-release",
        "an interpreter that ends leaves its leases to expire",
        (
            Edit(
                "leases/worker.py",
                "            atexit.register(_stop_at_exit",
                "            (lambda *_: None)(_stop_at_exit",
            ),
            Edit(
                REGISTRY, "            atexit.register(_close_at_exit", "            (lambda *_: None)(_close_at_exit"
            ),
        ),
        ("tests/fleet/test_processes.py -k program",),
    ),
    Mutant(
        "nobody-is-told",
        "a release is not notified",
        (Edit("leases/statements.py", "case((_AWAITED, freed(leases.c.pool)))", "null()"),),
        ("tests/postgresql/test_notify.py",),
    ),
    Mutant(
        "election-releases-early",
        "a leader's lease is released while its work still runs",
        (
            Edit("leases/election.py", "worker.join()  # never release while", "worker.join(0)  # never release while"),
            Edit("leases/election.py", "worker.join()  # nor lead again", "worker.join(0)  # nor lead again"),
        ),
        ("tests/test_election.py -k still_runs",),
    ),
)
