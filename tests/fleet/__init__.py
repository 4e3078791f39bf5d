"""Fleets of workers: in virtual time, and as real processes."""
