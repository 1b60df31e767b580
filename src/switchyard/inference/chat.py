"""Chats with an exported model: turns of a user and of the model, written out by the chat template of its tokenizer.

The template is Jinja, in the form that Hugging Face's transformers reads: `chat_template` of tokenizer_config.json, or
the file chat_template.jinja. It is run in a sandbox, because it comes with a model of somebody else.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from switchyard.config.reader import parse_json
from switchyard.errors import UserError, shortened
from switchyard.files import read_regular
from switchyard.inference.generate import Generated, Timing, continue_ids
from switchyard.inference.manifest import Manifest
from switchyard.inference.mindir import ExportedModel
from switchyard.inference.sampling import Sampling
from switchyard.optional import require
from switchyard.training.companions import GENERATION, TEMPLATE, TEXTS, TOKENIZER_CONFIG

LONGEST = 1 << 22  # bytes of a text
DEFAULT = "default"  # of several named templates
NEW = "/new"  # a line that starts another conversation


@dataclass(frozen=True)
class ChatTemplate:
    """Writes a conversation as the text that a model was trained on.

    Attributes:
        source: Jinja.
        variables: of the tokenizer, such as bos_token and eos_token.
        ends: ids of tokens that end an answer.

    Examples:
        >>> ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}|{% endfor %}", {}).render(
        ...     [{"role": "user", "content": "Hello"}]
        ... )
        'user: Hello|'
    """

    source: str
    variables: dict[str, str]
    ends: frozenset[int] = frozenset()

    def render(self, messages: list[dict[str, str]]) -> str:
        """Returns the text of messages [{role, content}, ...] up to where the answer begins (UserError: it fails)."""
        environment = sandbox()
        try:
            template = environment.from_string(self.source)
            return template.render(messages=messages, add_generation_prompt=True, **self.variables)
        except UserError:
            raise
        except Exception as error:  # a template may fail in any way that Python can
            raise UserError(f"chat template: {shortened(' '.join(str(error).split()), 200)}") from None


def sandbox():
    """Returns a Jinja environment without access to Python's attributes and files, with what templates count on."""
    require("jinja2", "jinja2", "--chat: writes conversations by a template")
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise UserError(f"chat template: {shortened(message, 200)}")

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    made.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, allow_nan=False, **options)
    made.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return made


def read_template(directory: Path, manifest: Manifest, tokenizer) -> ChatTemplate:
    """Returns the chat template of an exported directory (UserError: it has none)."""
    found = {name: _text(directory, name) for name in TEXTS if name in manifest.files}
    settings, generation = (_mapping(directory, name, found) for name in (TOKENIZER_CONFIG, GENERATION))
    source = found.get(TEMPLATE) or _of_settings(settings.get("chat_template"))
    if source is None:
        raise UserError(
            f"--chat: '{directory}' holds no chat template ({TEMPLATE}, or chat_template in {TOKENIZER_CONFIG}); "
            "export a model whose tokenizer has one, or use --prompt"
        )
    variables = {name: text for name, value in settings.items() if name.endswith("_token") and (text := _token(value))}
    ids = generation.get("eos_token_id")
    ends = {one for one in (ids if isinstance(ids, list) else [ids]) if type(one) is int}
    ends |= {tokenizer.separator, tokenizer.token_id(variables.get("eos_token", ""))} - {None}
    return ChatTemplate(source, variables, frozenset(ends))


def _text(directory: Path, name: str) -> str:
    try:
        return read_regular(directory / name, LONGEST, directory).decode("utf-8")
    except (OSError, ValueError):
        raise UserError(f"--model: '{directory / name}' cannot be read as text; export the checkpoint again") from None


def _mapping(directory: Path, name: str, texts: dict[str, str]) -> dict[str, Any]:
    """Returns a JSON object among the texts, {} where it is not there (UserError: something else)."""
    try:
        tree = parse_json(texts.get(name, "{}"))
    except ValueError:
        tree = None
    if not isinstance(tree, dict):
        raise UserError(f"--model: '{directory / name}' is no JSON object; export the checkpoint again")
    return tree


def _of_settings(value: object) -> str | None:
    """Returns the template of tokenizer_config.json: a text, or the default one of a list of named ones."""
    if isinstance(value, list):
        named = {one.get("name"): one.get("template") for one in value if isinstance(one, dict)}
        value = named.get(DEFAULT)
    return value if isinstance(value, str) else None


def _token(value: object) -> str | None:
    """Returns the text of a special token: a text, or an object with `content`."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


class Chat:
    """Holds a conversation: what was said so far is read again with each message.

    Args:
        model: see `mindir.open_model`.
        template: of its tokenizer.
        max_new_tokens: most tokens of an answer.
        sampling: how tokens are drawn.
        system: an instruction before the first message; "" = none.
    """

    def __init__(
        self, model: ExportedModel, template: ChatTemplate, max_new_tokens: int, sampling: Sampling, system: str = ""
    ):
        self._model, self._template = model, template
        self._limit, self._sampling = max_new_tokens, sampling
        self._begin = [{"role": "system", "content": system}] if system else []
        self.messages = list(self._begin)

    def start_anew(self) -> None:
        """Forgets what was said, except the instruction."""
        self.messages = list(self._begin)

    def answer(self, message: str, on_text: Callable[[str], None] = lambda text: None) -> tuple[Generated, Timing]:
        """Returns the answer to a message, which the conversation keeps.

        Args:
            message: of the user.
            on_text: receives the answer piece by piece.

        Raises:
            UserError: a message with a special token, a template that fails, or a conversation that is too long; the
                conversation stays as it was.
        """
        if token := self._model.tokenizer.special_in(message):
            raise UserError(f"message: holds {token!r}, a special token of the tokenizer; leave it out")
        asked = [*self.messages, {"role": "user", "content": message}]
        ids = self._model.tokenizer.encode_with_special(self._template.render(asked))
        if len(ids) >= self._model.max_length:
            raise UserError(
                f"conversation: {len(ids)} tokens; the model holds {self._model.max_length} with the answer: start a "
                f"new one with {NEW}, or export with a larger export.max_length"
            )
        found, timing = continue_ids(
            self._model, [message], [ids], self._limit, self._sampling, on_text, ends=self._template.ends
        )
        self.messages = [*asked, {"role": "assistant", "content": found[0].text.strip()}]
        return found[0], timing


def talk(
    chat: Chat, lines: Iterable[str], on_answer: Callable[[Generated, Timing], None], on_text: Callable[[str], None]
) -> None:
    """Answers one line after the other, until they end; empty lines are passed over.

    Args:
        chat: the conversation.
        lines: messages; the line /new starts another conversation.
        on_answer: receives each answer when it is complete.
        on_text: receives the text of answers piece by piece.

    Raises:
        UserError: see `Chat.answer`.
    """
    for line in lines:
        message = line.strip()
        if message == NEW:
            chat.start_anew()
        elif message:
            on_answer(*chat.answer(message, on_text))
