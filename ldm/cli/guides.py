"""Other models that guide a sampler: a worse one of the same data, or a classifier of noisy samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ldm.cli.build import build
from ldm.cli.errors import UserError
from ldm.cli.load import load
from ldm.cli.trust import check_targets
from ldm.conditioners import Unconditional
from ldm.diffusion import Autoguidance, ClassifierGuidance, Guidance
from ldm.generation import Pipeline
from ldm.networks import NoisyClassifier
from ldm.nn.fingerprint import weights_sha256
from ldm.nn.weights import read_weights

WITH_CLASSIFIER = ("classifier", "classifier_scale", "interval")


def guidance_of(given: Mapping[str, Any], pipeline: Pipeline, *, trust: Sequence[str] = ()) -> Guidance:
    """The guidance by another model that a command's settings ask for.

    Args:
        given: settings of the node `guidance` that are there: `guide` or `classifier`, and numbers.
        pipeline: the model that is guided.
        trust: packages besides ldm and torch that the other model's config may call.

    Raises:
        UserError: settings that contradict each other, or a model that does not fit.
        FileNotFoundError: there is no such model.
    """
    if "guide" in given:
        if strange := sorted(given.keys() & {"classifier", "classifier_scale"}):
            raise UserError(f"guidance.{strange[0]}: got one beside guidance.guide; leave one of them out")
        return away_from(given, pipeline, trust=trust)
    if strange := sorted(given.keys() - set(WITH_CLASSIFIER)):
        raise UserError(
            f"guidance.{strange[0]}: a classifier's guidance has no place for it; set guidance.classifier_scale"
        )
    if "classifier" not in given:
        raise UserError(
            "guidance.classifier_scale: got one without guidance.classifier, a run of a classifier; give it"
        )
    classifier = read_classifier(Path(str(given["classifier"])).expanduser(), trust=trust)
    settings = {**given, "classifier": classifier.to(pipeline.device), "classifier_sha256": weights_sha256(classifier)}
    return ClassifierGuidance(**settings)


def away_from(given: Mapping[str, Any], pipeline: Pipeline, *, trust: Sequence[str]) -> Autoguidance:
    """The guidance away from another model of ours.

    Raises:
        UserError: it has other latents, or learned conditions of its own.
    """
    guide = load(Path(str(given["guide"])), device=str(pipeline.device), trust=trust)
    is_told = not isinstance(guide.conditioner, Unconditional)
    for part in ("autoencoder", *(("conditioner",) if is_told else ())):
        if weights_sha256(getattr(guide, part)) != weights_sha256(getattr(pipeline, part)):
            raise UserError(
                f"guidance.guide: got {given['guide']}, whose {part} has other weights than the model's, expected the "
                "same, so that both see and are told one thing; choose a guide that was trained with it"
            )
    own = {name: value for name, value in vars(pipeline.settings.guidance).items() if name in GUIDED}
    settings = {**own, **given, "guide": guide.denoiser.eval(), "is_told": is_told}
    return Autoguidance(**settings, guide_sha256=weights_sha256(guide.denoiser.network))


def read_classifier(path: Path, *, trust: Sequence[str] = ()) -> NoisyClassifier:
    """A classifier of noisy samples that `ldm train` wrote, on the CPU.

    Raises:
        UserError: it is another kind of run, or has no weights yet.
        ValueError: its config calls what is not trusted.
    """
    file = path / "weights.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"guidance.classifier: got {path}, expected a finished run of a classifier of noisy samples")
    state, target, config = read_weights(file)
    node = (config.get("model") or {}).get("classifier")
    if not target.endswith(".NoisyClassifierModule") or node is None:
        raise UserError(
            f"guidance.classifier: got {path}, a {target.rpartition('.')[2]}, expected a NoisyClassifierModule"
        )
    check_targets(node, trust=trust)
    classifier: NoisyClassifier = build(OmegaConf.create(node))
    classifier.load_state_dict(state)
    return classifier.eval().requires_grad_(False)


# What a model's own guidance hands on.
GUIDED = ("scale", "rescale", "interval", "channels")
