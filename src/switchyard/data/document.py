"""Defines a text: its name and its bytes."""

from dataclasses import dataclass

from switchyard.errors import UserError


@dataclass(frozen=True)
class Document:
    """Holds one text.

    Attributes:
        name: for messages, the path as the user would find it.
        raw: its bytes.
        key: what the user named it by, for messages.
    """

    name: str
    raw: bytes
    key: str = "data.path"

    def text(self) -> str:
        """Returns the characters, with the file's own line ends.

        Raises:
            UserError: the bytes are not UTF-8; names the file and the offset of the first bad byte.
        """
        try:
            return self.raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.key}: '{self.name}' is not UTF-8: byte 0x{self.raw[error.start]:02x} at offset {error.start}; "
                "convert the file to UTF-8 or leave it out"
            ) from None
