"""What every predictor keeps to (core.Predictor)."""

from __future__ import annotations

import torch

from fate_moe.core import Predictor


def check_predictor(predictor: Predictor, num_layers: int, num_experts: int, hidden: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for num_tokens in (1, 2, 33):
        for layer in range(num_layers):
            gate_input = torch.randn(num_tokens, hidden, generator=generator)
            predictor.observe(layer, [3, 1])
            predicted = predictor.predict(layer, gate_input)
            experts = [expert for expert, _ in predicted]
            assert len(set(experts)) == len(experts)
            assert all(isinstance(expert, int) and 0 <= expert < num_experts for expert in experts)
            assert all(0 <= probability <= 1 for _, probability in predicted)
            assert predictor.predict(layer, gate_input) == predicted, "asking twice changes nothing"
