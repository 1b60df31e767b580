"""Holds parameters back from training: those that train.freeze names, and with adapters the weights below them."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from mindspore import nn

from switchyard.checkpoint.adapters import is_adapter
from switchyard.config import Config
from switchyard.errors import UserError, shortened

MOST_NAMES = 4  # of parameters, in a message


def freeze(model: nn.Cell, config: Config) -> None:
    """Switches off the gradient of the parameters that a configuration does not train.

    The optimizer then holds no moments of them, and the norm of the gradients does not count them.

    Args:
        model: of the configuration.
        config: train.freeze and train.lora are read.

    Raises:
        UserError: a pattern that matches no parameter, or no parameter that is left to train.
    """
    names = [parameter.name for parameter in model.get_parameters()]
    for pattern in config.train.freeze:
        if not any(fnmatchcase(name, pattern) for name in names):
            some = ", ".join(names[:: max(1, len(names) // MOST_NAMES)][:MOST_NAMES])
            raise UserError(f"train.freeze: {shortened(pattern)}; matches no parameter; names are like {some}")
    for parameter in model.trainable_params():
        if not is_trained(parameter.name, config):
            parameter.requires_grad = False
    if not model.trainable_params():
        raise UserError(
            f"train.freeze: {shortened(config.train.freeze)}; leaves no parameter to train; remove a pattern"
        )


def is_trained(name: str, config: Config) -> bool:
    """Returns whether a parameter is trained, if it can be: with adapters, those and perhaps the routers."""
    lora = config.train.lora
    below = lora is not None and not is_adapter(name) and not ("router" in lora.targets and ".router." in name)
    return not below and not is_frozen(name, config.train.freeze)


def is_frozen(name: str, patterns: Sequence[str]) -> bool:
    """Returns whether one of the patterns matches the name of a parameter: * any characters, ? one, [ab] one of."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)
