"""What can keep siglane from serving a model that it was asked for: said before the host starts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from siglane.errors import UserError


def check_start(
    asked: str, arguments: object, allowed: Mapping[str, Sequence[Any]], variables: Mapping[str, str], hint: str
) -> None:
    """asked: the model; arguments: the host's; allowed: the values that siglane knows of some of them; variables: of
    the environment, with the only value that they may have; hint: what to do about an argument. UserError names the
    first that is another."""
    for variable, only in variables.items():
        if (found := os.environ.get(variable, only)) != only:
            message = f"{asked} is served by {only}, but {variable} is {found}; unset it"
            raise UserError(message, code="bad_environment", param=variable)
    for name, values in allowed.items():
        if (value := getattr(arguments, name)) not in values:
            raise UserError(f"{asked} cannot be served with {name}={value}: {hint}", code="bad_argument", param=name)
