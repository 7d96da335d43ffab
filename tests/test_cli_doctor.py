from __future__ import annotations

import json

import pytest

from fate_moe.cli import main


def test_doctor_says_what_is_used_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    kernels = json.loads(capsys.readouterr().out)["kernels"]
    assert [kernel["name"] for kernel in kernels] == ["avx512-vnni", "avx2", "neon", "portable"]
    assert main(["doctor"]) == 0
    table = capsys.readouterr().out
    assert all(kernel["name"] in table for kernel in kernels)
