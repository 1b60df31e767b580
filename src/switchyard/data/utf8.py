"""Reads a user's text file as UTF-8: drops the byte-order mark, refuses other encodings and binary files."""

import codecs
import unicodedata

from switchyard.errors import UserError

PROBE = 8192  # bytes that are looked at: a multiple of 4
MARKS = (  # of other encodings; those of UTF-32 first, because the one begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
WIDE_CODECS = ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be")
NO_TEXT = frozenset({"Cc", "Cn", "Co", "Cs"})  # Unicode categories: control, unassigned, private, surrogate
REMEDY = "convert the file to UTF-8, for example with iconv"


def text_bytes(raw: bytes, where: str) -> bytes:
    """Returns the bytes of a UTF-8 text without its byte-order mark; whether they decode is left to the caller.

    Args:
        raw: the whole file.
        where: begins the message: the field and the file, such as "data.path: 'a.txt'".

    Raises:
        UserError: UTF-16, UTF-32, or a NUL, which text does not hold.
    """
    wide = wide_encoding(raw)
    if wide:
        raise UserError(f"{where} is {wide} text; {REMEDY}")
    place = raw.find(b"\0")
    if place >= 0:
        raise UserError(f"{where} holds a NUL at offset {place}, so it is not UTF-8 text; {REMEDY}, or leave it out")
    return raw.removeprefix(codecs.BOM_UTF8)


def decoded(raw: bytes, where: str) -> str:
    """Returns the characters of a UTF-8 text file (UserError as in `text_bytes`, and for bytes that are not UTF-8)."""
    raw = text_bytes(raw, where)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}; convert the file to UTF-8"
        ) from None


def is_utf8(raw: bytes) -> bool:
    """Returns whether bytes are UTF-8: a few modules of the standard library, which test other encodings, are not."""
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def is_binary(raw: bytes) -> bool:
    """Tells whether the first bytes hold a NUL and are not text of another encoding."""
    return b"\0" in raw[:PROBE] and wide_encoding(raw) is None


def wide_encoding(raw: bytes) -> str | None:
    """Returns "UTF-16" or "UTF-32" where the bytes are such text, with or without a byte-order mark."""
    for mark, name in MARKS:
        if raw.startswith(mark) and _reads_as_text(raw[len(mark) :], name.lower(), mark):
            return name
    if b"\0" not in raw[:PROBE] or _has_stray_nuls(raw):  # UTF-8 may happen to decode as UTF-16, too
        return None
    return next((codec[:6].upper() for codec in WIDE_CODECS if _reads_as_text(raw, codec)), None)


def _has_stray_nuls(raw: bytes) -> bool:
    """Tells whether the bytes are UTF-8 text with some NULs in it, one or two or at odd and even places alike.

    The NULs of UTF-16 stand at even places only, or at odd ones, and every second byte of Latin text is one.
    """
    probe = raw[:PROBE]
    odd, even = probe[1::2].count(0), probe[::2].count(0)
    few = odd + even <= 2 or (odd and even)
    return few and 4 * (odd + even) < len(probe) and _reads_as_text(raw.replace(b"\0", b""), "utf-8")


def _reads_as_text(raw: bytes, codec: str, mark: bytes = b"") -> bool:
    """Tells whether the first bytes decode to characters that text is made of."""
    complete = len(raw) <= PROBE
    try:
        text = codecs.getincrementaldecoder(codec)().decode(mark + raw[:PROBE], final=complete)
    except UnicodeDecodeError:
        return False
    return all(unicodedata.category(character) not in NO_TEXT or character in "\t\n\r\f" for character in text)
