"""Refuses a user's own classes that would be replaced by their parents where a model is sharded over devices.

Each function is asked before the first layout is made, and raises one line (UserError).
"""

from mindspore import nn

from switchyard.distributed.placement import EXPERT, ParallelDims, axes_of, optimizer_cut
from switchyard.errors import UserError
from switchyard.forms import changed, changes_alone
from switchyard.moe.experts import FeedForwardExperts


def require_partners(cell: nn.Cell, root: type, partners: dict[str, tuple[str, ...]]) -> None:
    """Refuses a cell whose class changes a method of `root` that a compiled cluster does not call, and not the one that
    it does. `partners`: what one device calls -> what a cluster calls in its place."""
    name = f"{type(cell).__module__}.{type(cell).__name__}"
    if not isinstance(cell, root):
        raise UserError(f"{name}: extends no {root.__name__}, which a compiled cluster asks for: train on one device")
    for method, others in partners.items():
        if changes_alone(type(cell), method, others, root):
            raise UserError(
                f"{name}: changes `{method}` of {root.__name__} and not `{others[0]}`, which a compiled cluster calls "
                f"in its place: define `{others[0]}`, or train on one device"
            )


def require_joined(experts: nn.Cell, degrees: ParallelDims) -> None:
    """Refuses experts whose own `shard` does not put matrices together that ZeRO cuts along axis 1 (UserError)."""
    kind = type(experts)
    if isinstance(experts, FeedForwardExperts) and kind.__module__.startswith("switchyard."):
        return
    if isinstance(experts, FeedForwardExperts) and not changed(kind, "shard", FeedForwardExperts):
        return
    for parameter in experts.get_parameters():
        axis, _ = optimizer_cut(parameter.shape, axes_of(parameter.name, len(parameter.shape)), degrees)
        if axis == 1:
            raise UserError(
                f"parallel.optimizer_shard: {degrees.optimizer_shard}; '{parameter.name}' {list(parameter.shape)} "
                f"would be cut along axis 1, which `shard` of {kind.__module__}.{kind.__name__} does not know: set it "
                "to 0"
            )


def require_cut_experts(experts: nn.Cell, number: int, dropless: str | None = None) -> None:
    """Refuses experts of a user's own that cannot be sharded over devices by the compiler.

    Args:
        experts: of a layer.
        number: E.
        dropless: moe.dispatch, where it reads the parameters and not the experts.
    """
    kind = type(experts)
    name = f"{kind.__module__}.{kind.__name__}"
    if not changed(kind, "shard", nn.Cell):
        raise UserError(f"{name}: these experts have no `shard(mesh)`: define it, or train on one device")
    if isinstance(experts, FeedForwardExperts):
        require_partners(experts, FeedForwardExperts, {"construct": ("shard",), "_work": ("shard",)})
    if dropless and not are_matrices(experts):
        raise UserError(f"moe.dispatch: {dropless}; is made of w_in, w_gate and w_out, not of {name}: take 'capacity'")
    require_stacked(experts, number)


def are_matrices(experts: nn.Cell) -> bool:
    """Returns whether what experts compute is all in w_in, w_gate and w_out, as of FeedForwardExperts."""
    methods = ("construct", "_work", "gate_hidden", "bend_hidden")
    return isinstance(experts, FeedForwardExperts) and not any(
        changed(type(experts), method, FeedForwardExperts) for method in methods
    )


def require_stacked(experts: nn.Cell, number: int) -> None:
    """Refuses experts with a parameter stacked on E that `axes_of`, which goes by names, would leave whole."""
    for parameter in experts.get_parameters():
        shape, last = tuple(parameter.shape), parameter.name.rsplit(".", 1)[-1]
        if number > 1 and shape[:1] == (number,) and EXPERT not in axes_of(f"experts.{last}", len(shape)):
            raise UserError(
                f"parallel.expert_parallel: '{parameter.name}' {list(shape)} would not be sharded by experts; "
                f"name stacked matrices w_in, w_gate or w_out, [E, ., .], or set it to 1"
            )
