"""Exports a checkpoint as a folder that transformers loads: config.json, safetensors, tokenizer files."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from switchyard.checkpoint import store
from switchyard.checkpoint.manifest import Manifest, read_manifest, read_texts, write_text
from switchyard.checkpoint.reader import Tensors
from switchyard.checkpoint.tensors import Entry, write_file
from switchyard.config import Config
from switchyard.data.tokenizer import Tokenizer
from switchyard.errors import UserError
from switchyard.file_errors import check_room, writing
from switchyard.files import flush_tree, replace, unfinished
from switchyard.interop.huggingface.families import choose, family_of
from switchyard.interop.huggingface.family import Family
from switchyard.interop.huggingface.floats import FLOATS
from switchyard.interop.huggingface.folder import CONFIG, INDEX, SINGLE, TOKENIZER, Folder
from switchyard.interop.huggingface.origin import Origin, origin_of, read_origin
from switchyard.interop.huggingface.pieces import Exporting, bytes_of
from switchyard.interop.huggingface.tokenizer_files import library_json
from switchyard.json_text import to_json

LARGEST_SHARD = 5_000_000_000  # bytes
TOKENIZER_SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_input_names": ["input_ids", "attention_mask"],  # without token_type_ids, which decoders do not take
}
METADATA = {"format": "pt"}  # what transformers asks a file for


def export_model(
    path: str | Path,
    out: str | Path,
    family: str | None = None,
    dtype: str | None = None,
    like: str | Path | None = None,
    largest: int = LARGEST_SHARD,
    say: Callable[[str], None] = print,
    bar: Any = None,
) -> Family:
    """Writes a checkpoint as a folder of Hugging Face.

    Memory: the largest tensor in the type that it is written in, and pieces of 1 MiB.

    Args:
        path: a run folder (its newest checkpoint) or one checkpoint, of any layout.
        out: the folder to make, which appears in full or not at all.
        family: a model_type; None = that of the import, or the first that fits the configuration.
        dtype: float32, float16 or bfloat16; None = what each tensor had when it was imported, else float32.
        like: a folder of Hugging Face whose texts and types are taken over, as those of an import are.
        largest: bytes of a safetensors file; a larger tensor has a file of its own.
        say: receives lines about what is done.
        bar: a tqdm bar, which counts the bytes written.

    Returns:
        The family.

    Raises:
        UserError: `out` exists; the configuration has what no family has; a number that `dtype` cannot hold.
        DamagedError: a damaged checkpoint. Nothing is written then.

    Examples:
        >>> from switchyard.interop.huggingface.exporter import export_model
        >>> export_model("runs/mixtral", "mixtral_tuned").model_type  # doctest: +SKIP
        'mixtral'
    """
    out = Path(out)
    if out.exists() or out.is_symlink():
        raise UserError(f"--out: '{out}' already exists; remove it or give another folder")
    manifest = read_manifest(store.resolve(path))
    config, tokenizer_json, state = read_texts(manifest)
    origin = read_origin(state, manifest.path) if like is None else _like(like)
    chosen = choose(config, family or _kept_family(origin, config))
    exporting = _exporting(manifest, config, chosen, tokenizer_json, origin, dtype)
    texts = _texts(config, chosen, tokenizer_json, origin, exporting)
    say(f"checkpoint: {manifest.path}")
    say(f"model: {chosen.model_type}, {len(exporting.entries):,} tensors, {bytes_of(exporting.entries) / 1e6:,.1f} MB")
    with writing(out), unfinished(out.absolute()) as folder:
        _write_tensors(folder, exporting, largest, bar)
        for name, text in texts.items():
            write_text(folder / name, text)
        flush_tree(folder)
        replace(folder, out.absolute())
    return chosen


def _like(path: str | Path) -> Origin:
    """Returns what the export takes over from another folder (UserError)."""
    folder = Folder(path)
    folder.open_tensors()
    return Origin.model_validate(origin_of(folder, family_of(folder.config.get("model_type"))))


def _kept_family(origin: Origin | None, config: Config) -> str | None:
    """Returns the family of the import where the configuration still fits it."""
    if origin is None or family_of(origin.model_type).unfit(config) is not None:
        return None
    return origin.model_type


def _exporting(
    manifest: Manifest, config: Config, family: Family, tokenizer_json: str, origin: Origin | None, dtype: str | None
) -> Exporting:
    """Returns the source of the tensors, whose names and shapes are those of the checkpoint (UserError)."""
    vocab_size = Tokenizer.from_json(tokenizer_json, "of the checkpoint").vocab_size
    tensors, kept = Tensors(manifest, "weights"), origin if origin and origin.model_type == family.model_type else None
    model = list(family.parameters(config, vocab_size))
    shapes = {parameter.name: parameter.shape for parameter in model}
    held = {name: entry.shape for name, entry in tensors.entries.items()}
    if any(".lora" in name for name in held):
        merge = f"python -m switchyard.checkpoint merge {manifest.path} --out DIR"
        raise UserError(f"checkpoint '{manifest.path}': holds adapters (train.lora); merge them first: {merge}")
    for name in sorted(shapes.keys() | held.keys()):
        if shapes.get(name) != held.get(name):
            raise UserError(
                f"weight '{name}': {held.get(name, 'missing')} in the checkpoint, {shapes.get(name, 'none')} by "
                f"{family.model_type}; give another --family"
            )
    words = {word: code for code, word in FLOATS.items()}
    usual = words[dtype] if dtype else None

    def dtype_of(name: str) -> str:
        return usual or (kept.dtype_of(name) if kept else "F32")

    return Exporting(tensors, model, dtype_of)


def _texts(
    config: Config, family: Family, tokenizer_json: str, origin: Origin | None, exporting: Exporting
) -> dict[str, str]:
    """Returns name -> text of the files beside the tensors."""
    tokenizer = Tokenizer.from_json(tokenizer_json, "of the checkpoint")
    tree = family.write(config, tokenizer.vocab_size)
    texts: dict[str, str] = {}
    if origin is None:
        tree |= {"bos_token_id": None, "eos_token_id": tokenizer.separator}
        texts["tokenizer_config.json"] = to_json(TOKENIZER_SETTINGS | family.tokenizer_settings, indent=2) + "\n"
    else:
        tree, texts = _kept(tree, family, config, origin), dict(origin.texts)
    usual = Counter(entry.dtype for entry in exporting.entries.values()).most_common(1)[0][0]
    tree["dtype" if "dtype" in tree else "torch_dtype"] = FLOATS[usual]  # transformers writes dtype since 4.56
    return texts | {CONFIG: to_json(tree, indent=2) + "\n", TOKENIZER: library_json(tokenizer_json)}


def _kept(tree: dict[str, Any], family: Family, config: Config, origin: Origin) -> dict[str, Any]:
    """Returns a config.json with what the imported one says besides; that one itself where it means the same."""
    kept, free = origin.config, ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
    if origin.model_type == family.model_type:
        before, _ = family.read(kept)
        if family.facts(before) == family.facts(config) and kept.get("vocab_size") == tree["vocab_size"]:
            no_more = {"num_nextn_predict_layers": 0} if kept.get("num_nextn_predict_layers") else {}  # were left out
            return kept | no_more
    return tree | {key: kept[key] for key in free if key in kept}


def _write_tensors(folder: Path, exporting: Exporting, largest: int, bar: Any) -> None:
    """Writes model.safetensors, or shards of at most `largest` bytes and their index."""
    shards, advance = _shards(exporting.entries, largest), (lambda count: None) if bar is None else bar.update
    if bar is not None:
        bar.reset(bytes_of(exporting.entries))
    check_room(folder / CONFIG, max(map(bytes_of, shards)))
    if len(shards) == 1:
        write_file(folder / SINGLE, shards[0], exporting.read, advance, METADATA)
        return
    places: dict[str, str] = {}
    for number, entries in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, entries, exporting.read, advance, METADATA)
        places |= dict.fromkeys(entries, file)
    index = {"metadata": {"total_size": bytes_of(exporting.entries)}, "weight_map": dict(sorted(places.items()))}
    write_text(folder / INDEX, to_json(index, indent=2) + "\n")


def _shards(entries: dict[str, Entry], largest: int) -> list[dict[str, Entry]]:
    """Divides tensors, in their order, into files of at most `largest` bytes; a larger tensor stands alone."""
    shards: list[dict[str, Entry]] = [{}]
    for name, entry in entries.items():
        if shards[-1] and bytes_of(shards[-1]) + entry.bytes > largest:
            shards.append({})
        shards[-1][name] = entry
    return shards
