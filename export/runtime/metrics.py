"""What `GET /metrics` of m3vit serve counts and times. No torch."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.process_collector import ProcessCollector

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)  # buckets of the latency histogram


class Metrics:
    """What `GET /metrics` shows, besides the process's own memory, time and files."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        labels = ("task", "status")
        self.requests = Counter("m3vit_requests", "Answered requests.", labels, registry=self.registry)
        self.seconds = Histogram(
            "m3vit_request_seconds",
            "From a request's head to its answer's end.",
            ("task",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.in_flight = Gauge("m3vit_requests_in_flight", "Requests being read or answered.", registry=self.registry)
        self.rejected = Counter("m3vit_requests_rejected", "Requests refused as too many.", registry=self.registry)
        self.fallbacks = Counter("m3vit_fallbacks", "Answers of a smaller budget.", registry=self.registry)
        self._cut = Counter(
            "m3vit_cut", "Clients cut off: too slow, or making way.", ("reason",), registry=self.registry
        )

    def cut(self, reason: str) -> None:
        """Count a client that was cut off."""
        self._cut.labels(reason).inc()
