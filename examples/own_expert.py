"""Experts of one's own kind: low-rank linear maps in the place of feed-forward networks.

All experts of a layer are one Cell, which gets the rows of every expert at once: [E, S, D] -> [E, S, D].
"""

# %% [markdown]
# ## The experts
# `setting` has the sizes, and draws the initial weights. One batched matrix product computes all experts, so there is
# no loop over them.

# %%
import mindspore as ms
from mindspore import nn, ops

import switchyard as sw


@sw.register("low_rank")
class LowRank(sw.Expert):
    """Computes x A_e B_e: each expert e has two thin matrices of its own."""

    def __init__(self, setting):
        super().__init__(setting)
        experts, width, rank = setting.expert_num, setting.hidden_size, setting.intermediate_size
        self.down = setting.normal((experts, width, rank), "down")
        self.up = setting.normal((experts, rank, width), "up", last=True)
        self.product = ops.BatchMatMul()

    def construct(self, rows):
        """Rows [E, S, D] -> [E, S, D]."""
        return self.product(self.product(rows, self.down), self.up)


# %% [markdown]
# ## Training
# Each quarter of the rows is to be turned in a way of its own. `moe_intermediate_size` is the rank.

# %%
ms.set_context(mode=ms.GRAPH_MODE)  # compiled: fast steps
ms.set_seed(1)
keys = {"router": "top_k", "moe_intermediate_size": 8, "init_method_std": 0.3, "aux_loss_factor": 0.1}
layer = sw.MoELayer(16, 4, experts="low_rank", seed=1, **keys)
kinds, noise = ops.randn(4, 16), 0.3 * ops.randn(256, 16)
rows = kinds[ops.arange(256) % 4] + noise  # [256, 16], four kinds of rows
target = ops.bmm(rows.reshape(64, 4, 16).swapaxes(0, 1), ops.randn(4, 16, 16) / 4).swapaxes(0, 1).reshape(256, 16)
step = nn.TrainOneStepCell(nn.WithLossCell(layer, nn.MSELoss()), nn.Adam(layer.trainable_params(), 1e-2)).set_train()
losses = [float(step(rows, target).asnumpy()) for _ in range(60)]

# %%
weights = sum(one.size for one in layer.moe.experts.get_parameters())
print(f"{weights:,} weights in the experts; loss {losses[0]:.3f} -> {losses[-1]:.3f}")
print("rows of each expert:", layer.metrics()["load"].astype(int).tolist())
