"""Nothing public is left out."""

from __future__ import annotations

import importlib

import pytest

from tests.hostile import surface, values


def test_every_public_name_is_attacked() -> None:
    assert surface.unattacked() == set(), "put it into surface.ATTACKED, with the test that attacks it"


@pytest.mark.parametrize("test", sorted({*surface.ATTACKED.values(), *surface.OTHERWISE.values()}))
def test_what_attacks_is_there(test: str) -> None:
    module, dot, name = test.partition(".")
    if dot and module.startswith("test_"):
        assert callable(getattr(importlib.import_module(f"tests.hostile.{module}"), name))


@pytest.mark.parametrize("kind", surface.STORES)
def test_every_parameter_has_values(kind: type) -> None:
    known = values.parameters(values.SOME_LEASE)
    for name, signature in surface.methods(kind).items():
        for parameter in list(signature.parameters)[1:]:
            assert parameter in known, f"values.parameters lacks {parameter!r}, of {kind.__name__}.{name}"


def test_both_colours_have_the_same_methods() -> None:
    sync, log, asynchronous, async_log = (surface.methods(kind) for kind in surface.STORES)
    assert {name: list(each.parameters) for name, each in sync.items()} == {
        name: list(each.parameters) for name, each in asynchronous.items()
    }
    assert log.keys() == async_log.keys()
