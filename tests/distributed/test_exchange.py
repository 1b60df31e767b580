"""The exchange of rows, with AllGather replaced by what all processes would have sent."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from switchyard.distributed.collectives import ToExperts, ToRows, is_expert, own_arrays
from switchyard.distributed.placement import Degrees
from switchyard.distributed.processes import Processes

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


@pytest.mark.parametrize("degrees", [Degrees(2, 2), Degrees(4, 2), Degrees(4, 4)], ids=str)
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
        there, back = ToExperts(processes), ToRows(processes)
        there.gather, back.gather = Told(sent, rank), Told(arrived, rank)
        assert (there(Tensor(sent[rank])).asnumpy() == arrived[rank]).all()
        assert (back(Tensor(arrived[rank])).asnumpy() == sent[rank]).all()
        there.gather, back.gather = Told(arrived, rank), Told(sent, rank)  # the gradient of the one is the other
        assert (there.bprop(None, None, Tensor(arrived[rank]))[0].asnumpy() == sent[rank]).all()
        assert (back.bprop(None, None, Tensor(sent[rank]))[0].asnumpy() == arrived[rank]).all()


def test_each_process_holds_its_experts():
    degrees = Degrees(4, 2)
    whole = {
        "layers.0.feed_forward.experts.w_in": np.arange(4 * 3 * 5).reshape(4, 3, 5),
        "moment1.layers.0.feed_forward.experts.w_out": np.arange(4 * 5 * 3).reshape(4, 5, 3),
        "layers.0.feed_forward.router.weight": np.arange(12).reshape(3, 4),
        "correction1": np.zeros(()),
    }
    assert [is_expert(name, array.shape) for name, array in whole.items()] == [True, True, False, False]
    held = [own_arrays(whole, Processes(rank, 4, degrees)) for rank in range(4)]
    for name, array in whole.items():
        if is_expert(name, array.shape):
            assert (np.concatenate([held[0][name], held[1][name]]) == array).all()
            assert (held[0][name] == held[2][name]).all() and (held[1][name] == held[3][name]).all()
        else:
            assert all((part[name] == array).all() for part in held)


def test_the_stand_in_notices_what_was_sent(pynative):
    degrees = Degrees(2, 2)
    there = ToExperts(Processes(0, 2, degrees))
    there.gather = Told(np.ones((2, EXPERTS, SLOTS, WIDTH), np.float32), 0)
    with pytest.raises(AssertionError):
        there(ms.ops.zeros((EXPERTS, SLOTS, WIDTH), ms.float32))
