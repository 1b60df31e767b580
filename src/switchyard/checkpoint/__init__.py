"""Writes and reads checkpoints: directories that appear in full, and can be read under any parallel layout."""
