"""Every family that the installed transformers runs through its experts interface, found by looking.

``python -m tests.adapter.test_families`` tries them all and writes families.json and docs/results/models.md.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import pytest
import transformers

from fate_moe.adapter.families import moe_families
from fate_moe.adapter.table import FAMILIES_FILE, Family, tried_families, tried_in, tried_with
from fate_moe.checkpoints.gguf_config import ARCHITECTURES
from tests.support.examine import RECIPE, BrokenRuleError, examine

DOCS = Path(__file__).parents[2] / "docs" / "results" / "models.md"
GGUF = [
    "",
    "## GGUF files",
    "",
    "Besides folders of safetensors, GGUF files of these architectures are read, in one file or split, in every type that the",
    "`gguf` package dequantizes (Q4_0 to Q8_0, Q2_K to Q6_K, IQ1 to IQ4, MXFP4, F16, BF16, F32); experts become bf16, or what",
    "`--precision` says. [GGUF](../reference/gguf.md) says what of a file is read and what is refused. The tokenizer is the file's",
    "own where transformers reads it, else the files beside it.",
    "",
    "| llama.cpp's architecture | family |",
    "| --- | --- |",
    *(f"| {architecture} | {', '.join(families)} |" for architecture, families in ARCHITECTURES.items()),
    "",
    "Not read: gemma4 (its routers' scales have no names in `gguf`'s maps). Not tried: bailingmoe2, qwen3next, jamba, lfm2moe,",
    "granitehybrid, nemotron_h_moe, phimoe, hunyuan-moe, the vision parts of others. Use their safetensors. MXFP4, Q4_1, Q5_0 and",
    "IQ1_M are left to the package without a test here.",
]
AGAIN = "run `python -m tests.adapter.test_families` and look at what changed"
TABLED = {row.family: row for row in tried_families()} if FAMILIES_FILE.exists() else {}
SAME_VERSION = bool(TABLED) and tried_with() == transformers.__version__


@pytest.mark.slow
@pytest.mark.parametrize("family", moe_families())
def test_family(family: str, tmp_path: Path) -> None:
    """With the version of the table every row is as it says; with any other, what the table calls ok or does not know is ok.

    Only that version has to accept the tiny configurations: in others a family's own configuration may mean something else.
    """
    row = row_of(family, tmp_path)
    tabled = TABLED.get(family)
    if SAME_VERSION:
        assert row == tabled, f"{family} is not what the table says; {AGAIN}"
    elif row.status.startswith(RECIPE):
        pytest.skip(row.status)
    elif tabled is None or tabled.status == "ok":
        assert row.status == "ok", f"transformers {transformers.__version__}: {family} breaks a rule: {row.status}"


@pytest.mark.skipif(not SAME_VERSION, reason="the table is of another transformers")
def test_the_table_has_every_family() -> None:
    assert sorted(TABLED) == moe_families(), AGAIN


def test_nearly_all_families_run() -> None:
    assert sum(row.status == "ok" for row in TABLED.values()) >= 0.95 * len(TABLED) > 50


def test_docs_say_what_was_found() -> None:
    assert DOCS.read_text() == page(list(TABLED.values()), tried_with(), tried_in()), AGAIN


def row_of(family: str, folder: Path) -> Family:
    try:
        return examine(family, folder)
    except BrokenRuleError as error:
        return Family(family, "", str(error).replace(str(folder), "..."))


def page(rows: list[Family], version: str, seconds: float) -> str:
    good = sum(row.status == "ok" for row in rows)
    lines = [
        "# Models",
        "",
        f"Every model type of transformers {version} that writes text and whose experts use transformers' experts interface: "
        f"{good} of {len(rows)} run ({good / len(rows):.1%}).",
        f"This page is written by `python -m tests.adapter.test_families` (which took {seconds:.0f} s, one after the other);",
        "a test compares it with what the installed transformers does, and `fate models` prints it.",
        "",
        "A family runs if a tiny random checkpoint of it, saved by transformers under its real names and converted, gives with one",
        "layer's top-k experts resident the logits of transformers' own forward (fp32, 1e-5), and the same to the bit with all",
        "experts resident. Of models that also see or hear, the text is tried.",
        "",
        "*Look-ahead*: MoE blocks whose router, asked before the block runs, names exactly the experts that the block then uses.",
        "Where it cannot be asked (it wants the token ids, or what the router before it passed on), experts are read when needed.",
        "*Layers*: whether the CPU's kernels run whole layers (norms, attention, routers, experts), so that a token's logits do",
        "not depend on the batch or on how a prompt is cut, or the MoE block only, with transformers' own code around it;",
        "`fate models` says why, and `fate doctor MODEL` what a model's precision changes. *Prefixes reused*: servers and chats",
        "read a text from where it differs from earlier ones, where the large matrices are quantized.",
        "",
        "| family | class | status | look-ahead | layers | names of a layer's experts in the checkpoint |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        keys = ", ".join(f"`{key}`" for key in row.keys)
        layers = row.in_short().partition(":")[0]
        lines.append(f"| {row.family} | {row.model} | {row.status} | {row.look_ahead} | {layers} | {keys} |")
    return "\n".join([*lines, *GGUF]) + "\n"


def write_table() -> None:
    rows, began = [], time.perf_counter()
    for family in moe_families():
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row_of(family, Path(folder)))
        print(rows[-1].family, rows[-1].status, flush=True)
    seconds = round(time.perf_counter() - began, 1)
    table = {"transformers": transformers.__version__, "seconds": seconds, "families": [row.as_dict() for row in rows]}
    FAMILIES_FILE.write_text(json.dumps(table, indent=1) + "\n")
    DOCS.write_text(page(rows, transformers.__version__, seconds))


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    write_table()
