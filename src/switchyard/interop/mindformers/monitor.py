"""What a run through MindFormers' Trainer says: lines on the terminal, and metrics.jsonl in the run folder."""

import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindformers.tools.utils import get_output_root_path, get_real_rank
from mindspore import Callback

from switchyard.interop.mindformers.model import SwitchyardForCausalLM
from switchyard.moe import metrics
from switchyard.training.loss import STATISTICS, name_figures
from switchyard.training.metrics import MetricsLog, train_figures


@MindFormerRegister.register(MindFormerModuleType.CALLBACK)
class SwitchyardMonitor(Callback):
    """Writes the metrics of steps as `train.py` does, and moves the bias of routers that balance by one.

    Every process needs it where routers balance by a bias; the first alone writes.

    Args:
        folder: where metrics.jsonl is written; None = output_dir of the file.
        every: steps between two lines.
    """

    def __init__(self, folder: str | None = None, every: int = 20):
        super().__init__()
        self.folder, self.every, self.out = Path(folder or get_output_root_path()), every, sys.__stdout__
        self.is_first, self.started = get_real_rank() == 0, 0.0
        self.network: SwitchyardForCausalLM | None = None
        self.log: MetricsLog | None = None

    def on_train_begin(self, run_context: Any) -> None:
        """Finds the network, and opens the file."""
        step = run_context.original_args().train_network
        cells = [cell for _, cell in step.cells_and_names() if isinstance(cell, SwitchyardForCausalLM)]
        self.network = cells[0]
        self.config = self.network.config.switchyard
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = MetricsLog(self.folder, writes=self.is_first, layers=self.config.moe_layers)

    def on_train_step_begin(self, run_context: Any) -> None:
        """Starts the clock."""
        self.started = time.perf_counter()

    def on_train_step_end(self, run_context: Any) -> None:
        """Writes the line of a step where one is due."""
        state = run_context.original_args()
        loss, overflow, _, rate, norm = state.net_outputs[:5]
        seconds = time.perf_counter() - self.started
        step, row = state.cur_step_num, self.network.figures.asnumpy()
        if self.network.routers and not bool(overflow.asnumpy()):
            self.move_biases(row)
        if not self.is_first or (step != 1 and step % self.every):
            return
        figures = name_figures(row[None], self.config, np.ones(1))
        figures["gradient_norm"] = number(norm)
        tokens = self.config.data.batch_size * self.config.model.seq_length
        line = train_figures(step, figures, number(rate), tokens / seconds)
        self.log.write(line | {"total_loss": number(loss)})
        print(f"step {step}  loss {line['loss']:.4f}  lr {line['learning_rate']:.2e}", file=self.out, flush=True)

    def on_train_end(self, run_context: Any) -> None:
        """Closes the file."""
        self.log.close()

    def move_biases(self, row: np.ndarray) -> None:
        """Moves the balancing biases by the load of the step; row [W]."""
        loads = metrics.loads(row[STATISTICS:], self.config.moe.expert_num)  # [M, E]
        for router, load in zip(self.network.routers, loads):
            router.update(load)


def number(value: Any) -> float:
    """Returns the number that a tensor of one element holds; NaN where MindFormers computed none."""
    return math.nan if value is None else float(np.asarray(value.asnumpy()).reshape(-1)[0])
