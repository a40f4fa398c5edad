"""What `siglane doctor --host sglang` says about an SGLang that is not as it should be.

A script: it imports SGLang once and plays each scenario in a fork of itself; prints `[name, what it returned]` as one
line of JSON for each. Findings are (name, broken, detail).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from siglane.hosts import doctor as common
from siglane.hosts.sglang import doctor, register

Findings = list[tuple[str, bool, str]]


def examined() -> Findings:
    return [tuple(finding) for finding in doctor.examine(self_test=False)]


def with_variable(name: str, value: str) -> Callable[[], Findings]:
    def scenario() -> Findings:
        os.environ[name] = value
        return examined()

    return scenario


def no_entry_point() -> Findings:
    doctor.entry_points = lambda group: ()
    return examined()


def failing_plugin() -> Findings:
    """SGLang logs it and goes on."""
    import sglang.srt.plugins as plugins

    def fails() -> None:
        raise RuntimeError("broken on purpose")

    plugins._plugins_loaded = False
    register.register = doctor.register = fails
    for variable in register.PACKAGES:
        del os.environ[variable]
    return examined()


def hook_not_applied() -> Findings:
    from sglang.srt.server_args import ServerArgs

    ServerArgs.resolve_once = ServerArgs.resolve_once.__wrapped__
    return examined()


def changed_signatures() -> Findings:
    from sglang.srt.managers import mm_utils, schedule_batch

    mm_utils.pad_mm_tokens = lambda input_ids: input_ids
    del mm_utils.general_mm_embed_routine
    schedule_batch.MultimodalDataItem.set_identity = lambda self, digest: None
    return examined()


def broken_model() -> Any:
    """Also what SGLang's own registry makes of it: a warning, and no class."""
    from sglang.srt.models.registry import import_model_classes

    sys.modules[f"{register.PACKAGE}.models.siglane_vlm"] = None
    import_model_classes.cache_clear()
    return {"registry": sorted(import_model_classes(f"{register.PACKAGE}.models")), "findings": examined()}


def broken_processor() -> Findings:
    sys.modules[f"{register.PACKAGE}.processors.siglane_vlm"] = None
    return examined()


def another_version() -> Findings:
    common.version = lambda name: "0.6.0"
    return examined()


def registered_again() -> bool:
    from sglang.srt.plugins.hook_registry import HookRegistry

    register.register()
    register.register()
    HookRegistry.apply_hooks()
    return True


def hooked_post_init() -> dict[str, int]:
    """How often a hook on either method runs when arguments are made."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.server_args import ServerArgs

    calls = dict.fromkeys(("__post_init__", "resolve_once"), 0)

    def count(name: str) -> Callable[[Any], None]:
        def counting(arguments: Any) -> None:
            calls[name] += 1

        return counting

    HookRegistry.reset()
    for name in calls:
        HookRegistry.register(f"sglang.srt.server_args.ServerArgs.{name}", count(name), HookType.BEFORE)
    HookRegistry.apply_hooks()
    ServerArgs(model_path="dummy", device="cpu").resolve_once()
    return calls


SCENARIOS: dict[str, Callable[[], Any]] = {
    "as it should be": examined,
    "no entry point": no_entry_point,
    "left out": with_variable("SGLANG_PLUGINS", "other, another"),
    "failing plugin": failing_plugin,
    "another model package": with_variable("SGLANG_EXTERNAL_MODEL_PACKAGE", "their.models"),
    "another processor package": with_variable("SGLANG_EXTERNAL_MM_PROCESSOR_PACKAGE", "their.processors"),
    "hook not applied": hook_not_applied,
    "bad setting": with_variable("SIGLANE_ENCODER_PARALLEL", "sideways"),
    "changed signatures": changed_signatures,
    "broken model": broken_model,
    "broken processor": broken_processor,
    "another version": another_version,
    "registered again": registered_again,
    "hooked __post_init__": hooked_post_init,
}


def main(names: Sequence[str]) -> None:
    examined()
    for name in names or SCENARIOS:
        sys.stdout.flush()
        if (child := os.fork()) == 0:
            try:
                found = SCENARIOS[name]()
            except BaseException as error:
                found = f"{type(error).__name__}: {error}"
            print(json.dumps([name, found]), flush=True)
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(sys.argv[1:])
