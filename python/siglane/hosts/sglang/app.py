"""SGLang's HTTP application for the workers of `--tokenizer-worker-num`, which load no plugins by themselves."""

from sglang.srt.plugins import load_plugins

load_plugins()

from sglang.srt.entrypoints.http_server import app  # noqa: E402 (after what the plugins change)

__all__ = ["app"]
