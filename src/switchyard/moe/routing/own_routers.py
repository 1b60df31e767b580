"""Refuses, on a compiled cluster, routers of a user's own that it cannot run as one device does."""

from mindspore import nn

from switchyard.errors import UserError
from switchyard.moe.routing.base import LinearRouter, why_not_sharded

READERS = ("scores", "logits", "score", "state")  # where a router says which parameters it reads


def require_sharded_router(router: nn.Cell, name: str) -> None:
    """Refuses a router that a compiled cluster cannot run as one device does; `name`: as moe.router has it."""
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
