"""Nodes that are left after a failure: who goes on, with what command; a job of two nodes that loses one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from oracles.tiny_run import losses_of, run_config, write_text

from switchyard.checkpoint import store as checkpoint
from switchyard.distributed.members import Members, changed
from switchyard.training import launch

ROOT = Path(__file__).resolve().parents[2]
HOUSE = "10.213.77"  # of the addresses of two nodes on this machine


def command(node: int, nodes: int = 3, each: int = 2) -> list[str]:
    """A job's command on a node."""
    options = [f"--worker_num={nodes * each}", f"--local_worker_num={each}", f"--node_rank={node}"]
    return [
        "msrun",
        *options,
        f"--tail_worker_log={node * each}",
        "/a/train.py",
        "--config",
        "c",
        "--restarted",
        "a.b=1",
    ]


def meet(folder: Path, nodes: list[int], least: int, allowed: set[int], count: int = 3) -> dict[int, tuple]:
    """Lets nodes meet; node -> (its command or None, what it says). `allowed`: numbers of devices that fit."""
    found = {}
    folder.mkdir(exist_ok=True)

    def keys(arguments, devices, before):
        assert arguments == ["--config", "c", "--restarted", "a.b=1"] and before == 2 * count
        return [f"data.batch_size={devices}"] if devices in allowed else None

    def run(node):
        said = []
        one = Members(command(node, count), least, folder, 0.6, said.append, keys, lambda seconds: time.sleep(0.01))
        ready.wait()
        found[node] = (one.next_command(1), said)

    ready = threading.Barrier(len(nodes))
    threads = [threading.Thread(target=run, args=(node,)) for node in nodes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_all_come_back(tmp_path):
    found = meet(tmp_path / "meet", [0, 1, 2], 2, set())
    for node, (words, said) in found.items():
        assert words[1:5] == command(node)[1:5] and words[-2:] == ["a.b=1", "--restarted"] and said == []
        assert words.count("--restarted") == 1


def test_ranks_are_numbered_anew_without_the_lost_node(tmp_path):
    found = meet(tmp_path / "meet", [0, 2], 2, {4})
    words, said = found[0]
    assert words[1:5] == ["--worker_num=4", "--local_worker_num=2", "--node_rank=0", "--tail_worker_log=0"]
    assert words[-2:] == ["data.batch_size=4", "--restarted"]
    assert said == ["nodes 1 did not come within 0.6 s; goes on with 4 of 6 workers: data.batch_size=4"]
    words, said = found[2]
    assert words[1:5] == ["--worker_num=4", "--local_worker_num=2", "--node_rank=1", "--tail_worker_log=2"]
    assert said == []


def test_no_more_nodes_than_the_degrees_take(tmp_path):
    found = meet(tmp_path / "meet", [0, 2], 2, {2})
    assert found[0][0][1] == "--worker_num=2"
    assert found[2] == (None, ["restart 1: goes on without this node (2)"])


@pytest.mark.parametrize(("least", "allowed"), [(5, {4, 2}), (2, set())])
def test_too_few_end_the_job_on_all_nodes(least, allowed, tmp_path):
    found = meet(tmp_path / "meet", [0, 1], least, allowed)
    assert found[0][0] is None and found[0][1][0].startswith("error: nodes 2 did not come within 0.6 s; no ")
    assert found[1] == (None, ["restart 1: goes on without this node (1)"])


def test_what_an_earlier_job_has_left_counts_for_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("switchyard.distributed.members.PATIENCE", 0.1)
    place = tmp_path / "restart-1"
    place.mkdir()
    (place / "members.json").write_text(json.dumps({"nodes": [0, 1], "keys": []}))
    os.utime(place / "members.json", (1, 1))
    said = []
    node = Members(command(1), 2, tmp_path, 0.2, said.append, None, lambda seconds: time.sleep(0.01))
    assert node.next_command(1) is None and said == [
        "error: node 0 did not say within 0.3 s who goes on; this node ends"
    ]
    Members(command(0), 2, tmp_path, 0.2, said.append)
    assert list(tmp_path.iterdir()) == []


def test_a_later_failure_starts_from_the_first_command():
    words = changed(command(2), [0, 2], 2, 2, ["data.batch_size=4"])
    assert words.count("--worker_num=4") == 1 and "--worker_num=6" not in words


KEYS = ["moe.expert_num=4", "model.num_layers=1", "data.batch_size=8"]


@pytest.mark.parametrize(
    ("devices", "more", "printed"),
    [
        (2, [], "parallel.data_parallel=2 data.batch_size=4 train.gradient_accumulation_steps=2\n"),
        (1, [], "parallel.data_parallel=1 data.batch_size=2 train.gradient_accumulation_steps=4\n"),
        (
            3,
            ["train.gradient_accumulation_steps=3"],
            "parallel.data_parallel=3 data.batch_size=6 train.gradient_accumu",
        ),
        (2, ["parallel.expert_parallel=2"], "parallel.data_parallel=2 data.batch_size=4"),
    ],
)
def test_fewer_devices_do_the_same_steps(devices, more, printed, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("{}")
    words = ["--config", str(tmp_path / "c.yaml"), "--devices", str(devices), "--instead-of", "4", "--target", "Ascend"]
    launch.main([*words, *KEYS, *more])
    assert capsys.readouterr().out.startswith(printed)


@pytest.mark.parametrize(
    ("devices", "more", "says"),
    [
        (3, [], "--devices: 3; they cannot share the 8 sequences of a step by 2 a device"),
        (1, ["parallel.model_parallel=2"], "they cannot share"),
        (2, ["parallel.expert_parallel=4"], "parallel.expert_parallel: 4; must divide parallel.data_parallel"),
    ],
)
def test_devices_that_cannot_are_refused(devices, more, says, tmp_path):
    (tmp_path / "c.yaml").write_text("{}")
    words = ["--config", str(tmp_path / "c.yaml"), "--devices", str(devices), "--instead-of", "4", "--target", "Ascend"]
    with pytest.raises(Exception, match=says):
        launch.main([*words, *KEYS, *more])


@pytest.fixture
def second_node():
    """A network of its own beside this one, which the kernel treats as another machine."""
    name, pipe = f"switchyard{os.getpid()}", f"sy{os.getpid() % 100000}"
    inside = ["ip", "netns", "exec", name]
    if not shutil.which("ip") or subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        pytest.skip("needs a network namespace: root, and the command `ip`")
    try:
        for words in (
            ["ip", "link", "add", f"{pipe}a", "type", "veth", "peer", "name", f"{pipe}b", "netns", name],
            ["ip", "address", "add", f"{HOUSE}.1/24", "dev", f"{pipe}a"],
            ["ip", "link", "set", f"{pipe}a", "up"],
            [*inside, "ip", "address", "add", f"{HOUSE}.2/24", "dev", f"{pipe}b"],
            [*inside, "ip", "link", "set", f"{pipe}b", "up"],
            [*inside, "ip", "link", "set", "lo", "up"],
        ):
            subprocess.run(words, check=True, capture_output=True)
        yield name
    finally:
        kill_all(name)
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def kill_all(name: str) -> None:
    """Kills every process of a network at once, as the loss of a machine does."""
    for process in subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split():
        os.kill(int(process), signal.SIGKILL)


def start(folder: Path, node: int, inside: list[str]) -> subprocess.Popen:
    script = ["bash", str(ROOT / "scripts" / "run_distribute_train_ascend.sh"), "--config", str(folder / "config.yaml")]
    job = ["--devices", "1", "--nodes", "2", "--node-rank", str(node), "--master", f"{HOUSE}.1", "--port", "28713"]
    left = ["--max-restarts", "2", "--min-workers", "1", "--rendezvous", str(folder / "meet"), "--rejoin-wait", "5"]
    logs = ["--log-dir", str(folder / f"logs-{node}"), "train.name=hit"]
    environment = os.environ | {"DEVICE": "cpu", "SWITCHYARD_VENV": sys.prefix}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([*inside, *script, *job, *left, *logs], env=environment, cwd=folder, **quiet)


@pytest.mark.long
def test_a_job_of_two_nodes_goes_on_with_the_one_that_is_left(tmp_path, second_node):
    """Two data-parallel replicas on two nodes; a node is lost; one device does the steps of two."""
    from switchyard.training.loop import train

    write_text(tmp_path)
    config = run_config(tmp_path, moe={"expert_num": 4, "groups": None}, data={"batch_size": 4}, train={"steps": 120})
    sections = yaml.safe_load(config.to_yaml())
    del sections["parallel"]  # the devices decide
    sections["train"] |= {"checkpoint_every": 10, "name": "hit"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(sections))
    other = start(tmp_path, 1, ["ip", "netns", "exec", second_node])
    job, run = start(tmp_path, 0, []), tmp_path / "runs" / "hit"
    end = time.monotonic() + 300
    while not any(checkpoint.step_of(path) >= 20 for path in checkpoint.listed(run)):
        assert time.monotonic() < end and job.poll() is None
        time.sleep(0.1)
    kill_all(second_node)
    other.wait(60)
    assert job.wait(600) == 0
    said = (tmp_path / "logs-0" / "all.log").read_text()
    keys = "parallel.data_parallel=1 data.batch_size=2 train.gradient_accumulation_steps=2"
    assert f"nodes 1 did not come within 5 s; goes on with 1 of 2 workers: {keys}" in said
    alone = run_config(
        tmp_path, moe={"expert_num": 4, "groups": 2}, data={"batch_size": 4}, train={"steps": 120, "name": "one"}
    )
    train(alone)
    hit, undisturbed = losses_of(run), losses_of(tmp_path / "runs" / "one")
    assert len(hit) == 120 and max(abs(hit[step] - undisturbed[step]) for step in undisturbed) < 1e-3
