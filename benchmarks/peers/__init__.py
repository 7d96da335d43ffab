"""Other engines, behind one interface.

A peer runs in its own virtual environment and process. Its *worker* script imports nothing of this project. It gets one job as
JSON on standard input and writes one JSON object per line on standard output, flushed at once, so that the measurements of a
killed process are not lost:

    {"event": "loaded", "seconds": s}                                    weights are loaded or mapped
    {"event": "first", "sample": i, "prompt_tokens": n, "seconds": s}    from the call to the first new token(s)
    {"event": "tokens", "sample": i, "count": k, "seconds": s}           k tokens after the first, s seconds after it; cumulative
    {"event": "counters", "sample": i, "counters": {...}}                at the end of a sample; counted from the start
    {"event": "done", "versions": {...}}
    {"event": "failed", "message": "..."}                                then a non-zero exit

An engine without counters omits "counters"; one that has them sends them with "first" and "tokens" too.

The job:

- ``model``: a path.
- ``workload``: "decode" (each sample is a separate prompt with an empty KV cache), "prefill" (the same with one new token) or
  "chat" (each sample is a turn, appended to the KV cache).
- ``samples``: a list of samples, each a list of ``batch`` prompts, each a list of token ids, all of one length.
- ``new_tokens``: per prompt, greedy; an end token does not stop it.
- ``context_tokens``: the KV cache that a prompt of the batch needs.
- ``threads``; ``limit_bytes`` or null; ``settings`` of the peer; ``scratch``, a folder that it may write to.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

__all__ = ["Peer", "Variant"]


@dataclass(frozen=True)
class Variant:
    """One configuration of a peer: its name in the results, and its settings."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)


class Peer(Protocol):
    """Call install, prepare, then run the worker. All three may be repeated; existing files are used."""

    name: str
    worker: Path
    """The script, run as ``python worker`` by the interpreter that ``install`` returned."""

    def install(self, home: Path) -> Path:
        """Make the virtual environment under ``home``; returns its interpreter. Raises RuntimeError if that fails."""
        ...

    def prepare(self, checkpoint: Path, home: Path) -> Path:
        """Convert a Hugging Face checkpoint into the peer's format, INT4, under ``home``; returns the path for ``job["model"]``."""
        ...

    def variants(self, model: Path, limit_bytes: int | None) -> list[Variant]:
        """The settings that the peer's documentation offers for this limit. All are run and recorded; the fastest is shown."""
        ...
