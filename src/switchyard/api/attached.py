"""Attaches the gradient of a loss to a tensor, where nobody can add the loss itself."""

from mindspore import Tensor, nn, ops


class AttachLoss(nn.Cell):
    """Returns a tensor unchanged, and gives a loss its gradient in the backward pass.

    The gradient of the loss is 1, whatever the gradient of the tensor is. So a training step learns as if the loss were
    added to its own.

    Examples:
        >>> attach = AttachLoss()
        >>> def forward(x):
        ...     return attach(2 * x, (x**2).sum())
        >>> gradient = ops.grad(forward)
        >>> gradient(Tensor([3.0])).asnumpy().tolist()  # 2, and 2 * 3 of the loss
        [8.0]
    """

    def construct(self, out: Tensor, loss: Tensor) -> Tensor:
        """Tensor out [...] and loss [] -> out [...]."""
        return out

    def bprop(self, out, loss, result, d_out):
        """The gradients of out and of the loss."""
        return d_out, ops.ones_like(loss)
