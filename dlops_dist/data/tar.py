"""Plain ustar archives: members written so that equal content gives equal bytes, and found again without extracting."""

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

BLOCK = 512
END = bytes(2 * BLOCK)
"""What an archive ends with."""


class Member(NamedTuple):
    """A regular file in an archive."""

    name: str
    offset: int
    """Of its content, in bytes from the archive's start."""
    size: int


def _header() -> bytes:
    """A ustar header without name, size and checksum: no owner, no time."""
    header = bytearray(BLOCK)
    header[100:108] = b"0000644\0"
    header[108:124] = b"0000000\0" * 2
    header[135:148] = b"\0" + b"0" * 11 + b"\0"
    header[148:156] = b" " * 8  # the checksum counts itself as spaces
    header[156:157] = b"0"
    header[257:265] = b"ustar\x0000"
    return bytes(header)


HEADER = _header()
HEADER_SUM = sum(HEADER)


def member_bytes(name: str, data: bytes) -> bytes:
    """Header and content of a file without owner and time. Raises ValueError for a name of over 100 bytes."""
    encoded, size = name.encode(), b"%011o" % len(data)
    if len(encoded) > 100:
        raise ValueError(f"{name!r} is longer than the 100 bytes that a tar header holds")
    checksum = b"%06o\0 " % (HEADER_SUM + sum(encoded) + sum(size))
    return b"".join((
        encoded.ljust(100, b"\0"), HEADER[100:124], size, HEADER[135:148], checksum, HEADER[156:],
        data, bytes(-len(data) % BLOCK),
    ))  # fmt: skip


def members(path: Path) -> Iterator[Member]:
    """The regular files of an archive that anyone wrote, in its order; folders are passed over.

    Raises:
        ValueError: the archive is cut off or damaged, or holds links, devices or sparse files.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            end = 0
            for info in archive:
                end = info.offset_data + -(-max(info.size, 0) // BLOCK) * BLOCK
                if info.isdir():
                    continue
                if not info.name.isprintable():
                    raise ValueError(f"member {info.name[:40]!r} has a name that is not text")
                if info.size < 0:
                    raise ValueError(f"{info.name} has a size below 0")
                if not info.isreg() or info.issparse():
                    raise ValueError(f"{info.name} is a link, a device or sparse, not a plain file")
                yield Member(info.name, info.offset_data, info.size)
        with path.open("rb") as file:
            file.seek(end)
            if file.read(len(END)) != END:
                raise ValueError("it does not end as an archive does: cut off, or damaged")
    except (tarfile.TarError, EOFError, OverflowError) as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
