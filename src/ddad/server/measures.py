"""What the server counts and times, for Prometheus."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

STAGES = ("decode", "queue", "network", "draw", "store")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Measures:
    """Counters of one server; a registry of its own, so that two servers in a process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "ddad_requests", "Requests by route and status.", ["method", "route", "status"], registry=self.registry
        )
        self.request_seconds = Histogram(
            "ddad_request_seconds",
            "Seconds from request to answer.",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.stage_seconds = Histogram(
            "ddad_stage_seconds",
            "Seconds of one photograph (network: of one batch) by stage.",
            ["stage"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.batch_size = Histogram(
            "ddad_batch_size",
            "Photographs that went through the network together.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self.registry,
        )
        self.verdicts = Counter(
            "ddad_verdicts", "Photographs by verdict.", ["model", "verdict"], registry=self.registry
        )
        self.refused = Counter(
            "ddad_refused", "Files and requests refused, by reason.", ["reason"], registry=self.registry
        )
        self.drift = Gauge(
            "ddad_drift",
            "1 where recent photographs differ from those of calibration.",
            ["model", "quantity"],
            registry=self.registry,
        )
        self._queue = Gauge("ddad_queue_length", "Photographs that wait.", ["model"], registry=self.registry)
        self._versions = Gauge(
            "ddad_model_info", "1 for the version in use.", ["model", "version"], registry=self.registry
        )
        for stage in STAGES:
            self.stage_seconds.labels(stage)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage, also when it fails."""
        started = perf_counter()
        try:
            yield
        finally:
            self.stage_seconds.labels(name).observe(perf_counter() - started)

    def queue_length(self, model: str, length: Callable[[], int]) -> None:
        """Where to read the number of waiting photographs of a model."""
        self._queue.labels(model).set_function(length)

    def version(self, model: str, number: str) -> None:
        """The version of a model in use, from now on."""
        for labels in [one.labels for metric in self._versions.collect() for one in metric.samples]:
            if labels["model"] == model:
                self._versions.remove(model, labels["version"])
        self._versions.labels(model, number).set(1)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)
