"""Shards with every fault that a set from the web has, and which fault each of them is to be found with.

`write_fault_set(folder)` writes them all and returns the expected {(file name, key, kind)}.
"""

import gzip
import io
import json
import pickle
import struct
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

Members = Sequence[tuple[str, bytes]]
Expected = set[tuple[str, str, str]]

# Sizes of what is to be refused unread or undecoded; each would take hundreds of MB.
BOMB_SIDE = 13_000
JSON_BYTES = 40 * 2**20
INFLATED_BYTES = 200 * 2**20


class Touches:
    """An object whose unpickling creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


def write_tar(path: Path, members: Members) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def encode(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=image_format, **options)
    return stream.getvalue()


def noise(mode: str = "RGB", size: tuple[int, int] = (16, 12)) -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(), mode) if channels == 1 else Image.merge(mode, _bands(pixels))


def _bands(pixels: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(np.ascontiguousarray(band)) for band in np.moveaxis(pixels, -1, 0)]


def good(key: str, **changed: bytes | None) -> list[tuple[str, bytes]]:
    """The members of a good sample, some of them changed, added, or, where None, left out."""
    members: dict[str, bytes | None] = {
        "jpg": encode(noise(), "JPEG"),
        "txt": f"caption of {key}".encode(),
        "json": json.dumps({"key": key, "aesthetic": 5.5}).encode(),
    }
    return [(f"{key}.{suffix}", content) for suffix, content in (members | changed).items() if content is not None]


def image_bomb() -> bytes:
    """A PNG of 169 megapixels in some 20 kB: its pixels are one bit and all the same."""
    rows = zlib.compressobj(9)
    row = bytes(1 + -(-BOMB_SIDE // 8))
    data = b"".join(rows.compress(row) for _ in range(BOMB_SIDE)) + rows.flush()
    header = struct.pack(">IIBBBBB", BOMB_SIDE, BOMB_SIDE, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def sixteen_bit_colours() -> bytes:
    """A PNG of 2 x 2 pixels in colour with 16 bits a channel, which Pillow reads but cannot write."""
    rows = zlib.compress((b"\0" + struct.pack(">6H", *range(6))) * 2)
    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", rows) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def gzip_bomb() -> bytes:
    stream = io.BytesIO()
    with gzip.GzipFile(fileobj=stream, mode="wb", mtime=0) as packed:
        for _ in range(INFLATED_BYTES // 2**20):
            packed.write(bytes(2**20))
    return stream.getvalue()


def sideways() -> bytes:
    image = noise()
    exif = image.getexif()
    exif[0x0112] = 6
    return encode(image, "JPEG", exif=exif)


def animated() -> bytes:
    frames = [Image.new("RGB", (8, 8), shade) for shade in ("red", "blue")]
    return encode(frames[0], "WEBP", save_all=True, append_images=frames[1:])


def pickled_array(marker: Path) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([Touches(marker)], dtype=object), allow_pickle=True)
    return stream.getvalue()


def sample_faults(marker: Path) -> Iterator[tuple[str, Members]]:
    """Every (kind, members) of a sample whose key is the kind; unpickling any of them would create `marker`."""
    whole = encode(noise(size=(64, 64)), "JPEG")
    yield "broken_image", good("broken_image", jpg=whole[: len(whole) // 2])
    yield "no_image", good("no_image", jpg=None)
    yield "several_images", good("several_images", png=encode(noise()))
    yield "cmyk", good("cmyk", jpg=encode(noise("CMYK"), "JPEG"))
    yield "sixteen_bit", good("sixteen_bit", jpg=None, png=sixteen_bit_colours())
    yield "palette", good("palette", jpg=None, png=encode(noise().quantize(8)))
    yield "transparency", good("transparency", jpg=None, png=encode(noise("RGBA")))
    yield "exif_rotated", good("exif_rotated", jpg=sideways())
    yield "animated", good("animated", jpg=None, webp=animated())
    yield "tiny_image", good("tiny_image", jpg=encode(noise(size=(1, 1)), "JPEG"))
    yield "image_bomb", good("image_bomb", jpg=None, png=image_bomb())
    yield "missing_caption", good("missing_caption", txt=None)
    yield "not_utf8", good("not_utf8", txt="caption é".encode("latin-1"))
    yield "broken_json", good("broken_json", json=b'{"key": ')
    yield "oversized_member", good("oversized_member", json=b'{"a": "' + b"x" * JSON_BYTES + b'"}')
    yield "compressed_member", [*good("compressed_member"), ("compressed_member.txt.gz", gzip_bomb())]
    yield "unsafe_member", [*good("unsafe_member"), ("unsafe_member.pyd", pickle.dumps(Touches(marker)))]
    yield "dotted_key", [(name.replace(".", ".v2."), content) for name, content in good("dotted_key")]
    yield "broken_array", good("broken_array", jpg=None, npy=pickled_array(marker))


def write_fault_set(folder: Path, marker: Path) -> Expected:
    """Write a shard of faulty samples among good ones, and a shard for each fault of a whole shard.

    Returns the expected (file name, key, kind); the key is "" where it is the shard's fault.
    """
    expected: Expected = set()
    members: list[tuple[str, bytes]] = []
    for place, (kind, sample) in enumerate(sample_faults(marker)):
        members += [*sample, *good(f"good{place}")]
        expected.add(("00000.tar", kind, kind))
    write_tar(folder / "00000.tar", members)
    expected |= write_shard_faults(folder)
    return expected


def write_shard_faults(folder: Path) -> Expected:
    """Write the shards that are wrong as a whole, or in the order and the names of their members."""
    whole = write_tar(folder / "00001.tar", [*good("a"), *good("b")]).read_bytes()
    (folder / "00001.tar").write_bytes(whole[: len(whole) // 2 + 100])
    ends = whole.rstrip(b"\0")
    (folder / "00002.tar").write_bytes(ends + bytes(-len(ends) % 512))
    (folder / "00003.tar").write_bytes(b"")
    (folder / "00004.tar").write_bytes(b"<html><body>502 Bad Gateway</body></html>")
    (folder / "00005.tar").write_bytes(gzip.compress(whole))
    write_tar(folder / "00006.tar", [])
    write_tar(folder / "00007.tar", [*good("a"), ("a.txt", b"again")])
    first, second = good("a"), good("b")
    write_tar(folder / "00008.tar", [first[0], *second, *first[1:]])
    write_tar(folder / "00009.tar", good("../../up"))
    broken = bytearray(write_tar(folder / "00010.tar", [*good("a"), *good("b")]).read_bytes())
    with tarfile.open(folder / "00010.tar") as tar:
        place = tar.getmember("b.jpg").offset
    broken[place : place + 512] = b"?" * 512
    (folder / "00010.tar").write_bytes(broken)
    with tarfile.open(write_tar(folder / "00011.tar", good("a")), "a") as tar:
        link = tarfile.TarInfo("passwords.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return {
        ("00001.tar", "", "truncated_tar"),
        ("00002.tar", "", "no_end_marker"),
        ("00003.tar", "", "empty_file"),
        ("00004.tar", "", "not_a_tar"),
        ("00005.tar", "", "not_a_tar"),
        ("00006.tar", "", "no_samples"),
        ("00007.tar", "a", "repeated_member"),
        ("00008.tar", "a", "interleaved_key"),
        ("00009.tar", "../../up", "unsafe_key"),
        ("00010.tar", "", "broken_tar"),
        ("00011.tar", "passwords", "not_a_file"),
    }
