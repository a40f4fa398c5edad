"""What crosses between server and engine: every type comes back equal, nothing else comes back at all."""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from engine_kit import image
from hypothesis import given
from hypothesis import strategies as st

import siglane.engine
from siglane.engine.engine import EngineStats
from siglane.engine.process.embed_worker import Embedding
from siglane.engine.process.wire import HEAD, TYPES, Channel, EngineFacts, frame
from siglane.errors import ConfigError, EngineError, ImageError, SiglaneError, UserError, WeightError
from siglane.families.two_tower import Calibration
from siglane.types import (
    AnyRes,
    Assembly,
    Box,
    Finished,
    Grid,
    ImageLayout,
    ImagePatches,
    ImagePlaceholder,
    ImageSpan,
    Indicator,
    Marker,
    MergedFirst,
    MergedScales,
    Newline,
    Pad,
    Piece,
    Prompt,
    Request,
    Resize,
    SamplingParams,
    Size,
    Step,
    Tile,
    Timings,
    Token,
    TokenDelta,
    TokenLogprob,
)

TILE = Tile(
    (Resize(Size(4, 2), "bicubic", in_float=True), Pad(Size(4, 4), 0, 1, (1, 2, 3))), Box(0, 0, 4, 4), Grid(2, 2)
)
LAYOUT = ImageLayout(
    Size(7, 5),
    (TILE, dataclasses.replace(TILE, frame=1)),
    (ImagePlaceholder(3), Indicator(1), Token("<row_1_col_1>"), Marker("\n", isolated=True)),
    Grid(1, 2),
    frames=2,
    projected=(Grid(1, 1), Grid(1, 2)),
)
LAYOUTS = [
    LAYOUT,
    *(
        dataclasses.replace(LAYOUT, assembly=assembly)
        for assembly in (
            *(MergedScales((1, 2), 3), AnyRes(Box(0, 0, 2, 2), Grid(1, 1)), AnyRes(Box(0, 0, 2, 2), None)),
            *(Newline(None), Newline(Grid(3, 3)), Newline(Grid(1, 1), "average", "row")),
            *(MergedFirst(), MergedFirst(drops_still=True, kept=bytes((1, 0, 1)))),
        )
    ),
]
PLAIN_VALUES: list[Any] = [
    None,
    (True, 1, -(2**63), 2**64 + 1, 1.5, 0.1, 5e-324, "", "text", b"\0\xff"),
    ((), ((), (1, ("a",)))),
    "\ud800 a lone surrogate, a line\u2028 and \x00",
    *LAYOUTS,
    SamplingParams(temperature=0.3, seed=2**70, logit_bias=((1, -0.5),), stop=("\n", "[0, 1]"), n=3, logprobs=5),
    TokenDelta("a", 5, TokenLogprob(5, -0.25, ((5, -0.25), (6, -math.inf)))),
    TokenDelta("a", finished=Finished("stop", matched_stop=2, cached_tokens=3, timings=Timings(1, 2, 3, 4))),
    EngineStats(*range(12)),
    EngineFacts(1024),
    EngineFacts(None, None, "because"),
]


def test_whatever_a_layout_may_hold_crosses() -> None:
    kinds = {kind for union in (Assembly, Piece, Step) for kind in get_args(union)}
    assert kinds <= {*TYPES}


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    here, there = map(Channel, socket.socketpair())
    yield here, there
    here.close()
    there.close()


def crossed(value: Any) -> Any:
    here, there = map(Channel, socket.socketpair())
    sender = threading.Thread(target=here.send, args=(frame("kind", value),))
    sender.start()
    try:
        kind, found = there.receive()
        sender.join()
    finally:
        here.close()
        there.close()
    assert kind == "kind"
    return found


@pytest.mark.parametrize("value", PLAIN_VALUES, ids=lambda value: type(value).__name__)
def test_values_come_back_equal(value: Any) -> None:
    found = crossed(value)
    assert found == value
    assert type(found) is type(value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner).map(tuple),
)


@given(JSON)
def test_any_nest_of_scalars_comes_back_equal(value: Any) -> None:
    assert crossed(value) == value


def test_no_number_is_rounded() -> None:
    values = tuple(np.random.default_rng(0).standard_normal(1000).tolist())
    assert crossed(values) == values
    assert math.isnan(crossed(math.nan))


def request_of(pixels: torch.Tensor, **fields: Any) -> Request:
    one = image(3, rows=4, patches=pixels.shape[0])
    patches = ImagePatches(pixels, one.layout, one.digest)
    prompt = Prompt((1, 99, 99, 99, 99, 2), (ImageSpan(1, 5, 0),), (one.layout,), (0,))
    return Request("name", prompt, SamplingParams(), 5, "salt", (patches,), **fields)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_request_keeps_its_pixels(dtype: torch.dtype) -> None:
    pixels = torch.arange(24).reshape(4, 6).to(dtype)
    request = request_of(pixels, trace_id="client's")
    found = crossed(request)
    for name in ("request_id", "sampling", "max_tokens", "cache_salt", "trace_id"):
        assert getattr(found, name) == getattr(request, name)
    for name in ("token_ids", "spans", "layouts", "order"):
        assert getattr(found.prompt, name) == getattr(request.prompt, name)
    (patches,) = found.images
    assert patches.pixels.dtype == dtype
    assert torch.equal(patches.pixels, pixels)
    assert patches.digest == request.images[0].digest
    assert found.cache_ids() == request.cache_ids()


def test_what_choices_share_crosses_once_and_stays_shared() -> None:
    request = request_of(torch.zeros(4, 6))
    choices = tuple(dataclasses.replace(request, request_id=f"name-{number}") for number in range(8))
    alone, together = (sum(map(len, frame("add", value))) for value in ((request,), choices))
    assert together < 2 * alone
    found = crossed(choices)
    assert [one.request_id for one in found] == [one.request_id for one in choices]
    assert len({id(one.prompt) for one in found}) == 1
    assert len({id(one.images[0]) for one in found}) == 1
    assert found[0].prompt.layouts[0] is found[0].images[0].layout


def test_pixels_are_not_copied_before_they_are_sent() -> None:
    pixels = torch.zeros(4, 1 << 16, dtype=torch.uint8)
    buffers = frame("add", (request_of(pixels),))
    assert np.shares_memory(np.frombuffer(buffers[-1], np.uint8), pixels.numpy())


@pytest.mark.parametrize(
    "error",
    [
        UserError("bad\nline", code="a", param="messages[0]", status=404),
        ImageError("no picture", code="b"),
        ConfigError("unknown"),
        WeightError("missing"),
        EngineError("down", code="engine_down", status=503),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_keep_their_class_and_fields(error: SiglaneError) -> None:
    for found in (crossed(error), crossed(TokenDelta("a", finished=Finished("error", error=error))).finished.error):
        assert type(found) is type(error)
        assert (found.args, found.__dict__) == (error.args, error.__dict__)


def test_vectors_own_their_memory() -> None:
    """Whoever keeps one of them keeps nothing else of what came with it."""
    vectors = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    found = crossed(tuple((number, Embedding(vector, 0.5, 0.25)) for number, vector in enumerate(vectors)))
    for (_, one), vector in zip(found, vectors, strict=True):
        assert np.array_equal(one.vector, vector)
        assert (one.queue, one.encode) == (0.5, 0.25)
        assert one.vector.base is None
    scale, bias = crossed(Calibration(torch.tensor([2.5]), torch.tensor([-1.0])))
    assert (scale.item(), bias.item()) == (2.5, -1.0)


def test_thousands_of_texts_cross_a_full_connection() -> None:
    """More buffers than one call takes, more bytes than the kernel holds, a reader that comes late."""
    here, there = map(Channel, socket.socketpair())
    texts = [np.full(64, number, np.int64) for number in range(5000)]
    sender = threading.Thread(target=here.send, args=(frame("embed", list(enumerate(texts))),))
    sender.start()
    time.sleep(0.05)
    assert sender.is_alive()
    _, found = there.receive()
    sender.join()
    assert all(number == place and np.array_equal(one, texts[place]) for place, (number, one) in enumerate(found))
    assert len(found) == 5000


def test_threads_do_not_mix_their_frames(ends: tuple[Channel, Channel]) -> None:
    here, there = ends
    arrays = [np.full(200_000, number, np.uint8) for number in range(4)]
    threads = [threading.Thread(target=here.send, args=(frame("one", array),)) for array in arrays * 3]
    for thread in threads:
        thread.start()
    found = [there.receive()[1] for _ in threads]
    assert sorted(array[0] for array in found) == sorted(list(range(4)) * 3)
    assert all((array == array[0]).all() for array in found)


def test_the_end_is_told(ends: tuple[Channel, Channel]) -> None:
    here, there = ends
    here.send(frame("last", 1))
    here.hang_up()
    assert there.receive() == ("last", 1)
    with pytest.raises(EOFError):
        there.receive()
    there.send(frame("still", 2))  # the other direction is open
    assert here.receive() == ("still", 2)


def test_a_sender_that_waits_is_freed_when_its_end_hangs_up(ends: tuple[Channel, Channel]) -> None:
    here, _ = ends
    failures: list[type[BaseException]] = []

    def send() -> None:
        try:
            here.send(frame("large", np.zeros(1 << 24, np.uint8)))
        except OSError as error:
            failures.append(type(error))

    sender = threading.Thread(target=send)
    sender.start()
    sender.join(0.1)
    assert sender.is_alive()
    here.hang_up()
    sender.join(5)
    assert failures == [BrokenPipeError]


class Innocent:
    def __reduce__(self) -> tuple[Any, ...]:
        raise AssertionError("it was pickled")


@pytest.mark.parametrize(
    "value", [Innocent(), {"set"}, {"a": 1}, print, 1j, np.float32(1)], ids=lambda v: type(v).__name__
)
def test_nothing_else_is_sent(value: object) -> None:
    with pytest.raises(TypeError, match="does not cross"):
        frame("add", (value,))


@pytest.mark.parametrize(
    "text",
    [
        "cos\nsystem\n(S'true'\ntR.",
        "[0,1]",
        '{"__reduce__": ["os.system", "true"]}',
        json.dumps([5, "name"]),
        "\x80\x05cposix\nsystem\n.",
    ],
)
def test_a_clients_text_stays_a_text(text: str) -> None:
    sampling = SamplingParams(stop=(text,))
    request = dataclasses.replace(request_of(torch.zeros(4, 6)), cache_salt=text, sampling=sampling, trace_id=text)
    found = crossed(request)
    assert (found.cache_salt, found.sampling.stop, found.trace_id) == (text, (text,), text)


@pytest.mark.parametrize(
    "body",
    [[5 + len(TYPES), 1], [999], ["os.system", "true"], [1, 0], [3, 0], [{}], [5, 1, 2]],
    ids=str,
)
def test_a_frame_can_name_nothing_but_the_listed_types(ends: tuple[Channel, Channel], body: object) -> None:
    here, there = ends
    header = json.dumps(["kind", body, []]).encode()
    here.send([memoryview(HEAD.pack(len(header)) + header)])
    with pytest.raises((IndexError, TypeError, ValueError)):
        there.receive()


def test_arrays_of_objects_do_not_cross(ends: tuple[Channel, Channel]) -> None:
    """They would be addresses of memory."""
    with pytest.raises(TypeError):
        frame("kind", np.array([object()]))
    here, there = ends
    header = json.dumps(["kind", [3, 0], [["|O", [1]]]]).encode()
    here.send([memoryview(HEAD.pack(len(header)) + header + bytes(8))])
    with pytest.raises(TypeError):
        there.receive()


def test_the_engines_room_imports_no_pickle() -> None:
    for path in Path(siglane.engine.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"pickle", "marshal", "shelve", "dill"}, path
