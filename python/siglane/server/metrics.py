"""What the server counts. Every label set is fixed here: no client can add a series."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

Outcome = Literal["ok", "client_error", "server_error", "rejected", "cancelled"]
STAGES = ("fetch", "decode", "prepare", "queue", "encode", "prefill", "generate")
METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

# field of EngineStats -> (metric, help); a field that only grows is a counter
_ENGINE_GAUGES = {
    "running": ("siglane_engine_running", "Requests that the engine computes"),
    "waiting": ("siglane_engine_waiting", "Requests that wait for a place in the engine"),
    "pages_total": ("siglane_kv_pages", "Pages of the KV cache"),
    "pages_free": ("siglane_kv_pages_free", "Pages of the KV cache that hold nothing"),
    "pages_cached": ("siglane_kv_pages_cached", "Pages of the KV cache kept for prompts that begin alike"),
    "feature_bytes": ("siglane_feature_cache_bytes", "Bytes of encoded images kept"),
}
_ENGINE_COUNTERS = {
    "feature_hits": ("siglane_feature_cache_hits", "Images found encoded"),
    "feature_misses": ("siglane_feature_cache_misses", "Images that had to be encoded"),
    "encoded_images": ("siglane_encoded_images", "Images that the vision tower encoded"),
    "cached_tokens": ("siglane_prefix_cached_tokens", "Prompt tokens taken from the prefix cache"),
    "computed_tokens": ("siglane_computed_tokens", "Tokens that the language model computed"),
    "steps": ("siglane_engine_steps", "Steps of the engine"),
}


class Metrics:
    """All metrics of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        timing: dict[str, Any] = {**own, "buckets": _SECONDS}
        self._keys = Counter("siglane_key_requests", "Requests to the model by API key", ["key", "outcome"], **own)
        self._http = Counter("siglane_http_requests", "HTTP requests", ["route", "method", "status"], **own)
        self._requests = Counter("siglane_requests", "Requests to the model by how they ended", ["outcome"], **own)
        self._tokens = Counter("siglane_tokens", "Tokens of answered requests", ["kind"], **own)
        self._stages = Histogram("siglane_stage_seconds", "Seconds of a request by stage", ["stage"], **timing)
        self._duration = Histogram("siglane_request_seconds", "Seconds from request to last token", **timing)
        self.first_token = Histogram("siglane_time_to_first_token_seconds", "Seconds to the first token", **timing)
        self.images = Counter("siglane_images", "Images in answered requests", **own)
        self.in_flight = Gauge("siglane_requests_in_flight", "Requests to the model being worked on", **own)
        self.inflight_bytes = Gauge("siglane_inflight_bytes", "Bytes of bodies and images held for requests", **own)

    def watch_engine(self, read: Callable[[], object]) -> None:
        """Adds the engine's numbers, read when they are asked for. read: -> EngineStats."""
        self.registry.register(_EngineCollector(read))

    def count_http(self, route: str, method: str, status: int) -> None:
        self._http.labels(route, method if method in METHODS else "other", str(status)).inc()

    def count_request(self, outcome: Outcome, seconds: float, key: str = "") -> None:
        """key: the name of the one it came with, which the operator chose; "" for none."""
        self._requests.labels(outcome).inc()
        if key:
            self._keys.labels(key, outcome).inc()
        if outcome == "ok":
            self._duration.observe(seconds)

    def count_tokens(self, *, prompt: int, cached: int, image: int, completion: int) -> None:
        for kind, count in (("prompt", prompt), ("cached", cached), ("image", image), ("completion", completion)):
            self._tokens.labels(kind).inc(count)

    def observe_stages(self, seconds: Mapping[str, float]) -> None:
        for stage in STAGES:
            if stage in seconds:
                self._stages.labels(stage).observe(seconds[stage])


class _EngineCollector:
    def __init__(self, read: Callable[[], object]) -> None:
        self._read = read

    def describe(self) -> list[Any]:  # without it, registering would already ask the engine
        return []

    def collect(self) -> Iterator[Any]:
        stats = self._read()
        if stats is None:  # not ready yet
            return
        for field, (name, help) in _ENGINE_GAUGES.items():
            yield GaugeMetricFamily(name, help, value=getattr(stats, field))
        for field, (name, help) in _ENGINE_COUNTERS.items():
            yield CounterMetricFamily(name, help, value=getattr(stats, field))
