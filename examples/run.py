"""Write text with a model whose experts come from disk, then print what that took.

python examples/run.py                              the embedded model
python examples/run.py PATH-OR-ID "Once upon a time"
"""

from __future__ import annotations

import sys

from transformers import TextStreamer

from fate_moe import load


def main(model_name: str | None = None, prompt: str = "It was a dark night, and the old house", *, new_tokens: int = 60) -> str:
    """Continue ``prompt`` with a quarter of the experts in memory; the whole text."""
    model, tokenizer = load(model_name, expert_cache="25%")
    with model.fate as engine:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(
            **inputs,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
            streamer=TextStreamer(tokenizer),
        )
        print(engine.report())
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    main(*sys.argv[1:3])
