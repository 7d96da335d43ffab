"""Each example runs as it stands, with the embedded model, and shows what it says."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from fate_moe.registry import POLICIES

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> Any:
    """The module ``examples/<name>.py``."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_run(capsys: pytest.CaptureFixture[str]) -> None:
    text = example("run").main(prompt="Once upon a time", new_tokens=8)
    assert text.startswith("Once upon a time")
    assert len(text) > len("Once upon a time")
    printed = capsys.readouterr().out
    assert text in printed, "it streams"
    assert "ready on time" in printed


def test_chat(capsys: pytest.CaptureFixture[str]) -> None:
    messages = example("chat").main(questions=["Who is there?\n", "And then?\n", "\n", "Never asked.\n"], new_tokens=6)
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert [messages[0]["content"], messages[2]["content"]] == ["Who is there?", "And then?"]
    printed = capsys.readouterr().out
    assert all(message["content"] in printed for message in messages if message["role"] == "assistant")


def test_sweep_budgets(capsys: pytest.CaptureFixture[str]) -> None:
    module = example("sweep_budgets")
    rows = module.main(new_tokens=24)
    assert [row.expert_cache for row in rows] == list(module.SHARES)
    assert len({row.text for row in rows}) == 1, "text does not depend on the budget"
    sizes = [row.cache_bytes for row in rows]
    assert sizes == sorted(set(sizes), reverse=True)
    assert rows[0].read_bytes < rows[-1].read_bytes, "less memory, more reads"
    assert all(row.read_bytes > 0 and row.tokens_per_second > 0 for row in rows)
    assert rows[0].text in capsys.readouterr().out


def test_own_policy() -> None:
    try:
        found = example("own_policy").main(new_tokens=24)
    finally:
        POLICIES.pop("fifo", None)  # other tests list what there is
    (lru, text), (fifo, other) = found["lru"], found["fifo"]
    assert text == other
    assert 0 < fifo < lru < 1, "what is used often is worth keeping"


def test_trace_and_simulate(capsys: pytest.CaptureFixture[str]) -> None:
    rows = example("trace_and_simulate").main(new_tokens=16)
    ready = {(row.policy, row.capacity): row.ready_on_time for row in rows}
    assert len(ready) == 12
    for share in (0.125, 0.25, 0.5):
        assert max(ready[policy, share] for policy in ("lru", "shallow-arc", "best")) <= ready["belady", share]
    assert ready["belady", 0.125] < ready["belady", 0.5]
    assert "belady" in capsys.readouterr().out


def test_every_example_is_run_here() -> None:
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {path.stem for path in EXAMPLES.glob("*.py")} <= tested
