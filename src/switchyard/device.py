"""The device, the execution mode and the seeds. MindSpore is imported here, not when this module is."""

import ctypes
import glob
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from switchyard.config import ContextConfig
from switchyard.errors import UserError

# bfloat16 on CPU and GPU: MindSpore 2.9 has no kernels for it there (not even Cast)
COMPUTE_DTYPES = {
    "CPU": ("float32", "float16"),
    "GPU": ("float32", "float16"),
    "Ascend": ("float32", "float16", "bfloat16"),
}


def prepare_environment() -> None:
    """Defaults that must stand in the environment before MindSpore is imported; what the user has set, stays.

    GLOG_v=3 leaves only errors of MindSpore's log. MindSpore has its own pool of threads, and OpenMP's beside it costs
    up to a factor of 2 on few cores.
    """
    os.environ.setdefault("GLOG_v", "3")
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def mindspore_folder() -> Path:
    """The installed package's folder, found without importing it (UserError)."""
    spec = importlib.util.find_spec("mindspore")
    if spec is None or spec.origin is None:
        raise UserError("mindspore: not installed; pip install -r requirements.txt")
    return Path(spec.origin).parent


def set_context(
    context: ContextConfig, seed: int = 1, compute_dtype: str = "float32", say: Callable[[str], None] = print
) -> str:
    """Chooses the device, sets mode and seed and says in one line what was chosen.

    Args:
        context: the section of the configuration.
        seed: of MindSpore's own random operators.
        compute_dtype: refused where the device has no kernels for it.
        say: receives the line.

    Returns:
        The device: Ascend, GPU or CPU.

    Raises:
        UserError: NumPy 2, a device that is not there, a type that the device cannot compute.
    """
    if int(np.__version__.split(".")[0]) >= 2:
        raise UserError(f"numpy: {np.__version__}; MindSpore 2.9 needs numpy<2: pip install 'numpy>=1.26,<2'")
    prepare_environment()
    import mindspore as ms

    target = target_of(context)
    if compute_dtype not in COMPUTE_DTYPES[target]:
        allowed = " or ".join(COMPUTE_DTYPES[target])
        raise UserError(f"model.compute_dtype: {compute_dtype}; MindSpore cannot train with it on {target}; {allowed}")
    if context.device_id is not None:
        ms.set_device(target, context.device_id)
    elif ms.get_context("device_target") != target:
        ms.set_device(target)
    ms.set_context(mode=ms.GRAPH_MODE if context.mode == "graph" else ms.PYNATIVE_MODE)
    ms.set_seed(seed)
    chosen = "chosen by auto" if context.device_target == "auto" else "as asked"
    say(f"device: {target} ({chosen}), {context.mode} mode, {compute_dtype}")
    return target


def target_of(context: ContextConfig) -> str:
    """Returns the device that a configuration means here: Ascend, GPU or CPU (UserError: the machine has no such
    device).
    """
    target = context.device_target
    if target == "auto":
        return next((name for name in ("Ascend", "GPU") if has_device(name)), "CPU")
    if not has_device(target):
        raise UserError(
            f"context.device_target: {target}; MindSpore finds no such device on this machine; use auto or CPU"
        )
    return target


def has_device(target: str) -> bool:
    """Returns whether this MindSpore can use an Ascend, GPU or CPU here.

    The machine is looked at first: asking MindSpore for a device that is not there writes warnings.
    """
    if target == "CPU":
        return True
    if not (_ascend_is_present() if target == "Ascend" else _gpu_is_present()):
        return False
    import mindspore as ms

    return bool(getattr(ms.device_context, target.lower()).is_available())


def _ascend_is_present() -> bool:
    return bool(glob.glob("/dev/davinci[0-9]*"))


def _gpu_is_present() -> bool:
    if not glob.glob("/dev/nvidia[0-9]*"):
        return False
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
