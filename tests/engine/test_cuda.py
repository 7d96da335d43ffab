"""A store on a simulated GPU: the same tokens as on the CPU, whatever fits, through transformers' own ``generate``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

pytest.importorskip("triton")

from fate_moe.core import ExpertId
from fate_moe.engine.prepare import prepare, store_for
from fate_moe.errors import (
    BudgetError,
    ClosedModelError,
    CorruptExpertError,
    UnsupportedCallError,
    UnsupportedModelError,
)
from fate_moe.gpu.dense import ByteLinear
from fate_moe.kernels.native import native
from fate_moe.store.convert import convert
from fate_moe.store.learned import GATES, save_gates
from fate_moe.store.open import open_store
from tests.support.engines import load_model, simulated_gpu

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
PROMPT = torch.tensor([[3, 17]])  # before the first step, each costs as much as one


def tokens(model: Any, num: int = 3, **options: Any) -> list[int]:
    options = {"do_sample": False, **options}
    return list(model.generate(PROMPT, max_new_tokens=num, eos_token_id=None, pad_token_id=0, **options)[0, 2:].tolist())


@pytest.mark.parametrize(("slots", "places"), [(None, None), (7, None), (7, 4)])
def test_tokens_are_the_cpus(
    checkpoint: Callable[[str], Path], loaded: Callable[..., Any], slots: int | None, places: int | None
) -> None:
    model = simulated_gpu(store_for(checkpoint("qwen2_moe"), "lossless"), slots, places)
    assert tokens(model) == tokens(loaded("qwen2_moe"))
    assert model.fate.decode.steps == 2, "decode did not go through the fused step"
    report = model.fate.report().as_dict()
    assert ("disk" in report) == bool(places)
    assert (report["experts"]["misses"] > 0) == bool(slots)
    assert str(model.fate.report()).startswith("experts:")
    model.fate.close()
    with pytest.raises(ClosedModelError, match="closed"):
        tokens(model)


def test_activation_paths(checkpoint: Callable[[str], Path], loaded: Callable[..., Any]) -> None:
    """Preset eap: a sequence's use joins the collection when it ends, and predicts the next one's layers."""
    model, twin = simulated_gpu(store_for(checkpoint("qwen2_moe"), "lossless"), 7, preset="eap"), loaded("qwen2_moe")
    step = model.fate.decode._step
    assert tokens(model) == tokens(twin)
    first = step.collection[0].clone()
    torch.testing.assert_close(first.norm(), torch.tensor(1.0))
    assert not step.collection[1:].any()
    assert tokens(model, 4) == tokens(twin, 4)
    assert step.collection[1].any()
    assert not step.collection[2:].any()
    chosen = first[1].argmax()
    torch.testing.assert_close(step.predicted[1].exp()[chosen], first[1].max() / first[1].sum(), rtol=1e-3, atol=1e-3)
    assert model.fate.experts.state.counters().prefetched > 0
    model.fate.close()
    with pytest.raises(UnsupportedModelError, match="choose --preset best"):
        simulated_gpu(store_for(checkpoint("deepseek_v2"), "lossless"), preset="eap")


def test_windows_sinks_and_clamped_experts(checkpoint: Callable[[str], Path]) -> None:
    """gpt_oss: the fused step against its layers as they are, with the same experts."""
    model = simulated_gpu(store_for(checkpoint("gpt_oss"), "int4"), 7, host_compute="off")
    prompt = torch.tensor([[3, 17, 9, 4, 8, 22, 40, 7, 31, 5, 6, 11, 90, 2, 51, 33, 60]])  # beyond the window of 16
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True}
    said = model.generate(prompt, max_new_tokens=3, **options)
    assert model.fate.decode.steps == 2
    with torch.no_grad():
        whole = model(said.sequences[:, :-1]).logits[0, -2:]
    torch.testing.assert_close(torch.cat(said.logits[1:]), whole, rtol=1e-3, atol=1e-3)
    model.fate.close()


def test_layers_that_are_not_plain_run_as_they_are(checkpoint: Callable[[str], Path], loaded: Callable[..., Any]) -> None:
    model = simulated_gpu(store_for(checkpoint("deepseek_v2"), "lossless"), 6, 4)
    assert model.fate.decode is None
    assert tokens(model) == tokens(loaded("deepseek_v2"))
    model.fate.close()


def test_generate_is_transformers(checkpoint: Callable[[str], Path], loaded: Callable[..., Any]) -> None:
    """Sampling, streamers, beams, conversations that go on, and refusals."""

    class Heard(BaseStreamer):  # type: ignore[misc]
        def __init__(self) -> None:
            self.values: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.values += value.reshape(-1).tolist()

        def end(self) -> None:
            self.values.append(-1)

    model, twin = simulated_gpu(store_for(checkpoint("qwen3_moe"), "lossless")), loaded("qwen3_moe")
    made = []
    for each in (model, twin):
        torch.manual_seed(3)
        heard = Heard()
        made.append((tokens(each, do_sample=True, temperature=2.0, streamer=heard), heard.values))
    assert made[0] == made[1]
    assert model.fate.decode.steps == 2
    assert tokens(model, 2, num_beams=2) == tokens(twin, 2, num_beams=2)
    assert model.fate.decode.steps == 2, "beams went through the step of one sequence"
    with torch.no_grad():
        cache = model.fate.decode.cache
        first = model.generate(PROMPT, max_new_tokens=2, do_sample=False, eos_token_id=None, pad_token_id=0)
        again = model(torch.tensor([[first[0, -1].item(), 8, 9]]), past_key_values=cache).logits[0, -1]
        whole = twin(torch.tensor([[*first[0].tolist(), 8, 9]])).logits[0, -1]
    torch.testing.assert_close(again, whole, rtol=1e-4, atol=1e-4)
    with pytest.raises(BudgetError, match="context_length=25"):
        model(torch.zeros(1, 25, dtype=torch.int64))
    model.fate.close()


@pytest.fixture
def quantized(checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Stores of a tiny model by dense precision, family and precision; its matrices, too, are not too small for that."""
    monkeypatch.setattr("fate_moe.store.dense.MIN_QUANTIZED_ELEMENTS", 1 << 11)
    return lambda dense, family="qwen2_moe", precision="int4": convert(
        checkpoint(family), tmp_path / "store", precision, dense_precision=dense
    )


@pytest.mark.parametrize("dense_precision", ["int8", "int4"])
def test_quantized_dense_weights_stay_bytes(quantized: Callable[..., Path], dense_precision: str) -> None:
    store = quantized(dense_precision, precision="lossless")
    twin = load_model(store, exact_activations=True)
    model = simulated_gpu(store)
    bytewide = [name for name, module in model.named_modules() if isinstance(module, ByteLinear)]
    mixers = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")]
    assert set(bytewide) == {*(f"model.layers.{i}.{name}" for i in (0, 1) for name in mixers), "lm_head"}
    assert model.get_input_embeddings().weight.dtype == model.dtype
    with torch.no_grad():
        torch.testing.assert_close(model(PROMPT).logits, twin(PROMPT).logits, rtol=1e-3, atol=1e-3)
    if dense_precision == "int8":  # from there on both are the same codes
        assert tokens(model, 2) == tokens(twin, 2)
        assert model.fate.decode.steps == 1
    codes = [part for m in model.modules() if isinstance(m, ByteLinear) for part in (m.codes, m.scale, m.zero)]
    held = [value.untyped_storage() for value in (*codes, *model.parameters()) if value.device.type != "meta"]
    assert sum({part.data_ptr(): part.nbytes() for part in held}.values()) <= model.fate.plan.dense_bytes
    for each in (model, twin):
        each.fate.close()


@pytest.mark.skipif(native is None, reason="the C++ kernels are not built")
def test_misses_computed_on_the_host(quantized: Callable[..., Path]) -> None:
    store = quantized("int8", "qwen3_moe")
    twin = simulated_gpu(store)
    model = simulated_gpu(store, 6)
    assert tokens(model, 6) == tokens(twin, 6)
    report = model.fate.report()
    assert 0 < report.num_hosted <= report.experts.misses
    assert "computed by the CPU" in str(report)
    found = report.as_dict()
    assert (found["config"]["host_compute"], found["experts"]["hosted"]) == (0.5, report.num_hosted)
    assert twin.fate.experts.state.host_compute is None, "nothing can be missing"
    for each in (model, twin):
        each.fate.close()


@pytest.mark.skipif(native is None, reason="the C++ kernels are not built")
def test_where_the_host_cannot_help(checkpoint: Callable[[str], Path]) -> None:
    store = store_for(checkpoint("deepseek_v2"), "lossless")
    with pytest.raises(UnsupportedModelError, match=r"latent rows; .*omit --host-compute"):
        simulated_gpu(store, host_compute="0.5")
    for family in ("deepseek_v2", "qwen3_moe"):  # no fused step; lossless experts, whose numbers would change
        model = simulated_gpu(store_for(checkpoint(family), "lossless"), 12)
        assert model.fate.plan.host_compute == 0.0
        model.fate.close()


def test_memory_that_runs_out_after_all_is_said(checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_for(checkpoint("mixtral"), "lossless")
    model = simulated_gpu(store)
    more = rf"give --vram {(model.fate.plan.vram_budget_bytes + (256 << 20)) / (1 << 20):.0f}MiB"

    def full(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(model.fate.experts, "compute", full)
    with pytest.raises(BudgetError, match=f"while generating.*{more}"):
        tokens(model)
    model.fate.close()
    monkeypatch.setattr("fate_moe.engine.cuda.fill_device", full)
    with pytest.raises(BudgetError, match=f"while loading.*{more}"):
        simulated_gpu(store)


def test_damage_is_never_a_wrong_answer(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    store = convert(checkpoint("qwen3_moe"), tmp_path / "store", "lossless")
    opened = open_store(store)
    expert = ExpertId(1, 7)
    with opened.shard_of(expert).open("r+b") as file:
        file.seek(opened.manifest.layers[1].experts[7].offset)
        file.write(b"\xff" * 64)
    with pytest.raises(CorruptExpertError, match="layer 1 expert 7"):
        simulated_gpu(store)
    with pytest.raises(CorruptExpertError, match="layer 1 expert 7"):
        tokens(simulated_gpu(store, 6, 4), 16)


def test_models_that_the_kernels_cannot_run_say_why(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="unquantized experts with biases"):
        simulated_gpu(store_for(checkpoint("gpt_oss"), "lossless"))
    mixed = convert(checkpoint("mixtral"), tmp_path / "mixed", "int4", precision_rules={0: "lossless"})
    with pytest.raises(UnsupportedModelError, match="different precisions"):
        simulated_gpu(mixed)
    finer = convert(checkpoint("mixtral"), tmp_path / "finer", "int4", group_size=32)
    with pytest.raises(UnsupportedModelError, match=r"groups of 32 \(.* --group-size 64 .*\); run them on the CPU"):
        simulated_gpu(finer)


def test_gates_fitted_to_the_model_are_used(checkpoint: Callable[[str], Path], loaded: Callable[..., Any]) -> None:
    store = store_for(checkpoint("qwen2_moe"), "lossless")
    config = prepare(store).model.config
    gates = [torch.randn(config.num_experts, config.hidden_size + 1) for _ in range(config.num_hidden_layers)]
    save_gates(store, gates)
    try:
        model = simulated_gpu(store, slots=8)
        first, second = model.fate.experts.state.fitted
        assert first is None
        assert torch.equal(second.float(), gates[1].bfloat16().float())
        assert tokens(model) == tokens(loaded("qwen2_moe"))
        model.fate.close()
    finally:
        (store / GATES).unlink()


def test_adapters_and_hooks_are_honoured(checkpoint: Callable[[str], Path]) -> None:
    """The fused step stands back for what it was not made from, and comes back afterwards."""
    from peft import LoraConfig

    from tests.support.training import adapted, reference

    pair = simulated_gpu(store_for(checkpoint("qwen2_moe"), "lossless")), reference(checkpoint("qwen2_moe"))
    decode = pair[0].fate.decode

    def same(steps: int) -> bool:
        before = decode.steps
        got, want = map(tokens, pair)
        return got == want and decode.steps == before + steps

    handles = [model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output * 5) for model in pair]
    assert same(0)
    for handle in handles:
        handle.remove()
    pair[0].eval()
    assert same(2)
    trained = [adapted(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"])) for model in pair]
    assert same(0)
    with pytest.raises(UnsupportedCallError, match="give no gradients; train on the CPU"):
        trained[0](PROMPT, labels=PROMPT)
    for model in trained:
        model.merge_and_unload()
    assert same(2)
    pair[0].fate.close()
