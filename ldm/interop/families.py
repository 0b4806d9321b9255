"""The published families of latent diffusion models: what their files tell, and what has to be known besides.

Names and shapes tell a family; they do not tell how many heads its attention has, what the network predicts, its noise
schedule, or the scale of its latents. These are facts about each family, kept here. A family is told by structure, not
by size: a narrower network built the same way belongs to the same family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ldm.interop.safe_load import named

EPSILON, V, X_0 = "epsilon", "v", "x_0"
# What stored configs and people call the three kinds of prediction.
PREDICTIONS = {
    "epsilon": EPSILON,
    "eps": EPSILON,
    "v": V,
    "v_prediction": V,
    "x_0": X_0,
    "x0": X_0,
    "sample": X_0,
}


@dataclass(frozen=True)
class Family:
    """A kind of model, and how to use it.

    Args:
        name: as in `family=sd1`.
        title: for people.
        prediction: what its networks predict; None where published models differ, so that it must be told.
        image_size: pixels that it was trained for.
        guidance_scale, num_steps: as its authors sample.
        heads: arguments of `UNet` that shapes do not tell.
        text: kind of its conditioner, see `ldm.interop.conditioning`; None for none.
        latent_scale: of its autoencoder; None where the file holds a measured one.
        betas, beta_start, beta_end, num_training_steps, zero_terminal_snr: its noise schedule, see `schedule_of`.
        pipeline: the class of diffusers that samples it, or None.
        signature: what tells its U-Net from others, see `signature_of`.
        contexts: widths of the context of published members, where a file holds a U-Net alone.
    """

    name: str
    title: str
    prediction: str | None
    image_size: int
    guidance_scale: float
    num_steps: int
    heads: Mapping[str, Any]
    text: str | None = None
    latent_scale: float | None = 1.0
    beta_start: float = 0.00085
    beta_end: float = 0.012
    betas: str = "scaled_linear"
    num_training_steps: int = 1000
    zero_terminal_snr: bool = False
    pipeline: str | None = None
    signature: Mapping[str, Any] = field(default_factory=dict)
    contexts: tuple[int, ...] = ()
    size_of_prediction: Mapping[str, int] = field(default_factory=dict)

    def with_prediction(self, prediction: str) -> Family:
        """The same family, told what it predicts; its image size follows where it depends on that."""
        size = self.size_of_prediction.get(prediction, self.image_size)
        return replace(self, prediction=prediction, image_size=size)


def _signature(
    extra_channels: int = 0,
    *,
    context: bool = True,
    linear: bool = False,
    labels: str | None = None,
    resampling_blocks: bool = False,
    **more: Any,
) -> dict[str, Any]:
    return {
        "extra_channels": extra_channels,
        "context": context,
        "linear": linear,
        "labels": labels,
        "resampling_blocks": resampling_blocks,
        **more,
    }


_SD: dict[str, Any] = {"image_size": 512, "num_steps": 50, "latent_scale": 0.18215}
_SD2: dict[str, Any] = {**_SD, "heads": {"num_head_channels": 64}, "text": "open_clip", "contexts": (1024,)}
_SDXL: dict[str, Any] = {**_SD2, "latent_scale": 0.13025, "image_size": 1024, "guidance_scale": 5.0}
_LDM: dict[str, Any] = {"prediction": EPSILON, "image_size": 256, "beta_start": 0.0015, "beta_end": 0.0195}

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "sd1",
            "Stable Diffusion 1.x",
            EPSILON,
            guidance_scale=7.5,
            heads={"num_heads": 8},
            text="clip",
            pipeline="StableDiffusionPipeline",
            signature=_signature(),
            contexts=(768,),
            **_SD,
        ),
        Family(
            "sd1_inpainting",
            "Stable Diffusion 1.x inpainting",
            EPSILON,
            guidance_scale=7.5,
            heads={"num_heads": 8},
            text="clip",
            pipeline="StableDiffusionInpaintPipeline",
            signature=_signature(5),
            contexts=(768,),
            **_SD,
        ),
        Family(
            "sd2",
            "Stable Diffusion 2.x",
            None,
            guidance_scale=9.0,
            pipeline="StableDiffusionPipeline",
            signature=_signature(linear=True),
            size_of_prediction={V: 768},
            **_SD2,
        ),
        Family(
            "sd2_inpainting",
            "Stable Diffusion 2 inpainting",
            EPSILON,
            guidance_scale=9.0,
            pipeline="StableDiffusionInpaintPipeline",
            signature=_signature(5, linear=True),
            **_SD2,
        ),
        Family(
            "sd2_depth",
            "Stable Diffusion 2 depth",
            EPSILON,
            guidance_scale=9.0,
            pipeline="StableDiffusionDepth2ImgPipeline",
            signature=_signature(1, linear=True),
            **_SD2,
        ),
        Family(
            "x4_upscaler",
            "Stable Diffusion x4 upscaler",
            V,
            guidance_scale=9.0,
            pipeline="StableDiffusionUpscalePipeline",
            signature=_signature(3, linear=True, labels="classes"),
            beta_start=0.0001,
            beta_end=0.02,
            **{**_SD2, "heads": {"num_heads": 8}, "latent_scale": 0.08333},
        ),
        Family(
            "sdxl",
            "Stable Diffusion XL base",
            EPSILON,
            pipeline="StableDiffusionXLPipeline",
            signature=_signature(linear=True, labels="vector"),
            **{**_SDXL, "text": "sdxl", "contexts": (2048,)},
        ),
        Family(
            "sdxl_refiner",
            "Stable Diffusion XL refiner",
            EPSILON,
            pipeline="StableDiffusionXLImg2ImgPipeline",
            signature=_signature(linear=True, labels="vector"),
            **{**_SDXL, "text": "refiner", "contexts": (1280,)},
        ),
        Family(
            "ldm_text_to_image",
            "LDM text-to-image, 1.45 B",
            EPSILON,
            image_size=256,
            guidance_scale=5.0,
            num_steps=50,
            heads={"num_heads": 8},
            text="bert",
            latent_scale=0.18215,
            signature=_signature(latent_channels=4, depth=1),
            contexts=(1280,),
        ),
        Family(
            "ldm_text_to_image_cc",
            "LDM text-to-image, Conceptual Captions",
            guidance_scale=5.0,
            num_steps=100,
            heads={"num_head_channels": 32},
            text="bert",
            signature=_signature(latent_channels=3, depth=1),
            contexts=(640,),
            **_LDM,
        ),
        Family(
            "ldm_layout",
            "LDM layout-to-image",
            guidance_scale=1.0,
            num_steps=200,
            heads={"num_head_channels": 32},
            text="bert",
            signature=_signature(latent_channels=3, depth=3),
            **{**_LDM, "beta_end": 0.0205},
        ),
        Family(
            "ldm_class",
            "LDM class-conditional ImageNet (cin256-v2)",
            guidance_scale=3.0,
            num_steps=20,
            heads={"num_heads": 1},
            text="class",
            signature=_signature(latent_channels=3, depth=1),
            contexts=(512,),
            **_LDM,
        ),
        Family(
            "ldm_unconditional",
            "LDM unconditional (CelebA-HQ, FFHQ, LSUN bedrooms)",
            guidance_scale=1.0,
            num_steps=200,
            heads={"num_head_channels": 32},
            pipeline="LDMPipeline",
            signature=_signature(context=False),
            **_LDM,
        ),
        Family(
            "ldm_churches",
            "LDM unconditional (LSUN churches)",
            guidance_scale=1.0,
            num_steps=200,
            heads={"num_heads": 8},
            latent_scale=None,
            pipeline="LDMPipeline",
            signature=_signature(context=False, resampling_blocks=True),
            **{**_LDM, "beta_end": 0.0155},
        ),
        Family(
            "ldm_super_resolution",
            "LDM super-resolution (bsr_sr)",
            guidance_scale=1.0,
            num_steps=100,
            heads={"num_head_channels": 32},
            pipeline="LDMSuperResolutionPipeline",
            # Semantic synthesis has the same channels and other heads, and attends in the middle alone.
            signature=_signature(3, context=False, attends=True),
            **{**_LDM, "beta_end": 0.0155},
        ),
        Family(
            "ldm_inpainting",
            "LDM inpainting (inpainting_big)",
            guidance_scale=1.0,
            num_steps=50,
            heads={"num_heads": 8},
            signature=_signature(4, context=False, resampling_blocks=True),
            **{**_LDM, "image_size": 512, "beta_end": 0.0205},
        ),
    )
}


def signature_of(geometry: Mapping[str, Any]) -> dict[str, Any]:
    """What tells families apart, from the arguments of a `UNet`."""
    labels = "classes" if geometry["num_classes"] else "vector" if geometry["vector_dim"] else None
    depths = geometry["transformer_depth"]
    levels = range(len(geometry["channel_mult"]))
    return {
        "extra_channels": geometry["in_channels"] - geometry["out_channels"],
        "context": geometry["context_dim"] is not None,
        "linear": geometry["use_linear_projection"],
        "labels": labels,
        "resampling_blocks": geometry["resblock_updown"],
        "latent_channels": geometry["out_channels"],
        "depth": depths if isinstance(depths, int) else max(depths),
        "attends": any(2**level in geometry["attention_resolutions"] for level in levels),
    }


def recognise(geometry: Mapping[str, Any], text: str | None) -> Family | None:
    """The one family that a U-Net and the kind of text encoder beside it belong to, or None.

    Args:
        geometry: arguments of `UNet`, as `unet_geometry` gives them.
        text: kind of the conditioner in the same file, None where the file has none: the width of the context then
            decides, which is that of a published encoder.
    """
    found = [family for family in FAMILIES.values() if not differences(family, geometry, text)]
    return found[0] if len(found) == 1 else None


def differences(family: Family, geometry: Mapping[str, Any], text: str | None) -> list[str]:
    """In what a U-Net and the text encoder beside it differ from a family, as words; empty where they fit."""
    own = signature_of(geometry)
    wrong = [
        f"{name.replace('_', ' ')} {own[name]} instead of {value}"
        for name, value in family.signature.items()
        if own[name] != value
    ]
    if text is not None and text != family.text:
        wrong.append(f"a conditioner of kind {text} instead of {family.text}")
    if text is None and family.contexts and geometry["context_dim"] not in family.contexts:
        widths = " or ".join(map(str, family.contexts))
        wrong.append(f"a context {geometry['context_dim']} wide instead of {widths}")
    return wrong


def chosen_family(name: str, geometry: Mapping[str, Any], text: str | None) -> Family:
    """The family that the user names.

    Raises:
        ValueError: there is no such family, or the model is none of it.
    """
    if name not in FAMILIES:
        raise ValueError(f"got family={name}, expected one of {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    # A U-Net alone may have a context of any width, if its user says so.
    wrong = differences(replace(family, contexts=()), geometry, text)
    if wrong:
        known = recognise(geometry, text)
        hint = f"this looks like family={known.name}" if known else "leave family out, and give config=..."
        raise ValueError(f"got family={name} for a model with {named(wrong)}; {hint}")
    return family


def as_prediction(word: str, *, source: str) -> str:
    """The kind of prediction that a stored config or a person means: epsilon, v or x_0.

    Raises:
        ValueError: another word.
    """
    if str(word).lower() not in PREDICTIONS:
        raise ValueError(f"got prediction={word} from {source}, expected one of {EPSILON}, {V}, {X_0}")
    return PREDICTIONS[str(word).lower()]
