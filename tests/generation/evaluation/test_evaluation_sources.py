"""Where prompts and images of an evaluation come from."""

import hashlib
import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.autoencoders import KLAutoencoder, VQAutoencoder
from ldm.data import ShardDataModule
from ldm.generation.evaluation.batches import batches
from ldm.generation.evaluation.evaluate import Evaluation, Subject
from ldm.generation.evaluation.features import FeatureStore
from ldm.generation.evaluation.images import SplitImages, open_images
from ldm.generation.evaluation.prompts import own_prompts, read_prompts
from ldm.generation.evaluation.reconstruction import evaluate_reconstructions, reconstruct, with_codes
from ldm.generation.evaluation.samples import items_of
from ldm.generation.evaluation.training_images import Every, keep_beside
from ldm.generation.evaluation.workers import FreeWorkers
from ldm.generation.report import EvaluationFolder, report_page
from ldm.generation.report.neighbours import nearest_trained
from ldm.metrics import CodebookUsage, FrechetDistance, ReconstructionQuality
from ldm.metrics.reconstruction import psnr

PROMPTS = [{"prompt": "a cat, asleep", "id": 3}, {"prompt": "a dog", "id": 4}]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.csv", 'id,caption,url\n3,"a cat, asleep",x\n4,a dog,y\n'),
        ("p.tsv", "id\tprompt\n3\ta cat, asleep\n4\ta dog\n"),
        ("p.jsonl", '{"text": "a cat, asleep", "id": 3}\n{"text": "a dog", "id": 4}\n'),
        (
            "p.json",
            json.dumps({"annotations": [{"caption": "a cat, asleep\n", "id": 3}, {"caption": "a dog", "id": 4}]}),
        ),
    ],
)
def test_every_kind_of_file_gives_prompts_with_their_numbers(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert read_prompts(tmp_path / name) == PROMPTS


def test_lines_and_lists_of_texts_are_prompts(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat\n\n  a dog \n")
    (tmp_path / "p.json").write_text('["a cat", "a dog"]')
    assert read_prompts(tmp_path / "p.txt") == read_prompts(tmp_path / "p.json")


@pytest.mark.parametrize(
    ("name", "text", "prompts"),
    [
        ("p.txt", "a cat,\u2028asleep\na\x85dog\n", ["a cat,\u2028asleep", "a\x85dog"]),
        ("p.csv", "caption\na cat\u2028asleep\na\x0cdog\n", ["a cat\u2028asleep", "a\x0cdog"]),
        ("p.csv", 'caption\n"a cat\nasleep"\na dog\n', ["a cat\nasleep", "a dog"]),
        ("p.jsonl", '{"text": "a cat\u2028asleep"}\r\n{"text": "a dog"}\r\n', ["a cat\u2028asleep", "a dog"]),
    ],
)
def test_what_unicode_calls_a_line_break_is_part_of_a_prompt(
    name: str, text: str, prompts: list[str], tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text, newline="")
    assert [row["prompt"] for row in read_prompts(tmp_path / name)] == prompts


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "\n", "which holds none"),
        ("p.csv", "id,url\n1,x\n", "with id, url, expected one of prompt, caption"),
        ("p.json", "{", "which is no JSON"),
        ("p.json", '{"captions": []}', "without a list"),
        ("p.pdf", "x", "expected a file .txt"),
    ],
)
def test_a_file_without_prompts_is_refused_in_one_line(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_prompts(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_model_of_classes_is_asked_for_each_of_them() -> None:
    from ldm.conditioners import ClassLabel, Unconditional

    assert own_prompts(Unconditional()) == [{"prompt": ""}]
    classes = own_prompts(ClassLabel(3, width=4))
    assert classes == [{"prompt": str(i), "class_label": i} for i in range(3)]
    items = items_of(classes, num_samples=7, seed=5)
    assert [item.prompt for item in items] == ["0", "0", "0", "1", "1", "2", "2"]
    assert [item.seed for item in items] == list(range(5, 12))


def pixels(count: int, side: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def test_a_folder_a_zip_an_array_and_shards_hold_the_same_images_in_any_number_of_workers(tmp_path: Path) -> None:
    made = pixels(7)
    (tmp_path / "folder").mkdir()
    for i, picture in enumerate(made):
        Image.fromarray(picture).save(tmp_path / "folder" / f"{i:02d}.png")
    files = sorted((tmp_path / "folder").iterdir())
    with zipfile.ZipFile(tmp_path / "made.zip", "w") as archive, tarfile.open(tmp_path / "made.tar", "w") as tar:
        for file in files:
            archive.write(file, f"inner/{file.name}")
            tar.add(file, file.name)
    np.savez_compressed(tmp_path / "made.npz", arr_0=made)
    expected = torch.from_numpy(made).permute(0, 3, 1, 2)
    for name in ("folder", "made.zip", "made.tar", "made.npz"):
        found = list(batches(open_images(tmp_path / name), range(2, 7), batch_size=3))
        assert torch.cat([batch["image"] for batch in found]).equal(expected[2:]), name
        assert torch.cat([batch["index"] for batch in found]).tolist() == [2, 3, 4, 5, 6]
    assert open_images(tmp_path / "made.npz", resolution=8)[0]["image"].shape == (3, 8, 8)


def test_turned_and_transparent_pictures_are_the_same_in_a_folder_as_in_shards(tmp_path: Path) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (12, 16, 4), dtype=np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    (tmp_path / "folder").mkdir()
    Image.fromarray(levels).save(tmp_path / "folder" / "0.png")
    Image.fromarray(levels[..., :3]).save(tmp_path / "folder" / "1.jpg", exif=turned)
    with tarfile.open(tmp_path / "made.tar", "w") as tar:
        for file in sorted((tmp_path / "folder").iterdir()):
            tar.add(file, file.name)
    found, expected = open_images(tmp_path / "folder"), open_images(tmp_path / "made.tar")
    assert expected[1]["image"].shape == (3, 16, 12)
    assert all(found[i]["image"].equal(expected[i]["image"]) for i in range(2))


def test_prompts_are_read_without_decoding_the_pictures(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(b"none")
    (tmp_path / "0.txt").write_text("a cat\n")
    assert FeatureStore(open_images(tmp_path), tmp_path).rows(0)["prompt"] == ["a cat"]


def test_images_of_several_sizes_come_in_batches_of_one(tmp_path: Path) -> None:
    for i, side in enumerate((8, 8, 6, 8)):
        Image.fromarray(pixels(1, side)[0]).save(tmp_path / f"{i}.png")
    shapes = [tuple(batch["image"].shape) for batch in batches(open_images(tmp_path), range(4), batch_size=4)]
    assert shapes == [(2, 3, 8, 8), (1, 3, 6, 6), (1, 3, 8, 8)]


def test_a_file_of_statistics_or_of_another_shape_is_no_set_of_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "stats.npz", mu=np.zeros(2))
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((2, 4, 4, 3)))
    (tmp_path / "broken.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="without arr_0"):
        open_images(tmp_path / "stats.npz")
    with pytest.raises(ValueError, match=r"float64 \(2, 4, 4, 3\), expected uint8"):
        open_images(tmp_path / "floats.npz")
    with pytest.raises(ValueError, match=r"broken\.png, which cannot be read"):
        open_images(tmp_path)[0]


def test_damaged_files_are_named_in_one_line(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.fromarray(pixels(1)[0]).save(stream, format="PNG")
    with zipfile.ZipFile(tmp_path / "made.zip", "w") as archive:
        archive.writestr("0.png", stream.getvalue())
    content = bytearray((tmp_path / "made.zip").read_bytes())
    content[60] ^= 255
    (tmp_path / "made.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"made\.zip: 0\.png, which is damaged \(Bad CRC-32"):
        open_images(tmp_path / "made.zip")[0]
    np.savez(tmp_path / "cut.npz", arr_0=pixels(9))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:999])
    metrics = {"fid": FrechetDistance(Grey())}
    with pytest.raises(ValueError, match=r"cut\.npz, which is no whole \.npz"):
        Evaluation(metrics=metrics, reference=tmp_path / "cut.npz").check(9)
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match=r"other\.npz with x, expected mu and sigma, or images as arr_0"):
        Evaluation(metrics=metrics, reference=tmp_path / "other.npz").check(9)
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt, which is no UTF-8 text"):
        read_prompts(tmp_path / "latin.txt")


class Grey(torch.nn.Module):
    """Mean and spread of all levels."""

    num_features = 2

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        flat = images.double().flatten(1)
        return torch.stack([flat.mean(1), flat.std(1)], dim=1)


def write_pictures(folder: Path, made: np.ndarray) -> Path:
    folder.mkdir()
    for i, picture in enumerate(made):
        Image.fromarray(picture).save(folder / f"{i:02d}.png")
    return folder


def test_training_images_are_kept_beside_with_their_features(tmp_path: Path) -> None:
    made = pixels(12)
    real, images = write_pictures(tmp_path / "real", made[:8]), write_pictures(tmp_path / "images", made[6:])
    evaluation = Evaluation(metrics={"fid": FrechetDistance(Grey())}, reference=real, num_samples=6)
    subject = Subject(tmp_path / "evaluations" / "out", torch.device("cpu"), {}, FreeWorkers())
    evaluation.of_images(images, subject)
    for training, expected in ((real, [6, 7]), (images, [0, 1])):
        opened = open_images(training)
        keep_beside(evaluation, opened, subject.folder, device=subject.device, workers=subject.workers)
        told = json.loads((subject.folder / "training.json").read_text())
        assert (told["count"], told["every"], told["path"]) == (len(opened), 1, str(training))
        nearest = nearest_trained(EvaluationFolder(subject.folder), k=1)
        assert nearest is not None
        assert nearest.numbers[:2, 0].tolist() == expected
        assert nearest.distances[:2, 0].tolist() == [0, 0]
    # The reference's own features serve where it is what was trained on.
    assert len(list((tmp_path / "evaluations" / "reference").iterdir())) == 2
    assert [len(Every(open_images(real), most=most)) for most in (3, 4, 8, 9)] == [3, 4, 8, 8]
    assert Every(open_images(real), most=3)[2]["image"].equal(open_images(real)[6]["image"])


def test_a_split_of_several_shards_can_be_opened_again_by_what_its_protocol_says(tmp_path: Path) -> None:
    stated = []
    for part in range(2):
        with tarfile.open(tmp_path / f"{part}.tar", "w") as tar:
            for i, picture in enumerate(pixels(3 + part)):
                stream = io.BytesIO()
                Image.fromarray(picture).save(stream, format="PNG")
                member = tarfile.TarInfo(f"{part}{i}.png")
                member.size = len(stream.getvalue())
                tar.addfile(member, io.BytesIO(stream.getvalue()))
        path = tmp_path / f"{part}.tar"
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        size = path.stat().st_size
        stated.append({"name": path.name, "num_samples": 3 + part, "bytes": size, "sha256": sha256})
    data = ShardDataModule(train=[str(tmp_path / "1.tar")], validation=str(tmp_path), batch_size=2, resolution=16)
    for split, place in (("validation", str(tmp_path)), ("train", [str(tmp_path / "1.tar")])):
        split_images = SplitImages(data, split)
        told = split_images.describe()
        assert told["path"] == place
        again = open_images(told["path"], resolution=told["preprocessing"]["resolution"])
        assert len(again) == told["count"]
        assert all(again[i]["image"].equal(split_images[i]["image"]) for i in range(len(again)))
    # A manifest's hashes stand for the bytes, and give the same hash as these do.
    plain = open_images(tmp_path).describe()["sha256"]
    (tmp_path / "manifest.json").write_text(json.dumps({"shards": stated}))
    assert open_images(tmp_path).describe()["sha256"] == plain


def test_a_shard_that_is_newer_than_its_manifest_is_hashed_itself(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        stream = io.BytesIO()
        Image.fromarray(pixels(1)[0]).save(stream, format="PNG")
        member = tarfile.TarInfo("0.png")
        member.size = len(stream.getvalue())
        tar.addfile(member, io.BytesIO(stream.getvalue()))
    entry = {"name": "0.tar", "num_samples": 1, "bytes": (tmp_path / "0.tar").stat().st_size, "sha256": "00" * 32}
    plain = open_images(tmp_path).describe()["sha256"]
    (tmp_path / "manifest.json").write_text(json.dumps({"shards": [entry]}))
    assert open_images(tmp_path).describe()["sha256"] != plain
    later = (tmp_path / "manifest.json").stat().st_mtime_ns + 1
    os.utime(tmp_path / "0.tar", ns=(later, later))
    assert open_images(tmp_path).describe()["sha256"] == plain


def test_reconstructions_are_measured_against_their_originals_and_codes_counted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    np.savez(tmp_path / "real.npz", arr_0=pixels(5))
    shape = {"base_channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "norm_groups": 4}
    autoencoder = VQAutoencoder(latent_channels=4, num_codes=16, **shape).eval()
    metrics = with_codes({"quality": ReconstructionQuality(), "codes": CodebookUsage(3)}, autoencoder)
    evaluation = Evaluation(metrics=metrics, reference=tmp_path / "real.npz", shard_size=2)
    subject = Subject(tmp_path / "out", torch.device("cpu"), {}, FreeWorkers())
    found = evaluate_reconstructions(evaluation, autoencoder, subject, batch_size=2)
    real = torch.from_numpy(pixels(5)).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        again = reconstruct(autoencoder, real / 127.5 - 1).clamp(-1, 1)
        codes = autoencoder.codes(autoencoder.encode(real / 127.5 - 1))
    expected = psnr(((again + 1) * 127.5).round().double(), real.double()).mean().item()
    assert found["quality/psnr"] == pytest.approx(expected, abs=1e-3)
    assert found["codes/usage"] == len(codes.unique()) / 16
    page = report_page([EvaluationFolder(tmp_path / "out")])
    assert page.count('alt="original ') == 5
    assert "Originals and reconstructions" in page and "Nearest" not in page
    with pytest.raises(ValueError, match="expected one with a codebook"):
        with_codes({"codes": CodebookUsage(3)}, KLAutoencoder(**shape))


def test_originals_of_several_sizes_are_refused_in_one_line(tmp_path: Path) -> None:
    write_pictures(tmp_path / "real", pixels(1))
    Image.fromarray(pixels(1, 32)[0]).save(tmp_path / "real" / "9.png")
    evaluation = Evaluation(metrics={"quality": ReconstructionQuality()}, reference=tmp_path / "real")
    subject = Subject(tmp_path / "out", torch.device("cpu"), {}, FreeWorkers())
    autoencoder = KLAutoencoder(base_channels=8, channel_mult=[1, 2], num_res_blocks=1, norm_groups=4)
    with pytest.raises(ValueError, match="reference: got images of 16x16 and 32x32 pixels to reconstruct, expected"):
        evaluate_reconstructions(evaluation, autoencoder, subject, batch_size=2)
