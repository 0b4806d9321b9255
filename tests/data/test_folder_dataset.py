import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data import ShardDataModule
from ldm.data.folder import write_folder


def save(path: Path, *, size: tuple[int, int] = (12, 8), mode: str = "RGB", caption: str | None = None, **options):
    path.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(len(path.name)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


def samples(folder: Path) -> list[tuple[dict, Image.Image]]:
    with tarfile.open(folder / "train" / "00000.tar") as tar:
        members = {entry.name: tar.extractfile(entry).read() for entry in tar}
    rows = [json.loads(content) for name, content in members.items() if name.endswith(".json")]
    return [(row, Image.open(io.BytesIO(members[f"{row['key']}.png"]))) for row in rows]


def test_a_picture_brings_the_caption_beside_it(tmp_path: Path) -> None:
    save(tmp_path / "in" / "b.png", caption="a bee\n")
    save(tmp_path / "in" / "a.jpg", caption="an ant")
    summary = write_folder(tmp_path / "out", images=tmp_path / "in", resolution=8)
    assert summary == {"train": 2, "dropped": {}, "examples": {}}
    assert [row["caption"] for row, _ in samples(tmp_path / "out")] == ["an ant", "a bee"]


def test_several_captions_make_a_sample_each(tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.png")
    write_folder(tmp_path / "out", images=tmp_path / "in", caption=["one", "two"], resolution=8)
    assert [row["caption"] for row, _ in samples(tmp_path / "out")] == ["one", "two"]


def test_the_shorter_of_pictures_and_priors_repeats(tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.png")
    for name in ("x", "yy", "zzz"):
        save(tmp_path / "class" / f"{name}.png")
    summary = write_folder(
        tmp_path / "out",
        images=tmp_path / "in",
        caption="a sks dog",
        class_images=tmp_path / "class",
        class_caption="a dog",
        resolution=8,
    )
    rows = [(row["caption"], row["is_prior"]) for row, _ in samples(tmp_path / "out")]
    assert rows == [("a sks dog", 0), ("a dog", 1)] * 3
    assert summary["train"] == 6


def test_pictures_become_upright_rgb_squares_that_remember_their_size(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera lay on its side
    save(tmp_path / "in" / "a.jpg", size=(12, 8), mode="L", exif=turned)
    write_folder(tmp_path / "out", images=tmp_path / "in", caption="x", resolution=4)
    ((row, image),) = samples(tmp_path / "out")
    assert (image.mode, image.size) == ("RGB", (4, 4))
    assert (row["original_width"], row["original_height"]) == (8, 12)


def test_the_shards_feed_training_with_the_prior_flag(tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.png", caption="x")
    write_folder(tmp_path / "out", images=tmp_path / "in", resolution=8)
    data = ShardDataModule(tmp_path / "out" / "train", batch_size=1, resolution=8, columns=["is_prior"])
    (batch,) = data.iterate_once("train", 1)
    assert batch["image"].shape == (1, 3, 8, 8)
    assert batch["is_prior"].tolist() == [0]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, {}, "images: got .*, expected a folder with pictures"),
        (b"", {"caption": "x"}, "a.png: got a picture that cannot be read"),
        (b"", {}, "got .*a.png without a.txt beside it, expected a caption; give dataset.caption=TEXT"),
        (b"", {"caption": "x", "resolution": 0}, "resolution: got 0"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path: Path, content: bytes | None, options: dict, message: str) -> None:
    (tmp_path / "in").mkdir()
    if content is not None:
        (tmp_path / "in" / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        write_folder(tmp_path / "out", images=tmp_path / "in", **options)


def test_a_picture_remembers_its_crop_as_sdxl_is_told_of_it(tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.png", size=(40, 16), caption="an ant")
    write_folder(tmp_path / "out", images=tmp_path / "in", resolution=8)
    columns = ["original_height", "original_width", "crop_top", "crop_left", "target_height", "target_width"]
    data = ShardDataModule(tmp_path / "out" / "train", batch_size=1, resolution=8, columns=columns)
    (batch,) = data.iterate_once("train", 1)
    assert [batch[name].item() for name in columns] == [16, 40, 0, 6, 8, 8]
