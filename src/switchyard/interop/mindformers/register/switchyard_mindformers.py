"""Names what `auto_register: switchyard_mindformers.CLASS` finds; MindFormers reads this file by REGISTER_PATH."""

from switchyard.interop.mindformers.data_loader import SwitchyardDataLoader
from switchyard.interop.mindformers.model import SwitchyardConfig, SwitchyardForCausalLM
from switchyard.interop.mindformers.monitor import SwitchyardMonitor
from switchyard.interop.mindformers.wrapper import SwitchyardTrainOneStepCell

__all__ = [
    "SwitchyardConfig",
    "SwitchyardDataLoader",
    "SwitchyardForCausalLM",
    "SwitchyardMonitor",
    "SwitchyardTrainOneStepCell",
]
