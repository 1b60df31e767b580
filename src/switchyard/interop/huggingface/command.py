"""The command line: import, export, and a list of the families or of what becomes of a model's tensors."""

import math
from pathlib import Path

from switchyard import cli
from switchyard.errors import UserError
from switchyard.interop.huggingface.families import FAMILIES
from switchyard.interop.huggingface.floats import FLOATS
from switchyard.interop.huggingface.rules import Parameter

SHOW = {"unit": "B", "unit_scale": True, "desc": "writing", "disable": None, "leave": False}  # None: on a terminal


def create_parser() -> cli.Parser:
    """Returns the parser of the command line."""
    parser = cli.Parser(
        "python -m switchyard.interop.huggingface", description="Imports and exports models of Hugging Face."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("import", help="write a folder of Hugging Face as a run folder")
    command.add_argument("--model", required=True, metavar="DIR", help="a folder with config.json and *.safetensors")
    command.add_argument("--out", required=True, metavar="DIR", help="the new run folder; must not exist")
    command.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json in the place of the folder's")
    command = commands.add_parser("export", help="write a checkpoint as a folder of Hugging Face")
    command.add_argument("--model", required=True, metavar="RUN", help="a run folder, or one checkpoint in it")
    command.add_argument("--out", required=True, metavar="DIR", help="the new folder; must not exist")
    command.add_argument("--family", metavar="NAME", help=f"one of {', '.join(FAMILIES)} (default: one that fits)")
    command.add_argument(
        "--dtype", choices=list(FLOATS.values()), help="type of all tensors (default: that of the import, else float32)"
    )
    command.add_argument("--like", metavar="DIR", help="take tokenizer files, token ids and types from this folder")
    command.add_argument(
        "--shard-gb", type=cli.finite, default=5.0, metavar="N", help="10^9 bytes of a safetensors file (default 5)"
    )
    command = commands.add_parser("list", help="list the families, or what becomes of each tensor of a model")
    command.add_argument("--model", metavar="DIR", help="a folder of Hugging Face, which is checked as by import")
    return parser


def main(arguments: list[str]) -> None:
    """Runs `python -m switchyard.interop.huggingface`; see its --help."""
    chosen = create_parser().parse_args(arguments)
    with cli.cleans_up():
        {"import": _import, "export": _export, "list": _list}[chosen.command](chosen)


def _say(line: str) -> None:
    print(line, flush=True)


def _import(chosen) -> None:
    from tqdm import tqdm

    from switchyard.interop.huggingface.importer import import_model

    with tqdm(**SHOW) as bar:
        import_model(chosen.model, chosen.out, chosen.tokenizer, _say, bar)
    _say(f"run: '{chosen.out}', to evaluate, export, or start a training from")


def _export(chosen) -> None:
    from tqdm import tqdm

    from switchyard.interop.huggingface.exporter import export_model

    if chosen.shard_gb <= 0:
        raise UserError(f"--shard-gb: {chosen.shard_gb:g}; must be above 0")
    largest = math.ceil(chosen.shard_gb * 1e9)
    with tqdm(**SHOW) as bar:
        family = export_model(chosen.model, chosen.out, chosen.family, chosen.dtype, chosen.like, largest, _say, bar)
    _say(f"model: '{chosen.out}', for {family.loader}.from_pretrained")


def _list(chosen) -> None:
    if chosen.model is None:
        for family in FAMILIES.values():
            _say(f"{family.model_type:19}  {family.architecture:42}  {'MoE' if family.sparse else 'dense'}")
        return
    from switchyard.interop.huggingface.importer import Model

    model = Model(Path(chosen.model))
    for parameter in model.parameters:
        _say(line_of(parameter))
    for line in model.lines:
        _say(line)


def line_of(parameter: Parameter) -> str:
    """Returns the line of `list` about one parameter: its name and shape, and what it is made of."""
    sources = parameter.sources
    names = [sources[0].name, f"... {sources[-1].name}"] if len(sources) > 3 else [source.name for source in sources]
    turned = ", transposed" if parameter.turned else ""
    return f"{parameter.name} {list(parameter.shape)} <- {' '.join(names)} {list(sources[0].shape)}{turned}"
