"""A conditional layer in a network of one's own, trained on handwritten digits with a MindSpore dataset.

The network is plain MindSpore: two dense layers with `sw.MoELayer` between them, trained by `mindspore.Model.fit`.
The balance loss of the router needs no line of code: its gradient is attached to the output of the layer.
"""

# %% [markdown]
# ## The data
# scikit-learn has 1,797 digits of 8 x 8 pixels. The last 297 are for validation.

# %%
import mindspore as ms
import numpy as np
from mindspore import nn
from mindspore.dataset import NumpySlicesDataset
from sklearn.datasets import load_digits

import switchyard as sw

ms.set_context(mode=ms.GRAPH_MODE)  # compiled: fast steps
ms.set_seed(1)
digits = load_digits()
images, labels = (digits.data / 16).astype(np.float32), digits.target.astype(np.int32)
train = NumpySlicesDataset((images[:1500], labels[:1500]), ["image", "label"]).batch(50)
validation = NumpySlicesDataset((images[1500:], labels[1500:]), ["image", "label"]).batch(297)

# %% [markdown]
# ## The network
# Eight experts stand in the middle. The router sends each image to two of them.


# %%
class Network(nn.Cell):
    """Pixels [B, 64] -> scores of the ten digits [B, 10]."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Dense(64, 32, activation="relu"), nn.Dense(32, 10)
        self.moe = sw.MoELayer(hidden_size=32, expert_num=8, router="top_k", num_experts_chosen=2, seed=1)

    def construct(self, image):
        hidden = self.first(image)  # [B, 32]
        return self.last(hidden + self.moe(hidden))  # [B, 10]


# %% [markdown]
# ## Training: `sw.MoECallback` does what some routers and float16 need around each step

# %%
network = Network()
model = ms.Model(network, nn.CrossEntropyLoss(), nn.Adam(network.trainable_params(), 1e-2), metrics={"accuracy"})
model.fit(8, train, validation, callbacks=[sw.MoECallback()], dataset_sink_mode=False)

# %% [markdown]
# ## What the router did: the rows that each expert got in the last pass, and the losses

# %%
print(f"accuracy {model.eval(validation, dataset_sink_mode=False)['accuracy']:.3f}")
print("rows of each expert:", network.moe.metrics()["load"].astype(int).tolist())
print("losses:", {name: round(value, 4) for name, value in network.moe.losses.items()})
