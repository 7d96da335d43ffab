"""Damaged files: stores, what is learned beside them, checkpoints, GGUF, traces. The right text or one clear error."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

from fate_moe.core import ExpertId
from fate_moe.engine.prepare import prepare
from fate_moe.io.digests import KnownDigests
from fate_moe.memory.slots import SlotArena
from fate_moe.store.convert import convert
from fate_moe.store.home import identity_of, remove_store, stored_models
from fate_moe.store.learned import load_view_losses
from fate_moe.store.open import verify
from fate_moe.store.reader import DiskSource
from fate_moe.trace.recorded import recorded_run
from fate_moe.trace.schema import read_trace
from fate_moe.trace.simulate import Link, simulate
from tests.torture.case import Case, WrongError, refusal
from tests.torture.damage import damage
from tests.torture.material import text_of

__all__ = ["damaged_checkpoint", "damaged_gguf", "damaged_home", "damaged_learned", "damaged_store", "damaged_trace", "read_all"]

_LEARNED = ("gates.safetensors", "routing.npz", "views.json", "last-used")


def _store(case: Case, names: tuple[str, ...] | None = None) -> tuple[str, Path, Path]:
    """The name of a store, a copy of it in the case's folder, and one of its files (of ``names``)."""
    name = case.dice.choice(case.material.facts["stores"])
    store = Path(shutil.copytree(case.material.home / "stores" / name, case.work / "store"))
    files = sorted(path.name for path in store.iterdir() if (path.name in names if names else path.name not in _LEARNED))
    weights = [6 if file == "fate.json" else 1 for file in files]
    return name, store, store / case.dice.choices(files, weights)[0]


def _outside(case: Case, path: Path, name: str) -> Path:
    return case.material.home.with_name("outside") / "stores" / name / path.name


def _config_of(path: Path) -> Any:
    """What the JSON file says; None where it is not JSON or not there."""
    try:
        return json.loads(path.read_bytes()) if path.is_file() else None
    except (ValueError, RecursionError, OSError):
        return None


def damaged_store(case: Case) -> str:
    """One file of a store is damaged: no text but the right one comes out, in full reads and in a run."""
    name, store, path = _store(case)
    before = _config_of(path)
    case.kind = f"{_short(path)}: {damage(path, case.dice, _outside(case, path, name))}"
    text: list[list[int]] = []
    refused = refusal(lambda: read_all(store, case.material.home / "stores" / name))
    ran = refusal(lambda: text.append(text_of(store)))
    if text and text[0] != case.material.facts["text"][name]:
        if path.name not in ("config.json", "generation_config.json") or _config_of(path) == before:
            raise WrongError(f"{case.kind}: wrote {text[0]} instead of {case.material.facts['text'][name]} ({refused})")
        return "another input"  # these two are the user's to edit; nothing says what they were
    if (case.work / "made-by-a-link").exists():
        raise WrongError(f"{case.kind}: a file was made through a link")
    return "refused" if ran or refused else "right"


def read_all(store: Path, whole: Path) -> None:
    """Every expert through the reader that a run has: its bytes are those of ``whole``. And verify agrees that all is well."""
    prepared, good = prepare(store), prepare(whole)
    arena = SlotArena((2, max(prepared.store.manifest.slot_bytes, good.store.manifest.slot_bytes)))
    try:
        with closing(DiskSource(prepared.store)) as source, closing(DiskSource(good.store)) as right:
            for layer, entry in enumerate(prepared.store.manifest.layers):
                for number in range(len(entry.experts)):
                    expert = ExpertId(layer, number)
                    source.read(expert, arena.view(0))
                    right.read(expert, arena.view(1))
                    for section in good.store.manifest.layout_of(expert).sections:
                        end = section.offset + section.length
                        if arena.view(0)[section.offset : end] != arena.view(1)[section.offset : end]:
                            raise WrongError(f"{expert}: section {section.name} has other bytes and no error")
    finally:
        arena.close()
    verify(prepared.store, progress=False)


def damaged_learned(case: Case) -> str:
    """What was learned is damaged: it is ignored, and the text is the right one. A run must still be possible."""
    name, store, path = _store(case, _LEARNED)
    case.kind = f"{path.name}: {damage(path, case.dice, _outside(case, path, name))}"
    options: dict[str, Any] = {"predictor": case.dice.choice(("learned", "combined", "none")), "policy": "decayed"}
    text: list[list[int]] = []
    refused = refusal(lambda: text.append(text_of(store, **options)))
    if text and text[0] != case.material.facts["text"][name]:
        raise WrongError(f"{case.kind}, {options}: wrote {text[0]}")
    if refused and not case.kind.endswith(("device", "pipe", "folder", "loop", "dangling")):
        raise WrongError(f"{case.kind}, {options}: what is optional stopped the model: {refused}")
    if (case.work / "made-by-a-link").exists():
        raise WrongError(f"{case.kind}: a file was made through a link")
    left = [file.name for file in store.iterdir() if file.name.endswith((".tmp", ".part"))]
    if left:
        raise WrongError(f"{case.kind}: {left} are left")
    refusal(lambda: load_view_losses(store))
    return "refused" if refused else "right"


def damaged_home(case: Case) -> str:
    """Files of $FATE_HOME, which every command reads: the list of stores, digests, a journal. Commands go on, or say one line."""
    home = case.work / "home"
    store = Path(shutil.copytree(case.material.home / "plain" / "mixtral-int4", home / "stores" / "mixtral-int4-12345678"))
    partial = home / "stores" / "other.partial"
    partial.mkdir()
    (partial / "journal.json").write_text('{"identity": "x", "files": {"dense.safetensors": {"bytes": 3, "result": "0"}}}')
    shutil.copy(case.material.home / "fate-home" / "digests.json", home / "digests.json")
    path = case.dice.choice((store / "fate.json", partial / "journal.json", home / "digests.json"))
    outside = case.material.home.with_name("outside") / "plain" / "mixtral-int4" / "fate.json"
    case.kind = f"{path.name}: {damage(path, case.dice, outside)}"
    os.environ["FATE_HOME"] = str(home)
    KnownDigests(home / "digests.json").save()
    identity_of(store)
    models = stored_models()
    if not models:
        raise WrongError(f"{case.kind}: no store is listed")
    refused = refusal(lambda: convert(case.material.home / "checkpoints" / "mixtral", home / "stores" / "other", "int4"))
    for model in models:
        refusal(lambda model=model: remove_store(Path(model.path)))  # type: ignore[misc]
    return "refused" if refused else "right"


def damaged_checkpoint(case: Case) -> str:
    """A folder of safetensors: refused, or converted to a store that opens and verifies."""
    family = case.dice.choice(("mixtral", "gpt_oss", "qwen2_moe"))
    folder = Path(shutil.copytree(case.material.home / "checkpoints" / family, case.work / "checkpoint"))
    path = case.dice.choice(sorted(folder.iterdir()))
    outside = case.material.home.with_name("outside") / "checkpoints" / family / path.name
    case.kind = f"{_short(path)}: {damage(path, case.dice, outside)}"
    return _converts(case, folder)


def damaged_gguf(case: Case) -> str:
    """A GGUF file: refused, or converted to a store that opens and verifies."""
    path = Path(shutil.copy(case.material.home / "gguf" / "model.gguf", case.work / "model.gguf"))
    case.kind = damage(path, case.dice, case.material.home.with_name("outside") / "gguf" / "model.gguf")
    return _converts(case, path)


def _converts(case: Case, source: Path) -> str:
    precision = case.dice.choice(("lossless", "int4"))
    if refusal(lambda: convert(source, case.work / "store", precision)) is None:
        verify(prepare(case.work / "store").store, progress=False)
        return "right"
    if (case.work / "store").exists():
        raise WrongError(f"{case.kind}: refused, and yet there is a store")
    return "refused"


def damaged_trace(case: Case) -> str:
    """A routing trace: refused, or of a form that the simulator can replay."""
    path = Path(shutil.copy(case.material.home / "trace.npz", case.work / "trace.npz"))
    case.kind = damage(path, case.dice, case.material.home / "trace.npz")
    policy, predictor = case.dice.choice(("lru", "decayed", "belady")), case.dice.choice(("none", "cross-layer", "oracle"))

    def use() -> None:
        trace = read_trace(path)
        refusal(lambda: recorded_run(trace))
        link = Link(bytes_per_second=1e9, expert_bytes=4096, layer_seconds=1e-3, overlap_seconds=1e-4)
        refusal(lambda: simulate(trace.first(8), policy, predictor, 0.5, link))

    return "refused" if refusal(use) else "right"


def _short(path: Path) -> str:
    return "shard" if path.name.startswith("experts-") else "weights" if path.name.startswith("model-") else path.name
