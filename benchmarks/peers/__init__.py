"""What a user could pick instead, each behind the same four verbs.

A peer runs in its own virtual environment and process: a *worker* script that imports nothing of this project, is given one job
as JSON on standard input and writes one JSON object a line on standard output, at once (flush), so that a killed process leaves
what it measured:

    {"event": "loaded", "seconds": s}                                    weights are there, or mapped
    {"event": "first", "sample": i, "prompt_tokens": n, "seconds": s}    from the call to the first new token(s)
    {"event": "tokens", "sample": i, "count": k, "seconds": s}           k tokens after the first, s seconds after it; cumulative
    {"event": "counters", "sample": i, "counters": {...}}                at the sample's end: what the engine counts, from the start
    {"event": "done", "versions": {...}}
    {"event": "failed", "message": "..."}                                then a non-zero exit

An engine that counts nothing leaves "counters" out; one that does gives them with "first" and "tokens" too.

The job: ``model`` path; ``workload`` "decode" (each sample is a prompt of its own, the KV cache emptied), "prefill" (the same,
with no new tokens after the first) or "chat" (each sample is a turn, appended to what the cache holds); ``samples`` a list of
samples, each a list of ``batch`` prompts, each a list of token ids, all of one length; ``new_tokens`` a prompt, greedy, an end
token does not end it; ``context_tokens`` of KV cache that a prompt of the batch needs; ``threads``; ``limit_bytes`` or null;
``settings`` of the peer; ``scratch``, a folder of its own for what it has to write.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

__all__ = ["Peer", "Variant"]


@dataclass(frozen=True)
class Variant:
    """One way to run a peer: what a row of the results is called and the settings that go with it."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)


class Peer(Protocol):
    """install -> prepare -> run the worker. All three may be repeated: what is there already is used."""

    name: str
    worker: Path
    """The script, run as ``python worker`` by the interpreter that ``install`` returned."""

    def install(self, home: Path) -> Path:
        """Make the virtual environment under ``home``; returns its interpreter. Raises RuntimeError if it cannot be had here."""
        ...

    def prepare(self, checkpoint: Path, home: Path) -> Path:
        """Bring a Hugging Face checkpoint into the peer's own form under ``home``, INT4; returns what ``job["model"]`` is."""
        ...

    def variants(self, model: Path, limit_bytes: int | None) -> list[Variant]:
        """The settings its documentation offers for this limit. All are run; the fastest counts, the others are recorded."""
        ...
