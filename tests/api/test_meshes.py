"""The library's layer under a compiled mesh: what the compiler is told holds, and the result is that of one device."""

import numpy as np
import pytest
from mindspore import Tensor
from oracles.routers import GROUPS, ROWS, CheckingMesh
from oracles.tiny import tiny_config

import switchyard as sw

KEYS = {"router": "top_k", "num_experts_chosen": 2, "init_method_std": 0.5, "intermediate_size": 5, "seed": 3}


class Mesh(CheckingMesh):
    """Checks too what the layer sums on a device: one row of figures."""

    def check(self, layouts, tensors) -> None:
        """See CheckingMesh."""
        if len(tensors) > 1 or tensors[0].shape[0] > 1:
            super().check(layouts, tensors)
        else:
            assert self.axes[id(layouts[0])] == ("data", None) and tensors[0].shape == (1, 6 + 2 * 4)


@pytest.mark.parametrize("training", [True, False])
def test_a_sharded_layer_gives_what_one_device_gives(training, pynative):
    """Bit for bit: output, loss, and the statistics on the host; the groups are those of the mesh."""
    mesh = Mesh(tiny_config(num_experts_chosen=2, groups=GROUPS))
    own = {"return_losses": True, "losses": {"importance": 0.1}}
    alone = sw.MoELayer(6, 4, groups=GROUPS, **own | KEYS).set_train(training)
    sharded = sw.MoELayer(6, 4, mesh=mesh, **own | KEYS).set_train(training)
    sharded.shard(mesh)
    random, found = np.random.default_rng(0), []
    x, valid = random.normal(0, 1, (GROUPS, ROWS, 6)).astype(np.float32), np.ones((GROUPS, ROWS), np.float32)
    valid[1, -2:] = 0
    noise = Tensor(np.zeros((1, GROUPS * ROWS, 6), np.float32))
    for layer in (alone, sharded):
        out, loss = layer(Tensor(x), Tensor(valid), noise)
        found.append((out.asnumpy(), loss.asnumpy(), layer.statistics.asnumpy().copy()))
    for one, two in zip(*found):
        np.testing.assert_array_equal(one, two)
    assert sharded.metrics()["tokens"] == GROUPS * ROWS - 2 and float(found[0][1]) > 0


def test_a_sharded_layer_asks_for_noise_in_training(pynative):
    """A compiled mesh cannot draw noise in a graph; without noise to read the layout of the constant stays the same."""
    mesh = Mesh(tiny_config(groups=GROUPS))
    layer = sw.MoELayer(6, 4, mesh=mesh, return_losses=True, **KEYS).set_train()
    layer.shard(mesh)
    with pytest.raises(sw.UserError, match=r"^noise: not given; this layer reads it"):
        layer(Tensor(np.ones((GROUPS, ROWS, 6), np.float32)))


def test_losses_cannot_be_attached_on_a_compiled_mesh():
    mesh = Mesh(tiny_config(groups=GROUPS))
    with pytest.raises(sw.UserError, match=r"^return_losses: False; a compiled mesh cannot attach losses: set it to"):
        sw.MoELayer(6, 4, mesh=mesh, **KEYS).shard(mesh)
