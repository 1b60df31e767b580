"""Export to MindIR, and text from an exported directory.

`export` builds the model; `mindir`, `generate`, `sampling` and `manifest` run what it wrote and import no model code.
"""
