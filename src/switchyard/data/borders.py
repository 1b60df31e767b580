"""Takes the predictions across the borders of documents out of batches, for data.document_mask."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from switchyard.config import Config
from switchyard.data.batches import IGNORED, Batch
from switchyard.data.tokenizer import Tokenizer


class WithinDocuments:
    """Gives the batches of others; what follows a separator is not predicted.

    Args:
        batches: of training or validation.
        separator: token that ends a document.
    """

    def __init__(self, batches: Any, separator: int):
        self._batches, self._separator = batches, separator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        return (self.at(index) for index in range(len(self)))

    def at(self, index: int) -> Batch:
        """Returns batch `index`."""
        batch = self._batches.at(index)
        labels = np.where(batch.tokens == self._separator, np.int32(IGNORED), batch.labels)
        return batch._replace(labels=labels)


def within_documents(config: Config, tokenizer: Tokenizer, batches: Any) -> Any:
    """Returns batches as data.document_mask asks; None stays None."""
    if batches is None or not config.data.document_mask or tokenizer.separator is None:
        return batches
    return WithinDocuments(batches, tokenizer.separator)
