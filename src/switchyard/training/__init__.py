"""Trains and evaluates: the compiled step, its schedule, checkpoints, metrics and the loop."""
