"""What can go wrong, by whose fault. Every message is one line: what is wrong, which input, what to do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self


class SiglaneError(Exception):
    """Base of every error siglane raises on purpose. `exit_code` is what the CLI returns for it."""

    exit_code = 1

    def __reduce__(self) -> tuple[Any, ...]:  # class and keyword-only fields survive a process boundary
        return rebuild, (type(self), self.args, self.__dict__)


def rebuild(kind: type[SiglaneError], args: tuple[Any, ...], fields: dict[str, Any]) -> SiglaneError:
    """The error whose `args` and `__dict__` these are."""
    error = kind.__new__(kind, *args)
    error.__dict__.update(fields)
    return error


class UserError(SiglaneError, ValueError):
    """The caller's input is at fault. HTTP 400 unless `status` says otherwise, CLI exit code 2.

    code: a short machine-readable name (`image_decode_failed`); param: the offending field
    (`messages[0].content[1]`), None when the whole request is at fault.
    """

    exit_code = 2

    def __init__(self, message: str, *, code: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.param = param
        self.status = status

    def at(self, param: str) -> Self:
        """The same error, blamed on `param`."""
        blamed = copy.copy(self)
        blamed.param = param
        return blamed


@contextmanager
def blaming(param: str, blame: Callable[[UserError, str], UserError] = UserError.at) -> Iterator[None]:
    """Blames `param` for every UserError that is raised inside."""
    try:
        yield
    except UserError as error:
        raise blame(error, param) from error


class ImageError(UserError):
    """An image that cannot be used (undecodable, too large, forbidden source)."""


class ConfigError(UserError):
    """A model's configuration is missing, unknown or contradictory. Names the key and the value."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="bad_model_config")


class WeightError(UserError):
    """A checkpoint's tensors do not match the model: missing, left over, duplicated or of another shape."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="bad_checkpoint")


class OtherWeights(WeightError):
    """A tensor differs from the one that already stands in its place."""


class EngineError(SiglaneError):
    """The engine failed at one request (HTTP 5xx). `code` as in `UserError`."""

    def __init__(self, message: str, *, code: str = "engine_error", status: int = 500) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.status = status


class EngineLost(EngineError):
    """A request's engine died while it had it. life: which one it was; clients: whose requests it took with it."""

    def __init__(self, reason: EngineError, *, life: int, clients: int) -> None:
        super().__init__(reason.message, code=reason.code, status=reason.status)
        self.life, self.clients = life, clients
