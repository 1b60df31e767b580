"""The workers of simulation and emulation as forks of two processes that have imported MindSpore: seconds saved a run.

A compile and a reference are each the work of a process that is started for it, and the import is a good part of that.
`Workers.run_child` takes the place of `switchyard.simulation.compile.run_child`: it hands the command of a worker to
the process that stands ready, and starts every other command as before.
"""

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import traceback
from pathlib import Path

from switchyard.simulation.compile import run_child as start_child

WORKERS = ("switchyard.simulation.compile_worker", "switchyard.simulation.baseline")
IMPORTS = ("mindspore", "switchyard.training.step")  # what a worker imports; no device is chosen there
TESTS = Path(__file__).parents[1]


def main() -> None:
    """Serves: reads a line [module, folder], runs the module's main in a fork, answers with its exit code."""
    answers = os.dup(1)
    os.dup2(2, 1)  # what imports print is no answer
    for name in IMPORTS:
        importlib.import_module(name)
    for line in sys.stdin:
        module, folder = json.loads(line)
        child = os.fork()
        if not child:
            _work(module, Path(folder))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.write(answers, f"{code}\n".encode())


def _work(module: str, folder: Path) -> None:
    """Does the work of a worker in a fork, its prints in a file, and ends."""
    code = 1
    try:
        log = os.open(folder / "printed", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(log, stream)
        code = importlib.import_module(module).main([str(folder)]) or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Workers:
    """One process for each environment that workers are started in, made when it is first asked for."""

    def __init__(self):
        self.ready: dict[str, subprocess.Popen] = {}

    def run_child(self, command: list[str], environment: dict, timeout: float, what: str):
        """See `switchyard.simulation.compile.run_child`."""
        if command[1:2] != ["-m"] or command[2] not in WORKERS:
            return start_child(command, environment, timeout, what)
        module, folder = command[2:4]
        process = self.ready.get(module) or self._start(module, environment)
        process.stdin.write(json.dumps([module, folder]) + "\n")
        process.stdin.flush()
        if not select.select([process.stdout], [], [], timeout)[0]:
            self.end()
            raise TimeoutError(f"{what}: not finished after {timeout:.0f} s")
        code = int(process.stdout.readline() or -1)
        return subprocess.CompletedProcess(command, code, (Path(folder) / "printed").read_text(errors="replace"))

    def _start(self, module: str, environment: dict) -> subprocess.Popen:
        path = os.pathsep.join([str(TESTS), environment["PYTHONPATH"]])
        command = [sys.executable, "-c", "from oracles.workers import main; main()"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
        self.ready[module] = subprocess.Popen(command, env={**environment, "PYTHONPATH": path}, **pipes)
        return self.ready[module]

    def end(self) -> None:
        """Ends the processes and what they have forked."""
        for process in self.ready.values():
            process.stdin.close()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.ready.clear()
