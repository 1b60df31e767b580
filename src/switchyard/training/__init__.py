"""Training room: the compiled step, its schedule, checkpoints, metrics, the loop and evaluation."""
