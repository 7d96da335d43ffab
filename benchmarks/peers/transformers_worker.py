"""One job on a transformers model: this engine, or transformers with accelerate's disk offload. See peers/__init__.py."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any


def say(event: str, **fields: Any) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)


def load(job: dict[str, Any]) -> tuple[Any, dict[str, str], Callable[[], dict[str, Any]]]:
    """(model, versions, counters): counters() returns bytes and stalls so far, {} if the engine does not count them."""
    import torch
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    settings = dict(job["settings"])
    if settings.pop("engine") == "fate":
        import fate_moe

        context = job["context_tokens"] * len(job["samples"][0])
        model, _ = fate_moe.load(job["model"], context_length=context, **settings)
        return model, versions | {"fate-moe": fate_moe.__version__}, lambda: model.fate.report().as_dict()
    import accelerate

    memory = {"cpu": settings.pop("memory_bytes")}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job["model"], dtype="auto", device_map="auto", max_memory=memory, offload_folder=job["scratch"], **settings
    )
    return model, versions | {"accelerate": accelerate.__version__}, dict


def main() -> None:
    job = json.load(sys.stdin)
    import torch
    from transformers import DynamicCache, StoppingCriteria

    torch.set_num_threads(job["threads"])
    start = time.perf_counter()
    model, versions, counters = load(job)
    model.eval()
    model.generation_config.eos_token_id = None  # min_new_tokens would be slower: it masks the token in every step
    say("loaded", seconds=time.perf_counter() - start)

    class Clock(StoppingCriteria):  # type: ignore[misc]
        """Called after each new token: reports its time; never stops."""

        def __init__(self, sample: int, prompt_tokens: int) -> None:
            self.sample, self.prompt_tokens, self.count, self.began = sample, prompt_tokens, 0, time.perf_counter()

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            now = time.perf_counter()
            if self.count == 0:
                say("first", sample=self.sample, prompt_tokens=self.prompt_tokens, seconds=now - self.began, counters=counters())
                self.first = now
            else:
                now_counted = counters()  # with every token, so that an interrupted cell has them
                say("tokens", sample=self.sample, count=self.count, seconds=now - self.first, counters=now_counted)
            self.count += 1
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    history, cache = None, None
    for index, prompts in enumerate(job["samples"]):
        ids = torch.tensor(prompts)
        if job["workload"] == "chat":
            history = ids if history is None else torch.cat([history, ids], dim=1)
            cache = cache if cache is not None else DynamicCache(config=model.config)
            ids = history
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=job["new_tokens"],
            do_sample=False,
            past_key_values=cache,
            stopping_criteria=[Clock(index, len(prompts[0]))],
        )
        history = out if job["workload"] == "chat" else None
        say("counters", sample=index, counters=counters())
    say("done", versions=versions)


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        say("failed", message=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}")
        sys.exit(1)
