"""Files beside published weights: code that is not run, chat templates in their own file, generation settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from fate_moe import demo
from fate_moe.cli import main
from fate_moe.engine.prepare import load_tokenizer
from fate_moe.errors import UnsupportedModelError
from fate_moe.store.convert import convert
from tests.support.checkpoints import tiny_checkpoint
from tests.support.engines import load_model

TRAP = "raise SystemExit('the code of a checkpoint was run')"


def with_code(folder: Path, **config: object) -> Path:
    """A checkpoint with its own code, which ends the process that imports it."""
    (folder / "modeling_theirs.py").write_text(TRAP)
    (folder / "configuration_theirs.py").write_text(TRAP)
    auto_map = {"AutoConfig": "configuration_theirs.TheirConfig", "AutoModelForCausalLM": "modeling_theirs.TheirModel"}
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": auto_map} | config))
    return folder


def test_remote_code_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = with_code(tiny_checkpoint("mixtral", tmp_path / "theirs"), model_type="theirs")
    with pytest.raises(
        UnsupportedModelError, match=r"no model type 'theirs'; it would need the checkpoint's own code, which is never run"
    ):
        convert(folder, tmp_path / "store")
    capsys.readouterr()
    for verb, *prompt in (("plan",), ("inspect",), ("run", "Hello")):
        assert main([verb, str(folder), *prompt]) == 1
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("fate: ")
        assert "it would need the checkpoint's own code, which is never run" in lines[0]
    assert not (tmp_path / "store").exists()


def test_remote_code_of_a_known_family_is_ignored(tmp_path: Path) -> None:
    folder = with_code(tiny_checkpoint("deepseek_v2", tmp_path / "theirs"))
    store = convert(folder, tmp_path / "store")
    assert not list(store.glob("*.py"))
    model = load_model(store)
    assert type(model).__module__.startswith("transformers.models.deepseek_v2")
    model.fate.close()


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of a checkpoint with a tokenizer, a chat template in its own file and generation settings."""
    folder = tiny_checkpoint("qwen3_moe", tmp_path_factory.mktemp("chatting") / "checkpoint", vocab_size=16384)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo.MODEL / name, folder)
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<me>"
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7], "max_new_tokens": 5, "do_sample": False}))
    return convert(folder, folder.with_name("store"))


def test_a_chat_template_in_its_own_file_is_used(chatting: Path) -> None:
    tokenizer = load_tokenizer(chatting)
    messages = [{"role": "you", "content": "hello"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<you>hello<me>"


def test_generation_settings_are_used(chatting: Path) -> None:
    model = load_model(chatting)
    assert model.generation_config.eos_token_id == [2, 7]
    written = model.generate(torch.tensor([[11, 12, 13]]), pad_token_id=0)
    assert written.shape[1] <= 3 + 5
    model.generation_config.eos_token_id = [int(written[0, 4])]
    assert model.generate(torch.tensor([[11, 12, 13]]), pad_token_id=0).shape[1] <= 5
    model.fate.close()
