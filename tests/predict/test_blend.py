from __future__ import annotations

import numpy as np

from fate_moe.predict.blend import STUDY_EVERY, Blend


def test_sources_count_what_they_add() -> None:
    """The first says the truth with noise, the second the same truth with as much of its own, the third nothing."""
    generator = np.random.default_rng(0)
    blend = Blend(2, [1.0, 0.2, 0.3])
    for _ in range(400):
        truth = generator.standard_normal(40).astype(np.float32)
        said = [truth + generator.standard_normal(40).astype(np.float32) for _ in range(2)]
        said.append(generator.standard_normal(40).astype(np.float32))
        blend.learn(1, said, np.argsort(-truth)[:4].tolist())
    first, second, third = blend.weights[1].tolist()
    assert first == 1
    assert 0.9 < second < 1.1
    assert third < 0.05
    assert np.allclose(blend.weights[0], [1, 0.2, 0.3]), "nothing was learned of the other place"


def test_layers_take_turns() -> None:
    blend = Blend(3, [1.0, 1.0])
    studied = [[blend.studies(which) for which in range(3)] for _ in range(2 * STUDY_EVERY)]
    assert [sum(column) for column in zip(*studied, strict=True)] == [2, 2, 2]
    assert max(map(sum, studied)) == 1
