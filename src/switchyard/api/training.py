"""What a training loop of one's own tells the conditional layers of a network, and hears from them."""

from collections.abc import Iterator
from typing import Any

from mindspore import nn
from mindspore.train import Callback

from switchyard.api.layer import MoELayer
from switchyard.errors import UserError


def layers_of(network: nn.Cell) -> Iterator[MoELayer]:
    """Yields the conditional layers of a network, in the order of construction (UserError: there is none)."""
    found = [cell for _, cell in network.cells_and_names() if isinstance(cell, MoELayer)]
    if not found:
        raise UserError(f"network: {type(network).__name__}; holds no switchyard.MoELayer: give the network that does")
    yield from found


def set_loss_scale(network: nn.Cell, scale: Any) -> None:
    """Tells the conditional layers of a network what its loss is multiplied by.

    The gradient of attached losses must be multiplied by the same number as that of the network's own loss, as float16
    asks for. A dynamic scale changes: call this before each step.

    Args:
        network: holds at least one MoELayer.
        scale: a number, or a Tensor with one, such as `scale_value` of mindspore.amp.DynamicLossScaler, or
            `scale_sense` of nn.TrainOneStepWithLossScaleCell.

    Raises:
        UserError: a network without a MoELayer.

    Examples:
        >>> import switchyard as sw
        >>> layer = sw.MoELayer(hidden_size=8, expert_num=4)
        >>> sw.set_loss_scale(nn.SequentialCell(layer), 1024)
        >>> float(layer.loss_scale.asnumpy())
        1024.0
    """
    for layer in layers_of(network):
        layer.set_loss_scale(scale)


def update_routers(network: nn.Cell) -> None:
    """Moves the biases of routers that balance by one (`sigmoid`): to be called after each optimizer step.

    Routers without a bias stay as they are.

    Args:
        network: holds at least one MoELayer.

    Raises:
        UserError: a network without a MoELayer.

    Examples:
        >>> import mindspore as ms
        >>> import switchyard as sw
        >>> layer = sw.MoELayer(hidden_size=8, expert_num=4, router="sigmoid", seed=1).set_train()
        >>> out = layer(ms.ops.ones((6, 8)))  # equal rows: all choose one expert
        >>> sw.update_routers(layer)
        >>> layer.moe.router.bias.asnumpy().tolist().count(0.0)  # one fell, three rose
        0
    """
    for layer in layers_of(network):
        layer.update_router()


class MoECallback(Callback):
    """Does in mindspore.Model.fit and Model.train what conditional layers need around a step.

    Before each step the layers get the loss scale of the training network, where it has one. After each step the biases
    of balancing routers move, see `update_routers`. With dataset_sink_mode MindSpore calls it once for many steps: set
    it to False.

    Examples:
        >>> import switchyard as sw
        >>> callbacks = [sw.MoECallback()]  # model.fit(epochs, dataset, callbacks=callbacks, dataset_sink_mode=False)
    """

    def on_train_step_begin(self, run_context) -> None:
        """Hands the loss scale to the layers."""
        network = run_context.original_args().train_network
        for _, cell in network.cells_and_names():
            scale = getattr(cell, "scale_sense", getattr(cell, "sens", None))
            if isinstance(cell, nn.TrainOneStepCell) and scale is not None:
                set_loss_scale(network, scale)

    def on_train_step_end(self, run_context) -> None:
        """Moves the biases."""
        update_routers(run_context.original_args().train_network)
