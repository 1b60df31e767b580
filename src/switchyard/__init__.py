"""Switchyard: conditional computation for MindSpore.

`import switchyard as sw` gives the names of `__all__`. Each is imported at its first use, so that the import itself is
fast and does not import MindSpore.

Examples:
    >>> import switchyard as sw
    >>> config = sw.load_config("config/quickstart.yaml", ["moe.expert_num=4"])
    >>> config.moe.router, config.moe.expert_num
    ('top_k', 4)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `_HOMES` says the same to Python
    from switchyard.api.layer import MoELayer
    from switchyard.api.models import create_model, generate, load_checkpoint, load_config
    from switchyard.api.registry import register
    from switchyard.api.training import MoECallback, set_loss_scale, update_routers
    from switchyard.errors import UserError
    from switchyard.inference.export import export
    from switchyard.moe.dispatch.dispatchers import Dispatcher
    from switchyard.moe.own_experts import Expert
    from switchyard.moe.routing.base import Router
    from switchyard.training.evaluate import evaluate
    from switchyard.training.loop import train

__version__ = "0.2.0"

_HOMES = {  # name -> the module that defines it
    "Dispatcher": "switchyard.moe.dispatch.dispatchers",
    "Expert": "switchyard.moe.own_experts",
    "MoECallback": "switchyard.api.training",
    "MoELayer": "switchyard.api.layer",
    "Router": "switchyard.moe.routing.base",
    "UserError": "switchyard.errors",
    "create_model": "switchyard.api.models",
    "evaluate": "switchyard.training.evaluate",
    "export": "switchyard.inference.export",
    "generate": "switchyard.api.models",
    "load_checkpoint": "switchyard.api.models",
    "load_config": "switchyard.api.models",
    "register": "switchyard.api.registry",
    "set_loss_scale": "switchyard.api.training",
    "train": "switchyard.training.loop",
    "update_routers": "switchyard.api.training",
}

__all__ = [
    "Dispatcher",
    "Expert",
    "MoECallback",
    "MoELayer",
    "Router",
    "UserError",
    "__version__",
    "create_model",
    "evaluate",
    "export",
    "generate",
    "load_checkpoint",
    "load_config",
    "register",
    "set_loss_scale",
    "train",
    "update_routers",
]


def __getattr__(name: str) -> Any:
    """Imports a public name at its first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(_HOMES[name]), name)
    globals()[name] = found  # the next use finds it without this function
    return found


def __dir__() -> list[str]:
    """Returns the public names, imported or not."""
    return sorted({*globals(), *__all__})
