"""What a run looked like: tables and pictures made from its files. Nothing here imports MindSpore."""
