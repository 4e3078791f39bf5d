"""Tests of the `leases` command."""
