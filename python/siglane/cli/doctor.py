"""`siglane doctor`: what this machine has, what is missing and how to get it, or whether a model's files are whole."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO

from siglane.cli.common import COMMON, MODEL, Argument, checkpoint_of
from siglane.cli.output import emit_json
from siglane.errors import SiglaneError, UserError
from siglane.look.words import counted
from siglane.settings.flags import OptionGroup, known_variables, read_options
from siglane.settings.options import PREFIX, CommandOptions, option

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

Status = Literal["ok", "note", "broken"]
MARKS: dict[Status, str] = {"ok": "ok", "note": "--", "broken": "BROKEN"}
PYTHON = (3, 11)
FEWER_BITS: tuple[Literal["8bit", "4bit"], ...] = ("8bit", "4bit")  # that a CPU may have
GEMM_SIDE = {"cpu": 1024, "cuda": 8192}
GEMM_SECONDS = 0.3
LITTLE_MEMORY, LITTLE_DISK, FEW_FILES = 4 << 30, 5 << 30, 1024
GIB = 1 << 30
MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorOptions(CommandOptions):
    COMMAND = "doctor"

    json: bool = option(False, "print one JSON object")
    host: Literal["sglang", "vllm"] | None = option(
        None, "examine siglane inside this engine instead, with a short self-test"
    )


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. broken: siglane cannot work like this; note: something could be better, `detail` says how."""

    name: str
    status: Status
    detail: str


ARGUMENTS = (
    Argument("model", "MODEL", "examine this model's files instead, and write their SHA-256 where there is none", "?"),
)
OPTIONS = (OptionGroup(DoctorOptions, "doctor"), MODEL)


def run(arguments: argparse.Namespace, out: TextIO) -> int:
    options = read_options(DoctorOptions, arguments)
    checks = []
    for examine in _asked(arguments, options):
        for check in _examined(examine):
            checks.append(check)
            if not options.json:
                out.write(f"{MARKS[check.status]:>6}  {check.name:<20} {check.detail}\n")
                out.flush()
    broken = [check for check in checks if check.status == "broken"]
    if options.json:
        emit_json({"ok": not broken, "siglane": version("siglane"), "checks": [asdict(check) for check in checks]}, out)
        out.flush()
    if broken:
        complaint = "; ".join(f"{check.name}: {check.detail}" for check in broken)
        raise SiglaneError(complaint) if arguments.model is None else UserError(complaint, code="bad_checkpoint")
    return 0


def _asked(arguments: argparse.Namespace, options: DoctorOptions) -> tuple[Callable[[], Iterator[Check]], ...]:
    """What is examined: this machine, an engine, or the files of a model."""
    if arguments.model is not None:
        if options.host is not None:
            raise UserError("MODEL and --host exclude each other", code="bad_option")

        def model() -> Iterator[Check]:
            from siglane.cli.model_files import examine

            for name, status, detail in examine(checkpoint_of(arguments)):
                yield Check(name, status, detail)

        return (model,)
    if options.host is not None:
        return (_python, _sglang if options.host == "sglang" else _vllm)
    return (_python, _packages, _extras, _devices, _attention, _fewer_bits, _memory, _disk, _files, _environment, _demo)


def _examined(examine: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """The findings of one check; what it stumbles over is a finding too."""
    try:
        yield from examine()
    except UserError as error:
        yield Check(examine.__name__.strip("_"), "broken", error.message)
    except Exception as error:
        yield Check(examine.__name__.strip("_"), "broken", f"{type(error).__name__}: {error}")


def _sglang() -> Iterator[Check]:
    from siglane.hosts.sglang.doctor import examine

    for name, broken, detail in examine():
        yield Check(name, "broken" if broken else "ok", detail)


def _vllm() -> Iterator[Check]:
    from siglane.hosts.vllm.doctor import examine

    for name, broken, detail in examine():
        yield Check(name, "broken" if broken else "ok", detail)


def _python() -> Iterator[Check]:
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {sys.executable}"
    yield Check("python", "ok" if sys.version_info >= PYTHON else "broken", detail)
    if os.name != "posix":
        yield Check("system", "broken", "siglane runs on Linux and macOS only")


def _packages() -> Iterator[Check]:
    """Every required distribution, against the version siglane asks for."""
    for name, wanted, extra in _requirements():
        if extra is not None:
            continue
        found = _version(name)
        if found is None:
            yield Check(name, "broken", f"not installed; pip install '{name}{wanted}'")
        elif not wanted.contains(found, prereleases=True):
            yield Check(name, "broken", f"{found} is installed, siglane needs {wanted}; pip install '{name}{wanted}'")
        else:
            yield Check(name, "ok", found)


def _extras() -> Iterator[Check]:
    requirements = list(_requirements())
    for extra in ("server", "cpu", "cuda", "sglang", "vllm"):
        missing = [name for name, _, of in requirements if of == extra and _version(name) is None]
        if missing:
            yield Check(f"extra {extra}", "note", f"not installed; pip install 'siglane[{extra}]'")
        else:
            yield Check(f"extra {extra}", "ok", "installed")


def _requirements() -> Iterator[tuple[str, SpecifierSet, str | None]]:
    """(distribution, version specifier, extra) of what siglane declares."""
    from packaging.requirements import Requirement

    for text in requires("siglane") or ():
        requirement = Requirement(text)
        extra = str(requirement.marker).partition("extra == ")[2].strip('"') if requirement.marker else None
        yield requirement.name, requirement.specifier, extra


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices() -> Iterator[Check]:
    import torch

    speed = _gemm("cpu", torch.float32)
    kernels = torch.backends.cpu.get_cpu_capability()
    cores, threads = counted(os.cpu_count() or 1, "core"), counted(torch.get_num_threads(), "thread")
    yield Check("cpu", "ok", f"{cores}, {threads}, {kernels}, {speed:,.0f} GFLOP/s")
    if not torch.cuda.is_available():
        yield Check("cuda", "note", "no GPU that torch can use; the CPU is used")
        return
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        speed = _gemm(f"cuda:{index}", torch.bfloat16)
        detail = f"{facts.name}, {facts.total_memory / GIB:.0f} GiB, bfloat16 {speed:,.0f} GFLOP/s"
        yield Check(f"cuda:{index}", "ok", detail)


def _gemm(device: str, dtype: object) -> float:
    """GFLOP/s of a square matrix product."""
    import torch

    side = GEMM_SIDE[device.partition(":")[0]]
    a = torch.ones(side, side, device=device, dtype=dtype)  # type: ignore[call-overload]
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else torch.cpu.synchronize
    a @ a
    synchronize()
    rounds, begin = 0, time.perf_counter()
    while (seconds := time.perf_counter() - begin) < GEMM_SECONDS:
        a @ a
        synchronize()
        rounds += 1
    return float(2 * side**3 * rounds / seconds / 1e9)


def _attention() -> Iterator[Check]:
    import torch

    from siglane.nn.attention import runnable_backends

    device, dtype = torch.device("cpu"), torch.float32
    if torch.cuda.is_available():
        device, dtype = torch.device("cuda"), torch.bfloat16
    yield Check("vision attention", "ok", f"{runnable_backends('auto', device, dtype)[0]} on {device.type}")
    for name, package in (("flash_attn", "flash-attn"), ("flashinfer", "flashinfer-python")):
        if importlib.util.find_spec(name) is not None:
            yield Check(package, "ok", _version(package) or "installed")


def _fewer_bits() -> Iterator[Check]:
    """Whether `--quantization` can be had on this CPU."""
    import torch

    from siglane.nn.quantise import kernel

    try:
        for kind in FEWER_BITS:
            kernel(kind, torch.device("cpu"))
    except UserError as error:
        yield Check("fewer bits", "note", error.message)
    else:
        yield Check("fewer bits", "ok", f"{' and '.join(FEWER_BITS)} on cpu")


def _memory() -> Iterator[Check]:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if not MEMINFO.exists():  # macOS, which tells no program how much is free
        yield Check("memory", "ok" if total >= LITTLE_MEMORY else "note", f"{total / GIB:.1f} GiB in all")
        return
    lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    status: Status = "ok" if free >= LITTLE_MEMORY else "note"
    yield Check("memory", status, f"{free / GIB:.1f} of {total / GIB:.1f} GiB available")


def _disk() -> Iterator[Check]:
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE)
    folder = next(parent for parent in (cache, *cache.parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    writable = os.access(folder, os.W_OK)
    status: Status = "ok" if writable and free >= LITTLE_DISK else "note"
    detail = f"{free / GIB:.1f} GiB free in {cache}"
    yield Check("model cache", status, detail if writable else detail + ", which is not writable; set HF_HOME")


def _files() -> Iterator[Check]:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    detail = f"{soft} (at most {hard}); each connection of the server needs one, raise it with ulimit -n"
    yield Check("open files", "note" if soft < FEW_FILES else "ok", detail if soft < FEW_FILES else str(soft))


def _environment() -> Iterator[Check]:
    """Variables with our prefix that no command reads are probably misspelt."""
    from siglane.cli.main import command_options
    from siglane.hosts.settings import SglangHostConfig, VllmHostConfig

    groups = [*COMMON, *(group for options in command_options().values() for group in options)]
    known = known_variables([*(group.config for group in groups), SglangHostConfig, VllmHostConfig])
    found = sorted(name for name in os.environ if name.startswith(PREFIX))
    for name in found:
        if name in known:
            yield Check(name, "ok", "set")
        else:
            yield Check(name, "note", "is set, but no siglane command reads it")


def _demo() -> Iterator[Check]:
    """The whole path on this machine's arithmetic: picture, tower, projector, language model, text."""
    from siglane.cli.demo import load_example
    from siglane.llm import LLM
    from siglane.types import SamplingParams

    example = load_example()
    begin = time.perf_counter()
    llm = LLM("demo", device="cpu")
    loaded = time.perf_counter()
    prompt = {"prompt": example.question, "images": [example.picture]}
    (answer,) = llm.generate(prompt, SamplingParams(max_tokens=64))
    seconds = time.perf_counter() - loaded
    if answer.text.strip() == example.answer:
        yield Check("demo model", "ok", f"loads in {loaded - begin:.1f} s, answers in {seconds:.1f} s")
    else:
        yield Check("demo model", "broken", f"answered {answer.text[:80]!r}, expected {example.answer!r}")
