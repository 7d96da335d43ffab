"""The GPU's page of results is what its JSON says."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.gpu_page import page

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def test_the_page_says_what_was_measured() -> None:
    facts = json.loads((RESULTS / "gpu.json").read_text())
    assert (RESULTS / "gpu.md").read_text() == page(facts)
    model = next(iter(facts["models"].values()))
    model["cells"]["0.45 best"]["tokens_per_second"] = 1234.0
    assert "| 1234 |" in page(facts)


def test_what_was_not_measured_is_an_empty_cell() -> None:
    cells = {"1.00 best": {"tokens_per_second": 200.0}, "0.45 best": {}, "0.45 eap": {"tokens_per_second": 12.34}}
    facts = {"device": "D", "torch": "1", "triton": "2", "transformers": "3", "models": {"M": {"cells": cells}}}
    assert "| method | 100 % | 45 % |\n| --- | --- | --- |\n| best | 200 |  |\n| eap |  | 12.3 |\n" in page(facts)
