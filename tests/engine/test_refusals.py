"""Methods that assume that all parameters are in memory: right where nothing changes, else one error and a model as before."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fate_moe.engine.prepare import store_for
from fate_moe.errors import UnsupportedCallError
from fate_moe.store.convert import convert
from tests.support.calls import PROMPT, reference, write
from tests.support.engines import load_model, simulated_gpu

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One model for all: what is refused leaves it as it was."""
    from tests.support.checkpoints import tiny_checkpoint

    store = store_for(tiny_checkpoint("qwen2_moe", tmp_path_factory.mktemp("refusals") / "qwen2_moe"), "lossless")
    running = load_model(store)
    running.store = store
    yield running
    running.fate.close()


UNTYPED: Any = torch  # untyped parts of it
REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "half": (lambda m: m.half(), "stays in torch.float32 on cpu"),
    "to bfloat16": (lambda m: m.to(torch.bfloat16), "stays in torch.float32 on cpu"),
    "to a device": (lambda m: m.to("cuda"), "for a GPU load it with device='cuda'"),
    "cuda": (lambda m: m.cuda(), "for a GPU load it with device='cuda'"),
    "to meta": (lambda m: m.to("meta"), "stays in"),
    "to_empty": (lambda m: m.to_empty(device="cpu"), "stays in"),
    "half of a part": (lambda m: m.model.half(), "stays in"),
    "double of a layer": (lambda m: m.model.layers[0].double(), "stays in"),
    "resize": (lambda m: m.resize_token_embeddings(200), "resize_token_embeddings would change parameters"),
    "init": (lambda m: m.init_weights(), "init_weights would change"),
    "share_memory": (lambda m: m.share_memory(), "share_memory would change"),
    "state_dict": (lambda m: m.state_dict(), "state_dict cannot write"),
    "state_dict of a part": (lambda m: m.model.state_dict(), "state_dict cannot write"),
    "torch.save of the state": (lambda m: torch.save(m.state_dict(), io.BytesIO()), "state_dict cannot write"),
    "load experts": (
        lambda m: m.load_state_dict({"model.layers.0.mlp.experts.down_proj": torch.ones(8, 64, 32)}, strict=False),
        "load_state_dict would change",
    ),
    "pickle": (pickle.dumps, "cannot be copied, pickled or sent"),
    "torch.save": (lambda m: torch.save(m, io.BytesIO()), "cannot be copied, pickled or sent"),
    "copy": (copy.copy, "cannot be copied"),
    "deepcopy": (copy.deepcopy, "cannot be copied"),
    "deepcopy of a part": (lambda m: copy.deepcopy(m.model.layers[0]), "cannot be copied"),
    "dynamic quantization": (
        lambda m: UNTYPED.ao.quantization.quantize_dynamic(m, {nn.Linear}),
        "cannot be copied",
    ),
    "trace": (lambda m: UNTYPED.jit.trace(m, PROMPT, strict=False), "cannot be traced or exported"),
    "script": (lambda m: torch.jit.script(m), "cannot be copied"),
    "vmap": (lambda m: torch.func.vmap(lambda ids: m(ids).logits)(PROMPT.unsqueeze(1)), "vmap"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_refused(name: str, model: Any) -> None:
    call, said = REFUSED[name]
    before = write(model, num=2).tolist()
    with torch.no_grad(), pytest.raises(UnsupportedCallError, match=said):
        call(model)
    assert write(model, num=2).tolist() == before


def test_the_same_is_refused_on_a_gpu(checkpoint: Callable[[str], Path]) -> None:
    model = simulated_gpu(store_for(checkpoint("qwen2_moe"), "lossless"))
    for name in set(REFUSED) - {"trace", "script", "vmap"}:
        call, said = REFUSED[name]
        with pytest.raises(UnsupportedCallError, match=said):
            call(model)
    assert model.to("cpu").to(torch.float32) is model
    model.fate.close()


def test_saving_leaves_no_folder_of_configurations(model: Any, tmp_path: Path) -> None:
    for save in (model.save_pretrained, model.push_to_hub):
        with pytest.raises(UnsupportedCallError, match=f"its experts are in the store.*{model.store}"):
            save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_what_changes_nothing_passes(model: Any) -> None:
    before = write(model, num=2).tolist()
    assert model.to("cpu") is model
    assert model.to(torch.float32).float().eval().requires_grad_(False) is model
    model.tie_weights()
    assert "Qwen2MoeForCausalLM" in repr(model)
    assert (model.device.type, model.dtype) == ("cpu", torch.float32)
    assert nn.DataParallel(model)(PROMPT).logits.isfinite().all()
    assert write(model, num=2).tolist() == before


def test_sizes_are_the_models(checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantized matrices and an embedding on the disk are no parameters, and count as such."""
    monkeypatch.setattr("fate_moe.store.dense.MIN_QUANTIZED_ELEMENTS", 1 << 11)
    twin = reference(checkpoint("qwen2_moe"))
    model = load_model(convert(checkpoint("qwen2_moe"), tmp_path / "store", "int4"), expert_cache="50%")
    for exclude in (False, True):
        assert model.num_parameters(exclude_embeddings=exclude) == twin.num_parameters(exclude_embeddings=exclude)
    plan = model.fate.plan
    assert model.get_memory_footprint() == plan.dense_bytes + plan.expert_cache_bytes < twin.get_memory_footprint()
    model.fate.close()


def test_modules_that_are_added_are_moved(loaded: Callable[..., Any]) -> None:
    model = loaded("qwen2_moe")
    layer = model.model.layers[0]
    layer.added = nn.Linear(4, 4, dtype=torch.float64)
    model.to(torch.float32)
    assert layer.added.weight.dtype == torch.float32


def test_compiled_models_run(loaded: Callable[..., Any]) -> None:
    model = loaded("qwen2_moe")
    with torch.no_grad():
        want = model(PROMPT).logits
        compiled = UNTYPED.compile(model, backend="eager")
        for _ in range(2):
            torch.testing.assert_close(compiled(PROMPT).logits, want)
    model.compile(backend="eager")
    assert write(model).shape == (1, 12)
    UNTYPED._dynamo.reset()
