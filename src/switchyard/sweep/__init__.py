"""Trains a configuration with every combination of some values, one run after the other, and compares the runs."""
