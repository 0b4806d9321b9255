import pytest
import torch
from torch.testing import assert_close

from ldm.networks import DigitClassifier
from ldm.networks.digit_classifier import most_likely_colours
from ldm.nn.weights import save_weights

PALETTE = [[0, 0, 0], [255, 255, 255], [220, 30, 30], [30, 150, 50], [40, 70, 220], [250, 215, 40]]


def small_classifier() -> DigitClassifier:
    torch.manual_seed(0)
    return DigitClassifier(PALETTE, width=8, feature_dim=16).eval()


def all_pairs() -> tuple[torch.Tensor, torch.Tensor]:
    pairs = torch.tensor([(i, p) for i in range(6) for p in range(6) if i != p])
    return pairs[:, 0], pairs[:, 1]


def test_ink_map_undoes_painting_in_every_pair_of_colours() -> None:
    ink, paper = all_pairs()
    maps = torch.rand(len(ink), 1, 32, 32)
    classifier = small_classifier()
    assert_close(classifier.ink_map(classifier.paint(maps, ink, paper), ink, paper), maps, atol=1e-5, rtol=0)


def test_ink_map_stays_in_zero_to_one_beyond_the_two_colours() -> None:
    ink, paper = torch.tensor([2]), torch.tensor([3])
    maps = small_classifier().ink_map(torch.rand(1, 3, 32, 32) * 4 - 2, ink, paper)
    assert maps.min() == 0 and maps.max() == 1


def test_ink_map_of_equal_ink_and_paper_is_empty() -> None:
    same = torch.tensor([4])
    assert_close(small_classifier().ink_map(torch.rand(1, 3, 32, 32), same, same), torch.zeros(1, 1, 32, 32))


def test_features_and_digit_do_not_depend_on_the_colours() -> None:
    ink, paper = all_pairs()
    scan = torch.rand(1, 1, 32, 32).expand(len(ink), -1, -1, -1)
    classifier = small_classifier()
    prediction = classifier(classifier.paint(scan, ink, paper), ink=ink, paper=paper)
    assert_close(prediction.features, prediction.features[:1].expand_as(prediction.features), atol=1e-4, rtol=1e-4)
    assert_close(prediction.digit, prediction.digit[:1].expand_as(prediction.digit), atol=1e-4, rtol=1e-4)


def test_features_depend_on_the_shape() -> None:
    classifier = small_classifier()
    ink, paper = torch.tensor([0, 0]), torch.tensor([1, 1])
    features = classifier(classifier.paint(torch.rand(2, 1, 32, 32), ink, paper), ink=ink, paper=paper).features
    assert (features[0] - features[1]).abs().max() > 1e-3


def test_predicted_ink_and_paper_differ_even_where_both_logits_favour_one_colour() -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0]])
    ink, paper = most_likely_colours(logits, torch.tensor([[0.0, 9.0, 1.0]]))
    assert (ink.item(), paper.item()) == (2, 1)


def test_without_true_colours_the_predicted_ones_make_the_ink_map() -> None:
    classifier = small_classifier()
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    free = classifier(images)
    ink, paper = most_likely_colours(free.ink, free.paper)
    assert_close(free.features, classifier(images, ink=ink, paper=paper).features)


def test_every_parameter_gets_a_gradient() -> None:
    classifier = small_classifier().train()
    prediction = classifier(torch.rand(4, 3, 32, 32) * 2 - 1)
    (prediction.digit.square().sum() + prediction.ink.square().sum() + prediction.paper.square().sum()).backward()
    without = [name for name, p in classifier.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_a_saved_classifier_loads_to_the_same_predictions(tmp_path) -> None:
    classifier = small_classifier()
    config = {"palette": PALETTE, "width": 8, "feature_dim": 16}
    save_weights(
        tmp_path / "c.safetensors", classifier.state_dict(), target="ldm.networks.DigitClassifier", config=config
    )
    images = torch.rand(2, 3, 32, 32)
    assert_close(DigitClassifier.load(tmp_path / "c.safetensors")(images).digit, classifier(images).digit)


def test_weights_of_another_module_are_refused(tmp_path) -> None:
    save_weights(tmp_path / "a.safetensors", {"x": torch.zeros(1)}, target="ldm.autoencoders.KLAutoencoder", config={})
    with pytest.raises(ValueError, match="KLAutoencoder, expected a DigitClassifier"):
        DigitClassifier.load(tmp_path / "a.safetensors")


@pytest.mark.parametrize("palette", [[[0, 0, 0]], [[1, 2, 3], [1, 2, 3]], [[0, 0, 0], [0, 0, 256]], [[0, 0], [1, 1]]])
def test_a_palette_without_two_different_colours_is_refused(palette) -> None:
    with pytest.raises(ValueError, match="palette"):
        DigitClassifier(palette)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got images of shape \(1, 3, 64, 64\)"):
        small_classifier()(torch.zeros(1, 3, 64, 64))
