"""The recipe on a CPU: it learns, continues where it stopped, and writes what transformers reads."""

import json
import lzma
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

import reference_model as rm
import reference_text as rt
import train_reference as tr

pytestmark = pytest.mark.slow

SENTENCE = "the cat sat on a mat and saw the dog run over the green hill to find the old red barn"
WORDS = SENTENCE.split()


def story(seed: int, length: int) -> str:
    """Text with something to learn: each word is followed by one of three."""
    random = torch.Generator().manual_seed(seed)
    at, words = 0, []
    for step in torch.randint(1, 4, (length,), generator=random).tolist():
        at = (at + step) % len(WORDS)
        words.append(WORDS[at])
    return " ".join(words)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TEXT with two training files, one of them cut inside a document, a held-out file, and a small tokenizer."""
    folder = tmp_path_factory.mktemp("world")
    books = "<|endoftext|>\n".join(story(seed, 3000) for seed in range(3)).encode()
    pieces = {"train-books.part0.xz": books[:9000], "train-books.part1.xz": books[9000:]}
    pieces["train-wiki.txt.xz"] = story(7, 500).encode()
    for name, data in pieces.items():
        (folder / name).write_bytes(lzma.compress(data))
    (folder / "heldout-books.txt").write_text(story(100, 900))

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[rt.END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([story(0, 2000)], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (folder / "generation_config.json").write_text('{"bos_token_id": 0}')
    return folder


def run(world: Path, out: Path, *more: str) -> dict[str, Any]:
    fixed = ["--text", str(world), "--tokenizer", str(world), "--out", str(out), "--tiny", "--vocab", "320"]
    return tr.main([*fixed, *more])


@pytest.fixture(scope="module")
def trained(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("trained")
    return out, run(world, out)


def test_it_learns_and_reports(trained: tuple[Path, dict[str, Any]]) -> None:
    out, result = trained
    assert result["steps"] == 60
    assert result["tokens_seen"] == 60 * 4 * 64
    assert result["heldout_loss"]["heldout-books"] < 4.0  # ln 320 = 5.8 before; words alone would give about 2
    assert result["dead_experts"] == 0
    assert len(result["load_max"]) == len(result["load_min"]) == 2
    assert json.loads((out / "training.json").read_text())["heldout_loss"] == result["heldout_loss"]


def test_transformers_loads_it_with_the_same_loss(world: Path, trained: tuple[Path, dict[str, Any]]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, result = trained
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = rt.heldout_tokens(world, world / "tokenizer.json")["heldout-books"].long()
    assert AutoTokenizer.from_pretrained(out).decode(ids[1:20]) in (world / "heldout-books.txt").read_text()
    count = (len(ids) - 1) // 64
    with torch.no_grad():
        logits = model(ids[: count * 64].view(count, 64)).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[1 : count * 64 + 1])
    assert loss.item() == pytest.approx(result["heldout_loss"]["heldout-books"], abs=5e-3)  # weights are saved as bf16

    # The same weights, unrounded on one side and rounded on the other, would hide a small mistake: round both.
    ours = rm.ReferenceMoe(model_shape())
    ours.load_state_dict(torch.load(out / "state.pt", weights_only=True)["model"])
    ours = ours.bfloat16().float()
    with torch.no_grad():
        exact, _, _ = ours(ids[: count * 64].view(count, 64), ids[1 : count * 64 + 1].view(count, 64))
    assert loss.item() == pytest.approx(exact.item(), abs=2e-6)


def model_shape() -> rm.Shape:
    return rm.Shape(**{**vars(tr.TINY_SHAPE), "vocab": 320})


def test_a_stopped_run_continues_exactly(
    world: Path, trained: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    while run(world, tmp_path, "--stop-after", "0.3", "--every", "0.1")["steps"] < 60:
        pass
    whole = torch.load(trained[0] / "state.pt", weights_only=True)["model"]
    pieces = torch.load(tmp_path / "state.pt", weights_only=True)["model"]
    for name, value in whole.items():
        torch.testing.assert_close(pieces[name], value, rtol=0, atol=1e-6)
    printed = capsys.readouterr().out
    assert printed.count("starts anew") == 1  # a lost state must not look like a continued run
    assert "continues from step" in printed


def test_an_epoch_sees_every_window_once() -> None:
    tokens = torch.arange(1000, dtype=torch.int32)
    recipe = tr.Recipe(batch=3, sequence=10)
    stream = tr.batches(tokens, recipe, 0)
    first = [next(stream) for _ in range(32)]
    starts = [int(s) for batch in first for s in batch[:, 0]]
    assert len(set(starts)) == 96
    assert len({s % 10 for s in starts}) == 1
    assert all(torch.equal(row, torch.arange(row[0], row[0] + 11)) for batch in first for row in batch)
    later = tr.batches(tokens, recipe, 40)
    for _ in range(8):
        next(stream)
    assert torch.equal(next(stream), next(later))


def test_orthogonalize_makes_singular_values_nearly_equal() -> None:
    for size in ((3, 64, 192), (3, 192, 64)):
        values = torch.linalg.svdvals(tr.orthogonalize(torch.randn(size)))
        assert values.min() > 0.6
        assert values.max() < 1.3


def test_the_rate_warms_up_holds_and_falls_to_nothing() -> None:
    recipe = tr.Recipe(warmup_steps=10, decay=0.5, learning_rate=1.0)
    assert tr.rate_at(recipe, 0, 0.0) == pytest.approx(0.1)
    assert tr.rate_at(recipe, 99, 0.5) == 1.0
    assert tr.rate_at(recipe, 99, 0.75) == pytest.approx(0.5)
    assert tr.rate_at(recipe, 99, 1.0) == 0.0


def test_shards_stay_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rm, "SHARD_BYTES", 200_000)
    model = rm.ReferenceMoe(model_shape())
    rm.save_checkpoint(model, tmp_path)
    shards = list(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert all(shard.stat().st_size < 210_000 for shard in shards)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(index["weight_map"]) == len(rm.published(model))
