"""Command lines: arguments in, one call, an exit code out. Nothing heavy is imported before the arguments are known."""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

from switchyard import config as configuration
from switchyard import files, streams
from switchyard.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_USER_ERROR, Interrupted, UserError

EXIT_KILLED = 130  # Ctrl-C where there was nothing to save: what a shell reports for SIGINT
EXIT_PIPE = 141  # nobody reads stdout any more: what a shell reports for SIGPIPE


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and exit code 2, as all errors of the command lines."""

    def error(self, message: str) -> NoReturn:
        """A bad command line as a UserError, so that it is one line like any other mistake."""
        raise UserError(f"{message}; see {self.prog} --help")


def create_parser(prog: str, description: str) -> Parser:
    """A parser of `prog` that takes `section.key=value` overrides anywhere."""
    parser = Parser(prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="changes one key of the configuration, such as moe.expert_num=16",
    )
    return parser


def run(main: Callable[[list[str]], int | None], arguments: list[str] | None = None) -> int:
    """Calls `main` with the arguments and turns what users and signals do into one line and an exit code."""
    with streams.guarded():
        code = _outcome(main, sys.argv[1:] if arguments is None else arguments)
        unwritten = _outcome(lambda _: sys.stdout.flush(), [])  # now, for Python would complain at its end
        sys.stderr.flush()
        return code or unwritten


def _outcome(main: Callable[[list[str]], int | None], arguments: list[str]) -> int:
    """The exit code of a call; what went wrong is said in one line."""
    try:
        return main(arguments) or EXIT_OK
    except UserError as error:
        return _say(f"error: {error}", EXIT_USER_ERROR)
    except Interrupted as error:
        return _say(f"interrupted: {error}", EXIT_INTERRUPTED)
    except KeyboardInterrupt:
        return _say("interrupted: there was nothing to save", EXIT_KILLED)
    except BrokenPipeError:
        sys.stdout.silence()
        return EXIT_PIPE
    except Exception as error:
        line = files.line_of(error)  # of files that were opened, and of full disks that a library met
        if line is None:
            raise
        if isinstance(error, OSError) and error.filename == streams.STDOUT:
            sys.stdout.silence()
        return _say(f"error: {line}", EXIT_USER_ERROR)


def train_main(arguments: list[str]) -> None:
    """`train.py`: see its --help."""
    parser = create_parser("train.py", "Trains a model and keeps metrics and checkpoints in runs/NAME.")
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file, see config/")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the run train.name")
    parser.add_argument("--print-config", action="store_true", help="show every key and its value, and end")
    chosen = parser.parse_intermixed_args(arguments)
    config = configuration.load(chosen.config, chosen.overrides)
    if chosen.print_config:
        print(config.to_yaml(), end="")
        return
    streams.survive()
    _prepare()
    from switchyard.training.loop import train

    train(config, chosen.resume)


def eval_main(arguments: list[str]) -> None:
    """`eval.py`: see its --help."""
    parser = create_parser("eval.py", "Evaluates a checkpoint over its whole validation set.")
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="a run folder, or one checkpoint in it")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")
    chosen = parser.parse_intermixed_args(arguments)
    _prepare()
    with stdout_to_stderr() as out:
        from tqdm import tqdm

        from switchyard.training.evaluate import evaluate

        with tqdm(unit="batch", disable=None, leave=False) as bar:  # None: only on a terminal

            def show(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            found = evaluate(chosen.checkpoint, chosen.overrides, on_batch=show)
        text = json.dumps(found.to_dict()) if chosen.json else found.to_text()
        out.write(text + "\n")


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator:
    """Everything that is printed meanwhile, by C++ too, goes to stderr; yields a file that is the real stdout."""
    sys.stdout.flush()
    file = os.fdopen(os.dup(1), "w", encoding="utf-8")
    out = streams.Stream(file, streams.STDOUT)
    os.dup2(2, 1)
    try:
        yield out
        out.flush()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os.dup2(file.fileno(), 1)
        with contextlib.suppress(OSError):  # what could not be written has been said
            file.close()


def _prepare() -> None:
    from switchyard.device import prepare_environment

    prepare_environment()


def _say(text: str, code: int) -> int:
    print(" ".join(text.split("\n")), file=sys.stderr, flush=True)
    return code
