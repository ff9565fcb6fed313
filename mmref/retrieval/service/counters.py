"""What the service counts, in the text format of Prometheus."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Counters:
    """Counters of one service."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("mmref_requests", "Requests answered", ["route", "status"], registry=self.registry)
        self.seconds = Histogram("mmref_request_seconds", "Time to answer", ["route"], buckets=BUCKETS, registry=self.registry)
        self.in_flight = Gauge("mmref_requests_in_flight", "Requests being answered", registry=self.registry)
        self.held = Gauge("mmref_bytes_held", "Bytes of bodies and of answers being taken", registry=self.registry)
        self.given_up = Counter("mmref_given_up", "Slow transfers given up for others", registry=self.registry)
        self.stages = Counter(
            "mmref_stage_seconds", "Time of searches by stage; a batch counts once", ["index", "stage"],
            registry=self.registry,
        )  # fmt: skip
        self.batches = Histogram(
            "mmref_batch_queries", "Queries answered together, as each query saw it", ["index"],
            buckets=(1, 2, 4, 8, 16, 32), registry=self.registry,
        )  # fmt: skip
        self.items = Gauge("mmref_index_items", "Items of an index", ["index"], registry=self.registry)
        self.generation = Gauge("mmref_index_generation", "Generation in use", ["index"], registry=self.registry)

    def searched(self, index: str, answer: dict[str, Any]) -> None:
        """Count the answer of a search."""
        for stage, seconds in answer["seconds"].items():
            self.stages.labels(index, stage).inc(seconds / answer["batch"])
        self.batches.labels(index).observe(answer["batch"])
        self.holds(index, answer)

    def holds(self, index: str, answer: dict[str, Any]) -> None:
        """Note what an index holds, as an answer says it."""
        self.items.labels(index).set(answer["items"])
        self.generation.labels(index).set(answer["generation"])

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self.registry)
