"""What a run through MindFormers' Trainer says: lines on the terminal, and metrics.jsonl in the run folder."""

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindspore import Callback

from switchyard.interop.mindformers.model import SwitchyardForCausalLM
from switchyard.moe import metrics
from switchyard.training.loss import STATISTICS, name_figures
from switchyard.training.metrics import MetricsLog, train_figures


@MindFormerRegister.register(MindFormerModuleType.CALLBACK)
class SwitchyardMonitor(Callback):
    """Writes the metrics of steps as `train.py` does, and moves the bias of routers that balance by one.

    On several devices MindFormers' own log has the loss, and this callback has nothing to read: routers that balance by
    a bias are refused there.

    Args:
        folder: where metrics.jsonl is written.
        every: steps between two lines.
    """

    def __init__(self, folder: str, every: int = 20):
        super().__init__()
        self.folder, self.every, self.out = Path(folder), every, sys.__stdout__
        self.network: SwitchyardForCausalLM | None = None
        self.log: MetricsLog | None = None
        self.started = 0.0

    def on_train_begin(self, run_context: Any) -> None:
        """Finds the network, and opens the file."""
        step = run_context.original_args().train_network
        cells = [cell for _, cell in step.cells_and_names() if isinstance(cell, SwitchyardForCausalLM)]
        self.network = cells[0]
        self.config = self.network.config.switchyard
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = MetricsLog(self.folder, layers=self.config.moe_layers)
        routers = [cell.router for _, cell in self.network.cells_and_names() if hasattr(cell, "train_dispatcher")]
        self.routers = routers if any(router.state() for router in routers) else []

    def on_train_step_begin(self, run_context: Any) -> None:
        """Starts the clock."""
        self.started = time.perf_counter()

    def on_train_step_end(self, run_context: Any) -> None:
        """Writes the line of a step where one is due."""
        state = run_context.original_args()
        loss, overflow, scale, rate, norm = state.net_outputs[:5]
        seconds = time.perf_counter() - self.started
        step, row = state.cur_step_num, self.network.figures.asnumpy()
        if self.routers and not bool(overflow.asnumpy()):
            self.move_biases(row)
        if step != 1 and step % self.every:
            return
        figures = name_figures(row[None], self.config, np.ones(1))
        figures |= {"gradient_norm": float(norm.asnumpy().reshape(())) if norm is not None else 0.0}
        tokens = self.config.data.batch_size * self.config.model.seq_length
        line = train_figures(step, figures, float(np.asarray(rate.asnumpy()).reshape(())), tokens / seconds)
        self.log.write(line | {"total_loss": float(np.mean(loss.asnumpy()))})
        print(f"step {step}  loss {figures['loss']:.4f}  learning rate {line['learning_rate']:.2e}", file=self.out)

    def on_train_end(self, run_context: Any) -> None:
        """Closes the file."""
        self.log.close()

    def move_biases(self, row: np.ndarray) -> None:
        """Moves the balancing biases by the load of the step; row [W]."""
        loads = metrics.loads(row[STATISTICS:], self.config.moe.expert_num)  # [M, E]
        for router, load in zip(self.routers, loads):
            router.update(load)
