"""A task of two questions for EleutherAI's harness, that needs no download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

QUESTIONS: list[dict[str, Any]] = [
    {"question": "Once upon a", "choices": [" time", " zebra"], "answer": 0},
    {"question": "He opened the door and went", "choices": [" 77", " out"], "answer": 1},
]


def write_task(folder: Path) -> None:
    """Write the task ``tiny`` and its data into ``folder``, for ``TaskManager(include_path=...)``."""
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (folder / "tiny.yaml").write_text(
        f"""
task: tiny
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/data.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
"""
    )
