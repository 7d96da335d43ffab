"""The upcycled model and its widenings compute what the dense model computes."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, modeling_gguf_pytorch_utils

from benchmarks.upcycle import choose_geometry
from fate_moe.errors import ConfigError
from fate_moe.quant.solver import minmax
from fate_moe.tools import upcycle, widen
from fate_moe.tools.widen import Geometry
from fate_moe.trace.routing import WINDOW, record

TOKENS = torch.randint(0, 96, (2 * WINDOW + 1,), generator=torch.Generator().manual_seed(0))
# The dense model's own size.
NARROW = Geometry(hidden=48, layers=2, heads=6, kv_heads=2, head_size=8, experts=6, top_k=2, expert_width=64, shared_width=16)
WIDER = {
    "wider": {"hidden": 80, "expert_width": 70, "shared_width": 30},
    "four times": {"hidden": 192, "heads": 24, "kv_heads": 8},
    "deeper": {"layers": 5},
    "larger groups": {"heads": 10, "kv_heads": 2},
    "no groups": {"hidden": 64, "heads": 8, "kv_heads": 8},
    "smaller groups": {"heads": 8, "kv_heads": 4},
    "more shared": {"expert_width": 40, "shared_width": 64},
}


def make_dense(dtype: torch.dtype, **changes: Any) -> LlamaForCausalLM:
    """A random Llama with norm weights away from one, an epsilon large enough to matter, and odd sizes."""
    settings: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-2,
        "rope_theta": 5000.0,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 2)
    return model.to(dtype)


def build(dense: LlamaForCausalLM, folder: Path, geometry: Geometry = NARROW) -> tuple[Any, Any]:
    """The model read back from ``folder`` in fp32, and the trace."""
    trace = upcycle.build(dense, geometry, TOKENS, folder, seed=1)
    settings = {"dtype": torch.float32, "experts_implementation": "eager"}  # others want sizes in multiples of 16 bytes
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **settings)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval(), trace


@pytest.mark.parametrize("shown", [True, False])
def test_the_bar_for_gguf_files_obeys_transformers_logging(
    shown: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def from_pretrained(*arguments: Any, **options: Any) -> Any:
        for _ in modeling_gguf_pytorch_utils.tqdm(range(2)):
            pass
        return make_dense(torch.float32)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *arguments, **options: argparse.Namespace())
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", shown)
    upcycle.load_dense(Path("dense.gguf"))
    assert ("2/2" in capsys.readouterr().err) == shown


def test_a_gguf_file_is_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []
    monkeypatch.setattr(gguf, "GGUFReader", parsed.append)

    def from_pretrained(folder: Path, gguf_file: str, **options: Any) -> Any:
        gguf.GGUFReader(str(folder / gguf_file))
        return make_dense(torch.float32)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    upcycle.load_dense(Path("dense.gguf"))
    assert parsed == ["dense.gguf"]
    assert gguf.GGUFReader == parsed.append


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS[None, :64]).logits
        return found


def assert_same(model: Any, dense: Any) -> None:
    """No further from the dense model than fp32 is from fp64, times the few sums in a row that differ."""
    twin = make_dense(torch.float64, tie_word_embeddings=dense.config.tie_word_embeddings)
    twin.load_state_dict(dense.state_dict())
    exact = logits(twin)
    rounding = (logits(dense.float()) - exact).abs().max()
    assert (logits(model) - exact).abs().max() < 10 * rounding


@pytest.mark.parametrize("tied", [True, False])
def test_upcycled_equals_dense(tmp_path: Path, tied: bool) -> None:
    dense = make_dense(torch.float32, tie_word_embeddings=tied)
    model, _ = build(dense, tmp_path)
    assert_same(model, dense)


@pytest.mark.parametrize("changes", WIDER.values(), ids=WIDER)
def test_widened_equals_dense(tmp_path: Path, changes: dict[str, int]) -> None:
    dense = make_dense(torch.float32)
    model, _ = build(dense, tmp_path, dataclasses.replace(NARROW, **changes))
    assert_same(model, dense)


def test_nothing_is_lost_in_bf16(tmp_path: Path) -> None:
    """Rescaling is by powers of two, and so is the norms' when the hidden size quadruples."""
    dense = make_dense(torch.bfloat16)
    model, _ = build(dense, tmp_path, dataclasses.replace(NARROW, hidden=192))
    assert all(tensor.dtype == torch.bfloat16 for tensor in load_file(tmp_path / "model-00001-of-00003.safetensors").values())
    assert_same(model, dense)


def test_weights_of_four_bits_are_the_same_in_int4(tmp_path: Path) -> None:
    """In groups of 32, as GGUF's Q4_1 has them: those of the neurons stay whole, and no two experts are the same."""
    dense = make_dense(torch.float32, hidden_size=64, num_attention_heads=8, intermediate_size=192)
    for layer in dense.model.layers:
        for matrix in layer.mlp.children():
            if isinstance(matrix, torch.nn.Linear):
                codes, scale, zero = minmax(matrix.weight.detach(), 4, 32)
                matrix.weight.data = (codes.view(len(codes), -1, 32) * scale.float()[..., None] - zero.float()[..., None]).flatten(
                    1
                )
    geometry = dataclasses.replace(NARROW, hidden=64, heads=8, expert_width=128, shared_width=64)
    upcycle.build(dense, geometry, TOKENS, tmp_path, seed=1, together=32)
    tensors = load_file(tmp_path / "model-00001-of-00003.safetensors")
    for part in ("gate", "up", "down"):
        experts = [tensors[f"model.layers.0.mlp.experts.{number}.{part}_proj.weight"] for number in range(geometry.experts)]
        assert len({expert.numpy().tobytes() for expert in experts}) == geometry.experts
        for expert in experts:
            codes, scale, zero = minmax(expert, 4, 32)
            again = (codes.view(len(codes), -1, 32) * scale.float()[..., None] - zero.float()[..., None]).flatten(1)
            torch.testing.assert_close(again, expert, rtol=0, atol=0.03 * float(scale.max()))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, experts_implementation="eager").eval()
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-3, atol=1e-3)


def test_experts_differ_and_do_not_mix(tmp_path: Path) -> None:
    build(make_dense(torch.float32), tmp_path)
    tensors = load_file(tmp_path / "model-00001-of-00003.safetensors")
    experts = [
        {part: tensors[f"model.layers.0.mlp.experts.{number}.{part}_proj.weight"] for part in ("gate", "up", "down")}
        for number in range(NARROW.experts)
    ]
    for part in ("gate", "up", "down"):
        assert len({expert[part].numpy().tobytes() for expert in experts}) == NARROW.experts
    x = torch.randn(48, generator=torch.Generator().manual_seed(2))

    def output(gate: int, up: int, down: int) -> torch.Tensor:
        hidden = torch.nn.functional.silu(experts[gate]["gate"] @ x) * (experts[up]["up"] @ x)
        found: torch.Tensor = experts[down]["down"] @ hidden
        return found

    one = output(0, 0, 0)
    torch.testing.assert_close(output(1, 1, 1), one)
    for mixed in (output(1, 0, 0), output(0, 1, 0), output(0, 0, 1)):
        assert torch.cosine_similarity(mixed, one, dim=0) < 0.9


def test_routing_is_what_the_model_does(tmp_path: Path) -> None:
    """The trace that the table is made of, against the routers of the checkpoint read back."""
    model, trace = build(make_dense(torch.float32), tmp_path)
    seen = record(model, TOKENS)
    half = trace.chosen.shape[1]
    assert (seen.chosen[:, half:].sort().values == trace.chosen.sort().values).float().mean() > 0.99
    torch.testing.assert_close(seen.routers, trace.routers)


def test_routers_are_blind_to_the_mean() -> None:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(400, 48, generator=generator) * torch.rand(48, generator=generator) + 5
    logits = inputs @ upcycle.make_routers(inputs, 20, generator).T
    torch.testing.assert_close(logits.mean(0), torch.zeros(20), atol=1e-3, rtol=0)
    torch.testing.assert_close(logits.std(0), torch.full((20,), upcycle.SPREAD), atol=1e-3, rtol=0)


def test_zero_blocks_are_noise_where_they_may_be(tmp_path: Path) -> None:
    build(make_dense(torch.float32), tmp_path, dataclasses.replace(NARROW, hidden=192, heads=24, kv_heads=8, expert_width=128))
    tensors = load_file(tmp_path / "model-00001-of-00003.safetensors")
    for name, tensor in tensors.items():
        if not name.endswith(("bias", "shared_expert_gate.weight", "down_proj.weight", "o_proj.weight")):
            assert tensor.count_nonzero() == tensor.numel(), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": 40}, "hidden size is 40"),
        ({"layers": 1}, "number of layers is 1"),
        ({"heads": 4}, "number of heads is 4"),
        ({"kv_heads": 4}, "do not share"),
        ({"heads": 8, "kv_heads": 8, "top_k": 7}, "7 of 6 experts"),
        ({"heads": 6, "kv_heads": 3}, "4 are needed"),
        ({"expert_width": 40}, "below the dense model's 80 neurons"),
    ],
)
def test_what_cannot_be(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(NARROW, **changes).check(make_dense(torch.float32).config)


def test_too_little_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="too few"):
        upcycle.build(make_dense(torch.float32), NARROW, TOKENS[:600], tmp_path, seed=0)


def test_geometry_of_a_config(tmp_path: Path) -> None:
    """Qwen1.5-MoE's: fewer layers than the dense model's are not taken, heads keep their size."""
    (tmp_path / "config.json").write_text(
        '{"hidden_size": 128, "num_hidden_layers": 1, "num_experts": 8, "moe_intermediate_size": 90}'
    )
    names = ("hidden", "layers", "heads", "kv_heads", "experts", "top_k", "expert_width", "shared_width")
    arguments = argparse.Namespace(**dict.fromkeys(names), config=tmp_path / "config.json")
    arguments.top_k = 3
    geometry = choose_geometry(make_dense(torch.float32).config, arguments)
    assert geometry == Geometry(128, 2, 16, 16, 8, 8, 3, 90, 2 * widen.GROUP)
