"""A checkpoint becomes a directory that runs without this code: two MindIR graphs, tokenizer, manifest.

The directory appears whole or not at all, and only after its files, loaded again, agreed with the training graph.
"""

import math
from collections.abc import Callable
from pathlib import Path

import mindspore as ms
from mindspore import nn

import switchyard
from switchyard import files
from switchyard.checkpoint import store as checkpoint
from switchyard.checkpoint.adapters import merged
from switchyard.config import Config, ParallelConfig, notes_of_checkpoint
from switchyard.data import EvalBatches, load_scored
from switchyard.device import set_context
from switchyard.distributed.expert_shard import ExpertShard
from switchyard.distributed.processes import require_one_device
from switchyard.errors import UserError
from switchyard.inference import manifest as manifests
from switchyard.inference.classify import ClassifierManifest, is_classifier
from switchyard.inference.export_classifier import export_classifier
from switchyard.inference.export_graphs import PARTS, of_one_shape, write_graphs
from switchyard.inference.manifest import ENCODER, Figures, Limits, Manifest, Parity, Source
from switchyard.inference.mindir import exported_model
from switchyard.inference.parity import Reference, compare, reference
from switchyard.inference.sharded import is_sharded
from switchyard.models import Decoder, create_model
from switchyard.moe.dispatch.plan import block_size
from switchyard.training.companions import kept_texts
from switchyard.training.evaluate_keys import overridden
from switchyard.trust import check_trusted_section


def export(
    path: str | Path,
    out: str | Path,
    overrides: list[str] | tuple[str, ...] = (),
    key_file: str | Path | None = None,
    say: Callable[[str], None] = print,
    trust_code: bool = False,
) -> Manifest | ClassifierManifest:
    """Exports a checkpoint; one of a network that reads images as `inference.classify` has it.

    Args:
        path: a run folder (its newest checkpoint) or one checkpoint.
        out: the directory to make; an earlier export there is replaced when the new one is whole.
        overrides: `section.key=value`, such as export.max_length=512 or data.path=... for the comparison.
        key_file: file with the AES-GCM key; None = export.key_file of the configuration.
        say: receives lines about what is done.
        trust_code: whether a router in a file of somebody's own, which the checkpoint names, may be imported.

    Returns:
        The manifest that was written.

    Raises:
        UserError: a damaged checkpoint, a directory that is something else, a bad key, an override that would change
            the weights' shapes, a router that is not trusted, or logits that differ. Nothing is written then.

    Examples:
        >>> import switchyard as sw
        >>> manifest = sw.export("runs/quickstart", "exported")  # doctest: +SKIP
        >>> manifest.limits.max_length  # doctest: +SKIP
        192
    """
    held = checkpoint.read(path, with_optimizer=False)
    config, weights = merged(overridden(held.config, overrides), held.weights)
    announce(config, overrides, say, trust_code)
    require_one_device(config)
    key = key_to_write(config, key_file, say)
    out = place_of(out)
    if not config.reads_text:
        return export_classifier(held, config, out, key, say)
    set_context(config.context, config.train.seed, config.model.compute_dtype, say)
    say(f"checkpoint: {held.path}")
    data = load_scored(config, held.tokenizer_json, overrides)
    config, length = inference_config(config), longest(config)
    decoder = create_model(config, data.tokenizer.vocab_size, length=length)
    checkpoint.load_weights(decoder, weights)
    expected = expected_of(config, decoder, data.validation(), length)
    texts = {manifests.TOKENIZER: data.tokenizer.to_json(), **kept_texts(held.state)}
    with files.unfinished(out) as temporary:
        written = write_compared(config, decoder, temporary, texts, key, expected, source_of(held.path, held.step))
        manifests.publish(temporary, written, out)
    report(out, written, say)
    return written


def announce(config: Config, overrides, say: Callable[[str], None], trust_code: bool) -> None:
    """Refuses code that the user does not trust (UserError), and says which keys have no effect."""
    check_trusted_section(config.moe, trust_code, say, overrides)
    for line in notes_of_checkpoint(config, overrides, exports=True):
        say(line)


def key_to_write(config: Config, key_file: str | Path | None, say: Callable[[str], None]) -> bytes | None:
    """Returns the key that --key-file, or else export.key_file, names (UserError); None: nothing is encrypted."""
    field = "--key-file" if key_file is not None else "export.key_file"
    key_file = key_file if key_file is not None else config.export.key_file
    return None if key_file is None else manifests.read_key(key_file, field, say)


def place_of(out: str | Path) -> Path:
    """Returns the absolute path of --out, where an export may be written (UserError)."""
    files.require_text(Path(out), "--out")
    files.settle(Path(out).resolve())
    check_free(Path(out))
    return Path(out).resolve()


def expected_of(config: Config, decoder: nn.Cell, validation: EvalBatches, length: int) -> Reference:
    """Runs the training graph on validation text (UserError: a router that text cannot be generated with)."""
    check_causal(config, decoder)
    decoder.set_train(False)
    return reference(decoder, validation, length, config.train.seed)


def write_compared(
    config: Config,
    decoder: nn.Cell,
    folder: Path,
    texts: dict[str, str],
    key: bytes | None,
    expected: Reference,
    source: Source,
    kind: type[Manifest] = Manifest,
    shard: ExpertShard | None = None,
    **more,
) -> Manifest:
    """Writes the files of an export, loads them again and compares.

    Args:
        config: see `inference_config`.
        decoder: with its weights, or those of this process's experts.
        folder: an empty folder.
        texts: file name -> text, such as the tokenizer.
        key: encrypts the graphs.
        expected: what the files must compute.
        source: the origin of the weights.
        kind: class of the manifest, which has `more` fields.
        shard: the experts that this process of a job holds; None: all.

    Returns:
        The manifest, which is not written yet.

    Raises:
        UserError: logits that differ.
    """
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    length = longest(config)
    graphs = write_graphs(decoder, folder, length, prefill_block(config, length), key, shard)
    more |= {"encryption": manifests.AES_GCM if key else None, "source": source, "parity": None}
    figures, limits = figures_of(config, decoder), limits_of(config, of_one_shape(decoder, shard))
    unchecked = kind(graphs=graphs, model=figures, limits=limits, files=manifests.fingerprints(folder), **more)
    found = compare(exported_model(folder, unchecked, key), expected, config.model.compute_dtype)
    return unchecked.model_copy(update={"parity": found}).signed()


def source_of(path: Path, step: int) -> Source:
    """Returns the origin of the weights of a checkpoint."""
    return Source(
        checkpoint=manifests.checkpoint_name(path),
        step=step,
        mindspore=ms.__version__,
        switchyard=switchyard.__version__,
    )


def inference_config(config: Config) -> Config:
    """Returns the configuration of generation: one device, one group, no drops, operators that every device has."""
    moe = config.moe.model_copy(update={"groups": 1, "eval_capacity_factor": None})
    context = config.context.model_copy(update={"fused_operators": False})
    return config.model_copy(update={"moe": moe, "parallel": ParallelConfig(), "context": context})


def longest(config: Config) -> int:
    """Returns the tokens of the longest prompt and answer; of an encoder-decoder of the longest of each (UserError)."""
    if config.model.type != "seq2seq":
        return config.export.max_length or config.model.seq_length
    least = max(config.model.seq_length, config.target_length)
    if config.export.max_length is not None and config.export.max_length < least:
        raise UserError(
            f"export.max_length: {config.export.max_length}; at least {least}, the longest sequence of the training"
        )
    return config.export.max_length or least


def prefill_block(config: Config, max_length: int) -> int:
    """Returns the rows of an expert's block in prefill: enough for one prompt of full length, at most 32, which keeps
    short prompts fast.
    """
    moe = config.moe
    if not config.moe_layers:
        return 1
    return moe.dropless_block_size or min(32, block_size(max_length, moe.expert_num, moe.choices))


def check_causal(config: Config, decoder: Decoder) -> None:
    """Refuses routers with which a token's output depends on later tokens or on other sequences (UserError)."""
    if config.granularity == "slice" and config.moe_layers:
        raise UserError(
            "moe.granularity: slice; the first token of a window chooses its expert, which "
            "generation token by token cannot do: export a model with moe.granularity 'token'"
        )
    first = len(decoder.encoder.layers) if config.model.type == "seq2seq" else 0  # layer that generates
    for index, layer in enumerate(decoder.layers):
        if not layer.conditional:
            continue
        router = layer.feed_forward.router
        if not (router.batch_independent and (router.causal or index < first)):
            raise UserError(
                f"moe.router: {config.moe.router}; it looks at later tokens or other sequences, so text cannot be "
                "generated token by token: export a model with another router"
            )


def check_free(out: Path) -> None:
    """Refuses a place that holds something else than an earlier export (UserError)."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"--out: '{out}' is a file; give a folder to create")
    if any(out.iterdir()) and not (is_classifier(out) or is_sharded(out)):
        try:
            manifests.read(out)
        except UserError:
            raise UserError(
                f"--out: '{out}' contains other files; give a new folder, or an export to replace"
            ) from None


def report(out: Path, manifest: Manifest, say: Callable[[str], None]) -> None:
    """Says what was written and how it compared."""
    for name, file in manifest.files.items():
        say(f"{out / name}  {file.bytes / 1e6:,.1f} MB")
    parity = manifest.parity
    say(compared(parity))
    if manifest.model.moe_layers:
        missing = ", ".join(f"{expert} of layer {layer} ({graph})" for layer, expert, graph in parity.not_reached)
        say(f"parity: experts that this text does not reach: {missing}" if missing else "parity: every expert reached")
    both = "a prompt, and of its answer" if ENCODER in manifest.graphs else "prompt and answer"
    say(f"export: '{out}', up to {manifest.limits.max_length} tokens of {both}, any number of prompts")


def compared(parity: Parity) -> str:
    """Returns the line about a comparison."""
    return (
        f"parity: largest difference of a logit {parity.max_abs_difference:.1e} (bound {parity.bound:.0e}) at "
        f"{parity.prefill_positions:,} prefill and {parity.decode_positions:,} decode positions of validation text"
    )


def figures_of(config: Config, decoder: nn.Cell) -> Figures:
    """Returns the sizes of a model."""
    model = config.model
    return Figures(
        vocab_size=decoder.vocab_size,
        num_layers=config.stacks[-1].model.num_layers,
        hidden_size=model.hidden_size,
        num_heads=model.num_heads,
        n_kv_heads=decoder.kv_heads,
        head_size=decoder.head_size,
        expert_num=config.moe.expert_num,
        num_experts_chosen=config.moe.num_experts_chosen,
        moe_layers=config.moe_layers,
        parameters=sum(parameter.size for parameter in decoder.get_parameters()),
        compute_dtype=model.compute_dtype,
    )


def limits_of(config: Config, one_shape: tuple[str, ...] = ()) -> Limits:
    """Returns the limits of the inputs of the graphs; `one_shape`: see Limits."""
    length = longest(config)
    return Limits(
        max_length=length,
        prompt_multiple=math.lcm(prefill_block(config, length), 1 if config.model.type == "seq2seq" else PARTS),
        dynamic=("batch", "prompt length", "cache length"),
        one_shape=one_shape,
    )
