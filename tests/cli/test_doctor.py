from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fate_moe.cli import main
from fate_moe.engine.prepare import store_for
from tests.support.tiny import tiny_model


def test_doctor_says_what_is_used_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    kernels = found["kernels"]
    assert found["gpus"][0]["why"]
    sets = ["amx", "avx512-vnni", "avx-vnni", "avx2", "neon-i8mm", "neon-dot", "neon", "portable"]
    assert [kernel["name"] for kernel in kernels][: len(sets)] == sets
    assert main(["doctor"]) == 0
    table = capsys.readouterr().out
    assert all(kernel["name"] in table for kernel in kernels)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("verb", [["doctor", "--measure"], ["run", "--vram", "auto", "a prompt"], ["plan", "--device", "cuda"]])
def test_without_a_gpu_one_line_says_so(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(verb) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("fate: no GPU can be used here: ")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host-compute", "0.5"], "host_compute is for the experts that a GPU misses; give vram too"),
        (["--vram", "1GiB", "--host-compute", "most"], "host_compute 'most' is not auto, off or a fraction between 0 and 1"),
        (["--vram", "1GiB", "--predictor", "temporal"], "on a GPU the next layer's router predicts"),
    ],
)
def test_options_of_a_gpu_that_mean_nothing(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *options]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error


@pytest.mark.parametrize("verb", ["run", "chat", "plan"])
def test_help_says_what_the_hosts_share_costs(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "none of lossless experts, whose numbers that would change); default: auto" in text


@pytest.mark.parametrize("as_store", [False, True])
def test_doctor_says_of_a_model_what_its_layers_are(
    checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str], as_store: bool
) -> None:
    path = store_for(checkpoint("qwen3_moe"), "int4") if as_store else checkpoint("qwen3_moe")
    assert main(["doctor", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (group,) = found["layers"]
    assert group["layers"] == [0, 1]
    assert group["reasons"] == []
    assert "2 of 8 experts, weights normalized" in group["plain"]
    assert "the model is in float32; whole layers run in bfloat16" in group["cpu"]
    assert found["gpu"] == []
    assert main(["doctor", str(path)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "0-1" in printed
    assert "the model is in float32" in printed


def test_doctor_says_every_reason_of_layers_that_are_not_recognised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model("zaya").save_pretrained(tmp_path)
    assert main(["doctor", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (group,) = found["layers"]
    assert not group["plain"]
    assert [reason.partition(" ")[0] for reason in group["reasons"]] == ["ZayaDecoderLayer", "ZayaSparseMoeBlock", "self_attn:"]
    assert any("ZayaAttention" in reason for reason in found["gpu"])
    assert main(["doctor", str(tmp_path)]) == 0
    assert "not recognised" in capsys.readouterr().out
