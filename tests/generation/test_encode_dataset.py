from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from ldm.autoencoders import Autoencoder, IdentityAutoencoder, KLAutoencoder, VQAutoencoder
from ldm.data import Record, ShardDataModule, read_manifest, write_shards
from ldm.generation.encode import encode_dataset, weights_sha256

NUM_SAMPLES = {"train": 11, "validation": 4}


def make_autoencoder(seed: int = 0) -> KLAutoencoder:
    torch.manual_seed(seed)
    return KLAutoencoder(base_channels=8, channel_mult=[1, 2], num_res_blocks=1, norm_groups=4, dropout=0.5)


@pytest.fixture
def images(tmp_path: Path) -> ShardDataModule:
    for split, count in NUM_SAMPLES.items():
        pixels = np.random.default_rng(count).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        records = (Record(image, f"{split} {i}", {"number": i, "ratio": i / 8}) for i, image in enumerate(pixels))
        write_shards(tmp_path / split, records, samples_per_shard=5)
    return ShardDataModule(
        tmp_path / "train", tmp_path / "validation", batch_size=4, resolution=8, columns=["number", "ratio"], flip=True
    )


def make_quantized() -> VQAutoencoder:
    torch.manual_seed(0)
    return VQAutoencoder(num_codes=16, base_channels=8, channel_mult=[1, 2], num_res_blocks=1, norm_groups=4)


@pytest.mark.parametrize(
    "autoencoder", [make_autoencoder(), IdentityAutoencoder(), make_quantized()], ids=["kl", "identity", "vq"]
)
def test_shards_of_moments_hold_what_the_encoder_says_of_each_image(
    autoencoder: Autoencoder, images: ShardDataModule, tmp_path: Path
) -> None:
    encode_dataset(autoencoder.train(), images, tmp_path / "latents", batch_size=3, samples_per_shard=6)
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


def test_the_summary_counts_samples_and_names_the_encoder(images: ShardDataModule, tmp_path: Path) -> None:
    autoencoder = make_autoencoder()
    summary = encode_dataset(autoencoder, images, tmp_path / "latents")
    assert summary == {**NUM_SAMPLES, "encoder_sha256": weights_sha256(autoencoder)}
    for split in NUM_SAMPLES:
        manifest = read_manifest(tmp_path / "latents" / split)
        assert manifest is not None and manifest["encoder_sha256"] == summary["encoder_sha256"]


def test_the_hash_tells_weights_and_scales_apart() -> None:
    first, same, other, scaled = make_autoencoder(0), make_autoencoder(0), make_autoencoder(1), make_autoencoder(0)
    scaled.set_latent_scale(0.5)
    hashes = [weights_sha256(autoencoder) for autoencoder in (first, same, other, scaled)]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3
