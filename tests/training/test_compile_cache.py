"""The compiled step of a run serves the next run of the same program, and no other."""

import subprocess
import sys
from pathlib import Path

import pytest

from switchyard.config import build
from switchyard.errors import UserError
from switchyard.training.compile_cache import digest_of, require_one_device

PROGRAM = """
import sys
import mindspore as ms
import numpy as np
from mindspore import nn, ops
from switchyard.config import build
from switchyard.training.compile_cache import compile_cache, graph_of
from pathlib import Path

class Scaled(nn.Cell):
    def __init__(self, factor):
        super().__init__()
        self.factor, self.product = factor, ops.MatMul()

    def construct(self, x):
        return self.product(x, x) * self.factor

def compiled(factor):
    with compile_cache(config, {"w": (2, 2)}, print):
        print(Scaled(factor)(x).asnumpy()[0, 0])

ms.set_context(mode=ms.GRAPH_MODE)
config, x = build({"context": {"compile_cache": sys.argv[1]}}), ms.Tensor(np.ones((2, 2), np.float32))
compiled(float(sys.argv[2]))
if sys.argv[3:] == ["damage"]:
    graph = graph_of(next(Path(sys.argv[1]).iterdir()))
    graph.write_bytes(graph.read_bytes()[:-1])
    compiled(float(sys.argv[2]))
"""


def run(folder: Path, *arguments: str) -> list[str]:
    program = folder / "program.py"  # a graph's source must stand in a file
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), str(folder / "cache"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.slow
def test_a_second_process_takes_the_first_ones_graph_and_no_damaged_one(tmp_path):
    assert run(tmp_path, "2") == ["4.0"]
    first, said, again = run(tmp_path, "3", "damage")
    assert first == "4.0"  # the factor is no part of the digest here: what came was the graph of the first process
    assert said.startswith("context.compile_cache: ") and said.endswith("is damaged, and is made anew")
    assert again == "6.0"
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize("key", ["moe.capacity_factor=2.0", "optimizer.eps=1e-6", "train.seed=5", "data.batch_size=3"])
def test_another_configuration_has_another_graph(key):
    shapes = {"head": (4, 65)}
    assert digest_of(build({}, [key]), shapes) != digest_of(build({}), shapes)
    assert digest_of(build({}, ["train.name=other"]), shapes) == digest_of(build({}), shapes)
    assert digest_of(build({}), {"head": (4, 66)}) != digest_of(build({}), shapes)


def test_code_of_ones_own_is_compiled_each_time(tmp_path):
    said, config = [], build({"moe": {"experts": "mine.Experts"}, "context": {"compile_cache": str(tmp_path / "c")}})
    from switchyard.training.compile_cache import compile_cache

    with compile_cache(config, {}, said.append):
        pass
    assert len(said) == 1 and "not used" in said[0] and not (tmp_path / "c").exists()


def test_several_devices_are_refused():
    config = build({"context": {"compile_cache": "c"}, "parallel": {"data_parallel": 2}})
    with pytest.raises(UserError, match=r"context\.compile_cache: 'c'; works on one device, here are 2"):
        require_one_device(config)
