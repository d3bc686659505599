"""The zoo's fast part: families that compile in a second or two and that test_models does not have, each with one shape;
``make zoo`` runs everything."""

from __future__ import annotations

import pytest

from tests.zoo.harness import COUPLED, SHAPES, families, run

FAST = {
    "auxiliary_loss": 0,
    "bert": 2,
    "handmade_unet": 1,
    "late_input": 2,
    "llama_tied": 1,
    "lstm": 2,
    "mamba": 0,
    "mixtral": 1,
    "regions": 1,
    "shared_module": 2,
    "transformer": 0,
    "vit": 2,
    "whisper": 1,
}
"""Family -> which of SHAPES."""


@pytest.mark.parametrize("name", FAST)
def test_a_family_is_exact(name: str) -> None:
    row = run(name, families()[name](), *SHAPES[FAST[name]])
    assert row.ok, row
    assert row.coupled == (name in COUPLED)
