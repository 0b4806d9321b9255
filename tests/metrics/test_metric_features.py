from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from ldm.generation.postprocess import to_pil
from ldm.metrics import ClassifierFeatures, FrechetDistance, InceptionFeatures, as_seen, quantize


def test_quantize_gives_the_pixels_of_the_png() -> None:
    images = torch.rand(2, 3, 8, 8) * 2.6 - 1.3
    pixels = np.stack([np.asarray(picture) for picture in to_pil(images)])
    assert_close(quantize(images).permute(0, 2, 3, 1), torch.from_numpy(pixels))


@pytest.mark.parametrize(("value", "level"), [(-1.01, 0), (1.01, 255), (-1.0, 0), (1.0, 255), (0.0, 128), (0.002, 128)])
def test_quantize_clamps_and_rounds_where_a_cast_would_wrap(value: float, level: int) -> None:
    assert quantize(torch.full((1, 3, 1, 1), value)).unique().tolist() == [level]


def test_an_image_that_was_seen_once_looks_the_same_again() -> None:
    seen = as_seen(torch.rand(4, 3, 8, 8) * 2 - 1)
    assert_close(as_seen(seen), seen, atol=0, rtol=0)


def test_classifier_features_take_the_named_output() -> None:
    class Judge(nn.Module):
        def forward(self, images):
            return SimpleNamespace(features=images.mean((2, 3)), digit=images.amax((2, 3)))

    images = torch.rand(2, 3, 4, 4)
    network = ClassifierFeatures(Judge(), output="digit", num_features=3)
    assert_close(network(images), images.amax((2, 3)))


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


def test_an_unknown_inception_output_is_refused() -> None:
    with pytest.raises(ValueError, match="got output='pool3', expected one of"):
        InceptionFeatures(output="pool3")


def test_a_feature_network_that_hides_its_size_is_refused() -> None:
    with pytest.raises(ValueError, match="integer `num_features`"):
        FrechetDistance(nn.Flatten())


@pytest.mark.slow
def test_inception_from_a_local_file_equals_torch_fidelity(tmp_path) -> None:
    extractor = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    path = tmp_path / "inception.pth"
    reference = random_inception(extractor, path)
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    network = InceptionFeatures(path)
    assert network.num_features == 2048
    assert_close(network(images), reference(quantize(images))[0])


def random_inception(extractor, path):
    """Torch-fidelity's network with random weights, saved to path: it can only be built from a file."""
    torch.manual_seed(0)
    build = extractor.FeatureExtractorInceptionV3
    original = build.load_state_dict
    try:
        build.load_state_dict = lambda self, state: None
        torch.save({}, path)
        network = build("inception-v3-compat", ["2048"], str(path))
    finally:
        build.load_state_dict = original
    torch.save(network.state_dict(), path)
    return network
