"""All rules: what may happen, written once for `machine` and for `volume`."""

from __future__ import annotations

from tests.model import operators, owners, sinks
from tests.model.kinds import BUNDLES, RULES, Choice, Kept, Rule

__all__ = ["BUNDLES", "RULES", "Choice", "Kept", "Rule", "operators", "owners", "sinks"]
