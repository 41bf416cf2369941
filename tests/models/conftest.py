from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers

from quire.kernels.base import Kernels
from quire.kernels.select import create_kernels
from quire.models.decoder import DecoderModel
from quire.models.loader import load_model
from quire.models.registry import resolve_spec
from quire.weights.source import open_source
from tests.models.variants import build_reference, save

Pair = tuple[transformers.PreTrainedModel, DecoderModel]


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """These models are so small that threads only wait for each other, minutes on a busy machine.

    `test_logits_do_not_depend_on_the_number_of_threads` asks for more.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", params=["native", "reference"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """Where nothing can be compiled, what serves there stands for the native ones too."""
    return create_kernels("auto" if request.param == "native" else request.param)


@pytest.fixture(scope="session")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., tuple[transformers.PreTrainedModel, Path]]:
    """A variant's reference model and the directory it was saved to, made once per session."""

    @cache
    def make(
        name: str, dtype: torch.dtype = torch.float32
    ) -> tuple[transformers.PreTrainedModel, Path]:
        model = build_reference(name, dtype=dtype)
        return model, save(model, tmp_path_factory.mktemp(name))

    return make


@pytest.fixture(scope="session")
def pair(
    checkpoint: Callable[..., tuple[transformers.PreTrainedModel, Path]],
) -> Callable[..., Pair]:
    """(reference, ours) for a variant, a dtype and a set of kernels."""

    @cache
    def make(name: str, kernels: Kernels, dtype: torch.dtype = torch.float32) -> Pair:
        reference, directory = checkpoint(name, dtype)
        spec = resolve_spec(json.loads((directory / "config.json").read_text()))
        return reference, load_model(
            spec, open_source(directory), dtype=dtype, kernels=kernels, max_model_len=256
        )

    return make
