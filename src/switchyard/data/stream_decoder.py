"""Decodes ids that come one after the other, as generation needs it."""

import codecs

from switchyard.data.tokenizer import ByteTokenizer, Ids, LibraryTokenizer, Tokenizer


class StreamDecoder:
    """Decodes ids as they come and never emits half a character.

    The pieces of all `push` calls and the final `flush` join to `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._emitted = 0
        if isinstance(tokenizer, ByteTokenizer):
            self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        elif isinstance(tokenizer, LibraryTokenizer):
            from tokenizers.decoders import DecodeStream

            self._stream = DecodeStream(skip_special_tokens=True)

    def push(self, ids: Ids) -> str:
        """Returns the characters that are now complete."""
        ids = [int(i) for i in ids]
        if isinstance(self._tokenizer, ByteTokenizer):
            return self._utf8.decode(bytes(ids))
        if not isinstance(self._tokenizer, LibraryTokenizer):
            return self._tokenizer.decode(ids)
        text = "".join(self._stream.step(self._tokenizer._library, i) or "" for i in ids)
        self._ids += ids
        self._emitted += len(text)
        return text

    def flush(self) -> str:
        """Returns the characters held back, with U+FFFD for bytes that never became a character. Ends the stream."""
        if isinstance(self._tokenizer, ByteTokenizer):
            return self._utf8.decode(b"", final=True)
        if isinstance(self._tokenizer, LibraryTokenizer):
            return self._tokenizer.decode(self._ids)[self._emitted :]
        return ""
