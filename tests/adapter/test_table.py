"""What ``fate models`` says beyond the table."""

from __future__ import annotations

import json

import pytest

from fate_moe.adapter.families import moe_families
from fate_moe.adapter.table import known_families, tried_families, tried_with
from fate_moe.cli import main


def test_a_family_that_nobody_tried_is_not_called_ok() -> None:
    rows = {row.family: row for row in known_families(["mixtral", "of_tomorrow"])}
    assert rows["mixtral"].status == "ok"
    assert rows["of_tomorrow"].status == f"not tried yet (the table is of transformers {tried_with()})"
    assert set(rows) == {row.family for row in tried_families()} | {"of_tomorrow"}


def test_models_prints_every_family(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["families"]
    assert {row["family"] for row in rows} >= set(moe_families())
    assert next(row for row in rows if row["family"] == "qwen3_moe")["status"] == "ok"
    assert main(["models"]) == 0
    assert "qwen3_moe" in capsys.readouterr().out
