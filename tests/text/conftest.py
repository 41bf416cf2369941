from __future__ import annotations

import pytest

from quire.text import Tokenizer
from tests.text import builders


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    return Tokenizer(builders.byte_level())


@pytest.fixture(scope="session")
def sentencepiece() -> Tokenizer:
    return Tokenizer(builders.sentencepiece())


@pytest.fixture(scope="session")
def sentencepiece_unstripped() -> Tokenizer:
    return Tokenizer(builders.sentencepiece(strip=False))


@pytest.fixture(scope="session")
def metaspace() -> Tokenizer:
    return Tokenizer(builders.metaspace())


@pytest.fixture(scope="session")
def wordpiece() -> Tokenizer:
    return Tokenizer(builders.wordpiece())


@pytest.fixture(
    scope="session",
    params=["byte_level", "sentencepiece", "sentencepiece_unstripped", "metaspace", "wordpiece"],
)
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)
