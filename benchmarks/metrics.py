"""Metrics of given features: time and peak memory beside torchmetrics and torch-fidelity, and the matrix square root.

    python benchmarks/metrics.py compare --images 50000      # each metric of each library in its own process
    python benchmarks/metrics.py evaluation --images 50000   # FID, KID and IS (and precision and recall) together
    python benchmarks/metrics.py networks --images 16        # what Inception takes for these three, on few images
    python benchmarks/metrics.py roots                       # tr (S_1 S_2)^(1/2) against scipy

But for `networks`, features are random numbers, N x 2048 on each side (logits N x 1008 for the Inception Score), handed
over in batches of 64 as a network would. Seconds are those of the processor, so that other work on the machine does not
count: compare with OMP_NUM_THREADS=1. Needs the test extra.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

BATCH = 64
FEATURES, LOGITS = 2048, 1008
# Pixels of the images that `networks` shows.
IMAGE_SIDE = 256


class Drawn(nn.Module):
    """Random features in the place of a network's: what `images` are makes no difference, only how many."""

    def __init__(self, num_features: int, seed: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, images: Tensor) -> Tensor:
        """(B, num_features), float32, of images (B, ...)."""
        # Not centred, as activations are not.
        return torch.rand(len(images), self.num_features, generator=self.generator)


def batches(num_images: int) -> Iterator[Tensor]:
    """Places 0 to num_images - 1, in batches."""
    return iter(torch.arange(num_images).split(BATCH))


def drawn(num_images: int, seed: int, size: int = FEATURES) -> Tensor:
    """All features of one side, as a library that wants them at once takes them."""
    network = Drawn(size, seed)
    return torch.cat([network(places) for places in batches(num_images)])


def ours(name: str, num_images: int) -> object:
    """One of this project's metrics."""
    from ldm import metrics

    network = Drawn(LOGITS if name == "inception_score" else FEATURES, 0)
    kinds = {
        "fid": metrics.FrechetDistance,
        "kid": metrics.KernelDistance,
        "inception_score": metrics.InceptionScore,
        "precision_recall": metrics.PrecisionRecall,
        "density_coverage": metrics.DensityCoverage,
    }
    metric = kinds[name](network)
    for places in batches(num_images):
        images = torch.zeros(len(places), 3, 2, 2)
        if name == "inception_score":
            metric.update(images, places)
            continue
        for real in (True, False):
            metric.update(images, real=real) if name == "fid" else metric.update(images, places, real=real)
    return metric.compute()


def torchmetrics(name: str, num_images: int) -> object:
    """The metric of that name in torchmetrics, as it comes."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.inception import InceptionScore
    from torchmetrics.image.kid import KernelInceptionDistance

    network = Drawn(LOGITS if name == "inception_score" else FEATURES, 0)
    kinds = {"fid": FrechetInceptionDistance, "kid": KernelInceptionDistance, "inception_score": InceptionScore}
    metric = kinds[name](network)
    for places in batches(num_images):
        images = torch.zeros(len(places), 3, 2, 2, dtype=torch.uint8)
        if name == "inception_score":
            metric.update(images)
            continue
        for real in (True, False):
            metric.update(images, real=real)
    return metric.compute()


def torch_fidelity(name: str, num_images: int) -> object:
    """The formula of that name in torch-fidelity, which takes all features at once."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    if name == "inception_score":
        return isc_features_to_metric(drawn(num_images, 0, LOGITS))
    generated, real = drawn(num_images, 0), drawn(num_images, 1)
    if name == "fid":
        return fid_statistics_to_metric(*map(fid_features_to_statistics, (generated, real)), False)
    if name == "kid":
        return kid_features_to_metric(generated, real, verbose=False)
    return prc_features_to_metric(generated, real, save_cpu_ram=True, verbose=False)


class Numbered:
    """A set of images that have a number each and no pixels: their features are on disk already."""

    def __init__(self, num_images: int) -> None:
        self.num_images = num_images

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> dict[str, object]:
        """Never asked for."""
        raise IndexError(index)

    def row(self, index: int) -> dict[str, object]:
        """What belongs to an image besides its pixels."""
        return {"prompt": ""}

    def describe(self) -> dict[str, object]:
        """What a protocol says of them."""
        return {"count": self.num_images}


def our_evaluation(name: str, num_images: int) -> object:
    """Metrics of `ldm evaluate`, separated by +, from features that a store gets a part at a time, as it does."""
    import tempfile

    import numpy as np

    from ldm import metrics
    from ldm.generation.evaluation.features import FeatureStore
    from ldm.generation.evaluation.measurement import Measurement

    kinds = {"fid": metrics.FrechetDistance, "kid": metrics.KernelDistance, "precision_recall": metrics.PrecisionRecall}
    wide, logits = Drawn(FEATURES, 0), Drawn(LOGITS, 0)
    chosen = {part: kinds[part](wide) for part in name.split("+") if part in kinds}
    if "inception_score" in name:
        chosen["inception_score"] = metrics.InceptionScore(logits)
    networks = metrics.share_networks(chosen.values())
    with tempfile.TemporaryDirectory() as place:
        stores = [FeatureStore(Numbered(num_images), Path(place) / side) for side in ("generated", "real")]
        for store in stores:
            for part in range(store.num_parts):
                for key, network in networks.items():
                    store.path(key, part).parent.mkdir(parents=True, exist_ok=True)
                    np.save(store.path(key, part), network(torch.empty(len(store.places(part)))).numpy())
        return Measurement(chosen, *stores, folder=Path(place), device=torch.device("cpu")).figures()


def their_evaluation(name: str, num_images: int) -> object:
    """The same metrics of torchmetrics, which keep what each keeps, fed in one loop."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.inception import InceptionScore
    from torchmetrics.image.kid import KernelInceptionDistance

    wide, logits = Drawn(FEATURES, 0), Drawn(LOGITS, 0)
    kinds = {"fid": FrechetInceptionDistance, "kid": KernelInceptionDistance}
    pairs = [kinds[part](wide) for part in name.split("+") if part in kinds]
    score = InceptionScore(logits)
    for places in batches(num_images):
        images = torch.zeros(len(places), 3, 2, 2, dtype=torch.uint8)
        score.update(images)
        for metric in pairs:
            metric.update(images, real=True)
            metric.update(images, real=False)
    return [metric.compute() for metric in [*pairs, score]]


def networks(num_images: int) -> None:
    """Prints what Inception with random weights takes of FID, KID and IS together, a real and a generated image each.

    Ours sees every image once; torchmetrics has a network a metric.
    """
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        weights = Path(place) / "inception.pth"
        write_random_inception(weights)
        print("| FID, KID and IS | CPU seconds a pair of images | pairs/s |\n|---|---:|---:|")
        for name, show in (("ldm", our_networks(weights)), ("torchmetrics", their_networks(weights))):
            show(2)
            start = time.process_time()
            show(num_images)
            seconds = (time.process_time() - start) / num_images
            print(f"| {name} | {seconds:.3f} | {1 / seconds:.2f} |", flush=True)


def write_random_inception(path: Path) -> None:
    """Weights of torch-fidelity's network, which can only be built from a file."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unread(FeatureExtractorInceptionV3):
        def load_state_dict(self, state: object) -> None:
            """Leaves the weights as they were drawn."""

    torch.save({}, path)
    torch.save(Unread("inception-v3-compat", ["2048"], str(path)).state_dict(), path)


def our_networks(weights: Path) -> Callable[[int], object]:
    """Shows N images of each side to the networks of our three metrics."""
    from ldm import metrics

    wide, logits = (metrics.InceptionFeatures(weights, output=output) for output in ("2048", "logits_unbiased"))
    kinds = [metrics.FrechetDistance(wide), metrics.KernelDistance(wide), metrics.InceptionScore(logits)]
    generated = metrics.share_networks(kinds)
    real = {key: network for key, network in generated.items() if network is wide}

    def show(num_images: int) -> None:
        for found in (generated, real):
            for part in torch.zeros(num_images, 3, IMAGE_SIDE, IMAGE_SIDE).split(BATCH):
                metrics.extract(found, part)

    return show


def their_networks(weights: Path) -> Callable[[int], object]:
    """Shows N images of each side to torchmetrics' three."""
    from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3
    from torchmetrics.image.inception import InceptionScore
    from torchmetrics.image.kid import KernelInceptionDistance

    def network(output: str) -> nn.Module:
        return NoTrainInceptionV3("inception-v3-compat", [output], str(weights))

    pairs = [kind(network(str(FEATURES))) for kind in (FrechetInceptionDistance, KernelInceptionDistance)]
    score = InceptionScore(network("logits_unbiased"))

    def show(num_images: int) -> None:
        for part in torch.zeros(num_images, 3, IMAGE_SIDE, IMAGE_SIDE, dtype=torch.uint8).split(BATCH):
            score.update(part)
            for metric in pairs:
                metric.update(part, real=True)
                metric.update(part, real=False)

    return show


LIBRARIES: dict[str, tuple[Callable[[str, int], object], tuple[str, ...]]] = {
    "ldm": (ours, ("fid", "kid", "inception_score", "precision_recall", "density_coverage")),
    "torchmetrics": (torchmetrics, ("fid", "kid", "inception_score")),
    "ldm evaluate": (our_evaluation, ("fid+inception_score", "fid+kid+inception_score")),
    "torchmetrics together": (their_evaluation, ("fid+inception_score", "fid+kid+inception_score")),
    "torch-fidelity": (torch_fidelity, ("fid", "kid", "inception_score", "precision_recall")),
}


def peak_mib() -> float:
    """Peak resident memory of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(library: str, name: str, num_images: int) -> None:
    """Prints one measurement as JSON: processor seconds, and MiB beyond what the imports take."""
    warnings.simplefilter("ignore")
    run, _ = LIBRARIES[library]
    for module in ("ldm.metrics", "torchmetrics.image", "torch_fidelity"):
        importlib.import_module(module)
    # Loads what linear algebra needs.
    torch.linalg.eigh(drawn(2, 0).T.cov()[:2, :2])
    before, start = peak_mib(), time.process_time()
    run(name, num_images)
    print(json.dumps({"seconds": time.process_time() - start, "mib": peak_mib() - before}))


def compare(num_images: int, *, together: bool) -> None:
    """Prints a table of all libraries and metrics: one by one, or together as an evaluation takes them."""
    print("| metric | library | CPU seconds | images/s | MiB |\n|---|---|---:|---:|---:|")
    for library, (_, names) in LIBRARIES.items():
        for name in names:
            if ("+" in name) != together:
                continue
            command = [sys.executable, __file__, "measure", library, name, "--images", str(num_images)]
            output = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ).stdout
            found = json.loads(output.strip().splitlines()[-1])
            speed = 2 * num_images / found["seconds"]
            print(f"| {name} | {library} | {found['seconds']:.1f} | {speed:.0f} | {found['mib']:.0f} |", flush=True)


def roots() -> None:
    """Prints processor seconds for tr (S_1 S_2)^(1/2) by singular values and by scipy's matrix square root."""
    from scipy.linalg import sqrtm

    from ldm.metrics import Statistics, frechet_distance

    print("| D | svd of factors, s | scipy sqrtm, s | relative difference |\n|---:|---:|---:|---:|")
    for size in (512, 1024, 2048):
        sides = [torch.rand(2 * size, size, generator=torch.Generator().manual_seed(seed)).double() for seed in (0, 1)]
        a, b = (side.T.cov() for side in sides)
        start = time.process_time()
        one, other = (Statistics(torch.zeros(size).double(), side) for side in (a, b))
        mine = (a.trace() + b.trace() - frechet_distance(one, other)).item() / 2
        middle = time.process_time()
        theirs = float(sqrtm((a @ b).numpy()).real.trace())
        end = time.process_time()
        print(f"| {size} | {middle - start:.2f} | {end - middle:.2f} | {abs(mine / theirs - 1):.1e} |", flush=True)


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    table = commands.add_parser("compare")
    whole = commands.add_parser("evaluation")
    one = commands.add_parser("measure")
    one.add_argument("library", choices=LIBRARIES)
    one.add_argument("name")
    for command in (table, whole, one):
        command.add_argument("--images", type=int, default=50_000)
    few = commands.add_parser("networks")
    few.add_argument("--images", type=int, default=16)
    commands.add_parser("roots")
    arguments = parser.parse_args()
    if arguments.command in ("compare", "evaluation"):
        compare(arguments.images, together=arguments.command == "evaluation")
    elif arguments.command == "measure":
        measure(arguments.library, arguments.name, arguments.images)
    elif arguments.command == "networks":
        networks(arguments.images)
    else:
        roots()


if __name__ == "__main__":
    main()
