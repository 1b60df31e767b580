"""Configurations, networks, checkpoints and text, by one function each.

Reading a configuration does not import MindSpore.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from switchyard import config as configuration
from switchyard.config import Config

if TYPE_CHECKING:
    from mindspore import nn

Say = Callable[[str], None]


def quiet(line: str) -> None:
    """Says nothing."""


def load_config(path: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file, and checks it as train.py does.

    Args:
        path: of the file; or its content, section -> key -> value.
        overrides: `section.key=value`, of which the last of a key counts.

    Returns:
        The configuration, which does not change: `config.model.hidden_size`, `config.moe.router`, ...

    Raises:
        UserError: a missing file, broken YAML, an unknown key, a wrong value or an impossible combination.

    Examples:
        >>> import switchyard as sw
        >>> config = sw.load_config("config/quickstart.yaml", ["moe.expert_num=16"])
        >>> config.moe.expert_num
        16
        >>> sw.load_config({"moe": {"router": "top_k", "expert_num": 8}}).moe.router
        'top_k'
    """
    if isinstance(path, Mapping):
        return configuration.build(dict(path), overrides)
    return configuration.load(path, overrides)


def create_model(config: Config, vocab_size: int | None = None) -> "nn.Cell":
    """Builds the network that `model.type` names, with initial weights by `train.seed`.

    Args:
        config: see `load_config`.
        vocab_size: entries V of the tokenizer; None = those of data.tokenizer, for which the data is read. A network
            that reads images does not use it.

    Returns:
        A Cell. A decoder maps (tokens [B, S] int32, valid [B, S] float32, noise) to (logits [B * S, V], statistics,
        choices); see models.Decoder and models.Vision. The class of a router of the user's own is imported.

    Raises:
        UserError: what the network cannot do, or data that cannot be read.

    Examples:
        >>> import switchyard as sw
        >>> config = sw.load_config("config/quickstart.yaml", ["model.num_layers=1", "moe.layers=[0]"])
        >>> model = sw.create_model(config, vocab_size=256)
        >>> type(model).__name__, model.vocab_size
        ('Decoder', 256)
    """
    from switchyard import models

    if vocab_size is None and config.reads_text:
        from switchyard.data import load_data

        vocab_size = load_data(config).tokenizer.vocab_size
    return models.create_model(config, vocab_size or 0)


def load_checkpoint(
    path: str | Path, overrides: Sequence[str] = (), trust_code: bool = False, say: Say = quiet
) -> "nn.Cell":
    """Builds the network of a checkpoint, with its weights, for one device.

    Args:
        path: a run folder (its newest checkpoint) or one checkpoint.
        overrides: `section.key=value` that keep the weights' shapes.
        trust_code: whether classes that the checkpoint names, in files of somebody's own, may be imported.
        say: receives lines about what is done.

    Returns:
        A Cell in evaluation, with the attributes `config` and, of text, `tokenizer` (`encode`, `decode`).

    Raises:
        UserError: no checkpoint, a damaged one, or a class that is not trusted.

    Examples:
        >>> import switchyard as sw
        >>> model = sw.load_checkpoint("runs/quickstart")  # doctest: +SKIP
        >>> model.config.moe.expert_num  # doctest: +SKIP
        8
    """
    from switchyard import models
    from switchyard.checkpoint import store
    from switchyard.data import Tokenizer
    from switchyard.training.evaluate_keys import overridden
    from switchyard.trust import check_trusted_section

    held = store.read(path, with_optimizer=False)
    config = overridden(held.config, tuple(overrides))
    check_trusted_section(config.moe, trust_code, say, tuple(overrides))
    tokenizer = Tokenizer.from_json(held.tokenizer_json) if config.reads_text else None
    model = models.create_model(config, tokenizer.vocab_size if tokenizer else 0)
    store.load_weights(model, held.weights)
    model.config, model.tokenizer = config, tokenizer
    return model.set_train(False)


def generate(
    path: str | Path,
    prompt: str | Sequence[str],
    max_new_tokens: int = 200,
    *,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 1,
    key_file: str | Path | None = None,
    trust_code: bool = False,
    say: Say = quiet,
) -> str | list[str]:
    """Continues text with an export, or with a checkpoint, which is exported to a temporary folder first.

    Args:
        path: a folder that export.py made, a run folder (its newest checkpoint) or one checkpoint.
        prompt: the beginning of the text; a list makes one batch.
        max_new_tokens: most tokens of an answer.
        temperature: of sampling; 0 = the most probable token.
        top_k: samples from the K most probable tokens; 0 = all.
        top_p: samples from the most probable tokens of total probability P; 1 = all.
        seed: of the sampling.
        key_file: the key of an encrypted export.
        trust_code: whether classes that a checkpoint names, in files of somebody's own, may be imported.
        say: receives lines about what is done.

    Returns:
        The prompt and its continuation; a list of them for a list of prompts.

    Raises:
        UserError: no export or checkpoint, a damaged one, or a prompt that cannot be continued.

    Examples:
        >>> import switchyard as sw
        >>> sw.generate("runs/quickstart", "def ", 20, temperature=0)  # doctest: +SKIP
        'def __init__(self, name'
    """
    import mindspore as ms

    from switchyard.inference.export import export
    from switchyard.inference.sampling import Sampling

    mode, sampling = ms.get_context("mode"), Sampling(temperature, top_k, top_p, seed)
    try:
        with TemporaryDirectory() as folder:
            if is_checkpoint(Path(path)):
                source, path, key_file = path, Path(folder, "export"), None
                export(source, path, ["export.key_file=null"], say=say, trust_code=trust_code)
            return _continued(path, prompt, max_new_tokens, sampling, key_file, say)
    finally:
        ms.set_context(mode=mode)  # exports are graphs


def is_checkpoint(path: Path) -> bool:
    """Returns whether a folder is a run or a checkpoint, and no export."""
    return (path / "checkpoints").is_dir() or (path / "state.json").exists()


def _continued(path, prompt, max_new_tokens: int, sampling, key_file, say: Say) -> str | list[str]:
    """Continues text with an export, see `generate`."""
    from switchyard.inference import generate as generation
    from switchyard.inference.mindir import open_model

    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    found, _ = generation.generate(open_model(path, key_file, say), prompts, max_new_tokens, sampling)
    texts = [one.prompt + one.text for one in found]
    return texts[0] if isinstance(prompt, str) else texts
