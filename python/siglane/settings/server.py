"""Everything that can be set about the server; flags and environment variables are generated from these fields.

Light on purpose: no torch, no web framework, so that a bad port or a missing model is reported at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from siglane.errors import ConfigError
from siglane.settings.media import MIB, MediaConfig
from siglane.settings.options import above_zero, at_least
from siglane.types import SAMPLING_BOUNDS


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig(MediaConfig):
    host: str = field(default="127.0.0.1", metadata={"help": "address to listen on; 0.0.0.0 lets others in"})
    port: int = field(default=8000, metadata={"help": "TCP port; 0 takes a free one"})
    api_key: str | None = field(
        default=None,
        repr=False,
        metadata={"help": "key that clients must send as a bearer token, except to /health, /ready and /metrics"},
    )
    api_keys: tuple[str, ...] = field(
        default=(),
        repr=False,
        metadata={"help": "further keys, for clients that must not see each other's files and batches"},
    )
    served_model_name: str | None = field(
        default=None, metadata={"help": "name of the model in the API; default: MODEL as given (a folder: its name)"}
    )
    model_aliases: tuple[str, ...] = field(default=(), metadata={"help": "further names the model answers to"})
    tagger: str | None = field(
        default=None,
        metadata={
            "help": "SigLIP with both towers for /v1/embeddings and /v1/classify beside the chat; an image tower that "
            "is the chat model's own is loaded once"
        },
    )
    cors_origins: tuple[str, ...] = field(
        default=(), metadata={"help": "web origins whose pages may call the server; none by default"}
    )
    sampling_defaults: Literal["model", "openai"] = field(
        default="model",
        metadata={
            "help": "what requests get that name no temperature, top_p and so on: model: what the checkpoint's "
            "generation_config.json states, OpenAI's defaults for the rest; openai: those alone"
        },
    )
    default_temperature: float | None = field(
        default=None, metadata={"help": "temperature of requests that name none; none: as sampling_defaults says"}
    )

    max_queue: int = field(
        default=256, metadata={"help": "requests being read, waiting or running at one time; more are answered 503"}
    )
    max_body_bytes: int = field(default=64 * MIB, metadata={"help": "largest request body"})
    max_inflight_bytes: int = field(
        default=4096 * MIB,
        metadata={"help": "bodies, files and patches of all requests together; a request beyond it is answered 503"},
    )
    text_cache_bytes: int = field(
        default=128 * MIB,  # 16,384 labels, the most of one request, have 85 MB at width 1152
        metadata={"help": "bytes of embedded texts kept, so that labels that come again are not embedded again"},
    )
    patch_cache_bytes: int = field(
        default=128 * MIB,
        metadata={"help": "bytes of decoded images and videos kept, so that equal files are decoded once; 0: none"},
    )
    max_label_texts: int = field(
        default=16384, metadata={"help": "labels x templates of one classification; more are answered 400"}
    )
    body_timeout: float = field(default=30.0, metadata={"help": "seconds a client has to send its request body"})
    idle_timeout: int = field(
        default=30, metadata={"help": "seconds a connection may stay without a (whole) request header"}
    )
    stall_timeout: float = field(
        default=30.0, metadata={"help": "seconds a client may leave its answer unread before it is dropped"}
    )
    sse_keep_alive: float = field(
        default=15.0, metadata={"help": "seconds of silence after which a stream gets a comment line; 0: never"}
    )
    drain_timeout: float = field(
        default=30.0, metadata={"help": "seconds that running requests get to finish after SIGTERM"}
    )

    data_dir: Path | None = field(
        default=None, metadata={"help": "folder of /v1/files and /v1/batches; none: they are not served"}
    )
    max_file_bytes: int = field(default=512 * MIB, metadata={"help": "largest uploaded file"})
    max_stored_bytes: int = field(
        default=16384 * MIB, metadata={"help": "files of one API key, uploaded and written; more uploads are refused"}
    )
    max_batch_rows: int = field(default=50_000, metadata={"help": "requests in one batch"})
    max_queued_rows: int = field(
        default=200_000, metadata={"help": "requests that all batches of one API key have before them"}
    )
    file_expiry: float = field(
        default=30 * 86400.0, metadata={"help": "seconds after which files are deleted; 0: never"}
    )

    fetch_threads: int = field(default=16, metadata={"help": "images fetched at one time"})
    decode_threads: int = field(default=0, metadata={"help": "images decoded at one time; 0: one per core, at most 8"})

    log_format: Literal["text", "json"] = field(default="text", metadata={"help": "log lines as text or as JSON"})
    log_level: Literal["debug", "info", "warning", "error"] = field(default="info", metadata={"help": "log threshold"})

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
        for name in ("decode_threads", "sse_keep_alive", "drain_timeout", "text_cache_bytes", "patch_cache_bytes"):
            at_least(name, getattr(self, name), 0)
        for name in ("max_file_bytes", "max_stored_bytes", "max_batch_rows", "max_queued_rows"):
            at_least(name, getattr(self, name), 1)
        at_least("file_expiry", self.file_expiry, 0)
        for name in ("body_timeout", "stall_timeout"):
            above_zero(name, getattr(self, name))
        low, high = SAMPLING_BOUNDS["temperature"]
        if self.default_temperature is not None and not low <= self.default_temperature <= high:
            raise ConfigError(f"default_temperature must be between {low} and {high}, got {self.default_temperature}")
        for name, keys in (("api_key", () if self.api_key is None else (self.api_key,)), ("api_keys", self.api_keys)):
            if not all(key.isascii() and key.isprintable() and key for key in keys):
                raise ConfigError(f"{name} must be printable ASCII and not empty")

    @property
    def keys(self) -> tuple[str, ...]:
        """Every key that opens the server; none where it is open to all."""
        return self.api_keys if self.api_key is None else (self.api_key, *self.api_keys)
