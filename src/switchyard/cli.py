"""What command lines are made of: parsers, one-line errors, signals and exit codes. The commands stand elsewhere."""

import argparse
import contextlib
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

from switchyard import file_errors, streams
from switchyard.config.sections import LARGEST
from switchyard.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_USER_ERROR, Interrupted, UserError, represented, shortened

EXIT_KILLED = 130  # Ctrl-C where there was nothing to save: what a shell reports for SIGINT
OUT_OF_MEMORY = (  # as MindSpore's compiled side says it, on a CPU and on devices
    "allocate memory failed",
    "memory isn't enough",
    "memory not enough",
    "out of memory",
    "std::bad_alloc",
)
EXIT_PIPE = 141  # nobody reads stdout any more: what a shell reports for SIGPIPE


class Parser(argparse.ArgumentParser):
    """Parses arguments; an error is one line and exit code 2, as all errors of the command lines."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError for a bad command line, so that it is one line like any other mistake."""
        raise UserError(f"{shortened(message, 300)}; see {self.prog} --help")

    def parse_known_args(self, args=None, namespace=None):
        """Refuses `--option=--`, which argparse takes for the end of the options and then misses a value."""
        for argument in sys.argv[1:] if args is None else args:
            if argument == "--":
                break
            if argument.startswith("-") and argument.endswith("=--"):
                self.error(f"argument {argument[:-3]}: '--' is not a value")
        return super().parse_known_args(args, namespace)


def whole(text: str) -> int:
    """Parses an integer argument within the range of MindSpore and NumPy (ArgumentTypeError)."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid int value: {represented(text)}") from None
    if abs(number) > LARGEST:
        raise argparse.ArgumentTypeError(f"{shortened(text)}; at most {LARGEST}")
    return number


def finite(text: str) -> float:
    """Parses a number that is neither infinite nor NaN (ArgumentTypeError)."""
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid float value: {represented(text)}") from None
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{shortened(text)}; a finite number")
    return number


def create_parser(prog: str, description: str) -> Parser:
    """Returns a parser of `prog` that takes `section.key=value` overrides anywhere."""
    parser = Parser(prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="changes one key of the configuration, such as moe.expert_num=16",
    )
    return parser


def add_trust_code(parser: argparse.ArgumentParser) -> None:
    """Adds --trust-code, the consent to import a module that a checkpoint names."""
    parser.add_argument(
        "--trust-code",
        action="store_true",
        help="import the module of a router that the checkpoint names, which runs it",
    )


@contextlib.contextmanager
def cleans_up() -> Iterator[None]:
    """Handles SIGTERM and SIGHUP as Ctrl-C, so that temporary files are removed at once.

    A signal that is ignored, as nohup does with SIGHUP, stays ignored. Not for commands with handlers of their own.
    """

    def interrupt(_number: int, _frame: object) -> NoReturn:
        raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():  # Python sets handlers nowhere else
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def say_moved(old: str, new: str) -> None:
    """Prints, on stderr, that a command has a new name."""
    print(f"python -m {old} is now python -m {new}; the next release removes the old name", file=sys.stderr)


def run(main: Callable[[list[str]], int | None], arguments: list[str] | None = None) -> int:
    """Calls `main` with the arguments and turns what users and signals do into one line and an exit code."""
    with streams.guarded():
        escape_characters()
        code = _outcome(main, sys.argv[1:] if arguments is None else arguments)
        unwritten = _outcome(lambda _: sys.stdout.flush(), [])  # now, for Python would complain at its end
        try:
            sys.stderr.flush()
        except OSError:
            sys.stderr.silence()
        return code or unwritten


def _outcome(main: Callable[[list[str]], int | None], arguments: list[str]) -> int:
    """Calls a function and returns the exit code; an error is printed in one line."""
    try:
        return main(arguments) or EXIT_OK
    except UserError as error:
        return _say(f"error: {error}", error.exit_code)
    except Interrupted as error:
        return _say(f"interrupted: {error}", EXIT_INTERRUPTED)
    except KeyboardInterrupt:
        return _say("interrupted: there was nothing to save", EXIT_KILLED)
    except MemoryError as error:
        return _say_memory(shortened(str(error), 160) or "the system cannot allocate more")
    except UnicodeEncodeError as error:  # a file name: streams have escapes
        text = shortened(ascii(error.object[error.start : error.end]))
        reason = f"{text} cannot be part of a file name where the locale is {error.encoding}"
        return _say(f"error: {reason}; set PYTHONUTF8=1", EXIT_USER_ERROR)
    except BrokenPipeError:
        sys.stdout.silence()
        return EXIT_PIPE
    except Exception as error:
        if reason := next((words for words in OUT_OF_MEMORY if words in str(error).lower()), None):
            return _say_memory(reason)
        line = file_errors.line_of(error)  # of files that were opened, and of full disks that a library met
        if line is None:
            raise
        if isinstance(error, OSError) and error.filename == streams.STDOUT:
            sys.stdout.silence()
        return _say(f"error: {line}", EXIT_USER_ERROR)


def _say_memory(reason: str) -> int:
    return _say(f"error: memory: {reason}; lower data.batch_size or the sizes of the model", EXIT_USER_ERROR)


def escape_characters() -> None:
    """Makes stdout and stderr write what their encoding does not have as escapes: an accented path is no error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what tests and notebooks put there may be something else
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator:
    """Redirects everything printed meanwhile, by C++ too, to stderr; yields a file that is the real stdout."""
    sys.stdout.flush()
    file = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="surrogateescape")  # bytes come out as they came in
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


def _say(text: str, code: int) -> int:
    print(" ".join(text.split("\n")), file=sys.stderr, flush=True)
    return code
