"""Prometheus metrics: requests and tokens in the style of vLLM and llama-server, and the experts' traffic, which is ours."""

from __future__ import annotations

from collections import Counter as Count
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from fate_moe.core import KV_BLOCK
from fate_moe.machine import resident_memory
from fate_moe.schedule.request import Finished, Request
from fate_moe.schedule.speculation import SOURCES

if TYPE_CHECKING:
    from fate_moe.serve.service import Service

__all__ = ["Metrics"]

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each one, which says when it began
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """One server's metrics. ``finished`` is called in the inference thread, ``answered`` in the event loop, ``text`` in any."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._registry = registry = CollectorRegistry()
        self._http = Counter("fate_http_requests", "Answers by route and status.", ["route", "status"], registry=registry)
        self._ended = Counter("fate_requests", "Texts that ended, by reason.", ["reason"], registry=registry)
        self._prompt = Counter("fate_prompt_tokens", "Tokens of prompts that were read.", registry=registry)
        self._generated = Counter("fate_generation_tokens", "Tokens that were generated.", registry=registry)
        self._prompt_seconds = Counter("fate_prompt_seconds", "Seconds spent reading prompts.", registry=registry)
        self._decode_seconds = Counter("fate_generation_seconds", "Seconds spent generating after first tokens.", registry=registry)
        self._first = self._histogram("fate_time_to_first_token_seconds", "From asking to the first token.", _SECONDS)
        self._each = self._histogram("fate_time_per_output_token_seconds", "Mean of a text after its first token.", _TOKEN_SECONDS)
        self._whole = self._histogram("fate_request_seconds", "From asking to the last token.", _SECONDS)
        self._queued = self._histogram("fate_request_queue_seconds", "From asking to the beginning of work.", _SECONDS)
        registry.register(_Engine(service))

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, buckets=buckets, registry=self._registry)

    def answered(self, route: str, status: int) -> None:
        """An HTTP answer was sent."""
        self._http.labels(route, str(status)).inc()

    def finished(self, request: Request, end: Finished) -> None:
        """A text ended."""
        self._ended.labels(end.reason).inc()
        timings, tokens = end.timings, end.usage.completion_tokens
        if tokens:
            self._prompt.inc(end.usage.prompt_tokens)
            self._generated.inc(tokens)
            self._prompt_seconds.inc(timings.prompt_seconds)
            self._decode_seconds.inc(timings.decode_seconds)
            self._queued.observe(timings.queued_seconds)
            self._first.observe(timings.queued_seconds + timings.prompt_seconds)
            self._whole.observe(timings.queued_seconds + timings.prompt_seconds + timings.decode_seconds)
        if tokens > 1:
            self._each.observe(timings.decode_seconds / (tokens - 1))

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self._registry)


class _Engine:
    """What the engine and the scheduler count themselves, read when it is asked for."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        if (card := self._service.card) is None:
            return
        scheduler, report = self._service.scheduler, card.model.fate.report()
        yield _gauge("fate_requests_running", "Requests that are being worked on.", scheduler.running)
        yield _gauge("fate_requests_waiting", "Requests in the queue.", scheduler.waiting)
        load = scheduler.load
        yield _counter("fate_steps", "Steps of the model.", load.steps)
        yield _counter("fate_step_rows", "Rows of all steps: tokens that were read, of prompts and of answers.", load.rows)
        yield _counter(
            "fate_preemptions", "Requests that gave their KV blocks to older ones and were read again.", load.preemptions
        )
        yield _gauge("fate_kv_blocks", f"Blocks of {KV_BLOCK} tokens in the KV cache.", load.blocks)
        yield _gauge("fate_kv_blocks_used", "Of those, the ones that requests have or that are kept for others.", load.blocks_used)
        yield _gauge("fate_kv_blocks_kept", "Of those, the ones that are kept for requests that begin alike.", load.blocks_kept)
        yield _counter(
            "fate_prefix_lookup_tokens", "Tokens of prompts that were looked for among what is kept.", load.prefixes.prompt_tokens
        )
        yield _counter("fate_prefix_hit_tokens", "Of those, the ones that did not have to be read.", load.prefixes.cached_tokens)
        yield _counter("fate_prefix_saved_seconds", "Seconds that reading those would have taken.", load.prefixes.saved_seconds)
        yield _gauge("fate_prefix_kept_bytes", "Bytes of the KV cache that are kept in RAM.", load.prefixes.kept_bytes)
        yield _gauge("fate_prefix_disk_bytes", "Bytes that are kept on the disk, of all models.", load.prefixes.disk_bytes)
        yield _counter("fate_prefix_disk_read_bytes", "Bytes that were read from there.", load.prefixes.disk_read_bytes)
        yield _counter("fate_prefix_disk_written_bytes", "Bytes that were written there.", load.prefixes.disk_written_bytes)
        drafted = CounterMetricFamily(
            "fate_draft_tokens", "Drafted tokens that were checked beside a text's last one, by their source.", labels=["source"]
        )
        accepted = CounterMetricFamily(
            "fate_draft_tokens_accepted", "Of those, the ones that became part of a text.", labels=["source"]
        )
        for source in SOURCES:
            for family, number in zip((drafted, accepted), load.drafts.by_source.get(source, (0, 0)), strict=True):
                family.add_metric([source], number)
        yield drafted
        yield accepted
        experts = report.experts
        lookups = CounterMetricFamily("fate_expert_lookups", "Lookups of experts, by what was found.", labels=["result"])
        for result, number in (("hit", experts.hits), ("in_flight", experts.in_flight), ("miss", experts.misses)):
            lookups.add_metric([result], number)
        yield lookups
        yield _counter("fate_expert_read_bytes", "Bytes of experts that were moved into slots.", experts.bytes_read)
        yield _counter("fate_expert_stall_seconds", "Seconds in which the model waited for experts.", experts.stall_seconds)
        yield _counter("fate_expert_prefetches", "Experts that were read ahead.", experts.prefetched)
        yield _counter("fate_expert_prefetches_used", "Of those, the ones that were used.", experts.prefetch_used)
        unused = max(0, experts.prefetched - experts.prefetch_used)
        yield _gauge("fate_expert_prefetches_unused", "Read ahead and not used (yet).", unused)
        yield _gauge("fate_memory_budget_bytes", "Memory that the process may take.", report.budget_bytes)
        yield _gauge("fate_memory_peak_bytes", "The most that it took so far.", report.peak_bytes)
        yield _gauge("fate_memory_resident_bytes", "What it takes now.", resident_memory())
        if report.vram_budget_bytes:
            yield _gauge("fate_vram_budget_bytes", "Memory of the GPU that may be taken.", report.vram_budget_bytes)
            yield _gauge("fate_vram_peak_bytes", "The most of it that was taken so far.", report.vram_peak_bytes)
        if (activity := card.model.fate.activity()) is not None:
            slots = GaugeMetricFamily("fate_expert_slots", "Experts in memory, by MoE layer.", labels=["layer"])
            for layer, number in sorted(Count(expert.layer for expert in activity.resident()).items()):
                slots.add_metric([str(layer)], number)
            yield slots


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value)
