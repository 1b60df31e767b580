"""A dispatcher of one's own: a row that no expert has a slot for passes through unchanged, instead of becoming zero.

A dispatcher carries rows to the experts that the router chose, and brings them back.
"""

# %% [markdown]
# ## The dispatcher
# `send` fills the slots of the experts; what it returns besides them reaches `receive`. This one extends the shipped
# dispatcher with slots, whose last part says for each choice whether it got one.

# %%
import mindspore as ms
from mindspore import ops

import switchyard as sw
from switchyard.moe.dispatch.dispatchers import SlotDispatcher


@sw.register("pass_through")
class PassThrough(SlotDispatcher):
    """Gives back the row itself where every choice of it was dropped."""

    def __init__(self, moe):
        super().__init__(moe, moe.capacity_factor)

    def send(self, tokens, routing):
        """Tokens [G, N, D] and a Routing -> what SlotDispatcher returns, and the tokens."""
        return (*super().send(tokens, routing), tokens)

    def receive(self, outputs, *plan):
        """Outputs [G, E, C, D] and the rest of what `send` returned -> rows [G * N, D]."""
        kept_mask, tokens = plan[-2], plan[-1]  # [G, N * K], [G, N, D]
        served = kept_mask.reshape(-1, self.choices).amax(-1, True)  # [G * N, 1], 1 where a choice got a slot
        rows = super().receive(outputs, *plan[:-1])
        return rows + tokens.reshape(rows.shape) * (1.0 - served)


# %% [markdown]
# ## What it changes
# 64 rows compete for few slots. The shipped dispatcher returns zero for those that get none.

# %%
ms.set_seed(1)
rows = ops.randn(64, 16)
for dispatcher in (None, "pass_through"):
    layer = sw.MoELayer(16, 4, router="switch", capacity_factor=0.5, dispatcher=dispatcher, seed=1).set_train()
    out = layer(rows)
    zeros = int((out.abs().amax(-1) == 0).sum().asnumpy())
    same = int((out == rows).all(-1).sum().asnumpy())
    share = layer.metrics()["dropped"]
    print(f"dispatcher {dispatcher}: {share:.0%} of the choices dropped; {zeros} rows are zero, {same} unchanged")
