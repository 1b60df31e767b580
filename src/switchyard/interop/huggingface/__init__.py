"""Reads and writes models as Hugging Face's transformers keeps them: config.json, safetensors, tokenizer files.

Numbers go from file to file piece by piece; nothing here imports MindSpore, torch or transformers. See `families` for
the models, `rules` for what becomes of a tensor, `settings` for what becomes of config.json.
"""
