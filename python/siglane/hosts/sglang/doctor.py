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
from importlib.metadata import entry_points
from typing import Any

from siglane.hosts import doctor
from siglane.hosts.doctor import Finding
from siglane.hosts.settings import SglangHostConfig
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
    yield (found := doctor.installed(["sglang"], TESTED, "sglang"))
    if found.broken:
        return
    prepare_environment()
    yield from doctor.in_order(
        ("plugin", _plugin),
        ("settings", lambda: doctor.settings(SglangHostConfig)),
        ("calls", lambda: doctor.calls(CALLED)),
        ("imports", _imports),
        *([("self-test", lambda: doctor.self_test(f"{PACKAGE}.self_test"))] if self_test else []),
    )


def _plugin() -> Iterator[Finding]:
    points = tuple(entry_points(group=GROUP))
    if (finding := doctor.left_out(points, GROUP, f"{PACKAGE}.register:register", "SGLANG_PLUGINS")) is not None:
        yield finding
        return
    from sglang.srt.plugins import load_plugins

    load_plugins()
    if not PACKAGES.keys() <= os.environ.keys():
        register()  # raises what SGLang only logged
    for variable, expected in PACKAGES.items():
        value = os.environ.get(variable)
        detail = "set by the plugin" if value == expected else f"is {value}; unset it, siglane needs {expected}"
        yield Finding(variable, value != expected, detail)
    yield doctor.configuration()
    applied = "__wrapped__" in vars(pkgutil.resolve_name(ARGUMENTS_HOOK))
    yield Finding("hook", not applied, ARGUMENTS_HOOK if applied else f"SGLang did not apply it to {ARGUMENTS_HOOK}")


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
