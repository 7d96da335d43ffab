"""Rotary scaling of GGUF files, against transformers' own formula and llama.cpp's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from fate_moe.checkpoints.gguf import GgufCheckpoint
from fate_moe.errors import CheckpointError, UnsupportedModelError
from fate_moe.store.convert import convert
from tests.support.checkpoints import tiny_model
from tests.support.engines import load_model
from tests.support.gguf_files import rewrite_gguf, write_gguf

TOKENS = torch.arange(96)[None]
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


def llama3_table(base: float, size: int) -> np.ndarray:
    """What llama.cpp's converter writes as rope_freqs.weight for LLAMA3, by its formula."""
    table = []
    for i in range(0, size, 2):
        wavelength = 2 * math.pi * base ** (i / size)
        low, high = (LLAMA3["original_max_position_embeddings"] / LLAMA3[f"{name}_freq_factor"] for name in ("low", "high"))
        smooth = (LLAMA3["original_max_position_embeddings"] / wavelength - LLAMA3["low_freq_factor"]) / (
            LLAMA3["high_freq_factor"] - LLAMA3["low_freq_factor"]
        )
        between = 1 / ((1 - smooth) / LLAMA3["factor"] + smooth)
        table.append(1.0 if wavelength < high else LLAMA3["factor"] if wavelength > low else between)
    return np.array(table, np.float32)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("rope")
    for architecture, family in (("llama", "mixtral"), ("qwen2moe", "qwen2_moe"), ("deepseek2", "deepseek_v3")):
        write_gguf(folder / f"{architecture}.gguf", tiny_model(family), architecture)
    return {path.stem: path for path in folder.iterdir()}


def read_model(checkpoint: GgufCheckpoint) -> Any:
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(checkpoint.folder), dtype=torch.float32
    ).eval()
    model.load_state_dict({name: checkpoint.read(name).float() for name in checkpoint.names})
    return model


def rotary(
    source: Path,
    target: Path,
    put: Mapping[str, Any] = MappingProxyType({}),
    tensors: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> dict[str, Any]:
    checkpoint = GgufCheckpoint(rewrite_gguf(source, target, put=put, tensors=tensors))
    made: dict[str, Any] = transformers.AutoConfig.from_pretrained(checkpoint.folder).rope_parameters
    return made


def test_rope_freqs_of_llama_3_are_applied(tmp_path: Path, files: dict[str, Path]) -> None:
    """A merge of Llama 3.1 models: the same logits as transformers' llama3 scaling, whatever the length."""
    model = tiny_model("mixtral", rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, **LLAMA3})
    with torch.no_grad():
        for value in model.state_dict().values():
            value.copy_(value.bfloat16())
    write_gguf(tmp_path / "plain.gguf", model, "llama")
    path = rewrite_gguf(tmp_path / "plain.gguf", tmp_path / "m.gguf", tensors={"rope_freqs.weight": llama3_table(1e4, 16)})
    checkpoint = GgufCheckpoint(path)
    assert not checkpoint.unread
    with torch.no_grad():
        want, plain = model(TOKENS).logits, read_model(GgufCheckpoint(tmp_path / "plain.gguf"))(TOKENS).logits
        assert (read_model(checkpoint)(TOKENS).logits - want).abs().max() < 1e-4
        assert (plain - want).abs().max() > 1e-2
    convert(path, tmp_path / "store")
    ours = load_model(tmp_path / "store", expert_cache="25%")
    with torch.no_grad():
        ours(TOKENS)
    assert torch.allclose(ours.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq, rtol=1e-6)
    ours.fate.close()


def test_longrope_tables_are_applied(tmp_path: Path, files: dict[str, Path]) -> None:
    long, short = np.linspace(1, 4, 8, dtype=np.float32), np.linspace(1, 1.5, 8, dtype=np.float32)
    scaling = {"type": "longrope", "attn_factor": 1.25, "original_context_length": 64}
    put = {f".rope.scaling.{key}": value for key, value in scaling.items()}
    tables = {"rope_factors_long.weight": long, "rope_factors_short.weight": short}
    made = rotary(files["llama"], tmp_path / "m.gguf", put, tables)
    assert (made["rope_type"], made["attention_factor"], made["original_max_position_embeddings"]) == ("longrope", 1.25, 64)
    assert (made["long_factor"], made["short_factor"]) == (long.tolist(), short.tolist())
    for absent in tables:
        with pytest.raises(UnsupportedModelError, match="'longrope' is read for llama, granitemoe"):
            rotary(files["llama"], tmp_path / "m.gguf", put, {name: table for name, table in tables.items() if name != absent})


def test_a_factor_scales_a_table(tmp_path: Path, files: dict[str, Path]) -> None:
    table = {"rope_freqs.weight": np.linspace(1, 2, 8, dtype=np.float32)}
    made = rotary(files["llama"], tmp_path / "m.gguf", {".rope.scaling.factor": 2.0}, table)
    assert made["short_factor"] == made["long_factor"] == pytest.approx(np.linspace(2, 4, 8).tolist())


@pytest.mark.parametrize(
    ("put", "want"),
    [
        ({".rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),  # llama.cpp's default type
        ({".rope.scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),  # the old name
        ({".rope.scaling.type": "none", ".rope.scaling.factor": 4.0}, {"rope_type": "default"}),
        ({".rope.scaling.type": "linear"}, {"rope_type": "default"}),
        (
            {".rope.scaling.type": "yarn", ".rope.scaling.factor": 4.0, ".rope.scaling.yarn_beta_fast": 16.0},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "beta_fast": 16.0},
        ),
        (
            {".rope.scaling.type": "yarn", ".rope.scaling.factor": 4.0, ".rope.scaling.attn_factor": 0.5},
            {"attention_factor": pytest.approx(0.5 * (0.1 * math.log(4) + 1))},
        ),
        (
            {".rope.scaling.type": "yarn", ".rope.scaling.factor": 4.0, ".rope.scaling.yarn_attn_factor": 1.5},
            {"attention_factor": 1.5},
        ),
    ],
)
def test_scaling_of_the_metadata(tmp_path: Path, files: dict[str, Path], put: dict[str, Any], want: dict[str, Any]) -> None:
    made = rotary(files["qwen2moe"], tmp_path / "m.gguf", put)
    assert {key: made[key] for key in want} == want


@pytest.mark.parametrize(
    ("architecture", "put", "said"),
    [
        ("qwen2moe", {".rope.scaling.type": "longrope"}, "'longrope' is read for"),
        ("qwen2moe", {".rope.scaling.type": "su"}, "rotary scaling 'su' is not supported"),
        ("qwen2moe", {".rope.scaling.attn_factor": 2.0}, "attn_factor 2 with 'linear'"),
        (
            "qwen2moe",
            {".rope.scaling.type": "yarn", ".rope.scaling.factor": 2.0, ".rope.scaling.yarn_ext_factor": 0.5},
            "ext_factor",
        ),
        ("qwen2moe", {".rope.scaling.alpha": 1000.0}, "rope.scaling.alpha"),
        ("deepseek2", {".rope.scaling.type": "yarn", ".rope.scaling.factor": 2.0, ".rope.scaling.attn_factor": 0.5}, "latent"),
    ],
)
def test_scaling_that_transformers_cannot_express(
    tmp_path: Path, files: dict[str, Path], architecture: str, put: dict[str, Any], said: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        rotary(files[architecture], tmp_path / "m.gguf", put)


def test_yarn_without_its_factor_is_incomplete(tmp_path: Path, files: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match=r"qwen2moe.rope.scaling.factor is missing"):
        rotary(files["qwen2moe"], tmp_path / "m.gguf", {".rope.scaling.type": "yarn"})


def test_tables_that_are_not_applied(tmp_path: Path, files: dict[str, Path]) -> None:
    """llama.cpp applies them for some architectures only; a table of ones changes nothing anywhere."""
    ones, twos = np.ones(8, np.float32), np.full(8, 2, np.float32)
    with pytest.raises(UnsupportedModelError, match=r"no place for rope_freqs.weight"):
        rotary(files["qwen2moe"], tmp_path / "m.gguf", {}, {"rope_freqs.weight": twos})
    with pytest.raises(UnsupportedModelError, match=r"no place for rope_factors_long.weight"):
        rotary(files["llama"], tmp_path / "m.gguf", {}, {"rope_factors_long.weight": twos})
    for architecture in ("qwen2moe", "llama"):
        path = rewrite_gguf(files[architecture], tmp_path / "m.gguf", tensors={"rope_freqs.weight": ones})
        checkpoint = GgufCheckpoint(path)
        assert checkpoint.unread == {"rope_freqs.weight": "a rotary table of ones, which changes nothing"}
        assert transformers.AutoConfig.from_pretrained(checkpoint.folder).rope_parameters["rope_type"] == "default"
    with pytest.raises(UnsupportedModelError, match="together with YaRN"):
        rotary(
            files["llama"],
            tmp_path / "m.gguf",
            {".rope.scaling.type": "yarn", ".rope.scaling.factor": 2.0},
            {"rope_freqs.weight": twos},
        )


@pytest.mark.parametrize("table", [[2.0] * 4, [1.0] * 7 + [0.0], [1.0] * 7 + [float("nan")]])
def test_a_table_that_is_none(tmp_path: Path, files: dict[str, Path], table: list[float]) -> None:
    with pytest.raises(CheckpointError, match="is not a table of 8 positive numbers"):
        rotary(files["llama"], tmp_path / "m.gguf", {}, {"rope_freqs.weight": np.array(table, np.float32)})
