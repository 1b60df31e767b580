"""Makes tables and pictures from the files of a run. Nothing here imports MindSpore."""
