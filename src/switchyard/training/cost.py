"""Measures what a run costs: tokens a device, share of the peak (MFU), memory, and where the seconds go.

MFU is the "model FLOPs utilization" of PaLM (arXiv 2204.02311, appendix B): the FLOPs that the model needs for a token,
6 for each active weight of a matrix product and 12 L H Q S for attention, times the tokens a second, divided by the
peak of the device's matrix products. What is computed again or for nothing (recompute, empty slots) does not count.
"""

import math
import resource
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from switchyard.config import Config

SIDE = {"CPU": 1024}  # of the square matrices that measure a device's peak; other devices: LARGE_SIDE
LARGE_SIDE, ROUNDS = 8192, 3
PARTS = ("data", "compute", "saving")


def active_weights(config: Config, shapes: Mapping[str, tuple[int, ...]]) -> float:
    """Returns the weights of matrix products that a token meets: of experts those that it chooses; a table of
    embeddings only where it is the output layer too.

    Args:
        config: experts, choices.
        shapes: name of each parameter -> full shape.
    """
    total = 0.0
    for name, shape in shapes.items():
        parts = name.split(".")
        if len(shape) < 2 or (
            parts[-1] == "table" and not (parts[0] == "embedding" and config.model.tie_word_embeddings)
        ):
            continue
        share = config.moe.num_experts_chosen / config.moe.expert_num if "experts" in parts else 1.0
        total += share * math.prod(shape)
    return total


def flops_of_token(config: Config, shapes: Mapping[str, tuple[int, ...]]) -> float | None:
    """Returns the FLOPs of forward and backward for a token; None for networks other than a text decoder."""
    model = config.model
    if model.type != "decoder":
        return None
    attention = 12.0 * model.num_layers * model.num_heads * model.size_of_head * model.seq_length
    return 6.0 * active_weights(config, shapes) + attention


def measured_peak(compute_dtype: str) -> float:
    """Measures the FLOPs a second of a square matrix product on this device, the best of some.

    A CPU multiplies float32; other devices the type of the run's products.
    """
    import mindspore as ms
    from mindspore import Tensor, ops

    target = ms.get_context("device_target")
    side, kind = SIDE.get(target, LARGE_SIDE), "float32" if target == "CPU" else compute_dtype
    matrix, best = Tensor(np.full((side, side), 0.5, np.float32)).astype(getattr(ms, kind)), math.inf
    for _ in range(ROUNDS + 1):  # the first one makes the kernel
        started = time.perf_counter()
        ops.matmul(matrix, matrix)[0, 0].asnumpy()
        best = min(best, time.perf_counter() - started)
    return 2.0 * side**3 / best


def memory_peak() -> int:
    """Returns the largest number of bytes that were in use so far: of the device's memory, on CPU of the process."""
    import mindspore as ms

    if ms.get_context("device_target") != "CPU":
        return int(ms.runtime.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class CostMeter:
    """Counts the seconds of a run between two lines of its log.

    Args:
        config: `train.peak_tflops` is read.
        shapes: name of each parameter -> full shape.
        devices: of the job.
    """

    def __init__(self, config: Config, shapes: Mapping[str, tuple[int, ...]], devices: int = 1):
        self._flops, self._devices, self._dtype = flops_of_token(config, shapes), devices, config.model.compute_dtype
        self._peak = config.train.peak_tflops and 1e12 * config.train.peak_tflops
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._marks = dict(self.seconds)
        self._waited, self._late, self._steps = 0.0, np.zeros(devices), 0

    def add(self, part: str, seconds: float) -> None:
        """Adds seconds of data, compute or saving."""
        self.seconds[part] += seconds

    def met(self, host_seconds: np.ndarray, waited: float) -> None:
        """Takes the meeting of all ranks after a step.

        Args:
            host_seconds: of each rank between the meeting before and the beginning of its step, [devices].
            waited: seconds that this rank has waited at this meeting.
        """
        self._steps += 1
        self._waited += waited + float(host_seconds.max() - host_seconds.mean())
        self._late += host_seconds - host_seconds.min()

    def figures(self, tokens_per_second: float | None) -> dict[str, Any]:
        """Returns the figures since the last call, for the line of a logged step.

        Args:
            tokens_per_second: of all devices.

        Returns:
            tokens_per_second_device, mfu (a fraction; None where it is unknown), memory_peak in bytes, data_seconds,
            compute_seconds, saving_seconds; of several ranks also wait_seconds, that a step waits for the slowest rank
            on average, and slowest_rank, the one that began its steps last.
        """
        found: dict[str, Any] = {"tokens_per_second_device": None, "mfu": None, "memory_peak": memory_peak()}
        if tokens_per_second is not None:
            found["tokens_per_second_device"] = tokens_per_second / self._devices
            found["mfu"] = self._mfu(tokens_per_second / self._devices)
        for part, seconds in self.seconds.items():
            found[f"{part}_seconds"] = seconds - self._marks[part]
        self._marks = dict(self.seconds)
        if self._devices > 1 and self._steps:
            found |= {"wait_seconds": self._waited / self._steps, "slowest_rank": int(self._late.argmax())}
        self._waited, self._late, self._steps = 0.0, np.zeros(self._devices), 0
        return found

    def _mfu(self, tokens_per_second: float) -> float | None:
        if self._flops is None:
            return None
        self._peak = self._peak or measured_peak(self._dtype)
        return self._flops * tokens_per_second / self._peak


def cost_words(figures: Mapping[str, Any]) -> list[str]:
    """Returns the figures of cost as words of the log."""
    words = []
    if figures.get("mfu") is not None:
        words.append(f"mfu {100 * figures['mfu']:.1f}%")
    words.append(f"memory {figures['memory_peak'] / 1e9:.2f} GB")
    words += [f"{part} {figures[f'{part}_seconds']:.2f} s" for part in PARTS]
    if "wait_seconds" in figures:
        words.append(f"wait {1e3 * figures['wait_seconds']:.0f} ms for rank {figures['slowest_rank']}")
    return words
