import pytest
import torch
import torchvision
from metric_helpers import images
from torch.testing import assert_close
from torchmetrics.functional.image.lpips import _LPIPS

from ldm.metrics import LPIPS, PairwiseDiversity, PerceptualDistance, as_seen
from ldm.metrics.weights import sha256_of


@pytest.fixture(scope="module")
def alex(tmp_path_factory):
    """AlexNet's convolutions with random weights, under torchvision's names."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("lpips") / "alexnet.pth"
    with torch.device("meta"):
        layers = torchvision.models.alexnet(weights=None).features
    save_random(layers, path)
    return path


def save_random(layers: torch.nn.Module, path) -> None:
    layers.to_empty(device="cpu")
    for parameter in layers.parameters():
        torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    torch.save({f"features.{name}": value for name, value in layers.state_dict().items()}, path)


@torch.no_grad()
@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_distances_equal_torchmetrics(net: str, tmp_path, monkeypatch) -> None:
    torch.manual_seed(0)
    kind = {"alex": torchvision.models.alexnet, "vgg": torchvision.models.vgg16}[net]
    with torch.device("meta"):
        layers = kind(weights=None).features
    save_random(layers, tmp_path / "backbone.pth")
    monkeypatch.setattr("torchmetrics.functional.image.lpips._get_tv_model_features", lambda *args, **kwargs: layers)
    theirs = _LPIPS(net=net)
    ours = LPIPS(tmp_path / "backbone.pth", backbone=net)
    a, b = images(3, seed=0, side=64), images(3, seed=1, side=64)
    assert_close(ours(a, b), theirs(a, b).flatten(), rtol=1e-4, atol=1e-6)


def test_an_image_is_at_no_distance_from_itself(alex) -> None:
    network = LPIPS(alex, backbone="alex")
    assert network(images(2, side=64), images(2, side=64)).abs().max() == 0


def test_the_distance_can_be_differentiated(alex) -> None:
    network = LPIPS(alex, backbone="alex")
    pictures = images(2, side=64).requires_grad_()
    network(pictures, images(2, seed=1, side=64)).sum().backward()
    assert pictures.grad.abs().max() > 0
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_activations_keep_their_distance_in_half_precision(alex, dtype: torch.dtype) -> None:
    """As in training with trainer.precision=16-mixed and perceptual=lpips."""
    distance = LPIPS(alex, backbone="alex")
    for parameter in distance.stages[0].parameters():
        parameter.mul_(3e3)
    images, others = (torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(i)) * 2 - 1 for i in (0, 1))
    assert distance.stages[0]((images - distance.shift) / distance.scale).max() > 500
    expected = distance(images, others)
    with torch.autocast("cpu", dtype):
        found = distance(images, others)
    assert_close(found, expected, rtol=0.02, atol=0)


def test_the_mean_of_a_metric_is_that_of_its_pairs(alex) -> None:
    network = LPIPS(alex, backbone="alex").double()
    metric = PerceptualDistance(network)
    a, b = images(5, seed=0, side=64), images(5, seed=1, side=64)
    for part in (slice(0, 2), slice(2, 5)):
        metric.update(a[part], b[part])
    assert_close(metric.compute(), network(as_seen(a), as_seen(b)).mean(), rtol=1e-9, atol=0)


def test_diversity_is_the_mean_over_pairs_of_one_prompt(alex) -> None:
    network = LPIPS(alex, backbone="alex").double()
    metric = PairwiseDiversity(network)
    prompts = [images(3, seed=0, side=64), images(4, seed=1, side=64)]
    means = []
    for samples in prompts:
        metric.update(samples)
        seen = as_seen(samples)
        pairs = [network(seen[i : i + 1], seen[j : j + 1]) for i in range(len(seen)) for j in range(i)]
        means.append(torch.cat(pairs).mean())
    assert_close(metric.compute(), torch.stack(means).mean(), rtol=1e-9, atol=0)


def test_one_sample_over_and_over_has_no_diversity(alex) -> None:
    metric = PairwiseDiversity(LPIPS(alex, backbone="alex"))
    metric.update(images(1, side=64).expand(4, -1, -1, -1))
    assert metric.compute() == 0


def test_a_single_sample_is_refused(alex) -> None:
    with pytest.raises(ValueError, match="got 1 samples of a prompt"):
        PairwiseDiversity(LPIPS(alex, backbone="alex")).update(images(1, side=64))


def test_a_distance_without_activations_is_refused() -> None:
    with pytest.raises(ValueError, match="got Identity as distance, expected a module with embed and between"):
        PairwiseDiversity(torch.nn.Identity())


def test_the_protocol_names_backbone_and_both_hashes(alex) -> None:
    described = LPIPS(alex, backbone="alex").describe()
    assert (described["network"], described["sha256"]) == ("LPIPS alex", sha256_of(alex))
    assert len(described["heads_sha256"]) == 64


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ("vgg16-397923af.pth", "download.pytorch.org", "weights_path")),
        ({"weights_path": "no.pth", "backbone": "alex"}, ("no.pth", "alexnet-owt-7be5be79.pth", "weights_path")),
    ],
)
def test_missing_weights_name_file_source_and_option(options, words, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError) as error:
        LPIPS(**options)
    for word in words:
        assert word in str(error.value)


def test_missing_heads_name_their_own_option(alex) -> None:
    with pytest.raises(FileNotFoundError, match="heads_path"):
        LPIPS(alex, backbone="alex", heads_path="no.pth")


def test_an_unknown_backbone_is_refused() -> None:
    with pytest.raises(ValueError, match="got backbone='squeeze', expected one of vgg, alex"):
        LPIPS(backbone="squeeze")
