"""Every tensor of a checkpoint is read, or left out for a known reason, or the checkpoint is refused before a byte is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fate_moe.cli import main
from fate_moe.errors import CheckpointError, UnsupportedModelError
from fate_moe.store.convert import convert
from fate_moe.store.open import open_store
from tests.support.altered import Tensors, altered, plan_of, rewritten
from tests.support.checkpoints import tiny_checkpoint

Checkpoints = Callable[[str], Path]
ZERO = torch.zeros(64)


def add(*names: str, tensor: torch.Tensor = ZERO) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensor.clone() for name in names})


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mtp.0.fc.weight", "next-token prediction"),
        ("model.mtp_layers.0.input_proj.weight", "next-token prediction"),
        ("model.layers.2.eh_proj.weight", "next-token prediction"),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", "computed from config.json"),
        ("model.visual.blocks.0.attn.proj.weight", "images or sound"),
        ("vision_tower.encoder.layers.7.mlp.fc1.weight", "images or sound"),
        ("audio_tower.conv1.weight", "images or sound"),
        ("model.layers.0.self_attn.o_proj.bias", "a bias of zeros"),
        ("model.layers.0.self_attn.k_proj.k_scale", "a quantized KV cache"),
    ],
)
def test_what_generation_does_not_use_is_named_with_its_reason(
    checkpoint: Checkpoints, tmp_path: Path, name: str, reason: str
) -> None:
    plan = plan_of(altered(checkpoint("qwen2_moe"), tmp_path / "more", add(name)))
    assert list(plan.unread) == [name]
    assert reason in plan.unread[name]


def test_a_family_s_own_list_of_what_it_leaves_out(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """deepseek_v3: model.layers.61.*, which is its MTP layer only where the model has 61 layers."""
    with pytest.raises(UnsupportedModelError, match=r"61.*has 62"):
        plan_of(altered(checkpoint("deepseek_v3"), tmp_path / "more", add("model.layers.61.mlp.up_proj.weight")))


def test_an_mtp_layer_that_the_configuration_counts(checkpoint: Checkpoints, tmp_path: Path) -> None:
    layer = add("model.layers.3.mlp.up_proj.weight", "model.layers.3.joining.weight")
    plan = plan_of(altered(checkpoint("deepseek_v3"), tmp_path / "one", layer, num_nextn_predict_layers=1))
    assert len(plan.unread) == 2
    with pytest.raises(UnsupportedModelError, match=r"describes 3 model\.layers, and the checkpoint has 4"):
        plan_of(altered(checkpoint("deepseek_v3"), tmp_path / "none", layer, num_nextn_predict_layers=0))


def test_an_ordinary_layer_is_no_mtp_layer(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """deepseek_v3's configuration promises one MTP layer unless it says otherwise."""
    with pytest.raises(UnsupportedModelError, match=r"describes 2 model\.layers, and the checkpoint has 3"):
        plan_of(altered(checkpoint("deepseek_v3"), tmp_path / "fewer", num_hidden_layers=2))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_scale",
        "model.layers.0.mlp.adapter.up.weight",
        "score.weight",
        "model.layers.0.mlp.experts.0.up_proj_extra.weight",
    ],
)
def test_unknown_tensors_are_refused_by_name(checkpoint: Checkpoints, tmp_path: Path, name: str) -> None:
    folder = altered(checkpoint("qwen2_moe"), tmp_path / "more", add(name))
    with pytest.raises(UnsupportedModelError, match=name.replace(".", r"\.")) as caught:
        convert(folder, tmp_path / "store")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["more"]


def test_a_bias_that_is_not_zero_is_refused(checkpoint: Checkpoints, tmp_path: Path) -> None:
    bias = add("model.layers.0.self_attn.o_proj.bias", tensor=torch.ones(64))
    with pytest.raises(UnsupportedModelError, match=r"o_proj\.bias is not part"):
        plan_of(altered(checkpoint("qwen2_moe"), tmp_path / "more", bias))


def test_many_unknown_tensors_are_counted(checkpoint: Checkpoints, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"a\.x, b\.x, c\.x \.\.\. \(4 in all\) are not part"):
        plan_of(altered(checkpoint("qwen2_moe"), tmp_path / "more", add("a.x", "b.x", "c.x", "d.x")))


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (lambda n: f"module.{n}", r"'module\.' where the model's begin with ''"),
        (lambda n: f"_orig_mod.{n}", r"'_orig_mod\.'"),
        (lambda n: f"base_model.model.{n}", r"'base_model\.model\.'"),
        (lambda n: f"language_model.{n}", r"'language_model\.'"),
        (
            lambda n: n.replace("model.", "model.language_model.", 1),
            r"'model\.language_model\.' where the model's begin with 'model\.'",
        ),
    ],
)
def test_names_with_another_prefix_are_refused_with_the_prefix(
    checkpoint: Checkpoints, tmp_path: Path, rename: Callable[[str], str], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        plan_of(rewritten(checkpoint("qwen3_moe"), tmp_path / "renamed", rename))


def test_names_without_the_base_models_prefix_are_read(checkpoint: Checkpoints, tmp_path: Path) -> None:
    assert not plan_of(rewritten(checkpoint("qwen3_moe"), tmp_path / "renamed", lambda n: n.removeprefix("model."))).unread


def test_an_adapter_that_was_not_merged_is_refused(checkpoint: Checkpoints, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="merge it first"):
        plan_of(altered(checkpoint("qwen2_moe"), tmp_path / "lora", add("model.layers.0.self_attn.q_proj.lora_A.weight")))


def test_a_classifier_is_refused_by_its_architecture(checkpoint: Checkpoints, tmp_path: Path) -> None:
    folder = altered(
        checkpoint("qwen2_moe"),
        tmp_path / "classifier",
        lambda tensors: (tensors.pop("lm_head.weight"), tensors.update({"score.weight": torch.zeros(2, 64)})),
        architectures=["Qwen2MoeForSequenceClassification"],
    )
    with pytest.raises(CheckpointError, match="Qwen2MoeForSequenceClassification, which does not write text"):
        plan_of(folder)


def test_a_head_that_is_missing_because_it_is_tied(checkpoint: Checkpoints, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="set tie_word_embeddings to true"):
        plan_of(altered(checkpoint("qwen2_moe"), tmp_path / "cut", lambda tensors: tensors.pop("lm_head.weight")))


def test_a_copy_of_a_tied_tensor_is_named(tmp_path: Path) -> None:
    tied = tiny_checkpoint("qwen2_moe", tmp_path / "tied", tie_word_embeddings=True)

    def copy_head(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    plan = plan_of(altered(tied, tmp_path / "both", copy_head))
    assert plan.unread == {"lm_head.weight": "a copy of model.embed_tokens.weight, to which config.json ties it"}


def test_two_tensors_for_one_parameter(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """With and without the base model's prefix: transformers takes one of them in silence."""

    def twice(factor: float) -> Callable[[Tensors], None]:
        return lambda tensors: tensors.update({"norm.weight": tensors["model.norm.weight"] * factor})

    assert plan_of(altered(checkpoint("qwen2_moe"), tmp_path / "same", twice(1))).unread
    with pytest.raises(CheckpointError, match=r"norm\.weight are one parameter and differ"):
        plan_of(altered(checkpoint("qwen2_moe"), tmp_path / "other", twice(2)))


def test_experts_apart_and_stacked_at_once_are_refused(checkpoint: Checkpoints, tmp_path: Path) -> None:
    stack = add("model.layers.0.mlp.experts.gate_up_proj", tensor=torch.zeros(8, 64, 64))
    with pytest.raises(CheckpointError, match=r"gate_up_proj are one parameter and differ"):
        plan_of(altered(checkpoint("qwen2_moe"), tmp_path / "both", stack))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_hidden_layers": 1}, r"describes 1 model\.layers, and the checkpoint has 2"),
        ({"num_hidden_layers": 3}, r"describes 3 model\.layers, and the checkpoint has 2"),
        ({"num_local_experts": 4}, r"has 8 experts of .*, and config\.json describes 4"),
        ({"num_local_experts": 9}, r"lacks 1 of the 9 experts"),
        ({"vocab_size": 130}, r"weight has shape \(128, 64\) .* describes \(130, 64\)"),
        ({"num_key_value_heads": 4}, r"k_proj.* has shape"),
        ({"num_attention_heads": 2, "head_dim": 16}, r"_proj.* has shape"),
        ({"moe_intermediate_size": 16}, r"mlp\.experts\..* has shape"),
        ({"num_experts_per_tok": 9}, "a token takes 9 of 8 experts"),
        ({"num_experts_per_tok": 0}, "a token takes 0 of 8 experts"),
    ],
)
def test_a_configuration_of_another_size_is_refused_from_headers(
    checkpoint: Checkpoints, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    folder = altered(checkpoint("qwen3_moe"), tmp_path / "other", **config)
    with pytest.raises(CheckpointError, match=message):
        plan_of(folder)


def test_an_expert_number_left_out_is_refused(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Eight experts as config.json says, but numbered 0 to 6 and 8."""
    folder = rewritten(checkpoint("qwen2_moe"), tmp_path / "gap", lambda n: n.replace("experts.7.", "experts.8."))
    with pytest.raises(CheckpointError, match="not numbered 0 to 7"):
        plan_of(folder)


def test_integer_weights_are_refused_by_name(checkpoint: Checkpoints, tmp_path: Path) -> None:
    ints = add("model.layers.0.self_attn.q_proj.bias", tensor=torch.zeros(64, dtype=torch.int32))
    with pytest.raises(UnsupportedModelError, match=r"q_proj\.bias is torch\.int32"):
        plan_of(altered(checkpoint("qwen2_moe"), tmp_path / "int", ints))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "model.norm.weight", "model.layers.1.mlp.gate.weight", "model.layers.0.self_attn.q_proj.bias"],
)
def test_dense_weights_that_are_no_numbers_are_refused(checkpoint: Checkpoints, tmp_path: Path, name: str, value: float) -> None:
    folder = altered(checkpoint("qwen2_moe"), tmp_path / "bad", lambda tensors: tensors[name].view(-1)[-1:].fill_(value))
    with pytest.raises(CheckpointError, match=f"{name} has infinite or NaN weights".replace(".", r"\.")):
        convert(folder, tmp_path / "store")
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_weights_too_large_for_the_configured_dtype_are_refused(checkpoint: Checkpoints, tmp_path: Path) -> None:
    big = lambda tensors: tensors["model.norm.weight"].fill_(1e6)  # noqa: E731
    folder = altered(checkpoint("qwen2_moe"), tmp_path / "big", big, dtype="float16")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has weights too large for torch\.float16"):
        convert(folder, tmp_path / "store")


def test_a_refused_conversion_leaves_other_peoples_files(checkpoint: Checkpoints, tmp_path: Path) -> None:
    folder = altered(checkpoint("qwen2_moe"), tmp_path / "bad", lambda tensors: tensors["model.norm.weight"].fill_(torch.nan))
    (tmp_path / "store.partial").mkdir()
    (tmp_path / "store.partial" / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="NaN"):
        convert(folder, tmp_path / "store")
    assert [path.name for path in (tmp_path / "store.partial").iterdir()] == ["mine.txt"]


def test_plan_inspect_and_convert_say_what_is_not_read(
    checkpoint: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = altered(checkpoint("qwen2_moe"), tmp_path / "more", add("mtp.0.fc.weight", "mtp.1.fc.weight"))
    for verb in ("plan", "inspect"):
        assert main([verb, str(folder), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["unread"].keys() == {"mtp.0.fc.weight", "mtp.1.fc.weight"}
    assert main(["convert", str(folder), str(tmp_path / "store")]) == 0
    assert "not read: 2 tensors, mtp.0.fc.weight ...: next-token prediction" in capsys.readouterr().out
    for verb in ("plan", "inspect"):
        assert main([verb, str(tmp_path / "store"), "--json"]) == 0
        assert len(json.loads(capsys.readouterr().out)["unread"]) == 2


@pytest.mark.parametrize("verb", ["plan", "inspect"])
def test_plan_and_inspect_refuse_what_convert_refuses(
    checkpoint: Checkpoints, tmp_path: Path, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = altered(checkpoint("qwen3_moe"), tmp_path / "fewer", num_hidden_layers=1)
    assert main([verb, str(folder)]) == 1
    assert "describes 1 model.layers" in capsys.readouterr().err


def test_a_store_without_a_list_of_unread_tensors_opens(checkpoint: Checkpoints, tmp_path: Path) -> None:
    store = convert(checkpoint("olmoe"), tmp_path / "store")
    assert "unread" not in json.loads((store / "fate.json").read_text())
    assert open_store(store).manifest.unread == {}
