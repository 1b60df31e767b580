"""train.py on one and on several GPUs: the same losses and weights, how fast, what travels, and what goes wrong.

    python benchmarks/gpus.py --out FILE.json [--parts same layouts ...] [--rows "pp 2" ...] [--data FILE]
                               [--tokenizer FILE]

Every job is started as a user starts one, by scripts/run_distribute_train_gpu.sh. Parts, each of which adds its figures
to FILE:

    cpu        a small configuration on the CPU, perhaps of another machine: the losses of 20 steps in float32
    same       the same on one GPU, in float32 and float16, against those
    layouts    each way to cut a model over two GPUs against one: losses and weights after 20 steps, then speed
    guard      kernels are not waited for (context.launch_blocking=false): where AllReduce race, the guard of replicas
               must stop the run
    resume     a checkpoint of two GPUs goes on on one, and back
    kill       one of two workers dies: how long until the job has ended, what it says, what it leaves behind
    float16    config/moe_1b_gpu.yaml, scaled, 500 steps of the default corpus: skipped steps, curve
    weak       config/moe_1b_gpu.yaml with 8 sequences a GPU, on one GPU and on two: how much of twice the speed is left
"""

import argparse
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml

from switchyard import config as configuration
from switchyard.checkpoint import store as checkpoint
from switchyard.json_text import to_json
from switchyard.planner.costs import costs

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "run_distribute_train_gpu.sh"
TRAIN, RACE = ROOT / "train.py", ROOT / "benchmarks" / "gpu_race.py"
COMPARED = 20  # steps whose losses are compared, and after which weights are
MODEL = {"num_layers": 4, "hidden_size": 512, "num_heads": 8, "intermediate_size": 2048, "seq_length": 256}
TREE = {  # a gentle rate, and an eps above the rounding of gradients: what differs is then the layout, not its echo
    "model": MODEL,
    "moe": {"router": "switch", "expert_num": 8, "layers": 2, "groups": 2, "capacity_factor": 2.0},
    "data": {"tokenizer": "byte", "batch_size": 64, "val_fraction": 0.05},
    "optimizer": {"eps": 1e-6},
    "schedule": {"learning_rate": 2e-5, "lr_end": 2e-5, "warmup_steps": 10},
    "train": {
        "steps": 2 * COMPARED,
        "log_every": 1,
        "checkpoint_every": COMPARED,
        "keep_checkpoints": 9,
        "eval_every": 0,
    },
}
SMALL = {"model.num_layers": 2, "model.hidden_size": 128, "model.intermediate_size": 512, "data.batch_size": 8}
ZERO = "parallel.optimizer_shard"
DP, EP = {"parallel.data_parallel": 2}, {"parallel.data_parallel": 2, "parallel.expert_parallel": 2}
PP_ON_ONE = {  # two micro-batches of half the batch, and so of one of the groups, each
    "data.batch_size": TREE["data"]["batch_size"] // 2,
    "moe.groups": 1,
    "model.tie_word_embeddings": "false",
    "train.gradient_accumulation_steps": 2,
}
PP = PP_ON_ONE | {
    "parallel.pipeline_stage": 2,
    "parallel.micro_batch_num": 2,  # in the place of:
    "train.gradient_accumulation_steps": 1,
    ZERO: 0,
}
LAYOUTS = {
    "dp 2": DP | {ZERO: 0},
    "dp 2, not waiting": DP | {ZERO: 0, "context.launch_blocking": "false"},
    "dp 2, ZeRO 1": DP,
    "dp 2, ZeRO 1, blocking": DP | {"context.launch_blocking": "true"},
    "dp 2, ZeRO 3": DP | {ZERO: 3},
    "dp 2, ep 2, ZeRO 1": EP,
    "dp 2, ep 2": EP | {ZERO: 0},
    "tp 2": {"parallel.model_parallel": 2},
    "pp 2": PP,
}
WEAK_STEPS = 60
WEAK = {"one GPU": (1, {}), "dp 2, ZeRO 1": (2, DP), "dp 2, ep 2, ZeRO 1": (2, EP)}
GUARDED = {  # kernels are not waited for: what, keys, program
    "guard-by-compiler": ("`data_parallel: 2`, `optimizer_shard: 0`", DP | {ZERO: 0}, TRAIN),
    "guard-read": ("the same, and one more operator reads the sum of the figures", DP | {ZERO: 0}, RACE),
    "guard-read-1": ("the same operator with `optimizer_shard: 1`", DP, RACE),
    "guard-slices": ("`model_parallel: 2`", {"parallel.model_parallel": 2}, TRAIN),
    "guard-by-hand": ("explicit collectives (`moe.router: tree`)", DP | {"moe.router": "tree"}, TRAIN),
}
RESUMED = {  # what, then devices and keys of the first half, and of the second
    "two-one": ("dp 2, ep 2, then one GPU", (2, EP), (1, {})),
    "one-two": ("one GPU, then dp 2, ep 2", (1, {}), (2, EP)),
    "stages-one": ("pp 2, then one GPU", (2, PP), (1, PP_ON_ONE)),
    "one-stages": ("one GPU, then pp 2", (1, PP_ON_ONE), (2, PP)),
}


class Runs:
    """The folder of all runs, and how one is started in it."""

    def __init__(self, folder: Path, data: str | None, tokenizer: str):
        self.folder, self.data, self.tokenizer = folder, data, tokenizer
        tree = {**TREE, "data": TREE["data"] | ({"path": data} if data else {})}
        self.config = folder / "config.yaml"
        self.config.write_text(yaml.safe_dump(tree), encoding="utf-8")  # without defaults: devices have their own

    def start(
        self,
        name: str,
        devices: int,
        keys: dict,
        *flags: str,
        config: Path | None = None,
        device: str = "gpu",
        program: Path = TRAIN,
    ):
        """The process of a job in a session of its own; its words go to NAME.out. A `program` besides train.py is
        started by the launcher itself, as the script's --dry-run prints it."""
        keys = {"train.name": name, "train.output_dir": self.folder / "runs"} | keys
        words = [f"{key}={value}" for key, value in keys.items()]
        command = ["bash", SCRIPT, "--config", config or self.config, "--devices", devices, *flags]
        log = ["--log-dir", self.folder / "logs" / f"{name}-{time.monotonic_ns()}"]
        out = (self.folder / f"{name}.out").open("a")
        environment = os.environ | {"DEVICE": device, "NCCL_NVLS_ENABLE": "0"}
        command = [*map(str, command), *map(str, log), *words]
        if program != TRAIN:
            shown = subprocess.run([*command, "--dry-run"], env=environment, capture_output=True, text=True, check=True)
            command = ["bash", "-c", shown.stdout.replace(str(TRAIN), str(program))]
        return subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )

    def run(self, name: str, devices: int, keys: dict, *flags: str, timeout: float = 150, **how) -> dict:
        """Runs a job to its end: {code, seconds, said}."""
        began, job = time.perf_counter(), self.start(name, devices, keys, *flags, **how)
        try:
            job.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGTERM)
            try:
                job.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(job.pid, signal.SIGKILL)
                job.wait()
        done = {"code": job.returncode, "seconds": round(time.perf_counter() - began, 1), "said": self.said(name)}
        print(f"{name}: exit {done['code']} after {done['seconds']} s; {done['said']}", flush=True)
        return done

    def said(self, name: str) -> str:
        """The last error, or the last line, of a job."""
        lines = (self.folder / f"{name}.out").read_text(errors="replace").splitlines() or [""]
        errors = [line for line in lines if re.match(r"(\w|\.)*[eE]rror:", line)]
        return " | ".join(dict.fromkeys(errors or lines[-1:]))[:600]

    def lines(self, name: str, kind: str = "train") -> list[dict]:
        """The logged objects of a run."""
        path = self.folder / "runs" / name / "metrics.jsonl"
        found = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
        return [line for line in found if line["kind"] == kind]

    def exchanges(self, name: str) -> dict[str, dict]:
        """What a device of a run exchanges, as {"exchanges": kind -> [number, bytes]}; {} where nothing is logged."""
        found = [
            {key: line[key] for key in line if key not in ("kind", "step")} for line in self.lines(name, "exchanges")
        ]
        return {"exchanges": found[-1]} if found else {}

    def losses(self, name: str) -> np.ndarray:
        """Loss of each step."""
        return np.array([line["loss"] for line in self.lines(name)])

    def weights(self, name: str, step: int) -> dict[str, np.ndarray]:
        """Whole weights after a step."""
        path = self.folder / "runs" / name / checkpoint.FOLDER / checkpoint.name_of(step)
        return checkpoint.read(path, with_optimizer=False).weights


def apart(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """Largest absolute difference of two sets of weights."""
    return max(float(np.abs(found[name] - array).max()) for name, array in expected.items())


def speed(lines: list[dict]) -> dict:
    """Tokens a second, the median of steps past the comparison; and the step that this is."""
    rates = [line["tokens_per_second"] for line in lines[COMPARED + 2 :] if line["tokens_per_second"]]
    tokens = TREE["data"]["batch_size"] * MODEL["seq_length"]
    rate = statistics.median(rates) if rates else 0.0
    return {"tokens_per_second": rate, "step_ms": 1e3 * tokens / rate if rate else None}


def cpu(runs: Runs) -> list[float]:
    """The losses of the small configuration on a CPU."""
    runs.run("same-cpu", 1, SMALL | {"train.steps": COMPARED}, device="cpu")
    return runs.losses("same-cpu").tolist()


def same(runs: Runs, expected: list[float]) -> dict:
    """The losses on a GPU, against those of a CPU."""
    found = {}
    for dtype in ("float32", "float16"):
        runs.run(f"same-{dtype}", 1, SMALL | {"train.steps": COMPARED, "model.compute_dtype": dtype})
        losses = runs.losses(f"same-{dtype}")
        found[dtype] = {"largest_relative": float(np.abs(losses / expected - 1).max()), "losses": losses.tolist()}
    return found


def layouts(runs: Runs, names: list[str]) -> dict:
    """Two GPUs against one."""
    found = {}
    for layout in names:
        name, reference = re.sub(r"[ ,]+", "-", layout), one_gpu(runs, LAYOUTS[layout])
        expected, weights = runs.losses(reference), runs.weights(reference, COMPARED)
        alone = speed(runs.lines(reference))
        found.setdefault(
            "one GPU" + reference.removeprefix("one").replace("-", ", ", 1).replace("-", " "),
            alone | {"loss": expected[-1]},
        )
        done = runs.run(name, 2, LAYOUTS[layout], timeout=90)
        row = {"code": done["code"], "said": done["said"], "seconds": done["seconds"], **speed(runs.lines(name))}
        losses = runs.losses(name)
        if len(losses) >= COMPARED:
            row["loss_apart"] = float(np.abs(losses - expected[: len(losses)])[:COMPARED].max())
            row["weights_apart"] = apart(runs.weights(name, COMPARED), weights)
            row |= runs.exchanges(name)
            row["planned"] = planned(runs, name)
        if row["tokens_per_second"]:
            row["efficiency"] = row["tokens_per_second"] / alone["tokens_per_second"] / 2
        found[layout] = row
        print(to_json(row), flush=True)
    return found


def one_gpu(runs: Runs, keys: dict) -> str:
    """The run of one GPU that a layout is compared with, made once for each model."""
    model = {key: value for key, value in keys.items() if key.startswith("model.")}
    name = "-".join(["one", *(f"{key.split('.')[1]}-{value}" for key, value in model.items())])
    if not runs.lines(name):
        runs.run(name, 1, model)
    return name


def planned(runs: Runs, name: str) -> dict[str, list[int]]:
    """What the planner says that a device exchanges: kind -> [number, bytes]."""
    config = configuration.load(runs.folder / "runs" / name / "config.yaml", inherited=True)
    vocab, found = 256, {}
    for one in costs(config, vocab).exchanges:
        number, size = found.get(one.kind, (0, 0))
        found[one.kind] = [number + one.number, size + one.number * one.bytes]
    return found


def guard(runs: Runs, names: list[str]) -> dict:
    """Small runs go on from a good checkpoint without waiting for kernels: what the guard of replicas says, after how
    many steps, and which checkpoint is the newest then."""
    small = SMALL | {"train.checkpoint_every": COMPARED}
    good = small | {"train.steps": COMPARED}
    racy = small | {"train.steps": 5 * COMPARED, "train.replica_check_every": 1, "context.launch_blocking": "false"}
    found = {}
    for name in names:
        what, keys, program = GUARDED[name]
        runs.run(name, 2, keys | good, timeout=70)
        done = runs.run(name, 2, keys | racy, "--resume", program=program, timeout=70)
        newest = [path.name for path in checkpoint.listed(runs.folder / "runs" / name)][-1:]
        steps = len(runs.losses(name)) - COMPARED
        stopped = done["said"].split(" | ")[0].replace(f"{runs.folder}/", "")
        end = f"`{stopped}`" if done["code"] else f"{steps} steps ended well, replicas bit-equal after each"
        found[name] = {**done, "what": what, "end": end, "newest": newest, "losses": runs.losses(name).tolist()}
    return found


def resume(runs: Runs, names: list[str]) -> dict:
    """Ten steps on one, ten on the other, against twenty on one GPU."""
    found = {}
    for name in names:
        what, *halves = RESUMED[name]
        reference = one_gpu(runs, halves[0][1])
        for (count, keys), steps, flags in zip(halves, (COMPARED // 2, COMPARED), ((), ("--resume",))):
            done = runs.run(name, count, keys | {"train.steps": steps}, *flags)
        far = apart(runs.weights(name, COMPARED), runs.weights(reference, COMPARED))
        found[name] = {"code": done["code"], "what": what, "weights_apart": far}
        found[name]["loss_apart"] = float(np.abs(runs.losses(name) - runs.losses(reference)[:COMPARED]).max())
    return found


def kill(runs: Runs) -> dict:
    """Kills rank 1 after some steps."""
    job, began = runs.start("killed", 2, EP | {"train.steps": 100000}), time.monotonic()
    while len(runs.losses("killed")) < 30 and time.monotonic() - began < 120:
        time.sleep(0.5)
    worker = next(pid for pid, rank in workers() if rank == "1")
    os.kill(worker, signal.SIGKILL)
    killed = time.monotonic()
    try:
        job.wait(120)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
    took = time.monotonic() - killed
    time.sleep(2)
    return {"code": job.returncode, "seconds": round(took, 1), "said": runs.said("killed"), "left": len(workers())}


def workers() -> list[tuple[int, str]]:
    """(process, rank) of every train.py that msrun started on this machine."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words, environment = (path / "cmdline").read_bytes(), (path / "environ").read_bytes()
        except OSError:
            continue
        held = dict(part.split(b"=", 1) for part in environment.split(b"\0") if b"=" in part)
        if b"train.py" in words and held.get(b"MS_ROLE") == b"MS_WORKER" and b"cluster.run" not in words:
            found.append((int(path.name), held.get(b"RANK_ID", b"").decode()))
    return found


def float16(runs: Runs) -> dict:
    """The configuration for GPUs at a size that a short run can train, on the default corpus."""
    keys = {
        "model.num_layers": 4,
        "moe.expert_num": 8,
        "data.batch_size": 8,
        "data.path": "null",
        "data.tokenizer": "byte",
        "train.gradient_accumulation_steps": 1,
        "schedule.warmup_steps": 100,
        "data.val_fraction": 0.01,
        "train.steps": 500,
        "train.log_every": 5,
        "train.eval_every": 0,
        "train.checkpoint_every": 0,
    }
    done = runs.run("float16", 1, keys, config=ROOT / "config" / "moe_1b_gpu.yaml", timeout=420)
    lines = runs.lines("float16")
    curve = [[line["step"], line["loss"], line["loss_scale"], line["skipped"]] for line in lines]
    rates = [line["tokens_per_second"] for line in lines if line["tokens_per_second"]]
    result = runs.folder / "runs" / "float16" / "result.json"
    figures = json.loads(result.read_text()) if result.exists() else {}
    kept = {name: figures.get(name) for name in ("parameters", "validation_loss", "seconds", "compile_seconds")}
    return {"code": done["code"], "tokens_per_second": statistics.median(rates or [0]), "curve": curve, **kept}


def weak(runs: Runs) -> dict:
    """Tokens a second of a whole model whose batch grows with the GPUs; the final checkpoint is not waited for."""
    found, common = {}, {"train.gradient_accumulation_steps": 1, "train.eval_every": 0, "train.checkpoint_every": 0}
    common |= {"train.steps": WEAK_STEPS, "train.log_every": 5, "schedule.warmup_steps": 10}
    common |= {"data.path": runs.data or "null", "data.tokenizer": runs.tokenizer}
    for layout, (devices, keys) in WEAK.items():
        name = "weak-" + re.sub(r"[ ,]+", "-", layout)
        keys = common | keys | {"data.batch_size": 8 * devices}
        done = runs.run(name, devices, keys, config=ROOT / "config" / "moe_1b_gpu.yaml", timeout=240)
        rates = [line["tokens_per_second"] for line in runs.lines(name) if line["tokens_per_second"]]
        rate = statistics.median(rates or [0])
        found[layout] = {"code": done["code"], "tokens_per_second": rate, **runs.exchanges(name)}
        found[layout]["efficiency"] = rate / (devices * found["one GPU"]["tokens_per_second"] or math.inf)
    return found


def gpus() -> list[str]:
    """What the driver says of this machine's GPUs."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows = {layouts: LAYOUTS, guard: GUARDED, resume: RESUMED}
    parts = {part.__name__: part for part in (cpu, same, layouts, guard, resume, kill, float16, weak)}
    names = [name for part in rows.values() for name in part]
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--rows", nargs="+", choices=names, default=names, help="of layouts, guard and resume")
    parser.add_argument("--data", help="a text file; otherwise the default corpus")
    parser.add_argument("--tokenizer", default="byte", help="of the part weak")
    parser.add_argument("--folder", type=Path, help="where runs are kept; otherwise a temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        runs = Runs(folder, args.data, args.tokenizer)
        for name, part in ((name, parts[name]) for name in args.parts):
            found = json.loads(args.out.read_text()) if args.out.exists() else {"gpus": gpus()}
            try:
                if part in rows:
                    found[name] = found.get(name, {}) | part(runs, [row for row in rows[part] if row in args.rows])
                else:
                    found[name] = part(runs, found["cpu"]) if part is same else part(runs)
            except Exception as error:  # the other parts can still be measured
                found[f"{name} failed"] = f"{type(error).__name__}: {error}"
                print(name, found[f"{name} failed"], file=sys.stderr, flush=True)
            args.out.write_text(to_json(found, indent=1))


if __name__ == "__main__":
    main()
