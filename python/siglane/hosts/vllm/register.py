"""What vLLM runs in each of its processes before anything else (entry point group `vllm.general_plugins`).

vLLM ends with an exception of this function, whatever model it was to serve. So there is none: what goes wrong is
logged, and `siglane doctor --host vllm` tells whether all of it took effect.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

logger = logging.getLogger("siglane.hosts.vllm")

PACKAGE = "siglane.hosts.vllm"
MODEL = f"{PACKAGE}.model:SiglaneForConditionalGeneration"
CONNECTOR = "siglane"  # by this name vLLM finds what reads the media of its requests
CONNECTOR_VARIABLE = "VLLM_MEDIA_CONNECTOR"
# with others vLLM would run without siglane's processor, its model class or its media policy
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "allowed_media_domains": (None, []),
    "enable_mm_embeds": (False,),
    "mm_encoder_only": (False,),
    "model_impl": ("auto", "vllm"),
    "skip_tokenizer_init": (False,),
}


def register() -> None:
    """Names siglane's model to vLLM, its configuration to transformers, and hooks the model's path."""
    try:
        hook()
    except Exception:
        logger.exception("siglane serves no model in this vLLM; `siglane doctor --host vllm` says more")


def hook() -> None:
    """`register`, with its exceptions. Harmless when called again."""
    from transformers import AutoConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models.registry import ModelRegistry

    from siglane.hosts.config import ARCHITECTURE, SiglaneConfig

    logging.getLogger("siglane").parent = logging.getLogger("vllm")  # what siglane says stands among vLLM's lines
    AutoConfig.register(SiglaneConfig.model_type, SiglaneConfig, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, MODEL)
    original = EngineArgs.create_engine_config
    if hooked(original):
        return

    @functools.wraps(original)
    def create_engine_config(arguments: Any, *others: Any, **more: Any) -> Any:
        point_at_view(arguments)
        return original(arguments, *others, **more)

    vars(create_engine_config)["hooked_by"] = PACKAGE
    EngineArgs.create_engine_config = create_engine_config


def hooked(method: Any) -> bool:
    return vars(method).get("hooked_by") == PACKAGE


def point_at_view(arguments: Any) -> None:
    """Replaces the path of a model that siglane serves by that of its view. UserError for a broken one of them, and
    where something was set that keeps siglane from serving it.

    Every process that reads requests or starts an engine makes vLLM's configuration from its arguments, here first.
    """
    from vllm.model_executor.models.registry import ModelRegistry

    from siglane.hosts.config import ARCHITECTURE
    from siglane.hosts.settings import VllmHostConfig
    from siglane.hosts.start import check_start
    from siglane.hosts.view import Host, is_view, view_of
    from siglane.settings.options import read_environment

    asked, config = arguments.model, read_environment(VllmHostConfig)
    built_in = set(ModelRegistry.get_supported_archs()) - {ARCHITECTURE}
    host = Host("vLLM", built_in, config.vllm_override, config.vllm_views)
    if (view := view_of(asked, arguments.revision, host)) is None:
        if is_view(asked):  # in a process that is handed what another one has replaced, or named by its user
            _read_media()
        return
    check_start(asked, arguments, SUPPORTED, {CONNECTOR_VARIABLE: CONNECTOR}, "siglane does not know it; leave it out")
    if arguments.tokenizer == asked:
        arguments.tokenizer = None  # vLLM's default, the model's path
    arguments.served_model_name = arguments.served_model_name or asked
    arguments.model, arguments.revision = str(view), None
    if arguments.allowed_local_media_path:
        os.environ.setdefault("SIGLANE_ALLOWED_LOCAL_MEDIA_PATH", arguments.allowed_local_media_path)
    _read_media()
    logger.info("siglane: %s is served by siglane's tower, through %s", asked, view)


def _read_media() -> None:
    """From now on siglane reads the media of this process' requests."""
    from vllm.multimodal.media.connector import MEDIA_CONNECTOR_REGISTRY

    from siglane.hosts.vllm.media import SiglaneMediaConnector, keep_fields

    keep_fields()
    MEDIA_CONNECTOR_REGISTRY.register(CONNECTOR)(SiglaneMediaConnector)
    os.environ[CONNECTOR_VARIABLE] = CONNECTOR
