"""Time to first token in a conversation of ten turns behind a long prefix, as coding agents have it: with prefixes kept or not.

    python -m benchmarks.conversation [--model MODEL] [--tokens 2048] [--text FILE] [--precision int4] [--turns 10]

Three runs: nothing kept; kept in RAM and on the disk; and the model loaded anew for the last turn, with what the disk has. The
prefix and the questions are this repository's documentation, or FILE. All runs have to write the same tokens. The last line is one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fate_moe.adapter.config_rules import longest_context
from fate_moe.config import OffloadConfig
from fate_moe.engine.load import build
from fate_moe.engine.prepare import load_tokenizer, prepare, store_for
from fate_moe.switches import cache_home
from fate_moe.tools.answering import Answer, Answering
from fate_moe.tools.tokens import token_ids

__all__ = ["Talk", "talk"]

_ASKED, _ANSWERED = 24, 8  # tokens of a question and of an answer


class Talk:
    """A conversation with a model that is loaded for it: ``ids`` are all tokens so far."""

    def __init__(self, store: Path, ids: Sequence[int], **options: Any) -> None:
        prepared = prepare(store)
        config = OffloadConfig(**options)
        self.model = build(prepared, prepared.plan(config), config)
        self.answering = Answering(self.model, load_tokenizer(store), {"do_sample": False})
        self.ids = list(ids)

    def turn(self, asked: Sequence[int]) -> Answer:
        """Ask, and add the answer."""
        self.ids += asked
        answer = self.answering.answer(self.ids, _ANSWERED, lambda text: None)
        self.ids += answer.tokens
        return answer

    def close(self) -> None:
        self.answering.close()
        self.model.fate.close()


def talk(store: Path, text: Sequence[int], num_prefix: int, turns: int, **options: Any) -> dict[str, Any]:
    """The three runs; milliseconds to the first token of each turn."""
    prefix, left = text[:num_prefix], text[num_prefix:]
    asked = [left[turn * _ASKED : (turn + 1) * _ASKED] for turn in range(turns)]
    found: dict[str, Any] = {"prefix_tokens": num_prefix, "turns": turns}
    said = []
    for name, kept in (
        ("without", {"prefix_cache": "off"}),
        ("with", {"prefix_cache": "100%", "prefix_cache_disk": "4GiB"}),
    ):
        conversation = Talk(store, prefix, **options, **kept)
        answers = [conversation.turn(question) for question in asked]
        found[f"{name}_first_ms"] = [round(1000 * answer.first_seconds, 1) for answer in answers]
        found[f"{name}_cached_tokens"] = [answer.cached_tokens for answer in answers]
        said.append(conversation.ids)
        conversation.close()
    before = said[1][: -(len(asked[-1]) + len(answers[-1].tokens))]
    began = time.perf_counter()
    conversation = Talk(store, before, **options, **kept)
    found["restart_load_ms"] = round(1000 * (time.perf_counter() - began), 1)
    last = conversation.turn(asked[-1])
    said.append(conversation.ids)
    found |= {"restart_first_ms": round(1000 * last.first_seconds, 1), "restart_cached_tokens": last.cached_tokens}
    found["disk_bytes"] = conversation.model.fate.report().prefixes.disk_read_bytes
    conversation.close()
    if said[0] != said[1] or said[0] != said[2]:
        raise RuntimeError("the texts differ")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conversation", description=__doc__)
    parser.add_argument("--model", help="default: the embedded model")
    parser.add_argument("--tokens", type=int, help="of context; default: the model's longest, 32768 at most")
    parser.add_argument("--text", type=Path, help="default: this repository's documentation")
    parser.add_argument("--precision", default="int4")
    parser.add_argument("--turns", type=int, default=10)
    options = parser.parse_args()
    store = store_for(options.model, options.precision)
    model = prepare(store).model
    context = min(options.tokens or 32768, longest_context(model.config) or 32768)
    files = [options.text] if options.text else sorted((Path(__file__).parents[1] / "docs").rglob("*.md"))
    text = token_ids(load_tokenizer(store), "\n".join(file.read_text() for file in files), model.config.vocab_size)
    num_prefix = context - options.turns * (_ASKED + _ANSWERED) - 64
    home = cache_home()
    with tempfile.TemporaryDirectory() as folder:  # nothing of earlier runs on the disk
        (Path(folder) / "stores").symlink_to(home / "stores")
        os.environ["FATE_HOME"] = folder
        found = talk(store, text, num_prefix, options.turns, context_length=context)
    for turn, (without, kept, cached) in enumerate(
        zip(found["without_first_ms"], found["with_first_ms"], found["with_cached_tokens"], strict=True), 1
    ):
        print(f"turn {turn:2}: first token after {without:9.1f} ms, with prefixes kept {kept:9.1f} ms ({cached} tokens cached)")
    print(f"after a restart, from the disk: {found['restart_first_ms']} ms ({found['restart_cached_tokens']} tokens cached)")
    found["speedup"] = round(statistics.median(found["without_first_ms"][1:]) / statistics.median(found["with_first_ms"][1:]), 1)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
