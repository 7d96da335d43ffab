"""Error compensation against a twin that solves for each remaining channel anew, and its effect on correlated inputs."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fate_moe.quant import compensate as module
from fate_moe.quant.compensate import compensate
from fate_moe.quant.hqq import hqq
from fate_moe.quant.solver import SOLVERS, minmax

pytestmark = pytest.mark.slow


def drawn(rows: int, cols: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [rows, cols], inputs [512, cols] with correlated channels of different power, and more such inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(cols // 4, cols, generator=generator) * torch.rand(cols, generator=generator)
    inputs, others = (
        torch.randn(512, cols // 4, generator=generator) @ mixing + 0.1 * torch.randn(512, cols, generator=generator)
        for _ in range(2)
    )
    return torch.randn(rows, cols, generator=generator), inputs, others


def restored(codes: Tensor, scale: Tensor, zero: Tensor, group_size: int) -> Tensor:
    step, shift = (x.double().repeat_interleave(group_size, 1)[:, : codes.shape[1]] for x in (scale, zero))
    return step * codes - shift


def twin(weights: Tensor, scale: Tensor, zero: Tensor, levels: int, group_size: int, moments: Tensor) -> Tensor:
    """Round one channel, then minimize (w' - w) H (w' - w)^T over all others with the rounded ones fixed: fp64, from scratch."""
    damped = moments.double() + module.DAMPING * moments.double().diagonal().mean() * torch.eye(len(moments))
    order = moments.diagonal().argsort(descending=True).tolist()
    target, now = weights.double(), weights.double().clone()
    codes = torch.empty(weights.shape, dtype=torch.uint8)
    for done, channel in enumerate(order, start=1):
        step, shift = (x[:, channel // group_size].double() for x in (scale, zero))
        codes[:, channel] = ((now[:, channel] + shift) / step).round().clamp(0, levels).to(torch.uint8)
        now[:, channel] = step * codes[:, channel] - shift
        fixed, free = order[:done], order[done:]
        error = now[:, fixed] - target[:, fixed]
        now[:, free] = target[:, free] - error @ damped[fixed][:, free] @ damped[free][:, free].inverse()
    return codes


@pytest.mark.parametrize(("cols", "group_size"), [(64, 32), (150, 64)])
def test_matches_its_twin(cols: int, group_size: int) -> None:
    weights, inputs, _ = drawn(6, cols, 0)
    moments = inputs.T @ inputs
    _, scale, zero = hqq(weights, 4, group_size)
    got, expected = compensate(weights, scale, zero, (4,), group_size, moments), twin(weights, scale, zero, 15, group_size, moments)
    # Rounding at half a step may differ in fp32 and changes later channels of its row.
    assert (got == expected).all(1).sum() >= 5


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("widths", [(2, 1, 1), (8,)])
def test_outputs_are_nearer_on_other_inputs(solver: str, widths: tuple[int, ...]) -> None:
    weights, inputs, others = drawn(64, 256, 1)
    codes, scale, zero = SOLVERS[solver](weights, sum(widths), 64)
    made = compensate(weights, scale, zero, widths, 64, inputs.T @ inputs)
    errors = [
        ((restored(which, scale, zero, 64) - weights).float() @ others.T).norm() / (weights @ others.T).norm()
        for which in (codes, made)
    ]
    assert errors[1] < 0.7 * errors[0]
    assert int(made.max()) < 2 ** sum(widths)


def loss(codes: Tensor, weights: Tensor, scale: Tensor, zero: Tensor, moments: Tensor, view_weight: float) -> tuple[float, float]:
    """The objective of the descent, in fp64, and the 3-bit view's unweighted part of it."""
    damped = moments.double() + module.DAMPING * moments.double().diagonal().mean() * torch.eye(len(moments))
    of_all, of_view = (
        float((error @ damped * error).sum())
        for error in (restored(values, scale, zero, 64) - weights for values in (codes.double(), codes // 2 * 2 + 0.5))
    )
    return of_all + view_weight * of_view, of_view


def test_descents_never_increase_the_objective_and_improve_the_shorter_view(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, inputs, _ = drawn(32, 256, 5)
    moments = inputs.T @ inputs
    _, scale, zero = hqq(weights, 4, 64)
    for view_weight in (0.0, 0.03, 1.0):
        monkeypatch.setattr(module, "VIEW_WEIGHT", view_weight)
        losses = []
        for count in range(4):
            monkeypatch.setattr(module, "DESCENTS", count)
            losses.append(
                loss(compensate(weights, scale, zero, (2, 1, 1), 64, moments), weights, scale, zero, moments, view_weight)
            )
        together = [both for both, _ in losses]
        assert together[1] < 0.999 * together[0]
        assert all(after <= before * 1.000001 for before, after in pairwise(together))
        assert view_weight == 0 or losses[-1][1] < 0.97 * losses[0][1]


def test_a_descent_ends_in_a_local_minimum(monkeypatch: pytest.MonkeyPatch) -> None:
    """No change of a single channel's code lowers the objective further."""
    weights, inputs, _ = drawn(3, 64, 6)
    moments = inputs.T @ inputs
    _, scale, zero = hqq(weights, 4, 64)
    monkeypatch.setattr(module, "DESCENTS", 30)  # until nothing changes
    made = compensate(weights, scale, zero, (2, 1, 1), 64, moments)
    minimum = loss(made, weights, scale, zero, moments, module.VIEW_WEIGHT)[0]
    for row in range(3):
        for channel in range(64):
            for code in range(16):
                other = made.clone()
                other[row, channel] = code
                assert loss(other, weights, scale, zero, moments, module.VIEW_WEIGHT)[0] >= minimum * (1 - 1e-6)


def test_moments_of_nothing_and_of_unrelated_channels_leave_the_nearest_codes() -> None:
    weights = torch.randn(8, 96, generator=torch.Generator().manual_seed(2))
    codes, scale, zero = minmax(weights, 4, 64)
    for moments in (torch.zeros(96, 96), torch.eye(96), torch.diag(torch.rand(96, generator=torch.Generator().manual_seed(3)))):
        assert (compensate(weights, scale, zero, (4,), 64, moments) == codes).float().mean() > 0.999  # ties aside


def test_fewer_inputs_than_channels_and_constant_groups() -> None:
    weights, inputs, _ = drawn(4, 128, 4)
    weights[:, :64] = 0.25
    _, scale, zero = minmax(weights, 4, 64)
    made = restored(compensate(weights, scale, zero, (2, 1, 1), 64, inputs[:3].T @ inputs[:3]), scale, zero, 64)
    assert made.isfinite().all()
    assert torch.equal(made[:, :64], torch.full((4, 64), 0.25, dtype=torch.float64))
