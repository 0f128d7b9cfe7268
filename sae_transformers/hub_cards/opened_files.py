"""A file's bytes and those packed in it: compressed files, archives, tables, compressed text in base64 of a dashboard.

Everything is read in pieces of bounded size, and what comes out is bounded by what went in: a file that opens to a
hundred times its own size is refused, as is one that cannot be opened.
"""

from __future__ import annotations

import base64
import bz2
import gzip
import io
import lzma
import re
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from .markdown import one_line

BLOCK, OVERLAP = 1 << 22, 4096
PART = 1 << 20  # bytes that are unpacked at a time
DEEPEST = 4  # layers of packing
# What a file may open to: so many times its size, and this much in any case.
RATIO, SMALLEST = 100, 1 << 26
XZ_MEMORY = 1 << 28
ROWS = 512  # of a table, read at a time
COMPRESSED = {b"\x1f\x8b\x08": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz"}
CLOSED = {
    b"7z\xbc\xaf\x27\x1c": "7z", b"Rar!\x1a\x07": "rar", b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4",
    b"\x02\x21\x4c\x18": "lz4", b"\xff\x06\x00\x00sNaPpY": "snappy", b"LZIP": "lzip", b"\x1f\x9d": "compress",
    b"MSCF": "cabinet", b"\x89LZO\x00": "lzop", b"PARE": "encrypted Parquet", b"!<arch>\n": "ar",
}  # fmt: skip
CLOSED_NAMES = (".7z", ".rar", ".zst", ".zstd", ".lz4", ".br", ".lz", ".lzo", ".lzma", ".sz", ".z")
# gzip's first three bytes in base64, at the beginning of a run.
_GZIP_IN_BASE64 = re.compile(rb"(?<![A-Za-z0-9+/=])H4sI[A-Za-z0-9+/]{12}")
_BASE64 = re.compile(rb"[A-Za-z0-9+/]*={0,2}")


class Piece(NamedTuple):
    """A block of a layer, which overlaps with the next.

    name: of the file or member. where: the layer, empty for the file itself. line: of the block's first byte, counted
    from 1; 0 where lines say nothing. first: whether the layer begins here.
    """

    name: str
    where: str
    block: bytes
    line: int
    first: bool


class Unopened(NamedTuple):
    """A layer that could not be opened, or not to its end."""

    where: str
    why: str


def opened(path: Path) -> Iterator[Piece | Unopened]:
    """A file in pieces, then what is packed in it. Of safetensors the header alone: the rest is numbers."""
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            yield Piece(path.name, "", safetensors_header(path), 1, True)
            return
        opener = _Opener(max(SMALLEST, RATIO * path.stat().st_size))
        yield from opener.layer(file, path.name, "", 0)


def safetensors_header(path: Path) -> bytes:
    """The header of a safetensors file, of at most 128 MiB."""
    with path.open("rb") as file:
        size = file.read(8)
        return file.read(min(struct.unpack("<Q", size)[0], 1 << 27)) if len(size) == 8 else b""


class _TooLarge(Exception):
    """It opens to more than it may."""


class _Opener:
    """Opens layer after layer. left: bytes that may still come out."""

    def __init__(self, left: int) -> None:
        self.left = self.allowed = left

    def layer(
        self, file: BinaryIO, name: str, where: str, depth: int, lines: bool = True
    ) -> Iterator[Piece | Unopened]:
        start = file.read(512)
        file.seek(0)
        runs: list[int] = []
        for piece, offset in _pieces(file, name, where, lines):
            yield piece
            if b"H4sI" in piece.block:
                runs += [offset + run.start() for run in _GZIP_IN_BASE64.finditer(piece.block)]
        try:
            yield from self._inside(file, start, name, where, depth)
            for run in dict.fromkeys(runs):
                yield from self._unpacked(_gunzipped(_decoded(file, run)), name, where, "gzip in base64", depth, False)
        except _TooLarge:
            yield Unopened(where, f"it opens to more than {self.allowed >> 20:,} MiB")

    def _inside(self, file: BinaryIO, start: bytes, name: str, where: str, depth: int) -> Iterator[Piece | Unopened]:
        kind = next((kind for mark, kind in CLOSED.items() if start.startswith(mark)), None)
        if kind is not None or name.lower().endswith(CLOSED_NAMES):
            yield Unopened(where, f"{kind or 'by its name'}, which is not opened here")
            return
        for mark, kind in COMPRESSED.items():
            if start.startswith(mark):
                parts = _decompressed(kind, file)
                yield from self._unpacked(parts, name.rpartition(".")[0] or name, where, kind, depth, True)
        if _is_tar(start):
            yield from self._guarded(self._tar(file, where, depth), where, depth)
        if start.startswith(b"PK\x03\x04") or _holds_zip(file):
            yield from self._guarded(self._zip(file, where, depth), where, depth)
        if reader := _table_reader(start):
            yield from self._guarded(self._table(reader(file), name, where, depth), where, depth)

    def _guarded(self, found: Iterator[Piece | Unopened], where: str, depth: int) -> Iterator[Piece | Unopened]:
        if depth == DEEPEST:
            yield Unopened(where, f"packed more than {DEEPEST} times")
            return
        try:
            yield from found
        except _TooLarge:
            raise
        except Exception as error:  # readers of archives and tables raise whatever a broken file makes them raise
            yield Unopened(where, _failed(error))

    def _unpacked(
        self, parts: Iterator[bytes], name: str, where: str, kind: str, depth: int, must_open: bool
    ) -> Iterator[Piece | Unopened]:
        """A stream as a layer of its own. must_open: else what does not open is no such stream, and passes."""
        if depth == DEEPEST:
            yield Unopened(where, f"packed more than {DEEPEST} times")
            return
        inside = f"{where}, {kind}" if where else kind
        with _Spool() as spool:
            problem = self._fill(spool, parts)
            if spool.size:
                yield from self.layer(spool.file, name, inside, depth + 1)
        if problem and must_open:
            yield Unopened(inside, problem)

    def _fill(self, spool: _Spool, parts: Iterable[bytes]) -> str:
        """Put a stream's bytes into the spool, as far as they come; why they ended early, if they did."""
        try:
            for part in parts:
                self._take(len(part))
                spool.write(part)
        except _TooLarge:
            raise
        except Exception as error:  # as above
            return _failed(error)
        finally:
            spool.file.seek(0)
        return ""

    def _take(self, n_bytes: int) -> None:
        self.left -= n_bytes
        if self.left < 0:
            raise _TooLarge

    def _tar(self, file: BinaryIO, where: str, depth: int) -> Iterator[Piece | Unopened]:
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if member.isfile() and (stream := archive.extractfile(member)) is not None:
                    yield from self._member(stream, member.name, where, depth)

    def _zip(self, file: BinaryIO, where: str, depth: int) -> Iterator[Piece | Unopened]:
        with zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                if not info.is_dir():
                    with archive.open(info) as stream:
                        yield from self._member(stream, info.filename, where, depth)

    def _member(self, stream: Any, name: str, where: str, depth: int) -> Iterator[Piece | Unopened]:
        inside = f"{where}, {one_line(name, 80)}" if where else one_line(name, 80)
        with _Spool() as spool:
            problem = self._fill(spool, _parts(stream))
            yield from self.layer(spool.file, name.rpartition("/")[2], inside, depth + 1)
        if problem:
            yield Unopened(inside, problem)

    def _table(self, batches: Iterator[Any], name: str, where: str, depth: int) -> Iterator[Piece | Unopened]:
        for batch in batches:
            self._take(batch.nbytes)
            for field, column in zip(batch.schema, batch.columns, strict=True):
                if not _has_text(field.type):
                    continue
                inside = f"{where}, column {one_line(field.name, 80)}".lstrip(", ")
                texts = b"\n".join(_texts(column.to_pylist()))
                yield from self.layer(io.BytesIO(texts), name, inside, depth + 1, lines=False)


class _Spool:
    """A file to write and to read again: in memory while it is small."""

    def __init__(self) -> None:
        self.file: BinaryIO = io.BytesIO()
        self.size = 0

    def __enter__(self) -> _Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, part: bytes) -> None:
        if self.size <= BLOCK < self.size + len(part):
            small = self.file
            self.file = tempfile.TemporaryFile()  # noqa: SIM115  closed with the spool
            self.file.write(small.getvalue())  # pyright: ignore[reportAttributeAccessIssue]
        self.file.write(part)
        self.size += len(part)


def _pieces(file: BinaryIO, name: str, where: str, lines: bool) -> Iterator[tuple[Piece, int]]:
    """A layer's blocks, each with the place of its first byte in the layer."""
    kept, line, offset, first = b"", 1, 0, True
    while (part := file.read(BLOCK)) or first:
        block = kept + part
        yield Piece(name, where, block, line if lines else 0, first), offset
        new = max(0, len(block) - OVERLAP)
        line, offset, kept, first = line + block.count(10, 0, new), offset + new, block[new:], False


def _failed(error: Exception) -> str:
    return f"{type(error).__name__} while it was read"


def _decompressed(kind: str, file: BinaryIO) -> Iterator[bytes]:
    file.seek(0)
    if kind == "xz":
        return _unxz(file)
    stream: Any = gzip.GzipFile(fileobj=file) if kind == "gzip" else bz2.BZ2File(file)
    return _parts(stream)


def _parts(stream: Any) -> Iterator[bytes]:
    """By `read1`, which gives what there is before it tells that there should be more."""
    return iter(lambda: stream.read1(PART), b"")


def _unxz(file: BinaryIO) -> Iterator[bytes]:
    """The streams of an .xz file, whose decoder may take 256 MiB and no more."""
    kept = b""
    while kept or (kept := file.read(PART)):
        decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY)
        while not decoder.eof:
            if decoder.needs_input:
                kept = kept or file.read(PART)
                if not kept:
                    raise EOFError("the stream ends early")
            yield decoder.decompress(kept, PART)
            kept = b""
        kept = decoder.unused_data.lstrip(b"\0")  # padding


def _decoded(file: BinaryIO, offset: int) -> Iterator[bytes]:
    """A run of base64 in a file."""
    file.seek(offset)
    kept = b""
    while part := file.read(PART):
        run = _BASE64.match(kept + part)
        text = run[0] if run else b""
        whole = len(text) - len(text) % 4
        yield base64.b64decode(text[:whole])
        if len(text) < len(kept) + len(part):
            return
        kept = text[whole:]


def _gunzipped(parts: Iterator[bytes]) -> Iterator[bytes]:
    decoder = zlib.decompressobj(31)
    for part in parts:
        while part:
            yield decoder.decompress(part, PART)
            part = decoder.unconsumed_tail


def _is_tar(start: bytes) -> bool:
    """By the check sum of its first header, which all kinds of tar have."""
    try:
        tarfile.TarInfo.frombuf(start, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _holds_zip(file: BinaryIO) -> bool:
    """Whether a zip stands after other bytes: its end alone may be there by accident."""
    if not zipfile.is_zipfile(file):
        return False
    try:
        zipfile.ZipFile(file).close()
    except zipfile.BadZipFile:
        return False
    return True


def _table_reader(start: bytes) -> Callable[[BinaryIO], Iterator[Any]] | None:
    if start.startswith(b"PAR1"):
        return _parquet
    if start.startswith(b"ARROW1"):
        return _arrow_file
    if start.startswith(b"\xff\xff\xff\xff") and 0 < int.from_bytes(start[4:8], "little") < 1 << 24:
        return _arrow_stream
    return None


def _parquet(file: BinaryIO) -> Iterator[Any]:
    import pyarrow.parquet

    file.seek(0)
    table = pyarrow.parquet.ParquetFile(file)
    names = [field.name for field in table.schema_arrow if _has_text(field.type)]
    if names:
        yield from table.iter_batches(ROWS, columns=names)


def _arrow_file(file: BinaryIO) -> Iterator[Any]:
    import pyarrow.ipc

    file.seek(0)
    reader = pyarrow.ipc.open_file(file)
    yield from (reader.get_batch(number) for number in range(reader.num_record_batches))


def _arrow_stream(file: BinaryIO) -> Iterator[Any]:
    import pyarrow

    file.seek(0)
    try:
        reader = pyarrow.ipc.open_stream(file)
    except (OSError, ValueError):  # numbers that begin like one
        return
    yield from reader


def _has_text(kind: Any) -> bool:
    """Whether an Arrow type is one of texts or bytes, or holds one."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return _has_text(kind.value_type)
    if kind.num_fields:
        return any(_has_text(kind.field(number).type) for number in range(kind.num_fields))
    return any(word in str(kind) for word in ("string", "binary", "json"))


def _texts(values: Iterable[Any]) -> Iterator[bytes]:
    """All texts of a column; those of a list also side by side, as the tokens of a text."""
    for value in values:
        if isinstance(value, bytes):
            yield value
        elif isinstance(value, str):
            yield value.encode("utf-8", "replace")
        elif isinstance(value, dict):
            yield from _texts(value.values())
        elif isinstance(value, list | tuple):
            inner = list(_texts(value))
            yield from inner
            if len(inner) > 1:
                yield b"".join(inner)
