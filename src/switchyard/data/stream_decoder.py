"""Decodes ids that come one after the other, as generation needs it."""

import codecs

from switchyard.data.tokenizer import ByteTokenizer, Ids, LibraryTokenizer, Tokenizer


class StreamDecoder:
    """Decodes ids as they come and never emits half a character.

    The pieces of all `push` calls and the final `flush` join to `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._push = self._push_characters
        if isinstance(tokenizer, ByteTokenizer):
            self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
            self._push = self._push_bytes
        elif isinstance(tokenizer, LibraryTokenizer):
            from tokenizers.decoders import DecodeStream

            self._stream = DecodeStream(skip_special_tokens=True)
            self._ids: list[int] = []
            self._emitted = 0
            self._push = self._push_library

    def push(self, ids: Ids) -> str:
        """Returns the characters that are now complete."""
        return self._push([int(i) for i in ids])

    def flush(self) -> str:
        """Returns the characters held back, with U+FFFD for bytes that never became a character. Ends the stream."""
        if isinstance(self._tokenizer, ByteTokenizer):
            return self._utf8.decode(b"", final=True)
        if isinstance(self._tokenizer, LibraryTokenizer):
            return self._tokenizer.decode(self._ids)[self._emitted :]
        return ""

    def _push_bytes(self, ids: list[int]) -> str:
        return self._utf8.decode(bytes(ids))

    def _push_characters(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)

    def _push_library(self, ids: list[int]) -> str:
        pieces = [self._stream.step(self._tokenizer._library, i) or "" for i in ids]
        self._ids += ids
        text = "".join(pieces)
        self._emitted += len(text)
        return text
