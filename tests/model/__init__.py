"""The product against a model of it: the same random steps on both, every answer and every row compared.

| module | holds |
| --- | --- |
| `model`, `operator` | what the product promises, as plainly as possible: read these as the specification |
| `product`, `tables` | a real store whose answers can be lost, and its rows |
| `world` | the product and the model side by side: each step is done on both, and compared |
| `kinds`, `owners`, `operators`, `sinks`, `rules` | what may happen, written once for both drivers |
| `invariants` | the promises as conditions on the product's own rows; they know nothing of the model |
| `machine` | drives the rules by Hypothesis, which shrinks a failure to its shortest story |
| `volume` | drives the rules by a seed, for a hundred thousand steps and more: `python -m tests.model` |
"""
