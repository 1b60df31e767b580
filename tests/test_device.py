"""The device: what is chosen, what is refused."""

import os

import numpy as np
import pytest

from switchyard import device
from switchyard.config import ContextConfig
from switchyard.errors import UserError


def test_auto_takes_what_is_there_and_says_so(monkeypatch, graph):
    monkeypatch.setattr(device, "has_device", lambda target: target == "CPU")
    said = []
    assert device.set_context(ContextConfig(), say=said.append) == "CPU"
    assert said == ["device: CPU (chosen by auto), graph mode, float32"]


def test_a_machine_without_devices_has_a_cpu(monkeypatch):
    monkeypatch.setattr(device, "_ascend_is_present", lambda: False)
    monkeypatch.setattr(device, "_gpu_is_present", lambda: False)
    assert [device.has_device(target) for target in ("Ascend", "GPU", "CPU")] == [False, False, True]
    with pytest.raises(UserError, match=r"context.device_target: GPU; MindSpore finds no such device on this machine"):
        device.set_context(ContextConfig(device_target="GPU"))


def test_a_type_without_kernels_is_refused():
    with pytest.raises(
        UserError, match=r"model.compute_dtype: bfloat16; MindSpore cannot train with it on CPU; float32 or"
    ):
        device.set_context(ContextConfig(device_target="CPU"), compute_dtype="bfloat16")


def test_numpy_2_is_refused(monkeypatch):
    monkeypatch.setattr(np, "__version__", "2.1.0")
    with pytest.raises(UserError, match=r"numpy: 2.1.0; MindSpore 2.9 needs numpy<2: pip install"):
        device.set_context(ContextConfig(device_target="CPU"))


def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv("GLOG_v", "1")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    device.prepare_environment()
    assert [os.environ[name] for name in ("GLOG_v", "OMP_NUM_THREADS")] == ["1", "1"]
