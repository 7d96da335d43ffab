"""All areas, in the order of the table."""

from __future__ import annotations

from tests.torture import files
from tests.torture.case import Area

__all__ = ["AREAS"]

AREAS = {
    area.name: area
    for area in (
        Area("store", "a file of a store is damaged, then all experts are read and text is written", files.damaged_store, 6, 120),
        Area("learned", "learned state beside a store is damaged, then text is written", files.damaged_learned, 2, 40),
        Area("home", "the list of stores, a journal or digests are damaged, then stores are listed, converted, removed", files.damaged_home, 1, 30),
        Area("checkpoint", "a safetensors checkpoint is damaged, then converted", files.damaged_checkpoint, 2, 50),
        Area("gguf", "a GGUF file is damaged, then converted", files.damaged_gguf, 2, 50),
        Area("trace", "a routing trace is damaged, then simulated", files.damaged_trace, 1, 50),
    )
}
