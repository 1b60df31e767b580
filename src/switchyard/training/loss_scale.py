"""Keeps the dynamic loss scale of float16 on the host."""

import numpy as np

from switchyard.checkpoint.store import check_arrays
from switchyard.config import Config

GROWTH_INTERVAL = 2000  # good steps before the loss scale doubles, as torch.amp.GradScaler
MAX_LOSS_SCALE = 2.0**24


class LossScale:
    """Halves after a step that is not finite, doubles after GROWTH_INTERVAL good ones; 1 without float16."""

    def __init__(self, config: Config):
        self.used = config.model.compute_dtype == "float16"
        self.value, self.good_steps = config.train.init_loss_scale, 0

    @property
    def factor(self) -> float:
        """Returns what the loss is multiplied by."""
        return self.value if self.used else 1.0

    def adjust(self, alive: bool) -> None:
        """Changes the scale after a step; `alive`: its gradients were finite."""
        if not self.used:
            return
        self.good_steps = self.good_steps + 1 if alive else 0
        if not alive:
            self.value = max(self.value / 2, 1.0)
        elif self.good_steps >= GROWTH_INTERVAL:
            self.value, self.good_steps = min(self.value * 2, MAX_LOSS_SCALE), 0

    def state(self) -> dict[str, np.ndarray]:
        """Returns what a checkpoint holds of the scale."""
        return {
            "loss_scale": np.array(self.value, np.float32),
            "good_steps": np.array(self.good_steps, np.int32),
        }

    def load(self, arrays: dict[str, np.ndarray]) -> None:
        """Sets what `state` returned, strictly by name and shape (UserError)."""
        check_arrays({name: array.shape for name, array in self.state().items()}, arrays, "optimizer state")
        self.value, self.good_steps = float(arrays["loss_scale"]), int(arrays["good_steps"])
