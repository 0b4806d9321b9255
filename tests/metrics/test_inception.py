import sys

import numpy as np
import pytest
import torch
from metric_helpers import images, random_inception
from scipy.linalg import sqrtm
from test_preprocessing import clean_fid
from torch.testing import assert_close
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3

from ldm.cli.errors import mistake
from ldm.metrics import FrechetDistance, InceptionFeatures, InceptionScore, quantize
from ldm.metrics.inception import OUTPUTS
from ldm.metrics.inception_score import part_of

NAMES = tuple(name for name in OUTPUTS if name != "spatial")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("inception") / "inception.pth"


@pytest.fixture(scope="module")
def reference(path):
    """Torch-fidelity's network with random weights, all outputs."""
    return random_inception(path, NAMES)


@pytest.fixture(scope="module")
def build(path, reference):
    def build(**options) -> InceptionFeatures:
        return InceptionFeatures(path, **options)

    return build


def scipy_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Pytorch-fid's formula, with scipy's matrix square root."""
    root = sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False)).real
    shift = a.mean(axis=0) - b.mean(axis=0)
    return float(shift @ shift + np.trace(np.cov(a, rowvar=False) + np.cov(b, rowvar=False) - 2 * root))


class First(torch.nn.Module):
    """The first of a network's features: so few that a few images have a covariance of full rank in them."""

    num_features = 6

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network(images)[:, : self.num_features]


def two_sets() -> tuple[torch.Tensor, torch.Tensor]:
    coarse = images(14, seed=1, side=8)
    return images(16, seed=0, side=16), coarse.repeat_interleave(3, 2).repeat_interleave(3, 3)


def measured(network, generated: torch.Tensor, real: torch.Tensor) -> float:
    metric = FrechetDistance(First(network))
    metric.update(generated, real=False)
    metric.update(real, real=True)
    return metric.compute().item()


@torch.no_grad()
def test_every_output_equals_torch_fidelitys(build, reference) -> None:
    pictures = images(2, side=40)
    for name, expected in zip(NAMES, reference(quantize(pictures)), strict=True):
        network = build(output=name)
        found = network(pictures)
        assert found.shape == (2, network.num_features)
        # Averages are taken in another order.
        assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_spatial_features_are_seven_channels_of_one_branch_in_adms_order(build, reference) -> None:
    seen = []
    hook = reference.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    pictures = images(2, side=40)
    reference(quantize(pictures))
    hook.remove()
    network = build(output="spatial")
    expected = seen[0].permute(0, 2, 3, 1)[..., :7].reshape(2, -1)
    assert network.num_features == expected.shape[1] == 2023
    assert_close(network(pictures), expected)


@torch.no_grad()
def test_fid_equals_torch_fidelity_and_scipy(build, reference, monkeypatch) -> None:
    monkeypatch.setattr(reference, "features_list", ["64"])
    generated, real = two_sets()
    sides = [reference(quantize(side))[0][:, :6] for side in (generated, real)]
    theirs = fid_statistics_to_metric(*(fid_features_to_statistics(side.double()) for side in sides), False)
    found = measured(build(output="64"), generated, real)
    assert_close(found, theirs["frechet_inception_distance"], rtol=1e-4, atol=0)
    assert_close(found, scipy_distance(*(side.double().numpy() for side in sides)), rtol=1e-4, atol=0)


@torch.no_grad()
def test_clean_fid_equals_its_resizing_before_the_same_network(build, reference) -> None:
    generated, real = two_sets()
    layers = [reference.Conv2d_1a_3x3, reference.Conv2d_2a_3x3, reference.Conv2d_2b_3x3, reference.MaxPool_1]
    sides = []
    for side in (generated, real):
        maps = torch.nn.Sequential(*layers)((clean_fid(quantize(side).float(), 299) - 128) / 128)
        sides.append(maps.mean((2, 3))[:, :6].double().numpy())
    found = measured(build(output="64", resize="bicubic"), generated, real)
    assert_close(found, scipy_distance(*sides), rtol=1e-4, atol=0)


@torch.no_grad()
def test_torchmetrics_changed_its_filter_and_we_name_ours(path, build) -> None:
    # Antialiased by default since torchmetrics 1.8; published FIDs are not.
    large = images(2, side=500)
    stock = NoTrainInceptionV3("inception-v3-compat", ["64"], str(path))
    assert_close(build(output="64", resize="bilinear")(large), stock(quantize(large)).view(2, 64), rtol=1e-4, atol=1e-5)
    published = build(output="64")(large)
    assert (published - stock(quantize(large)).view(2, 64)).abs().max() > 0.01


@torch.no_grad()
def test_pixels_that_torchmetrics_wraps_are_clamped(path, build) -> None:
    white = torch.full((4, 3, 16, 16), 1.02)
    stock = FrechetInceptionDistance(64, normalize=True, feature_extractor_weights_path=str(path), antialias=False)
    stock.update((white + 1) / 2, real=True)
    wrapped = stock.real_features_sum / 4
    metric = FrechetDistance(build(output="64"))
    metric.update(white, real=True)
    expected = build(output="64")(torch.ones(1, 3, 16, 16))[0].double()
    assert_close(metric.sums[1] / 4, expected, rtol=1e-5, atol=1e-6)
    assert (wrapped - expected).abs().max() > 0.01


def test_inception_score_of_splits_equals_torch_fidelity() -> None:
    logits = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)).double()

    class Given(torch.nn.Module):
        num_features = 5

        def forward(self, images):
            return logits

    metric = InceptionScore(Given(), splits=3)
    # Torch-fidelity takes splits as blocks: the images of a block get places of one part.
    metric.update(torch.zeros(60, 3, 4, 4), part_of(torch.arange(60), 3).argsort(stable=True))
    found = [value.item() for value in metric.compute()]
    assert_close(found, list(isc_features_to_metric(logits, 3, shuffle=False).values()), rtol=1e-9, atol=0)


def test_the_protocol_names_network_resizing_and_hash(build) -> None:
    described = build(output="64", resize="bicubic").describe()
    assert described.pop("sha256") == build().sha256
    assert described == {
        "network": "Inception-v3 2015-12-05",
        "output": "64",
        "resize": "bicubic",
        "weights": "inception.pth",
    }


def test_missing_inception_weights_name_file_source_and_option(tmp_path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        InceptionFeatures(tmp_path / "nothing.pth")
    message = str(error.value)
    assert "\n" not in message
    for word in (str(tmp_path / "nothing.pth"), "github.com/mseitzer/pytorch-fid", "weights_path"):
        assert word in message


def test_inception_weights_are_not_downloaded(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"pt_inception-2015-12-05-6726825d\.pth"):
        InceptionFeatures()


def test_without_torch_fidelity_the_extra_is_named(build, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ModuleNotFoundError) as error:
        build()
    assert mistake(error.value) == (
        "the package torch_fidelity is not installed; install it with: pip install 'ldm[metrics]'"
    )


def test_weights_in_the_usual_cache_are_found(tmp_path, monkeypatch, path, reference) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth").symlink_to(path)
    assert InceptionFeatures().weights == "weights-inception-2015-12-05-6726825d.pth"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"output": "pool3"}, "got output='pool3', expected one of"), ({"resize": "area"}, "got resize='area'")],
)
def test_unknown_settings_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        InceptionFeatures(**options)
