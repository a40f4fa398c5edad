"""Whether siglane works inside the SGLang that is installed here; nothing of it is taken for granted.

SGLang logs what goes wrong with plugins, model modules and processors and goes on without them. Here each of these
steps is repeated and must succeed.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Any

from siglane.hosts import doctor
from siglane.hosts.doctor import Finding
from siglane.hosts.sglang.register import ARGUMENTS_HOOK, PACKAGE, PACKAGES, register
from siglane.hosts.sglang.self_test import prepare_environment

TESTED = ("0.5.23",)
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
    steps = [("plugin", _plugin), ("settings", _settings), ("calls", _calls), ("imports", _imports)]
    yield from doctor.in_order([*steps, *([("self-test", _self_test)] if self_test else [])])


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

    from siglane.hosts.config import SiglaneConfig

    known = SiglaneConfig.model_type in CONFIG_MAPPING
    yield Finding("configuration", not known, "known to transformers" if known else "transformers refused it")
    applied = "__wrapped__" in vars(pkgutil.resolve_name(ARGUMENTS_HOOK))
    yield Finding("hook", not applied, ARGUMENTS_HOOK if applied else f"SGLang did not apply it to {ARGUMENTS_HOOK}")


def _settings() -> Iterator[Finding]:
    from siglane.hosts.sglang.settings import host_config

    yield doctor.settings(host_config())


def _calls() -> Iterator[Finding]:
    return doctor.calls(CALLED)


def _imports() -> Iterator[Finding]:
    """What SGLang imports by name and, where it fails, leaves out with a warning."""
    from sglang.srt.models.registry import import_model_classes
    from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor

    from siglane.hosts.config import ARCHITECTURE

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
    return doctor.self_test(f"{PACKAGE}.self_test")
