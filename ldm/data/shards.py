"""Find tar shards, index them by their headers alone, and read single members by offset."""

import glob
import hashlib
import os
import re
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from braceexpand import braceexpand
from PIL import UnidentifiedImageError

from ldm.data.decoding import DECODERS as DECODERS
from ldm.data.decoding import IMAGE_SUFFIXES as IMAGE_SUFFIXES
from ldm.data.decoding import MAX_BYTES as MAX_BYTES
from ldm.data.decoding import MAX_PIXELS as MAX_PIXELS
from ldm.data.decoding import SUFFIXES as SUFFIXES
from ldm.data.decoding import CorruptSampleError as CorruptSampleError
from ldm.data.decoding import UnreachableError, fault_kind
from ldm.data.decoding import check_size as check_size
from ldm.data.decoding import decode_image as decode_image
from ldm.data.decoding import decode_json as decode_json
from ldm.data.decoding import decode_moments as decode_moments

BLOCK = 512
# Bytes of a header that only says a long name; a larger one is no name.
MAX_EXTENSION = 2**20
# webdataset's own rule: the key is the path up to the first dot of its last part.
_MEMBER = re.compile(r"^((?:.*/)?[^./]+)\.([^/]+)$")


# The type flags of regular files.
REGULAR = (b"0", b"\0")


class BrokenTarError(ValueError):
    """A file is not a whole tar; `kind` is empty_file, not_a_tar, broken_tar or truncated_tar.

    `member` is the name of the one inside which the file ends, where it can be read.
    """

    def __init__(self, message: str, *, kind: str, member: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.member = member


@dataclass(frozen=True)
class ShardIndex:
    """Where everything in one shard lies.

    `offsets` and `sizes` are int64 (num_samples, len(suffixes)), in bytes from the start of the file; a size of -1
    says that a sample has no member of that suffix. Where the index is kept beside the shard, `stamp` is what it is
    found again by, and `rows` says which of its samples were chosen, int (num_samples,); None: all.
    """

    path: Path
    keys: tuple[str, ...]
    suffixes: tuple[str, ...]
    offsets: np.ndarray
    sizes: np.ndarray
    stamp: tuple[int, int] | None = None
    rows: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def members(self, sample: int) -> dict[str, tuple[int, int]]:
        """Return the (offset, size) of every member of a sample by its suffix."""
        pairs = zip(self.suffixes, self.offsets[sample].tolist(), self.sizes[sample].tolist(), strict=True)
        return {suffix: (offset, size) for suffix, offset, size in pairs if size >= 0}

    def has_any(self, suffixes: Iterable[str]) -> np.ndarray:
        """Say for every sample, bool (num_samples,), whether it has a member of any of the suffixes."""
        columns = [self.suffixes.index(suffix) for suffix in suffixes if suffix in self.suffixes]
        return np.asarray((self.sizes[:, columns] >= 0).any(axis=1))

    def select(self, rows: np.ndarray) -> "ShardIndex":
        """Return the index of these samples alone, int64 (n,), in this order."""
        keys = tuple(self.keys[row] for row in rows.tolist())
        chosen = (rows if self.rows is None else self.rows[rows]).astype(np.int32)
        return ShardIndex(self.path, keys, self.suffixes, self.offsets[rows], self.sizes[rows], self.stamp, chosen)

    @property
    def digest(self) -> str:
        """Say in 16 hex digits which samples these are, wherever the file lies: keys, suffixes, offsets and sizes."""
        digest = hashlib.blake2b(digest_size=8)
        for part in ("\0".join(self.keys), "\0".join(self.suffixes)):
            digest.update(part.encode("utf-8", errors="surrogateescape") + b"\n")
        for array in (self.offsets, self.sizes):
            digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
        return digest.hexdigest()


def resolve_shards(shards: str | os.PathLike[str] | Sequence[str]) -> list[Path]:
    """Return the tar files that a folder, a path, a brace expression, a glob, or a list of these names.

    Raises FileNotFoundError where nothing is found and ValueError for a URL or a pipe.
    """
    if isinstance(shards, str | os.PathLike):
        shards = [os.fspath(shards)]
    paths = [path for text in shards for pattern in braceexpand(str(text)) for path in _expand(pattern)]
    repeated = {path for path in paths if paths.count(path) > 1} if len(set(paths)) < len(paths) else set()
    if repeated:
        raise ValueError(f"shards: got {min(repeated)} more than once, expected every shard once")
    if not paths:
        raise FileNotFoundError("shards: got an empty list, expected at least one tar file or folder")
    return paths


def _expand(pattern: str) -> list[Path]:
    if pattern.startswith("pipe:") or "://" in pattern:
        raise ValueError(f"shards: got {pattern}, expected local tar files; copy remote shards to a folder first")
    if Path(pattern).is_dir():
        found = sorted(Path(pattern).glob("*.tar"))
    elif glob.has_magic(pattern):
        found = sorted(map(Path, glob.glob(pattern)))  # noqa: PTH207 (Path.glob takes no absolute pattern)
    else:
        found = [Path(pattern)] if Path(pattern).is_file() else []
    if not found:
        raise FileNotFoundError(
            f"shards: got {pattern}, where there is no tar file, expected shards that `ldm shard` or img2dataset wrote"
        )
    return found


def index_shard(path: str | os.PathLike[str], *, suffixes: Sequence[str] = SUFFIXES) -> ShardIndex:
    """Read the headers of a tar and return where each sample's members lie, samples in order of first appearance.

    Raises ValueError for a file that is not a tar, is cut off, or holds one member twice.
    """
    path = Path(path)
    return index_members(path, scan_members(path), suffixes=suffixes)


def index_members(
    path: Path, members: Iterable[tuple[str, int, int]], *, suffixes: Sequence[str] = SUFFIXES
) -> ShardIndex:
    """Return where each sample's members lie, out of (name, offset, size); raises ValueError for one that is twice."""
    rows: dict[str, dict[str, tuple[int, int]]] = {}
    for name, offset, size in members:
        key, suffix = split_name(name)
        if suffix not in suffixes:
            continue
        row = rows.get(key)
        if row is None:
            row = rows[key] = {}
        if suffix in row:
            raise ValueError(f"{path}: got {key}.{suffix} twice, expected each key once; write the shard again")
        row[suffix] = (offset, size)
    found = set().union(*rows.values())
    present = tuple(suffix for suffix in suffixes if suffix in found)
    flat = [number for row in rows.values() for suffix in present for number in row.get(suffix, (0, -1))]
    places = np.array(flat, dtype=np.int64).reshape(len(rows), len(present), 2)
    return ShardIndex(path, tuple(rows), present, places[..., 0], places[..., 1])


def split_name(name: str) -> tuple[str, str]:
    """Return the key and the suffix, in lower case, of a member's name; the suffix is "" where there is no key."""
    match = _MEMBER.match(name)
    return (match[1], match[2].lower()) if match else (name, "")


def scan_members(path: Path) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset, size) of every regular file in a tar; raises BrokenTarError as `scan_entries` does."""
    for kind, name, offset, size in scan_entries(path):
        if kind in REGULAR:
            yield name, offset, size


def scan_entries(path: Path) -> Iterator[tuple[bytes, str, int, int]]:
    """Yield (type flag, name, offset, size) of every member of a tar: ustar, GNU long names and pax paths and sizes.

    Raises BrokenTarError where the file is not a tar or ends inside a member.
    """
    with path.open("rb") as stream:
        descriptor, end, place = stream.fileno(), os.fstat(stream.fileno()).st_size, 0
        override: dict[str, str] = {}
        if not end:
            raise BrokenTarError(f"{path}: got an empty file, expected a tar; write the shard again", kind="empty_file")
        while place < end:
            header = os.pread(descriptor, BLOCK, place)
            if header[0] == 0 and not header.strip(b"\0"):
                return
            kind, name, size = _parse_header(header, path=path, place=place)
            if "size" in override:
                size = int(override["size"])
            data, place = place + BLOCK, place + BLOCK + -(-size // BLOCK) * BLOCK
            if size < 0 or data + size > end:
                raise BrokenTarError(
                    f"{path}: got a file cut off inside {name}, expected a whole tar; copy it again",
                    kind="truncated_tar",
                    member=override.get("path", name) if kind in REGULAR else "",
                )
            if kind in (b"x", b"L"):
                if size > MAX_EXTENSION:
                    raise _broken(path, data)
                try:
                    override |= _parse_extension(kind, os.pread(descriptor, size, data))
                except ValueError as error:
                    raise _broken(path, data) from error
                continue
            if kind == b"g":
                continue
            yield kind, override.get("path", name) if override else name, data, size
            override = {}


def _parse_header(header: bytes, *, path: Path, place: int) -> tuple[bytes, str, int]:
    """Return the type flag, name and size that a header states, after checking its sum."""
    try:
        # The sum is taken with its own eight bytes read as spaces (POSIX.1-1988). The low half of Adler-32 is one more
        # than the sum of all bytes modulo 65521, and many times as fast as `sum`.
        stated = _parse_number(header[148:156]) + sum(header[148:156]) - 8 * 32 + 1
        valid = len(header) == BLOCK and zlib.adler32(header) & 0xFFFF == stated % 65521
        size = _parse_number(header[124:136])
    except (ValueError, IndexError):
        valid = False
    if not valid:
        raise _broken(path, place, is_cut=len(header) < BLOCK)
    name = _text(header[:100])
    if header[345] and header[257:263] == b"ustar\0":
        name = f"{_text(header[345:500])}/{name}"
    return header[156:157], name, size


def _broken(path: Path, place: int, *, is_cut: bool = False) -> BrokenTarError:
    message = f"{path}: got no tar header at byte {place}, expected an uncompressed tar; write it again"
    kind = "not_a_tar" if place == 0 else "truncated_tar" if is_cut else "broken_tar"
    return BrokenTarError(message, kind=kind)


def _parse_number(digits: bytes) -> int:
    if digits[0] & 0x80:  # GNU writes what octal digits cannot hold as a big-endian number
        return int.from_bytes(digits[1:], "big")
    return int(digits.strip(b"\0 ") or b"0", 8)


def _parse_extension(kind: bytes, content: bytes) -> dict[str, str]:
    """Return the path and size that a GNU long name (L) or a pax header (x) gives to the next member.

    Raises ValueError for a pax record whose length or size is no number of bytes.
    """
    if kind == b"L":
        return {"path": _text(content)}
    found = {}
    while content:
        length, _, _ = content.partition(b" ")
        if not 0 < int(length) <= len(content):
            raise ValueError(f"got a record of {int(length)} bytes, expected 1 to {len(content)}")
        record, content = content[len(length) + 1 : int(length) - 1], content[int(length) :]
        keyword, _, value = record.partition(b"=")
        found[_text(keyword)] = _text(value)
    if "size" in found:
        found["size"] = str(int(found["size"]))
    return {keyword: found[keyword] for keyword in ("path", "size") if keyword in found}


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", errors="surrogateescape")


class Opener(Protocol):
    """Opens files that may have to be fetched first; ldm.data.remote.ShardCache is one."""

    def open(self, path: Path) -> int:
        """Return a descriptor of a file."""
        ...


class ShardReader:
    """Reads byte ranges of many files with at most `limit` of them open; safe to copy into worker processes.

    `remote` opens them, where they are copies of remote files.
    """

    def __init__(self, limit: int = 64, *, remote: Opener | None = None) -> None:
        self.limit = limit
        self.remote = remote
        self._open: OrderedDict[Path, int] = OrderedDict()

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` on; raises CorruptSampleError where the file has become shorter."""
        content = os.pread(self._descriptor(path), size, offset)
        if len(content) != size:
            raise CorruptSampleError(f"{path}: got {len(content)} bytes at {offset}, expected {size}")
        return content

    def close(self) -> None:
        """Close every open file; reading opens them again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {"limit": self.limit, "remote": self.remote, "_open": OrderedDict()}

    def __del__(self) -> None:
        if os is not None:  # else Python itself is ending, and closes what is open
            self.close()

    def _descriptor(self, path: Path) -> int:
        if path not in self._open:
            if len(self._open) >= self.limit:
                os.close(self._open.popitem(last=False)[1])
            self._open[path] = self.remote.open(path) if self.remote else os.open(path, os.O_RDONLY)
        self._open.move_to_end(path)
        return self._open[path]


def decode(
    index: ShardIndex,
    sample: int,
    reader: ShardReader,
    *,
    suffixes: Iterable[str],
    decoders: Mapping[str, Callable[[bytes], Any]] = DECODERS,
) -> dict[str, Any]:
    """Read and decode the members of a sample that have one of the suffixes, by suffix.

    Raises CorruptSampleError, naming shard, key, member and kind of fault, for whatever cannot be decoded, and
    UnreachableError for a remote shard that cannot be fetched.
    """
    members, decoded = index.members(sample), {}
    for suffix in suffixes:
        if suffix not in members:
            continue
        try:
            check_size(suffix, members[suffix][1])
            decoded[suffix] = decoders[suffix](reader.read(index.path, *members[suffix]))
        except UnreachableError:
            raise
        except Exception as error:  # the data's edge: whatever a decoder raises, the user needs shard and key
            where = f"{index.path}: {index.keys[sample]}.{suffix}"
            # Pillow's own words for what is no image hold an address in memory.
            text = "got no JPEG, PNG or WebP" if isinstance(error, UnidentifiedImageError) else str(error)
            message = f"{where} cannot be decoded ({text}); write the shard again"
            raise CorruptSampleError(message, kind=fault_kind(suffix, error), reason=f".{suffix}: {text}") from error
    return decoded
