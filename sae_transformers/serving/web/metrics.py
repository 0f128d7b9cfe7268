"""Numbers for Prometheus, of one application."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..engine import Engine
from .record import RequestRecord, Traffic

SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counts of requests and tokens, and the state of the engine at the moment of asking.

    Args:
        engine: that writes the answers.
        plans: how many compiled steerings the model keeps.
        is_ready: whether `/ready` says so.
        traffic: of the application.
    """

    def __init__(
        self, engine: Engine, plans: Callable[[], int], is_ready: Callable[[], bool], traffic: Traffic
    ) -> None:
        self.registry = CollectorRegistry()
        self._requests = self._counter("requests", "Requests by endpoint and status of HTTP.", "endpoint", "status")
        self._errors = self._counter("errors", "Requests and answers that failed, by the code they were told.", "code")
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of texts and prompts that were read.")
        self._written_tokens = self._counter("written_tokens", "Tokens of answers.")
        name, told = "sae_transformers_request_seconds", "From the head of a request to the end of its answer."
        self._seconds = Histogram(name, told, ["endpoint"], buckets=SECONDS, registry=self.registry)
        for name, told, value in (
            ("queue_length", "Answers that wait for a row of the batch.", lambda: len(engine.waiting)),
            ("batch_rows", "Answers that are being written.", lambda: len(engine.running)),
            ("batch_steerings", "Different steerings in the batch.", lambda: len(engine.batch.steerings)),
            ("batch_cache_bytes", "Memory of the batch's keys and values.", lambda: engine.batch.cache_bytes),
            ("steering_plans", "Compiled steerings that the model keeps.", plans),
            ("forward_passes", "Forward passes since the start.", lambda: engine.steps),
            ("connections", "Open connections.", lambda: traffic.connections()),
            ("ready", "1 where /ready says so.", is_ready),
        ):
            Gauge(f"sae_transformers_{name}", told, registry=self.registry).set_function(value)

    def _counter(self, name: str, told: str, *labels: str) -> Counter:
        return Counter(f"sae_transformers_{name}", told, labels, registry=self.registry)

    def count(self, record: RequestRecord) -> None:
        """Add a request that has ended."""
        self._requests.labels(record.endpoint, str(record.status)).inc()
        self._seconds.labels(record.endpoint).observe(record.seconds)
        self._prompt_tokens.inc(record.prompt_tokens)
        self._written_tokens.inc(record.written_tokens)
        if record.error is not None:
            self._errors.labels(record.error).inc()

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self.registry)
