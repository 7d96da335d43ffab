"""What the next step computes: which requests run, and how many rows of each. Rules alone."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from fate_moe.core import KV_BLOCK
from fate_moe.schedule.blocks import blocks_for
from fate_moe.schedule.executor import Executor, Rows
from fate_moe.schedule.sequence import TextSequence
from fate_moe.schedule.speculation import Draftable, Speculation
from fate_moe.schedule.states import Mark, States

__all__ = ["Steps"]

# Rows of a step of which some are decode rows: what others' next token waits for at most. And of one that only reads prompts.
_ROWS_BESIDE_DECODE, _ROWS = 256, 512
# Rows whose logits are kept at once: 128 x 150,000 fp32 numbers are 77 MB, which a budget can spare.
_LOGIT_ROWS = 128
_RESTORE_SECONDS = 0.05  # that blocks are read from the disk between two steps
# Tokens of a prompt between two checkpoints in passing: what a text that parts from it at most has to read twice.
_PASSING = 1024


@dataclass
class _Restoring:
    """The disk may have the blocks ``names``, which follow the ``begun`` first tokens; behind ``last`` is a checkpoint."""

    names: deque[bytes]
    begun: int
    last: bytes = field(init=False)

    def __post_init__(self) -> None:
        self.last = self.names[-1]


@dataclass
class Steps:
    """Requests that ``run``, oldest first, on an ``executor`` that takes ``parallel`` of them.

    Decode rows come first. The rest of a step's rows is divided evenly among the prompts that are read: a short prompt does not
    wait for a long one, and none starves. Where blocks run out, the youngest request gives its own back and is read again later.
    The oldest always goes on. Requests with one prompt (several answers to a question) have it read once: the younger ones wait for
    the oldest, and fork. What a request leaves is kept for those that begin alike, until its blocks are wanted.

    Where layers keep a state, it is written down at ends of blocks (``Mark``): the last one of the prompt, the last one of the
    text so far, where a text parts from one that is kept, and in passing.
    """

    executor: Executor
    parallel: int
    speculation: Speculation | None = None

    def __post_init__(self) -> None:
        self.run: list[TextSequence] = []
        self._leaders: dict[TextSequence, TextSequence] = {}  # who waits for whom to read their prompt
        self._restored: dict[TextSequence, _Restoring] = {}
        self._parts: dict[TextSequence, int] = {}  # tokens that it shares with a text that is kept, if more than it has
        self._moving: dict[TextSequence, bytes] = {}  # its last checkpoint
        self.preemptions = 0

    def make_room(self) -> list[TextSequence]:
        """Preempt the youngest until all others can take their decode rows; those that have to wait now, oldest first.

        Who waited for a prompt that will not be read waits to read it.
        """
        waiting = [one for one, leader in self._leaders.items() if leader.name is None or leader not in self.run]
        for one in waiting:
            self.leave(one)
        while not self._has(self._growth()) and len(self.run) > 1:
            waiting.append(youngest := self.run.pop())
            self.leave(youngest)
            youngest.forget()
            self.preemptions += 1
        return sorted(waiting, key=lambda one: one.order)

    def never_admits(self, sequence: TextSequence) -> str | None:
        """Why ``sequence`` can never run to its end; None if it can."""
        room = self.executor.blocks.num_blocks * KV_BLOCK
        if sequence.most_tokens <= room:
            return None
        return f"prompt and answer may take {sequence.most_tokens} tokens, and the KV cache holds {room}; ask for fewer new tokens"

    def admits(self, sequence: TextSequence) -> bool:
        """Whether ``sequence`` may run now: there is a place, and blocks for what it has to read, with some left for the others."""
        if len(self.run) >= self.parallel:
            return False
        if self._leader_of(sequence) is not None:
            return True
        wanted = blocks_for(len(sequence.tokens) + 1) + (self._growth() + len(self.run) if self.run else 0)
        blocks, prefixes = self.executor.blocks, self.executor.prefixes
        if prefixes is None:
            return not self.run or wanted <= blocks.free
        while True:  # what it may begin with is not taken anew; it is the last to be given up, and is looked for again then
            missing = wanted - (len(prefixes.find(sequence.tokens)) if sequence.may_begin_behind else 0)
            if blocks.free >= missing:
                return True
            if not prefixes.free(missing):
                return not self.run

    def admit(self, sequence: TextSequence) -> None:
        """``sequence`` runs from now on; ``admits`` said so. Its place is by its age."""
        if (leader := self._leader_of(sequence)) is not None:
            self._leaders[sequence] = leader
        else:
            self._begin(sequence)
            assert sequence.name is not None
            self.executor.blocks.reserve(sequence.name, min(len(sequence.tokens) + 1, sequence.most_tokens))
        self.run.append(sequence)
        self.run.sort(key=lambda one: one.order)

    def leave(self, sequence: TextSequence) -> None:
        """``sequence`` does not run any more."""
        self._leaders.pop(sequence, None)
        for of in (self._restored, self._parts, self._moving):
            of.pop(sequence, None)
        if sequence in self.run:
            self.run.remove(sequence)
        if sequence.name is not None:
            if (prefixes := self.executor.prefixes) is not None:
                names = prefixes.keep(sequence.name, sequence.tokens[: self._lasting(sequence)])
                if self.executor.disk is not None:
                    self.executor.disk.note(names)
            self.executor.drop(sequence.name)

    def forked(self, leader: TextSequence) -> list[TextSequence]:
        """Those that waited for ``leader``, which has read its prompt: they have read it too."""
        followers = [one for one, its in self._leaders.items() if its is leader]
        for one in followers:
            del self._leaders[one]
            assert leader.name is not None
            one.name, one.read = self.executor.fork(leader.name), leader.read
        return followers

    def restore(self) -> None:
        """Fill blocks of those who have just begun from the disk, for a while: others wait meanwhile."""
        until = time.monotonic() + _RESTORE_SECONDS
        for sequence, of in list(self._restored.items()):
            is_whole = True
            while of.names and is_whole and time.monotonic() < until:
                is_whole = self._load(sequence, of.names.popleft())
            if of.names and is_whole:
                continue
            del self._restored[sequence]
            if self._states is not None:
                self._load_state(sequence, of, is_whole)
            assert self.executor.prefixes is not None
            self.executor.prefixes.hits += sequence.read - of.begun
            if sequence.cached is None:
                sequence.cached = sequence.read

    def rows(self) -> list[tuple[TextSequence, Rows]]:
        """The next step."""
        waiting = self._leaders.keys() | self._restored.keys()
        left = {sequence: sequence.target - sequence.read for sequence in self.run if sequence not in waiting}
        decoding = [sequence for sequence in left if left[sequence] == 1 or self._one_by_one(sequence)]
        reading = [sequence for sequence in left if left[sequence] > 0 and sequence not in decoding]
        step = [(sequence, 1) for sequence in decoding]
        budget = (_ROWS_BESIDE_DECODE if decoding else _ROWS) - len(decoding)
        if not self.executor.any_cut:  # one prompt a step, always cut alike
            step += [(sequence, self._next_chunk(sequence)) for sequence in reading[:1]]
        else:
            shares = sorted(reading, key=lambda sequence: left[sequence])
            for index, sequence in enumerate(shares):
                count = min(left[sequence], max(1, budget // (len(shares) - index)))
                if sequence.wants_prompt_records:
                    count = min(count, _LOGIT_ROWS)
                step.append((sequence, count))
                budget -= count
        if self.speculation is not None and decoding and len(step) == len(decoding):
            self._draft(self.speculation, decoding)
        return [(sequence, self._rows(sequence, count)) for sequence, count in step]

    def _draft(self, speculation: Speculation, sequences: list[TextSequence]) -> None:
        """``sequences``, which all read their last token, read more than that."""
        blocks, texts = self.executor.blocks, list[Draftable]()
        spare = blocks.free - self._growth()  # others have a better use for the blocks that are kept
        for sequence in sequences:
            drafter, name = sequence.drafter, sequence.name
            if drafter is None or name is None or sequence.target - sequence.read != 1 or not sequence.generated:
                return
            room = sequence.request.max_new_tokens - sequence.generated - 1
            more = blocks.needed(name, 1 + speculation.most_forced) - blocks.needed(name, 1)
            if more > spare:
                room = min(room, len(blocks.table(name)) * KV_BLOCK - blocks.length(name) - 1)
            else:
                spare -= more
            assert sequence.sampler is not None
            texts.append(Draftable(drafter, sequence.tokens, max(0, room), sequence.sampler.forced() if room > 0 else ()))
        for sequence, draft in zip(sequences, speculation.draft(texts), strict=True):
            sequence.draft = draft
            sequence.drafted += len(draft)

    def _next_chunk(self, sequence: TextSequence) -> int:
        """How much of its prompt ``sequence`` reads next."""
        chunk, left = self.executor.chunk, len(sequence.request.prompt) - sequence.read
        return left if chunk is None else min(left, chunk - sequence.read % chunk)

    def _lasting(self, sequence: TextSequence) -> int:
        """How many of its tokens ``sequence`` has read as any other text would that begins with them."""
        if self.executor.any_cut:
            return sequence.read
        return min(sequence.read, len(sequence.request.prompt)) // (chunk := self.executor.chunk or 1) * chunk

    def _one_by_one(self, sequence: TextSequence) -> bool:
        """Whether ``sequence``, read again, has to be read as it was written for its numbers to be the same."""
        return not self.executor.any_cut and sequence.read >= len(sequence.request.prompt)

    def _rows(self, sequence: TextSequence, count: int) -> Rows:
        assert sequence.name is not None
        end = sequence.read + count
        records = self.executor.any_cut and sequence.wants_prompt_records
        wanted = count if records else int(end == len(sequence.tokens))
        watch: Callable[[float], None] | None = sequence.progress if count > 1 else None
        drafted = len(sequence.draft)
        tokens = sequence.tokens[sequence.read : end] + sequence.draft
        return Rows(sequence.name, tokens, wanted + drafted, watch, drafted, self._marks(sequence, end))

    def _begin(self, sequence: TextSequence) -> None:
        """``sequence`` gets a name, and what is kept of its tokens."""
        prefixes = self.executor.prefixes
        if prefixes is None or not sequence.may_begin_behind:
            sequence.name = self.executor.new()
            return
        sequence.name, sequence.read = self.executor.begin(sequence.tokens)
        names, begun = prefixes.names(sequence.tokens), sequence.read // KV_BLOCK
        if prefixes.states is not None and (matching := prefixes.matching(names)) > begun:
            self._parts[sequence] = matching * KV_BLOCK
        if self.executor.disk is not None and (missing := self.executor.disk.missing(names, begun)):
            self._restored[sequence] = _Restoring(deque(missing), sequence.read)
        elif sequence.cached is None:
            sequence.cached = sequence.read

    @property
    def _states(self) -> States | None:
        return self.executor.prefixes.states if self.executor.prefixes is not None else None

    def _load(self, sequence: TextSequence, name: bytes) -> bool:
        """Whether the next block of ``sequence`` is on the disk as ``name``; it is in its place then."""
        blocks, disk = self.executor.blocks, self.executor.disk
        assert sequence.name is not None
        assert disk is not None
        if not disk.load(name, blocks.table(sequence.name)[sequence.read // KV_BLOCK]):  # reserved when it was admitted
            return False
        blocks.append(sequence.name, KV_BLOCK)
        sequence.read += KV_BLOCK
        return True

    def _load_state(self, sequence: TextSequence, of: _Restoring, is_whole: bool) -> None:
        """The state behind the blocks that were loaded, if they are all there; where it is not, they are read again."""
        disk, states, name = self.executor.disk, self._states, sequence.name
        assert disk is not None
        assert states is not None
        assert name is not None
        if is_whole and disk.load_state(of.last, states.entry(name)):
            return
        sequence.read = 0 if is_whole else of.begun  # what was begun from may be written over
        length = len(self.executor.blocks.table(name)) * KV_BLOCK
        self.executor.blocks.cut(name, sequence.read)
        self.executor.blocks.reserve(name, length)

    def _marks(self, sequence: TextSequence, end: int) -> tuple[Mark, ...]:
        """Checkpoints on the way of ``sequence`` to ``end`` tokens."""
        states, prefixes, tokens, read = self._states, self.executor.prefixes, sequence.tokens, sequence.read
        if states is None or prefixes is None or end // KV_BLOCK == read // KV_BLOCK:
            return ()
        last = (len(tokens) - 1) // KV_BLOCK * KV_BLOCK
        places = {last: False, self._parts.get(sequence, 0): False}
        for place in range(_PASSING, min(end + 1, last), _PASSING):
            places.setdefault(place, True)
        if end == len(tokens) and end % KV_BLOCK == 0:
            places[end] = False
            if sequence in self._moving:  # its answer went on
                states.forget(self._moving[sequence])
            self._moving[sequence] = prefixes.name_at(tokens, end)
        found = sorted(place for place in places if read < place <= end)
        names = prefixes.names([*tokens[:end], 0]) if found else []
        return tuple(Mark(place, names[place // KV_BLOCK - 1], places[place]) for place in found)

    def _has(self, wanted: int) -> bool:
        """Whether ``wanted`` blocks are free, or were given up for it."""
        blocks, prefixes = self.executor.blocks, self.executor.prefixes
        return blocks.free >= wanted or (prefixes is not None and prefixes.free(wanted))

    def _leader_of(self, sequence: TextSequence) -> TextSequence | None:
        """Who is about to read just what ``sequence`` has to."""
        request, prompt = sequence.request, sequence.request.prompt
        if sequence.generated or not request.max_new_tokens or request.prompt_logprobs:
            return None
        reading = (one for one in self.run if one.read < len(prompt) and not one.generated and one not in self._leaders)
        return next((one for one in reading if one.request.prompt == prompt and one.request.max_new_tokens), None)

    def _growth(self) -> int:
        """Blocks that the next step takes if all of ``run`` take part: those of prompts are reserved."""
        return sum(self.executor.blocks.needed(one.name, 1) for one in self.run if one.name is not None)
