"""Leases beside the alternatives, on the same work, in one run: `python -m benchmarks --help`.

    contestant   what a contestant must do, and what a client of one can do
    contestants  those there are: leases, the bare SQL that is its floor, and the peers
    servers      starts what they need on free ports of 127.0.0.1, in a temporary directory
    crew         clients in processes of their own, that start at one moment
    workloads    what is measured
    measure      rounds, in which the contestants alternate
    result       what was measured, as values and as JSON
    reach        what leases set out to reach, and whether it did
    chart, page  docs/*.svg and docs/performance.md, made of a JSON file

Figures of one run can be compared with each other, and with nothing else. Timings are never asserted in a test.
"""
