"""Reads and writes models as Hugging Face's transformers keeps them: config.json, safetensors, tokenizer files.

Numbers go from file to file piece by piece; nothing here imports MindSpore, torch or transformers.

families    the table of models, with the rules for their tensors
settings    what becomes of config.json
rules       what becomes of a tensor
switch_transformers     the encoder-decoder
pieces      the numbers on their way
importer, exporter, command     both directions, and the command line
"""
