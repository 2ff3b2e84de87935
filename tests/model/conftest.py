"""Models of the kinds that every test takes."""

from __future__ import annotations

import pytest

from small_models import SHAPES, VOCAB, with_options
from storylab.model.transformer import Transformer


@pytest.fixture(params=["plain", "options"])
def any_model(request: pytest.FixtureRequest) -> Transformer:
    plain = request.param == "plain"
    return Transformer(SHAPES[1], VOCAB, seed=2) if plain else with_options()
