"""What keys and values depend on besides a text's tokens: equal in two processes only where their bits are."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

import torch
import transformers
import xxhash

from fate_moe.config import OffloadConfig
from fate_moe.io.bounded import read_bounded
from fate_moe.kernels.native import native

__all__ = ["kv_fingerprint"]

# The version of the arithmetic outside the extension: raise it when Python code changes the bits of keys and values.
ARITHMETIC = 1
_MOST_BYTES = 1 << 30


def kv_fingerprint(store: Path, config: OffloadConfig) -> bytes | None:
    """A digest of 16 bytes of the model in ``store`` and of the arithmetic; None where keys and values are no function of these.

    ``fate.json`` has the checksums of all weights, ``config.json`` says how they are run. The extension's own bytes stand for its
    arithmetic; torch, transformers and the processor decide the bits of rotary angles. A precision policy that reads fewer bits
    makes keys depend on what was in memory. Adapters are not known here: a model that has some does not run whole in the extension.
    Raises OSError where the files are gone.
    """
    if native is None or config.precision_policy != "full":
        return None
    extension = xxhash.xxh3_128_hexdigest(read_bounded(Path(native.__file__), _MOST_BYTES))
    machine = f"{torch.__version__} {transformers.__version__} {torch.backends.cpu.get_cpu_capability()}"
    digest = blake2b(f"{ARITHMETIC} {extension} {machine} {config.exact_activations}".encode(), digest_size=16)
    for name in ("fate.json", "config.json"):
        data = read_bounded(store / name, _MOST_BYTES)
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()
