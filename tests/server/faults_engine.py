"""Rows 42, 43, 47 to 49, 58, 65 and 70: what breaks inside, and what holds it together."""

from __future__ import annotations

import functools
import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from faults import Stage, Table, copied, rewritten, started
from safetensors.torch import load_file, save_file
from serving import GOOD, ask_good, assert_error, assert_unharmed, chat, image_part, picture, running, stream
from test_lifecycle import LONG, process_of
from waiting import eventually, wait_while

from siglane.engine.process.supervisor import EngineProcess
from siglane.families.processor import load_processor
from siglane.families.prompt import renderers
from siglane.image.patchify import to_patches
from siglane.types import DecodedImage, ImageLayout, ImagePatches
from siglane.weights.hub import open_checkpoint

TABLE = Table()
ODD = "~"  # a word that the good request has not


@TABLE.row(42, "logits that are not finite")
def logits_that_are_not_finite(stage: Stage) -> None:
    """A word's row of the weights is no number."""
    folder = copied(stage)
    file = folder / "llm/model.safetensors"
    weights = load_file(file)
    weights["model.embed_tokens.weight"][stage.processor.tokenizer(ODD).input_ids[-1]] = torch.nan
    file.unlink()
    save_file(weights, file)
    with started(stage, folder) as server:

        def ask() -> None:
            for _ in range(2):  # what ended so is not kept
                assert_error(server.post(chat(ODD)), 500, "engine_nan")
                assert_error(server.post(chat(ODD, stream=True)), 500, "engine_nan")

        assert_unharmed(server, stage.alone, ask)


def spoilt(stage: Stage, seed: int, pixels: Any) -> dict[str, Any]:
    """A picture whose patches get other pixels."""

    def spoil(image: DecodedImage, layout: ImageLayout, *facts: Any) -> ImagePatches:
        patches = to_patches(image, layout, *facts)
        return patches if image.size != (33, 33) else replace(patches, pixels=pixels(patches))

    stage.patch.setattr("siglane.image.patchify.to_patches", spoil)
    return image_part(picture(33, 33, seed=seed))


@TABLE.row(43, "features that are not finite")
def features_that_are_not_finite(stage: Stage) -> None:
    """They are not kept: the same picture fails again, and another one does not."""
    poison = spoilt(stage, 43, lambda patches: torch.full(patches.pixels.shape, torch.nan))
    for _ in range(2):
        assert_error(stage.server.post(chat(poison)), 500, "engine_nan")
    assert stage.server.post(chat(image_part(picture(33, 34)))).status_code == 200


@TABLE.row(47, "an exception in a step")
def an_exception_in_a_step(stage: Stage) -> None:
    """Patches of a width that the tower cannot multiply get through, and the step raises."""
    poison = spoilt(stage, 47, lambda patches: torch.zeros(len(patches.pixels), 7))
    for _ in range(3):
        assert_error(stage.server.post(chat(poison)), 500, "engine_error")
        assert_error(stage.server.post(chat(poison, stream=True, n=2)), 500, "engine_error")
    with stage.server.http() as client:
        assert client.get("/health").status_code == 200


@TABLE.row(48, "an engine that dies", slow=True, lost=True)
def an_engine_that_dies(stage: Stage) -> None:
    """A killed engine never looks like a clean end: its requests get an error, and it is started again."""
    held = stage.folder / "held"
    engine = EngineProcess(stage.spec, prepare=functools.partial(wait_while, held))
    try:
        with running(stage.processor, engine) as server, server.http() as client:
            assert_error(client.get("/ready"), 503, "engine_starting")
            assert client.get("/health").status_code == 200
            assert client.get("/metrics").status_code == 200
            assert_error(server.post(chat("x")), 503, "engine_starting")
            engine.start()
            before = ask_good(server)
            with ThreadPoolExecutor(1) as pool:
                whole = pool.submit(server.post, LONG)
                eventually(lambda: server.metric("siglane_requests_in_flight") == 1)

                def kill() -> None:
                    if engine.state == "ready" and not whole.done():
                        assert engine.pid is not None
                        held.touch()
                        os.kill(engine.pid, signal.SIGKILL)
                        eventually(lambda: engine.state == "restarting")
                        assert_error(client.get("/health"), 503, "engine_restarting")
                        assert_error(client.get("/ready"), 503, "engine_restarting")

                told = stream(server, LONG, kill)
            assert told.error is not None
            assert (told.error["code"], told.finish_reasons) == ("engine_restarting", [])
            assert_error(whole.result(), 503, "engine_restarting")
            held.unlink()
            eventually(lambda: engine.state == "ready")
            after = ask_good(server)
            assert (after.text, after.tokens, after.usage) == (before.text, before.tokens, before.usage)
            engine.close()
            assert_error(client.get("/health"), 503, "engine_down")
            assert_error(server.post(chat("x")), 503, "engine_down")
    finally:
        engine.close()
    assert (before.text, before.tokens, before.usage) == (stage.alone.text, stage.alone.tokens, stage.alone.usage)


@TABLE.row(49, "signals", slow=True)
def signals(stage: Stage) -> None:
    """The first lets requests finish and takes no new ones, the second ends them; both exit with 0."""
    model = Path(stage.spec.model)
    with process_of(model, stage.folder / "1") as patient, process_of(model, stage.folder / "2") as hurried:
        for server in (patient, hurried):
            eventually(server.is_ready)
        good = {**GOOD, "max_tokens": 300}
        alone, told = stream(stage.server, good), patient.stream_until_signal([signal.SIGTERM], good)
        assert (told.text, told.tokens) == (alone.text, alone.tokens)
        assert (told.finish_reasons, told.done) == (["length"], True)
        cut = hurried.stream_until_signal([signal.SIGINT, signal.SIGTERM], LONG)
        assert cut.error is not None
        assert (cut.error["code"], cut.finish_reasons) == ("server_shutting_down", [])
        for server in (patient, hurried):
            code, log = server.end()
            assert code == 0
            assert any("POST /v1/chat/completions: " in line for line in log)
            assert not any("Traceback" in line for line in log)


SPINNING = (
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content }}"
    "{% if 'spin' in m.content %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    "{% endif %}{{ '<|im_end|>\n' }}{% endfor %}{{ '<|im_start|>assistant\n' }}"
)


@TABLE.row(58, "a template that never ends")
def a_template_that_never_ends(stage: Stage) -> None:
    folder = copied(stage)
    (file,) = folder.rglob("tokenizer_config.json")
    rewritten(file, json.dumps({**json.loads(file.read_text()), "chat_template": SPINNING}))
    stage.patch.setattr(renderers, "RENDER_SECONDS", 0.3)
    with running(load_processor(open_checkpoint(folder)), stage.engine) as server:
        for body in (chat("spin"), chat("spin", stream=True)):
            assert_error(server.post(body), 400, "template_timeout", "messages")
        assert server.post(chat("x")).status_code == 200


@TABLE.row(65, "no door to the engine")
def no_door_to_the_engine(stage: Stage) -> None:
    """Neither its process nor any thread listens: what it is asked comes through a pair of sockets."""
    inodes = {os.readlink(fd) for fd in Path(f"/proc/{stage.engine.pid}/fd").iterdir() if fd.is_symlink()}
    tables = [Path(f"/proc/net/{kind}").read_text().splitlines()[1:] for kind in ("tcp", "tcp6", "udp", "udp6")]
    listening = {f"socket:[{line.split()[9]}]" for table in tables for line in table}
    named = {
        f"socket:[{line.split()[6]}]" for line in Path("/proc/net/unix").read_text().splitlines()[1:] if "/" in line
    }
    assert any(one.startswith("socket:") for one in inodes)
    assert not inodes & (listening | {f"socket:[{words[6]}]" for words in named})
