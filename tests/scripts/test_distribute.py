"""The scripts that start many processes: what they ask for, what they start, what they refuse."""

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {"ascend": "Ascend", "gpu": "GPU"}
TWO_NODES = ("--nodes", "2", "--master", "10.0.0.1")
TWO_STAGES = ("parallel.pipeline_stage=2", "parallel.micro_batch_num=2", "model.tie_word_embeddings=false")


def script(kind: str, *arguments, **environment):
    """Runs one of the scripts from the repository root, without any environment of Python's."""
    command = ["bash", "scripts/" + f"run_distribute_train_{kind}.sh", *map(str, arguments)]
    held = {"PATH": "/usr/bin:/bin", "SWITCHYARD_VENV": sys.prefix} | environment
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=held)


def dry_run(kind: str, *arguments, **environment) -> list[str]:
    """The words of the command that would be run, from msrun's arguments on."""
    done = script(kind, "--config", "config/quickstart.yaml", "--dry-run", *arguments, **environment)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    words = shlex.split(done.stdout)
    assert words[:3] == [f"PATH={sys.prefix}/bin:$PATH", "GLOG_v=3", "OMP_NUM_THREADS=1"]
    assert words[3:6] == [f"{sys.prefix}/bin/python", "-m", "switchyard.distributed.watch"]
    assert words[7:10] == [f"{sys.prefix}/bin/python", "-m", "mindspore.parallel.cluster.run"]
    assert f"--log_dir={words[6]}" in words
    return words[10:]


@pytest.mark.parametrize("kind", SCRIPTS)
def test_one_node(kind):
    own = ["moe.layers=[0, 2]", "data.path=it's\n$HOME", "parallel.data_parallel=4"]
    words = dry_run(kind, "--devices", 4, "--log-dir", "logs of mine", *own, "--resume")
    port = next(word for word in words if word.startswith("--master_port="))
    assert words == [
        "--worker_num=4",
        "--local_worker_num=4",
        "--master_addr=127.0.0.1",
        port,
        "--node_rank=0",
        "--log_dir=logs of mine",
        "--join=True",
        "--tail_worker_log=0",
        "--cluster_time_out=1800",
        f"{ROOT}/train.py",
        "--config",
        "config/quickstart.yaml",
        *own,
        "--resume",
        f"context.device_target={SCRIPTS[kind]}",
    ]
    with socket.socket() as held:
        held.bind(("127.0.0.1", int(port.split("=")[1])))  # it is free


def test_slow_nodes_are_waited_for():
    assert "--cluster_time_out=7200" in dry_run("ascend", "--cluster-timeout", 7200, "parallel.data_parallel=8")


def test_restarts_are_those_of_the_watcher():
    done = script(
        "gpu", "--config", "config/quickstart.yaml", "--dry-run", "--devices", 4, "--max-restarts", 3, "--restarted"
    )
    assert (done.returncode, done.stderr) == (0, "")
    words = shlex.split(done.stdout)
    assert words[4:8] == ["-m", "switchyard.distributed.watch", "--max-restarts", "3"]
    assert words[-2:] == ["--restarted", "context.device_target=GPU"]


def job_of(*arguments) -> list[str]:
    """The words behind msrun's options of a job that trains nothing."""
    done = script("ascend", "--dry-run", "--devices", 2, *arguments)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    words = shlex.split(done.stdout)
    return words[next(index for index, word in enumerate(words) if word.startswith("--cluster_time_out")) + 1 :]


def test_an_export_is_checked_and_its_options_go_on(tmp_path):
    run, more = small_checkpoint(tmp_path / "run"), ["--out", "output/it's", "--key-file", "k"]
    degree = "parallel.expert_parallel=2"
    words = [f"{ROOT}/export.py", "--checkpoint", str(run), *more, degree, "context.device_target=Ascend"]
    assert job_of("--export", run, *more, degree) == words
    done = script("ascend", "--dry-run", "--devices", 2, "--export", run, *more)
    assert done.returncode == 2 and done.stderr.startswith("error: parallel.expert_parallel: 1; 2 processes share the")


def small_checkpoint(folder: Path) -> Path:
    """A run folder with a checkpoint of four experts and no weights to speak of."""
    import numpy as np

    from switchyard.checkpoint import store
    from switchyard.config import build

    state = {"step": 1, "data_index": 1, "train_seed": 1, "noise_rule": "", "best_loss": None, "seconds": 0.0}
    config = build({"moe": {"expert_num": 4}})
    store.save(folder, config, "{}", {"a": np.ones(1, np.float32)}, {}, state)
    return folder


def test_an_export_is_run_by_the_options_of_infer():
    words = job_of("--infer", "output/parts", "--key-file", "k", "--", "--prompt", "def main(", "--json")
    assert words == [
        f"{ROOT}/infer.py",
        "--model",
        "output/parts",
        "--key-file",
        "k",
        "--prompt",
        "def main(",
        "--json",
    ]
    for arguments, says in (
        (["--max-restarts", "1"], "--max-restarts: 1; only training is started again"),
        (["moe.expert_num=4"], "moe.expert_num=4: not with --infer: leave it out"),
        (["--eval", "runs/a"], "--eval: runs/a; leave out --infer or --eval"),
    ):
        done = script("ascend", "--infer", "output/parts", *arguments)
        assert (done.returncode, done.stderr) == (2, f"error: {says}\n")


def test_lost_nodes_are_those_of_the_watcher():
    left = ("--max-restarts", 3, "--min-workers", 8, "--rendezvous", "shared/meet")
    done = script("gpu", "--config", "config/quickstart.yaml", "--dry-run", *TWO_NODES, *left, "data.batch_size=16")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    words = shlex.split(done.stdout)
    wanted = ["--max-restarts", "3", "--min-workers", "8", "--rendezvous", "shared/meet", "--rejoin-wait", "180"]
    assert words[6 : 6 + len(wanted)] == wanted


def test_two_nodes_of_eight():
    for rank in range(2):
        nodes = ("--nodes", 2, "--node-rank", rank, "--master", "10.0.0.1")
        words = dry_run("ascend", *nodes, "parallel.data_parallel=16", "data.batch_size=16")
        for word in ("--worker_num=16", "--local_worker_num=8", "--master_addr=10.0.0.1", "--master_port=8118"):
            assert word in words
        assert f"--node_rank={rank}" in words and f"--tail_worker_log={8 * rank}" in words
        (log,) = (word for word in words if word.startswith("--log_dir="))
        assert re.fullmatch(r"--log_dir=logs/train-\d{8}-\d{6}", log)


def test_further_words(tmp_path):
    table = tmp_path / "rank table.json"
    table.write_text("{}")
    words = dry_run("ascend", "--rank-table", table, "--port", 9000, "parallel.data_parallel=8", DEVICE="cpu")
    assert f"--rank_table_file={table}" in words and "--master_port=9000" in words
    assert words[-1] == "context.device_target=CPU"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--config: needs the YAML file of an experiment; see --help"),
        (["--config"], "--config: needs a value"),
        (["--config", "no such.yaml"], "--config: no such.yaml; no such file"),
        (["--config", "scripts"], "--config: scripts; is no regular file"),
        (["--devices", "two"], "--devices: two; a whole number from 1 to 65536"),
        (["--devices", "0"], "--devices: 0; a whole number from 1 to 65536"),
        (["--devices", ""], "--devices: ; a whole number from 1 to 65536"),
        (["--devices", "-2"], "--devices: -2; a whole number from 1 to 65536"),
        (["--devices", "0x8"], "--devices: 0x8; a whole number from 1 to 65536"),
        (["--devices", "18446744073709551617"], "--devices: 18446744073709551617; a whole number from 1 to 65536"),
        (["--devices", "1\n2"], "--devices: 1?2; a whole number from 1 to 65536"),
        (["--nodes", "9" * 300], f"--nodes: {'9' * 60} ... {'9' * 10}; a whole number from 1 to 65536"),
        (["--port", "80"], "--port: 80; a whole number from 1024 to 65535"),
        (["--port", "65536"], "--port: 65536; a whole number from 1024 to 65535"),
        (["--port", "4294968000"], "--port: 4294968000; a whole number from 1024 to 65535"),
        (["--node-rank", "-1"], "--node-rank: -1; a whole number from 0 to 65535"),
        (["--master", "two words"], "--master: two words; an address or a host name"),
        (["--master", ""], "--master: ; an address or a host name"),
        (["--master=10.0.0.1"], "--master=10.0.0.1: unknown option; see --help"),
        (["--log-dir", "README.md"], "--log-dir: README.md; is no folder"),
        (["--nodes", "2", "--node-rank", "2"], "--node-rank: 2; from 0 below --nodes (2)"),
        (["--nodes", "2"], "--master: 127.0.0.1; with --nodes 2 the address of node 0 that all nodes can reach"),
        (["--rank-table", "none.json"], "--rank-table: none.json; no such file"),
        (["--max-restarts", "-1"], "--max-restarts: -1; a whole number from 0 to 1000000"),
        (["--min-workers", "4"], "--min-workers: 4; only with --nodes 2 or more: what is lost is a node"),
        (["--min-workers", "9"], "--min-workers: 9; a whole number from 0 to 8"),
        ([*TWO_NODES, "--min-workers", "8"], "--min-workers: 8; only with --max-restarts N"),
        (
            [*TWO_NODES, "--min-workers", "8", "--max-restarts", "1"],
            "--min-workers: 8; needs --rendezvous DIR, a folder that all nodes see",
        ),
        (["--rendezvous", "here"], "--rendezvous: here; only with --min-workers N"),
        (
            ["--export", "runs/a"],
            "--config: config/quickstart.yaml; the configuration is that of --export: leave it out",
        ),
        (["--out", "a"], "--out: only with --eval, --export or --infer"),
        (["--", "--prompt", "a"], "--: only with --infer, whose options follow it"),
        (["--steps", "3"], "--steps: unknown option; see --help"),
        (["steps=3"], "steps=3: unknown option; see --help"),
    ],
)
def test_refused_in_one_line(arguments, says):
    config = ["--config", "config/quickstart.yaml"] if arguments and arguments[0] != "--config" else []
    done = script("gpu", *config, *arguments, LANG="C")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {says}\n")


def test_zeros_in_front_are_decimal():
    words = dry_run(
        *("gpu", "--devices", "08", "--nodes", "02", "--node-rank", "01", "--master", "ten", "--port", "09000"),
        *("parallel.data_parallel=16", "data.batch_size=16"),
    )
    assert words[:5] == [
        "--worker_num=16",
        "--local_worker_num=8",
        "--master_addr=ten",
        "--master_port=9000",
        "--node_rank=1",
    ]


@pytest.mark.parametrize("language", ["C", "C.UTF-8"])
def test_a_path_that_is_not_ascii_arrives_whatever_the_language(language, tmp_path):
    config = tmp_path / "Prójects (1).yaml"
    config.write_text("{}")
    done = script("gpu", "--config", config, "--devices", 1, "--dry-run", LANG=language)
    pasted = subprocess.run(["bash", "-c", f"printf '%s\\n' {done.stdout.strip()}"], capture_output=True, text=True)
    assert str(config) in pasted.stdout.splitlines()
    missing = script("gpu", "--config", tmp_path / "né.yaml", LANG=language)
    assert missing.stderr.startswith("error: --config: ") and missing.stderr.endswith("né.yaml; no such file\n")


def test_a_dry_run_can_be_pasted():
    """A shell reads the same words out of the line as were given: what is started is `env`, in the place of msrun."""
    own = ["moe.layers=[0, 2]", 'data.path=it\'s $HOME \\ `x` "y"', "parallel.data_parallel=4", "train.name=a.b"]
    done = script("gpu", "--config", "config/quickstart.yaml", "--dry-run", "--devices", 4, *own)
    assert (done.returncode, done.stderr) == (0, "")
    line = done.stdout.replace(f"{sys.prefix}/bin/python", "printf '%s\\n'", 1)
    for shell in ("bash", "sh"):
        pasted = subprocess.run([shell, "-c", line], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
        assert (pasted.returncode, pasted.stderr) == (0, "")
        assert pasted.stdout.splitlines()[-len(own) - 1 : -1] == own


@pytest.mark.parametrize(
    ("kind", "arguments", "says"),
    [
        (
            "gpu",
            ["--devices", 4, "parallel.data_parallel=1"],
            "parallel.data_parallel: 1; the degrees need 1 processes, 4 processes run: set",
        ),
        ("gpu", ["--devices", 4, "parallel.model_parallel=3"], "parallel.model_parallel: 3; model_parallel * pipeline"),
        ("gpu", ["moe.lyers=2"], "moe.lyers: unknown key; did you mean 'layers'?"),
        ("ascend", [*TWO_STAGES, "moe.record=a"], "moe.record: a; null with parallel.pipeline_stage (2)"),
        ("ascend", [*TWO_STAGES, "train.eval_every=10"], "train.eval_every: 10; 0 with parallel.pipeline_stage (2)"),
        (
            "ascend",
            ["parallel.model_parallel=2", "moe.router=tree", "moe.num_experts_chosen=1"],
            "parallel.model_parallel: 2; training in processes",
        ),
        (
            "gpu",
            ["--devices", 2, "parallel.data_parallel=2", "model.compute_dtype=bfloat16"],
            "model.compute_dtype: bf",
        ),
    ],
)
def test_a_dry_run_refuses_what_training_would(kind, arguments, says):
    done = script(kind, "--config", "config/quickstart.yaml", "--dry-run", *arguments)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith(f"error: {says}")
    assert done.stderr.count("\n") == 1


def test_a_dry_run_without_an_environment_says_what_it_did_not_check(tmp_path):
    done = script("gpu", "--config", "config/quickstart.yaml", "--dry-run", SWITCHYARD_VENV=str(tmp_path / "none"))
    assert done.returncode == 0 and "mindspore.parallel.cluster.run" in done.stdout
    assert "holds no Python yet, so the keys and degrees were not checked" in done.stderr


def test_an_unknown_device_is_refused():
    done = script("gpu", "--config", "config/quickstart.yaml", DEVICE="ascend")
    assert (done.returncode, done.stderr) == (2, "error: DEVICE=ascend: gpu or cpu\n")


def test_a_busy_port_is_passed_over():
    """The search begins at a port made from the shell's process number; that one is taken here."""
    body = (
        'source scripts/common.sh; source scripts/distribute.sh; start=$((20000 + $$ % 20000)); echo "$start"; '
        "read -r; free_port"
    )
    job = subprocess.Popen(
        ["bash", "-c", body], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ
    )
    first = int(job.stdout.readline())
    with socket.socket() as held:
        held.bind(("127.0.0.1", first))
        held.listen()
        found, _ = job.communicate("\n", timeout=20)
    assert int(found) > first
