"""Everything that can be set about the server; flags and environment variables are generated from these fields.

Light on purpose: no torch, no web framework, so that a bad port or a missing model is reported at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from siglane.errors import ConfigError
from siglane.settings.keys import is_key
from siglane.settings.media import MIB, MediaConfig
from siglane.settings.options import above_zero, at_least, option
from siglane.types import SAMPLING_BOUNDS

ROOT_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)+")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig(MediaConfig):
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 lets others in")
    port: int = option(8000, "TCP port; 0 takes a free one")
    api_key: str | None = option(
        None, "key that clients must send as a bearer token, except to /health, /ready and /metrics", repr=False
    )
    api_keys: Path | None = option(
        None,
        "file of further keys, one a line, or a .toml with limits for each; clients of different keys "
        "share no files, batches and caches",
    )
    uds: Path | None = option(None, "Unix socket to listen on in place of host and port")
    ssl_certfile: Path | None = option(None, "certificate chain (PEM): serve HTTPS")
    ssl_keyfile: Path | None = option(None, "private key (PEM) of the certificate; none: it is in the same file")
    root_path: str = option("", "path under which a proxy shows the server, as /siglane; read with and without it")
    served_model_name: str | None = option(
        None, "name of the model in the API; default: MODEL as given (a folder: its name)"
    )
    model_aliases: tuple[str, ...] = option((), "further names the model answers to")
    tagger: str | None = option(
        None,
        "SigLIP with both towers for /v1/embeddings and /v1/classify beside the chat; an image tower that "
        "is the chat model's own is loaded once",
    )
    playground: bool = option(True, "a page at / to try the model; it asks no other server")
    cors_origins: tuple[str, ...] = option((), "web origins whose pages may call the server; none by default")
    sampling_defaults: Literal["model", "openai"] = option(
        "model",
        "what requests get that name no temperature, top_p and so on: model: what the checkpoint's "
        "generation_config.json states, OpenAI's defaults for the rest; openai: those alone",
    )
    default_temperature: float | None = option(
        None, "temperature of requests that name none; none: as sampling_defaults says"
    )

    max_queue: int = option(256, "requests being read, waiting or running at one time; more are answered 503")
    max_body_bytes: int = option(64 * MIB, "largest request body")
    max_inflight_bytes: int = option(
        4096 * MIB, "bodies, files and patches of all requests together; a request beyond it is answered 503"
    )
    text_cache_bytes: int = option(
        128 * MIB,  # 16,384 labels, the most of one request, have 85 MB at width 1152
        "bytes of embedded texts kept, so that labels that come again are not embedded again",
    )
    patch_cache_bytes: int | None = option(
        None,
        "bytes of decoded images and videos kept, so that equal files are decoded once; 0: nothing is; "
        "none: 128M, in `siglane batch`, which asks about equal ones one after the other, 32M",
    )
    max_label_texts: int = option(16384, "labels x templates of one classification; more are answered 400")
    body_timeout: float = option(30.0, "seconds a client has to send its request body")
    idle_timeout: int = option(30, "seconds a connection may stay without a (whole) request header")
    stall_timeout: float = option(30.0, "seconds a client may leave its answer unread before it is dropped")
    sse_keep_alive: float = option(15.0, "seconds of silence after which a stream gets a comment line; 0: never")
    drain_timeout: float = option(30.0, "seconds that running requests get to finish after SIGTERM")

    data_dir: Path | None = option(None, "folder of /v1/files and /v1/batches; none: they are not served")
    max_file_bytes: int = option(512 * MIB, "largest uploaded file")
    max_stored_bytes: int = option(16384 * MIB, "files of one API key, uploaded and written; more uploads are refused")
    max_batch_rows: int = option(50_000, "requests in one batch")
    max_queued_rows: int = option(200_000, "requests that all batches of one API key have before them")
    file_expiry: float = option(30 * 86400.0, "seconds after which files are deleted; 0: never")

    fetch_threads: int = option(16, "images fetched at one time")
    decode_threads: int = option(0, "images decoded at one time; 0: one per core, at most 8")

    otlp_traces_endpoint: str | None = option(
        None, "where OpenTelemetry traces go, as http://127.0.0.1:4318/v1/traces; needs siglane[otel]"
    )
    log_format: Literal["text", "json"] = option("text", "log lines as text or as JSON")
    log_level: Literal["debug", "info", "warning", "error"] = option("info", "log threshold")

    def __post_init__(self) -> None:
        MediaConfig.__post_init__(self)
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be between 0 and 65535, got {self.port}")
        for name in (
            "max_queue",
            "max_body_bytes",
            "max_inflight_bytes",
            "idle_timeout",
            "fetch_threads",
            "max_label_texts",
        ):
            at_least(name, getattr(self, name), 1)
        for name in ("decode_threads", "sse_keep_alive", "drain_timeout", "text_cache_bytes"):
            at_least(name, getattr(self, name), 0)
        if self.patch_cache_bytes is not None:
            at_least("patch_cache_bytes", self.patch_cache_bytes, 0)
        for name in ("max_file_bytes", "max_stored_bytes", "max_batch_rows", "max_queued_rows"):
            at_least(name, getattr(self, name), 1)
        at_least("file_expiry", self.file_expiry, 0)
        for name in ("body_timeout", "stall_timeout"):
            above_zero(name, getattr(self, name))
        low, high = SAMPLING_BOUNDS["temperature"]
        if self.default_temperature is not None and not low <= self.default_temperature <= high:
            raise ConfigError(f"default_temperature must be between {low} and {high}, got {self.default_temperature}")
        if self.api_key is not None and not is_key(self.api_key):
            raise ConfigError("api_key must be printable ASCII and not empty")
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise ConfigError("ssl_keyfile is of no use without ssl_certfile")
        if self.root_path and not ROOT_PATH.fullmatch(self.root_path):
            raise ConfigError(f"root_path must be a path such as /siglane, got {self.root_path!r}")
