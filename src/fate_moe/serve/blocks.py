"""An answer as a row of blocks, each text, reasoning or a call: what OpenAI's responses and Anthropic's messages are made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from fastapi import Request as HttpRequest

from fate_moe.schedule.request import TokenRecord
from fate_moe.serve.answers import Answers, Done, Said, collected
from fate_moe.serve.parsing import Delta, Reasoning, Text, ToolArguments, ToolOpened

__all__ = ["Block", "Blocks", "Step", "collect_blocks"]


@dataclass
class Block:
    """``text`` is a call's arguments where the block is one; ``call_id`` and ``name`` are of calls."""

    kind: Literal["text", "reasoning", "call"]
    index: int
    text: str = ""
    call_id: str = ""
    name: str = ""
    tokens: list[TokenRecord] = field(default_factory=list)


Step: TypeAlias = "tuple[Literal['open', 'grow', 'close'], Block, str]"  # and the new text


class Blocks:
    """The blocks of one answer; at most the last one is open."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.reasoning_tokens = 0
        self._is_open = False

    def feed(self, said: Said) -> Iterator[Step]:
        """What ``said`` changes, in order."""
        for delta in said.deltas:
            yield from self._feed(delta)
        if self.blocks:
            self.blocks[-1].tokens += said.tokens
            self.reasoning_tokens += len(said.tokens) if self.blocks[-1].kind == "reasoning" else 0

    def end(self) -> Iterator[Step]:
        """The answer is complete. One that says nothing has one empty block of text."""
        if not self.blocks:
            yield self._open(Block("text", 0))
        yield from self._close()

    def _feed(self, delta: Delta) -> Iterator[Step]:
        if isinstance(delta, ToolOpened):
            yield from self._close()
            yield self._open(Block("call", len(self.blocks), call_id=delta.id, name=delta.name))
            return
        kind: Literal["text", "reasoning", "call"]
        kind = "text" if isinstance(delta, Text) else "reasoning" if isinstance(delta, Reasoning) else "call"
        if not self._is_open or self.blocks[-1].kind != kind:
            assert not isinstance(delta, ToolArguments)
            yield from self._close()
            yield self._open(Block(kind, len(self.blocks)))
        self.blocks[-1].text += delta.text
        yield "grow", self.blocks[-1], delta.text

    def _open(self, block: Block) -> Step:
        self.blocks.append(block)
        self._is_open = True
        return "open", block, ""

    def _close(self) -> Sequence[Step]:
        if not self._is_open:
            return ()
        self._is_open = False
        return (("close", self.blocks[-1], ""),)


async def collect_blocks(request: HttpRequest, answers: Answers) -> tuple[Blocks, Done]:
    """The only one of ``answers``, whole, for a client that does not stream. Raises what ``collected`` raises."""
    blocks, done = Blocks(), None
    async for event in collected(request, answers):
        if isinstance(event, Said):
            list(blocks.feed(event))
        elif isinstance(event, Done):
            list(blocks.end())
            done = event
    assert done is not None
    return blocks, done
