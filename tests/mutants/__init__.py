"""Seeded defects of the product: proof that the tests would see them.

    python -m tests.mutants                 # every mutant against its layers, and a table
    python -m tests.mutants fence-no-lock   # one
    python -m tests.mutants --list

A mutant is a few lines of the product replaced by others (`registry`). It is applied while Python imports the file, in
every Python process of a run (`loader`), so that no file of the checkout is touched. A layer is a command (`layers`):
it must pass without a mutant, and fail with one of those that it catches.
"""
