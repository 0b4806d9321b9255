"""The classifier of noisy samples learns classes from noised latents, and is read back for guidance."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_autoencoder

from ldm.cli.errors import UserError
from ldm.cli.guides import read_classifier
from ldm.diffusion import schedules, times
from ldm.networks import NoisyClassifier
from ldm.nn.weights import save_weights
from ldm.training import NoisyClassifierModule
from ldm.training.optim import constant

GEOMETRY: dict[str, Any] = {
    "in_channels": 4,
    "num_classes": 2,
    "image_size": 8,
    "model_channels": 16,
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
    "attention_resolutions": [],
    "num_head_channels": 8,
    "norm_groups": 4,
}


def module() -> NoisyClassifierModule:
    torch.manual_seed(0)
    return NoisyClassifierModule(
        NoisyClassifier(**GEOMETRY),
        autoencoder=tiny_autoencoder(),
        schedule=schedules.Linear(),
        times=times.UniformSteps(),
        optimizer=partial(torch.optim.AdamW, lr=3e-3),
        lr_schedule=constant,
    )


def batch(start: int) -> dict[str, Any]:
    """Dark pictures are of class 0, bright ones of class 1."""
    labels = torch.arange(start, start + 16) % 2
    image = torch.where(labels == 0, -0.9, 0.9).view(-1, 1, 1, 1).expand(-1, 3, 16, 16).contiguous()
    return {"image": image, "class_label": labels, "position": torch.arange(start, start + 16)}


def test_it_learns_what_can_be_seen_under_noise() -> None:
    trained = module()
    optimizer = trained.configure_optimizers()["optimizer"]
    losses = []
    for step in range(80):
        logits, labels = trained.told(batch(16 * step), seed=0)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) / 20 < 0.75 * sum(losses[:5]) / 5
    assert all(parameter.grad is None for parameter in trained.autoencoder.parameters())
    assert not any(name.startswith("autoencoder") for name, p in trained.named_parameters() if p.requires_grad)


def test_labels_are_asked_for_by_name() -> None:
    with pytest.raises(ValueError, match=r"^got batches without class_label, expected labels there"):
        module().told({key: value for key, value in batch(0).items() if key != "class_label"}, seed=0)


def test_weights_are_read_back_and_other_runs_refused(tmp_path: Path) -> None:
    trained = module()
    config = {"model": {"classifier": {"_target_": "ldm.networks.NoisyClassifier", **GEOMETRY}}}
    target = "ldm.training.NoisyClassifierModule"
    save_weights(tmp_path / "weights.safetensors", trained.classifier.state_dict(), target=target, config=config)
    found = read_classifier(tmp_path)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0])
    assert torch.equal(found(x, t), trained.classifier.eval()(x, t))
    assert not any(parameter.requires_grad for parameter in found.parameters())
    with pytest.raises(UserError, match=r"^guidance\.classifier: got .*nothing, expected a finished run"):
        read_classifier(tmp_path / "nothing")
    save_weights(tmp_path / "other.safetensors", {}, target="ldm.training.LatentDiffusionModule", config={})
    with pytest.raises(UserError, match="a LatentDiffusionModule, expected a NoisyClassifierModule"):
        read_classifier(tmp_path / "other.safetensors")
