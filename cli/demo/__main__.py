"""`python -m leases.cli.demo`: the same as `leases demo`."""

import sys

from leases.cli import main

main(["demo", *sys.argv[1:]])
