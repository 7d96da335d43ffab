"""The reference model's text as token ids: documents read from files, tokenized once on all cores."""

import lzma
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

END = "<|endoftext|>"  # id 0; it begins every document, as in generation


def documents(text: str) -> list[str]:
    return [document for piece in text.split(END) if (document := piece.strip("\n"))]


def encode(tokenizer_file: Path, document: str) -> np.ndarray:
    tokenizer = _loaded(str(tokenizer_file))
    return np.asarray([0, *tokenizer.encode(document).ids], dtype=np.uint16)


_tokenizers: dict[str, Tokenizer] = {}


def _loaded(tokenizer_file: str) -> Tokenizer:
    """One tokenizer per process, because loading it takes longer than encoding a short document."""
    if tokenizer_file not in _tokenizers:
        _tokenizers[tokenizer_file] = Tokenizer.from_file(tokenizer_file)
    return _tokenizers[tokenizer_file]


def training_tokens(folder: Path, tokenizer_file: Path, cached: Path) -> Tensor:
    """All `train-*.xz` as one int32 vector, cached in the file `cached`. Repeated documents are used once."""
    if not cached.exists():
        files = sorted(folder.glob("train-*.xz"))
        if not files:
            raise FileNotFoundError(f"no train-*.xz in {folder}")
        with ProcessPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
            # The books are one text split into files: a document, even a character, may cross a file boundary.
            texts: dict[str, bytes] = {}
            for file, text in zip(files, pool.map(_unpack, files), strict=True):
                domain = file.name.split(".")[0]
                texts[domain] = texts.get(domain, b"") + text
            unique = list(dict.fromkeys(d for text in texts.values() for d in documents(text.decode("utf-8"))))
            unique.sort(key=len, reverse=True)  # longest first, for an even load of the cores; the order is shuffled later
            pieces = list(pool.map(partial(encode, tokenizer_file), unique, chunksize=4))
        np.save(cached, np.concatenate(pieces))
    return torch.from_numpy(np.load(cached).astype(np.int32))


def heldout_tokens(folder: Path, tokenizer_file: Path) -> dict[str, Tensor]:
    """Each `heldout-*.txt` as an int32 vector, by file stem."""
    return {
        file.stem: torch.from_numpy(
            np.concatenate([encode(tokenizer_file, d) for d in documents(file.read_text("utf-8"))]).astype(np.int32)
        )
        for file in sorted(folder.glob("heldout-*.txt"))
    }


def _unpack(file: Path) -> bytes:
    with lzma.open(file) as text:
        return text.read()
