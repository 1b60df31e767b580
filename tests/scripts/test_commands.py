"""Every command of the documents is run as it is written, in a copy of the repository.

What is cut down is declared here: the configurations of the copy (`CUTS`), words that stand for something (`WORDS`),
and options that are added to long commands (`RULES`; and `SHORTER`, unless --long asks for the whole). A command that
no rule knows, or whose rule ends it before it has done its work, carries a mark on its page that says what it needs or
how long it takes. The commands of one document run in order and in one folder, so that what one makes is there for the
next.
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
EVERY = commands_of(ROOT)
FIRST = {command.text: command for command in reversed(EVERY)}
COMMANDS = [command for command in EVERY if command is FIRST[command.text]]  # each text once
# the pages of users run in one folder, in this order; at the same time the others in another
USERS = (
    "README.md",
    *(f"docs/{name}.md" for name in ("index", "training", "data", "checkpoints", "inference", "reports", "commands")),
)
ZH = ROOT / "docs" / "zh"
CHINESE = [ROOT / "README_CN.md", *sorted(ZH.rglob("*.md"))]
LONGEST = 600  # seconds of a command

# the configurations that are trained here, cut down: key -> value
SMALL = {"model.num_layers": 1, "model.hidden_size": 16, "train.steps": 2, "train.eval_batches": 1}
CUTS = {
    "config/quickstart.yaml": SMALL | {"moe.layers": "all", "data.path": "corpus.txt"},  # not the standard library
    "config/shakespeare_char_dense_*.yaml": SMALL,
    "config/shakespeare_char_switch_*.yaml": SMALL | {"moe.moe_intermediate_size": 16},  # a quarter of the dense width
    "config/digits_*.yaml": {"train.steps": 2},
}

# what stands for something that the reader fills in
WORDS = {
    r" \[[^\]']*\]": "",  # optional arguments
    r"--config FILE": "--config config/quickstart.yaml",
    r"^switchyard ": "python -m switchyard ",
    r"examples/NAME": "examples/own_router",
    r"runs/NAME": "runs/quickstart",
    r"--input TEXT\b": "--input my_texts/",
    r"--devices N\b": "--devices 8",
    r"--node-rank R\b": "--node-rank 0",
    r"--master ADDRESS\b": "--master 10.0.0.1",
    r"\bKEYS\b": "parallel.data_parallel=2",
}

TWO = "parallel.data_parallel=2 parallel.expert_parallel=2"  # the last of two overrides counts
PYNATIVE = "context.mode=pynative"  # compiles nothing; the quickstart's script and two processes compile

# names of programs, and forms with words that stand for something: answered by --help
NAMES = (
    r"(python )?(train|eval|export|infer)\.py",
    r"switchyard (train|eval|export|infer)",
    r"python (train|eval|export|infer)\.py --\w+ (FILE|RUN|DIR).*",
    r"python -m switchyard\.(checkpoint|data\.prepare|interop\.\w+|planner|profile|report|report\.picture|sweep)",
    r"python -m switchyard\.simulation\.\w+",
)
UNFINISHED = ("--help", "--dry-run", "--print-config")  # what ends a command before it has done its work

# what is added to a command that needs devices, takes long, or trains what another command here trains: it ends before
# the long part, or is as small as can be
RULES = {name: "--help" for name in NAMES} | {
    r"DEVICE=cpu bash scripts/run_distribute_train_\w+\.sh .* --max-restarts .*": "--dry-run",  # a run of hours
    r"DEVICE=cpu bash scripts/run_distribute_train_\w+\.sh .*": "",
    r"bash scripts/run_distribute_train_\w+\.sh --eval .*": "--help",  # a checkpoint that is larger than one device
    r"python -m switchyard\.data\.prepare --input ('web|code|chats).*": "--help",  # corpora of somebody's own
    r"python -m switchyard\.data\.prepare --input TEXT .* --vocab-size 32\d+ --seq-length .*": "--help",  # of clusters
    r"python train\.py --config config/switch_tiny_seq2seq_cpu\.yaml.*": "--print-config",
    r"python (eval|export)\.py --checkpoint runs/switch-tiny-seq2seq.*": "--help",  # of the training above
    r"python infer\.py --model exported --prompt .*extra_id_0.*": "--help",
    r"python (export|infer)\.py .*exported_switch.*": "--help",
    r"bash scripts/run_distribute_train_(ascend|gpu)\.sh (?!--infer).*": "--dry-run",
    r"bash scripts/run_standalone_train\.sh .*": PYNATIVE,
    r"bash scripts/run_mindformers\.sh( .*)?": "--help",  # minutes; tests/interop trains through MindFormers
    r"bash scripts/run_(?!tests|distribute_train_\w+\.sh --infer)\w+\.sh( .*)?": "",
    r"python train\.py --config config/moe_1b_gpu\.yaml": "--print-config",  # of devices that are not here
    r"python train\.py --config config/digits_(cascade|channel|region|soft|task)_cpu\.yaml": "--print-config",
    r"python train\.py --config config/quickstart\.yaml": "--print-config",  # the README trains it under another name
    r"python train\.py --config config/quickstart\.yaml (?!--print-config).*": PYNATIVE,
    r"python (train|eval|export|infer|scripts/renew_docs)\.py.*": "",
    r"python -m switchyard\.simulation\.compile --config config/switch_base_8_.*": "--help",  # minutes
    r"python -m switchyard\.simulation\.compile .*": "model.num_layers=1 moe.layers=all",
    r"python -m switchyard\.simulation\.emulate .*": f"--steps 1 --devices 2 {TWO}",
    r"python -m switchyard\.data\.prepare .* --seq-length 1024": "--out data/corpus-1024",  # data/corpus has 512
    r"python -m switchyard\.sweep .*": "",  # the page asks for --dry-run
    r"python -m switchyard\.profile --config config/moe_1b_gpu\.yaml .*": "--help",  # a billion parameters
    r"(python -m )?switchyard[. ].*": "",
    r"python benchmarks/moe_layer\.py": "--shapes 64,16,4,1 --rounds 1",
    r"python benchmarks/(upcycle|distill)\.py": "--help",  # many models are trained
    r"python benchmarks/(train_step|decode_step|scaling)\.py": "--help",  # many models are compiled
    r"python benchmarks/checkpoint_pause\.py --short": "",
    r"python benchmarks/gpus\.py .*": "--help",  # two GPUs, an hour
    r"python benchmarks/(gpu_tables|experiments/tables)\.py": "",
    r"python benchmarks/experiments/\w+\.py.*": "--help",  # an hour: many models are compiled
    r"pytest .*": "--collect-only -q -p no:cacheprovider",  # these tests run by themselves
    r"python examples/\w+\.py": "",
    r"ruff .*": "",
    r"mkdocs .*": "-d built",
    r"openssl rand .*": "",
}


# what is added besides, unless --long asks for the whole: these repeat what other commands or other tests do
SHORTER = {
    r"DEVICE=cpu bash scripts/run_distribute_train_\w+\.sh .*": "--dry-run",  # tests/distributed/test_jobs.py
    r"python train\.py --config config/(shakespeare_char_(dense|switch)|digits_sample)_cpu\.yaml.*": "--print-config",
    r"python train\.py --config \S+quickstart\.yaml (.+ )?train\.name=(mine\S*|notes|two-experts|cached).*": "--help",
    r"python benchmarks/checkpoint_pause\.py --short": "--help",  # tests/training/test_saver.py
    r"python -m switchyard\.report\.picture runs/two": "--help",  # of the run of two processes above
    r"python -m switchyard\.simulation\.emulate .*": "--help",  # tests/simulation/test_emulate.py
    r"python -m switchyard\.interop\.(upcycle|distill) .*": "--help",  # tests/interop
    r"python -m switchyard\.profile .*": "--help",  # tests/profile
    r"python -m switchyard\.planner .* --vocab \d+": "--help",  # other pages ask for the same layouts with --top
    r"python -m switchyard\.simulation\.compile --config config/switch_c_.*": "--help",  # the same for 8 devices above
    r"python train\.py --config config/quickstart\.yaml train\.name=first --resume.*": "--help",  # tests/training
    r"python train\.py --config runs/qwen/config\.yaml .*": f"train.steps=2 {PYNATIVE} data.val_fraction=0.01",
    r"python eval\.py --checkpoint runs/qwen.*": "--help",
    r"python (export|infer)\.py .*output/qwen-tuned.*": "--help",  # tests/inference
}


def shortened(command: Command) -> str:
    """Returns what SHORTER adds to a command: nothing where it does not know the command."""
    return next((more for pattern, more in SHORTER.items() if re.fullmatch(pattern, command.text)), "")


def rule_of(command: Command) -> str | None:
    """Returns what RULES adds to a command; None where no rule knows it."""
    return next((more for pattern, more in RULES.items() if re.fullmatch(pattern, command.text)), None)


def to_run(command: Command, full: bool = False) -> str | None:
    """Returns the line of shell that stands for a command; None where no rule knows it."""
    more, less = rule_of(command), "" if full else shortened(command)
    if more is None:
        return None
    line = command.text
    for word, filled in WORDS.items():
        line = re.sub(word, filled, line)
    return f"{line} {more} {less}".strip()


def is_finished(command: Command) -> bool:
    """Whether the command does its work here, or is a form or a name, or a configuration says what it costs."""
    in_configuration = command.document.startswith("config/")
    is_name = any(re.fullmatch(name, command.text) for name in NAMES)
    more = rule_of(command)
    is_cut = more is None or (more in UNFINISHED and more not in command.text)
    return in_configuration or is_name or not is_cut


RUN = [command for command in COMMANDS if rule_of(command) is not None]


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
    (folder / "questions.txt").write_text("what say you\nand then\n")
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
    """What became of every command: those of the users' pages in one folder, at the same time the others in another."""
    return run_all(tmp_path_factory.mktemp("commands"), full=False)


@pytest.fixture(scope="module")
def ended_in_full(tmp_path_factory) -> dict[Command, subprocess.CompletedProcess]:
    """As `ended`, none of the commands shortened."""
    return run_all(tmp_path_factory.mktemp("commands"), full=True)


def run_all(folder: Path, full: bool) -> dict[Command, subprocess.CompletedProcess]:
    """Runs every command in two copies of the repository below a folder."""

    def run_part(name: str, part: list[Command]) -> dict[Command, subprocess.CompletedProcess]:
        copy = copy_repository(folder / name)
        return {command: run(to_run(command, full), copy) for command in part}

    users = [command for page in USERS for command in RUN if command.document == page]
    others = [command for command in RUN if command.document not in USERS]
    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(run_part, ("users", "others"), (users, others)))
    return parts[0] | parts[1]


def test_every_command_is_run_or_says_on_its_page_what_it_needs():
    bare = [command for command in EVERY if not is_finished(command) and not command.mark]
    assert bare == [], 'give the block a title="needs: ...", or the command a rule in RULES'


def test_a_mark_stands_only_at_what_is_not_run():
    """A mark says what keeps a command from being run here, so a command that is run has none."""
    assert [command for command in EVERY if command.mark and is_finished(command)] == []


def test_every_page_of_users_is_there():
    assert [page for page in USERS if not (ROOT / page).is_file()] == []


def require_success(done: subprocess.CompletedProcess, line: str) -> None:
    """Shows the ends of both outputs where a command failed."""
    said = f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert done.returncode == 0, f"{line}: exit code {done.returncode}\n{said}"


@pytest.mark.slow
@pytest.mark.parametrize("command", RUN, ids=lambda command: f"{command.document}: {command.text}")
def test_commands_work_as_they_are_written(ended, command):
    require_success(ended[command], to_run(command))


@pytest.mark.long
@pytest.mark.parametrize("command", RUN, ids=lambda command: f"{command.document}: {command.text}")
def test_commands_work_in_full(ended_in_full, command):
    require_success(ended_in_full[command], to_run(command, full=True))


@pytest.mark.parametrize("pattern", SHORTER)
def test_what_is_shortened_is_a_command_that_a_rule_runs_in_full(pattern):
    known = [command for command in COMMANDS if re.fullmatch(pattern, command.text)]
    assert known and all(to_run(command, full=True) != to_run(command) for command in known)


@pytest.mark.parametrize("chinese", CHINESE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_both_languages_give_the_same_commands(chinese):
    english = ROOT / "README.md" if chinese.name == "README_CN.md" else ROOT / "docs" / chinese.relative_to(ZH)
    pages = (path.read_text(encoding="utf-8") for path in (english, chinese))
    assert len({tuple(sorted(of_page(page))) for page in pages}) == 1


def test_commands_are_found_wherever_they_stand():
    page = (
        "Say `python -m x.y` or `python\n--help`; `python` alone is a name.\n\n```bash\n# a comment\n"
        "run 'a # b'   # another\nlong \\\n    line\n```\n\n```text\n$ shown --x\noutput\n```\n\n"
        "   ```bash\n   deep\n   ```\n"
    )
    found = ["python -m x.y", "python --help", "run 'a # b'", "long line", "shown --x", "deep"]
    assert list(of_page(page)) == [(text, "") for text in found]
    comment = (
        "# What it is, with bash in it.\n# Command:  bash a.sh --x   (or: python b.py c)\n"
        "# Cost:     none; python -m d\n#           --e 1   plans it\nmodel: 1\n# python -m later\n"
    )
    assert list(of_comment(comment)) == ["bash a.sh --x", "python b.py c", "python -m d --e 1"]


def test_marks_stand_at_blocks_and_behind_backticks():
    page = (
        'Say `python a.py` (takes: an hour), or `python b.py` (see there).\n\n```bash title="needs: two GPUs"\nc\n'
        'd   # x\n```\n\n```bash title="notes"\ne\n```\n'
    )
    here = [("python a.py", "takes: an hour"), ("python b.py", ""), ("c", "needs: two GPUs"), ("d", "needs: two GPUs")]
    assert list(of_page(page)) == [*here, ("e", "")]
