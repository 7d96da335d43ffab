"""The embedding and the LM head that is tied to it: one quantized matrix, multiplied as every other, looked up row by row."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fate_moe.core import BlobLayout
from fate_moe.engine.prepare import prepare
from fate_moe.errors import StoreError, UnsupportedCallError
from fate_moe.kernels.reference import dequantize, linear_quantized
from fate_moe.layers.dense import QuantizedGroups, QuantizedLinear
from fate_moe.layers.frozen import FrozenWeight
from fate_moe.quant.blob import views
from fate_moe.store import dense
from fate_moe.store.convert import convert
from fate_moe.store.dense import dense_layouts
from fate_moe.store.format import blob_layout
from fate_moe.store.open import dense_entries, load_dense, open_store, stored_layouts, unquantized
from tests.support.checkpoints import tiny_checkpoint
from tests.support.engines import load_model, simulated_gpu
from tests.support.tiny import tiny_model
from tests.support.training import numbers_of

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(autouse=True)
def small_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models' matrices are worth quantizing too."""
    monkeypatch.setattr(dense, "MIN_QUANTIZED_ELEMENTS", 1)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tied checkpoint of a family in bf16, made once."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            model = tiny_model(family)
            model.config.tie_word_embeddings = True
            model.tie_weights()
            made[family] = tmp_path_factory.mktemp(family)
            model.bfloat16().save_pretrained(made[family])
        return made[family]

    return make


@pytest.fixture
def opened() -> Iterator[Callable[..., Any]]:
    models: list[Any] = []

    def open_model(store: Path, **options: Any) -> Any:
        models.append(load_model(store, **{"expert_cache": "100%", **options}))
        return models[-1]

    yield open_model
    for model in models:
        model.fate.close()


def blob_of(store: Path) -> tuple[torch.Tensor, BlobLayout]:
    """The blob of the only tied matrix of ``store``, and its layout."""
    opened, prepared = open_store(store), prepare(store)
    layouts = stored_layouts(opened, prepared.model)
    [name] = {source for source in prepared.model.all_tied_weights_keys.values() if source in layouts}
    return load_dense(opened, quantize=unquantized(opened, prepared.model, layouts))[name], layouts[name]


def in_parts(blob: torch.Tensor, layout: BlobLayout) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    parts = views(layout, blob)
    planes = [parts[f"weight.plane{i}"] for i in range(len(layout.plane_widths))]
    return planes, parts["weight.scale"], parts["weight.zero"]


# A plain embedding; one whose rows the model scales; one of a class of its own, which scales them.
@pytest.mark.parametrize("family", ["qwen2_moe", "granitemoe", "gemma4_text"])
def test_one_matrix_serves_both(tied: Callable[[str], Path], opened: Callable[..., Any], tmp_path: Path, family: str) -> None:
    store = convert(tied(family), tmp_path / "store", "int4", dense_precision="int4")
    blob, layout = blob_of(store)
    assert layout.precision == "int8", "a row of the embedding is the whole input of its token"
    model = opened(store)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding.weight is head.weight
    assert isinstance(head, QuantizedLinear)
    assert isinstance(embedding.weight, FrozenWeight)

    planes, scale, zero = in_parts(blob, layout)
    x = torch.randn(3, model.config.get_text_config().hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    want = linear_quantized(x.float(), planes, scale, zero, group_size=layout.group_size, widths=layout.plane_widths)
    assert torch.equal(head(x), want.bfloat16())
    numbers = dequantize(planes, scale, zero, cols=x.shape[1], group_size=layout.group_size, widths=layout.plane_widths)
    ids = torch.tensor([[5, 0, 5], [len(numbers) - 1, 7, 1]])
    assert torch.equal(nn.functional.embedding(ids, embedding.weight), numbers.bfloat16()[ids])
    assert torch.equal(embedding.weight, numbers.bfloat16())
    assert torch.equal(embedding.weight[7, :], numbers.bfloat16()[7])
    with pytest.raises(IndexError, match=r"must be in 0\.\.\d+, not -1\.\.5"):
        embedding(torch.tensor([5, -1]))
    looked_up = [embedding(some) for some in (ids, ids[:1, :1])]
    embedding.weight = nn.Parameter(numbers.bfloat16(), requires_grad=False)
    assert all(torch.equal(embedding(some), got) for some, got in zip((ids, ids[:1, :1]), looked_up, strict=True))


@pytest.mark.parametrize("family", ["qwen2_moe", "granitemoe"])
def test_generates_what_transformers_does_with_these_numbers(
    tied: Callable[[str], Path], opened: Callable[..., Any], tmp_path: Path, family: str
) -> None:
    """At any budget."""
    store = convert(tied(family), tmp_path / "store", "int8")
    ids = torch.tensor([[1, 5, 9, 17, 3]])
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    whole, part = (opened(store, expert_cache=size, exact_activations=True) for size in ("100%", "40%"))
    answers = [model.generate(ids, **options) for model in (whole, part)]
    assert all(torch.equal(a, b) for a, b in zip(answers[0].logits, answers[1].logits, strict=True))
    twins = {dtype: numbers_of(whole, tied(family), dtype) for dtype in (torch.float64, torch.bfloat16)}
    true, own = (twin(ids).logits.double() for twin in twins.values())
    got = whole(ids).logits.double()
    assert (got - true).norm() <= 2 * (own - true).norm()


def test_it_is_in_memory_once_and_the_plan_counts_it_once(
    tied: Callable[[str], Path], opened: Callable[..., Any], tmp_path: Path
) -> None:
    store = convert(tied("qwen2_moe"), tmp_path / "store", "int4")
    model, (blob, _) = opened(store), blob_of(store)
    plan = model.fate.plan
    assert plan.tied_bytes == blob.nbytes
    assert f"{blob.nbytes >> 10} KiB, the embedding too" in next(
        remark for what, _, remark in plan.rows() if what == "dense weights"
    )
    assert plan.as_dict()["tied_bytes"] == blob.nbytes
    blobs = {module._blob.data_ptr(): module._blob.nbytes for module in model.modules() if isinstance(module, QuantizedLinear)}
    kept = [value for value in model.parameters() if not isinstance(value, FrozenWeight)]
    held = sum(blobs.values()) + sum({value.data_ptr(): value.nbytes for value in kept}.values())
    header = open_store(store).manifest.dense_bytes - sum(entry.length for entry in dense_entries(open_store(store)).values())
    assert plan.dense_bytes == held + header
    assert prepare(store).footprint().row_bytes == 0

    untied = json.loads((tied("qwen2_moe") / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "untied").mkdir()
    (tmp_path / "untied/config.json").write_text(json.dumps(untied))
    from fate_moe import plan as plan_of

    assert plan_of(tmp_path / "untied", precision="int4").dense_bytes == plan_of(tied("qwen2_moe"), precision="int4").dense_bytes


def as_older_versions_wrote(patch: pytest.MonkeyPatch, change: Callable[[str, BlobLayout], BlobLayout | None]) -> None:
    """Let a conversion choose other layouts; None: numbers."""

    def layouts(model: nn.Module, precision: str) -> dict[str, BlobLayout]:
        changed = {name: change(name, layout) for name, layout in dense_layouts(model, precision).items()}
        return {name: layout for name, layout in changed.items() if layout is not None}

    patch.setattr("fate_moe.store.plan.dense_layouts", layouts)


def test_a_store_that_has_numbers_is_quantized_while_it_is_read(
    tied: Callable[[str], Path], opened: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bytes that a conversion writes; in strips that end in the midst of a row."""
    new = convert(tied("qwen2_moe"), tmp_path / "new", "int4")
    with pytest.MonkeyPatch.context() as patch:
        as_older_versions_wrote(patch, lambda name, layout: None if name == EMBEDDING else layout)
        old = convert(tied("qwen2_moe"), tmp_path / "old", "int4")
    assert dense_entries(open_store(old))[EMBEDDING].dtype == "BF16"
    (want, layout), (_, other) = blob_of(new), blob_of(old)
    assert other == layout
    for chunk in (1000, 4096, 1 << 22):
        monkeypatch.setattr("fate_moe.store.open._CHUNK_BYTES", chunk if chunk % 4096 == 0 else 4096 * 3)
        assert torch.equal(blob_of(old)[0], want)
    saved = dense_entries(open_store(old))[EMBEDDING].length - layout.length
    needs = prepare(old).footprint()
    assert needs.dense_bytes == open_store(old).manifest.dense_bytes - saved
    assert needs.tied_bytes == layout.length
    ids = torch.tensor([[1, 5, 9, 17, 3]])
    with torch.inference_mode():
        assert torch.equal(opened(old)(ids).logits, opened(new)(ids).logits)


def test_a_conversion_that_an_older_version_began_is_finished_in_this_form(
    tied: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        as_older_versions_wrote(patch, lambda name, layout: None if name == EMBEDDING else layout)
        patch.setattr("fate_moe.store.convert._write_shard", fail)
        with pytest.raises(KeyboardInterrupt):
            convert(tied("qwen2_moe"), tmp_path / "store", "int4")
    store = convert(tied("qwen2_moe"), tmp_path / "store", "int4")
    assert dense_entries(open_store(store))[EMBEDDING].dtype == "U8"


def test_a_head_keeps_eight_bits_among_four(checkpoint: Callable[[str], Path], opened: Callable[..., Any], tmp_path: Path) -> None:
    """One that an older version wrote with four is read as it is."""
    store = convert(checkpoint("qwen2_moe"), tmp_path / "store", "int4", dense_precision="int4")
    four = blob_layout("int4", {"weight": (128, 64)}, "BF16")
    with pytest.MonkeyPatch.context() as patch:
        as_older_versions_wrote(patch, lambda name, layout: four if name == HEAD else layout)
        old = convert(checkpoint("qwen2_moe"), tmp_path / "old", "int4", dense_precision="int4")
    for path, precision in ((store, "int8"), (old, "int4")):
        model = opened(path)
        assert model.lm_head._layout.precision == precision
        assert model.model.layers[0].self_attn.q_proj._layout.precision == "int4"
        assert prepare(path).footprint().dense_bytes + prepare(path).footprint().row_bytes == open_store(path).manifest.dense_bytes


def test_changed_ties(
    tied: Callable[[str], Path], opened: Callable[..., Any], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    def with_tie(store: Path, tie: bool) -> Path:
        config = json.loads((store / "config.json").read_text()) | {"tie_word_embeddings": tie}
        (store / "config.json").write_text(json.dumps(config))
        return store

    with pytest.raises(StoreError, match=r"dense\.safetensors lacks lm_head\.weight"):
        opened(with_tie(convert(tied("qwen2_moe"), tmp_path / "tied", "int4"), False))
    with pytest.raises(StoreError, match=r"lm_head\.weight is \(\d+,\) in dense\.safetensors, config\.json means \(128, 64\)"):
        opened(with_tie(convert(checkpoint("qwen2_moe"), tmp_path / "untied", "int4"), True))

    model, ids = opened(with_tie(tmp_path / "tied", True)), torch.tensor([[1, 5, 9]])
    with torch.inference_mode():
        want = model(ids).logits
        model.tie_weights()
        assert torch.equal(model(ids).logits, want)
        own = model.get_input_embeddings()
        other = nn.Embedding(128, 64, _weight=own.weight.clone().float().mul(2).bfloat16())
        model.set_input_embeddings(other)
        assert not torch.equal(model.lm_head(other.weight[:2]), nn.functional.linear(other.weight[:2], other.weight))
        model.tie_weights()
        assert torch.equal(model.lm_head(other.weight[:2]), nn.functional.linear(other.weight[:2], other.weight))
        model.set_input_embeddings(own)
        model.tie_weights()
        assert torch.equal(model(ids).logits, want)


def test_what_others_do_with_a_tied_matrix(tied: Callable[[str], Path], opened: Callable[..., Any], tmp_path: Path) -> None:
    """Adapters beside it and hooks work; what would change it is refused with the one sentence."""
    peft = pytest.importorskip("peft")
    model, ids = opened(convert(tied("qwen2_moe"), tmp_path / "store", "int4")), torch.tensor([[1, 5, 9]])
    with torch.inference_mode():
        want = model(ids).logits
    seen: list[torch.Size] = []
    handles = [
        module.register_forward_hook(lambda module, args, output: seen.append(output.shape))
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
    ]
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, want)
    assert seen == [(1, 3, 64), (1, 3, 128)]
    for handle in handles:
        handle.remove()
    weight = model.lm_head.weight
    for change in (
        lambda: weight.mul_(2),
        lambda: weight.__setitem__(0, 1.0),
        lambda: setattr(weight, "data", torch.zeros(128, 64)),
        lambda: weight.requires_grad_(),
    ):
        with torch.no_grad(), pytest.raises(UnsupportedCallError, match="a quantized weight cannot be changed"):
            change()
    with pytest.raises(UnsupportedCallError, match="resize_token_embeddings would change"):
        model.resize_token_embeddings(200)
    with pytest.raises(UnsupportedCallError, match="a quantized weight cannot be changed"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))

    model = opened(tmp_path / "store")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"], task_type="CAUSAL_LM"))
    with torch.inference_mode():
        assert torch.equal(adapted(ids).logits, want), "an adapter begins with nothing"
    adapted(ids, labels=ids).loss.backward()
    gradients = {name: value.grad for name, value in adapted.named_parameters() if value.requires_grad}
    assert any("lora_embedding_A" in name and bool(value.abs().max() > 0) for name, value in gradients.items())
    assert any("lm_head.lora_B" in name and bool(value.abs().max() > 0) for name, value in gradients.items())
    with pytest.raises(UnsupportedCallError, match="a quantized weight cannot be changed"):
        adapted.merge_adapter()


def test_on_a_gpu_it_becomes_numbers(tied: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip("triton")
    store = convert(tied("qwen2_moe"), tmp_path / "store", "int4")
    planes, scale, zero = in_parts(*blob_of(store))
    model = simulated_gpu(store)
    numbers = dequantize(planes, scale, zero, cols=64, group_size=64, widths=(8,)).bfloat16()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, numbers)
    assert model.fate.plan.dense_bytes >= sum({value.data_ptr(): value.nbytes for value in model.parameters()}.values())
    model.fate.close()


def test_groups_of_rows_have_inputs_of_their_own(opened: Callable[..., Any], tmp_path: Path) -> None:
    tiny_model("deepseek_v4").bfloat16().save_pretrained(tmp_path / "checkpoint")
    for exact in (False, True):
        model = opened(convert(tmp_path / "checkpoint", tmp_path / "store", "int4"), exact_activations=exact)
        grouped = next(module for module in model.modules() if isinstance(module, QuantizedGroups))
        planes, scale, zero = in_parts(grouped._blob, grouped._layout)
        x = torch.randn(2, 3, grouped.n_groups, grouped.in_features, generator=torch.Generator().manual_seed(1)).bfloat16()
        got, rows = grouped(x), grouped.out_features // grouped.n_groups
        assert got.shape == (2, 3, grouped.n_groups, rows)
        for group in range(grouped.n_groups):
            some = slice(group * rows, (group + 1) * rows)
            want = linear_quantized(
                x[:, :, group].reshape(6, -1).float(), [plane[some] for plane in planes], scale[some], zero[some],
                group_size=64, widths=(8,), exact=exact,
            )  # fmt: skip
            if exact:
                assert (got[:, :, group].reshape(6, -1).float() - want).abs().max() <= 2**-7 * want.abs().max()
            else:
                assert torch.equal(got[:, :, group].reshape(6, -1), want.bfloat16())
        x.requires_grad_()
        grouped(x).float().sum().backward()
        assert x.grad is not None
        with torch.inference_mode():
            assert bool(model(torch.tensor([[1, 5, 9]])).logits.isfinite().all())


def test_embeddings_that_are_no_input(opened: Callable[..., Any], tmp_path: Path) -> None:
    """Positions of what a model sees: rows looked up in a quantized matrix that stays in memory."""
    tiny_model("qwen3_vl_moe").bfloat16().save_pretrained(tmp_path / "checkpoint")
    model = opened(convert(tmp_path / "checkpoint", tmp_path / "store", "int4"))
    positions = model.model.visual.pos_embed
    assert type(positions) is nn.Embedding
    ids = torch.tensor([3, 1])
    assert torch.equal(positions(ids), positions.weight.clone()[ids])


def test_small_and_other_matrices_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepare(convert(tiny_checkpoint("qwen2_moe", tmp_path / "tied", tie_word_embeddings=True), tmp_path / "store")).model
    assert EMBEDDING in dense_layouts(model, "int4")
    assert HEAD not in dense_layouts(model, "int4")
    model.lm_head.__class__ = type("Head", (nn.Linear,), {})  # code of its own: who knows what it does with the weight
    assert EMBEDDING not in dense_layouts(model, "int4")
    monkeypatch.setattr(dense, "MIN_QUANTIZED_ELEMENTS", 1 << 16)
    assert dense_layouts(model, "int4") == {}
