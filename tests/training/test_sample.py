"""Which jobs sample a text in training; what they sample: tests/report/test_real_run.py."""

from oracles.tiny_run import run_config, write_text

from switchyard.data import load_data
from switchyard.distributed.mesh import LOCAL, LocalMesh
from switchyard.distributed.processes import SINGLE
from switchyard.training.loop import train
from switchyard.training.sample import create_sampler


class OtherMesh(LocalMesh):
    """Stands for a mesh of several devices."""


def test_one_device_samples_and_a_mesh_of_several_does_not(tmp_path):
    write_text(tmp_path)
    config = run_config(tmp_path, train={"sample_every": 2})
    data = load_data(config)
    assert LOCAL.samples and not OtherMesh(SINGLE).samples
    assert create_sampler(None, config, data, OtherMesh(SINGLE)) is None
    assert create_sampler(None, run_config(tmp_path), data, LOCAL) is None


def test_a_job_that_cannot_sample_says_so(tmp_path, capsys):
    config = run_config(
        None,
        model={"type": "vision", "num_layers": 1, "hidden_size": 8},
        data={"path": None, "tokenizer": "byte", "batch_size": 400},
        train={"steps": 1, "sample_every": 1, "output_dir": str(tmp_path)},
        schedule={"warmup_steps": 0},
        context={"mode": "pynative"},
    )
    train(config)
    out = capsys.readouterr().out
    assert "train.sample_every: 1; no text is sampled: only a decoder on one device samples" in out
