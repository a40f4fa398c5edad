"""What a server's processes hold while `soak.py` asks it, from /proc and /metrics, and the plot of it."""

from __future__ import annotations

import asyncio
import re
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAGE = 4096
QUIET_SECONDS = 60.0


@dataclass(frozen=True)
class Sample:
    """Sums over the server's processes. at: seconds of a clock that only runs on; bytes: resident; pages_held: of the
    KV cache, by requests; done: requests whose answer has ended."""

    at: float
    processes: int
    bytes: int
    descriptors: int
    threads: int
    pages_held: int
    pages_cached: int
    in_flight: int
    inflight_bytes: int
    done: int


class Watch:
    def __init__(self, pid: int, url: str) -> None:
        self.samples: list[Sample] = []
        self._pid, self._url = pid, url

    def now(self) -> Sample:
        processes = list(descendants(self._pid))
        told, (held, cached) = self._metrics(), (0, 0)
        if "siglane_kv_pages" in told:
            cached = int(told["siglane_kv_pages_cached"])
            held = int(told["siglane_kv_pages"] - told["siglane_kv_pages_free"]) - cached
        return Sample(
            at=time.monotonic(),
            processes=len(processes),
            bytes=sum(int((one / "statm").read_text().split()[1]) * PAGE for one in processes),
            descriptors=sum(len(list((one / "fd").iterdir())) for one in processes),
            threads=sum(len(list((one / "task").iterdir())) for one in processes),
            pages_held=held,
            pages_cached=cached,
            in_flight=int(told["siglane_requests_in_flight"]),
            inflight_bytes=int(told["siglane_inflight_bytes"]),
            done=self.requests(told).total(),
        )

    def requests(self, told: dict[str, float] | None = None) -> Counter[str]:
        """How many there were, by how they ended."""
        label = re.compile(r'siglane_requests_total\{outcome="(\w+)"\}')
        found = ((label.fullmatch(name), value) for name, value in (told or self._metrics()).items())
        return Counter({name[1]: int(value) for name, value in found if name})

    async def sample(self, until: float) -> None:
        """Once a second."""
        while time.monotonic() < until:
            self.samples.append(await asyncio.to_thread(self.now))
            await asyncio.sleep(1)

    async def quiet(self) -> None:
        """Until nothing is in flight any more and connections are closed."""
        end = time.monotonic() + QUIET_SECONDS
        while (now := self.now()).in_flight or now.pages_held:
            if time.monotonic() > end:
                return
            await asyncio.sleep(0.2)
        await asyncio.sleep(2)

    def _metrics(self) -> dict[str, float]:
        with urllib.request.urlopen(f"{self._url}/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}


def descendants(pid: int) -> Iterator[Path]:
    """Folders under /proc of a process and all that it started."""
    yield Path(f"/proc/{pid}")
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from descendants(int(child))


def plot(samples: list[Sample], latencies: list[tuple[float, float]], path: Path) -> None:
    """latencies: of the answers, when they came and how many seconds they took."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    start = samples[0].at
    times = [sample.at - start for sample in samples]
    figure, axes = plt.subplots(2, 2, figsize=(10, 5.2), sharex=True)
    ((seconds, memory), (counts, pages)) = axes
    seconds.plot([at - start for at, _ in latencies], [took for _, took in latencies], ",", color="#2f6fde", alpha=0.4)
    _titled(seconds, "seconds of each answer", None)
    memory.plot(times, [sample.bytes / 1e6 for sample in samples], color="#2f6fde")
    _titled(memory, "resident memory of all processes, MB", 0)
    counts.plot(times, [sample.descriptors for sample in samples], color="#2f6fde", label="descriptors")
    counts.plot(times, [sample.threads for sample in samples], color="#9aa5b1", label="threads")
    counts.plot(times, [sample.in_flight for sample in samples], color="#d98e04", label="requests in flight")
    _titled(counts, "descriptors, threads, requests", 0)
    counts.legend(frameon=False, fontsize=8, loc="center right", bbox_to_anchor=(1, 0.35))
    pages.plot(times, [sample.pages_held for sample in samples], color="#2f6fde", label="held by requests")
    pages.plot(times, [sample.pages_cached for sample in samples], color="#9aa5b1", label="kept for prompts")
    _titled(pages, "pages of the KV cache", 0)
    pages.legend(frameon=False, fontsize=8)
    for axis in (counts, pages):
        axis.set_xlabel("seconds")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _titled(axis: Any, title: str, bottom: float | None) -> None:
    axis.set_title(title, fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    if bottom is not None:
        axis.set_ylim(bottom, 1.1 * axis.get_ylim()[1])
