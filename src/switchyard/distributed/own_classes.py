"""Refuses, where a model is cut over devices, classes of a user's own that would be replaced by their parents there.

Each function is asked before the first layout is made, and raises one line (UserError).
"""

from mindspore import nn

from switchyard.distributed.placement import EXPERT, Degrees, placement
from switchyard.errors import UserError
from switchyard.forms import changed, changes_alone

READERS = ("scores", "logits", "score", "state")  # where a router says which parameters it reads


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


def require_sharded_router(router: nn.Cell, name: str) -> None:
    """Refuses a router that a compiled cluster cannot run as one device does; `name`: as moe.router has it."""
    from switchyard.moe.routing.base import LinearRouter, why_not_sharded

    router = router.routers[0] if hasattr(router, "router_class") else router  # of replica groups
    kind = type(router)
    reason = why_not_sharded(kind)
    if reason is None and "construct" in {*vars(router), *router._cells}:
        reason = "`construct` is set on the object, where a compiled cluster does not look: define it in the class"
    more = [p.name.rsplit(".", 1)[-1] for p in router.get_parameters() if p is not getattr(router, "weight", None)]
    read = any(getattr(kind, method) is not getattr(LinearRouter, method) for method in READERS)
    if reason is None and more and issubclass(kind, LinearRouter) and not read:
        reason = f"its parameter `{more[0]}` is not read in `scores`: read it there, or return it from `state`"
    if reason:
        raise UserError(f"moe.router: {name}; {reason}")


def require_cut_experts(experts: nn.Cell, number: int, dropless: str | None = None) -> None:
    """Refuses experts of a user's own that cannot be cut over devices by the compiler.

    Args:
        experts: of a layer.
        number: E.
        dropless: moe.dispatch, where it reads the parameters and not the experts.
    """
    from switchyard.moe.experts import FeedForwardExperts

    kind = type(experts)
    name = f"{kind.__module__}.{kind.__name__}"
    if not changed(kind, "shard", nn.Cell):
        raise UserError(f"{name}: these experts have no `shard(mesh)`: define it, or train on one device")
    shipped = isinstance(experts, FeedForwardExperts)
    if shipped:
        require_partners(experts, FeedForwardExperts, {"construct": ("shard",), "_work": ("shard",)})
    methods = ("construct", "_work", "gate_hidden", "bend_hidden")
    if dropless and (not shipped or any(changed(kind, method, FeedForwardExperts) for method in methods)):
        raise UserError(f"moe.dispatch: {dropless}; is made of w_in, w_gate and w_out, not of {name}: take 'capacity'")
    require_stacked(experts, number)


def require_stacked(experts: nn.Cell, number: int) -> None:
    """Refuses experts with a parameter stacked on E that `placement`, which goes by names, would leave whole."""
    for parameter in experts.get_parameters():
        shape, last = tuple(parameter.shape), parameter.name.rsplit(".", 1)[-1]
        if number > 1 and shape[:1] == (number,) and EXPERT not in placement(f"experts.{last}", shape, Degrees()):
            raise UserError(
                f"parallel.expert_parallel: '{parameter.name}' {list(shape)} would not be cut by experts; "
                f"name stacked matrices w_in, w_gate or w_out, [E, ., .], or set it to 1"
            )
