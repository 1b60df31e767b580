"""What upcycle.py and distill.py share: nanoGPT's CPU recipe at half its sizes, runs, figures and a table."""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "experiments"))

from common import active_flops  # sets the threads of MindSpore's kernels before it is imported

from switchyard.config import Config, build, load
from switchyard.json_text import to_json
from switchyard.training.evaluate import evaluate
from switchyard.training.loop import train

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "config" / "shakespeare_char_dense_cpu.yaml"
SIZES = {"num_layers": 2, "hidden_size": 64}  # half of the recipe's, each
EVALUATIONS = 4  # of a run, on EVAL_BATCHES batches each
EVAL_BATCHES = 20
__all__ = ["active_flops", "evaluate", "train"]


def arguments(description: str) -> argparse.Namespace:
    """--short, --steps, --data, --runs, --out of a benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a tenth of the steps")
    parser.add_argument("--steps", type=int, default=800, help="optimizer steps of the dense model")
    parser.add_argument("--data", default="tinyshakespeare.txt", help="the text (default: tinyshakespeare.txt)")
    parser.add_argument("--runs", type=Path, default=Path("runs/tuning"), help="folder of the runs; complete ones stay")
    parser.add_argument("--page", type=Path, help="a document whose part <!-- benchmark: NAME --> is renewed")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON file")
    args = parser.parse_args()
    args.steps = args.steps // 10 if args.short else args.steps
    return args


def recipe(args: argparse.Namespace, name: str, steps: int, moe: dict | None = None, **train_keys) -> Config:
    """The dense recipe with other experts, steps and keys of `train`, as run `name`."""
    tree = load(RECIPE).model_dump()
    tree["model"] |= SIZES
    tree["moe"] = moe or {}
    tree["data"]["path"] = args.data
    tree["schedule"]["warmup_steps"] = min(100, max(1, steps // 10))
    tree["train"] |= {"name": name, "output_dir": str(args.runs), "steps": steps, "sample_every": 0}
    tree["train"] |= {"eval_every": max(1, steps // EVALUATIONS), "eval_batches": EVAL_BATCHES, "checkpoint_every": 0}
    tree["train"] |= {"log_every": max(1, steps // 20)} | train_keys
    return build(tree)


def trained(config: Config, init: Path | None = None) -> dict:
    """The result of a run, which is trained unless it is complete already."""
    run = Path(config.train.output_dir) / config.train.name
    if (run / "result.json").exists():
        return json.loads((run / "result.json").read_text(encoding="utf-8"))
    return train(config, init=init)


def first_loss(run: Path) -> float:
    """The validation loss of the oldest checkpoint of a run, over the whole validation set."""
    return evaluate(run, say=lambda line: None).loss


def curve(run: Path) -> list[tuple[int, float]]:
    """(step, validation loss) of each evaluation of a run; the last is over the whole validation set."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found = {line["step"]: line["loss"] for line in lines if line["kind"] == "evaluation"}
    return sorted(found.items())


def save(args: argparse.Namespace, name: str, content: dict) -> Path:
    """Writes results/NAME.json and returns its path."""
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{name}.json"
    path.write_text(to_json(content, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}", flush=True)
    return path


def show(args: argparse.Namespace, name: str, text: str) -> None:
    """Prints the part of a document, and writes it between its marks in --page."""
    print(text)
    if args.page is None:
        return
    begin, end = f"<!-- benchmark: {name} -->\n", "<!-- end -->"
    before, _, rest = args.page.read_text(encoding="utf-8").partition(begin)
    after = rest.partition(end)[2]
    args.page.write_text(f"{before}{begin}{text}\n{end}{after}", encoding="utf-8")


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
