"""From a card's protocol to `ldm evaluate`'s overrides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf, open_dict

from ldm.cli.compose import conf_folder, group_options
from ldm.cli.errors import UserError
from ldm.cli.job import quote
from ldm.cli.run_folder import RunFolder

if TYPE_CHECKING:
    from ldm.generation.report import Card

# The option of conf/metric that measures a published figure.
METRICS = {
    **{name: name for name in ("fid", "inception_score", "sfid", "clip_score", "kid", "fd_dinov2", "rfid", "lpips")},
    **{
        "precision": "precision_recall",
        "recall": "precision_recall",
        "psnr": "reconstruction",
        "ssim": "reconstruction",
    },
    **{"cmmd": "cmmd", "clean_fid": "clean_fid"},
}
# Of a miniature: samples of an evaluation, and what its metrics count.
FEW = {"num_samples": 8, "batch_size": 8, "feature_batch_size": 8}
SMALLER = {"k": 2, "subset_size": 4, "num_subsets": 2, "splits": 2}
STAND_IN = {"_target_": "ldm.metrics.RandomFeatures", "num_features": 16}


def measured_metrics(row: Card, config: DictConfig) -> list[str]:
    """The metrics that measure what a row publishes; in a miniature those that random features serve."""
    named = row.evaluate.get("metrics") or [METRICS[name] for name in row.published if name in METRICS]
    if config.get("scale"):
        named = [name for name in named if name not in ("clip_score", "lpips", "cmmd")]
    if config.get("network") is not None:
        return list(dict.fromkeys(named))
    return list(dict.fromkeys("rfid" if name == "fid" else name for name in named))


def evaluation_overrides(folder: RunFolder, row: Card, number: int, settings: DictConfig) -> list[str]:
    """Overrides of `ldm evaluate` for the evaluation of this number, by a row's protocol.

    Raises:
        UserError: a sampler that there is not.
    """
    config, protocol, told = folder.config, row.protocol, row.evaluate
    is_small = bool(config.get("scale"))
    words = [f"metric=[{','.join(measured_metrics(row, config))}]", f"paths.runs={config.paths.runs}"]
    if config.get("network") is None:
        words += [f"reconstruct={folder.path}", f"reference={reference_of(config, told, default='validation')}"]
        words += [f"resolution={config.data.resolution}", f"out={folder.path / 'evaluations' / 'reproduction'}"]
        words += ["batch_size=8"] if is_small else []
        return [quote(word) for word in [*words, *_further(told, settings, is_small)]]
    samples = settings.num_samples or num_samples(row, is_small=is_small)
    words += [f"checkpoint={folder.path}", f"reference={reference_of(config, told, default='train')}"]
    words += [f"num_samples={samples}", f"seed={number * samples}"] if samples else [f"seed={number * 10**6}"]
    words += [f"conditions={told['conditions']}"] if told.get("conditions") else []
    words += [f"prompts={told['prompts']}"] if told.get("prompts") else []
    words += sampling_words(protocol, is_small=is_small)
    words += [f"{name}={value}" for name, value in FEW.items() if is_small and name != "num_samples"]
    return [quote(word) for word in [*words, *_further(told, settings, is_small)]]


def num_samples(row: Card, *, is_small: bool) -> int | None:
    """Samples of an evaluation by a row's protocol; None: one a validation sample, which metrics compare in pairs."""
    if not is_small:
        return row.protocol.get("num_samples")
    return None if row.evaluate.get("conditions") else FEW["num_samples"]


def sampling_words(protocol: Mapping[str, Any], *, is_small: bool) -> list[str]:
    """How to sample: sampler and discretization by their classes, steps, guidance, size."""
    words = []
    for group in ("sampler", "discretization"):
        part = protocol.get(group) or {}
        if "name" in part:
            words.append(f"{group}={option_of(group, part['name'])}")
            words += [f"{group}.{name}={value}" for name, value in part.items() if name != "name"]
    guidance = protocol.get("guidance") or {}
    words += [f"guidance.{name}={value}" for name, value in guidance.items()]
    if not is_small:
        words += [f"steps={protocol['steps']}"] if protocol.get("steps") else []
        words += [f"image_size={list(protocol['image_size'])}"] if protocol.get("image_size") else []
    return words


def option_of(group: str, name: str) -> str:
    """The option of a group that builds a class.

    Raises:
        UserError: none does.
    """
    for option in group_options(group):
        target = OmegaConf.select(OmegaConf.load(conf_folder() / group / f"{option}.yaml"), "_target_")
        if str(target).rpartition(".")[2] == name:
            return option
    raise UserError(f"card.protocol.{group}: got {name}, expected a class of conf/{group}")


def reference_of(config: DictConfig, told: Mapping[str, Any], *, default: str) -> str:
    """The real images: those that training or validation read, or a path."""
    named = str(told.get("reference") or default)
    is_small = bool(config.get("scale"))
    split = named if named in ("train", "validation") else "validation" if is_small else None
    if split is None:
        return named
    found = config.data.get(split)
    if found is None:
        raise UserError(f"data.{split}: got none, expected the real images that the card's protocol compares with")
    return str(found)


def miniature(config: DictConfig) -> None:
    """Lets metrics see random features and count few, in place."""
    with open_dict(config):
        config.report = None
        for metric in config.metric.values():
            if "features" in metric:
                metric.features = STAND_IN
            for name in SMALLER.keys() & metric.keys():
                metric[name] = SMALLER[name]


def _further(told: Mapping[str, Any], settings: DictConfig, is_small: bool) -> list[str]:
    own = [] if is_small else list(told.get("overrides") or [])
    return [*own, *map(str, settings.evaluate)]
