"""The benchmark of conversations: its turns find what is kept, and a model that was made for less is stretched."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from benchmarks.conversation import Job, kept, long_gguf, stretched
from fate_moe.adapter.config_rules import longest_context
from fate_moe.engine.prepare import prepare, store_for


@pytest.mark.slow
def test_turns_behind_a_prefix_and_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, text = store_for(None, "int4"), [5 + number % 90 for number in range(300)]
    monkeypatch.setenv("FATE_HOME", str(tmp_path))
    found = kept(Job(store, text, 128, turns=2))
    assert found["cached_tokens"] == [0, 128]
    assert found["restart_cached_tokens"] == 128
    assert len(found["first_ms"]) == 2
    assert found["decode_ms"] > 0
    assert found["disk_bytes"] > 128 * 6144


def test_a_model_that_was_made_for_less_is_stretched() -> None:
    store = store_for(None, "int4")
    with stretched(store, 1280) as used:
        config = prepare(used).model.config
        assert (longest_context(config), config.rope_parameters["rope_type"]) == (2048, "yarn")
    assert not used.exists()
    with stretched(store, 1024) as same:
        assert same == store


def test_a_gguf_file_that_was_made_for_less_gets_a_copy(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, "qwen2moe")
    writer.add_context_length(1024)
    writer.add_tensor("output.weight", np.ones((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    made = long_gguf(file, 4096)
    assert made == long_gguf(file, 4096) != file
    assert [gguf.GGUFReader(one).fields["qwen2moe.context_length"].contents() for one in (file, made)] == [1024, 4096]
    assert long_gguf(file, 1000) == file
