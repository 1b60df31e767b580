"""Reads and writes shared objects byte by byte.

What an Ascend plugin asks of its libraries is read, and libraries that stand in for them are written. Structures and
constants are those of the System V ABI, chapters 4 and 5, and of its x86-64 supplement: ELF64, little endian. Pure
standard library.
"""

import re
import struct
from dataclasses import dataclass, field
from pathlib import Path

ELF64_LITTLE = b"\x7fELF\x02\x01"
SHARED_OBJECT, X86_64, CURRENT = 3, 62, 1  # e_type, e_machine, e_version
HEADER, PROGRAM_HEADER, SYMBOL, RELOCATION, DYNAMIC_ENTRY = 64, 56, 24, 24, 16  # bytes of each

SECTION_DYNAMIC, SECTION_DYNAMIC_SYMBOLS, SECTION_VERSIONS = 6, 11, 0x6FFFFFFF  # sh_type
GLOBAL, WEAK, UNIQUE, FUNCTION = 1, 2, 10, 2  # symbol bindings; symbol type
VERSION_MASK, UNVERSIONED = 0x7FFF, 1

LOAD, DYNAMIC, STACK = 1, 2, 0x6474E551  # p_type
EXECUTE, WRITE, READ = 1, 2, 4  # p_flags
NEEDED, HASH, STRINGS, SYMBOLS, RELA, RELA_SIZE, RELA_ENTRY, STRINGS_SIZE, SYMBOL_ENTRY, OWN_NAME = (
    1, 4, 5, 6, 7, 8, 9, 10, 11, 14,
)  # d_tag  # fmt: skip
RELATIVE = 8  # R_X86_64_RELATIVE
PAGE = 4096

RETURN_ZERO, ZERO_OBJECT, RETURN_MAP = 0x00, 0x10, 0x30  # where a function of CODE begins
MAP_OFFSET = RETURN_MAP + 3  # the displacement that `lea` adds to the address behind it
CODE = bytes.fromhex(
    "31c031d2c3"  # xor eax, eax; xor edx, edx; ret
    + "90" * 11
    + "48c70700000000" + "48c7470800000000" + "31c031d2c3"  # mov qword [rdi], 0; mov qword [rdi + 8], 0; return zero
    + "90" * 12
    + "488d0500000000" + "c3"  # lea rax, [rip + displacement]; ret
)  # fmt: skip

# Constructors of these values zero the first 16 bytes of the object, so that its pointers are null.
CONSTRUCTOR = re.compile(
    r"_ZN2ge(12AscendString|5Shape|10TensorDesc|6Tensor|5Graph|11GraphBuffer|8Operator|7Session)C[12]E"
)
# ge::StatusFactory::Instance() returns an object whose std::map<unsigned, std::string> is read: an empty one.
RETURNS_MAP = "13StatusFactory8InstanceEv"


@dataclass
class Symbols:
    """Names of a shared object: `defined`; `undefined`, strong and without a version; `needed` libraries."""

    defined: set[str] = field(default_factory=set)
    undefined: set[str] = field(default_factory=set)
    needed: list[str] = field(default_factory=list)


def read_symbols(path: Path) -> Symbols:
    """Returns the dynamic symbols of a shared object; empty for a file of another kind."""
    with open(path, "rb") as file:
        head = file.read(HEADER)
        if head[:6] != ELF64_LITTLE:
            return Symbols()
        (place,) = struct.unpack_from("<Q", head, 0x28)
        size, count = struct.unpack_from("<HH", head, 0x3A)
        file.seek(place)
        raw = file.read(size * count)
        sections = [struct.unpack_from("<IIQQQQIIQQ", raw, index * size) for index in range(count)]

        def body(section):
            file.seek(section[4])
            return file.read(section[5])

        found = Symbols()
        versions = next((body(section) for section in sections if section[1] == SECTION_VERSIONS), b"")
        for section in sections:
            if section[1] == SECTION_DYNAMIC_SYMBOLS:
                _read_table(found, body(section), body(sections[section[6]]), versions)
            elif section[1] == SECTION_DYNAMIC:
                strings = body(sections[section[6]])
                for tag, value in struct.iter_unpack("<qQ", body(section)):
                    if tag == NEEDED:
                        found.needed.append(_text(strings, value))
    return found


def _text(strings: bytes, start: int) -> str:
    return strings[start : strings.index(b"\0", start)].decode()


def _read_table(found: Symbols, table: bytes, strings: bytes, versions: bytes) -> None:
    for index in range(1, len(table) // SYMBOL):
        name, info, _, section, _, _ = struct.unpack_from("<IBBHQQ", table, index * SYMBOL)
        binding = info >> 4
        if section and binding in (GLOBAL, WEAK, UNIQUE):
            found.defined.add(_text(strings, name))
        elif not section and binding == GLOBAL:
            version = UNVERSIONED
            if versions:
                version = struct.unpack_from("<H", versions, index * 2)[0] & VERSION_MASK
            if version <= UNVERSIONED:
                found.undefined.add(_text(strings, name))


def write_library(path: Path, name: str, functions: set[str]) -> None:
    """Writes an x86-64 shared object `name` in which every one of `functions` is one of those of CODE."""
    names = sorted(functions)
    strings, offsets = bytearray(b"\0"), {}
    for text in (name, *names):
        offsets[text] = len(strings)
        strings += text.encode() + b"\0"
    table_hash = _hash_table(names)
    symbols_at = _aligned(HEADER + 4 * PROGRAM_HEADER)
    strings_at = _aligned(symbols_at + SYMBOL * (len(names) + 1))
    hash_at = _aligned(strings_at + len(strings))
    rela_at = _aligned(hash_at + len(table_hash))
    code_at = _aligned(rela_at + 2 * RELOCATION, 64)
    code_end = code_at + len(CODE)
    dynamic_at = _aligned(code_end, PAGE)
    data_at = _aligned(dynamic_at + 10 * DYNAMIC_ENTRY, 64)
    end = data_at + 256
    code = bytearray(CODE)
    struct.pack_into("<i", code, MAP_OFFSET, data_at - (code_at + MAP_OFFSET + 4))
    data, relocations = _empty_map(data_at)
    symbols = bytearray(SYMBOL)
    for text in names:
        symbols += struct.pack("<IBBHQQ", offsets[text], GLOBAL << 4 | FUNCTION, 0, 1, code_at + _entry(text), 5)
    tags = (
        (OWN_NAME, offsets[name]), (HASH, hash_at), (STRINGS, strings_at), (SYMBOLS, symbols_at),
        (STRINGS_SIZE, len(strings)), (SYMBOL_ENTRY, SYMBOL), (RELA, rela_at), (RELA_SIZE, len(relocations)),
        (RELA_ENTRY, RELOCATION), (0, 0),
    )  # fmt: skip
    dynamic = b"".join(struct.pack("<QQ", *tag) for tag in tags)
    header = ELF64_LITTLE + b"\x01" + b"\0" * 9
    header += struct.pack("<HHIQQQIHHHHHH", SHARED_OBJECT, X86_64, CURRENT, 0, HEADER, 0, 0, HEADER, PROGRAM_HEADER, 4,
                          0, 0, 0)  # fmt: skip
    header += _segment(LOAD, READ | EXECUTE, 0, code_end, PAGE)
    header += _segment(LOAD, READ | WRITE, dynamic_at, end - dynamic_at, PAGE)
    header += _segment(DYNAMIC, READ | WRITE, dynamic_at, len(dynamic), 8)
    header += _segment(STACK, READ | WRITE, 0, 0, 16)
    image = bytearray(end)
    parts = (
        (0, header), (symbols_at, symbols), (strings_at, strings), (hash_at, table_hash), (rela_at, relocations),
        (code_at, code), (dynamic_at, dynamic), (data_at, data),
    )  # fmt: skip
    for place, content in parts:
        image[place : place + len(content)] = content
    path.write_bytes(image)


def _entry(name: str) -> int:
    """Returns the offset in CODE at which a function begins."""
    if RETURNS_MAP in name:
        return RETURN_MAP
    return ZERO_OBJECT if CONSTRUCTOR.match(name) else RETURN_ZERO


def _empty_map(place: int) -> tuple[bytes, bytes]:
    """Returns an empty std::map (libstdc++) at `place` and the relocations of its two pointers to itself.

    Layout: comparison, then the header node of colour, parent, leftmost, rightmost, then the count.
    """
    header = place + 8
    data = struct.pack("<QQQQQQ", 0, 0, 0, header, header, 0)
    return data, b"".join(struct.pack("<QQq", place + offset, RELATIVE, header) for offset in (24, 32))


def _segment(kind: int, flags: int, place: int, size: int, alignment: int) -> bytes:
    return struct.pack("<IIQQQQQQ", kind, flags, place, place, place, size, size, alignment)


def _aligned(value: int, to: int = 16) -> int:
    return -(-value // to) * to


def _hash_table(names: list[str]) -> bytes:
    """Returns DT_HASH: buckets and chains of the symbols, which are numbered from 1."""
    count = len(names) + 1
    size = max(1, count // 2)
    buckets, chain = [0] * size, [0] * count
    for index, name in enumerate(names, 1):
        bucket = _hash(name) % size
        chain[index], buckets[bucket] = buckets[bucket], index
    return struct.pack(f"<{2 + size + count}I", size, count, *buckets, *chain)


def _hash(name: str) -> int:
    """Returns the hash of the System V ABI, figure 5-13."""
    value = 0
    for character in name.encode():
        value = (value << 4) + character
        high = value & 0xF0000000
        if high:
            value ^= high >> 24
        value &= ~high & 0xFFFFFFFF
    return value
