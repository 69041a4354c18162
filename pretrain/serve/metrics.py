"""What /metrics tells Prometheus."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


class Metrics:
    """Of one server; two in a process do not share them."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self._registry}
        self.requests = Counter("textldm_requests", "Answered requests", ["route", "status"], **own)
        self.refused = Counter("textldm_refused", "Requests that met a full queue", **own)
        self.gone = Counter("textldm_gone", "Requests whose client did not wait for the answer", **own)
        self.prompt_tokens = Counter("textldm_prompt_tokens", "Tokens of answered prompts", **own)
        self.new_tokens = Counter("textldm_new_tokens", "Tokens of answers, before the end of text", **own)
        self.waiting = Gauge("textldm_waiting", "Texts that wait", **own)
        self.running = Gauge("textldm_running", "Texts that are being drawn", **own)
        self.calls = Histogram("textldm_call_texts", "Texts of a packed call", buckets=[2**i for i in range(11)], **own)
        self.seconds = Histogram(
            "textldm_request_seconds", "From a request's arrival to its answer's end", ["route"],
            buckets=[0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120], **own,
        )  # fmt: skip

    def page(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
