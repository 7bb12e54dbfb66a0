"""`GET /metrics`, in Prometheus's format."""

import time
from collections import Counter as Counts
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from qlora_serve.serve.api.caller import Caller
from qlora_serve.serve.engine.engine import Engine
from qlora_serve.serve.engine.registry import AdapterRegistry
from qlora_serve.serve.engine.request import GenerationRequest, Usage

_MOST_NAMES = 100
"""Adapters with labels of their own; all further ones are counted as `other`."""
_OTHER = "other"
_DEVICE_BYTES = "qlora_serve_adapter_device_bytes"
_RUNNING, _WAITING = "running_lora_adapters", "waiting_lora_adapters"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """What is counted, by adapter; prompts and keys are never part of it."""

    def __init__(
        self, engine: Engine, base_name: str, adapters: AdapterRegistry | None = None
    ) -> None:
        self._base_name = base_name
        self._names: set[str] = set()
        self.registry = CollectorRegistry(auto_describe=True)
        self.registry.register(_EngineState(engine, self._label))
        if adapters is not None:
            self.registry.register(_AdapterState(adapters, self._label))

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"qlora_serve_{name}", text, ["adapter", *labels],
                           registry=self.registry)  # fmt: skip

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"qlora_serve_{name}", text, ["adapter"], buckets=_SECONDS,
                             registry=self.registry)  # fmt: skip

        self._requests = counter("requests", "Answers that ended, and how.", "reason")
        self._prompt = counter("prompt_tokens", "Tokens of prompts.")
        self._cached = counter("cached_prompt_tokens", "Tokens of prompts that were in the cache.")
        self._completion = counter("completion_tokens", "Tokens of answers.")
        self._first = histogram("time_to_first_token_seconds", "From arrival to the first text.")
        self._between = histogram("inter_token_latency_seconds", "Between tokens of an answer.")

    def page(self, caller: Caller | None = None) -> bytes:
        """The text that Prometheus reads.

        Args:
            caller: who is told only of the adapters that it may use; None is told all.
        """
        registry: Any = self.registry
        if caller is not None:
            registry = _Visible(self.registry, caller, self._base_name)
        return generate_latest(registry)

    def name(self, request: GenerationRequest) -> str:
        """The label of a request: its adapter's name, the base's, or `other`."""
        adapter = request.adapter
        return self._label(self._base_name if adapter is None else str(adapter.name))

    def _label(self, name: str) -> str:
        """A name as a label; there are never more than `_MOST_NAMES`."""
        if name not in self._names:
            if len(self._names) >= _MOST_NAMES:
                return _OTHER
            self._names.add(name)
        return name

    def entered(self, requests: Iterable[GenerationRequest]) -> None:
        """Answers have been accepted."""
        for request in requests:
            self.name(request)  # known from now on, and not only when it ends

    def refused(self, requests: Sequence[GenerationRequest]) -> None:
        """Answers were refused because too many are waiting."""
        self._requests.labels(self.name(requests[0]), "overloaded").inc(len(requests))

    def first_token(self, request: GenerationRequest, seconds: float) -> None:
        """An answer's first text came."""
        self._first.labels(self.name(request)).observe(seconds)

    def next_tokens(self, request: GenerationRequest, seconds: float, count: int) -> None:
        """More tokens came, `seconds` after the last."""
        histogram = self._between.labels(self.name(request))
        for _ in range(count):
            histogram.observe(seconds / count)

    def ended(self, request: GenerationRequest, usage: Usage, reason: str) -> None:
        """An answer ended."""
        name = self.name(request)
        self._requests.labels(name, reason).inc()
        self._prompt.labels(name).inc(usage.prompt_tokens)
        self._cached.labels(name).inc(usage.cached_tokens)
        self._completion.labels(name).inc(usage.completion_tokens)

    def left(self, request: GenerationRequest) -> None:
        """Nobody waits for an answer any longer."""
        self._requests.labels(self.name(request), "abort").inc()


class _Visible(Collector):
    """A registry without the labels of adapters that a caller may not use."""

    def __init__(self, registry: CollectorRegistry, caller: Caller, base_name: str) -> None:
        self._registry = registry
        self._caller = caller
        self._base_name = base_name

    def collect(self) -> Iterator[Metric]:
        """The metrics, with what is hidden left out."""
        for metric in self._registry.collect():
            if metric.name == _DEVICE_BYTES:
                continue  # the hidden ones are in the sum
            shown = copy(metric)
            shown.samples = [
                sample._replace(labels=self._labels(sample.labels))
                for sample in metric.samples
                if self._may_see(sample.labels.get("adapter", self._base_name))
            ]
            yield shown

    def _labels(self, labels: dict[str, str]) -> dict[str, str]:
        lists = {name: labels[name].split(",") for name in (_RUNNING, _WAITING) if labels.get(name)}
        return labels | {name: ",".join(filter(self._may_see, one)) for name, one in lists.items()}

    def _may_see(self, label: str) -> bool:
        if label == self._base_name:
            return True  # also what belongs to no adapter
        return label != _OTHER and all(map(self._caller.allows, label.split("+")))


class _AdapterState(Collector):
    """What is read from the adapters' places when somebody asks."""

    def __init__(self, adapters: AdapterRegistry, label: Callable[[str], str]) -> None:
        self._adapters = adapters
        self._label = label

    def collect(self) -> Iterator[Metric]:
        """The memory that adapters take, and how often they came and went."""
        residency = self._adapters.residency
        used = GaugeMetricFamily(
            _DEVICE_BYTES, "Memory of the device that adapters take.",
            value=residency.used,
        )  # fmt: skip
        yield used
        names = {
            entry.content.identity: entry.name
            for entry in reversed(self._adapters.entries())
            if entry.content is not None
        }
        loads, evictions = residency.moves()
        for name, text, counts in (
            ("loads", "Times that an adapter was put on the device.", loads),
            ("evictions", "Times that an adapter on the device made room for another.", evictions),
        ):
            by_label: Counts[str] = Counts()
            for identity, count in counts.items():
                if identity in names:  # else it is only held by requests of a name that is gone
                    by_label[self._label(names[identity])] += count
            family = CounterMetricFamily(f"qlora_serve_adapter_{name}", text, labels=["adapter"])
            for label, count in sorted(by_label.items()):
                family.add_metric([label], count)
            yield family


class _EngineState(Collector):
    """What is read from the engine when somebody asks."""

    def __init__(self, engine: Engine, label: Callable[[str], str]) -> None:
        self._engine = engine
        self._label = label

    def collect(self) -> Iterator[Metric]:
        """The gauges of this moment."""
        scheduler: Any = self._engine.scheduler

        def gauge(name: str, text: str, value: float) -> Metric:
            return GaugeMetricFamily(f"qlora_serve_{name}", text, value=value)

        yield gauge("running", "Answers that have a place.", scheduler.running)
        yield gauge("waiting", "Answers that wait for a place.", scheduler.waiting)
        yield gauge("kv_blocks_used", "Blocks of keys and values in use.", scheduler.blocks.used)
        yield gauge("kv_blocks", "Blocks of keys and values.", scheduler.blocks.total)
        share = scheduler.blocks.used / max(1, scheduler.blocks.total)
        yield gauge("kv_usage_ratio", "The share of the blocks that is in use.", share)
        preemptions = CounterMetricFamily(
            "qlora_serve_preemptions", "Answers that gave back their place for a while.",
            value=scheduler.preemptions,
        )  # fmt: skip
        yield preemptions
        # The name and labels that gateways which route by adapter look for.
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters with answers on their way.",
            labels=[_RUNNING, _WAITING, "max_lora"],
        )
        placed = self._engine.placed()
        running, waiting = (
            ",".join(
                sorted({self._label(name) for name, has in placed.items() if name and has is it})
            )
            for it in (True, False)
        )
        most = str(self._engine.limits.max_sequences)
        info.add_metric([running, waiting, most], time.time())
        yield info
