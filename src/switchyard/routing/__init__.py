"""WHERE a row goes: routers, found by their YAML name, and the balance of what they decide."""

from switchyard.routing import (  # noqa: F401  (register their routers)
    decision_tree,
    expert_choice,
    fixed,
    multi_gate,
    soft,
    softmax,
)
from switchyard.routing.base import Router, RouterSetting, Routing, create_router, known_routers, register

__all__ = ["Router", "RouterSetting", "Routing", "create_router", "known_routers", "register"]
