"""What siglane does inside a vLLM that is not as it should be, and with models that are not.

A script of vLLM's own environment: it imports vLLM once and plays each scenario in a fork of itself. stdin: JSON of
folders by name; prints `[name, what it returned]` as one line of JSON for each. Findings are (name, broken, detail).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from siglane.hosts import doctor as common
from siglane.hosts.vllm import doctor, register

Findings = list[tuple[str, bool, str]]
Folders = Mapping[str, str]
REPLY = "@@ "


def examined(folders: Folders | None = None) -> Findings:
    return [tuple(finding) for finding in doctor.examine(self_test=False)]


def with_variable(name: str, value: str) -> Callable[[Folders], Findings]:
    def scenario(folders: Folders) -> Findings:
        os.environ[name] = value
        return examined()

    return scenario


def no_entry_point(folders: Folders) -> Findings:
    doctor.entry_points = lambda group: ()
    return examined()


def failing_plugin(folders: Folders) -> Any:
    """vLLM goes on without it, and says nothing more than its log does."""
    from vllm.engine import arg_utils

    del arg_utils.EngineArgs.create_engine_config
    register.register()
    return examined()


def hook_replaced(folders: Folders) -> Findings:
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.create_engine_config
    doctor.hook = lambda: None
    EngineArgs.create_engine_config = lambda arguments: original(arguments)
    return examined()


def changed_signatures(folders: Folders) -> Findings:
    import vllm.inputs
    from vllm.multimodal.processing import BaseMultiModalProcessor

    vllm.inputs.mm_input = lambda prompt_token_ids: None
    del BaseMultiModalProcessor._merge_mm_kwargs
    return examined()


def broken_model(folders: Folders) -> Findings:
    sys.modules[f"{register.PACKAGE}.model"] = None
    return examined()


def another_version(folders: Folders) -> Findings:
    common.version = lambda name: "0.40.0"
    return examined()


def registered_again(folders: Folders) -> bool:
    from vllm.engine.arg_utils import EngineArgs

    before = EngineArgs.create_engine_config
    register.register()
    register.hook()
    return EngineArgs.create_engine_config is before


def pointed(model: str, **more: Any) -> Any:
    """vLLM's arguments for a model, before and after; what siglane says where it refuses."""
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(model=model, **more)
    try:
        register.point_at_view(arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return {name: getattr(arguments, name) for name in ("model", "tokenizer", "served_model_name", "revision")}


def each_model(folders: Folders) -> dict[str, Any]:
    return {name: pointed(folder) for name, folder in folders.items()}


def refused_arguments(folders: Folders) -> list[Any]:
    more = ({"enable_mm_embeds": True}, {"allowed_media_domains": ["a.b"]}, {"model_impl": "transformers"})
    return [pointed(folders["nanovlm"], **one) for one in more]


def another_connector(folders: Folders) -> Any:
    os.environ[register.CONNECTOR_VARIABLE] = "http"
    return pointed(folders["nanovlm"])


def twice_and_named(folders: Folders) -> list[Any]:
    """As each of vLLM's processes does; and with a name and a tokenizer of the user's."""
    model = folders["nanovlm"]
    return [
        pointed(model),
        pointed(pointed(model)["model"]),
        pointed(model, served_model_name="eyes", tokenizer=model),
    ]


def options(folders: Folders) -> list[str]:
    """Of `vllm serve`."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    return sorted(option for action in parser._actions for option in action.option_strings)


def media(folders: Folders) -> dict[str, Any]:
    """What becomes of the parts of messages, of URLs and of what an offline caller hands over."""
    import numpy as np
    from PIL import Image
    from vllm.multimodal.media import MediaWithBytes
    from vllm.renderers import chat_utils

    from siglane.hosts.vllm.items import SiglaneDataParser
    from siglane.hosts.vllm.media import SiglaneMediaConnector, keep_fields

    def said(job: Callable[[], Any]) -> Any:
        try:
            return job()
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    def sizes(**data: Any) -> Any:
        found = SiglaneDataParser().parse_mm_data(data)
        return {kind: [source_size(item.source) for item in found[kind].get_all()] for kind in data}

    def source_size(source: Any) -> Any:
        return [one.size for one in source] if isinstance(source, list) else source.size

    keep_fields()
    keep_fields()
    picture, connector = Image.new("RGB", (6, 4)), SiglaneMediaConnector({"image": {"max_tiles": 2}})
    beside = {"type": "image_url", "image_url": {"url": "data:x", "detail": "low"}}
    parts = (beside, beside | {"uuid": "u"}, {"type": "input_image", "image_url": "data:x", "detail": "high"})
    asked = connector.fetch_image(chat_utils._parse_chat_message_content_mm_part(beside)[1])
    return {
        "fields": [chat_utils._parse_chat_message_content_mm_part(part)[1].fields for part in parts],
        "refused later": said(lambda: sizes(image=[picture, asked])),
        "audio": said(lambda: connector.fetch_audio("data:x")),
        "uuid alone": said(lambda: sizes(image=[None])),
        "pictures": said(lambda: sizes(image=[picture, np.zeros((2, 3, 3), np.uint8), MediaWithBytes(picture, b"")])),
        "a picture": said(lambda: sizes(image=picture)),
        "frames": said(lambda: sizes(video=[picture, picture])),
        "videos": said(lambda: sizes(video=[[picture], (np.zeros((2, 4, 6, 3), np.uint8), {"fps": 2})])),
        "floats": said(lambda: sizes(image=[np.zeros((2, 3, 3))])),
    }


SCENARIOS: dict[str, Callable[[Folders], Any]] = {
    "as it should be": examined,
    "no entry point": no_entry_point,
    "left out": with_variable("VLLM_PLUGINS", "other, another"),
    "failing plugin": failing_plugin,
    "hook replaced": hook_replaced,
    "bad setting": with_variable("SIGLANE_ENCODER_PARALLEL", "sideways"),
    "changed signatures": changed_signatures,
    "broken model": broken_model,
    "another version": another_version,
    "registered again": registered_again,
    "each model": each_model,
    "refused arguments": refused_arguments,
    "another connector": another_connector,
    "twice and named": twice_and_named,
    "options": options,
    "media": media,
}


def main() -> None:
    folders: Folders = json.load(sys.stdin)
    examined()
    for name, scenario in SCENARIOS.items():
        sys.stdout.flush()
        if (child := os.fork()) == 0:
            try:
                found = scenario(folders)
            except BaseException as error:
                found = f"{type(error).__name__}: {error}"
            print(REPLY + json.dumps([name, found]), flush=True)
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
