"""Learned state in a store: read back, and ignored when it is damaged."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fate_moe.kernels.native import native
from fate_moe.store.learned import (
    GATES,
    STATISTICS,
    VIEW_LOSSES,
    gates_bytes,
    load_gates,
    load_statistics,
    load_view_losses,
    save_gates,
    save_statistics,
    save_view_losses,
)

WEIGHTS = [torch.randn(4, 9, generator=torch.Generator().manual_seed(layer)).bfloat16() for layer in range(3)]


def test_gates_are_read_back(tmp_path: Path) -> None:
    assert load_gates(tmp_path, [4] * 3, 8) is None
    assert gates_bytes(tmp_path, 8) == 0
    save_gates(tmp_path, WEIGHTS)
    gates = load_gates(tmp_path, [4] * 3, 8)
    assert gates is not None
    assert len(gates.ahead) == 1
    assert gates.forecast == []
    for got, want in zip(gates.ahead[0], WEIGHTS, strict=True):
        assert got is not None
        assert torch.equal(got, want)
    assert gates_bytes(tmp_path, 8) == 2 * sum(weight.nbytes for weight in WEIGHTS), "rows of 8 are multiplied in fp32"
    assert gates_bytes(tmp_path, 64) == 0, "of another model: they are not loaded"
    save_gates(tmp_path, [torch.zeros(4, 65)] * 3)
    assert gates_bytes(tmp_path, 64) == 3 * 4 * 65 * 2 or native is None


def test_gates_of_several_layers_ahead_and_a_forecast_are_read_back(tmp_path: Path) -> None:
    forecast = [torch.randn(4, 17, generator=torch.Generator().manual_seed(layer)).bfloat16() for layer in range(3)]
    save_gates(tmp_path, WEIGHTS, [None, *(weight.clone() for weight in WEIGHTS[1:])], forecast=forecast)
    gates = load_gates(tmp_path, [4] * 3, 8)
    assert gates is not None
    assert [[weight is None for weight in weights] for weights in gates.ahead] == [[False] * 3, [True, False, False]]
    assert all(torch.equal(got, want) for got, want in zip(gates.forecast, forecast, strict=True))


@pytest.mark.parametrize("damage", ["truncated", "other", "nan", "layers", "dtype", "sparse", "pipe"])
def test_damaged_gates_are_not_used(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    weights = [weight.clone() for weight in WEIGHTS]
    if damage == "nan":
        weights[1][0, 0] = float("nan")
    save_gates(tmp_path, weights[: 2 if damage == "layers" else 3])
    if damage == "truncated":
        (tmp_path / GATES).write_bytes((tmp_path / GATES).read_bytes()[:-40])
    if damage == "dtype":  # torch has no isfinite for it
        save_file({f"layer.{layer}": torch.zeros(4, 9, dtype=torch.float8_e4m3fn) for layer in range(3)}, tmp_path / GATES)
    if damage == "sparse":  # its length must not count in the budget
        os.truncate(tmp_path / GATES, 1 << 40)
        assert gates_bytes(tmp_path, 8) == 0
    if damage == "pipe":
        (tmp_path / GATES).unlink()
        os.mkfifo(tmp_path / GATES)
    with caplog.at_level(logging.WARNING):
        assert load_gates(tmp_path, [4] * 3, 12 if damage == "other" else 8) is None
    assert "fate fit" in caplog.text


def test_statistics_are_read_back(tmp_path: Path) -> None:
    assert load_statistics(tmp_path) is None
    save_statistics(tmp_path, {"recent": np.arange(6, dtype=np.float32)})
    state = load_statistics(tmp_path)
    assert state is not None
    assert state["recent"].tolist() == list(range(6))
    assert [path.name for path in tmp_path.iterdir()] == [STATISTICS]


def test_damaged_statistics_are_not_used(tmp_path: Path) -> None:
    for content in (b"", b"PK\x03\x04 no zip", b"\x80\x04pickle"):
        (tmp_path / STATISTICS).write_bytes(content)
        assert load_statistics(tmp_path) is None
    np.savez_compressed(tmp_path / STATISTICS, recent=np.zeros(1 << 27, np.uint8))
    assert load_statistics(tmp_path) is None, "it unpacks to more than is ever written"
    np.savez(tmp_path / STATISTICS, objects=np.array([{}], dtype=object))
    assert load_statistics(tmp_path) is None, "nothing is unpickled"


def test_what_killed_writers_left_is_deleted_an_hour_later(tmp_path: Path) -> None:
    for name in (f"{STATISTICS}.1-2.tmp", f"{STATISTICS}.3-4.tmp"):
        (tmp_path / name).write_bytes(b"half")
    os.utime(tmp_path / f"{STATISTICS}.1-2.tmp", (1, 1))
    save_statistics(tmp_path, {"recent": np.zeros(1)})
    assert sorted(path.name for path in tmp_path.iterdir()) == [STATISTICS, f"{STATISTICS}.3-4.tmp"]


def test_a_store_that_cannot_be_written_is_unchanged(tmp_path: Path) -> None:
    save_statistics(tmp_path / "nowhere", {"recent": np.zeros(1)})
    assert not (tmp_path / "nowhere").exists()


def test_a_read_only_or_full_disk_keeps_no_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:  # a read-only file system refuses to remove even what is missing
        patch.setattr(Path, "unlink", fail)
        patch.setattr("builtins.open", fail)
        save_statistics(tmp_path, {"recent": np.zeros(1)})
    monkeypatch.setattr(np, "savez", fail)
    save_statistics(tmp_path, {"recent": np.zeros(1)})
    assert not list(tmp_path.iterdir())


def test_view_losses_are_read_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load_view_losses(tmp_path) is None
    save_view_losses(tmp_path, {3: 0.0625, 2: -0.5})
    assert load_view_losses(tmp_path) == {2: -0.5, 3: 0.0625}
    assert not caplog.records
    for damaged in (
        "[" * 100_000,
        '{"nats_lost_by_bits": {"2": 1' + "0" * 400 + "}}",
        "",
        "[]",
        '{"nats_lost_by_bits": {"two": 1}}',
        '{"nats_lost_by_bits": {"2": NaN}}',
        '{"nats_lost_by_bits": 3}',
    ):
        (tmp_path / VIEW_LOSSES).write_text(damaged)
        caplog.clear()
        assert load_view_losses(tmp_path) is None
        assert "--calibrate" in caplog.text
