"""The headers of a tar, walked without reading contents.

Written out and not tarfile's, which takes five times as long (60,000 members: 1.24 s against 0.23 s) and does not say
how much of a damaged archive is whole. Names stay bytes, since decoding a million of them costs seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from mmap import mmap
from typing import NamedTuple

BLOCK = 512
END = bytes(BLOCK)
PADDING = 1 << 16  # what may follow the end mark: tar fills its last record, of 10 KiB by default, with zeros
FILES = {b"0", b"\0", b"7"}
NO_BODY = {b"1", b"2", b"3", b"4", b"5", b"6"}  # links, devices, folders, pipes: their size counts no bytes here
EXTENDED = {b"x", b"X", b"g", b"L", b"K"}
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
PAX_KEYS = (b"path=", b"size=", b"GNU.sparse")  # of the records that matter: most pax headers hold times alone
MOST_FIELDS = 256


class DamagedTar(ValueError):
    """The archive cannot be read beyond this point; the message says why."""


class Member(NamedTuple):
    name: bytes
    kind: bytes  # one of FILES for a regular file
    offset: int  # of its contents, bytes
    size: int


def walk(tar: bytes | mmap) -> Iterator[tuple[bytes, int, int, int]]:
    """(name, head, offset, size) of each regular file; `head` is where its headers begin, extended ones included.

    Understands ustar prefixes, GNU long names, pax headers (path, size) and sizes beyond 8 GiB. Ends at the
    end-of-archive mark. DamagedTar: the member just given, or a header, reaches beyond the file; a header is none; the
    mark is missing or lies long before the end of the file; or a member is stored sparsely.
    """
    end, head = len(tar), 0
    defaults: dict[bytes, bytes] = {}
    while found := member(tar, head, defaults):
        if found.kind in FILES:
            yield found.name, head, found.offset, found.size
        head = found.offset
        if found.kind not in NO_BODY:
            head += blocks(found.size)
            if found.offset + found.size > end:
                raise DamagedTar(
                    f"cut inside {decode_name(found.name)!r}, {found.offset + found.size - end:,} bytes are missing"
                )
    if end - head > PADDING:
        raise DamagedTar(f"the end-of-archive mark is at byte {head:,} of {end:,}; what follows cannot be read")


def member(tar: bytes | mmap, at: int, defaults: dict[bytes, bytes]) -> Member | None:
    """The member whose headers begin at byte `at`, None at the end mark; global records are added to `defaults`."""
    own: dict[bytes, bytes] = {}
    while True:
        header = tar[at : at + BLOCK]
        if header == END:
            return None
        check_header(header, at)
        kind, size, body = header[156:157], number(header[124:136], at), at + BLOCK
        if kind not in EXTENDED:
            break
        record = tar[body : body + size]
        if len(record) < size:
            raise DamagedTar(f"cut inside an extended header at byte {at:,}")
        if kind == b"L":
            own[b"path"] = record.rstrip(b"\0")
        elif kind != b"K" and any(word in record for word in PAX_KEYS):
            (defaults if kind == b"g" else own).update(pax(record, at))
        at = body + blocks(size)
    if own or defaults:
        own = defaults | own
        size = int(own.get(b"size", size))
    if kind == b"S" or any(key.startswith(b"GNU.sparse") for key in own):
        raise DamagedTar(f"the member at byte {at:,} is stored sparsely; pack it again without tar's --sparse")
    return Member(own.get(b"path") or ustar_name(header), kind, body, size)


def ustar_name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    if header[345] and header[257:263] == b"ustar\0":  # GNU's old format keeps times where POSIX has the prefix
        return header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name


def number(field: bytes, at: int) -> int:
    """A numeric header field: octal digits, or binary where the first bit is set."""
    if field[0] & 0x80:
        return int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
    try:
        return int(field.split(b"\0", 1)[0].strip() or b"0", 8)
    except ValueError:
        raise DamagedTar(f"the header at byte {at:,} is damaged: its size reads {field!r}") from None


def pax(record: bytes, at: int) -> dict[bytes, bytes]:
    """The lines `length key=value\\n` of a pax header, where length counts the whole line."""
    found, start = {}, 0
    while start < len(record) and record[start]:
        try:
            digits, _ = record[start : start + 20].split(b" ", 1)
            line = record[start + len(digits) + 1 : start + int(digits) - 1]
            key, value = line.split(b"=", 1)
        except ValueError:
            raise DamagedTar(f"the pax header at byte {at:,} is damaged") from None
        found[key] = value
        start += int(digits)
    return found


def check_header(header: bytes, at: int) -> None:
    if len(header) < BLOCK:
        raise DamagedTar(f"cut inside a header at byte {at:,}" if header else "the end-of-archive mark is missing")
    if header[257:262] != b"ustar" and header != END and not checksum_matches(header):
        raise DamagedTar(f"no tar header at byte {at:,}")


def checksum_matches(header: bytes) -> bool:
    """Whether the header's bytes, its checksum field read as spaces, add up to that field."""
    try:
        stated = int(header[148:156].strip(b" \0") or b"0", 8)
    except ValueError:
        return False
    return stated == sum(header) - sum(header[148:156]) + 8 * ord(" ")


def blocks(size: int) -> int:
    """Bytes that contents of this size take up in the archive."""
    return -(-size // BLOCK) * BLOCK


def key_and_field(name: bytes) -> tuple[bytes, bytes]:
    """(key, field) of a file name, cut at the first dot of its last part, as WebDataset does; empty where it has none.

    Files without a field are hidden files, names without an ending, and the `__meta__` files that WebDataset skips.
    """
    start = name.rfind(b"/") + 1
    dot = name.find(b".", start)
    if dot <= start or dot == len(name) - 1 or (name[:2] == b"__" and is_meta(name)):
        return b"", b""
    return name[:dot], name[dot + 1 :]


def is_meta(name: bytes) -> bool:
    first, _, _ = name.partition(b"/")
    return len(first) >= 4 and first.endswith(b"__")


def decode_name(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


class Headers(NamedTuple):
    """What the headers of one tar say of its samples; `reason` is what stopped the walk, or empty."""

    keys: list[bytes]
    heads: list[int]  # where each sample's first header begins
    fields: list[str]
    members: list[tuple[int, int, int, int]]  # sample, number of the field, offset, size
    reason: str


def read_headers(tar: mmap, url: str) -> Headers:
    """The samples of a tar, which are runs of members with one key; of a damaged tar, those that are surely whole.

    A field that comes again under the same key begins another sample. ValueError: more than 256 fields.
    """
    found = Headers([], [], [], [], "")
    numbers: dict[bytes, int] = {}  # fields by their spelling in the tar
    seen: set[int] = set()  # fields of the sample at hand
    try:
        for name, head, offset, size in walk(tar):
            key, ending = key_and_field(name)
            if not key:
                continue
            if ending not in numbers:
                numbers[ending] = field_number(decode_name(ending).lower(), found.fields, url)
            field = numbers[ending]
            if not found.keys or key != found.keys[-1] or field in seen:
                found.keys.append(key)
                found.heads.append(head)
                seen.clear()
            seen.add(field)
            found.members.append((len(found.keys) - 1, field, offset, size))
    except DamagedTar as cut:
        # The last sample may have had more members after the damage.
        whole = [m for m in found.members if m[0] < len(found.keys) - 1]
        return Headers(found.keys[:-1], found.heads[:-1], found.fields, whole, str(cut))
    return found


def field_number(field: str, fields: list[str], url: str) -> int:
    """The field's number in a list, which it is added to if it is new."""
    if field not in fields:
        fields.append(field)
        check_fields(fields, url)
    return fields.index(field)


def check_fields(fields: Sequence[str], url: str) -> None:
    if len(fields) > MOST_FIELDS:
        raise ValueError(
            f"more than {MOST_FIELDS} fields in {url!r}, such as {', '.join(fields[:3])}; a field is all that follows "
            "the first dot of a file name, so keys must have no dots: rename the files and pack them again"
        )


def refuse_other_formats(start: bytes, url: str) -> None:
    """ValueError where a file does not begin as a plain tar does."""
    for magic, name in COMPRESSED.items():
        if start.startswith(magic):
            raise ValueError(f"{url!r} is compressed ({name}), samples are read at random offsets: decompress it first")
    try:
        check_header(start, 0)
    except DamagedTar as cut:
        raise ValueError(f"{url!r} is not a tar archive ({cut}); remove it, or pack or fetch it again") from None
