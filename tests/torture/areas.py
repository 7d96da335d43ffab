"""All areas, in the order of the table."""

from __future__ import annotations

from tests.torture import budgets, faults, files, kept, kills, races
from tests.torture.case import Area

__all__ = ["AREAS"]

_AREAS = (
    Area("store", "a file of a store is damaged, then all experts are read and text is written", files.damaged_store, 6, 45),
    Area("learned", "learned state beside a store is damaged, then text is written", files.damaged_learned, 2, 16),
    Area("home", "the stores' folder is damaged, then stores are listed, converted, removed", files.damaged_home, 1, 8),
    Area("checkpoint", "a safetensors checkpoint is damaged, then converted", files.damaged_checkpoint, 2, 12),
    Area("gguf", "a GGUF file is damaged, then converted", files.damaged_gguf, 2, 12),
    Area("trace", "a routing trace is damaged, then simulated", files.damaged_trace, 1, 12),
    Area("faulty-conversion", "the disk fails under a conversion, then works again", faults.faulty_conversion, 2, 8),
    Area("faulty-run", "the disk fails under loading and writing text, then works again", faults.faulty_run, 2, 16),
    Area("killed-conversion", "a conversion is killed, then goes on", kills.killed_conversion, 2, 5),
    Area("killed-saving", "learned state or a trace is being written, and killed", kills.killed_saving, 1, 6),
    Area("killed-run", "a process that writes text is killed", kills.killed_run, 1, 3),
    Area("killed-keeping", "processes that write prefixes or sessions are killed, and blocks damaged", kept.killed_keeping, 1, 10),
    Area("race", "several processes, threads, forks and signals on one store", races.race, 2, 6),
    Area("budget", "a random budget under a control group", budgets.budget, 3, 0, limit_seconds=400.0),
)
AREAS = {area.name: area for area in _AREAS}
