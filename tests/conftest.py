"""Shared fixtures. Everything that is converted or cached goes to a temporary FATE_HOME."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # GPU kernels run on the CPU; read when triton is first imported
# Two workers on two cores: threads of the processes that tests start would wait for each other longer than they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from fate_moe.engine.prepare import store_for
from tests.support.checkpoints import tiny_checkpoint
from tests.support.engines import load_model

torch.set_num_threads(1)
if find_spec("triton") is not None:
    from tests.support.interpreter import quicken

    quicken()


@pytest.fixture(scope="session", autouse=True)
def fate_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("fate-home")
        patch.setenv("FATE_HOME", str(home))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield home


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny random fp32 checkpoint of a family, made once a session."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = tiny_checkpoint(family, tmp_path_factory.mktemp("checkpoints") / family)
        return made[family]

    return make


@pytest.fixture
def loaded(checkpoint: Callable[[str], Path]) -> Iterator[Callable[..., Any]]:
    """Load a tiny model of a family without a tokenizer; closed when the test ends."""
    models: list[Any] = []

    def open_model(family: str, precision: str = "lossless", **options: Any) -> Any:
        model = load_model(store_for(checkpoint(family), precision), **options)
        models.append(model)
        return model

    yield open_model
    for model in models:
        model.fate.close()
