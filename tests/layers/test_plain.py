"""Plain layers: recognised from code and configuration, defined by a twin that gives what the families' own forwards give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fate_moe.adapter.meta_model import expert_stacks
from fate_moe.engine.prepare import store_for
from fate_moe.kernels.native import native
from fate_moe.kernels.plain_layer import Latent, PlainLayer, SharedExpert
from fate_moe.layers.angles import on_axes
from fate_moe.layers.attentions import cos_and_sin
from fate_moe.layers.canonical import ATTENTIONS, BLOCKS, HEADS, LAYERS, MLPS, NORMS, ROPES, ROUTERS, TRUNKS, _canonical, meaning_of
from fate_moe.layers.cpu_step import CpuStep
from fate_moe.layers.fingerprint import fingerprint
from fate_moe.layers.plain import NotPlain, plain_layers
from fate_moe.layers.reasons import cpu_reasons
from tests.support import tiny
from tests.support.checkpoints import tiny_checkpoint, tiny_model
from tests.support.engines import load_model
from tests.support.plain_twin import empty_cache, plain_of, twin_layer, twin_logits

# (family, other configuration): every kind of layer that can be recognised.
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("mixtral", {}),
    ("mixtral", {"sliding_window": 3}),
    ("qwen2_moe", {}),
    ("qwen2_moe", {"norm_topk_prob": True, "hidden_act": "gelu"}),
    ("qwen3_moe", {}),
    ("qwen3_moe", {"norm_topk_prob": False, "attention_bias": True}),
    ("olmoe", {}),
    ("olmoe", {"clip_qkv": 0.5, "norm_topk_prob": True}),
    ("gpt_oss", {}),
    ("gpt_oss", {"sliding_window": 3}),
    ("glm4_moe", {}),
    ("ernie4_5_moe", {}),
    ("phimoe", {}),
    ("deepseek_v3", {}),
    ("deepseek_v3", {"q_lora_rank": None, "rope_interleave": False}),
    ("deepseek_v2", {}),
]
FURTHER = ("axk1", "exaone_moe", "granitemoeshared", "hunyuan_v1_moe", "mistral4", "qwen3_5_moe_text", "qwen3_next")
OF_OTHER_FAMILIES = (
    "aria_text", "dots1", "ernie4_5_moe", "glm4_moe", "granitemoe", "hy_v3", "mellum", "minimax_m2", "phimoe", *FURTHER
)  # fmt: skip


def of_kind(family: str, dtype: torch.dtype, **overrides: Any) -> Any:
    return tiny.tiny_model(family).to(dtype) if family in OF_OTHER_FAMILIES else tiny_model(family, dtype, **overrides)


class OwnLayer:
    """A family's own decoder layer on some tokens; and the twin, which is given them in pieces."""

    def __init__(self, model: Any, plain: PlainLayer, count: int = 7) -> None:
        generator = torch.Generator().manual_seed(plain.layer)
        self.model, self.plain, self.layer = model, plain, model.get_submodule(plain.path)
        self.x = torch.randn(count, plain.hidden, generator=generator).to(model.dtype)
        rotary = next(module for module in model.modules() if type(module).__name__.endswith("RotaryEmbedding"))
        self.recurrent = plain.attention.delta is not None
        kind = {"layer_type": model.config.layer_types[plain.attention.index]} if "mellum" in model.config.model_type else {}
        self.positions = rotary(self.x.unsqueeze(0), on_axes(rotary, torch.arange(count).unsqueeze(0)), **kind)
        self.cos, self.sin = cos_and_sin(self.positions)
        at = torch.arange(count)
        seen = (at <= at.unsqueeze(1)) & (at > at.unsqueeze(1) - (plain.attention.window or count))
        self.mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf) if plain.attention.sinks else seen

    @torch.no_grad()
    def own(self) -> torch.Tensor:
        mask = None if self.recurrent else self.mask[None, None]
        positions = torch.arange(len(self.x))[None]
        out = self.layer(self.x.unsqueeze(0), position_embeddings=self.positions, attention_mask=mask, position_ids=positions)
        return out[0]  # type: ignore[no-any-return]

    @torch.no_grad()
    def twin(self, pieces: tuple[int, ...] = (4, 1, 2)) -> torch.Tensor:
        (keys, values), outputs, first = empty_cache(self.plain, self.x.dtype), list[torch.Tensor](), 0
        for length in pieces:
            at = slice(first, first + length)
            angles = self.cos[0, at], self.sin[0, at]
            out, keys, values = twin_layer(self.model, self.plain, self.x[at], *angles, keys, values)
            outputs.append(out)
            first += length
        return torch.cat(outputs)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [*KINDS, *((family, {}) for family in ("aria_text", "dots1", "granitemoe", "hy_v3", "mellum", "minimax_m2", *FURTHER))],
)
def test_the_twin_is_the_familys_own_layer(family: str, overrides: dict[str, Any]) -> None:
    model = of_kind(family, torch.float32, **overrides)
    for plain in plain_of(model):
        layer = OwnLayer(model, plain)
        torch.testing.assert_close(layer.twin(), layer.own(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "overrides"), KINDS)
def test_the_twin_rounds_no_worse_than_the_family(family: str, overrides: dict[str, Any]) -> None:
    """In bf16, against the same weights in fp32: at most twice as far as the family's own forward."""
    model, exact = (of_kind(family, torch.bfloat16, **overrides) for _ in range(2))
    exact.float()
    for plain in plain_of(model):
        layer, wide = OwnLayer(model, plain), OwnLayer(exact, plain)
        wide.x = layer.x.float()
        wide.positions = layer.positions if plain.attention.complex_angles else (layer.cos.float(), layer.sin.float())
        want = wide.own()
        own, twin = ((out.float() - want).norm(dim=-1).median() for out in (layer.own(), layer.twin()))
        assert 0 < twin <= 2 * own


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_a_model_of_twins_gives_its_logits(family: str) -> None:
    model = tiny_model(family)
    tokens = torch.tensor([3, 17, 90, 5, 44])
    with torch.no_grad():
        torch.testing.assert_close(twin_logits(model, tokens), model(tokens.unsqueeze(0)).logits[0], rtol=1e-4, atol=1e-4)


def test_what_is_recognised_of_a_layer() -> None:
    qwen2, qwen3, mixtral, olmoe = (plain_of(tiny_model(family))[1] for family in ("qwen2_moe", "qwen3_moe", "mixtral", "olmoe"))
    assert (qwen2.layer, qwen2.path, qwen2.block, qwen2.hidden) == (1, "model.layers.1", "mlp", 64)
    assert isinstance(qwen2.shared, SharedExpert)
    assert (qwen2.shared.name, qwen2.shared.gate, qwen2.shared.mlp.activation) == ("shared_expert", "shared_expert_gate", "silu")
    assert (qwen2.router.normalize, qwen3.router.normalize, mixtral.router.normalize, olmoe.router.normalize) == (
        False,
        True,
        True,
        False,
    )
    assert (qwen3.attention.heads, qwen3.attention.kv_heads, qwen3.attention.head_dim) == (4, 2, 16)
    assert qwen3.attention.qk_norm == qwen3.input_norm
    assert (qwen2.attention.qkv_bias, qwen2.attention.out_bias, qwen3.attention.qkv_bias) == (True, False, False)
    assert olmoe.attention.norm_over_heads
    assert not qwen3.attention.norm_over_heads
    assert "2 of 8 experts, weights normalized" in qwen3.describe()


def test_what_is_recognised_of_other_kinds() -> None:
    oss, full = plain_of(tiny_model("gpt_oss"))
    assert (oss.attention.window, full.attention.window, oss.attention.sinks, oss.attention.num_angles) == (16, None, True, 8)
    dense, glm = plain_of(tiny.tiny_model("glm4_moe"))[:2]
    assert (dense.is_dense, dense.layer, glm.layer, glm.router.scores) == (True, -1, 0, "sigmoid")
    assert (glm.router.correction, glm.router.groups, glm.router.top_groups) == ("gate.e_score_correction_bias", 2, 1)
    ernie = plain_of(tiny.tiny_model("ernie4_5_moe"))[-1]
    assert (ernie.attention.rope, ernie.router.correction) == ("pairs", "gate.moe_statics.e_score_correction_bias")
    phi = plain_of(tiny.tiny_model("phimoe"))[0]
    assert phi.input_norm.centered
    assert phi.router.scores == "sparse mixer"
    deep = plain_of(tiny_model("deepseek_v3"))[-1].attention
    assert (deep.latent, deep.head_dim, deep.cached_dims, deep.rope) == (Latent(16, 16, 16, True), 24, (16, 8), "pairs apart")


def test_the_cpu_says_why_it_cannot_run_a_plain_layer() -> None:
    plain = plain_of(tiny_model("mixtral"))[0]
    assert cpu_reasons(plain, torch.bfloat16) == []
    assert cpu_reasons(plain, torch.float32)[-1] == "the model is in float32; whole layers run in bfloat16"
    odd = replace(plain, attention=replace(plain.attention, rotary_dim=5))
    assert any("5 channels, an odd number" in reason for reason in cpu_reasons(odd, torch.bfloat16))


def test_other_layers_say_every_reason() -> None:
    (first, *_) = plain_layers(tiny.tiny_model("zaya"))
    assert isinstance(first, NotPlain)
    assert [reason.partition(" ")[0] for reason in first.reasons] == ["ZayaDecoderLayer", "ZayaSparseMoeBlock", "self_attn:"]


def test_every_known_class_is_in_this_transformers_or_has_a_twin_there() -> None:
    """What newer versions rename goes unnoticed else. Not those of families that only some versions have."""
    tables = (NORMS, MLPS, ATTENTIONS, ROUTERS, BLOCKS, LAYERS, TRUNKS, ROPES, HEADS)
    missing = [path for table in tables for path in table if _canonical(path) is None]
    newer = {"aria", "beam", "deepseek_v4", "glm5_next", "hy_v3"}
    assert {path.partition(".")[0] for path in missing} <= newer


def test_a_changed_line_or_constant_is_another_fingerprint() -> None:
    class First(nn.Module):
        def forward(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
            return x.softmax(dim) * 2.0

    class Renamed(nn.Module):
        def forward(self, states: torch.Tensor, which: int = -1) -> torch.Tensor:
            """With a docstring."""
            # And a comment.
            return states.softmax(which) * 2.0

    class OtherConstant(nn.Module):
        def forward(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
            return x.softmax(dim) * 3.0

    class OtherMethod(nn.Module):
        def forward(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
            return x.log_softmax(dim) * 2.0

    assert fingerprint(First) == fingerprint(Renamed)
    assert len({fingerprint(each) for each in (First, OtherConstant, OtherMethod)}) == 3


def test_a_changed_helper_is_another_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same forward over another rotary embedding is not known."""
    from transformers.models.qwen3_moe import modeling_qwen3_moe as family

    def interleaved(x: torch.Tensor) -> torch.Tensor:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)

    class Copied(family.Qwen3MoeAttention):  # type: ignore[misc]
        pass

    assert meaning_of(Copied, ATTENTIONS) is not None
    interleaved.__module__ = family.__name__

    class Changed(family.Qwen3MoeAttention):  # type: ignore[misc]
        pass

    monkeypatch.setattr(family, "rotate_half", interleaved)
    assert fingerprint(Changed) != fingerprint(Copied)


@pytest.mark.skipif(native is None, reason="the extension is not built")
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_a_step_on_the_cpu_is_the_twin(tmp_path: Path, family: str) -> None:
    checkpoint = tiny_checkpoint(family, tmp_path / "checkpoint", torch.bfloat16)
    model = load_model(store_for(checkpoint, "lossless", "lossless"))
    distances = []
    with torch.inference_mode():
        cache = model(torch.tensor([[3, 17, 90, 5]]), use_cache=True).past_key_values
        for plain in plain_of(model):
            layer = model.get_submodule(plain.path)
            assert isinstance(layer.forward, CpuStep)
            room = cache.layers[plain.attention.index]
            before = [states[0].transpose(0, 1).clone() for states in (room.keys, room.values)]
            x = torch.randn(1, 1, plain.hidden, generator=torch.Generator().manual_seed(plain.layer)).bfloat16()
            cos, sin = model.model.rotary_emb(x, torch.tensor([[4]]))
            want, keys, values = twin_layer(model, plain, x[0], cos[0], sin[0], *before)
            layer.forward.ready = True
            got = layer(x, position_embeddings=(cos, sin), past_key_values=cache, attention_mask=None)
            for mine, own in ((got[0], want), (room.keys[0, :, -1], keys[-1]), (room.values[0, :, -1], values[-1])):
                distances.append(float((mine.float() - own.float()).norm() / own.float().norm()))
    assert room.get_seq_length() == 5
    assert max(distances) <= 0.02
    model.fate.close()


def test_recognition_needs_no_weights(checkpoint: Callable[[str], Path]) -> None:
    from fate_moe.adapter.meta_model import build_meta_model

    on_meta, real = build_meta_model(checkpoint("qwen2_moe")), tiny_model("qwen2_moe")
    assert plain_layers(on_meta) == plain_layers(real)
    assert len(plain_layers(real)) == len(expert_stacks(real))
