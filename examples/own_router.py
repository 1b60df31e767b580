"""A router of one's own, with an option that the configuration checks.

The router is top-k whose scores are divided by a temperature: a hot router spreads its gates, a cold one is sure.
"""

# %% [markdown]
# ## The router
# It extends a shipped router and replaces the hook `logits`. `Options` says which options there are, with their types,
# limits and defaults. A router that extends `sw.Router` itself defines `scores` and `route`.

# %%
import mindspore as ms
from mindspore import ops
from pydantic import PositiveFloat

import switchyard as sw
from switchyard.moe.routing.softmax import TopK


@sw.register("tempered")
class Tempered(TopK):
    """Top-k whose scores are divided by a temperature."""

    class Options(TopK.Options):
        """Adds one option to those of top_k."""

        temperature: PositiveFloat = 1.0

    def __init__(self, setting):
        super().__init__(setting)
        self.temperature = setting.options.temperature

    def logits(self, tokens):
        """Tokens [N, D] -> scores [N, E]."""
        return super().logits(tokens) / self.temperature


# %% [markdown]
# ## Using it
# The layer takes the name and the options. A file for `train.py` says `moe.router: {name: my_file.Tempered, ...}`.

# %%
ms.set_seed(1)
rows = ops.randn(64, 16)
for temperature in (0.01, 1.0, 100.0):
    router = {"name": "tempered", "temperature": temperature}
    layer = sw.MoELayer(hidden_size=16, expert_num=4, router=router, num_experts_chosen=2, seed=1)
    layer(rows)
    print(f"temperature {temperature:>6}: entropy of the router {layer.metrics()['entropy']:.3f} nats")

# %% [markdown]
# ## Wrong options
# The configuration refuses them in one line, here and in YAML.

# %%
try:
    sw.MoELayer(hidden_size=16, expert_num=4, router={"name": "tempered", "temperature": 0})
except sw.UserError as error:
    print(error)
