"""What every predictor keeps to (core.Predictor)."""

from __future__ import annotations

import torch

from fate_moe.core import Predictor


def check_predictor(predictor: Predictor, num_layers: int, num_experts: int, hidden: int) -> None:
    """Layer by layer, nearer before further, as the runtime asks; for one token and for many."""
    generator = torch.Generator().manual_seed(0)
    for num_tokens in (1, 2, 33, 1, 1):
        for layer in range(num_layers):
            router_input = torch.randn(num_tokens, hidden, generator=generator)
            for ahead in range(1, min(3, num_layers - layer) + 1):
                predicted = predictor.predict(layer + ahead - 1, router_input, ahead)
                experts = [expert for expert, _ in predicted]
                assert len(set(experts)) == len(experts)
                assert all(isinstance(expert, int) and 0 <= expert < num_experts for expert in experts)
                chances = [probability for _, probability in predicted]
                assert all(0 <= probability <= 1 for probability in chances)
                assert not predictor.gives_probabilities or chances == sorted(chances, reverse=True)
                assert predictor.predict(layer + ahead - 1, router_input, ahead) == predicted, "asking twice changes nothing"
            predictor.observe(layer, [3, 1])
