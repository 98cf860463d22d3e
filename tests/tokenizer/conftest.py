"""A tokenizer of each kind."""

import pytest

from pocketlm.tokenizer.base import Tokenizer
from tests.support.tokenizer_kinds import KINDS, named


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return named(request.param)
