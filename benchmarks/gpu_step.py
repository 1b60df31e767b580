"""Times whole training steps of a configuration on one GPU, at a batch of random tokens.

    python benchmarks/gpu_step.py [--config config/moe_1b_gpu.yaml] [--vocab 32000] [--steps 20] [--short]
                                  [section.key=value ...]

Prints one line of JSON: milliseconds of a step (median and minimum of windows of 4 steps), tokens a second, seconds of
the first step with compiling, and the losses of the first and the last step. `context.fused_operators=false` takes the
compositions for CPU instead of the operators that are fast on a GPU (see nn.fused). --short: 4 steps, of two layers.
"""

import argparse
import statistics
import time

import numpy as np

from switchyard import config as configuration
from switchyard.device import set_context
from switchyard.json_text import to_json
from switchyard.models import create_model
from switchyard.training.step import TrainStep

WINDOW = 4  # steps that are timed together


def batch_of(config, vocab: int) -> tuple[np.ndarray, ...]:
    """Returns random inputs of a step: tokens, labels, valid [A, B, S] and no noise."""
    shape = (config.micro_batches, config.data.batch_size, config.model.seq_length)
    tokens, labels = np.random.default_rng(0).integers(0, vocab, (2, *shape)).astype(np.int32)
    return tokens, labels, np.ones(shape, np.float32), np.zeros((shape[0], 1, 1, 1), np.float32)


def measure(config, vocab: int, steps: int) -> dict:
    """Returns the figures of a configuration."""
    step, batch = TrainStep(create_model(config, vocab), config), batch_of(config, vocab)
    start = time.perf_counter()
    losses, compiled, windows = [step(*batch, 1e-4)["loss"]], time.perf_counter() - start, []
    for window in range(1 + steps // WINDOW):
        start = time.perf_counter()
        losses += [step(*batch, 1e-4)["loss"] for _ in range(WINDOW)]
        windows += [(time.perf_counter() - start) / WINDOW] if window else []  # the first one warms up
    seconds = statistics.median(windows)
    found = {"ms": 1e3 * seconds, "least ms": 1e3 * min(windows), "tokens/s": batch[0].size / seconds}
    found |= {"first step s": compiled, "million parameters": step.size / 1e6}
    return found | {"first loss": losses[0], "last loss": losses[-1]}


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="config/moe_1b_gpu.yaml")
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--short", action="store_true", help="4 steps of the model's first two layers")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    chosen = parser.parse_intermixed_args()
    if chosen.short:
        chosen.steps, chosen.overrides = WINDOW, ["model.num_layers=2", *chosen.overrides]
    config = configuration.load(chosen.config, chosen.overrides)
    set_context(config.context, config.train.seed, config.model.compute_dtype)
    print(to_json({name: round(value, 4) for name, value in measure(config, chosen.vocab, chosen.steps).items()}))


if __name__ == "__main__":
    main()
