"""Makes classes and functions of one's own known, so that a layer or a YAML file can name them."""

from collections.abc import Callable
from typing import Any, TypeVar

from switchyard.errors import UserError, represented
from switchyard.moe.dispatch.dispatchers import DISPATCHERS, Dispatcher
from switchyard.moe.own_experts import EXPERTS, Expert
from switchyard.moe.routing.base import Router, known_routers
from switchyard.moe.routing.base import register as register_router
from switchyard.moe.routing.losses import LOSSES, OWN_LOSSES

Kind = TypeVar("Kind", bound=Callable[..., Any])


def register(name: str) -> Callable[[Kind], Kind]:
    """Decorates a class or a function of one's own, and makes it known under a name.

    A class that extends Router is then found by `moe.router`, one that extends Expert by `moe.experts`, one that
    extends Dispatcher by `moe.dispatcher`; any other function is an auxiliary loss of `moe.losses`. A later one of the
    same kind and name replaces the earlier one. A YAML file for train.py writes `module.Class` instead, which imports
    the module.

    Args:
        name: text without a dot.

    Raises:
        UserError: a name with a dot, or of a loss that is shipped; or something that is none of these.

    Examples:
        >>> import switchyard as sw
        >>> @sw.register("sure")
        ... def sure(routing, valid, choices, length):
        ...     best = routing["probabilities"].amax(-1)  # [G, N]
        ...     return ((1.0 - best) * valid).sum(1)  # [G], a sum over the real rows
        >>> layer = sw.MoELayer(hidden_size=8, expert_num=4, router="top_k", losses={"sure": 0.1})
        >>> layer.config.moe.losses
        {'sure': 0.1}
    """
    if not isinstance(name, str) or not name or "." in name:
        raise UserError(f"register: {represented(name)}; give a name without a dot")

    def add(found: Kind) -> Kind:
        _add(name, found)
        return found

    return add


def _add(name: str, found: Any) -> None:
    """Makes a class or a function known under a name (UserError: it is of no kind that can be)."""
    if isinstance(found, type) and issubclass(found, Router):
        register_router(name)(found)
    elif isinstance(found, type) and issubclass(found, Expert):
        EXPERTS.add(name, found)
    elif isinstance(found, type) and issubclass(found, Dispatcher):
        DISPATCHERS.add(name, found)
    elif isinstance(found, type) or not callable(found):
        raise UserError(
            f"register: {represented(name)}; {represented(found)} extends none of Router, Expert and Dispatcher, and "
            f"is no function"
        )
    elif name in LOSSES and name not in OWN_LOSSES.known:
        raise UserError(f"register: {represented(name)}; a shipped loss has this name: take another one")
    else:
        OWN_LOSSES.add(name, found)


def with_names(keys: dict[str, Any]) -> dict[str, Any]:
    """Returns keys of the section `moe` with names in the place of classes and functions, which become known by them.

    Args:
        keys: `router`, `experts`, `dispatcher`, and the names in `losses`, may be a class or a function.
    """
    found = dict(keys)
    router = found.get("router")
    if isinstance(router, dict) and isinstance(router.get("name"), type):
        found["router"] = {**router, "name": name_of(router["name"])}
    for key in ("router", "experts", "dispatcher"):
        if isinstance(found.get(key), type):
            found[key] = name_of(found[key])
    if isinstance(found.get("losses"), dict):
        losses = found["losses"].items()
        found["losses"] = {name_of(loss) if callable(loss) else loss: weight for loss, weight in losses}
    return found


def name_of(found: Any) -> str:
    """Returns the name of a class or function; one that has none becomes known by its module and its own name."""
    own = getattr(found, "name", None)
    if isinstance(own, str) and known_routers().get(own) is found:
        return own
    name = f"{found.__module__}.{found.__qualname__}"
    _add(name, found)
    return name
