"""The command line on the embedded model, as a person or a program uses it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fate_moe import demo
from fate_moe.cli import main
from fate_moe.engine.prepare import store_for

pytestmark = pytest.mark.slow

PROMPT = Path(__file__).parents[1] / "data" / "prompt.txt"


@pytest.fixture(scope="module")
def store() -> Path:
    return store_for(None, "lossless")


def fate(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "fate_moe", *arguments], capture_output=True, text=True, timeout=120, **options)


def test_run_json(store: Path) -> None:
    done = fate("run", "--json", "--expert-cache", "25%", "--max-new-tokens", "24", "--no-do-sample")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["schema"] == 1
    assert result["new_tokens"] == len(result["tokens"]) <= 24
    assert result["text"].strip()
    assert result["prompt_tokens"] > 3
    assert result["prefill_seconds"] > 0
    assert result["decode_tokens_per_second"] > 0
    experts, memory, config = result["experts"], result["memory"], result["config"]
    assert experts["hits"] + experts["in_flight"] + experts["misses"] > 0
    assert experts["ready_on_time"] == experts["hits"] / (experts["hits"] + experts["in_flight"] + experts["misses"])
    assert 0 < experts["prefetch_used"] <= experts["prefetched"]
    assert experts["bytes_read"] > 0
    assert experts["stall_seconds"] > 0
    assert 0 < memory["peak_bytes"] <= memory["budget_bytes"]
    assert (config["policy"], config["predictor"], config["precision"]) == ("co-activation", "combined", "lossless")
    assert "expert slots" in done.stderr, "the plan is shown before anything loads"


def test_same_text_whatever_the_cache(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for cache, policy in (("100%", "lru"), ("10%", "arc"), ("1%", "lfu")):
        options = ["--expert-cache", cache, "--policy", policy, "--max-new-tokens", "12", "--no-do-sample", "--json"]
        assert main(["run", "--file", str(PROMPT), *options]) == 0
        texts.append(json.loads(capsys.readouterr().out.splitlines()[-1])["tokens"])
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.slow
def test_run_in_words_reads_standard_input(store: Path) -> None:
    done = fate("run", str(store), "-", "--max-new-tokens", "8", "--seed", "3", input="The sea was")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The sea was")
    assert len(done.stdout) > len("The sea was\n\n")
    for word in ("ready on time", "from disk per token", "waited", "peak"):
        assert word in done.stderr


def test_seed_makes_sampling_repeatable(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        assert main(["run", "Once upon a time", "--seed", seed, "--do-sample", "--max-new-tokens", "16", "--json"]) == 0
        texts.append(json.loads(capsys.readouterr().out.splitlines()[-1])["text"])
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.slow
def test_chat_remembers_and_ends(store: Path) -> None:
    done = fate("chat", "--max-new-tokens", "6", "--seed", "1", input="Good morning, sir.\n/reset\nWho are you?\n/exit\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("> ") == 4
    assert "no chat template" in done.stderr
    assert "ready on time" in done.stderr


def test_plan_and_inspect(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--expert-cache", "50%", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["schema"] == 1
    assert planned["num_slots"] == planned["num_experts"] // 2
    assert main(["plan", "--ram", "2GiB"]) == 0
    assert "expert slots" in capsys.readouterr().out
    assert main(["inspect", str(store), "--verify", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["verified"] is True
    assert facts["schema"] == 1
    assert facts["experts"] == planned["num_experts"]
    assert main(["inspect", str(store)]) == 0
    assert "qwen2_moe" in capsys.readouterr().out


@pytest.mark.slow
def test_convert_int4_and_run_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(demo.MODEL), str(tmp_path / "int4"), "--precision", "int4", "--solver", "minmax"]) == 0
    assert "experts" in capsys.readouterr().out
    assert main(["run", str(tmp_path / "int4"), "Once upon a time", "--max-new-tokens", "8", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["config"]["precision"] == "int4"
    assert result["text"].strip()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "/nowhere/at/all", "hello"], "/nowhere/at/all"),
        (["run", "--ram", "20MiB"], "at least --ram"),
        (["run", "--ram", "lots"], "is not a size"),
        (["run", "--expert-cache", "0.01%"], "give at least"),
        (["run", "--file", "/nowhere/prompt.txt"], "cannot be read"),
        (["run", "--chat", "Hello you"], "no chat template"),
        (["run", "--context-length", "4", "Once upon a time there was"], "context_length"),
        (["run", "--context-length", "1025", "Once upon"], "1025 is more than this model was made for: 1024 tokens"),
        (["chat", "--context-length", "1025"], "1025 is more than this model was made for: 1024 tokens"),
        (["run", "--vram", "1GiB", "--kv-cache", "int8", "Once upon"], "the KV cache is bf16"),
        (["run", "--vram", "1GiB", "--look-ahead", "2", "Once upon"], "one layer ahead"),
        (["run", "--vram", "1GiB", "--exact-activations", "Once upon"], "omit exact_activations"),
        (["run", "--no-cuda-graph", "Once upon"], "for a GPU"),
        (["inspect", "/nowhere/store"], "/nowhere/store"),
        (["convert", "/nowhere/checkpoint", "/tmp/never-made"], "/nowhere/checkpoint"),
        (["plan", "/nowhere/checkpoint"], "/nowhere/checkpoint"),
    ],
)
def test_user_errors_are_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fate: ")]
    assert len(lines) == 1
    assert says in lines[0]
    assert not os.path.exists("/tmp/never-made")


def test_misspelt_options_are_errors(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["run", "--polcy", "lru"])
    assert caught.value.code == 2
    assert "--polcy" in capsys.readouterr().err
