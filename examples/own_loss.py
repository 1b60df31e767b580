"""A routing loss of one's own: a router that is too sure of its experts pays for it.

The loss is log E - entropy of the router, 0 for a router that is undecided. Its weight is an argument of the layer, or
stands in the YAML file: `moe.losses: {my_file.overconfidence: 0.1}`.
"""

# %% [markdown]
# ## The loss
# A loss gets the router's decision and returns a sum over the real rows of each group of rows. The layer divides it by
# the number of rows, weighs it, and gives its gradient to the router.

# %%
import math

import mindspore as ms
from mindspore import nn, ops

import switchyard as sw


@sw.register("overconfidence")
def overconfidence(routing, valid, choices, length):
    """A Routing and valid [G, N] -> [G]: the sum of log E - entropy over the rows of each group."""
    probabilities = routing["probabilities"]  # [G, N, E]
    entropy = -(probabilities * ops.log(ops.maximum(probabilities, 1e-20))).sum(-1)  # [G, N]
    return ((math.log(probabilities.shape[-1]) - entropy) * valid).sum(1)


# %% [markdown]
# ## Training with it and without
# Both layers learn to copy their input; only the weight of the loss differs.


# %%
ms.set_context(mode=ms.GRAPH_MODE)  # compiled: fast steps


def train(weight: float) -> sw.MoELayer:
    """Trains a layer for 40 steps."""
    ms.set_seed(1)
    rows = ops.randn(128, 16)
    layer = sw.MoELayer(16, 4, router="top_k", num_experts_chosen=2, losses={"overconfidence": weight}, seed=1)
    loss = nn.WithLossCell(layer, nn.MSELoss())
    step = nn.TrainOneStepCell(loss, nn.Adam(layer.trainable_params(), 1e-2)).set_train()
    for _ in range(40):
        step(rows, rows)
    return layer


# %%
for weight in (0.0, 0.1):
    layer = train(weight)
    print(f"weight {weight}: entropy {layer.metrics()['entropy']:.3f} nats, loss {layer.losses['auxiliary']:.4f}")
