"""The guard of replicas: what it compares, what it says, and that a job of two processes stops by it."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from oracles.jobs import ROOT, start
from oracles.tiny_run import run_config, write_text

from switchyard.checkpoint import store as checkpoint
from switchyard.config import build
from switchyard.distributed.placement import ParallelDims
from switchyard.distributed.processes import Processes
from switchyard.distributed.replicas import check_replicas, checksum, odd_ones, replica_groups
from switchyard.errors import UserError
from switchyard.training import trainer as training

EXPERT, PLAIN = "layers.0.feed_forward.experts.w_in", "norm.gain"


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int32])
def test_checksum_sees_one_bit_and_a_sign_of_zero(dtype):
    array = np.arange(7, dtype=dtype)
    other = array.copy()
    other.view(np.uint8)[-1] ^= 1
    assert checksum(array) == checksum(array.copy()) != checksum(other)
    assert checksum(np.zeros(3, np.float32)) != checksum(-np.zeros(3, np.float32))
    assert checksum(np.zeros((0, 4), np.float32)) == (0, 0) and checksum(np.array(1.0, np.float32))[0]


def test_groups_are_those_that_hold_the_same():
    degrees = ParallelDims(4, 2)
    assert list(replica_groups(PLAIN, (16,), degrees)) == [(0, 1, 2, 3)]
    assert list(replica_groups("moment1." + EXPERT, (4, 16, 8), degrees)) == [(0, 2), (1, 3)]
    assert list(replica_groups(EXPERT, (4, 16, 8), ParallelDims(4, 4))) == []
    assert list(replica_groups(PLAIN, (16,), ParallelDims(4, 2, optimizer_shard=1))) == []  # every rank its own part
    assert list(replica_groups(PLAIN, (3,), ParallelDims(4, 2, optimizer_shard=1))) == [(0, 1, 2, 3)]
    assert list(replica_groups(PLAIN, (16,), ParallelDims(2, 1, 1, 2))) == [(0, 1), (2, 3)]


def test_the_odd_ones_are_those_outside_the_largest_party():
    sums = np.array([[1, 2], [1, 2], [1, 3], [1, 2]], np.uint64)
    assert odd_ones((4, 5, 6, 7), sums) == [6] and odd_ones((4, 5), sums[:2]) == []
    assert odd_ones((0, 1), sums[1:3]) == [1]  # of two nobody knows; the first is taken for right


class Together(Processes):
    """Gathers what two ranks would have sent."""

    def gather(self, array):
        other = array.copy()
        other[0, 1] ^= np.uint64(4)
        return np.stack((array, other))


def test_what_differs_is_named():
    processes, arrays = Together(0, 2, ParallelDims(2, 2)), {PLAIN: np.ones(4, np.float32)}
    said = "'norm.gain' differs between ranks 1 and ranks 0 after step 7, although replicas must be equal; kept"
    with pytest.raises(UserError, match=said) as caught:
        check_replicas(arrays, {PLAIN: (4,)}, processes, 7, lambda: "kept")
    assert "\n" not in str(caught.value)
    check_replicas(
        {EXPERT: arrays[PLAIN].reshape(1, 2, 2)}, {EXPERT: (2, 2, 2)}, processes, 7, str
    )  # slices may differ


def test_random_state_is_compared_too(monkeypatch):
    """A rank that reads another seed, say from an old copy of the configuration, draws other noise."""
    given = []
    monkeypatch.setattr(training, "check_replicas", lambda arrays, shapes, *_: given.append((arrays, shapes)))
    for seed, done in ((1, 5), (1, 5), (2, 5), (1, 6)):
        trainer = SimpleNamespace(
            processes=Processes(0, 2, ParallelDims(2)), config=build({"train": {"seed": seed}}), compared=0, done=done
        )
        trainer.step, trainer._kept = SimpleNamespace(shapes={PLAIN: (3,)}), lambda: ""
        training.Trainer._compare_replicas(trainer, {PLAIN: np.ones(3, np.float32)})
    sums = [checksum(arrays["random state"]) for arrays, _ in given]
    assert sums[0] == sums[1] and len(set(sums)) == 3
    assert given[0][1]["random state"] == () and list(replica_groups("random state", (), ParallelDims(2))) == [(0, 1)]
    assert list(replica_groups("random state", (), ParallelDims(2, 2, 3, optimizer_shard=1))) == [tuple(range(6))]


def job(folder: Path, config, *corrupted: str):
    """Two CPU processes that train; rank, step and parameter that is spoilt, if any."""
    path = folder / "config.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    program = ROOT / "tests" / "oracles" / "corrupting.py"
    launcher = [sys.executable, "-m", "mindspore.parallel.cluster.run"]
    command = [*launcher, "--worker_num=2", "--local_worker_num=2", "--join=True", f"--log_dir={folder / 'logs'}"]
    return start([*command, f"--master_port={free_port()}", str(program), str(path), *corrupted])


def free_port() -> int:
    """A port that nobody has at this moment."""
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.slow
def test_a_spoilt_rank_stops_the_job_and_the_last_good_checkpoint_stays(tmp_path):
    write_text(tmp_path)
    train = {"steps": 20, "checkpoint_every": 2, "replica_check_every": 3, "eval_every": 0, "keep_checkpoints": 9}
    config = run_config(tmp_path, moe={"expert_num": 4}, train=train, parallel={"data_parallel": 2})
    running = job(tmp_path, config, "1", "5", "layers.0.attention.qkv.weight")
    out, err = running.communicate(timeout=120)
    assert running.returncode != 0
    logs = [(tmp_path / "logs" / f"worker_{rank}.log").read_text() for rank in range(2)]
    said = "error: train.replica_check_every: 'layers.0.attention.qkv.weight' differs between ranks 1 and ranks 0 after"
    assert all(said in log for log in logs), out + err + logs[0][-2000:]
    newest = checkpoint.listed(tmp_path / "runs" / "tiny")[-1]
    assert newest.name == checkpoint.name_of(4) and f"'{newest}' is unchanged and good" in logs[0]
