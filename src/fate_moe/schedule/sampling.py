"""How the next token is chosen: by transformers' own processors, in the order in which ``generate()`` applies them."""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from fate_moe.schedule.request import Request

__all__ = ["Prepared", "Sampler", "choose", "eos_ids", "generation_config", "prepared", "sampling_defaults"]

# Processors that look at each row of scores by itself and keep nothing: rows of several requests may go through them at once.
_BY_ROW = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
# Those and this one are the same for every prompt, so requests with the same options share them.
_FOR_ALL_PROMPTS = (*_BY_ROW, RepetitionPenaltyLogitsProcessor)
_MOST_SHARED = 64


class Prepared(NamedTuple):
    """What ``generate()`` has prepared when its loop over tokens begins: ``kwargs`` are what it gives the model's preparation of
    inputs, an empty cache among them."""

    processors: LogitsProcessorList
    criteria: Sequence[Any]
    kwargs: dict[str, Any]


def prepared(model: Any, inputs: torch.Tensor, config: GenerationConfig, processors: Sequence[LogitsProcessor] = ()) -> Prepared:
    """What ``model.generate(inputs)`` prepares; ``inputs`` [1, tokens]. Nothing is computed."""
    found: list[Prepared] = []

    def instead(
        model: Any, input_ids: Any, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **kwargs: Any
    ) -> torch.Tensor:
        found.append(Prepared(logits_processor, stopping_criteria, kwargs))
        return inputs

    model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        generation_config=config,
        logits_processor=LogitsProcessorList(processors),
        custom_generate=instead,
    )
    return found[0]


def _rules(model: Any, request: Request, inputs: torch.Tensor) -> tuple[bool, list[Any], list[Any]]:
    """Whether tokens are drawn, the processors of scores, and what may end the text other than its length or its last token.

    ``generate()`` takes about as long to find them as a small model takes for a token: they are kept for requests that ask alike.
    """
    asked, own = request.sampling, list(_processors(request))
    key = (repr(vars(model.generation_config)), request.ignore_eos, *(getattr(asked, name) for name in _OPTIONS))
    shared = _shared.setdefault(model, {})
    is_shared = not own and not asked.logit_bias
    if is_shared and key in shared:
        return shared[key]
    config = generation_config(model, request)
    found = prepared(model, inputs, config, own)
    criteria = [one for one in found.criteria if not isinstance(one, MaxLengthCriteria | EosTokenCriteria)]
    rules = bool(config.do_sample), list(found.processors), criteria
    if is_shared and not criteria and all(type(one) in _FOR_ALL_PROMPTS for one in found.processors):
        if len(shared) >= _MOST_SHARED:
            shared.clear()
        shared[key] = rules
    return rules


_OPTIONS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_shared: weakref.WeakKeyDictionary[Any, dict[Any, tuple[bool, list[Any], list[Any]]]] = weakref.WeakKeyDictionary()


class Sampler:
    """Chooses the tokens of one request. Its random numbers are its own, so they do not depend on other requests."""

    def __init__(self, model: Any, request: Request, seed: int) -> None:
        inputs = torch.tensor([request.prompt], device=model.device)
        self._samples, processors, self._criteria = _rules(model, request, inputs)
        self._random = torch.Generator(device=model.device).manual_seed(seed)
        self._ids = torch.empty(1, len(request.prompt) + request.max_new_tokens, dtype=inputs.dtype, device=model.device)
        self._length = inputs.shape[1]
        self._ids[:, : self._length] = inputs
        own = next((i for i, one in enumerate(processors) if type(one) in _BY_ROW), len(processors))
        if not all(type(one) in _BY_ROW for one in processors[own:]):
            own = len(processors)
        self._own, self.by_row = processors[:own], processors[own:]
        # Equal for samplers whose ``by_row`` do the same.
        self.kind = tuple((type(one), *sorted((name, repr(value)) for name, value in vars(one).items())) for one in self.by_row)

    def score(self, logits: torch.Tensor) -> torch.Tensor:
        """``logits`` [vocab] of the latest position as fp32 scores [vocab], as far as they depend on this request alone."""
        if not self._own and not self.by_row and not self._samples:
            return logits  # its largest number alone is asked for
        scores = logits.to(copy=True, dtype=torch.float32)[None]
        for processor in self._own:
            scores = processor(self._ids[:, : self._length], scores)
        return scores[0]

    def forced(self) -> list[int]:
        """Tokens that one of its processors (``forced``) expects next, whatever the scores; mostly none."""
        for processor in self._own:
            if (ask := getattr(processor, "forced", None)) is not None:
                try:
                    return list(ask(self._ids[:, : self._length]))
                except Exception:  # it will raise again when it is asked for scores
                    return []
        return []

    def pick(self, scores: torch.Tensor) -> int:
        """The next token, by its final ``scores`` [vocab]."""
        draw = torch.multinomial(scores.softmax(-1), 1, generator=self._random) if self._samples else scores.argmax(-1)
        token = int(draw.item())
        self._ids[0, self._length] = token
        self._length += 1
        return token

    @property
    def is_over(self) -> bool:
        """Whether the generation config ends the text here for another reason than its length or its last token."""
        return any(bool(one(self._ids[:, : self._length], None)) for one in self._criteria)


def choose(samplers: Sequence[Sampler], logits: Sequence[torch.Tensor]) -> list[int | BaseException]:
    """The next token of each sampler after its ``logits`` [vocab], or why there is none. The same alone and among others."""
    chosen: list[int | BaseException] = [RuntimeError("nothing was chosen")] * len(samplers)
    groups: dict[Any, list[tuple[int, torch.Tensor]]] = {}
    for index, (sampler, row) in enumerate(zip(samplers, logits, strict=True)):
        try:
            scores = sampler.score(row)
        except BaseException as error:  # a panic of a library in Rust is no Exception
            chosen[index] = error
        else:
            groups.setdefault(sampler.kind, []).append((index, scores))
    for members in groups.values():
        by_row, rows = samplers[members[0][0]].by_row, [row for _, row in members]
        if by_row:
            together = torch.stack(rows) if len(rows) > 1 else rows[0][None]
            for processor in by_row:
                together = processor(None, together)
            rows = list(together)
        for (index, _), row in zip(members, rows, strict=True):
            try:
                chosen[index] = samplers[index].pick(row)
            except Exception as error:  # no token has a probability
                chosen[index] = error
    return chosen


def _processors(request: Request) -> Iterator[LogitsProcessor]:
    sampling = request.sampling
    if sampling.presence_penalty or sampling.frequency_penalty:
        yield _Penalties(len(request.prompt), sampling.presence_penalty, sampling.frequency_penalty)
    if request.constraint is not None:
        yield request.constraint()


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
