"""Whether siglane works inside the SGLang that is installed here; nothing of it is taken for granted.

SGLang logs what goes wrong with plugins, model modules and processors and goes on without them. Here each of these
steps is repeated and must succeed.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Any, NamedTuple

from siglane.hosts.sglang.register import ARGUMENTS_HOOK, PACKAGE, PACKAGES, register
from siglane.hosts.sglang.self_test import prepare_environment

TESTED = ("0.5.23",)
SELF_TEST_SECONDS = 420
GROUP = "sglang.srt.plugins"

# what siglane calls: where it is, and the parameters or fields it must have
CALLED: dict[str, tuple[str, ...]] = {
    "sglang.srt.managers.mm_schedule:init_mm_embedding_cache": ("max_size",),
    "sglang.srt.managers.mm_utils:general_mm_embed_routine": (
        "input_ids", "forward_batch", "language_model", "multimodal_model",
    ),
    "sglang.srt.managers.mm_utils:pad_mm_tokens": ("input_ids", "mm_inputs"),
    "sglang.srt.managers.schedule_batch:MultimodalDataItem": (
        "modality", "offsets", "feature", "model_specific_data", "identity",
    ),
    "sglang.srt.managers.schedule_batch:MultimodalDataItem.set_identity": ("identity",),
    "sglang.srt.managers.schedule_batch:MultimodalProcessorOutput": ("mm_items", "input_ids", "im_token_id"),
    "sglang.srt.mem_cache.multimodal_cache:MultiModalStaticCache.clear": (),
    "sglang.srt.model_executor.forward_batch_info:ForwardBatch.contains_mm_inputs": (),
    "sglang.srt.models.llama:LlamaForCausalLM": ("config", "quant_config", "prefix"),
    "sglang.srt.models.llama:LlamaForCausalLM.get_input_embeddings": (),
    "sglang.srt.models.qwen2:Qwen2ForCausalLM": ("config", "quant_config", "prefix"),
    "sglang.srt.models.qwen2:Qwen2ForCausalLM.load_weights": ("weights",),
    "sglang.srt.models.qwen3:Qwen3ForCausalLM": ("config", "quant_config", "prefix"),
    "sglang.srt.multimodal.processors.base_processor:BaseMultimodalProcessor": (
        "hf_config", "server_args", "_processor", "transport_mode",
    ),
    "sglang.srt.multimodal.processors.base_processor:BaseMultimodalProcessor.process_mm_data_async": (
        "image_data", "audio_data", "input_text", "request_obj",
    ),
    "sglang.srt.runtime_context:get_parallel": (),
    "sglang.srt.server_args:ServerArgs.resolve_once": (),
    "sglang.srt.utils.common:ImageData": ("url", "detail", "max_dynamic_patch"),
    "sglang.srt.utils.common:VideoData": ("url",),
}  # fmt: skip


class Finding(NamedTuple):
    """One step. broken: siglane does not work here; detail: what was found, or what to do."""

    name: str
    broken: bool
    detail: str


def examine(*, self_test: bool = True) -> Iterator[Finding]:
    """All findings in the order in which SGLang would come upon them; ends at what makes the rest pointless.

    self_test: also answer a question about a picture with the shipped model, in an engine of SGLang's (a minute).
    """
    try:
        found = version("sglang")
    except PackageNotFoundError:
        yield Finding("sglang", True, "not installed; pip install 'siglane[sglang]'")
        return
    prepare_environment()
    note = "" if found in TESTED else f"; siglane is tested with {', '.join(TESTED)}"
    yield Finding("sglang", False, found + note)
    for name, step in (("plugin", _plugin), ("settings", _settings), ("calls", _calls), ("imports", _imports)):
        failed = False
        for finding in _tried(name, step):
            yield finding
            failed |= finding.broken
        if failed:
            return
    if self_test:
        yield from _tried("self-test", _self_test)


def _tried(name: str, step: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from step()
    except Exception as error:
        yield Finding(name, True, f"{type(error).__name__}: {error}")


def _plugin() -> Iterator[Finding]:
    ours = [point for point in entry_points(group=GROUP) if point.value == f"{PACKAGE}.register:register"]
    if not ours:
        yield Finding("plugin", True, f"no entry point in group {GROUP}; install siglane again")
        return
    allowed = os.environ.get("SGLANG_PLUGINS", "")
    if allowed and ours[0].name not in [name.strip() for name in allowed.split(",")]:
        yield Finding("plugin", True, f"SGLANG_PLUGINS={allowed} leaves {ours[0].name} out; add it")
        return
    from sglang.srt.plugins import load_plugins

    load_plugins()
    if not PACKAGES.keys() <= os.environ.keys():
        register()  # raises what SGLang only logged
    for variable, expected in PACKAGES.items():
        value = os.environ.get(variable)
        detail = "set by the plugin" if value == expected else f"is {value}; unset it, siglane needs {expected}"
        yield Finding(variable, value != expected, detail)
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from siglane.hosts.sglang.config import SiglaneConfig

    known = SiglaneConfig.model_type in CONFIG_MAPPING
    yield Finding("configuration", not known, "known to transformers" if known else "transformers refused it")
    applied = "__wrapped__" in vars(pkgutil.resolve_name(ARGUMENTS_HOOK))
    yield Finding("hook", not applied, ARGUMENTS_HOOK if applied else f"SGLang did not apply it to {ARGUMENTS_HOOK}")


def _settings() -> Iterator[Finding]:
    from siglane.hosts.sglang.settings import host_config
    from siglane.settings.options import read_environment
    from siglane.tiling.rule import ImageBudget

    config, budget = host_config(), read_environment(ImageBudget)
    media = "http" if config.allow_http_images else "no http"
    files = f"files below {config.allowed_local_media_path}" if config.allowed_local_media_path else "no files"
    detail = f"encoder {config.encoder_parallel}; media: data URLs, {media}, {files}; budget {budget.limits or 'none'}"
    yield Finding("settings", False, detail)


def _calls() -> Iterator[Finding]:
    """Every function and class of SGLang's that siglane calls, with the parameters it gives them."""
    fit = 0
    for place, expected in CALLED.items():
        try:
            found = set(inspect.signature(pkgutil.resolve_name(place)).parameters)
        except (ImportError, AttributeError) as error:
            yield Finding(place, True, f"not in this SGLang: {error}")
            continue
        missing = [name for name in expected if name not in found]
        if missing:
            yield Finding(place, True, f"has no parameter {', '.join(missing)}")
        else:
            fit += 1
    detail = f"{fit} of {len(CALLED)} functions and classes have the parameters siglane gives them"
    yield Finding("calls", fit < len(CALLED), detail)


def _imports() -> Iterator[Finding]:
    """What SGLang imports by name and, where it fails, leaves out with a warning."""
    from sglang.srt.models.registry import import_model_classes
    from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor

    from siglane.hosts.sglang.config import ARCHITECTURE

    models = import_model_classes(f"{PACKAGE}.models", strict=True)
    yield Finding("models", ARCHITECTURE not in models, ", ".join(sorted(models)) or "none")
    package = importlib.import_module(f"{PACKAGE}.processors")
    modules = [
        importlib.import_module(info.name) for info in pkgutil.iter_modules(package.__path__, f"{PACKAGE}.processors.")
    ]
    classes: list[Any] = [found for module in modules for found in vars(module).values() if inspect.isclass(found)]
    processors = [found for found in classes if issubclass(found, BaseMultimodalProcessor)]
    served = {model.__name__ for processor in processors for model in processor.models}
    yield Finding("processors", ARCHITECTURE not in served, ", ".join(sorted(served)) or "none")


def _self_test() -> Iterator[Finding]:
    """In a process of its own: SGLang's engine takes over the process it runs in."""
    command = [sys.executable, "-m", f"{PACKAGE}.self_test"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SELF_TEST_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        yield Finding("self-test", True, f"no answer within {SELF_TEST_SECONDS} s")
        return
    lines = [line for line in (done.stdout if done.returncode == 0 else done.stderr).splitlines() if line.strip()]
    yield Finding("self-test", done.returncode != 0, lines[-1] if lines else f"exit code {done.returncode}")
