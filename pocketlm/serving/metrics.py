"""Metrics of the server in Prometheus format, as returned by /metrics."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 300)  # seconds
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)  # sequences


class ServerMetrics:
    """Counters, histograms and gauges of one server, in their own registry."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "serve_requests",
            "HTTP requests; status 499: the client disconnected before the response",
            ["endpoint", "status"],
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "serve_prompt_tokens",
            "Prompt tokens of requests that joined the batch",
            registry=registry,
        )
        self.completion_tokens = Counter(
            "serve_completion_tokens", "Generated tokens", registry=registry
        )
        self.cancelled = Counter(
            "serve_cancelled", "Calls whose client disconnected before the end", registry=registry
        )
        self.failures = Counter(
            "serve_engine_failures",
            "Exceptions in the engine; each one ends the calls that it concerns",
            registry=registry,
        )
        self.first_token = Histogram(
            "serve_first_token_seconds",
            "Time from a call to its first token",
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )
        self.step_rows = Histogram(
            "serve_step_rows",
            "Sequences in a decoding step",
            buckets=BATCH_BUCKETS,
            registry=registry,
        )
        self.waiting = Gauge(
            "serve_waiting_requests", "Requests that have not joined the batch", registry=registry
        )
        self.running = Gauge("serve_running_rows", "Slots in use", registry=registry)
