"""Compiles some ranks, in a process of its own.

It is started in the environment of `fake_cann`. `python -m switchyard.simulation.compile_worker FOLDER` reads
FOLDER/job.json and writes, of each rank, the final graph (rank3.mindir) and what is known of it (rank3.json).
MindSpore is imported once; every rank is a fork of that process, made before the first communication call, because a
process can be one rank only.
"""

import importlib
import json
import os
import resource
import sys
import time
import traceback
from pathlib import Path

JOB = "job.json"
TRAINING_STEP = "switchyard.simulation.compile_worker:training_step"


def main(arguments: list[str]) -> int:
    """Compiles every rank of the job, `jobs` at a time; returns 1 if one of them failed."""
    folder = Path(arguments[0])
    job = json.loads((folder / JOB).read_text())
    import mindspore  # noqa: F401  (before the forks, which share it)

    waiting, running, failed = list(job["ranks"]), {}, False
    while waiting or running:
        while waiting and len(running) < job["jobs"]:
            rank = waiting.pop(0)
            running[_fork(folder, job, rank)] = rank
        process, status = os.wait()
        running.pop(process)
        failed = failed or status != 0
        if failed:
            waiting = []
    return int(failed)


def _fork(folder: Path, job: dict, rank: int) -> int:
    """Starts the process of a rank, whose prints go to FOLDER/rank3.log; returns its number."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        compile_rank(folder, job, rank)
        code = 0
    except BaseException as error:
        traceback.print_exc()
        text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        (folder / f"rank{rank}.error").write_text(text)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # no interpreter shutdown in a fork


def training_step(config, vocab: int) -> tuple:
    """Returns what is compiled if the job names nothing else: (the training step, its inputs on one device)."""
    from switchyard.distributed.mesh import CompiledMesh
    from switchyard.training.limits import refusals, refuse
    from switchyard.training.step import create_step, sample_inputs

    refuse(refusals(config))
    mesh = CompiledMesh(config)
    step = create_step(config, vocab, mesh)
    mesh.speed_up(step.program, Path())
    return step.program, sample_inputs(config, step.model)


def compile_rank(folder: Path, job: dict, rank: int) -> None:
    """Compiles one rank's step and writes its graph, layouts, seconds and peak memory."""
    os.environ.update(RANK_SIZE=str(job["devices"]), RANK_ID=str(rank))
    import mindspore as ms
    from mindspore.communication import init

    from switchyard.config import build
    from switchyard.distributed.compiled_graph import compiled_model

    os.chdir(folder)  # MindSpore leaves files where it stands
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("Ascend")
    init()
    config = build(job["config"])
    began = time.perf_counter()
    module, _, function = job["step"].partition(":")
    parallel, inputs = getattr(importlib.import_module(module), function)(config, job["vocab"])
    built = time.perf_counter()
    parallel.compile(*inputs)
    seconds = time.perf_counter() - built
    (folder / f"rank{rank}.mindir").write_bytes(compiled_model(parallel))
    layouts = {name: [list(part) for part in layout[:3]] for name, layout in parallel.parameter_layout_dict.items()}
    found = {
        "build_seconds": built - began,
        "seconds": seconds,
        "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "layouts": layouts,
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(found, allow_nan=False))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
