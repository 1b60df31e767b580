"""Checkpoints: directories that appear whole, and can be read under any parallel layout."""
