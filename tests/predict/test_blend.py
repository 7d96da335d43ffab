from __future__ import annotations

import numpy as np

from fate_moe.predict.blend import LEARN_EVERY, Blend


def test_a_source_is_weighted_by_what_it_adds() -> None:
    """The first source is the truth with noise, the second the truth with independent noise of the same size, the third noise."""
    generator = np.random.default_rng(0)
    blend = Blend(2, [1.0, 0.2, 0.3])
    for _ in range(400):
        truth = generator.standard_normal(40).astype(np.float32)
        scores = [truth + generator.standard_normal(40).astype(np.float32) for _ in range(2)]
        scores.append(generator.standard_normal(40).astype(np.float32))
        blend.learn(1, scores, np.argsort(-truth)[:4].tolist())
    first, second, third = blend.weights[1].tolist()
    assert first == 1
    assert 0.9 < second < 1.1
    assert third < 0.05
    assert np.allclose(blend.weights[0], [1, 0.2, 0.3]), "the other set is unchanged"


def test_layers_take_turns() -> None:
    blend = Blend(3, [1.0, 1.0])
    due = [[blend.is_due(which) for which in range(3)] for _ in range(2 * LEARN_EVERY)]
    assert [sum(column) for column in zip(*due, strict=True)] == [2, 2, 2]
    assert max(map(sum, due)) == 1
