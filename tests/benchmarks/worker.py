"""A peer that does as its job's settings say: the protocol of benchmarks/peers/__init__.py with known numbers."""

import json
import sys
import time

job = json.load(sys.stdin)
settings = job["settings"]


def say(event: str, **fields: object) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)


print("a library says hello")
say("loaded", seconds=0.5)
for index, prompts in enumerate(job["samples"]):
    counted = {"experts": {"bytes_read": 1000 * (index + 1), "stall_seconds": 0.1 * index}}
    say("first", sample=index, prompt_tokens=len(prompts[0]), seconds=2.0, counters=counted)
    if settings["does"] == "hang":
        counted = {"experts": {"bytes_read": 1500, "stall_seconds": 0.5}}
        say("tokens", sample=index, count=2, seconds=8.0, counters=counted)
        time.sleep(60)
    if settings["does"] == "eat":
        eaten = [bytearray(b"x" * (16 << 20)) for _ in range(64)]
    say("tokens", sample=index, count=job["new_tokens"] - 1, seconds=4.0 * (index + 1))
    say(
        "counters",
        sample=index,
        counters={"experts": {"bytes_read": 1000 * (index + 1) + 600, "stall_seconds": 0.1 * index + 0.06}},
    )
if settings["does"] == "fail":
    say("failed", message="RuntimeError: no luck")
    sys.exit(1)
if settings["does"] == "crash":
    raise MemoryError("of its own accord")
say("done", versions={"worker": "1"})
