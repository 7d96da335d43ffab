"""The result file: one JSON document for each model and processor, rewritten after every cell, so that a run can be continued.

A run is of one machine and one state of the code: what was measured on another processor or with other code is never in one table.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash
from transformers import AutoConfig

from benchmarks.measure import Cell
from fate_moe.adapter.meta_model import build_meta_model, expert_stacks

__all__ = ["ModelFacts", "Results", "code_state", "model_facts"]

_PROJECT = Path(__file__).parents[1]

INT4_BITS = 4.5  # Q4_0's 32 codes and one fp16 scale; ours is 4 + 32 / 64 = 4.5 too


@dataclass(frozen=True)
class ModelFacts:
    """Sizes are bytes of INT4 (4.5 bits a weight) unless named otherwise."""

    name: str
    family: str
    parameters: int
    num_layers: int
    num_experts: int
    top_k: int
    model_bytes: int
    expert_bytes: int
    active_bytes: int
    """What a decode step of one token must read: everything except the embedding and the experts that were not chosen."""


def model_facts(checkpoint: Path) -> ModelFacts:
    """The facts of a model, from config.json alone."""
    model = build_meta_model(checkpoint)
    stacks = expert_stacks(model)
    config = AutoConfig.from_pretrained(checkpoint).get_text_config()
    top_k = getattr(config, "num_experts_per_tok", None) or config.top_k
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    sizes = {name: value.numel() for name, value in model.state_dict().items() if name not in tied}
    total = sum(sizes.values())
    routed = sum(size for name, size in sizes.items() if any(name.startswith(stack.name + ".") for stack in stacks))
    embedding = 0 if config.tie_word_embeddings else model.get_input_embeddings().weight.numel()
    num_experts = sum(stack.num_experts for stack in stacks)
    active = total - routed - embedding + routed // num_experts * top_k * len(stacks)

    def int4(parameters: int) -> int:
        return int(parameters * INT4_BITS / 8)

    return ModelFacts(
        name=checkpoint.name,
        family=config.model_type,
        parameters=total,
        num_layers=len(stacks),
        num_experts=stacks[0].num_experts,
        top_k=top_k,
        model_bytes=int4(total),
        expert_bytes=int4(routed // num_experts),
        active_bytes=int4(active),
    )


def code_state() -> str:
    """A hash of what is measured: the package's sources and this benchmark's."""
    state = xxhash.xxh3_64()
    for folder in ("src/fate_moe", "benchmarks"):
        for file in sorted((_PROJECT / folder).rglob("*")):
            if file.suffix in (".py", ".cpp", ".h", ".inc"):
                state.update(file.relative_to(_PROJECT).as_posix().encode() + b"\0" + file.read_bytes())
    return state.hexdigest()


@dataclass
class Results:
    """The data of all tables and pictures; ``code`` as from ``code_state`` ("" in files from before it was recorded)."""

    model: ModelFacts
    machine: dict[str, Any]
    cells: list[Cell] = field(default_factory=list)
    code: str = ""

    def refuse_others(self, model: ModelFacts, processor: dict[str, Any], code: str) -> None:
        """Raise ValueError if cells of ``model``, measured on ``processor`` with ``code``, do not belong into this file."""
        if model != self.model:
            raise ValueError(f"these are results of {self.model.name}, not of {model.name}; give another file")
        if (here := {key: self.machine.get(key) for key in processor}) != processor:
            raise ValueError(f"these are results of another processor ({here['processor']}); give another file")
        if code != self.code:
            raise ValueError("these are results of another state of the code; remove the file, or give another one")

    def has(self, key: tuple[str, str, str, int | None], number: int) -> bool:
        return any((cell.key, cell.round) == (key, number) for cell in self.cells)

    def add(self, cell: Cell) -> None:
        self.cells = [other for other in self.cells if (other.key, other.round) != (cell.key, cell.round)] + [cell]

    def joined(self) -> list[Cell]:
        """One cell of all rounds, for each that was measured."""
        rounds: dict[tuple[str, str, str, int | None], list[Cell]] = {}
        for cell in self.cells:
            rounds.setdefault(cell.key, []).append(cell)
        return [Cell.joined(of_key) for of_key in rounds.values()]

    def best(self, peer: str, workload: str, limit_bytes: int | None) -> Cell | None:
        """The peer's fastest variant; one that was killed or failed only if no other exists."""
        cells = [cell for cell in self.joined() if (cell.peer, cell.workload, cell.limit_bytes) == (peer, workload, limit_bytes)]
        return max(cells, key=lambda cell: (cell.outcome in ("ok", "slow"), cell.rate() or 0.0), default=None)

    def peers(self) -> list[str]:
        return list(dict.fromkeys(cell.peer for cell in self.cells))

    def workloads(self) -> list[str]:
        return list(dict.fromkeys(cell.workload for cell in self.cells))

    def limits(self) -> list[int | None]:
        """No limit first, then descending."""
        return sorted({cell.limit_bytes for cell in self.cells}, key=lambda limit: -(limit or 1 << 62))

    def save(self, path: Path) -> None:
        cells = [cell.as_dict() for cell in self.cells]
        document = {"model": asdict(self.model), "machine": self.machine, "code": self.code, "cells": cells}
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(document, indent=1) + "\n")
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Results:
        document = json.loads(path.read_text())
        cells = [Cell.from_dict(cell) for cell in document["cells"]]
        return cls(ModelFacts(**document["model"]), document["machine"], cells, document.get("code", ""))
