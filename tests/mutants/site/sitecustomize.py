"""Imported by every Python that has this directory on its path, before all else: applies the mutant of the run."""

from tests.mutants.loader import install_from_environment

install_from_environment()
