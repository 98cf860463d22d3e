"""The server's metrics, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 300)


class ServerMetrics:
    """What is counted, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        here = {"registry": self.registry}
        self.requests = Counter(
            "serve_requests",
            "HTTP requests; status 499: the client left first",
            ["endpoint", "status"],
            **here,
        )
        self.prompt_tokens = Counter(
            "serve_prompt_tokens", "Tokens of prompts that joined the batch", **here
        )
        self.completion_tokens = Counter("serve_completion_tokens", "Tokens drawn", **here)
        self.cancelled = Counter(
            "serve_cancelled", "Calls whose client left before the end", **here
        )
        self.failures = Counter(
            "serve_engine_failures",
            "Exceptions of the engine, each of which ends all that runs",
            **here,
        )
        self.first_token = Histogram(
            "serve_first_token_seconds", "From a call to its first token", buckets=SECONDS, **here
        )
        self.step_rows = Histogram(
            "serve_step_rows",
            "Rows of a step of the engine",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
            **here,
        )
        self.waiting = Gauge(
            "serve_waiting_requests", "Requests that no step has taken in yet", **here
        )
        self.running = Gauge("serve_running_rows", "Rows of the batch in use", **here)
