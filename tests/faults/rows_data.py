"""Rows 15 to 21, 23 and 31: shards that are damaged, hostile or not what they were."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

from tests.faults.bench_child import Outcome, Setting, samples_seen, steps_seen
from tests.faults.bench_row import Result, row

TOLERANT = "data.max_bad_fraction=0.5"
MEGABYTE = 2**20


def sample(key: str, **changed: bytes | None) -> list[tuple[str, bytes]]:
    """A good sample whose caption the toy knows, some of its members changed or, where None, left out."""
    import fault_shards

    return fault_shards.good(key, **{"txt": b"red", **changed})


def shard(folder: Path, samples: list[list[tuple[str, bytes]]], name: str = "00000.tar") -> Path:
    """Writes samples into a shard; returns the folder."""
    import fault_shards

    folder.mkdir(parents=True, exist_ok=True)
    fault_shards.write_tar(folder / name, [member for members in samples for member in members])
    return folder


def ledger(run: Path) -> list[dict[str, Any]]:
    """What a run found bad."""
    path = run / "bad_samples.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def twice(setting: Setting, folder: Path, *words: str) -> tuple[Outcome, bool, list[dict[str, Any]]]:
    """Trains on shards, and once more with a kill on the way: how it ended, whether both had the same samples and wrote
    the same ledger without repeating a line, and that ledger."""
    common = [f"data.train={folder}", *words]
    first = setting.train("run_id=first", *common)
    setting.train("run_id=again", *common, "callback.fault.kind=SIGKILL", "callback.fault.at=10")
    second = setting.train("run_id=again", *common)
    if first.code or second.code:
        return first if first.code else second, False, ledger(setting.run_of("first"))
    one, other = setting.run_of("first"), setting.run_of("again")
    lines = [[(line["shard"], line["key"], line["kind"]) for line in ledger(run)] for run in (one, other)]
    same = samples_seen(one) == samples_seen(other) and sorted(lines[0]) == sorted(lines[1])
    return second, same and len(set(lines[1])) == len(lines[1]), ledger(one)


@row(
    15,
    "a shard is cut off: inside a member, a header or a sample, and while it is read",
    must_hold="no sample in part; what is gone is counted and another stands in for it, the same one in every run",
    stock="the sample inside the cut passes as a good one, in part",
)
def cut_off(setting: Setting) -> Result:
    folder = shard(setting.folder / "cut", [sample(f"s{i:02d}") for i in range(12)])
    shard(folder, [sample(f"t{i:02d}") for i in range(12)], "00001.tar")
    path = folder / "00000.tar"
    os.truncate(path, path.stat().st_size // 2 + 700)
    outcome, same, lines = twice(setting, folder, TOLERANT)
    counted = [line["kind"] for line in lines] == ["truncated_tar"] and "samples before the cut" in lines[0]["reason"]
    whole = shard(setting.folder / "whole", [sample(f"w{i:02d}") for i in range(8)]) / "00000.tar"
    parts = {name: setting.call(lambda place=place: read_up_to(whole, place)) for name, place in cuts(whole).items()}
    in_part = [name for name, read in parts.items() if set(read["captions"]) != {"red"} or not read["faults"]]
    live = shard(setting.folder / "live", [sample(f"s{i:02d}") for i in range(24)])
    child = setting.start(*setting.words("run_id=live", f"data.train={live}", TOLERANT, "callback.fault.pace=0.05"))
    child.until(lambda: steps_seen(setting.run_of("live")))
    os.truncate(live / "00000.tar", (live / "00000.tar").stat().st_size // 2)
    while_running, gone = child.wait(), ledger(setting.run_of("live"))
    named = len(gone) > 3 and all(line["key"] and line["shard"].endswith("00000.tar") for line in gone)
    held = outcome.code == 0 and same and counted and while_running.code == 0 and named and not in_part
    figure = (
        f"cut before: {len(lines)} line, runs equal {same}, {len(in_part)} of {len(parts)} cuts left a part; while "
        f"running: {len(gone)} samples replaced and named"
    )
    details = {"said": outcome.text[-600:], "running": while_running.text[-600:], "lines": lines, "cuts": parts}
    return Result(held, figure, details)


def cuts(path: Path) -> dict[str, int]:
    """Places to cut a shard at, whose samples have a picture, a caption and a json each."""
    import tarfile

    with tarfile.open(path) as tar:
        members = tar.getmembers()
    picture, caption, json_member = members[15:18]
    return {
        "inside a picture": picture.offset_data + picture.size // 2,
        "between picture and caption": caption.offset,
        "inside a header": caption.offset + 200,
        "between caption and json": json_member.offset,
        "behind a sample": members[18].offset,
    }


def read_up_to(path: Path, place: int) -> dict[str, Any]:
    """The captions that are read of a shard that is cut there, and what is said to be wrong with it."""
    from ldm.data import ShardDataModule

    folder = path.parent / f"cut-{place}"
    folder.mkdir()
    (folder / path.name).write_bytes(path.read_bytes()[:place])
    data = ShardDataModule(folder, folder, batch_size=1, resolution=16, max_bad_fraction=1.0)
    captions = [caption for batch in data.iterate_once("validation", 1) for caption in batch["caption"]]
    return {"captions": captions, "faults": [line["kind"] for line in data.ledger.lines.values()]}


@row(
    16,
    "pictures that cannot be decoded: half a JPEG, garbage, none at all",
    must_hold="another stands in for each; a ledger line with shard, key and reason; too many end the run, exit 1",
    stock="DecodingError without a text, or a silently smaller data set",
)
def corrupt_pictures(setting: Setting) -> Result:
    import fault_shards

    whole = fault_shards.encode(fault_shards.noise(size=(64, 64)), "JPEG")
    bad = {"half": whole[: len(whole) // 2], "garbage": bytes(range(256)) * 4, "empty": b""}
    samples = [sample(f"s{i:02d}") for i in range(24)] + [sample(key, jpg=jpg) for key, jpg in bad.items()]
    folder = shard(setting.folder / "bad", samples)
    outcome, same, lines = twice(setting, folder, TOLERANT)
    keys = sorted(line["key"] for line in lines)
    told = all(line["reason"] and line["shard"].endswith("00000.tar") for line in lines)
    strict = setting.train("run_id=strict", f"data.train={folder}", "data.max_bad_fraction=0.05")
    ended = strict.code == 1 and len(strict.errors) == 1 and "00000.tar" in strict.errors[0]
    held = outcome.code == 0 and same and keys == sorted(bad) and told and ended
    figure = f"{len(lines)} of 3 in the ledger, runs equal {same}; above data.max_bad_fraction: exit {strict.code}"
    return Result(held, figure, {"lines": lines, "said": strict.errors or strict.text[-500:]})


@row(
    17,
    "a sample has no caption",
    must_hold="by policy: trained on with the empty caption, or left out and counted",
    stock="by pipeline: ValueError, or silently gone",
)
def no_caption(setting: Setting) -> Result:
    samples = [sample(f"s{i:02d}") for i in range(22)] + [sample(key, txt=None) for key in ("mute0", "mute1")]
    folder = shard(setting.folder / "mute", samples)
    empty = setting.train("run_id=empty", f"data.train={folder}", TOLERANT)
    trained = {index for found in samples_seen(setting.run_of("empty")).values() for _, index in _pairs(found)}
    outcome, same, lines = twice(setting, folder, TOLERANT, "data.missing_caption=skip")
    keys = sorted(line["key"] for line in lines)
    held = empty.code == 0 and {22, 23} <= trained and not ledger(setting.run_of("empty"))
    held &= outcome.code == 0 and same and keys == ["mute0", "mute1"]
    return Result(
        held, f"empty: trained on, 0 counted; skip: {len(lines)} counted, runs equal {same}", {"lines": lines}
    )


def _pairs(found: str) -> list[tuple[int, int]]:
    import ast

    pairs: list[tuple[int, int]] = ast.literal_eval(found)
    return pairs


@row(
    18,
    "text that is not UTF-8, json that is none",
    must_hold="by policy: left out and counted, or replaced",
    stock="DecodingError",
)
def bad_text(setting: Setting) -> Result:
    samples = [sample(f"s{i:02d}") for i in range(22)]
    # Without a .txt the caption is the json's, which is therefore read.
    samples += [sample("latin", txt="réd".encode("latin-1")), sample("broken", txt=None, json=b'{"caption": "r')]
    folder = shard(setting.folder / "text", samples)
    outcome, same, lines = twice(setting, folder, TOLERANT)
    replaced = setting.train("run_id=replaced", f"data.train={folder}", TOLERANT, "data.bad_text=replace")
    kinds = sorted((line["key"], line["kind"]) for line in lines)
    held = outcome.code == 0 and same and kinds == [("broken", "broken_json"), ("latin", "not_utf8")]
    held &= replaced.code == 0 and not ledger(setting.run_of("replaced"))
    figure = f"skip: {len(lines)} counted, runs equal {same}; replace: exit {replaced.code}, none lost"
    return Result(held, figure, {"lines": lines, "said": replaced.text[-500:]})


@row(
    19,
    "a shard without samples, of no bytes, or a web page in its place",
    must_hold="each is named in one line and refused, or by setting left out and counted",
    stock="ValueError: perhaps fewer shards than workers; or 0 samples",
)
def no_shards(setting: Setting) -> Result:
    folder = shard(setting.folder / "none", [sample(f"s{i:02d}") for i in range(24)])
    shard(folder, [], "00001.tar")
    (folder / "00002.tar").write_bytes(b"")
    (folder / "00003.tar").write_bytes(b"<!DOCTYPE html><html><body>502 Bad Gateway</body></html>")
    refused = setting.train("run_id=refused", f"data.train={folder}")
    line = "".join(refused.errors)
    skipped = setting.train(
        "run_id=skipped", f"data.train={folder}", "data.bad_shards=skip", "data.max_bad_fraction=0.9"
    )
    counted = {Path(one["shard"]).name for one in ledger(setting.run_of("skipped"))}
    named = all(name in line for name in ("00002.tar", "00003.tar")) and len(refused.errors) == 1
    validated = setting.ldm("data", "validate", f"shards={folder}")
    found = validated.code == 1 and all(name in validated.text for name in ("00001.tar", "00002.tar", "00003.tar"))
    held = refused.code in (1, 2) and named and skipped.code == 0 and {"00002.tar", "00003.tar"} <= counted and found
    figure = (
        f"refused with exit {refused.code} in {len(refused.errors)} line; skip: {sorted(counted)}; validate: {found}"
    )
    return Result(held, figure, {"said": refused.errors, "skipped": skipped.text[-500:]})


@row(
    20,
    "keys that are there twice, or whose members lie apart",
    must_hold="refused or put together again; no wrong pair",
    stock="12 samples out of 10, no error",
)
def mixed_keys(setting: Setting) -> Result:
    import fault_shards

    shades = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255)]

    def solid(number: int) -> list[tuple[str, bytes]]:
        from PIL import Image

        picture = fault_shards.encode(Image.new("RGB", (16, 16), shades[number]))
        return [(f"k{number}.png", picture), (f"k{number}.txt", str(shades[number]).encode())]

    members = [solid(number) for number in range(5)]
    apart = [pair[0] for pair in members] + [pair[1] for pair in reversed(members)]
    folder, again = setting.folder / "apart", setting.folder / "twice"
    for place, content in ((folder, apart), (again, [*apart, members[2][0]])):
        place.mkdir()
        fault_shards.write_tar(place / "00000.tar", content)

    def pairs() -> dict[str, int]:
        from ldm.data import ShardDataModule

        data = ShardDataModule(folder, folder, batch_size=1, resolution=16)
        wrong = read = 0
        for batch in data.iterate_once("validation", 1):
            mean = ((batch["image"][0].mean((1, 2)) + 1) * 127.5).round().int().tolist()
            wrong, read = wrong + (str(tuple(mean)) != batch["caption"][0]), read + 1
        return {"wrong": wrong, "read": read}

    found = setting.call(pairs)
    refused = setting.train("run_id=twice", f"data.train={again}")
    said = refused.code in (1, 2) and len(refused.errors) == 1 and "k2.png" in refused.errors[0]
    figure = f"apart: {found['wrong']} wrong pairs of {found['read']}; twice: refused with exit {refused.code}, by key"
    return Result(found == {"wrong": 0, "read": 5} and said, figure, {"said": refused.errors or refused.text[-400:]})


@row(
    21,
    "a picture of 169 megapixels, a gzip of 200 MB, a json of 100 MB",
    must_hold="refused before they are decoded, memory up by less than 50 MB",
    stock="1.8 GB and 3.1 GB of memory",
)
def bombs(setting: Setting) -> Result:
    import fault_shards

    huge = b'{"a": "' + b"x" * (100 * MEGABYTE) + b'"}'
    samples = [sample(f"s{i:02d}") for i in range(6)]
    samples += [sample("picture", jpg=None, png=fault_shards.image_bomb()), sample("json", txt=None, json=huge)]
    samples += [[*sample("gzip"), ("gzip.txt.gz", fault_shards.gzip_bomb())]]
    folder = shard(setting.folder / "bombs", samples)
    del huge, samples

    def grown() -> dict[str, Any]:
        from ldm.data import ShardDataModule

        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _peak()
        data = ShardDataModule(folder, folder, batch_size=3, resolution=16, max_bad_fraction=1.0)
        read = [caption for batch in data.iterate_once("validation", 3) for caption in batch["caption"]]
        return {"megabytes": (_peak() - before) / MEGABYTE, "read": len(read), "bad": _keys(data)}

    found = setting.call(grown)
    held = found["megabytes"] < 50 and found["read"] == 7 and found["bad"] == ["json", "picture"]
    figure = f"memory up by {found['megabytes']:.0f} MB; refused {found['bad']}; gzip left unread"
    return Result(held, figure, found)


def _peak() -> int:
    """The largest resident memory of this process since its peak was last reset, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _keys(data: Any) -> list[str]:
    return sorted({line["key"] for line in data.ledger.lines.values()})


@row(
    23,
    "the shards are not those of the checkpoint",
    must_hold="refused in one line that says what differs; a setting allows it",
    stock="goes on with other data",
)
def other_shards(setting: Setting) -> Result:
    folder = shard(setting.folder / "mine", [sample(f"s{i:02d}") for i in range(12)])
    shard(folder, [sample(f"t{i:02d}") for i in range(12)], "00001.tar")
    words = [f"data.train={folder}", "run_id=mine"]
    setting.train(*words, "callback.fault.kind=SIGKILL", "callback.fault.at=10")
    shard(folder, [sample(f"u{i:02d}") for i in range(13)], "00001.tar")
    refused = setting.train(*words)
    allowed = setting.train(*words, "data.allow_change=true")
    line = "".join(refused.errors)
    differs = "00001.tar" in line
    held = refused.code == 2 and len(refused.errors) == 1 and differs and allowed.code == 0
    figure = f"refused with exit {refused.code}, shard named: {differs}; allowed: exit {allowed.code}"
    return Result(held, figure, {"said": refused.errors or refused.text[-400:], "allowed": allowed.text[-400:]})


@row(
    31,
    "grey, RGBA, palette, CMYK, 16 bits, 1x1, long and thin, turned by EXIF, animated, WebP",
    must_hold="(3, R, R) in [-1, 1] and upright, or left out and counted",
    stock="mixed",
)
def formats(setting: Setting) -> Result:
    import fault_shards
    import numpy as np
    from PIL import Image

    encode, noise = fault_shards.encode, fault_shards.noise
    grey16 = Image.fromarray((np.arange(64 * 64).reshape(64, 64) * 16).astype("uint16"))
    pictures: dict[str, tuple[str, bytes]] = {
        "rgb": ("jpg", encode(noise(), "JPEG")),
        "grey": ("jpg", encode(noise("L"), "JPEG")),
        "grey_alpha": ("png", encode(noise("LA"))),
        "rgba": ("png", encode(noise("RGBA"))),
        "palette": ("png", encode(noise().quantize(8))),
        "one_bit": ("png", encode(noise("L").convert("1"))),
        "cmyk": ("jpg", encode(noise("CMYK"), "JPEG")),
        "grey_16": ("png", encode(grey16)),
        "rgb_16": ("png", fault_shards.sixteen_bit_colours()),
        "one_pixel": ("png", encode(noise(size=(1, 1)))),
        "long": ("png", encode(noise(size=(300, 2)))),
        "turned": ("jpg", fault_shards.sideways()),
        "animated": ("webp", fault_shards.animated()),
        "webp": ("webp", encode(noise(), "WEBP")),
    }
    samples = [sample(key, **{"jpg": None, end: content}) for key, (end, content) in pictures.items()]
    folder = shard(setting.folder / "formats", samples)

    def read() -> dict[str, Any]:
        import torch

        from ldm.data import ShardDataModule

        data = ShardDataModule(folder, folder, batch_size=1, resolution=16, max_bad_fraction=1.0)
        wrong, accepted = [], 0
        for batch in data.iterate_once("validation", 1):
            image, accepted = batch["image"], accepted + 1
            fine = image.shape == (1, 3, 16, 16) and image.dtype == torch.float32 and bool(image.isfinite().all())
            if not (fine and image.abs().max() <= 1):
                wrong.append(int(batch["index"]))
        return {"accepted": accepted, "wrong": wrong, "left_out": _keys(data)}

    found = setting.call(read)
    upright = setting.call(lambda: _stands(pictures["turned"][1]))
    held = not found["wrong"] and found["accepted"] + len(found["left_out"]) == len(pictures) and upright
    figure = (
        f"{found['accepted']}/{len(pictures)} accepted, left out: {found['left_out'] or 'none'}; upright: {upright}"
    )
    return Result(held and found["accepted"] >= 12, figure, found)


def _stands(content: bytes) -> bool:
    """Whether a picture that EXIF says to turn is decoded turned."""
    from PIL import Image, ImageOps

    from ldm.data.shards import decode_image

    with Image.open(io.BytesIO(content)) as image:
        turned = ImageOps.exif_transpose(image)
        lying = image.size
    return bool(decode_image(content).size == turned.size and turned.size != lying)
