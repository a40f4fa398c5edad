"""What the examinations of all hosts (`siglane doctor --host`) share: findings, steps and checks of what is called."""

from __future__ import annotations

import inspect
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import EntryPoint, PackageNotFoundError, version
from typing import Any, NamedTuple

from siglane.hosts.config import SiglaneConfig
from siglane.hosts.settings import HostConfig
from siglane.settings.options import read_environment
from siglane.tiling.rule import ImageBudget

SELF_TEST_SECONDS = 420


class Finding(NamedTuple):
    """One step. broken: siglane does not work here; detail: what was found, or what to do."""

    name: str
    broken: bool
    detail: str


Step = Callable[[], Iterator[Finding]]


def in_order(*steps: tuple[str, Step]) -> Iterator[Finding]:
    """The findings of all steps up to the first with a broken one, which makes the rest pointless. What a step stumbles
    over is a finding too."""
    for name, step in steps:
        failed = False
        try:
            for finding in step():
                yield finding
                failed |= finding.broken
        except Exception as error:
            yield Finding(name, True, f"{type(error).__name__}: {error}")
            return
        if failed:
            return


def installed(distributions: Sequence[str], tested: Sequence[str], extra: str) -> Finding:
    """The host itself. distributions: under which it is published; extra: siglane's."""
    for name in distributions:
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        note = "" if found in tested else f"; siglane is tested with {', '.join(tested)}"
        return Finding(extra, False, found + note)
    return Finding(extra, True, f"not installed; pip install 'siglane[{extra}]'")


def left_out(points: Sequence[EntryPoint], group: str, target: str, variable: str) -> Finding | None:
    """Why the host would not run siglane's plugin. points: the plugins of `group`; target: what siglane's names;
    variable: of the host's, names of the plugins that it loads."""
    ours = [point for point in points if point.value == target]
    if not ours:
        return Finding("plugin", True, f"no entry point in group {group}; install siglane again")
    allowed = os.environ.get(variable, "")
    if allowed and ours[0].name not in [name.strip() for name in allowed.split(",")]:
        return Finding("plugin", True, f"{variable}={allowed} leaves {ours[0].name} out; add it")
    return None


def configuration() -> Finding:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    known = SiglaneConfig.model_type in CONFIG_MAPPING
    return Finding("configuration", not known, "known to transformers" if known else "transformers refused it")


def settings(kind: type[HostConfig]) -> Iterator[Finding]:
    config = read_environment(kind)
    budget = read_environment(ImageBudget)
    media = "http" if config.allow_http_images else "no http"
    files = f"files below {config.allowed_local_media_path}" if config.allowed_local_media_path else "no files"
    detail = f"encoder {config.encoder_parallel}; media: data URLs, {media}, {files}; budget {budget.limits or 'none'}"
    yield Finding("settings", False, detail)


def calls(called: Mapping[str, tuple[str, ...]]) -> Iterator[Finding]:
    """called: every function and class of a host's that siglane calls or extends, as module:name, with the parameters
    that it is given. One that versions have in different places is `module:name or module:name`."""
    fit = 0
    for place, expected in called.items():
        try:
            found = set(inspect.signature(resolve(*place.split(" or "))).parameters)
        except (ImportError, AttributeError) as error:
            yield Finding(place, True, f"not in this version: {error}")
            continue
        missing = [name for name in expected if name not in found]
        if missing:
            yield Finding(place, True, f"has no parameter {', '.join(missing)}")
        else:
            fit += 1
    detail = f"{fit} of {len(called)} functions and classes have the parameters siglane gives them"
    yield Finding("calls", fit < len(called), detail)


def resolve(place: str, *others: str) -> Any:
    """What stands at the first of these places, module:name, that the installed host has. ImportError or AttributeError
    as of the last one."""
    try:
        return pkgutil.resolve_name(place)
    except (ImportError, AttributeError):
        if not others:
            raise
    return resolve(*others)


def self_test(module: str) -> Iterator[Finding]:
    """module: prints one line where a host's engine answers as it should. In a process of its own: an engine takes over
    the process it runs in."""
    command = [sys.executable, "-m", module]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SELF_TEST_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        yield Finding("self-test", True, f"no answer within {SELF_TEST_SECONDS} s")
        return
    lines = [line for line in (done.stdout if done.returncode == 0 else done.stderr).splitlines() if line.strip()]
    yield Finding("self-test", done.returncode != 0, lines[-1] if lines else f"exit code {done.returncode}")
