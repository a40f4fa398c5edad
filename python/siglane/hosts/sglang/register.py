"""What SGLang runs in each of its processes before anything else (entry point group `sglang.srt.plugins`).

SGLang logs an exception of this function and goes on without the plugin, so it does little: `siglane doctor --host
sglang` tells whether all of it took effect.
"""

from __future__ import annotations

import logging
import os
from typing import Any

logger = logging.getLogger("siglane.hosts.sglang")

PACKAGE = "siglane.hosts.sglang"
PACKAGES = {
    "SGLANG_EXTERNAL_MODEL_PACKAGE": f"{PACKAGE}.models",
    "SGLANG_EXTERNAL_MM_PROCESSOR_PACKAGE": f"{PACKAGE}.processors",
}
# not __post_init__, which SGLang's own comments propose: msgspec looks that one up when it makes the class
ARGUMENTS_HOOK = "sglang.srt.server_args.ServerArgs.resolve_once"
# with others SGLang would run without siglane's processor, or the language model without its first layers
SUPPORTED = {"encoder_only": (False,), "language_only": (False,), "pp_size": (1,)}


def register() -> None:
    """Names siglane's packages to SGLang, its configuration to transformers, and hooks the model's path."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from transformers import AutoConfig

    from siglane.hosts.config import SiglaneConfig

    for variable, package in PACKAGES.items():
        os.environ.setdefault(variable, package)
    AutoConfig.register(SiglaneConfig.model_type, SiglaneConfig, exist_ok=True)
    HookRegistry.register(ARGUMENTS_HOOK, point_at_view, HookType.BEFORE)
    logger.info("siglane: models and processors of %s, hook on %s", PACKAGE, ARGUMENTS_HOOK)


def point_at_view(arguments: Any) -> None:
    """Replaces the path of a model that siglane serves by that of its view. UserError for a broken one of them, and
    where something was set that keeps siglane from serving it: SGLang would look for another class.

    SGLang resolves its arguments once, in the launcher, before it reads anything of the model.
    """
    from siglane.hosts.sglang.view import view_of
    from siglane.hosts.start import check_start

    asked = arguments.model_path
    view = view_of(asked, arguments.revision)
    if view is None:
        return
    check_start(asked, arguments, SUPPORTED, PACKAGES, "siglane supports SGLang's --tp-size and --dp-size")
    if arguments.tokenizer_path == asked:
        arguments.tokenizer_path = None  # SGLang's default, the model's path
    arguments.served_model_name = arguments.served_model_name or asked
    arguments.model_path, arguments.revision = str(view), None
    # workers of --tokenizer-worker-num load no plugins
    os.environ.setdefault("SGLANG_HTTP_SERVER_APP_PATH", f"{PACKAGE}.app:app")
    logger.info("siglane: %s is served by siglane's tower, through %s", asked, view)
