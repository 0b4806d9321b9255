"""Encoded shards hold what the encoders say of each sample, and are the same bytes however they came to be."""

import io
import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from ldm.autoencoders import Autoencoder, IdentityAutoencoder, KLAutoencoder, VQAutoencoder
from ldm.conditioners import PrecomputedText, SizeCrop, TextTransformer, WordTokenizer
from ldm.data import Record, ShardDataModule, read_manifest, write_shards
from ldm.data.filtering import filter_shards
from ldm.data.filters import Filter
from ldm.generation import encode
from ldm.generation.encode import Encoders, Settings, Target, encode_dataset, finish, prepare, weights_sha256
from ldm.generation.executors import Local
from ldm.training.precomputed import check_text

NUM_SAMPLES = {"train": 11, "validation": 4}
SMALL = Settings(batch_size=3)


def make_autoencoder(seed: int = 0) -> KLAutoencoder:
    torch.manual_seed(seed)
    return KLAutoencoder(base_channels=8, channel_mult=[1, 2], num_res_blocks=1, norm_groups=4, dropout=0.5)


def make_text(seed: int = 0) -> TextTransformer:
    torch.manual_seed(seed)
    words = ["train", "validation", *map(str, range(12))]
    text = TextTransformer(WordTokenizer(words, length=4), width=8, depth=1, num_heads=2, pooling="sum")
    return text.eval().requires_grad_(False)


@dataclass(frozen=True)
class Load:
    """Two sizes of pictures and captions; picklable, for processes of their own."""

    text: bool = True

    def __call__(self) -> Encoders:
        autoencoder = make_autoencoder().eval()
        targets = {"": Target(autoencoder, 8, flips=True), "large": Target(autoencoder, 12)}
        return Encoders(targets, make_text() if self.text else None)


@pytest.fixture
def make_images(tmp_path: Path) -> Callable[..., ShardDataModule]:
    for split, count in NUM_SAMPLES.items():
        pixels = np.random.default_rng(count).integers(0, 256, (count, 8, 10, 3), dtype=np.uint8)
        records = (Record(image, f"{split} {i}", {"number": i, "ratio": i / 8}) for i, image in enumerate(pixels))
        write_shards(tmp_path / split, records, samples_per_shard=5)

    def make(**options: Any) -> ShardDataModule:
        folders = (tmp_path / "train", tmp_path / "validation")
        return ShardDataModule(
            *folders, **({"batch_size": 4, "resolution": 8, "columns": ["number", "ratio"], "flip": True} | options)
        )

    return make


@pytest.fixture
def images(make_images: Callable[..., ShardDataModule]) -> ShardDataModule:
    return make_images()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of an encoded folder by its name there, without the notes, which name their input."""
    files = (path for path in folder.rglob("*") if path.is_file() and ".tasks" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def make_quantized() -> VQAutoencoder:
    torch.manual_seed(0)
    return VQAutoencoder(num_codes=16, base_channels=8, channel_mult=[1, 2], num_res_blocks=1, norm_groups=4)


@pytest.mark.parametrize(
    "autoencoder", [make_autoencoder(), IdentityAutoencoder(), make_quantized()], ids=["kl", "identity", "vq"]
)
def test_shards_of_moments_hold_what_the_encoder_says_of_each_image(
    autoencoder: Autoencoder, images: ShardDataModule, tmp_path: Path
) -> None:
    encode_dataset(autoencoder.train(), images, tmp_path / "latents", settings=SMALL)
    folders = [tmp_path / "latents" / split for split in NUM_SAMPLES]
    latents = ShardDataModule(*folders, batch_size=4, columns=["number", "ratio"])
    for split in NUM_SAMPLES:
        pairs = zip(images.iterate_once(split, 4), latents.iterate_once(split, 4), strict=True)
        for image, latent in pairs:
            assert latent["moments"].shape[1] == autoencoder.moment_channels
            with torch.no_grad():
                assert_close(latent["moments"], autoencoder.eval().encode(image["image"]), rtol=1e-4, atol=1e-5)
            assert latent["caption"] == image["caption"]
            assert_close((latent["number"], latent["ratio"]), (image["number"], image["ratio"]))


def test_the_summary_counts_samples_and_names_the_encoders(images: ShardDataModule, tmp_path: Path) -> None:
    autoencoder, text = make_autoencoder(), make_text()
    summary = encode_dataset(autoencoder, images, tmp_path / "latents", text=text)
    sha256 = PrecomputedText(tmp_path / "latents/text.safetensors").text_sha256
    hashes = {"encoder_sha256": weights_sha256(autoencoder), "text_sha256": sha256}
    assert summary == {**NUM_SAMPLES, **hashes, "bad": 0}
    for split in NUM_SAMPLES:
        manifest = read_manifest(tmp_path / "latents" / split)
        assert manifest is not None and manifest.items() >= hashes.items()


def test_mirrored_latents_are_those_of_mirrored_pictures_and_training_takes_them_as_it_would_mirror(
    images: ShardDataModule, tmp_path: Path
) -> None:
    encode_dataset(IdentityAutoencoder(), images, tmp_path / "latents", flips=True, settings=SMALL)
    latents = ShardDataModule(tmp_path / "latents/train", batch_size=4, flip=True)
    places = [(i, i % 11, i // 11) for i in range(44)]
    pictures = [images.dataset("train")[place]["image"] for place in places]
    moments = [latents.dataset("train")[place]["moments"][:3] for place in places]
    assert_close(moments, pictures, rtol=0, atol=0)
    plain = [
        ShardDataModule(tmp_path / "latents/train", batch_size=4).dataset("train")[p]["moments"][:3] for p in places
    ]
    assert 10 < sum(not torch.equal(a, b) for a, b in zip(moments, plain, strict=True)) < 34


def test_latents_without_mirrored_ones_refuse_to_be_flipped(images: ShardDataModule, tmp_path: Path) -> None:
    encode_dataset(IdentityAutoencoder(), images, tmp_path / "latents")
    with pytest.raises(ValueError, match=r"data\.flip: got true .* encode with ldm data encode flips=true"):
        ShardDataModule(tmp_path / "latents/train", batch_size=4, flip=True).dataset("train")


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 1e-2)])
def test_captions_become_the_embeddings_that_the_encoder_gives(
    dtype: str, tolerance: float, images: ShardDataModule, tmp_path: Path
) -> None:
    text = make_text()
    settings = Settings(batch_size=3, text_dtype=dtype)
    encode_dataset(make_autoencoder(), images, tmp_path / "latents", text=text, settings=settings)
    latents = ShardDataModule(tmp_path / "latents/train", batch_size=4)
    stored = PrecomputedText(tmp_path / "latents/text.safetensors")
    for batch in latents.iterate_once("train", 4):
        expected = text({"caption": batch["caption"]}).parts()
        assert_close(stored(batch).parts(), expected, rtol=tolerance, atol=tolerance)
    assert_close(stored.null(2).parts(), text.null(2).parts(), rtol=tolerance, atol=tolerance)
    assert batch["text_context"].dtype == getattr(torch, dtype)


def test_token_ids_are_read_by_an_encoder_in_training_as_the_captions_are(
    images: ShardDataModule, tmp_path: Path
) -> None:
    text = make_text()
    encode_dataset(make_autoencoder(), images, tmp_path / "ids", text=text, settings=replace(SMALL, text="ids"))
    data = ShardDataModule(tmp_path / "ids" / "train", batch_size=4)
    batch = next(data.iterate_once("train", 4))
    assert batch["text_ids"].dtype == torch.int32
    found, expected = text(batch), text({"caption": batch["caption"]})
    for name, part in expected.parts().items():
        assert_close(found.parts()[name], part)
    check_text(text, data.dataset("train"))
    other = TextTransformer(WordTokenizer(["other"], length=4), width=8, depth=1, num_heads=2)
    with pytest.raises(ValueError, match="got another tokenizer than that which made the shards' token ids"):
        check_text(other, data.dataset("train"))


def test_one_pass_writes_every_target_and_says_where_its_pictures_were_cut(
    images: ShardDataModule, tmp_path: Path
) -> None:
    work = prepare(Load(), images, tmp_path / "latents", settings=SMALL)
    Local().run(work)
    assert finish(work)["targets"]["large"].items() >= {**NUM_SAMPLES, "resolution": 12, "flips": False}.items()
    columns = ["original_width", "original_height", "crop_left", "target_width"]
    for name, size, cut in (("", 4, [10, 8, 1, 8]), ("large", 6, [10, 8, 1, 12])):
        data = ShardDataModule(tmp_path / "latents" / name / "train", batch_size=4, columns=columns)
        item = data.dataset("train")[0, 0, 0]
        assert item["moments"].shape == (8, size, size)
        assert [item[column] for column in columns] == cut
        assert item["caption"] == "train 0"


def test_the_bytes_depend_on_neither_readers_nor_order_nor_interruptions(
    images: ShardDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare(Load(), images, tmp_path / "whole", settings=Settings(batch_size=3, readers=0))
    Local().run(whole)
    finish(whole)
    for number, kept in enumerate((0, 3, 6)):
        folder = tmp_path / f"broken-{number}"
        work = prepare(Load(), images, folder, settings=Settings(batch_size=3, readers=3))
        with monkeypatch.context() as patch:
            _stop_after(patch, kept)
            with pytest.raises(KeyboardInterrupt):
                for task in reversed(range(work.num_tasks)):
                    work.do(task)
        assert not (folder / "train/manifest.json").exists()
        again = prepare(Load(), images, folder, settings=Settings(batch_size=3, readers=3))
        Local().run(again)
        finish(again)
        assert contents(folder) == contents(tmp_path / "whole")


def _stop_after(patch: pytest.MonkeyPatch, count: int) -> None:
    """Interrupts encoding in the middle of the batch after `count` batches."""
    encode_batch, done = encode._encode_batch, []

    def interrupted(*arguments: Any) -> None:
        encode_batch(*arguments)
        done.append(None)
        if len(done) > count:
            raise KeyboardInterrupt

    patch.setattr(encode, "_encode_batch", interrupted)


def test_only_what_is_missing_cut_short_or_of_changed_pictures_is_done_again(
    images: ShardDataModule, tmp_path: Path
) -> None:
    folder = tmp_path / "latents"
    encode_dataset(make_autoencoder(), images, folder)
    before = contents(folder)
    (folder / "train/00000.tar").unlink()
    os.truncate(folder / "train/00001.tar", 1000)
    write_shards(tmp_path / "validation", [Record(np.zeros((8, 8, 3), np.uint8), "black", {"number": 1, "ratio": 0})])
    stays = (folder / "train/00002.tar").stat()
    encode_dataset(make_autoencoder(), images, folder)
    after = contents(folder)
    assert {name for name in after if after[name] != before[name]} == {
        "validation/00000.tar",
        "validation/manifest.json",
    }
    assert (folder / "train/00002.tar").stat() == stays
    changed = prepare(lambda: Encoders({"": Target(make_autoencoder(1).eval(), 8)}), images, folder, settings=SMALL)
    assert not any(changed.is_done(task) for task in range(changed.num_tasks))


def test_samples_that_cannot_be_read_are_left_out_and_told(images: ShardDataModule, tmp_path: Path) -> None:
    path = tmp_path / "train/00001.tar"
    path.write_bytes(path.read_bytes().replace(b"IDAT", b"IXXT", 1))
    summary = encode_dataset(make_autoencoder(), images, tmp_path / "latents", settings=SMALL)
    assert (summary["train"], summary["bad"]) == (10, 1)
    (row,) = map(json.loads, (tmp_path / "latents/left_out.jsonl").read_text().splitlines())
    assert (row["shard"], row["key"], row["kind"]) == (str(path), "000010000", "broken_image")
    captions = [
        c
        for b in ShardDataModule(tmp_path / "latents/train", batch_size=1).iterate_once("train", 4)
        for c in b["caption"]
    ]
    assert captions == [f"train {i}" for i in range(11) if i != 5]


def test_classes_of_members_of_their_own_go_with_the_latents(images: ShardDataModule, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train/00000.tar", "a") as tar:
        for i in range(5):
            member = tarfile.TarInfo(f"{i:09d}.cls")
            member.size = 1
            tar.addfile(member, io.BytesIO(b"%d" % (9 - i)))
    (tmp_path / "train/manifest.json").unlink()
    encode_dataset(make_autoencoder(), images, tmp_path / "latents", settings=SMALL)
    latents = ShardDataModule(tmp_path / "latents/train/00000.tar", batch_size=4, columns=["cls"]).dataset("train")
    assert [latents[i, i, 0]["cls"] for i in range(5)] == [9, 8, 7, 6, 5]


def test_what_another_filter_kept_in_the_same_folder_is_encoded_anew(
    make_images: Callable[..., ShardDataModule], tmp_path: Path
) -> None:
    make_images()
    done = []
    for where in ("number < 2", "number < 2", "number < 3"):
        if not done or where == "number < 3":
            filter_shards(tmp_path / "train", Filter(where), tmp_path / "kept")
        work = prepare(Load(text=False), make_images(filter=tmp_path / "kept"), tmp_path / "latents", settings=SMALL)
        done.append(work.is_done(0))
        work.do(0)
    assert done == [False, True, False]


def test_captions_that_training_would_choose_are_not_encoded_once(
    make_images: Callable[..., ShardDataModule], tmp_path: Path
) -> None:
    chosen = make_images(captions={"long": 1.0})
    with pytest.raises(ValueError, match=r"data\.captions: got {'long': 1.0} with a text encoder, .* expected null"):
        prepare(Load(), chosen, tmp_path / "latents", settings=SMALL)
    assert prepare(Load(text=False), chosen, tmp_path / "latents", settings=SMALL).num_tasks


def test_a_filter_chooses_what_is_encoded(make_images: Callable[..., ShardDataModule], tmp_path: Path) -> None:
    make_images()
    filter_shards(tmp_path / "train", Filter("number in [1, 2, 10]"), tmp_path / "kept")
    summary = encode_dataset(make_autoencoder(), make_images(filter=tmp_path / "kept"), tmp_path / "latents")
    assert (summary["train"], summary["validation"]) == (3, 4)
    assert [p.name for p in sorted((tmp_path / "latents/train").glob("*.tar"))] == ["00000.tar", "00002.tar"]
    data = ShardDataModule(tmp_path / "latents/train", batch_size=1, columns=["number"])
    assert [b["number"].tolist() for b in data.iterate_once("train", 4)] == [[1, 2, 10]]


def test_mistakes_are_said_before_anything_is_written(images: ShardDataModule, tmp_path: Path) -> None:
    autoencoder = make_autoencoder().eval()
    with pytest.raises(ValueError, match="resolution: got 9, expected a multiple of 2"):
        Target(autoencoder, 9)
    with pytest.raises(ValueError, match=r"targets: got \['train'\], the name of a split"):
        prepare(lambda: Encoders({"train": Target(autoencoder, 8)}), images, tmp_path / "x", settings=SMALL)
    with pytest.raises(ValueError, match=r"conditioner: got one that reads original_height.* expected a text encoder"):
        encode_dataset(autoencoder, images, tmp_path / "x", text=SizeCrop())  # type: ignore[arg-type]
    for settings in ({"batch_size": 0}, {"threads": 0}, {"readers": -1}, {"dtype": "int8"}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))}: got"):
            Settings(**settings)  # type: ignore[arg-type]
    assert not (tmp_path / "x").exists()


def test_values_that_half_precision_cannot_hold_are_refused(images: ShardDataModule, tmp_path: Path) -> None:
    autoencoder = make_autoencoder()
    autoencoder.quant_conv.weight.data.mul_(1e7)
    with pytest.raises(ValueError, match=r"dtype: got values up to .* set dtype=float32"):
        encode_dataset(autoencoder, images, tmp_path / "latents", settings=Settings(dtype="float16"))


def test_the_hash_tells_weights_and_scales_apart() -> None:
    first, same, other, scaled = make_autoencoder(0), make_autoencoder(0), make_autoencoder(1), make_autoencoder(0)
    scaled.set_latent_scale(0.5)
    hashes = [weights_sha256(autoencoder) for autoencoder in (first, same, other, scaled)]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


@pytest.mark.slow
def test_processes_write_the_same_bytes(images: ShardDataModule, tmp_path: Path) -> None:
    for name, workers in (("one", 0), ("two", 2)):
        work = prepare(Load(), images, tmp_path / name, settings=SMALL)
        Local(workers).run(work)
        finish(work)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
