"""The command lines train.py, eval.py, export.py and infer.py: arguments in, one call, text out.

Nothing heavy is imported before the arguments are known. No module imports this one.
"""

import sys
from collections.abc import Callable, Sequence

from switchyard import config as configuration
from switchyard import streams
from switchyard.cli import Parser, add_trust_code, cleans_up, create_parser, finite, stdout_to_stderr, whole
from switchyard.distributed.processes import is_first, world_size
from switchyard.errors import UserError
from switchyard.file_errors import writing
from switchyard.json_text import to_json


def announce(config: configuration.Config, overrides: Sequence[str]) -> None:
    """Says on stderr, in the first process of a job, which keys have no effect."""
    from switchyard.device import target_of

    if is_first():
        for line in configuration.notes(config, overrides, target_of(config.context)):
            print(line, file=sys.stderr, flush=True)


def train_main(arguments: list[str]) -> None:
    """`train.py`: see its --help."""
    parser = create_parser("train.py", "Trains a model and keeps metrics and checkpoints in runs/NAME.")
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="a YAML file, or the name of one in config/ such as quickstart"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the run train.name")
    parser.add_argument(
        "--init",
        metavar="RUN",
        help="start a new run from the weights and the tokenizer of a run, or of one checkpoint",
    )
    parser.add_argument(
        "--restarted",
        action="store_true",
        help="go on from the newest checkpoint, or start where there is none yet: for launchers that start a job again",
    )
    parser.add_argument("--print-config", action="store_true", help="show every key and its value, and end")
    chosen = parser.parse_intermixed_args(arguments)
    config = configuration.load(chosen.config, chosen.overrides, devices=world_size())
    if chosen.print_config:
        print(config.to_yaml(), end="")
        return
    streams.survive()
    _prepare()
    announce(config, chosen.overrides)
    from switchyard.training.loop import train

    train(config, chosen.resume, chosen.init, chosen.restarted)


def eval_main(arguments: list[str]) -> None:
    """`eval.py`: see its --help."""
    parser = create_parser(
        "eval.py",
        "Evaluates a checkpoint over its run's validation set. A text that data.path=... names is scored whole, with\n"
        "the checkpoint's own tokenizer; with data.val_fraction=... as well, its validation part. The launch scripts\n"
        "evaluate on several devices: --eval RUN parallel.expert_parallel=8.",
    )
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="a run folder, or one checkpoint in it")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")
    add_trust_code(parser)
    chosen = parser.parse_intermixed_args(arguments)
    _prepare()
    with stdout_to_stderr() as out:
        from tqdm import tqdm

        if world_size() > 1:
            from switchyard.training.evaluate_job import evaluate_in_job as evaluate
        else:
            from switchyard.training.evaluate import evaluate

        with tqdm(unit="batch", disable=None if is_first() else True, leave=False) as bar:  # None: only on a terminal

            def show(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            found = evaluate(chosen.checkpoint, chosen.overrides, on_batch=show, trust_code=chosen.trust_code)
        if found is not None and is_first():
            out.write((to_json(found.to_dict()) if chosen.json else found.to_text()) + "\n")


def export_main(arguments: list[str]) -> None:
    """Runs `export.py`; see its --help."""
    parser = create_parser(
        "export.py",
        "Writes a checkpoint as MindIR, after comparing it with the training graph. The launch scripts export a model\n"
        "whose experts several devices hold: --export RUN --out DIR parallel.expert_parallel=8.",
    )
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="a run folder, or one checkpoint in it")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to make")
    parser.add_argument(
        "--key-file", metavar="FILE", help="16, 24 or 32 raw bytes: encrypts the MindIR files with AES-GCM"
    )
    parser.add_argument(
        "--streamed",
        action="store_true",
        help="copy the weights tensor by tensor, for a model larger than memory; the files are not run and compared",
    )
    add_trust_code(parser)
    chosen = parser.parse_intermixed_args(arguments)
    if chosen.streamed and world_size() > 1:
        raise UserError("--streamed: one process writes it: start export.py by itself")
    _prepare()
    with cleans_up(), writing(chosen.out):  # what a library could not write there
        export = _exporter(chosen.streamed)
        export(chosen.checkpoint, chosen.out, chosen.overrides, chosen.key_file, say, chosen.trust_code)


def _exporter(streamed: bool) -> Callable:
    """Returns what exports: in a job of several processes, tensor by tensor, or with all weights in memory."""
    if world_size() > 1:
        from switchyard.inference.export_job import export_in_job as export
    elif streamed:
        from switchyard.inference.export_streamed import export_streamed as export
    else:
        from switchyard.inference.export import export
    return export


def infer_main(arguments: list[str]) -> None:
    """Runs `infer.py`; see its --help."""
    chosen = _infer_parser().parse_args(arguments)
    given = [chosen.prompt, chosen.prompts_file, chosen.image, chosen.chat or None]
    if given.count(None) != len(given) - 1:
        ways = "--prompt TEXT, --prompts-file FILE, --chat and, for a classifier, --image FILE"
        raise UserError(f"--prompt: give one of {ways}")
    if chosen.system is not None and not chosen.chat:
        raise UserError(f"--system: {chosen.system!r}; only valid with --chat; leave it out")
    for option, value in (("--value-range", chosen.value_range), ("--task", chosen.task)):
        if value is not None and chosen.image is None:
            raise UserError(f"{option}: {value}; only valid with --image FILE of a classifier; leave it out")
    if world_size() > 1 and chosen.prompt is None and chosen.prompts_file is None:
        raise UserError("--prompt: a job of several processes takes --prompt TEXT or --prompts-file FILE")
    _prepare()
    with stdout_to_stderr() as out:
        from switchyard.inference.classify import is_classifier

        if chosen.image is not None:
            _classify(chosen, out)
        elif is_classifier(chosen.model):
            raise UserError(f"--model: '{chosen.model}'; this export takes --image FILE")
        elif chosen.chat:
            _chat(chosen, out)
        else:
            _infer(chosen, out)


def _infer_parser() -> Parser:
    """Returns the parser of `infer.py`."""
    parser = Parser(prog="infer.py", description="Continues text, or classifies images, with an exported model.")
    parser.add_argument("--model", required=True, metavar="DIR", help="a folder that export.py made")
    parser.add_argument("--prompt", metavar="TEXT", help="the beginning of the text")
    parser.add_argument(
        "--prompts-file", metavar="FILE", help="file with one prompt per line, run as one batch (instead of --prompt)"
    )
    parser.add_argument(
        "--chat", action="store_true", help="a conversation by the chat template of the tokenizer: one message a line"
    )
    parser.add_argument("--system", metavar="TEXT", help="with --chat: an instruction before the first message")
    parser.add_argument(
        "--image",
        metavar="FILE",
        help="for a classifier: a picture, or a .npy file of [H, W], [C, H, W] or [N, C, H, W] (channels first)",
    )
    parser.add_argument(
        "--value-range",
        metavar="LOW,HIGH",
        help="the values of --image that mean 0 and 1 (default by type: 0,255 for bytes, 0,1 for floats)",
    )
    parser.add_argument("--task", metavar="TASK", help="for a classifier: the task to answer (default: the first)")
    parser.add_argument(
        "--max-new-tokens",
        type=whole,
        default=200,
        metavar="N",
        help="maximum number of tokens of an answer (default 200)",
    )
    parser.add_argument(
        "--temperature", type=finite, default=0.8, metavar="T", help="sampling temperature; 0 = greedy (default 0.8)"
    )
    parser.add_argument(
        "--top-k",
        type=whole,
        default=0,
        metavar="K",
        help="sample from the K most probable tokens; 0 = all (default 0)",
    )
    parser.add_argument(
        "--top-p",
        type=finite,
        default=1.0,
        metavar="P",
        help="sample from the most probable tokens of total probability P; 1 = all (default 1)",
    )
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="seed of the sampling (default 1)")
    parser.add_argument("--key-file", metavar="FILE", help="the key of an encrypted export")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object; a list with --prompts-file, one object per line with --image",
    )
    return parser


def _classify(chosen, out) -> None:
    from switchyard.config import ContextConfig
    from switchyard.device import set_context
    from switchyard.inference.classify import classify, read
    from switchyard.inference.images import parse_range, read_file
    from switchyard.inference.manifest import key_of

    declared = None if chosen.value_range is None else parse_range(chosen.value_range)
    file, manifest = read_file(chosen.image), read(chosen.model)
    images = file.images(manifest.image, declared, manifest.file_ranges)
    key = key_of(chosen.model, manifest.encryption, chosen.key_file, say)
    if not manifest.batch_independent:
        say(f"note: the router looks at all {manifest.batch} images of a batch, so answers depend on each other")
    set_context(ContextConfig(), say=say)
    for probabilities in classify(chosen.model, images, chosen.task, key):
        best = max(range(len(probabilities)), key=probabilities.__getitem__)
        if chosen.json:
            out.write(to_json({"class": best, "probabilities": probabilities}) + "\n")
        else:
            out.write(f"class {best}  probability {probabilities[best]:.4f}\n")


def _infer(chosen, out) -> None:
    from switchyard.inference.generate import generate, read_prompts, to_dict
    from switchyard.inference.sampling import Sampling
    from switchyard.inference.sharded import open_export, require_alike

    sampling = Sampling(chosen.temperature, chosen.top_k, chosen.top_p, chosen.seed)
    prompts = read_prompts(chosen.prompts_file) if chosen.prompts_file is not None else [chosen.prompt]
    opened = open_export(chosen.model, chosen.key_file, say)
    if opened is None:
        return  # the scheduler of a job
    model, processes = opened
    streaming = chosen.prompts_file is None and not chosen.json
    stream = _stream(out) if processes.is_first else (lambda text: None)
    first = [chosen.prompt]

    def on_text(text: str) -> None:
        if streaming:
            stream(first.pop() + model.between + text if first else text)

    found, timing = generate(model, prompts, chosen.max_new_tokens, sampling, on_text)
    require_alike(found, processes)
    _say_unknown(model.tokenizer, prompts)
    if streaming:
        on_text("\n")
    elif chosen.json:
        objects = [to_dict(one, timing) for one in found]
        stream(to_json(objects if chosen.prompts_file is not None else objects[0]) + "\n")
    else:
        for one in found:
            stream(f"{one.prompt}{model.between}{one.text}\n{'-' * 40}\n")
    _say_timing(found, timing, model.max_length)


def _stream(out) -> Callable[[str], None]:
    """Returns what writes a piece of text at once."""

    def stream(text: str) -> None:
        out.write(text)
        out.flush()

    return stream


def _say_timing(found, timing, max_length: int) -> None:
    """Says which answers reached the end of the model, and how long the batch took."""
    for one in found:
        if one.stopped == "max length":
            say(f"note: stopped after {one.tokens} tokens at the model's max_length ({max_length})")
    say(
        f"prefill: {timing.prompt_tokens} tokens in {timing.prefill_seconds:.3f} s "
        f"({timing.prefill_tokens_per_second:,.0f} tokens/s)  decode: {timing.decode_tokens} tokens in "
        f"{timing.decode_seconds:.3f} s ({timing.tokens_per_second:,.0f} tokens/s)  "
        f"compile: {timing.compile_seconds:.1f} s"
    )


def _chat(chosen, out) -> None:
    from switchyard.inference.chat import NEW, Chat, read_template, talk
    from switchyard.inference.generate import require_positive, to_dict
    from switchyard.inference.mindir import open_model
    from switchyard.inference.sampling import Sampling

    require_positive(chosen.max_new_tokens)
    sampling = Sampling(chosen.temperature, chosen.top_k, chosen.top_p, chosen.seed)
    model = open_model(chosen.model, chosen.key_file, say)
    template = read_template(model.directory, model.manifest, model.tokenizer)
    terminal = sys.stdin.isatty()

    def write(text: str) -> None:
        out.write(text)
        out.flush()

    def end(found, timing) -> None:
        write(to_json(to_dict(found, timing)) + "\n" if chosen.json else "\n")

    def lines():
        while True:
            if terminal:
                print("> ", end="", file=sys.stderr, flush=True)
            if not (line := sys.stdin.readline()):
                return
            yield line

    if terminal:
        say(f"chat: one message a line; {NEW} starts anew, Ctrl-D ends")
    chat = Chat(model, template, chosen.max_new_tokens, sampling, chosen.system or "")
    while True:
        try:
            return talk(chat, lines(), end, (lambda text: None) if chosen.json else write)
        except UserError as error:
            if not terminal:
                raise
            say(f"error: {error}")


def _say_unknown(tokenizer, prompts: list[str]) -> None:
    """Names the prompts whose text is partly outside the vocabulary."""
    from switchyard.data.tokenizer import unknown_note

    for number, prompt in enumerate(prompts, 1):
        if note := unknown_note(tokenizer, tokenizer.encode(prompt)):
            say(f"note: prompt {number}{note}")


def say(text: str) -> None:
    """Prints a line for the user on stderr, in the first process of a job; stdout is for text and JSON."""
    if is_first():
        print(text, file=sys.stderr, flush=True)


def _prepare() -> None:
    from switchyard.device import prepare_environment

    prepare_environment()
