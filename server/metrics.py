"""Prometheus metrics: ``vllm:`` has vLLM's names, labels and meanings, which routers and autoscalers read; ``tidar:`` is ours.

Counters and gauges of the engine are pulled from its newest snapshot when Prometheus scrapes; histograms and results are
observed here, where a request begins and ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from engine import Engine, EngineStats, RequestTimes

ENGINE_INDEX = "0"
"""vLLM numbers its engine replicas; here there is one."""

_LABELS = ("model_name", "engine")

_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_STEP = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_REQUEST = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_TOKENS = tuple(scale * 10**power for power in range(6) for scale in (1, 2, 5))
_PER_FORWARD = (1, 1.25, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 10, 12, 16)

_SECONDS = {
    "time_to_first_token_seconds": ("Seconds from arrival to the first token.", _FIRST_TOKEN),
    "inter_token_latency_seconds": ("Seconds between two steps that gave a request tokens; once a step.", _STEP),
    "request_time_per_output_token_seconds": ("Mean seconds per token after the first, once a request.", _STEP),
    "e2e_request_latency_seconds": ("Seconds from arrival to the last token.", _REQUEST),
    "request_queue_time_seconds": ("Seconds from arrival to the first scheduling.", _REQUEST),
    "request_prefill_time_seconds": ("Seconds from the first scheduling to the first token.", _REQUEST),
    "request_decode_time_seconds": ("Seconds from the first token to the last.", _REQUEST),
    "request_prompt_tokens": ("Prompt tokens of a request.", _TOKENS),
    "request_generation_tokens": ("Generated tokens of a request.", _TOKENS),
}

_COUNTERS = {
    "vllm:prompt_tokens": ("prompt_tokens", "Prompt tokens of admitted requests."),
    "vllm:generation_tokens": ("generation_tokens", "Generated tokens."),
    "vllm:num_preemptions": ("num_preemptions", "Requests that gave their pages back and were computed again."),
    "vllm:prefix_cache_queries": ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
    "vllm:prefix_cache_hits": ("prefix_cache_hits", "Prompt tokens found in the prefix cache."),
    "vllm:spec_decode_num_drafts": ("num_drafts", "Steps that verified drafts."),
    "vllm:spec_decode_num_draft_tokens": ("num_draft_tokens", "Draft tokens verified."),
    "vllm:spec_decode_num_accepted_tokens": ("num_accepted_tokens", "Draft tokens accepted."),
    "tidar:steps": ("num_steps", "Engine steps."),
    "tidar:forwards": ("forwards", "Forwards that verified or redrafted, summed over requests."),
    "tidar:branch_hits": ("branch_hits", "Steps whose accepted count was that of a branch in the plan."),
    "tidar:branch_misses": ("branch_misses", "Steps whose accepted count was that of no branch in the plan."),
    "tidar:step_seconds": ("step_seconds", "Seconds spent in engine steps."),
    "tidar:host_seconds": ("host_seconds", "Seconds of engine steps spent on scheduling them and on their results."),
    "tidar:launch_seconds": (
        "launch_seconds",
        "Seconds of engine steps spent on putting them on the device; without a GPU, on computing them.",
    ),
}

_GAUGES = {
    "vllm:num_requests_running": ("num_running", "Requests in the running batch."),
    "vllm:num_requests_waiting": ("num_waiting", "Requests waiting to be scheduled."),
    "vllm:kv_cache_usage_perc": ("kv_cache_usage", "Share of KV pages in use; 1 is all of them."),
}

EAGER_REASONS = {
    "prefill": "a prompt is read",
    "diffusion": "a request is in mode diffusion",
    "grammar": "a request follows a grammar",
    "size": "no captured step takes so many requests with these plans",
    "padding": "the captured step that takes it would compute too many rows for nothing",
    "options": "sampling options that the captured step of this size does not have",
}
"""Why a step is not replayed: the reasons of ``engine.cuda_graphs.StepGraphs``, and what they mean."""


@dataclass(frozen=True, slots=True)
class FinishedChoice:
    """What is known of a choice at its end. ``times`` are the engine's, absent when the server ended it."""

    reason: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    decode_seconds: float | None
    times: RequestTimes | None
    tokens_per_forward: float | None


class ServerMetrics:
    """The metrics of one app, in a registry of its own or of the caller's."""

    def __init__(self, registry: CollectorRegistry, engine: Engine, model_name: str) -> None:
        self._registry = registry
        labels = (model_name, ENGINE_INDEX)
        self._seconds = {
            name: Histogram(f"vllm:{name}", text, _LABELS, buckets=buckets, registry=registry).labels(*labels)
            for name, (text, buckets) in _SECONDS.items()
        }
        self._token_latency = Histogram(
            "tidar:per_token_latency_seconds",
            "Seconds between two tokens; those of one step share its time.",
            _LABELS,
            buckets=_STEP,
            registry=registry,
        ).labels(*labels)
        self._tokens_per_forward = Histogram(
            "tidar:request_tokens_per_forward",
            "Tokens per forward after the first token, once a request.",
            _LABELS,
            buckets=_PER_FORWARD,
            registry=registry,
        ).labels(*labels)
        success = Counter("vllm:request_success", "Ended requests.", (*_LABELS, "finished_reason"), registry=registry)
        self._ended = {reason: success.labels(*labels, reason) for reason in ("stop", "length", "abort", "error")}
        registry.register(EngineCollector(engine, model_name))

    def observe_first_token(self, seconds: float) -> None:
        """A choice got its first token, ``seconds`` after arrival."""
        self._seconds["time_to_first_token_seconds"].observe(seconds)

    def observe_step(self, seconds: float, num_tokens: int) -> None:
        """A later step gave a choice ``num_tokens``, ``seconds`` after the one before."""
        self._seconds["inter_token_latency_seconds"].observe(seconds)
        for _ in range(num_tokens):
            self._token_latency.observe(seconds / num_tokens)

    def observe_finish(self, choice: FinishedChoice) -> None:
        """A choice ended; those that failed or were aborted are counted by reason and tokens only."""
        self._ended[choice.reason].inc()
        self._seconds["request_prompt_tokens"].observe(choice.prompt_tokens)
        self._seconds["request_generation_tokens"].observe(choice.completion_tokens)
        if choice.reason not in ("stop", "length"):
            return
        self._seconds["e2e_request_latency_seconds"].observe(choice.seconds)
        if choice.decode_seconds is not None:
            self._seconds["request_decode_time_seconds"].observe(choice.decode_seconds)
            if choice.completion_tokens > 1:
                per_token = choice.decode_seconds / (choice.completion_tokens - 1)
                self._seconds["request_time_per_output_token_seconds"].observe(per_token)
        if choice.times is not None:
            times = choice.times
            self._seconds["request_queue_time_seconds"].observe(times.scheduled - times.arrival)
            self._seconds["request_prefill_time_seconds"].observe(times.first_token - times.scheduled)
        if choice.tokens_per_forward is not None:
            self._tokens_per_forward.observe(choice.tokens_per_forward)

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)


class EngineCollector(Collector):
    """Turns the engine's newest snapshot into samples at scrape time."""

    def __init__(self, engine: Engine, model_name: str) -> None:
        self._engine = engine
        self._labels = (model_name, ENGINE_INDEX)

    def describe(self) -> Iterable[Metric]:
        """Nothing: the registry must not need a started engine to learn the names."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """All samples of one snapshot."""
        stats = self._engine.stats()
        for name, (field, text) in _GAUGES.items():
            yield self._one(GaugeMetricFamily(name, text, labels=_LABELS), getattr(stats, field))
        for name, (field, text) in _COUNTERS.items():
            yield self._one(CounterMetricFamily(name, text, labels=_LABELS), getattr(stats, field))
        yield self._accepted_per_position(stats)
        yield self._rows(stats)
        yield from self._launches(stats)
        yield from self._plan(stats)
        yield self._cache_config()

    def _one(self, family: GaugeMetricFamily | CounterMetricFamily, value: float) -> Metric:
        family.add_metric(self._labels, value)
        return family

    def _accepted_per_position(self, stats: EngineStats) -> Metric:
        text = "Draft tokens accepted, by their position in the draft."
        family = CounterMetricFamily("vllm:spec_decode_num_accepted_tokens_per_pos", text, labels=(*_LABELS, "position"))
        for position, count in enumerate(stats.accepted_per_position):
            family.add_metric((*self._labels, str(position)), count)
        return family

    def _rows(self, stats: EngineStats) -> Metric:
        family = CounterMetricFamily("tidar:rows", "Rows that went through the model, by kind.", labels=(*_LABELS, "kind"))
        for kind, count in (("prefill", stats.prefill_rows), ("draft", stats.draft_rows), ("mask", stats.mask_rows)):
            family.add_metric((*self._labels, kind), count)
        return family

    def _launches(self, stats: EngineStats) -> Iterator[Metric]:
        """How many steps were CUDA graphs, and why the others were not; nothing where no step is captured."""
        if not stats.launches and self._engine.info.settings.get("captured steps", "none") == "none":
            return
        reasons = "; ".join(f"{reason}: {meaning}" for reason, meaning in EAGER_REASONS.items())
        text = f"Launched steps: replayed as a CUDA graph, or eager, operation by operation, for a reason. {reasons}."
        family = CounterMetricFamily("tidar:launched_steps", text, labels=(*_LABELS, "mode", "reason"))
        # From 0 on, or the first count of a reason would be no increase to Prometheus.
        counts = {"replayed": 0, **dict.fromkeys(EAGER_REASONS, 0), **dict(stats.launches)}
        for outcome, count in counts.items():
            mode = ("replayed", "") if outcome == "replayed" else ("eager", outcome)
            family.add_metric((*self._labels, *mode), count)
        yield family

    def _plan(self, stats: EngineStats) -> Iterator[Metric]:
        """The plan that ``auto`` follows, and why: what every plan was expected to give when it was chosen."""
        if not stats.plan:
            return
        plan = GaugeMetricFamily("tidar:plan_info", "The draft plan that auto follows; always 1.", labels=(*_LABELS, "plan"))
        plan.add_metric((*self._labels, stats.plan), 1)
        yield plan
        text = "Tokens per second that a plan was expected to give when the plan in force was chosen."
        goodput = GaugeMetricFamily("tidar:plan_expected_goodput", text, labels=(*_LABELS, "plan"))
        for name, value in stats.plan_goodput:
            goodput.add_metric((*self._labels, name), value)
        yield goodput

    def _cache_config(self) -> Metric:
        info = self._engine.info
        family = GaugeMetricFamily(
            "vllm:cache_config_info",
            "The KV cache's shape; always 1.",
            labels=(*_LABELS, "block_size", "num_gpu_blocks"),
        )
        family.add_metric((*self._labels, str(info.page_size), str(info.num_pages)), 1)
        return family
