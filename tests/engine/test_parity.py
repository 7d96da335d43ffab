"""Against transformers' own forward, and the things around it that users call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fate_moe.errors import BudgetError, CorruptExpertError
from tests.support.checkpoints import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_match_transformers(checkpoint: Callable[[str], Path], loaded: Callable[..., Any], family: str) -> None:
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint(family), dtype=torch.float32, experts_implementation="eager"
    )
    ours = loaded(family, expert_cache="100%")
    tokens = torch.randint(1, reference.config.vocab_size, (3, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want, got = reference(tokens).logits, ours(tokens).logits
    assert want.abs().max() > 0.05, "the tiny model says nothing; the comparison would prove nothing"
    assert (got - want).abs().max() <= 1e-5
    experts = next(module for module in reference.modules() if hasattr(module, "_apply_gate"))
    with torch.no_grad():
        experts.down_proj.mul_(1.5)
        assert (reference(tokens).logits - want).abs().max() > 1e-4, "routed experts do not matter in this tiny model"


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "deepseek_v2"])
def test_generate_matches_transformers(checkpoint: Callable[[str], Path], loaded: Callable[..., Any], family: str) -> None:
    reference = transformers.AutoModelForCausalLM.from_pretrained(checkpoint(family), dtype=torch.float32)
    ours = loaded(family, expert_cache="50%")
    tokens = torch.tensor([[0, 0, 5, 6, 7], [3, 4, 5, 6, 7]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(tokens, **options), reference.generate(tokens, **options))
    options |= {"do_sample": True, "temperature": 0.8, "top_k": 20}
    torch.manual_seed(5)
    got = ours.generate(tokens, **options)
    torch.manual_seed(5)
    assert torch.equal(got, reference.generate(tokens, **options))
    options |= {"do_sample": False, "temperature": None, "top_k": None, "cache_implementation": "static"}
    assert torch.equal(ours.generate(tokens, **options), reference.generate(tokens, **options))


def test_cross_layer_prefetch_is_used(loaded: Callable[..., Any]) -> None:
    model = loaded("deepseek_v3", expert_cache="50%", predictor="cross-layer")
    with torch.no_grad():
        for token in range(1, 30):
            model(torch.tensor([[token]]))
    counters = model.fate.report().experts
    assert 0 < counters.prefetch_used <= counters.prefetched


def test_context_beyond_what_was_set_aside_is_refused(loaded: Callable[..., Any]) -> None:
    model = loaded("qwen2_moe", context_length=16)
    with pytest.raises(BudgetError, match="context_length=17"):
        model.generate(torch.ones(1, 10, dtype=torch.long), max_new_tokens=20, do_sample=False, pad_token_id=0)


def test_a_flipped_byte_stops_the_run_before_a_wrong_number(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    from fate_moe.store.convert import convert
    from fate_moe.store.open import open_store
    from tests.support.engines import load_model

    path = convert(checkpoint("qwen2_moe"), tmp_path / "store")
    layer = open_store(path).manifest.layers[1]
    with (path / layer.shard).open("r+b") as file:
        for entry in layer.experts:
            file.seek(entry.offset + 1000)
            byte = file.read(1)
            file.seek(entry.offset + 1000)
            file.write(bytes([byte[0] ^ 0x10]))
    model = load_model(path)
    with pytest.raises(CorruptExpertError, match=f"{layer.shard}.*layer 1"), torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
    model.fate.runtime.residency.wait_idle()
    model.fate.runtime.residency.check_integrity()
    model.fate.close()
