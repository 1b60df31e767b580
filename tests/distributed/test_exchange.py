"""The exchange of rows, with AllGather replaced by what all processes would have sent."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from switchyard.config import build
from switchyard.distributed.collectives import ProcessMesh, ToExperts, ToTokens, is_expert
from switchyard.distributed.placement import ParallelDims
from switchyard.distributed.processes import Processes
from switchyard.models import create_model

EXPERTS, SLOTS, WIDTH = 4, 3, 2


class Told(nn.Cell):
    """AllGather whose answer is known: whatever this process sends, all have sent `everything` [W, ...]."""

    def __init__(self, everything: np.ndarray, rank: int):
        super().__init__()
        self.answer = Tensor(everything.reshape(-1, *everything.shape[2:]))
        self.own, self.rank, self.count = Tensor(everything[rank]), rank, len(everything)

    def construct(self, sent):
        assert (sent.asnumpy() == self.own.asnumpy()).all()
        return self.answer


@pytest.mark.parametrize("degrees", [ParallelDims(2, 2), ParallelDims(4, 2), ParallelDims(4, 4)], ids=str)
def test_rows_reach_their_experts_and_come_back(pynative, degrees):
    """[E, S, D] of every process: expert e of process p gets the rows of its group, in the order of the group."""
    size, own = degrees.data_parallel, EXPERTS // degrees.expert_parallel
    sent = np.random.default_rng(0).normal(size=(size, EXPERTS, SLOTS, WIDTH)).astype(np.float32)
    arrived = np.stack(
        [
            np.concatenate([sent[other, own * place : own * (place + 1)] for other in degrees.expert_group(rank)], 1)
            for rank in range(size)
            for place in [degrees.coordinates(rank).expert]
        ]
    )  # [W, e, g * S, D]
    for rank in range(size):
        processes = Processes(rank, size, degrees)
        there, back = ToExperts(processes), ToTokens(processes)
        there.gather, back.gather = Told(sent, rank), Told(arrived, rank)
        assert (there(Tensor(sent[rank])).asnumpy() == arrived[rank]).all()
        assert (back(Tensor(arrived[rank])).asnumpy() == sent[rank]).all()
        there.gather, back.gather = Told(arrived, rank), Told(sent, rank)  # the gradient of the one is the other
        assert (there.bprop(None, None, Tensor(arrived[rank]))[0].asnumpy() == sent[rank]).all()
        assert (back.bprop(None, None, Tensor(sent[rank]))[0].asnumpy() == arrived[rank]).all()


@pytest.mark.parametrize("drawn", [True, False])
def test_each_process_keeps_its_experts(drawn):
    """Whether a model was built with all of its numbers or with none; the rest is full on every process."""
    config = build(
        {
            "model": {"num_layers": 1, "hidden_size": 8, "num_heads": 2, "seq_length": 4, "intermediate_size": 4},
            "moe": {"router": "switch", "expert_num": 4, "layers": [0]},
        }
    )
    full = {parameter.name: parameter.asnumpy() for parameter in create_model(config, 16).get_parameters()}
    for rank, experts in enumerate([slice(0, 2), slice(2, 4)] * 2):
        mesh = ProcessMesh(Processes(rank, 4, ParallelDims(4, 2)))
        model = create_model(config, 16, drawn=drawn, mesh=mesh)
        mesh.place(model)
        cut = []
        for parameter in model.get_parameters():
            expected = full[parameter.name]
            if is_expert(parameter.name, expected.shape):
                cut.append(parameter.name.rsplit(".", 1)[1])
                expected = expected[experts]
            np.testing.assert_array_equal(parameter.asnumpy(), expected, parameter.name)
        assert sorted(cut) == ["w_in", "w_out"]
        assert mesh.full_shapes(model) == {name: array.shape for name, array in full.items()}


def test_the_stand_in_notices_what_was_sent(pynative):
    degrees = ParallelDims(2, 2)
    there = ToExperts(Processes(0, 2, degrees))
    there.gather = Told(np.ones((2, EXPERTS, SLOTS, WIDTH), np.float32), 0)
    with pytest.raises(AssertionError):
        there(ms.ops.zeros((EXPERTS, SLOTS, WIDTH), ms.float32))
