"""A checkpoint becomes a directory that runs without this code: two MindIR graphs, tokenizer, manifest.

The directory appears whole or not at all, and only after its files, loaded again, agreed with the training graph.
"""

from collections.abc import Callable
from pathlib import Path

import mindspore as ms
from mindspore import nn

import switchyard
from switchyard import files
from switchyard.checkpoint import store as checkpoint
from switchyard.checkpoint.adapters import merged
from switchyard.config import Config, ParallelConfig, notes_of_checkpoint
from switchyard.data import load_scored
from switchyard.device import set_context
from switchyard.errors import UserError
from switchyard.inference import manifest as manifests
from switchyard.inference.classify import ClassifierManifest, is_classifier
from switchyard.inference.export_classifier import export_classifier
from switchyard.inference.manifest import DECODE, DECODE_BATCH, ENCODER, PREFILL, Figures, Limits, Manifest, Source
from switchyard.inference.mindir import exported_model
from switchyard.inference.parity import Reference, compare, reference
from switchyard.models import Decoder, Seq2Seq, create_model
from switchyard.models.decode import Decode, has_plain_experts
from switchyard.models.generation import Prefill, cast_products
from switchyard.models.seq2seq_generation import Begin, Continue, Encode
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
    check_trusted_section(config.moe, trust_code, say, overrides)
    for line in notes_of_checkpoint(config, overrides, exports=True):
        say(line)
    field = "--key-file" if key_file is not None else "export.key_file"
    key_file = key_file if key_file is not None else config.export.key_file
    key = None if key_file is None else manifests.read_key(key_file, field, say)
    out = Path(out)
    files.require_text(out, "--out")
    files.settle(out.resolve())
    check_free(out)
    if not config.reads_text:
        return export_classifier(held, config, out, key, say)
    set_context(config.context, config.train.seed, config.model.compute_dtype, say)
    say(f"checkpoint: {held.path}")
    data = load_scored(config, held.tokenizer_json, overrides)
    max_length = longest(config)
    config = inference_config(config)
    decoder = create_model(config, data.tokenizer.vocab_size, length=max_length)
    checkpoint.load_weights(decoder, weights)
    check_causal(config, decoder)
    decoder.set_train(False)
    expected = reference(decoder, data.validation(), max_length, config.train.seed)
    source = Source(
        checkpoint=manifests.checkpoint_name(held.path),
        step=held.step,
        mindspore=ms.__version__,
        switchyard=switchyard.__version__,
    )
    with files.unfinished(out.resolve()) as temporary:
        (temporary / manifests.TOKENIZER).write_text(data.tokenizer.to_json(), encoding="utf-8")
        for name, text in kept_texts(held.state).items():
            (temporary / name).write_text(text, encoding="utf-8")
        graphs = write_graphs(decoder, temporary, max_length, prefill_block(config, max_length), key)
        unchecked = _manifest(config, decoder, graphs, key, source, expected, temporary)
        found = compare(exported_model(temporary, unchecked, key), expected, config.model.compute_dtype)
        written = unchecked.model_copy(update={"parity": found}).signed()
        manifests.publish(temporary, written, out.resolve())
    report(out, written, say)
    return written


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
    if any(out.iterdir()) and not is_classifier(out):
        try:
            manifests.read(out)
        except UserError:
            raise UserError(
                f"--out: '{out}' contains other files; give a new folder, or an export to replace"
            ) from None


def write_graphs(model: nn.Cell, directory: Path, max_length: int, block: int, key: bytes | None) -> dict[str, str]:
    """Writes all graphs with their weights; graph -> the file name that MindSpore chose."""
    cast_products(model)
    int32 = ms.int32

    def anything(*shape: int | None, dtype=int32) -> ms.Tensor:
        return ms.Tensor(shape=list(shape), dtype=dtype)

    tokens, row = anything(None, None), anything(None)
    layers = model.decoder.layers if isinstance(model, Seq2Seq) else model.layers
    caches = [anything(None, model.kv_heads, None, model.head_size, dtype=model.dtype)] * (2 * len(layers))
    if isinstance(model, Seq2Seq):
        seen = anything(len(layers), None, model.kv_heads, None, model.head_size, dtype=model.dtype)
        memory = (seen, seen, row)
        graphs = {
            ENCODER: (Encode(model, max_length, block), tokens, row),
            PREFILL: (Begin(model, max_length, block), tokens, row, *memory),
            DECODE: (Continue(model, max_length), row, row, *memory, *caches),
        }
    else:
        graphs = {
            PREFILL: (Prefill(model, max_length, block), tokens, row),
            DECODE: (Decode(model, max_length), row, row, *caches),
        }
        if model.moe_layers and has_plain_experts(model):
            graphs[DECODE_BATCH] = (Decode(model, max_length, every_expert=True), row, row, *caches)
    with files.plain_path(directory) as name:
        for graph, (cell, *inputs) in graphs.items():
            _write(cell, Path(name) / graph, key, *inputs)
    files.follow_umask(directory)  # MindSpore gives modes of its own
    return {graph: _written_name(directory, graph) for graph in graphs}


def report(out: Path, manifest: Manifest, say: Callable[[str], None]) -> None:
    """Says what was written and how it compared."""
    for name, file in manifest.files.items():
        say(f"{out / name}  {file.bytes / 1e6:,.1f} MB")
    parity = manifest.parity
    say(
        f"parity: largest difference of a logit {parity.max_abs_difference:.1e} (bound {parity.bound:.0e}) at "
        f"{parity.prefill_positions:,} prefill and {parity.decode_positions:,} decode positions of validation text"
    )
    if manifest.model.moe_layers:
        missing = ", ".join(f"{expert} of layer {layer} ({graph})" for layer, expert, graph in parity.not_reached)
        say(f"parity: experts that this text does not reach: {missing}" if missing else "parity: every expert reached")
    both = "a prompt, and of its answer" if ENCODER in manifest.graphs else "prompt and answer"
    say(f"export: '{out}', up to {manifest.limits.max_length} tokens of {both}, any number of prompts")


def _write(cell: nn.Cell, path: Path, key: bytes | None, *inputs: ms.Tensor) -> None:
    options = {"enc_key": key, "enc_mode": manifests.AES_GCM} if key else {}
    cell.set_train(False)
    ms.export(cell, *inputs, file_name=str(path), file_format="MINDIR", **options)


def _written_name(directory: Path, graph: str) -> str:
    """Returns NAME.mindir, or NAME_graph.mindir beside NAME_variables where the weights exceed 1 GB."""
    names = [name for name in (f"{graph}.mindir", f"{graph}_graph.mindir") if (directory / name).exists()]
    return names[0]


def _manifest(
    config: Config,
    decoder: Decoder,
    graphs: dict[str, str],
    key: bytes | None,
    source: Source,
    expected: Reference,
    directory: Path,
) -> Manifest:
    """Returns the manifest without the result of the comparison."""
    model = config.model
    figures = Figures(
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
    max_length = longest(config)
    limits = Limits(
        max_length=max_length,
        prompt_multiple=prefill_block(config, max_length),
        dynamic=("batch", "prompt length", "cache length"),
    )
    return Manifest(
        graphs=graphs,
        encryption=manifests.AES_GCM if key else None,
        model=figures,
        limits=limits,
        parity=None,
        source=source,
        files=manifests.fingerprints(directory),
    )
