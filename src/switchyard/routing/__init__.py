"""Forwards to `switchyard.moe.routing`, for routers in files that import this name; it goes with the next release."""

from switchyard.moe.routing import Router, RouterSetting, Routing, create_router, known_routers, register

__all__ = ["Router", "RouterSetting", "Routing", "create_router", "known_routers", "register"]
