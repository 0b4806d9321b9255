import pytest
import torch
from torch import nn
from torch.testing import assert_close

from ldm.metrics import FrechetDistance, InceptionScore, quantize
from ldm.training.callbacks import SampleMetrics
from ldm.training.callbacks.sample_metrics import from_pil


class Means(nn.Module):
    """The mean of each channel."""

    num_features = 3

    def forward(self, images):
        return images.double().mean((2, 3))


def metrics(**settings) -> SampleMetrics:
    return SampleMetrics(
        distances={"fid": FrechetDistance(Means())},
        scores={"inception_score": InceptionScore(Means(), splits=2)},
        **({"num_images": 10, "every_n_steps": 2, "batch_size": 4} | settings),
    )


def validating(fit, tiny, data, callback, **settings):
    return fit(tiny, data, [callback], **({"limit_val_batches": 1.0, "val_check_interval": 2} | settings))


def test_metrics_are_logged_at_validation_and_monitored(tiny, data, fit, logged) -> None:
    trainer = validating(fit, tiny, data, metrics(), max_steps=4)
    assert {"val/fid", "val/inception_score", "val/sampling_seconds"} <= set(trainer.callback_metrics)
    assert len(logged("val/fid")) == 2


def test_the_logged_distance_is_that_of_the_sampled_and_the_validation_images(tiny, data, fit, logged) -> None:
    validating(fit, tiny, data, metrics(), max_steps=2)
    expected = FrechetDistance(Means())
    expected.update(next(data.iterate_once("validation", 10))["image"], real=True)
    expected.update(from_pil(tiny.sample([""] * 10, seeds=range(10))), real=False)
    [value] = logged("val/fid").values()
    assert value == pytest.approx(expected.compute().item(), rel=1e-5)


def test_one_set_of_samples_serves_all_metrics(tiny, data, fit) -> None:
    validating(fit, tiny, data, metrics(), max_steps=2)
    assert [seed for _, seeds in tiny.sampled for seed in seeds] == list(range(10))


def test_every_evaluation_measures_the_same_pictures_anew(tiny, data, fit, logged) -> None:
    validating(fit, tiny, data, metrics(), max_steps=4)
    first, second = logged("val/fid").values()
    assert first == pytest.approx(second, rel=1e-6)


@pytest.mark.parametrize("num_images", [3, 10, 25])
def test_prompts_are_spread_over_the_validation_captions(tiny, data, num_images: int) -> None:
    metrics(num_images=num_images).measure(data, tiny)
    seeds = [seed for _, seeds in tiny.sampled for seed in seeds]
    captions = [caption for captions, _ in tiny.sampled for caption in captions]
    assert seeds == list(range(num_images))
    counts = torch.tensor([captions.count(f"picture {i}") for i in range(10)])
    assert counts.max() - counts.min() <= 1


def test_pictures_come_in_full_at_any_batch_size(tiny, data) -> None:
    values = [metrics(batch_size=size).measure(data, tiny) for size in (1, 4, 10)]
    assert_close(values[0], values[1], rtol=1e-9, atol=1e-9)
    assert_close(values[0], values[2], rtol=1e-9, atol=1e-9)


def test_a_reference_gives_the_real_images_where_the_data_has_none(tiny, data) -> None:
    with_images = metrics().measure(data, tiny)
    latents = type(data)()
    plain = latents._batch
    latents._batch = lambda indices: {k: v for k, v in plain(indices).items() if k != "image"}
    assert metrics(reference=data).measure(latents, tiny) == with_images
    with pytest.raises(ValueError, match=r"set callback\.sample_metrics\.reference"):
        metrics().measure(latents, tiny)


def test_rounds_between_validations_are_left_out(tiny, data, fit) -> None:
    validating(fit, tiny, data, metrics(every_n_steps=4), max_steps=8)
    assert sum(len(seeds) for _, seeds in tiny.sampled) == 20


def test_no_metric_is_refused() -> None:
    with pytest.raises(ValueError, match="got no metric for sampled images"):
        SampleMetrics()


def test_pictures_come_back_as_the_levels_they_were(tiny) -> None:
    pictures = tiny.sample(["a", "b"], seeds=[3, 200])
    assert quantize(from_pil(pictures))[:, 0, 0, 0].tolist() == [3, 200]
