"""Shards the program over devices. Nothing here imports MindSpore: the modules inside do where they must."""
