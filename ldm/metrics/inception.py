"""The Inception-v3 of published FIDs and Inception Scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from ldm.metrics.features import quantize
from ldm.metrics.preprocessing import resizer
from ldm.metrics.weights import find_weights, read_weights, sha256_of, torch_hub_file

FILES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
SOURCE = (
    f"{FILES[0]} (release fid_weights of github.com/mseitzer/pytorch-fid) or "
    f"{FILES[1]} (release v0.2.0 of github.com/toshas/torch-fidelity)"
)
OPTION = "weights_path (inception_weights=FILE on the command line)"
INPUT_SIZE = 299
# The spatial features of sFID: the first seven channels of one branch, 17 x 17.
SPATIAL_CHANNELS = 7
OUTPUTS = {
    "64": 64,
    "192": 192,
    "768": 768,
    "2048": 2048,
    "spatial": SPATIAL_CHANNELS * 17 * 17,
    "logits_unbiased": 1008,
    "logits": 1008,
}
# The network's parts in order, and the output that ends after each.
STAGES = {
    "64": ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1"),
    "192": ("Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2"),
    "spatial": ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c"),
    "768": ("Mixed_6d", "Mixed_6e"),
    "2048": ("Mixed_7a", "Mixed_7b", "Mixed_7c"),
}


class InceptionFeatures(nn.Module):
    """The Inception-v3 of published FIDs and Inception Scores: TensorFlow's 2015-12-05 weights.

    Args:
        weights_path: the weights file. None looks for it in torch.hub's cache; nothing is ever downloaded.
        output: "2048" for the Fréchet distance, "spatial" for sFID, "logits_unbiased" for the Inception Score.
        resize: to 299 x 299: "tf1_bilinear" as in the graph of published FIDs, "bicubic" as in clean-fid,
            "bilinear" with antialiasing as in torchmetrics since 1.8.

    Raises:
        FileNotFoundError: no weights; the message names file, source and option.
        ValueError: an output or resizing that there is not.
        ModuleNotFoundError: torch-fidelity is not installed.

    Source: Szegedy et al. 2016; port by Obukhov et al., torch-fidelity. Spatial features: Nash et al. 2021 as ADM's
    evaluator takes them, the first seven channels of `mixed_6/conv`, flattened in its order (height, width, channel).
    """

    def __init__(
        self, weights_path: Path | str | None = None, *, output: str = "2048", resize: str = "tf1_bilinear"
    ) -> None:
        super().__init__()
        if output not in OUTPUTS:
            raise ValueError(f"got output={output!r}, expected one of {list(OUTPUTS)}")
        self.resizer = resizer(resize)
        path = find_inception_weights(weights_path)
        # torch-fidelity unpickles whatever it is given; this read refuses anything but tensors before it may.
        given = read_weights(path).keys()
        if missing := sorted({"Conv2d_1a_3x3.conv.weight", "Mixed_7c.branch_pool.conv.weight", "fc.weight"} - given):
            raise ValueError(
                f"got weights in {path} without {', '.join(missing)}, expected those of {SOURCE}; give the file as "
                f"{OPTION}"
            )
        self.network = _inception(path)
        self.num_features = OUTPUTS[output]
        # Where ADM's reference files keep the statistics of these features.
        self.statistics_suffix = "_s" if output == "spatial" else ""
        self.output, self.resize = output, resize
        self.weights, self.sha256 = path.name, sha256_of(path)

    def describe(self) -> dict[str, Any]:
        """What goes into the protocol."""
        return {
            "network": "Inception-v3 2015-12-05",
            "output": self.output,
            "resize": self.resize,
            "weights": self.weights,
            "sha256": self.sha256,
        }

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, num_features) of images (B, 3, H, W) in [-1, 1], of any size."""
        return self.several(images, [self.output])[0]

    @property
    def trunk(self) -> str:
        """The same for networks that differ in their output alone, so that one pass serves them all."""
        return f"{self.sha256} {self.resize}"

    def several(self, images: Tensor, outputs: Sequence[str]) -> list[Tensor]:
        """Several outputs of images (B, 3, H, W) in [-1, 1] in one pass, each (B, its size)."""
        x = self.resizer(quantize(images).float(), INPUT_SIZE)
        # By 128, not 127.5: so does the graph.
        x = (x - 128) / 128
        found: dict[str, Tensor] = {}
        for output, stages in STAGES.items():
            for stage in stages:
                x = getattr(self.network, stage)(x)
            if output in outputs:
                found[output] = self._spatial(x) if output == "spatial" else x.mean((2, 3))
            if found.keys() == set(outputs):
                return [found[name] for name in outputs]
        found["logits_unbiased"] = x.mean((2, 3)) @ self.network.fc.weight.T
        found["logits"] = found["logits_unbiased"] + self.network.fc.bias
        return [found[name] for name in outputs]

    def _spatial(self, x: Tensor) -> Tensor:
        return rearrange(self.network.Mixed_6d.branch1x1(x)[:, :SPATIAL_CHANNELS], "b c h w -> b (h w c)")


def _inception(path: Path) -> Any:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        message = "got no torch-fidelity, expected it for Inception; pip install 'ldm[metrics]'"
        raise ModuleNotFoundError(message, name="torch_fidelity") from error
    return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(path))


def find_inception_weights(weights_path: Path | str | None) -> Path:
    """The file at `weights_path`, or, when None, in torch.hub's cache; raises FileNotFoundError otherwise."""
    cached = [torch_hub_file(name) for name in FILES]
    return find_weights(weights_path, cached=cached, what="Inception", source=SOURCE, option=OPTION)
