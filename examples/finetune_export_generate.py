"""Trains a small text model, fine-tunes it on other text, exports it and generates from the export.

The texts are two modules of Python's own library, so nothing is downloaded.
"""

# %% [markdown]
# ## Training
# A configuration has the sections of a YAML file. `sw.load_config` also reads such a file.

# %%
import statistics
import tempfile
import textwrap
from pathlib import Path

import switchyard as sw

folder = Path(tempfile.mkdtemp(prefix="switchyard-"))
tree = {
    "model": {"num_layers": 1, "hidden_size": 48, "num_heads": 2, "seq_length": 64},
    "moe": {"router": "switch", "expert_num": 4},
    "data": {"path": textwrap.__file__, "batch_size": 8},
    "schedule": {"type": "constant", "learning_rate": 3e-3, "warmup_steps": 10},
    "train": {"name": "story", "output_dir": str(folder), "steps": 40, "eval_every": 0, "checkpoint_every": 0},
}
before = sw.train(sw.load_config(tree))

# %% [markdown]
# ## Fine-tuning
# The run goes on from its checkpoint, on another text. `data.accept_changed` says that this is meant.

# %%
other = [f"data.path={statistics.__file__}", "data.accept_changed=true", "train.steps=80"]
after = sw.train(sw.load_config(tree, other), resume=True)

# %% [markdown]
# ## Export
# The folder holds graphs that run without this package's model code. Its logits are compared with the model's first.

# %%
sw.export(folder / "story", folder / "export", ["export.max_length=64"])

# %% [markdown]
# ## Text, and the model itself
# `sw.generate` takes the export, or a run. `sw.load_checkpoint` gives the network, to look at or to train on.

# %%
text = sw.generate(folder / "export", "def mean(", max_new_tokens=40)
model = sw.load_checkpoint(folder / "story")
print(f"loss {before['validation_loss']:.3f} on the first text, {after['validation_loss']:.3f} on the second")
print(f"{sum(one.size for one in model.get_parameters()):,} weights; generated: {text!r}")
