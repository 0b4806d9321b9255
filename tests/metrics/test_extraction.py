from copy import copy

import pytest
import torch
from metric_helpers import Pixels, Words, images, random_inception
from torch import nn
from torch.testing import assert_close

from ldm.metrics import (
    ClassAccuracy,
    CLIPScore,
    FrechetDistance,
    InceptionFeatures,
    InceptionScore,
    KernelDistance,
    PrecisionRecall,
    extract,
    feed,
    network_key,
    share_networks,
)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    random_inception(path)
    return InceptionFeatures(path)


def test_equal_networks_of_several_metrics_become_one() -> None:
    metrics = [FrechetDistance(Pixels()), KernelDistance(Pixels()), PrecisionRecall(Pixels(5))]
    networks = share_networks(metrics)
    assert len(networks) == 2
    assert metrics[0].features is metrics[1].features is not metrics[2].features


def test_networks_that_differ_in_a_setting_alone_have_keys_of_their_own() -> None:
    one, other = nn.AvgPool2d(2), nn.AvgPool2d(3)
    assert network_key(one) == network_key(nn.AvgPool2d(2)) != network_key(other)


@pytest.mark.slow
def test_outputs_of_one_inception_come_out_of_one_pass(inception) -> None:
    networks = {output: copy(inception) for output in ("2048", "spatial", "logits_unbiased")}
    for output, network in networks.items():
        network.output = output
    pictures = images(1, side=32)
    expected = {output: network(pictures) for output, network in networks.items()}
    passes = []
    inception.network.Mixed_5b.register_forward_hook(lambda *_: passes.append(1))
    assert_close(extract(networks, pictures), expected, rtol=1e-6, atol=1e-6)
    assert len(passes) == 1
    other = copy(networks["2048"])
    other.resize = "bicubic"
    # Another resizing is another network, and a pass of its own.
    assert network_key(other) != network_key(networks["2048"])
    assert other.trunk != networks["2048"].trunk


def test_fed_with_features_every_metric_has_the_value_that_images_give() -> None:
    pictures, places = images(20), torch.arange(20)
    batch = {"index": places, "prompt": ["ab"] * 20, "class_label": places % 4}
    cases = [
        (FrechetDistance(Pixels()), {"real": False}, {"real": True}),
        (KernelDistance(Pixels(), subset_size=9), {"index": places, "real": False}, {"index": places, "real": True}),
        (InceptionScore(Pixels(), splits=2), {"index": places}, None),
        (ClassAccuracy(Pixels()), {"labels": places % 4}, None),
    ]
    for metric, generated, real in cases:
        metric.update(pictures, **generated)
        features = extract({"pixels": Pixels()}, pictures)["pixels"]
        other = extract({"pixels": Pixels()}, -pictures)["pixels"]
        if real is not None:
            metric.update(-pictures, **real)
        expected = metric.compute()
        metric.reset()
        feed(metric, features, batch, real=False)
        if real is not None:
            feed(metric, other, batch, real=True)
        assert_close(metric.compute(), expected, rtol=1e-12, atol=1e-12)


def test_networks_of_one_trunk_hold_it_once() -> None:
    networks = []
    for output in ("a", "b"):
        network = Pixels()
        network.trunk, network.output, network.network = "same", output, nn.Linear(2, 2)
        networks.append(network)
    shared = share_networks([FrechetDistance(networks[0]), InceptionScore(networks[1])])
    assert len(shared) == 2
    assert networks[0].network is networks[1].network


def test_what_is_fed_leaves_no_graph_behind() -> None:
    score = CLIPScore(Words())
    features = torch.rand(3, 4, requires_grad=True)
    values = feed(score, features, {"prompt": ["a", "b", "a"]}, real=False)
    assert values.shape == (3,)
    assert not score.total.requires_grad
    assert_close(score.compute(), values.mean())


def test_a_prompt_that_many_images_share_is_read_once() -> None:
    words = Words()
    texts = []
    embed = words.embed_texts
    words.embed_texts = lambda prompts: texts.append(list(prompts)) or embed(prompts)
    score = CLIPScore(words)
    score.update(images(6), ["ab", "cd", "ab", "ab", "cd", "ab"])
    expected = [CLIPScore(Words()) for _ in range(6)]
    assert texts == [["ab", "cd"]]
    total = 0.0
    for i, single in enumerate(expected):
        single.update(images(6)[i : i + 1], [["ab", "cd", "ab", "ab", "cd", "ab"][i]])
        total += single.compute().item() / 6
    assert score.compute().item() == pytest.approx(total, rel=1e-9)


class Projection(nn.Module):
    """A network that does not describe itself, whose weights no `state_dict` holds."""

    num_features = 4

    def __init__(self, *, seed: int = 0, is_plain: bool = True) -> None:
        super().__init__()
        weights = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
        if is_plain:
            self.weights = weights
        else:
            self.register_buffer("weights", weights, persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3)) @ self.weights


@pytest.mark.parametrize("is_plain", [True, False])
def test_networks_that_differ_in_tensors_that_are_not_saved_have_keys_of_their_own(is_plain: bool) -> None:
    one, same, other = (Projection(seed=seed, is_plain=is_plain) for seed in (0, 0, 1))
    assert network_key(one) == network_key(same) != network_key(other)


def test_a_protocol_tells_settings_of_a_network_that_does_not_describe_itself() -> None:
    one, other = (FrechetDistance(Projection()) for _ in range(2))
    other.features.gain = 2.0
    assert one.describe() == FrechetDistance(Projection()).describe() != other.describe()
