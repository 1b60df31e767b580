"""Bytes of a text file: the byte-order mark goes, other encodings and NULs are refused in one line."""

import codecs

import pytest

from switchyard.config import DataConfig
from switchyard.data.corpus import load_text
from switchyard.data.document import Document
from switchyard.data.tokenizer import ByteTokenizer, CharTokenizer, read_tokenizer
from switchyard.data.utf8 import decoded, is_binary, text_bytes, wide_encoding
from switchyard.errors import UserError

TEXT = "Grüße, 世界!\n" * 30
WIDE = ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be", "utf-16", "utf-32"]


@pytest.mark.parametrize("codec", WIDE)
def test_wide_encodings_are_refused_by_name_with_and_without_a_mark(tmp_path, codec):
    for text in (TEXT, TEXT * 100, "a", "a\u3000b", "Привет, мир\n" * 9, "नमस्ते दुनिया\n" * 9, "世界 " * 9):
        assert wide_encoding(text.encode(codec)) == codec[:6].upper()
    (tmp_path / "wide.txt").write_bytes(TEXT.encode(codec))
    for path in (tmp_path / "wide.txt", tmp_path, tmp_path / "*.txt"):
        for tokenizer in ("byte", "char"):
            with pytest.raises(
                UserError, match=r"^data\.path: .*wide\.txt' is UTF-\d\d text; convert the file to UTF-8"
            ):
                load_text(DataConfig(path=str(path), tokenizer=tokenizer))


@pytest.mark.parametrize("place", [0, 8, 8191, 9000])
def test_a_nul_is_refused_in_a_file_with_its_offset(tmp_path, place):
    raw = b"x" * place + b"\0" + b"y" * 50
    file = tmp_path / "nul.txt"
    file.write_bytes(raw)
    with pytest.raises(UserError, match=rf"nul\.txt' holds a NUL at offset {place}, so it is not UTF-8 text; convert"):
        load_text(DataConfig(path=str(file)))


def test_in_a_folder_binary_is_skipped_and_a_late_nul_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    assert "1 binary skipped" in load_text(DataConfig(path=str(tmp_path))).description
    (tmp_path / "late.txt").write_bytes(b"x" * 9000 + b"\0")
    with pytest.raises(UserError, match=r"late\.txt' holds a NUL at offset 9000"):
        load_text(DataConfig(path=str(tmp_path)))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"abc",
        b"line\0\n",
        b"x" * 8191 + b"\0",
        "世界".encode("utf-16-le"),
        b"\x89\0\0",
        b"\x89PNG\0\0\0\r",
        bytes(16),
    ],
)
def test_what_is_not_taken_for_wide_text(raw):
    assert wide_encoding(raw) is None
    assert is_binary(raw) == (b"\0" in raw)


def test_the_mark_of_utf8_goes_once_and_only_in_front():
    mark = codecs.BOM_UTF8
    assert text_bytes(mark + b"a" + mark, "f") == b"a" + mark
    assert decoded(mark + "é".encode(), "f") == "é"
    with pytest.raises(UserError, match=r"^f is not UTF-8: byte 0xff at offset 1; convert"):
        decoded(b"a\xff", "f")


def test_a_marked_file_gives_the_documents_of_a_plain_one(tmp_path):
    plain, marked = tmp_path / "plain", tmp_path / "marked"
    for folder, mark in ((plain, b""), (marked, codecs.BOM_UTF8)):
        folder.mkdir()
        for name in ("a.txt", "b.txt"):
            (folder / name).write_bytes(mark + TEXT.encode())
    for name in ("", "a.txt", "*.txt"):
        one, other = (load_text(DataConfig(path=str(folder / name))) for folder in (plain, marked))
        assert [d.raw for d in one.train + one.validation] == [d.raw for d in other.train + other.validation]
    (marked / "a.txt").write_bytes(codecs.BOM_UTF8)
    with pytest.raises(UserError, match="is empty"):
        load_text(DataConfig(path=str(marked / "a.txt")))


def test_a_marked_tokenizer_file_is_read_and_a_wide_one_refused(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(codecs.BOM_UTF8 + CharTokenizer("ab").to_json().encode())
    assert read_tokenizer(file).characters == "ab"
    file.write_bytes(CharTokenizer("ab").to_json().encode("utf-16"))
    with pytest.raises(UserError, match=r"^data\.tokenizer: .* is UTF-16 text; convert"):
        read_tokenizer(file)


def test_no_text_becomes_the_separator_of_bytes_or_characters():
    for tokenizer in (ByteTokenizer(), CharTokenizer("\0ab", separated=True)):
        with pytest.raises(UserError, match="text: NUL at position 1 is reserved as the separator of documents"):
            tokenizer.encode("a\0b")
    with pytest.raises(UserError, match=r"data\.path: 'x': text: NUL at position 1"):
        CharTokenizer("\0ab", separated=True).encode_documents([Document("x", b"a\0b")])
