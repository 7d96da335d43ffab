"""One request through ``model.generate()``: transformers chooses the tokens, and each becomes text, and events, at once."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from fate_moe.core import Counters
from fate_moe.schedule.prompt_logprobs import prompt_records, record_of
from fate_moe.schedule.request import Event, Finished, Reading, Reason, Request, Timings, TokenRecord, Usage
from fate_moe.schedule.text import Decode, TextStream

__all__ = ["CancelledError", "Generation", "decoder", "eos_ids", "generation_config", "sampling_defaults"]

# Tokens of the prompt that the text is decoded after: enough for any character and for a decoder's rule on leading spaces.
_CONTEXT_TOKENS = 8
_PROGRESS_SECONDS = 0.1  # between two events that say how far a prompt is


class CancelledError(Exception):
    """Raised inside a forward pass of the prompt of a request that was cancelled."""


class Generation:
    """Runs one request. ``deliver`` gets its events but the last. ``is_cancelled`` is asked once a token, and once a layer while
    the prompt is read. ``submitted`` is when the request came (time.perf_counter)."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        request: Request,
        deliver: Callable[[Event], None],
        is_cancelled: Callable[[], bool],
        submitted: float,
    ) -> None:
        self._model, self._request, self._deliver, self._is_cancelled = model, request, deliver, is_cancelled
        self._began = time.perf_counter()
        self._queued_seconds = self._began - submitted
        self._counters: Counters = model.fate.counters()
        self._eos = set() if request.ignore_eos else eos_ids(model, tokenizer)
        context = request.prompt[-_CONTEXT_TOKENS:] if request.continues else ()
        self._text = TextStream(decoder(tokenizer, not request.keep_special), request.stop, context)
        self.tokens = 0  # generated so far
        self._first_at = self._last_at = self._began
        self._logits: torch.Tensor | None = None  # [vocab], of the latest place, as the model gave them
        self._prompt: tuple[TokenRecord, ...] = ()
        self._ended = False

    def run(self, seed: int) -> Finished:
        """Generate, all events on the way; raises CancelledError, or what the model raises."""
        request, model = self._request, self._model
        with torch.inference_mode(), self._watched_prompt():
            inputs = torch.tensor([request.prompt], device=model.device)
            if request.prompt_logprobs:
                self._prompt = prompt_records(model, inputs, request.top_logprobs or 0)
            if request.max_new_tokens > 0:
                torch.manual_seed(seed)  # nothing else in this process draws from torch's generator while this thread generates
                model.generate(
                    inputs,
                    attention_mask=torch.ones_like(inputs),
                    generation_config=generation_config(model, request),
                    logits_processor=LogitsProcessorList(self._processors()),
                    stopping_criteria=StoppingCriteriaList([_Follow(self._follow)]),
                )
        if self._is_cancelled():
            return self.finished("cancelled")
        if (piece := self._text.finish()) is not None:
            self._deliver(piece)
        by_model = self._ended or self._text.stopped is not None
        return self.finished("stop" if by_model else "length")

    def finished(self, reason: Reason, message: str = "") -> Finished:
        """The last event, with what was counted so far."""
        prompt_tokens = len(self._request.prompt)
        traffic = self._model.fate.counters().since(self._counters)
        now = time.perf_counter()
        prompt_seconds = (self._first_at if self.tokens else now) - self._began
        decode_seconds = self._last_at - self._first_at
        return Finished(
            reason,
            Usage(prompt_tokens, self.tokens),
            Timings(
                queued_seconds=self._queued_seconds,
                prompt_seconds=prompt_seconds,
                decode_seconds=decode_seconds,
                prompt_tokens_per_second=prompt_tokens / prompt_seconds if prompt_seconds > 0 else 0.0,
                decode_tokens_per_second=(self.tokens - 1) / decode_seconds if decode_seconds > 0 else 0.0,
                ready_on_time=traffic.ready_on_time,
                bytes_read=traffic.bytes_read,
                stall_seconds=traffic.stall_seconds,
            ),
            stop=self._text.stopped,
            message=message,
            prompt=self._prompt,
        )

    def _processors(self) -> Iterator[LogitsProcessor]:
        request, sampling = self._request, self._request.sampling
        if sampling.presence_penalty or sampling.frequency_penalty:
            yield _Penalties(len(request.prompt), sampling.presence_penalty, sampling.frequency_penalty)
        if request.constraint is not None:
            yield request.constraint()

    def _follow(self, token: int) -> bool:
        """``token`` was chosen: deliver its text. Returns whether to stop after it."""
        if self._ended or self._text.stopped is not None:  # on a GPU, generate() may look one token later
            return True
        now = time.perf_counter()
        if not self.tokens:
            self._first_at = now
        self._last_at = now
        self.tokens += 1
        if token in self._eos:
            self._ended = True
            return True
        top = self._request.top_logprobs
        record = TokenRecord(token) if top is None or self._logits is None else record_of(self._logits, token, top)
        if (piece := self._text.push(record)) is not None:
            self._deliver(piece)
        return self._text.stopped is not None or self._is_cancelled()

    @contextmanager
    def _watched_prompt(self) -> Iterator[None]:
        """While the prompt is read, each decoder layer reports the progress, and ends the pass once the request is cancelled.

        The layers have hooks during the prompt's passes only: on a GPU, ``generate()`` looks for hooks when it starts and decodes
        through the fused step only if it finds none. The model's own hooks do not count.
        """
        layers = _decoder_layers(self._model)
        total = len(self._request.prompt)
        told = time.perf_counter()
        self._deliver(Reading(0, total))
        in_layers: list[Any] = []

        def entering(done: int) -> Callable[..., None]:
            def enter(module: Any, args: tuple[Any, ...]) -> None:
                nonlocal told
                if self._is_cancelled():
                    raise CancelledError
                if (now := time.perf_counter()) - told > _PROGRESS_SECONDS:
                    told = now
                    self._deliver(Reading(done, total))

            return enter

        def before(module: Any, args: tuple[Any, ...]) -> None:
            if not self.tokens:
                for index, layer in enumerate(layers):
                    in_layers.append(layer.register_forward_pre_hook(entering(total * index // len(layers))))

        def after(*_: Any) -> None:
            while in_layers:
                in_layers.pop().remove()

        handles = [self._model.register_forward_pre_hook(before), self._model.register_forward_hook(after)]
        if self._request.top_logprobs is not None:
            handles.append(self._model.register_forward_hook(self._keep_logits))
        try:
            yield
        finally:
            after()
            for handle in handles:
                handle.remove()

    def _keep_logits(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        self._logits = output.logits[0, -1].float()


class _Follow(StoppingCriteria):  # type: ignore[misc]
    """Calls ``follow`` with each token that was chosen; it says whether to stop."""

    def __init__(self, follow: Callable[[int], bool]) -> None:
        self._follow = follow

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor([self._follow(int(input_ids[0, -1]))], device=input_ids.device)


class _Penalties(LogitsProcessor):  # type: ignore[misc]
    """OpenAI's: score - frequency * count - presence * (count > 0), of one text, counted after its first ``prompt_tokens``."""

    def __init__(self, prompt_tokens: int, presence: float, frequency: float) -> None:
        self._presence, self._frequency = presence, frequency
        self._seen, self._counts = prompt_tokens, Counter[int]()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts, tokens = self._counts, input_ids[0, self._seen :].tolist()
        self._seen += len(tokens)
        counts.update(tokens)
        if counts:
            index = torch.tensor(list(counts), device=scores.device)
            number = torch.tensor(list(counts.values()), device=scores.device, dtype=scores.dtype)
            scores[0, index] -= self._presence + self._frequency * number
        return scores


def generation_config(model: Any, request: Request) -> GenerationConfig:
    """The model's own generation config with what ``request`` asks for."""
    config: GenerationConfig = copy.deepcopy(model.generation_config)
    sampling = request.sampling
    config.max_length, config.max_new_tokens, config.min_new_tokens, config.stop_strings = None, request.max_new_tokens, None, None
    config.num_beams, config.num_return_sequences = 1, 1
    if sampling.temperature is not None:
        config.do_sample = sampling.temperature > 0
    if not config.do_sample:
        config.temperature = config.top_p = config.top_k = config.min_p = config.typical_p = None
    else:
        for name in ("temperature", "top_p", "top_k", "min_p"):
            if (value := getattr(sampling, name)) is not None:
                setattr(config, name, value)
    if sampling.repetition_penalty is not None:
        config.repetition_penalty = sampling.repetition_penalty
    if sampling.logit_bias:
        config.sequence_bias = [[[token], float(bias)] for token, bias in sampling.logit_bias.items()]
    if request.ignore_eos:
        config.eos_token_id = None
    if config.pad_token_id is None:
        config.pad_token_id = 0  # one sequence: never used, but transformers wants to say that it chose one
    return config


def sampling_defaults(model: Any) -> dict[str, float | int | bool]:
    """What a request that gives no sampling options gets."""
    config = model.generation_config
    defaults = GenerationConfig._get_default_generation_params()
    names = ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty")
    chosen = {name: getattr(config, name) if getattr(config, name) is not None else defaults[name] for name in names}
    return {**chosen, "min_p": config.min_p or 0.0}


def eos_ids(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end a text: generate() ends at those of the generation config."""
    ids = model.generation_config.eos_token_id
    ids = tokenizer.eos_token_id if ids is None else ids
    return set() if ids is None else set(ids) if isinstance(ids, (list, tuple)) else {ids}


def decoder(tokenizer: Any, skip_special: bool) -> Decode:
    """Token ids to text; special tokens are part of it or not."""

    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=skip_special))

    return decode


def _decoder_layers(model: Any) -> Sequence[Any]:
    """The modules that a pass runs one after the other; empty where the model has no list of them."""
    layers = getattr(model.get_decoder(), "layers", None)
    return list(layers) if isinstance(layers, torch.nn.ModuleList) else []
