"""The old place of some commands, which stand in `planner` and `simulation` now."""
