"""One image on its way from the HTTP body to the tower: how many files see it, and that none is entered again for it.

A file sees an image when one of its functions is called with it: in one of the forms that it takes on the way (item,
bytes, decoded, patches, packed), in the body that it comes with, the request that it leaves with or what the engine
makes of that, or in a list, tuple or dictionary of these. Files of `types/` state the forms; the way ends in `vision/`.
"""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import FrameType

import pytest
from serving import chat, data_url, image_part, picture, running

import siglane
from siglane.engine.batch import Sequence, StepBatch
from siglane.engine.engine import Engine
from siglane.engine.process.child import EngineSpec, _serve
from siglane.engine.process.load import load_engine
from siglane.engine.process.pulse import Pulse
from siglane.engine.process.supervisor import EngineProcess
from siglane.engine.process.wire import Channel, frame
from siglane.families.processor import Processor
from siglane.media.item import MediaItem
from siglane.server.protocol import ChatCompletionRequest
from siglane.types import DecodedImage, ImagePatches, PackedPatches, Prompt, Request, TokenDelta

PACKAGE = Path(siglane.__file__).parent
FORMS = (MediaItem, DecodedImage, ImagePatches, PackedPatches, ChatCompletionRequest)
ENDS = ("engine/process/supervisor.py", "vision/tower.py")  # where the image leaves this process, where it is encoded
LEADER = "server/chat.py"  # leads a request: hands its media to one stage after the other
MOST_FILES = 18
NOT_COUNTED = ("types", "vision", "nn")
DEEPEST = 4  # of lists and dictionaries in each other


@dataclass
class Walk:
    """image: the picture's file. calls: (caller's file, file, function) of each that saw the image, in order."""

    image: bytes
    calls: list[tuple[str, str, str]] = field(default_factory=list)
    request: Request | None = None
    over: bool = False
    _seen: dict[int, FrameType] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.url = data_url(self.image)

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        if event != "call" or self.over:
            return
        code = frame.f_code
        file = file_of(code.co_filename)
        if file is None or id(frame) in self._seen:
            return
        count = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 4) + bool(code.co_flags & 8)
        arguments = {name: frame.f_locals.get(name) for name in code.co_varnames[:count]}
        if any(self.holds(value) for value in arguments.values()):
            self._seen[id(frame)] = frame  # a coroutine is called again whenever it goes on
            self.calls.append((caller_of(frame), file, code.co_qualname))
            self.request = next((one for one in arguments.values() if isinstance(one, Request)), self.request)
            self.over = file in ENDS

    def holds(self, value: object, depth: int = 0) -> bool:
        match value:
            case bytes():
                return value == self.image
            case str():
                return value == self.url
            case Prompt() | Request() | Sequence() | StepBatch():
                return any(self.holds(getattr(value, one.name)) for one in fields(value))
            case list() | tuple() if depth < DEEPEST:
                return any(self.holds(one, depth + 1) for one in value)
            case Mapping() if depth < DEEPEST:
                return any(self.holds(one, depth + 1) for one in list(value.values()))
        return isinstance(value, FORMS)


@cache
def file_of(filename: str) -> str | None:
    """Of the package. Asked at every call of every thread."""
    path = Path(filename)
    return path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else None


def caller_of(frame: FrameType) -> str:
    """The nearest file of the package below on this thread's stack; of a thread's first call there is none."""
    above = frame.f_back
    while above is not None:
        if (file := file_of(above.f_code.co_filename)) is not None:
            return file
        above = above.f_back
    return ""


@contextmanager
def watched(walk: Walk) -> Iterator[None]:
    """Every thread started meanwhile, and this one."""
    threading.setprofile(walk)
    sys.setprofile(walk)
    try:
        yield
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def request_of(walk: Walk, processor: Processor, engine: EngineProcess) -> Request:
    """From the HTTP body to the pipe: a real server takes a chat request with one image. Gives what it sends."""
    with watched(walk), running(processor, engine) as server:
        response = server.post(chat(image_part(walk.image), "What is this?"))
    assert response.status_code == 200, response.text
    assert walk.request is not None
    return walk.request


def serve_until_hung_up(channel: Channel, engine: Engine) -> None:
    with suppress(EOFError):
        _serve(channel, engine, None, Pulse())


def compute(walk: Walk, request: Request, spec: EngineSpec) -> None:
    """From the pipe to the tower: what the engine's process does, on a thread of this one."""
    engine = load_engine(spec.model, spec.config)
    here, there = map(Channel, socket.socketpair())
    threading.Thread(target=here.send, args=(frame("add", (request,)),)).start()
    with watched(walk):
        thread = threading.Thread(target=serve_until_hung_up, args=(there, engine))
        thread.start()
    deltas: list[TokenDelta] = []
    while not any(delta.finished for delta in deltas):
        assert here.wait(60), "the engine's thread does not answer"
        kind, value = here.receive()
        deltas += value if kind == "deltas" else []
    here.hang_up()
    thread.join()
    finished = deltas[-1].finished
    assert finished is not None
    assert finished.reason in ("stop", "length"), finished.error


def test_few_files_see_an_image_and_none_gets_it_back(
    processor: Processor, engine: EngineProcess, spec: EngineSpec
) -> None:
    data = picture(90, 60)
    intake, inside = Walk(data), Walk(data)
    compute(inside, request_of(intake, processor, engine), spec)
    calls = intake.calls + inside.calls
    shown = "\n".join(f"{file}: {function}, called by {caller}" for caller, file, function in calls)
    files = [file for file in dict.fromkeys(file for _, file, _ in calls) if file.split("/")[0] not in NOT_COUNTED]
    assert files[-1] == "families/stack.py", shown  # the last one before the tower
    assert {"server/protocol.py", "media/source.py", "image/decode.py", ENDS[0]} <= set(files), shown
    assert len(files) <= MOST_FILES, f"{len(files)} files see an image: {', '.join(files)}\n{shown}"
    before: dict[str, set[str]] = {}
    for caller, file, _ in calls:
        if caller not in ("", file) and file != LEADER:
            before.setdefault(file, set()).add(caller)
    try:
        tuple(TopologicalSorter(before).static_order())
    except CycleError as error:
        pytest.fail(f"an image comes back to a file that it has left: {' <- '.join(error.args[1])}\n{shown}")
