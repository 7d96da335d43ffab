from __future__ import annotations

import json

import pytest
import torch

from fate_moe.cli import main


def test_doctor_says_what_is_used_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    kernels = found["kernels"]
    assert found["gpus"][0]["why"]
    assert [kernel["name"] for kernel in kernels][:5] == ["avx512-vnni", "avx2", "neon-dot", "neon", "portable"]
    assert main(["doctor"]) == 0
    table = capsys.readouterr().out
    assert all(kernel["name"] in table for kernel in kernels)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("verb", [["doctor", "--calibrate"], ["run", "--vram", "auto", "a prompt"], ["plan", "--device", "cuda"]])
def test_without_a_gpu_one_line_says_so(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(verb) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("fate: no GPU can be used here: ")
