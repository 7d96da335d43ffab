"""fate run on the embedded model with beams, a temperature of zero, and what its store says of generation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fate_moe import demo
from fate_moe.cli import main
from fate_moe.engine.prepare import store_for

pytestmark = pytest.mark.slow
RUN = ["run", "--max-new-tokens", "4", "-p", "Once upon a time"]


def test_beams_run_and_have_their_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, "--num-beams", "3", "--no-do-sample", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["new_tokens"] == 4
    assert said["prefill_seconds"] > 0
    assert main([*RUN, "--num-beams", "3", "--no-do-sample"]) == 0
    assert capsys.readouterr().out.strip() == "Once upon a time" + said["text"]
    assert main([*RUN, "--num-beams", "3", "--context-length", "26"]) == 1
    assert "in each of 3 beams: 27 in all" in capsys.readouterr().err


def test_a_temperature_of_zero_takes_the_likeliest(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for options in (["--no-do-sample"], ["--temperature", "0", "--do-sample"]):
        assert main([*RUN, "--json", *options]) == 0
        texts.append(json.loads(capsys.readouterr().out)["tokens"])
    assert texts[0] == texts[1]


def test_generation_config_is_checked_before_loading(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "store"
    shutil.copytree(store_for(demo.MODEL, "lossless"), store)
    for written, code, said in (
        ({"do_sample": True, "temperature": float("nan")}, 1, "generation_config.json: temperature is a number"),
        ({"eos_token_id": 99999}, 1, "generation_config.json: eos_token_id names tokens of the model, from 0 to 8191"),
        ({"num_beams": 2, "max_length": 3, "cache_implementation": "static", "return_dict_in_generate": True}, 0, "KV"),
    ):
        (store / "generation_config.json").write_text(json.dumps(written))
        assert main(["run", str(store), *RUN[1:]]) == code
        error = capsys.readouterr().err
        assert said in error
        assert ("budget" in error) == (code == 0), "the plan is said just before loading"
