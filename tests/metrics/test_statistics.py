import numpy as np
import pytest
import torch
from metric_helpers import Pixels, images
from torch.testing import assert_close

from ldm.metrics import FrechetDistance, Statistics, as_seen
from ldm.metrics.features import describe_network


def statistics(seed: int = 0, count: int = 80) -> Statistics:
    return Statistics.of(Pixels()(as_seen(images(count, seed=seed))))


def distance(reference=None, *, reals: torch.Tensor | None = None) -> torch.Tensor:
    metric = FrechetDistance(Pixels(), reference=reference)
    metric.update(images(90, seed=1), real=False)
    if reals is not None:
        metric.update(reals, real=True)
    return metric.compute()


def test_moments_equal_numpys() -> None:
    features = images(50).flatten(1)[:, :6]
    found = Statistics.of(features)
    assert_close(found.mean.numpy(), features.double().numpy().mean(axis=0))
    assert_close(found.covariance.numpy(), np.cov(features.double().numpy(), rowvar=False))
    assert found.count == 50


def test_a_file_comes_back_as_it_was_written(tmp_path) -> None:
    written = Statistics(**{**statistics().__dict__, "provenance": {"manifest": "ab12"}})
    written.write(tmp_path / "new" / "reference.npz")
    found = Statistics.read(tmp_path / "new" / "reference.npz")
    assert_close((found.mean, found.covariance), (written.mean, written.covariance), rtol=0, atol=0)
    assert (found.count, found.provenance) == (80, {"manifest": "ab12"})
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["reference.npz"]


@pytest.mark.parametrize("layout", ["adm", "pytorch_fid", "edm", "clean_fid"])
def test_published_layouts_serve_as_they_are(layout, tmp_path) -> None:
    known = statistics()
    mu, sigma = known.mean.numpy(), known.covariance.numpy()
    arrays = {"mu": mu, "sigma": sigma}
    if layout == "adm":
        # ADM's batches hold images beside both kinds of statistics.
        arrays |= {"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "mu_s": np.zeros(7), "sigma_s": np.eye(7)}
    if layout == "clean_fid":
        arrays = {"mu": mu.astype(np.float32), "sigma": sigma.astype(np.float32)}
    (np.savez_compressed if layout == "pytorch_fid" else np.savez)(tmp_path / "reference.npz", **arrays)
    found = distance(tmp_path / "reference.npz")
    assert_close(found, distance(reals=images(80)), rtol=1e-5 if layout == "clean_fid" else 1e-9, atol=0)


def test_the_projects_read_what_we_write(tmp_path) -> None:
    statistics().write(tmp_path / "reference.npz")
    with np.load(tmp_path / "reference.npz") as file:
        assert (file["mu"].shape, file["sigma"].shape, file["mu"].dtype) == ((4,), (4, 4), np.float64)


def test_spatial_statistics_that_a_metric_wrote_are_a_reference(tmp_path) -> None:
    network = Pixels()
    network.statistics_suffix = "_s"
    metric = FrechetDistance(network)
    metric.update(images(80), real=True)
    metric.statistics(real=True).write(tmp_path / "reference.npz")
    beside = FrechetDistance(network, reference=tmp_path / "reference.npz")
    assert beside.reference is not None and beside.reference.count == 80


def test_spatial_statistics_are_those_with_the_suffix(tmp_path) -> None:
    np.savez(tmp_path / "adm.npz", mu=np.zeros(9), sigma=np.eye(9), mu_s=np.ones(4), sigma_s=np.eye(4))
    network = Pixels()
    network.statistics_suffix = "_s"
    assert FrechetDistance(network, reference=tmp_path / "adm.npz").reference.mean.tolist() == [1, 1, 1, 1]


def test_a_metric_gives_the_statistics_of_what_it_saw() -> None:
    metric = FrechetDistance(Pixels())
    for batch in images(80).split(7):
        metric.update(batch, real=True)
    found = metric.statistics(real=True, provenance={"manifest": "ab12"})
    assert_close(found.covariance, statistics().covariance, rtol=1e-9, atol=1e-12)
    assert found.provenance == {"manifest": "ab12", "features": describe_network(Pixels())}
    assert_close(distance(found), distance(reals=images(80)), rtol=1e-9, atol=0)


def test_a_metric_that_saw_nothing_has_no_statistics() -> None:
    with pytest.raises(ValueError, match="got 0 images, expected at least 2"):
        FrechetDistance(Pixels()).statistics(real=True)


def test_statistics_of_other_features_are_refused() -> None:
    foreign = Statistics(**{**statistics().__dict__, "provenance": {"features": {"network": "another"}}})
    with pytest.raises(ValueError, match=r"statistics of features \{'network': 'another'\}"):
        distance(foreign)


def test_statistics_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="of 4 features, expected 6"):
        FrechetDistance(Pixels(6), reference=statistics())


def test_real_images_beside_a_reference_are_refused() -> None:
    with pytest.raises(ValueError, match="got real images beside reference statistics"):
        distance(statistics(), reals=images(5))


def test_a_reference_is_in_the_protocol() -> None:
    metric = FrechetDistance(Pixels(), reference=statistics())
    assert metric.describe() == {"features": describe_network(Pixels()), "reference": {"count": 80}}


def test_a_missing_file_is_named_in_one_line(tmp_path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        FrechetDistance(Pixels(), reference=tmp_path / "nothing.npz")
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in (str(tmp_path / "nothing.npz"), "mu and sigma", "reference"))


def test_a_file_of_images_is_refused(tmp_path) -> None:
    np.savez(tmp_path / "samples.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="with arr_0, expected mu and sigma"):
        Statistics.read(tmp_path / "samples.npz")


def test_a_file_that_would_run_code_is_refused(tmp_path) -> None:
    np.savez(tmp_path / "pickled.npz", mu=np.array([object()]), sigma=np.eye(1))
    with pytest.raises(ValueError, match="allow_pickle"):
        Statistics.read(tmp_path / "pickled.npz")


def test_mean_and_covariance_have_to_match() -> None:
    with pytest.raises(ValueError, match="expected \\(D,\\) and \\(D, D\\)"):
        Statistics(torch.zeros(3), torch.eye(4))
