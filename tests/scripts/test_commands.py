"""Every command of the documents is run as it is written, in a copy of the repository.

What is cut down is declared here: the configurations of the copy (`CUTS`), words that stand for something (`WORDS`),
and options that are added to long commands (`RULES`). Commands that are not run at all stand in `NOT_RUN`, with a
reason each. A command that neither list knows fails. The commands of one document run in order and in one folder, so
that what one makes is there for the next.
"""

import os
import random
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from oracles.documents import Command, commands_of, of_comment, of_page

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = commands_of(ROOT)
README = "README.md"
LONGEST = 600  # seconds of a command

# the configurations that are trained here, cut down: key -> value
SMALL = {"model.num_layers": 1, "model.hidden_size": 16, "train.steps": 2, "train.eval_batches": 1}
CUTS = {
    "config/quickstart.yaml": SMALL | {"moe.layers": "all", "data.path": "corpus.txt"},  # not the standard library
    "config/shakespeare_char_*.yaml": SMALL,
    "config/digits_*.yaml": {"train.steps": 2},
}

# what stands for something that the reader fills in
WORDS = {
    r" \[[^\]']*\]": "",  # optional arguments
    r"--config FILE": "--config config/quickstart.yaml",
    r"runs/NAME": "runs/quickstart",
    r"--input TEXT\b": "--input my_texts/",
    r"--devices N\b": "--devices 8",
    r"--node-rank R\b": "--node-rank 0",
    r"--master ADDRESS\b": "--master 10.0.0.1",
    r"\bKEYS\b": "parallel.data_parallel=2",
}

TWO = "parallel.data_parallel=2 parallel.expert_parallel=2"  # the last of two overrides counts
PYNATIVE = "context.mode=pynative"  # compiles nothing; the quickstart's script and two processes compile

# what is added to a command that needs devices, takes long, or trains what another command here trains: it ends before
# the long part, or is as small as can be
RULES = {
    r"DEVICE=cpu bash scripts/run_distribute_train_\w+\.sh .*": "",
    r"bash scripts/run_distribute_train_\w+\.sh .* --dry-run": "",
    r"bash scripts/run_distribute_train_(ascend|gpu)\.sh .*": "--dry-run",
    r"bash scripts/run_standalone_train\.sh .*": PYNATIVE,
    r"bash scripts/run_\w+\.sh( .*)?": "",
    r"python train\.py --config config/moe_1b_gpu\.yaml": "--print-config",  # of devices that are not here
    r"python train\.py --config config/digits_(cascade|channel|region|soft|task)_cpu\.yaml": "--print-config",
    r"python train\.py --config config/quickstart\.yaml": "--print-config",  # the README trains it under another name
    r"python train\.py --config config/quickstart\.yaml (?!--print-config).*": PYNATIVE,
    r"python (train|eval|export|infer)\.py": "--help",  # the name of a program
    r"python (train|eval|export|infer|scripts/renew_readmes)\.py.*": "",
    r"python -m switchyard\.(data\.prepare|planner|simulation\.\w+)": "--help",  # the name of a program
    r"python -m switchyard\.simulation\.compile .*": "model.num_layers=1 moe.layers=all",
    r"python -m switchyard\.simulation\.emulate .*": f"--steps 1 --devices 2 {TWO}",
    r"python -m switchyard\.data\.prepare .* --seq-length 1024": "--out data/corpus-1024",  # data/corpus has 512
    r"python -m switchyard\..*": "",
    r"python benchmarks/moe_layer\.py": "--shapes 64,16,4,1 --rounds 1",
    r"python benchmarks/train_step\.py": "--help",  # four models are compiled
    r"python benchmarks/gpus\.py .*": "--help",  # two GPUs, an hour
    r"python benchmarks/(gpu_tables|experiments/tables)\.py": "",
    r"python benchmarks/experiments/\w+\.py.*": "--help",  # an hour: many models are compiled
    r"pytest.*": "--collect-only -q -p no:cacheprovider",
    r"ruff .*": "",
    r"openssl rand .*": "",
}

NOT_RUN = {
    r"bash scripts/run_tests\.sh.*": "runs this test",
    r"pytest|pytest -m .*": "collects this test",
    r"python3\.11 -m venv \.venv && source \.venv/bin/activate": "makes an environment, as test_set_up.py does",
    r"source \.venv/bin/activate": "belongs to the shell of the reader",
    r"pip install .*": "downloads packages",
    r"tensorboard --logdir runs": "is a server, and no part of the requirements",
    r"PYTHON=/path/to/\S+ bash .*": "names an interpreter of the reader's",
    r"export (CUDA_HOME|LD_LIBRARY_PATH)=.*": "belongs to the shell of the reader",
    r"python -c \"import mindspore; mindspore\.set_device\('GPU'\).*": "needs a GPU",
    r"git clone .*": "downloads the repository",
}


def is_left_out(command: Command) -> bool:
    """Whether NOT_RUN knows a command."""
    return any(re.fullmatch(pattern, command.text) for pattern in NOT_RUN)


def to_run(command: Command) -> str | None:
    """Returns the line of shell that stands for a command; None where no rule knows it."""
    for pattern, more in RULES.items():
        if re.fullmatch(pattern, command.text):
            line = command.text
            for word, filled in WORDS.items():
                line = re.sub(word, filled, line)
            return f"{line} {more}".strip()
    return None


RUN = [command for command in COMMANDS if not is_left_out(command) and to_run(command)]


def words(seed: int, size: int) -> str:
    """Returns lines of made-up words, about `size` characters."""
    draw = random.Random(seed)
    known = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 8))) for _ in range(400)]
    lines = [" ".join(draw.choices(known, k=8)) for _ in range(size // 48)]
    return "\n".join(lines) + "\n"


def copy_repository(folder: Path) -> Path:
    """Makes a copy of the repository with cut configurations and with the texts that the documents speak of."""
    left_out = (".*", "__pycache__", "*.egg-info", "runs", "output", "logs", "shared", "rank_*", "kernel_meta")
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*left_out), symlinks=True)
    for pattern, cut in CUTS.items():
        for path in folder.glob(pattern):
            tree = yaml.safe_load(path.read_text(encoding="utf-8"))
            for key, value in cut.items():
                section, name = key.split(".")
                tree[section][name] = value
            path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    shutil.copy(folder / "config" / "quickstart.yaml", folder / "config" / "mine.yaml")
    (folder / "corpus.txt").write_text(words(0, 60_000))
    (folder / "tinyshakespeare.txt").write_text(words(1, 60_000))
    for number in range(12):
        for place in (folder / "my_texts" / f"{number}.txt", folder / "notes" / "by_year" / f"{number}.md"):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(words(number, 8_000))
    return folder


def run(line: str, folder: Path) -> subprocess.CompletedProcess:
    """Runs a line of shell in a copy, with its package, in the environment of this test."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    ours = {"PATH": path, "PYTHONPATH": str(folder / "src"), "SWITCHYARD_VENV": sys.prefix, "GLOG_v": "3"}
    command = ["bash", "-c", f"set -eo pipefail; {line}"]
    begun = {"cwd": folder, "env": os.environ | ours, "timeout": LONGEST}
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", **begun)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"took longer than {LONGEST} s")


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> dict[Command, subprocess.CompletedProcess]:
    """What became of every command: those of the README in one folder, at the same time the others in another."""
    folder = tmp_path_factory.mktemp("commands")

    def run_all(name: str, chosen: list[Command]) -> dict[Command, subprocess.CompletedProcess]:
        copy = copy_repository(folder / name)
        return {command: run(to_run(command), copy) for command in chosen}

    readme = [command for command in RUN if command.document == README]
    others = [command for command in RUN if command.document != README]
    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(run_all, ("readme", "others"), (readme, others)))
    return parts[0] | parts[1]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.document}: {command.text}")
def test_every_command_is_run_or_says_why_not(command):
    known = is_left_out(command) or to_run(command) is not None
    assert known, f"{command.document}: `{command.text}` is in neither RULES nor NOT_RUN of {Path(__file__).name}"


@pytest.mark.slow
@pytest.mark.parametrize("command", RUN, ids=lambda command: f"{command.document}: {command.text}")
def test_commands_work_as_they_are_written(ended, command):
    done = ended[command]
    said = f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert done.returncode == 0, f"{to_run(command)}: exit code {done.returncode}\n{said}"


@pytest.mark.parametrize("pattern", NOT_RUN)
def test_what_is_not_run_is_still_written(pattern):
    assert pattern.startswith("git clone") or any(re.fullmatch(pattern, command.text) for command in COMMANDS)


def test_both_languages_give_the_same_commands():
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in (README, "README_CN.md"))
    assert sorted(of_page(english)) == sorted(of_page(chinese))


def test_commands_are_found_wherever_they_stand():
    page = (
        "Say `python -m x.y` or `python\n--help`; `python` alone is a name.\n\n```bash\n# a comment\n"
        "run 'a # b'   # another\nlong \\\n    line\n```\n\n```text\n$ shown --x\noutput\n```\n\n"
        "   ```bash\n   deep\n   ```\n"
    )
    assert list(of_page(page)) == ["python -m x.y", "python --help", "run 'a # b'", "long line", "shown --x", "deep"]
    comment = (
        "# What it is, with bash in it.\n# Command:  bash a.sh --x   (or: python b.py c)\n"
        "# Cost:     none; python -m d\n#           --e 1   plans it\nmodel: 1\n# python -m later\n"
    )
    assert list(of_comment(comment)) == ["bash a.sh --x", "python b.py c", "python -m d --e 1"]
