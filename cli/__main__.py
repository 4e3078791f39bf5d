"""`python -m leases.cli` is the command `leases`."""

from leases.cli import main

main()
