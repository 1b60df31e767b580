"""Defines what a family of models is: how its config.json and its tensors become ours, and ours become its own.

A family of decoders is a row of `families.FAMILIES`, see `decoders.DecoderFamily`. Another network is a class of its
own, and a row too.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

from switchyard.config import Config
from switchyard.errors import UserError, represented
from switchyard.interop.huggingface.rules import Parameter


class Family(ABC):
    """Translates the models of one `model_type`.

    Attributes:
        model_type, architecture: of its config.json.
        sparse: whether its models may have conditional layers.
        loader: the class of transformers that loads an export.
        tokenizer_settings: of tokenizer_config.json, where no import has given one.
    """

    model_type: str
    architecture: str
    sparse: bool
    loader: ClassVar[str] = "AutoModelForCausalLM"
    tokenizer_settings: ClassVar[dict[str, Any]] = {}

    @abstractmethod
    def read(self, tree: dict[str, Any], name: str = "imported") -> tuple[Config, list[str]]:
        """Returns (our configuration of a config.json, lines about keys that are not taken over).

        Args:
            tree: config.json.
            name: train.name.

        Raises:
            UserError: a key that is missing or of another type, or a value that our models do not have.
        """

    @abstractmethod
    def write(self, config: Config, vocab_size: int) -> dict[str, Any]:
        """Returns a config.json; what the family does not have is left out, see `unfit`."""

    @abstractmethod
    def parameters(self, config: Config, vocab_size: int) -> Iterator[Parameter]:
        """Yields the parameters of a model with what they are made of."""

    @abstractmethod
    def facts(self, config: Config) -> dict[str, Any]:
        """Returns what decides the outputs of a model, each under one key however it was written."""

    def left_out(self, name: str, tree: dict[str, Any]) -> str | None:
        """Returns why a tensor that no parameter is made of may be left out; None where it may not."""
        return None

    def with_tokenizer(self, config: Config, text: str) -> tuple[Config, str]:
        """Returns our configuration and the JSON of the tokenizer, as an import writes them.

        Args:
            config: of `read`.
            text: a tokenizer.json with as many entries as the model has.

        Raises:
            UserError: a tokenizer that the family cannot have.
        """
        return config, text

    def unfit(self, config: Config) -> str | None:
        """Returns what of a configuration the family does not have, `key: value`; None where it fits.

        What the configuration says must survive the way through a config.json.
        """
        try:
            other, _ = self.read(self.write(config, 1))
        except UserError as error:
            return str(error)
        wanted, found = self.facts(config), self.facts(other)
        for key, value in wanted.items():
            if key not in found or found[key] != value:
                return f"{key}: {'null' if value is None else represented(value)}"
        return None
