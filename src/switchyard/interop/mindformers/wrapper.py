"""The training wrapper for devices where MindFormers' own does not compile."""

import mindspore as ms
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindformers.wrapper import MFTrainOneStepCell
from mindspore import Tensor, ops
from mindspore import dtype as mstype


@MindFormerRegister.register(MindFormerModuleType.WRAPPER)
class SwitchyardTrainOneStepCell(MFTrainOneStepCell):
    """Is `MFTrainOneStepCell` with an overflow check that any device can do.

    The check of MindFormers 1.9 reads the status register of an Ascend 910A wherever it does not find another Ascend,
    so that a CPU stops with "Unsupported op [NPUGetFloatStatusV2]". On Ascend this class is the same as its parent.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.asks_device = ms.get_context("device_target") == "Ascend"

    def start_overflow_check(self, pre_cond, compute_input):
        """Clears the status of the device, where it has one."""
        if self.asks_device:
            return super().start_overflow_check(pre_cond, compute_input)
        return pre_cond, compute_input

    def get_overflow_status(self, status, compute_output) -> Tensor:
        """Returns whether a gradient is not finite: [] bool."""
        if self.asks_device:
            return super().get_overflow_status(status, compute_output)
        total = 0.0
        for gradient in compute_output:
            total = total + gradient.astype(mstype.float32).sum()  # infinite or NaN where an addend is
        return ops.logical_not(ops.isfinite(total))
