"""Fixtures that several files of unit tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.unit.engine_support import reference_model, save
from trireme.loading.whole import load_model
from trireme.models.model import Model


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """PyTorch computes on one thread while the module runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A random Llama of two small layers."""
    return load_model(save(reference_model("llama3"), Path(tmp_path_factory.mktemp("llama3"))))


@pytest.fixture(scope="module")
def smaller(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Other weights, the same tokens: a bad draft model."""
    return load_model(save(reference_model("qwen3"), Path(tmp_path_factory.mktemp("qwen3"))))
