"""The floors of docs/structures.md: imports go down only, and rooms on one floor do not see each other."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from pathlib import Path, PurePosixPath

import pytest

import siglane

PACKAGE = Path(siglane.__file__).parent

# room (a folder or a file of python/siglane) -> its floor
FLOORS = {
    "types": 0,
    "errors": 0,
    "tiling": 1,
    "nn": 1,
    "config": 2,
    "settings": 3,
    "image": 4,
    "vision": 4,
    "projector": 4,
    "text": 4,
    "lm": 4,
    "weights": 4,
    "media": 4,
    "families": 5,
    "batch": 6,
    "engine": 6,
    "tagging": 6,
    "training": 6,
    "look": 6,
    "hosts": 6,
    "verify": 6,
    "llm": 7,
    "server": 7,
    "cli": 8,
}
FRONT_DOOR = PACKAGE / "__init__.py"  # re-exports everything, so nobody inside goes through it
LONGEST_FILE, LONGEST_FUNCTION = 350, 45
LONGEST_VLLM = 600  # lines of hosts/vllm: what both hosts need stands in hosts/, once
LOADERS = ("import_module", "__import__")
HOSTS = {name: PurePosixPath("hosts", name) for name in ("sglang", "vllm")}

VISION_STACK = ("types", "errors", "tiling", "nn", "config", "settings", "image", "vision", "projector")
ON_DEMAND = (  # imported by the function that fetches a URL, and by the operators that start Triton's kernels
    *(
        "media/remote.py",
        "nn/cuda/paged_decode.py",
        "nn/cuda/pointwise.py",
        "nn/cuda/best_token.py",
        "nn/cuda/fixed_product.py",
        "nn/cuda/mask.py",
        "nn/cuda/experts.py",
        "nn/cuda/coded_product.py",
        "nn/cuda/fp8_rows.py",
    ),
)
EXTRAS = (
    *("fastapi", "orjson", "pybase64", "prometheus_client", "python_multipart", "pyarrow"),
    *("av", "sglang", "vllm", "flashinfer", "ray", "triton"),
)
HTTP_CLIENT = "httpx2"  # huggingface_hub has it too, so only the vision stack proper can do without


@cache
def parsed(source: str) -> ast.Module:
    """Several tests read every file."""
    return ast.parse(source)


def room_of(path: PurePosixPath) -> str:
    """`nn/linear.py` -> nn, `llm.py` -> llm."""
    return path.parts[0].removesuffix(".py")


def imported_names(tree: ast.AST, path: PurePosixPath) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import of the file at `path`, wherever it stands: top, function, type hints only."""
    package = ("siglane", *path.parent.parts)
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                above = package[: len(package) - level + 1] if level else ()
                origin = ".".join((*above, *([module] if module else [])))
                yield from ((node.lineno, f"{origin}.{alias.name}") for alias in names)
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=[ast.Constant(str(target)), *_]):
                if name in LOADERS:
                    yield node.lineno, target


def violations(source: str, path: PurePosixPath) -> list[str]:
    """What the file at `path` (relative to the package) imports although its floor forbids it."""
    room, found = room_of(path), []
    if room not in FLOORS:
        return [f"{path}: room {room!r} stands on no floor"]
    for line, name in imported_names(parsed(source), path):
        top, *rest = name.split(".")
        if top in HOSTS and not path.is_relative_to(HOSTS[top]):
            found.append(f"{path}:{line}: only {HOSTS[top]} imports {top}")
        if top != "siglane" or rest[:1] == ["__version__"]:
            continue
        target = rest[0] if rest else ""
        if target not in FLOORS:
            found.append(f"{path}:{line}: {name} is no room of the package, import from the room that defines it")
        elif target != room and FLOORS[target] >= FLOORS[room]:
            direction = "its own" if FLOORS[target] == FLOORS[room] else "a higher"
            found.append(f"{path}:{line}: {room} (floor {FLOORS[room]}) imports {target} on {direction} floor")
    return found


def files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != FRONT_DOOR)


def relative(path: Path) -> PurePosixPath:
    return PurePosixPath(path.relative_to(PACKAGE).as_posix())


def test_contributing_lists_these_floors() -> None:
    page = (PACKAGE.parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if re.fullmatch(r"\d  \S.*", line)]
    assert {room: int(line[0]) for line in lines for room in line[3:].split(" · ")} == FLOORS


def test_imports_go_down_only() -> None:
    assert len(files()) > 20
    found = [line for path in files() for line in violations(path.read_text(encoding="utf-8"), relative(path))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("nn/linear.py", "import siglane.vision.tower", "nn (floor 1) imports vision on a higher floor"),
        ("nn/linear.py", "from siglane.vision import tower", "imports vision on a higher floor"),
        ("nn/linear.py", "from siglane import vision", "imports vision on a higher floor"),
        ("nn/linear.py", "from siglane import nn, vision", "imports vision on a higher floor"),
        ("nn/linear.py", "import torch, siglane.vision as v", "imports vision on a higher floor"),
        ("vision/tower.py", "from siglane.projector.mlp import Projector", "imports projector on its own floor"),
        ("types.py", "from siglane.errors import UserError", "types (floor 0) imports errors on its own floor"),
        ("llm.py", "from siglane.server.app import app", "imports server on its own floor"),
        ("vision/tower.py", "def late():\n    from siglane.engine import batch", ":2: vision (floor 4) imports engine"),
        ("nn/norm.py", "if TYPE_CHECKING:\n    from siglane.lm.qwen import QwenModel", "imports lm on a higher floor"),
        ("nn/norm.py", "from ..lm.qwen import QwenModel", "imports lm on a higher floor"),
        ("nn/norm.py", "from .. import lm", "imports lm on a higher floor"),
        ("hosts/sglang/models/vila.py", "from ....engine import batch", "imports engine on its own floor"),
        ("families/registry.py", "importlib.import_module('siglane.cli.main')", "imports cli on a higher floor"),
        ("families/registry.py", "__import__('siglane.engine')", "imports engine on a higher floor"),
        ("engine/process/supervisor.py", "from siglane import LLM", "siglane.LLM is no room of the package"),
        ("engine/process/supervisor.py", "import siglane", "siglane is no room of the package"),
        ("engine/process/supervisor.py", "from siglane import *", "siglane.* is no room of the package"),
        ("engine/process/supervisor.py", "import sglang", "only hosts/sglang imports sglang"),
        ("cli/main.py", "def run():\n    from sglang.srt import server", ":2: only hosts/sglang imports sglang"),
        ("hosts/doctor.py", "import sglang.srt", "only hosts/sglang imports sglang"),
        ("hosts/sglang/doctor.py", "import vllm.envs", "only hosts/vllm imports vllm"),
        ("attic/old.py", "", "'attic' stands on no floor"),
    ],
)
def test_a_forbidden_import_is_found(path: str, source: str, complaint: str) -> None:
    found = violations(source, PurePosixPath(path))
    assert len(found) == 1
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("cli/main.py", "import siglane.llm, siglane.server.app\nfrom siglane import engine, __version__"),
        ("vision/tower.py", "from siglane.vision.pool import MapHead\nfrom . import encoder\nfrom .embed import Patch"),
        ("vision/tower.py", "import torch\nfrom siglane.types import Grid\nfrom ..nn.linear import copy_checked"),
        ("hosts/sglang/bridge.py", "import sglang.srt.layers\nfrom siglane.families import registry\nfrom . import x"),
        ("nn/norm.py", "'''import siglane.vision'''  # import sglang\nload('siglane.vision')"),
        ("engine/process/supervisor.py", "import sglang_of_another_name"),
    ],
)
def test_an_allowed_import_is_not(path: str, source: str) -> None:
    assert violations(source, PurePosixPath(path)) == []


def imported_files(path: PurePosixPath, source: str, known: Collection[PurePosixPath]) -> set[PurePosixPath]:
    """The files of the package that the file at `path` imports, wherever the import stands."""
    found = set()
    for _, name in imported_names(parsed(source), path):
        parts = name.split(".")
        if parts[0] != "siglane":
            continue
        # `siglane.nn.linear.QKV`: the longest beginning that is a file
        for length in range(len(parts), 1, -1):
            module = PurePosixPath(*parts[1:length])
            places = (module.with_suffix(".py"), module / "__init__.py")
            if file := next((place for place in places if place in known), None):
                found.add(file)
                break
    return found - {path}


def cycle(imports: Mapping[PurePosixPath, set[PurePosixPath]]) -> list[PurePosixPath]:
    """Files that import each other in a ring, empty where there is none."""
    done: set[PurePosixPath] = set()

    def search(file: PurePosixPath, way: list[PurePosixPath]) -> list[PurePosixPath]:
        if file in way:
            return [*way[way.index(file) :], file]
        if file in done:
            return []
        for target in sorted(imports.get(file, ())):
            if ring := search(target, [*way, file]):
                return ring
        done.add(file)
        return []

    return next((ring for file in sorted(imports) if (ring := search(file, []))), [])


def test_no_files_import_each_other() -> None:
    known = {relative(path) for path in files()}
    sources = {relative(path): path.read_text(encoding="utf-8") for path in files()}
    ring = cycle({path: imported_files(path, source, known) for path, source in sources.items()})
    assert not ring, " -> ".join(map(str, ring))


def test_files_and_functions_fit_in_the_eye() -> None:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    long = []
    for path in files():
        source = path.read_text(encoding="utf-8")
        lines = len(source.splitlines())
        long += [f"{relative(path)}: {lines} lines"] if lines > LONGEST_FILE else []
        for node in ast.walk(parsed(source)):
            if isinstance(node, kinds) and node.end_lineno and node.end_lineno - node.lineno >= LONGEST_FUNCTION:
                long.append(f"{relative(path)}: {node.name} has more than {LONGEST_FUNCTION} lines")
    assert not long, "\n".join(long)


def test_the_second_host_adds_little() -> None:
    lines = sum(len(path.read_text().splitlines()) for path in (PACKAGE / HOSTS["vllm"]).rglob("*.py"))
    assert 0 < lines <= LONGEST_VLLM


def test_a_ring_of_files_is_found() -> None:
    a, b, c = (PurePosixPath(f"nn/{name}.py") for name in "abc")
    sources = {
        a: "from siglane.nn.b import x",
        b: "def late():\n    from siglane.nn import c",
        c: "if TYPE_CHECKING:\n    from siglane.nn.a import A",
    }
    imports = {path: imported_files(path, source, set(sources)) for path, source in sources.items()}
    assert cycle(imports) == [a, b, c, a]
    assert cycle(imports | {c: set()}) == []


def test_a_file_that_does_not_parse_is_not_passed_over() -> None:
    with pytest.raises(SyntaxError):
        violations("from siglane import (", PurePosixPath("nn/linear.py"))


def loaded_after(*groups: list[str]) -> list[set[str]]:
    """Top-level packages that a fresh interpreter holds after importing the first group, then the second, and so on."""
    program = (
        "import importlib, json, sys\n"
        "for group in json.loads(sys.argv[1]):\n"
        "    for name in group: importlib.import_module(name)\n"
        "    print(json.dumps([name for name in sys.modules if '.' not in name]))\n"
    )
    command = [sys.executable, "-c", program, json.dumps(groups)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert answer.returncode == 0, answer.stderr
    return [set(json.loads(line)) for line in answer.stdout.splitlines()]


def modules_of(rooms: Collection[str]) -> list[str]:
    paths = [relative(path) for path in files()]
    wanted = [path for path in paths if room_of(path) in rooms and str(path) not in ON_DEMAND]
    return [".".join(("siglane", *path.with_suffix("").parts)).removesuffix(".__init__") for path in wanted]


@pytest.mark.slow  # a process imports nearly everything
def test_vision_and_models_need_no_extra() -> None:
    vision_stack = modules_of(VISION_STACK)
    assert "siglane.vision.tower" in vision_stack
    whole_models = modules_of([room for room, floor in FLOORS.items() if floor <= FLOORS["families"]])
    package, vision, models = loaded_after(["siglane"], vision_stack, whole_models)
    assert package.isdisjoint({*EXTRAS, HTTP_CLIENT})
    assert vision.isdisjoint({*EXTRAS, HTTP_CLIENT})
    assert models.isdisjoint(EXTRAS)


def test_an_extra_that_is_loaded_is_seen() -> None:
    before, after = loaded_after(["json"], [HTTP_CLIENT])
    assert HTTP_CLIENT not in before
    assert HTTP_CLIENT in after
