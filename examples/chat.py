"""Talk with a model: one question a line, an empty line ends.

    python examples/chat.py PATH-OR-ID

A model without a chat template, as the embedded one, continues the text of both sides.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from transformers import TextStreamer

from fate_moe import load


def encode(tokenizer: Any, messages: list[dict[str, str]]) -> Any:
    """The conversation as token ids [1, num_tokens] and their mask, ready for the next answer."""
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return tokenizer("\n".join(message["content"] for message in messages) + "\n", return_tensors="pt")


def main(model_name: str | None = None, *, questions: Iterable[str] = sys.stdin, new_tokens: int = 100) -> list[dict[str, str]]:
    """Answer ``questions`` one after the other; the whole conversation."""
    model, tokenizer = load(model_name, expert_cache="50%", context_length=2048)
    messages: list[dict[str, str]] = []
    with model.fate:
        for question in map(str.strip, questions):
            if not question:
                break
            messages.append({"role": "user", "content": question})
            inputs = encode(tokenizer, messages)
            output = model.generate(
                **inputs,
                max_new_tokens=new_tokens,
                do_sample=True,
                temperature=0.7,
                pad_token_id=tokenizer.eos_token_id,
                streamer=TextStreamer(tokenizer, skip_prompt=True),
            )
            answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            messages.append({"role": "assistant", "content": answer})
    return messages


if __name__ == "__main__":
    main(*sys.argv[1:2])
