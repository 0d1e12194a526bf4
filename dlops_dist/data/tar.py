"""Plain ustar archives: members written so that equal content gives equal bytes, and found again without extracting."""

import tarfile
from collections.abc import Iterator
from pathlib import Path
from shlex import quote
from typing import BinaryIO, NamedTuple

BLOCK = 512
END = bytes(2 * BLOCK)
"""What an archive ends with."""
COMPRESSED = {
    b"\x1f\x8b": ("gunzip", ".gz"), b"BZh": ("bunzip2", ".bz2"), b"\xfd7zXZ\0": ("unxz", ".xz"),
    b"\x28\xb5\x2f\xfd": ("unzstd", ".zst"),
}  # fmt: skip
"""First bytes of a compressed file: the command that unpacks it, and the ending which that asks for."""


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

    Archives that were joined by `cat` are read one after another, as `tar --ignore-zeros` does.

    Raises:
        ValueError: the archive is cut off, damaged or compressed, or holds links, devices or sparse files.
    """
    with path.open("rb") as file:
        _refuse_what_is_no_archive(path, file.read(BLOCK))
        start: int | None = 0
        try:
            while start is not None:
                file.seek(start)
                end = start
                for info in tarfile.TarFile(fileobj=file):
                    end = info.offset_data + -(-max(info.size, 0) // BLOCK) * BLOCK
                    if not info.isdir():
                        yield _member(info)
                if 0 < start == end:
                    raise ValueError(f"after its end, from byte {start:,} on, it holds what is no archive: damaged?")
                start = _start_of_next(file, end)
        except (tarfile.TarError, EOFError, OverflowError) as error:
            why = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"it is no tar archive, or damaged ({why})") from None


def _refuse_what_is_no_archive(path: Path, first: bytes) -> None:
    if not first:
        raise ValueError("it is 0 bytes long, less than an empty archive: fetch it again, or remove it")
    for begin, (unpack, ending) in COMPRESSED.items():
        if first.startswith(begin):
            packed = path.with_name(path.name + ending)
            how = f"mv {quote(str(path))} {quote(str(packed))} && {unpack} {quote(str(packed))}"
            raise ValueError(f"it is compressed, and images are read where they lie; unpack it: {how}")


def _member(info: tarfile.TarInfo) -> Member:
    if not info.name.isprintable():
        raise ValueError(f"member {info.name[:40]!r} has a name that is not text")
    if info.size < 0:
        raise ValueError(f"{info.name} has a size below 0")
    if info.islnk() or info.issym():
        way_out = "unpack it and pack it again with tar --dereference --hard-dereference"
        raise ValueError(f"{info.name} is a link, not a plain file: {way_out}")
    if not info.isreg() or info.issparse():
        raise ValueError(f"{info.name} is a device or sparse, not a plain file")
    return Member(info.name, info.offset_data, info.size)


def _start_of_next(file: BinaryIO, end: int) -> int | None:
    """Where the archive begins that was joined to one whose members end there; None where only zeros follow."""
    file.seek(end)
    if file.read(len(END)) != END:
        raise ValueError("it does not end as an archive does: cut off, or damaged")
    start = end + len(END)
    while block := file.read(BLOCK):
        if any(block):
            return start
        start += BLOCK
    return None
