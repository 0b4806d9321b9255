"""Stable Diffusion 1.5 at full size with random weights: time, peak memory and pixels beside diffusers.

    python benchmarks/stable_diffusion.py build FOLDER      # 4 GB, written by diffusers
    python benchmarks/stable_diffusion.py compare FOLDER    # one prompt and seed through both, each in its own process

Needs the test extra.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

PROMPT = "a photograph of an astronaut riding a horse"
DIFFUSERS = "diffusers"
SINGLE_FILE = "sd-v1-5.safetensors"


@dataclass(frozen=True)
class Measurement:
    """One process: wall time in seconds from its start to its end, peak resident memory in GiB."""

    name: str
    seconds: float
    peak_gib: float


def build(folder: Path) -> None:
    """Writes folder/diffusers, the geometry of SD 1.5 with random weights."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from ldm.interop.text_encoders import clip_vocabulary

    torch.manual_seed(0)
    channels = {"block_out_channels": (128, 256, 512, 512), "latent_channels": 4, "layers_per_block": 2}
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, **channels
    )
    text = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, eos_token_id=49407
    )
    vocabulary, merges = clip_vocabulary()
    StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer(vocab=vocabulary, merges=[tuple(m.split()) for m in merges], model_max_length=77),
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
    ).save_pretrained(folder / DIFFUSERS)


def peer(folder: Path, steps: int, size: int) -> None:
    """Writes folder/peer.png by diffusers."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder / DIFFUSERS, local_files_only=True)
    generator = torch.Generator().manual_seed(0)
    shape = {"height": size, "width": size}
    images = pipeline(PROMPT, num_inference_steps=steps, guidance_scale=7.5, generator=generator, **shape).images
    images[0].save(folder / "peer.png")


def measured(name: str, command: list[str]) -> Measurement:
    """Runs a command to its end; stops everything if it fails."""
    start = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: failed")
    return Measurement(name, time.perf_counter() - start, usage.ru_maxrss / 2**20)


def compare(folder: Path, steps: int, size: int) -> None:
    """Prints a table: each way to the picture, and how far its pixels are from those of diffusers."""
    this, ldm = str(Path(__file__)), [sys.executable, "-m", "ldm.cli.main"]
    single = folder / SINGLE_FILE
    shape = ["--steps", str(steps), "--size", str(size)]
    rows = [measured("diffusers", [sys.executable, this, "peer", str(folder), *shape])]
    convert = [*ldm, "convert", f"source={folder / DIFFUSERS}", f"out={single}", "format=compvis"]
    rows.append(measured("ldm convert to one CompVis file", convert))
    settings = [f"steps={steps}", f"image_size={size}", "sampler=ddim", "discretization=leading", "guidance.scale=7.5"]
    for name, checkpoint in (("ldm, from the folder", folder / DIFFUSERS), ("ldm, from the single file", single)):
        out = folder / name.rsplit(" ", 1)[1]
        command = [*ldm, "sample", f"checkpoint={checkpoint}", f'prompt="{PROMPT}"', f"out={out}", *settings]
        rows.append(measured(name, command))
    for row in rows:
        print(f"{row.name:34} {row.seconds:7.1f} s   peak {row.peak_gib:5.2f} GiB")
    for name in ("folder", "file"):
        (picture,) = (folder / name).glob("0*.png")
        print(f"largest difference from diffusers, {name}: {difference(folder / 'peer.png', picture)} of 255")


def difference(one: Path, other: Path) -> int:
    """Largest difference of two pictures in 8-bit steps."""
    pixels = [np.asarray(Image.open(path).convert("RGB")).astype(int) for path in (one, other)]
    return int(abs(pixels[0] - pixels[1]).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["build", "compare", "peer"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--size", type=int, default=512)
    options = parser.parse_args()
    if options.command == "build":
        build(options.folder)
    else:
        {"compare": compare, "peer": peer}[options.command](options.folder, options.steps, options.size)


if __name__ == "__main__":
    main()
