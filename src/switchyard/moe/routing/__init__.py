"""WHERE a row goes: routers, found by their YAML name, and the balance of what they decide."""

from switchyard.moe.routing import (  # noqa: F401  (they register their routers)
    assignment,
    cosine,
    decision_tree,
    expert_choice,
    fixed,
    gshard,
    multi_gate,
    noisy,
    sigmoid,
    soft,
    softmax,
    tree,
)
from switchyard.moe.routing.base import Router, RouterSetting, Routing, create_router, known_routers, register

__all__ = ["Router", "RouterSetting", "Routing", "create_router", "known_routers", "register"]
