"""Commands of siglane, each in a process that is forked from this one, which has imported everything: a test that kills
many of them does not wait for imports.

Writes the id of the process that engines are forked from. Then reads a JSON list of words per line, writes the id of
the process that runs them and, at its end, its exit code.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from multiprocessing import forkserver


def run(words: list[str]) -> int:
    from siglane.cli.main import main

    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    try:
        return main(words)
    except BaseException:
        traceback.print_exc()
        return 70


def serve() -> None:
    import siglane.cli.batch
    import siglane.cli.batch_servers
    import siglane.server.launch
    import siglane.server.local  # noqa: F401
    from siglane.engine.process.children import child_context

    child_context()
    server = forkserver._forkserver
    server.ensure_running()
    server.ensure_running = lambda: None  # of a fork it is no child that could be asked whether it runs
    print(server._forkserver_pid, flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os._exit(run(json.loads(line)))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":  # an engine reads this file too
    serve()
