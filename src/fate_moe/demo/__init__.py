"""The embedded model: a small, trained Mixture-of-Experts checkpoint in block-scaled FP8 (see model/README.md).

CHAT names another one, which talks and is built on first use (tools.demo_chat).
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["CHAT", "MODEL", "PROMPT"]

CHAT = "demo-chat"
MODEL = Path(__file__).parent / "model"
PROMPT = "It was a dark night, and the old house"
