"""What the server's process and its engine say to each other: frames of JSON and raw arrays, never pickle.

A frame is the length of its header (u64, little endian), the header and the bytes of its arrays one after the other.
The header is the JSON of `[kind, value, [[dtype, shape], ...]]`. In a value, what is no JSON scalar is a list that
begins with a number: a mark below, or the number of a type in `TYPES`, whose fields follow in its order. Nothing but
those types can come out of a frame, whatever a client has put into a text.
"""

from __future__ import annotations

import dataclasses
import json
import select
import socket
import struct
import threading
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from siglane import types
from siglane.engine.engine import EngineStats
from siglane.engine.process.embed_worker import Embedding
from siglane.errors import (
    ConfigError,
    EngineError,
    ImageError,
    OtherWeights,
    SiglaneError,
    UserError,
    WeightError,
    rebuild,
)
from siglane.families.two_tower import Calibration

Array = npt.NDArray[Any]
Room = TypeVar("Room", bytearray, memoryview)

HEAD = struct.Struct("<Q")
BUFFERS_PER_CALL = 1000  # POSIX systems take 1024

# marks: a tuple, an object that this frame has built before, bytes in hexadecimal, an array as numpy's and as torch's
TUPLE, AGAIN, BYTES, ARRAY, TENSOR = range(5)
SCALARS = frozenset({type(None), bool, int, float, str})


class EngineFacts(NamedTuple):
    """What the parent learns once all is loaded."""

    context_length: int | None  # tokens of prompt and answer together, None where no model chats
    calibration: Calibration | None = None  # of the towers, on the host, None without them
    not_shared_because: str | None = None  # of `LoadedTwoTower`
    kv_bytes_per_token: int | None = None  # where a model chats


TYPES: tuple[type[Any], ...] = (
    # a request and its images
    *(
        types.Request,
        types.Read,
        types.Prompt,
        types.ImageSpan,
        types.SamplingParams,
        types.Constraint,
        types.ImagePatches,
        types.ImageLayout,
    ),
    *(types.Tile, types.Resize, types.Pad, types.Size, types.Grid, types.Box),
    *(types.ImagePlaceholder, types.Indicator, types.Token, types.Marker),
    *(types.MergedScales, types.AnyRes, types.Newline, types.MergedFirst),
    # what the engine answers
    *(types.TokenDelta, types.TokenLogprob, types.Readout, types.Finished, types.Timings, Embedding),
    *(EngineStats, EngineFacts, Calibration),
    *(SiglaneError, UserError, ImageError, ConfigError, WeightError, OtherWeights, EngineError),
)
FIRST_TYPE = 5  # numbers below are marks
NUMBERS = {kind: number for number, kind in enumerate(TYPES, FIRST_TYPE)}


def _fields_of(kind: type[Any]) -> tuple[str, ...]:
    """Names of what an object of this type is built from; errors are not built from their fields."""
    if issubclass(kind, SiglaneError):
        return ()
    return tuple(field.name for field in dataclasses.fields(kind)) if dataclasses.is_dataclass(kind) else kind._fields


FIELDS = {kind: _fields_of(kind) for kind in TYPES}


class Encoder:
    """Writes values of one frame as JSON can hold them; `arrays` follow the header. TypeError for a type that is not in
    `TYPES`. An object that comes again, as the prompt of n choices does, is written once."""

    def __init__(self) -> None:
        self.arrays: list[Array] = []
        self._written: dict[int, int] = {}  # by identity: the frame's value keeps them all alive

    def encode(self, value: Any) -> Any:
        kind = type(value)
        if kind in SCALARS:
            return value
        if kind is tuple or kind is list:
            return [TUPLE, *(value if SCALARS.issuperset(map(type, value)) else map(self.encode, value))]
        if kind is bytes:
            return [BYTES, value.hex()]
        if kind is np.ndarray or kind is torch.Tensor:
            self.arrays.append(np.ascontiguousarray(value if kind is np.ndarray else value.numpy()))
            return [ARRAY if kind is np.ndarray else TENSOR, len(self.arrays) - 1]
        if (number := self._written.get(id(value))) is not None:
            return [AGAIN, number]
        if kind not in NUMBERS:
            raise TypeError(f"{kind.__name__} does not cross to or from the engine's process")
        if isinstance(value, SiglaneError):
            parts = [value.args, tuple(value.__dict__.items())]
        else:
            parts = [getattr(value, name) for name in FIELDS[kind]]
        encoded = [NUMBERS[kind], *map(self.encode, parts)]
        self._written[id(value)] = len(self._written)
        return encoded


class Decoder:
    """Reads what `Encoder` wrote."""

    def __init__(self, arrays: list[Array]) -> None:
        self._arrays = arrays
        self._built: list[Any] = []

    def decode(self, node: Any) -> Any:
        if type(node) is not list:
            return node
        number, *parts = node
        if number == TUPLE:
            return tuple(map(self.decode, parts)) if list in map(type, parts) else tuple(parts)
        if number == AGAIN:
            return self._built[parts[0]]
        if number == BYTES:
            return bytes.fromhex(parts[0])
        if number == ARRAY:
            return self._arrays[parts[0]]
        if number == TENSOR:
            return torch.from_numpy(self._arrays[parts[0]])
        kind = TYPES[number - FIRST_TYPE]
        values = [self.decode(part) for part in parts]
        if issubclass(kind, SiglaneError):
            built: Any = rebuild(kind, values[0], dict(values[1]))
        else:
            built = kind(**dict(zip(FIELDS[kind], values, strict=True)))
        self._built.append(built)
        return built


def frame(kind: str, value: Any) -> list[memoryview]:
    """The buffers of one frame, in order; arrays are not copied."""
    encoder = Encoder()
    body = encoder.encode(value)
    shapes = [[array.dtype.str, array.shape] for array in encoder.arrays]
    header = json.dumps([kind, body, shapes], separators=(",", ":")).encode()
    return [memoryview(HEAD.pack(len(header)) + header), *map(_bytes_of, encoder.arrays)]


def _bytes_of(array: Array) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


class Channel:
    """One end of the connection. Threads may send at the same time; one receives.

    received: how many pieces of frames have come, which grows while the other end writes.
    """

    def __init__(self, end: socket.socket) -> None:
        self.received = 0
        self._socket = end
        self._sending = threading.Lock()
        self._readable = select.poll()  # select.select knows no descriptors above 1023
        self._readable.register(end, select.POLLIN)

    def wait(self, seconds: float | None) -> bool:
        """Whether something has come, at the latest after `seconds`; None waits for it."""
        return bool(self._readable.poll(None if seconds is None else seconds * 1000))

    def send(self, buffers: list[memoryview]) -> None:
        """Sends a `frame`, and waits while the other end does not read. OSError when it is gone."""
        with self._sending:
            first = 0
            while first < len(buffers):
                sent = self._socket.sendmsg(buffers[first : first + BUFFERS_PER_CALL])
                while first < len(buffers) and sent >= len(buffers[first]):
                    sent -= len(buffers[first])
                    first += 1
                if sent:
                    buffers[first] = buffers[first][sent:]

    def receive(self) -> tuple[str, Any]:
        """The next frame's kind and value. EOFError or OSError when the other end is gone."""
        (length,) = HEAD.unpack(self._fill(bytearray(HEAD.size)))
        kind, body, shapes = json.loads(self._fill(bytearray(length)))
        # each array has its own memory: none keeps the frame's others alive
        arrays = [np.empty(shape, dtype) for dtype, shape in shapes]
        for array in arrays:
            self._fill(_bytes_of(array))
        return kind, Decoder(arrays).decode(body)

    def hang_up(self) -> None:
        """The other end reads to the end and then gets EOFError; nobody waits to send here any more."""
        self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._socket.close()

    def _fill(self, room: Room) -> Room:
        left = memoryview(room)
        while left:
            if not (count := self._socket.recv_into(left)):
                raise EOFError
            self.received += 1
            left = left[count:]
        return room
