"""One job on llama.cpp, through llama-cpp-python (built for this CPU) or xllamacpp (a prebuilt wheel), or on ik_llama.cpp.

See peers/__init__.py.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import re
import sys
import time
from typing import Any


def say(event: str, **fields: Any) -> None:
    print(json.dumps({"event": event, **fields}), file=OUT, flush=True)


class Clock:
    """Reports the time of each new token of a sample; ``prompt_tokens`` tokens were read before the first."""

    def __init__(self, sample: int, prompt_tokens: int) -> None:
        self.sample, self.prompt_tokens, self.count, self.began = sample, prompt_tokens, 0, time.perf_counter()

    def tick(self) -> None:
        now = time.perf_counter()
        if self.count == 0:
            say("first", sample=self.sample, prompt_tokens=self.prompt_tokens, seconds=now - self.began)
            self.first = now
        else:
            say("tokens", sample=self.sample, count=self.count, seconds=now - self.first)
        self.count += 1


class LlamaCppPython:
    """llama.cpp's C functions; a batch has one sequence per prompt."""

    module, repacks = "llama_cpp", "use_extra_bufts"

    def __init__(self, job: dict[str, Any]) -> None:
        import numpy as np

        self.lib = lib = importlib.import_module(self.module)
        self.np, self.batch_size = np, len(job["samples"][0])
        lib.llama_backend_init()
        model = lib.llama_model_default_params()
        model.n_gpu_layers, model.use_mmap = 0, job["settings"]["mmap"]
        setattr(model, self.repacks, job["settings"]["repack"])
        self.model = lib.llama_model_load_from_file(job["model"].encode(), model)
        if not self.model:
            raise RuntimeError("llama.cpp could not load the model")
        context = lib.llama_context_default_params()
        context.n_ctx = self.batch_size * job["context_tokens"]
        context.n_seq_max = self.batch_size
        context.n_batch, context.n_ubatch = 2048, 512
        context.n_threads = context.n_threads_batch = job["threads"]
        self.context = lib.llama_init_from_model(self.model, context)
        if not self.context:
            raise RuntimeError("llama.cpp could not make a context")
        self.vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.batch = lib.llama_batch_init(2048, 0, 1)
        self.past = 0

    def version(self) -> dict[str, str]:
        return {"llama-cpp-python": self.lib.__version__, "system": self.lib.llama_print_system_info().decode().strip()}

    def forget(self) -> None:
        """Empty the KV cache."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """``rows``: (token, position, sequence, whether to compute its logits)."""
        self.batch.n_tokens = len(rows)
        for i, (token, position, sequence, needs_logits) in enumerate(rows):
            self.batch.token[i], self.batch.pos[i], self.batch.logits[i] = token, position, needs_logits
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, sequence
        if status := self.lib.llama_decode(self.context, self.batch):
            raise RuntimeError(f"llama_decode returned {status}")

    def _greedy(self, row: int) -> int:
        logits = self.np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, row), (self.vocab_size,))
        return int(logits.argmax())

    def run(self, prompts: list[list[int]], new_tokens: int, keep_history: bool, clock: Clock) -> None:
        if not keep_history:
            self.forget()
            self.past = 0
        length = len(prompts[0])
        rows = [
            (token, self.past + i, sequence, i == length - 1)
            for sequence, prompt in enumerate(prompts)
            for i, token in enumerate(prompt)
        ]
        chosen: list[int] = []
        for start in range(0, len(rows), 2048):
            piece = rows[start : start + 2048]
            self._decode(piece)
            chosen += [self._greedy(i) for i, row in enumerate(piece) if row[3]]
        self.past += length
        clock.tick()
        for _ in range(new_tokens - 1):
            self._decode([(token, self.past, sequence, True) for sequence, token in enumerate(chosen)])
            chosen = [self._greedy(sequence) for sequence in range(len(prompts))]
            self.past += 1
            clock.tick()


class IkLlamaCpp(LlamaCppPython):
    """ik_llama.cpp's C functions, which are llama.cpp's of an earlier year."""

    module, repacks = "ik_llama_cpp._ctypes_api", "repack_tensors"

    def version(self) -> dict[str, str]:
        return {"ik-llama-cpp-python": importlib.metadata.version("ik-llama-cpp-python")}

    def forget(self) -> None:
        self.lib.llama_kv_cache_clear(self.context)


class Xllamacpp:
    """llama-server in this process, with streamed tokens; a batch has one slot per prompt."""

    def __init__(self, job: dict[str, Any]) -> None:
        import xllamacpp as lib

        self.lib, self.batch_size = lib, len(job["samples"][0])
        self.history: list[int] = []
        settings = job["settings"]
        params = lib.CommonParams()
        params.model.path = job["model"]
        params.n_gpu_layers, params.no_extra_bufts = 0, not settings["repack"]
        params.load_mode = (
            lib.llama_load_mode.LLAMA_LOAD_MODE_MMAP if settings["mmap"] else lib.llama_load_mode.LLAMA_LOAD_MODE_NONE
        )
        params.n_parallel, params.n_ctx = self.batch_size, self.batch_size * job["context_tokens"]
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job["threads"]
        params.n_batch, params.n_ubatch, params.warmup, params.cache_ram_mib = 2048, 512, False, 0
        self.server = lib.Server(params)

    def version(self) -> dict[str, str]:
        return {"xllamacpp": self.lib.__version__, "system": self.lib.get_system_info().strip()}

    def run(self, prompts: list[list[int]], new_tokens: int, keep_history: bool, clock: Clock) -> None:
        """Ticks the clock when every prompt of the batch has its next token."""
        counts = [0] * len(prompts)
        tokens: list[int] = []

        def chunk(answer: Any) -> bool:
            if answer and "choices" not in answer:
                raise RuntimeError(answer.get("message", str(answer)))
            for choice in answer["choices"] if answer else []:
                new = [int(token) for token in re.findall(r"<(\d+)>", choice["text"])]  # the vocabulary of gguf_export
                tokens.extend(new)
                counts[choice["index"]] += len(new)
            while clock.count < min(counts):
                clock.tick()
            return False

        prompt: Any = prompts if len(prompts) > 1 else self.history + prompts[0] if keep_history else prompts[0]
        request = {"n_predict": new_tokens, "ignore_eos": True, "temperature": 0, "stream": True}
        self.server.handle_completions(request | {"prompt": prompt, "cache_prompt": keep_history}, chunk)
        if clock.count != new_tokens:
            raise RuntimeError(f"{clock.count} tokens came instead of {new_tokens}")
        self.history = [*prompt, *tokens] if keep_history else []


def main() -> None:
    job = json.load(sys.stdin)
    start = time.perf_counter()
    engines = {"llama-cpp-python": LlamaCppPython, "ik-llama-cpp-python": IkLlamaCpp, "xllamacpp": Xllamacpp}
    engine: Any = engines[job["settings"]["engine"]](job)
    say("loaded", seconds=time.perf_counter() - start)
    keep_history = job["workload"] == "chat"
    for index, prompts in enumerate(job["samples"]):
        engine.run(prompts, job["new_tokens"], keep_history, Clock(index, len(prompts[0])))
    say("done", versions=engine.version())


if __name__ == "__main__":
    OUT = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # llama.cpp prints on standard output
    try:
        main()
    except Exception as error:
        say("failed", message=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}")
        OUT.flush()
        os._exit(1)
    os._exit(0)  # llama-server's threads do not always end
