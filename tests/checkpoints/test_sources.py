"""Sources of checkpoints: block-scaled FP8, and the hub's cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fate_moe.checkpoints.source import Checkpoint, dequantize_blocks
from fate_moe.core import ExpertId
from fate_moe.errors import CheckpointError, UnsupportedModelError
from fate_moe.store.convert import convert
from fate_moe.store.open import load_dense, open_store
from fate_moe.store.reader import DiskSource
from tests.store.test_convert import read_parts
from tests.support.checkpoints import tiny_checkpoint
from tests.support.reading import load_all, published_expert, same_bits, snapshot

E4M3_MAX = 448.0


def dequantized(weights: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """DeepSeek-V3's format, dequantized element by element."""
    rows, cols = weights.shape
    out = torch.empty(rows, cols)
    for r in range(rows):
        for c in range(cols):
            out[r, c] = float(weights[r, c]) * float(scale[r // block[0], c // block[1]])
    return out.bfloat16()


def to_fp8(folder: Path, out: Path, block: tuple[int, int], single_scale: bool = False) -> dict[str, torch.Tensor]:
    """Rewrite a checkpoint in block-scaled FP8, as DeepSeek publishes it; returns the plain dequantization by name."""
    plain: dict[str, torch.Tensor] = {}
    written: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(3)
    for name, tensor in load_all(folder).items():
        if tensor.ndim != 2 or not name.endswith("_proj.weight"):
            plain[name] = written[name] = tensor
            continue
        blocks = (1, 1) if single_scale else (-(-tensor.shape[0] // block[0]), -(-tensor.shape[1] // block[1]))
        scale = torch.rand(blocks, generator=generator) * 0.01 + 0.001  # only the format matters, not the codes
        code = (torch.randn(tensor.shape, generator=generator) * 100).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        written[name], written[name + "_scale_inv"] = code, scale
        plain[name] = dequantized(code, scale, (tensor.shape[0], tensor.shape[1]) if single_scale else block)
    out.mkdir()
    save_file(written, out / "model.safetensors")
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block), "activation_scheme": "dynamic"}
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": quantization}
    (out / "config.json").write_text(json.dumps(config))
    return plain


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "block", "single_scale"),
    [("deepseek_v3", (16, 24), False), ("qwen2_moe", (128, 128), False), ("qwen3_moe", (16, 16), True)],
)
def test_fp8_is_dequantized_to_bf16(tmp_path: Path, family: str, block: tuple[int, int], single_scale: bool) -> None:
    """Blocks of 16x24 leave ragged edges in 32x64 matrices; 128x128 is larger than any of them."""
    folder = tiny_checkpoint(family, tmp_path / "bf16", torch.bfloat16)
    plain = to_fp8(folder, tmp_path / "fp8", block, single_scale)
    store = open_store(convert(tmp_path / "fp8", tmp_path / "store"))
    assert store.manifest.dtype == "BF16"
    dense = load_dense(store)
    assert dense.keys() == {name for name in plain if ".experts." not in name}
    assert all(torch.equal(tensor, plain[name]) for name, tensor in dense.items())
    source = DiskSource(store)
    first = 1 if family == "deepseek_v3" else 0
    for expert in range(8):
        parts = read_parts(source, ExpertId(0, expert))
        for name, tensor in published_expert(plain, family, first, expert).items():
            assert same_bits(parts[name], tensor)
    source.close()


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 16), st.integers(1, 16), st.integers(0, 10**6))
@settings(deadline=None, max_examples=30)
def test_dequantize_blocks(rows: int, cols: int, block_rows: int, block_cols: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    code = (torch.randn(rows, cols, generator=generator) * 100).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-rows // block_rows), -(-cols // block_cols), generator=generator)
    block = (block_rows, block_cols) if scale.numel() > 1 else (rows, cols)
    assert torch.equal(dequantize_blocks(code, scale, (block_rows, block_cols)), dequantized(code, scale, block))


def fp8_folder(tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], block: object = (16, 16)) -> Path:
    tensors = {"a.weight": torch.zeros(32, 32).to(torch.float8_e4m3fn), "a.weight_scale_inv": torch.ones(2, 2)}
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": block}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_scales_that_do_not_fit(tmp_path: Path) -> None:
    folder = fp8_folder(tmp_path, lambda tensors: tensors.update({"a.weight_scale_inv": torch.ones(2, 3)}))
    with pytest.raises(CheckpointError, match=r"a\.weight_scale_inv.*\(2, 3\).*\(2, 2\)"):
        Checkpoint(folder).read("a.weight")


def test_fp8_without_scales_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"a\.weight \(F8_E4M3\) is quantized"):
        Checkpoint(fp8_folder(tmp_path, lambda tensors: tensors.pop("a.weight_scale_inv")))


@pytest.mark.parametrize("block", [[0, 128], [128], "128", [128.0, 128], 128])
def test_invalid_block_sizes(tmp_path: Path, block: object) -> None:
    with pytest.raises(CheckpointError, match="weight_block_size"):
        Checkpoint(fp8_folder(tmp_path, lambda tensors: None, block))


def hub_cache(folder: Path, checkpoint: Path) -> Path:
    """A model in the hub client's cache: refs name a snapshot, whose files are links to blobs."""
    model = folder / "models--org--tiny"
    commit = "0123456789abcdef0123456789abcdef01234567"
    for name in ("refs", "blobs", f"snapshots/{commit}"):
        (model / name).mkdir(parents=True)
    (model / "refs" / "main").write_text(commit)
    for number, path in enumerate(sorted(checkpoint.iterdir())):
        blob = model / "blobs" / f"{number:040x}"
        blob.write_bytes(path.read_bytes())
        (model / "snapshots" / commit / path.name).symlink_to(f"../../blobs/{blob.name}")
    return folder


@pytest.mark.slow
def test_hub_ids_come_from_the_cache(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """In a separate process, because the hub's client reads its environment once."""
    environment = {
        **os.environ,
        "HF_HUB_CACHE": str(hub_cache(tmp_path / "hub", checkpoint("qwen3_moe"))),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    code = "from fate_moe.cli import main\nfor name in ('tiny', 'absent'): print(main(['convert', 'org/' + name, name]))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-2:] == ["0", "1"], done.stderr
    complaints = [line for line in done.stderr.splitlines() if line.startswith("fate: ")]
    assert len(complaints) == 1
    assert complaints[0].startswith("fate: org/absent is not a folder and cannot be downloaded")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "absent").exists()
    local = snapshot(convert(checkpoint("qwen3_moe"), tmp_path / "local"))
    hub = snapshot(tmp_path / "tiny")
    assert open_store(tmp_path / "tiny").manifest.source == "org/tiny"
    assert hub.keys() == local.keys()
    assert all(hub[name] == local[name] for name in hub if name != "fate.json")


@pytest.mark.parametrize("name", ["", "../etc", "no-such-folder", "a/b/c", "https://huggingface.co/org/tiny", "/nowhere"])
def test_what_is_neither_a_folder_nor_a_hub_id(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError):
        convert(name, tmp_path / "store")
    assert not list(tmp_path.iterdir())
