"""vLLM's server in forks of a process that has imported vLLM already: its three processes import it one after the
other, which takes most of a start, and each family needs a start of its own.

A script of vLLM's own environment, driven through a pipe by `vllm_host.vllm_imported`.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from importlib import import_module
from multiprocessing.connection import Connection

SERVER = "vllm.entrypoints.launchers.api_server.entry"
USED = (
    "siglane.hosts.vllm.model",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.models.qwen2",
    "vllm.model_executor.models.qwen3",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
)
FORK = multiprocessing.get_context("fork")  # vLLM's default; for CPUs it asks for processes that import all again


def start(pipe: Connection, arguments: list[str], env: dict[str, str], log: str) -> int:
    """Its pid, in the parent; the child ends as the command would."""
    if pid := os.fork():
        return pid
    pipe.close()
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    for number, target in enumerate((os.open(os.devnull, os.O_RDONLY), output, output)):
        os.dup2(target, number)
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None  # the environment's, not the parent's
    multiprocessing.get_context = lambda method=None: FORK
    sys.argv[1:] = arguments
    import_module(SERVER).main()
    sys.exit()


def main(pipe: Connection) -> None:
    for module in (*USED, SERVER):
        import_module(module)
    pipe.send("ready")
    ended: dict[int, int] = {}
    while (job := pipe.recv()) is not None:
        match job:
            case (arguments, env, log):
                pipe.send(start(pipe, arguments, env, log))
            case (pid, options):
                if pid not in ended and (found := os.waitpid(pid, options))[0]:
                    ended[pid] = os.waitstatus_to_exitcode(found[1])
                pipe.send(ended.get(pid))


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])))
