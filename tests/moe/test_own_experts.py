"""Experts of a user's own, without anything but `construct`: trained, evaluated, generated with, cut over processes."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype
from oracles.routers import GROUPS, ROWS, checking_mesh
from oracles.tiny import layer_gradients, run_layer, tiny_config, tiny_rows, weights_of

from switchyard.config import build
from switchyard.distributed.collectives import ProcessMesh
from switchyard.distributed.mesh import LOCAL
from switchyard.distributed.placement import ParallelDims
from switchyard.distributed.processes import Processes
from switchyard.errors import UserError
from switchyard.forms import keeps
from switchyard.models import Decode, Decoder, Prefill
from switchyard.moe.conv_experts import ConvolutionExperts, SliceExperts
from switchyard.moe.experts import FeedForwardExperts
from switchyard.moe.layer import MoELayer
from switchyard.moe.own_classes import require_cut_experts
from switchyard.nn.initializers import InitialWeights
from switchyard.nn.noise import NoiseSlices


class Tanh(nn.Cell):
    """tanh(x A_e) + b_e: nothing that the layer could know, and no form of blocks."""

    def __init__(self, experts: int, width: int):
        super().__init__()
        random = np.random.default_rng(5)
        self.matrix = Parameter(Tensor(random.normal(0, 0.7, (experts, width, width)).astype(np.float32)), "matrix")
        self.bias = Parameter(Tensor(random.normal(0, 0.7, (experts, 1, width)).astype(np.float32)), "bias")
        self.product, self.bend = ops.BatchMatMul(), ops.Tanh()

    def construct(self, rows):
        return self.bend(self.product(rows, self.matrix)) + self.bias


class Shifted(FeedForwardExperts):
    """Refines the shipped experts in `construct` alone: the inherited `blocks` would be its parent's."""

    def construct(self, rows):
        return super().construct(rows) + 1.0


def own_layer(make, train: bool, width: int = 6, mesh=LOCAL, **moe) -> MoELayer:
    """A layer of width 6 with experts of one's own."""
    config = tiny_config(width=width, **moe)
    random, slices = InitialWeights(0), NoiseSlices()
    layer = MoELayer(config, (0.7, 0.7), random, mstype.float32, slices, make_experts=make, mesh=mesh)
    weight = layer.router.weight
    weight.set_data(Tensor(np.random.default_rng(1).normal(0, 0.8, weight.shape).astype(np.float32)))
    return layer.set_train(train)


def tanh_experts(experts: int, hidden: int) -> nn.Cell:
    return Tanh(experts, 6)


def shifted_experts(experts: int, hidden: int) -> nn.Cell:
    return Shifted(experts, 6, hidden, "relu", (0.7, 0.7), InitialWeights(0), mstype.float32)


def of_tanh(x, weights, expert):
    return np.tanh(x @ weights["experts.matrix"][expert]) + weights["experts.bias"][expert, 0]


def of_shifted(x, weights, expert):
    return np.maximum(x @ weights["experts.w_in"][expert], 0) @ weights["experts.w_out"][expert] + 1.0


KINDS = {"tanh": (tanh_experts, of_tanh), "shifted": (shifted_experts, of_shifted)}


def by_loop(rows, valid, weights, work, choices):
    """Softmax, the best experts, their outputs weighted by their probabilities: a loop over rows."""
    out = np.zeros_like(rows)
    for group, row in np.argwhere(valid > 0):
        scores = rows[group, row] @ weights["router.weight"]
        gates = np.exp(scores - scores.max())
        gates /= gates.sum()
        for expert in np.argsort(-scores)[:choices]:
            out[group, row] += gates[expert] * work(rows[group, row], weights, expert)
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("train", [False, True])
def test_nothing_is_dropped_and_every_row_gets_its_own_experts(kind, train, pynative):
    """At evaluation, and in training where dispatch is dropless: a loop over rows says the same."""
    make, work = KINDS[kind]
    layer = own_layer(make, train, num_experts_chosen=2, norm_topk_prob=False, dispatch="dropless", groups=2)
    rows, valid = tiny_rows(groups=2, padded=2)
    out, *_, audit = run_layer(layer, rows, valid)
    np.testing.assert_allclose(out, by_loop(rows, valid, weights_of(layer), work, 2), atol=2e-5)
    assert audit["dropped"] == 0


def test_gradients_are_those_of_capacity_for_all(pynative):
    """Dropless by every expert on every block, against slots for all rows."""
    found = []
    for keys in ({"dispatch": "dropless"}, {"capacity_factor": 4.0}):
        layer = own_layer(tanh_experts, True, num_experts_chosen=2, **keys)
        rows, valid = tiny_rows(padded=1)
        found.append(layer_gradients(layer, rows, valid, np.ones_like(rows), 0.0, 0.0))
    for name in found[0]:
        np.testing.assert_allclose(found[0][name], found[1][name], atol=2e-5, err_msg=name)


def test_experts_that_cannot_be_merged_are_refused_when_the_layer_is_made():
    with pytest.raises(UserError, match=r"^moe\.router: merged; Tanh has no `merged\(rows, gates\)` of its own"):
        own_layer(tanh_experts, True, router="merged")
    with pytest.raises(UserError, match=r"^moe\.router: merged; Shifted has no `merged"):
        own_layer(shifted_experts, True, router="merged")


def test_shipped_experts_keep_their_blocks():
    for kind in (FeedForwardExperts, ConvolutionExperts, SliceExperts):
        assert keeps(kind, "construct", "blocks") and keeps(kind, "construct", "merged")


class Louder(MoELayer):
    """A layer of one's own, of which generation must not take the shipped one's shortcut."""

    def construct(self, rows, valid, noise, token_ids=None, task_ids=None, replay=None, view=None):
        out, stats, choices = super().construct(rows, valid, noise, token_ids, task_ids, replay, view)
        return out * 2.0, stats, choices


@pytest.mark.parametrize(("layer", "mode"), [(MoELayer, ms.GRAPH_MODE), (Louder, ms.PYNATIVE_MODE)])
def test_generation_says_what_the_decoder_says(layer, mode, pynative):
    """Prefill and decode of a decoder with experts, or a layer, of one's own against its forward pass."""
    model = {"num_layers": 1, "hidden_size": 6, "num_heads": 1, "seq_length": 8, "intermediate_size": 6}
    moe = {"router": "top_k", "expert_num": 4, "num_experts_chosen": 2, "layers": "all"}
    config = build({"model": model | {"init_method_std": 0.4}, "moe": moe})
    decoder = Decoder(config, 9)
    random, slices = InitialWeights(0), NoiseSlices()
    make = None if layer is Louder else tanh_experts
    decoder.layers[0].feed_forward = layer(config, (0.7, 0.7), random, mstype.float32, slices, 9, make_experts=make)
    decoder.set_train(False)
    tokens = np.random.default_rng(3).integers(0, 9, (2, 6)).astype(np.int32)
    valid, noise = np.ones((2, 6), np.float32), np.zeros((1, 1, 1), np.float32)
    whole = decoder(Tensor(tokens), Tensor(valid), Tensor(noise))[0].asnumpy().reshape(2, 6, -1)
    ms.set_context(mode=mode)  # the fixture takes it back
    prefill, decode = Prefill(decoder, 8).set_train(False), Decode(decoder, 8).set_train(False)
    logits, *caches = prefill(Tensor(tokens[:, :5]), Tensor(np.full(2, 5, np.int32)))
    np.testing.assert_allclose(logits.asnumpy(), whole[:, 4], atol=1e-4)
    caches = [Tensor(np.pad(cache.asnumpy(), ((0, 0), (0, 0), (0, 1), (0, 0)))) for cache in caches]
    logits = decode(Tensor(tokens[:, 5]), Tensor(np.full(2, 5, np.int32)), *caches)
    np.testing.assert_allclose(logits.asnumpy(), whole[:, 5], atol=1e-4)


def test_experts_of_own_names_are_not_sharded_over_processes():
    """They would stay whole while their rows are exchanged: refused before anything runs."""
    processes = Processes(0, 2, ParallelDims(data_parallel=2, expert_parallel=2))
    with pytest.raises(
        UserError, match=r"^parallel\.expert_parallel: '.*matrix' \[4, 6, 6\] would not be sharded"
    ) as caught:
        own_layer(tanh_experts, True, mesh=ProcessMesh(processes))
    assert "w_in, w_gate or w_out" in str(caught.value)


def test_a_compiled_cluster_refuses_experts_that_it_would_replace():
    shifted = shifted_experts(4, 5)
    with pytest.raises(UserError, match=r"\.Shifted: changes `construct` of FeedForwardExperts and not `shard`"):
        require_cut_experts(shifted, 4)
    with pytest.raises(UserError, match=r"\.Tanh: these experts have no `shard\(mesh\)`"):
        require_cut_experts(Tanh(4, 6), 4)

    class Cut(Shifted):
        def shard(self, mesh): ...

    cut = Cut(4, 6, 5, "relu", (0.7, 0.7), InitialWeights(0), mstype.float32)
    require_cut_experts(cut, 4)
    with pytest.raises(UserError, match=r"^moe\.dispatch: dropless; is made of w_in, w_gate and w_out, not of .*\.Cut"):
        require_cut_experts(cut, 4, "dropless")


def test_a_compiled_cluster_runs_a_layer_of_ones_own(pynative):
    """There is one forward pass, so what a subclass makes of it counts on every mesh."""
    config = tiny_config(groups=GROUPS, num_experts_chosen=2)
    mesh, (rows, valid) = checking_mesh(config), tiny_rows(GROUPS, ROWS, padded=2)
    found = []
    for kind in (MoELayer, Louder):
        layer = kind(config, (0.7, 0.7), InitialWeights(0), mstype.float32, NoiseSlices(), mesh=mesh)
        layer.shard(mesh)
        found.append(run_layer(layer, rows, valid)[0])
    assert np.abs(found[0]).max() > 0.1
    np.testing.assert_array_equal(found[1], 2 * found[0])


def test_a_compiled_cluster_refuses_shared_experts_of_ones_own_without_layouts():
    """A maker's shared experts are sharded as its experts are: by their own `shard`."""
    config = tiny_config(shared_expert_num=2)

    def make(experts: int, hidden: int) -> nn.Cell:
        if experts == 1:
            return nn.Identity()
        return FeedForwardExperts(experts, 6, hidden, "relu", (0.7, 0.7), InitialWeights(0), mstype.float32)

    layer = MoELayer(config, (0.7, 0.7), InitialWeights(0), mstype.float32, NoiseSlices(), make_experts=make)
    with pytest.raises(UserError, match=r"Identity: these experts have no `shard\(mesh\)`: define it"):
        layer.shard(checking_mesh(config))
