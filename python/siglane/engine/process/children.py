"""Where an engine's processes come from, and how one ended."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess

from siglane.engine.process.child import HUNG


def child_context() -> ForkServerContext | SpawnContext:
    """Where children come from: a process that has imported all they need, so that a restart does not wait for imports.

    Elsewhere than on Linux system libraries may break in a process that is forked after they were loaded.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # transformers loads its models on demand
    context.set_forkserver_preload(["siglane.engine.process.child", "transformers.models"])
    return context


def how_it_ended(process: BaseProcess | None) -> str:
    code = None if process is None else process.exitcode
    if code == HUNG:
        return "because it hung"
    if code is None or code >= 0:
        return f"with exit code {code}"
    hint = " (systems that run out of memory do so)" if -code == signal.SIGKILL else ""
    return f"killed by {signal.Signals(-code).name}{hint}"
