"""`python -m leases.cli.demo`: the same as `leases demo`."""

from leases.cli.demo.command import demo

demo(prog_name="leases demo")
