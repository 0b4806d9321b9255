"""OpenCLIP text encoders (Cherti et al. 2023), with the names that CompVis and Stability files use."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from ldm.conditioners.pretrained import explained
from ldm.conditioners.text_encoder import Null, TextEncoder, first_end
from ldm.conditioners.tokenizers import CLIPTokenizer
from ldm.diffusion import Conditioning
from ldm.nn.arguments import keeps_arguments

# As open_clip names them on the hub.
FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


class OpenCLIPText(TextEncoder):
    """The text tower of an OpenCLIP model with random weights, to load into; `load` reads a trained one.

    ViT-H/14 is `OpenCLIPText(1024, 24, 16)`, which with the other defaults is Stable Diffusion 2's; ViT-bigG/14 is
    `OpenCLIPText(1280, 32, 20)`, with `final_norm=False, pooled=True, null="zeros"` SDXL's second encoder.
    MicroDiT's, of DFN5B ViT-H/14, is `OpenCLIPText(1024, 24, 16, layer="last", quick_gelu=True, null="zeros")`.

    Args:
        width, layers, heads: of the transformer.
        layer: whose states are the context: the last layer's, or those of the one before.
        final_norm: apply the final layer norm to them.
        pooled: add vector (B, projection_dim), the projected last state of the end token.
        projection_dim: None is `width`; 0 leaves out the projection and logit scale of contrastive training.
        quick_gelu: gate by sigmoid(1.702 x), as OpenAI's models and those of DFN do, which a file does not tell.
        null, max_chunks: see `TextEncoder`.

    Attributes:
        model: open_clip's text tower; with `model.` its names are those below `cond_stage_model.` in SD 2 files, and
            below `conditioner.embedders.1.` in SDXL files.
    """

    quick_gelu = False

    @keeps_arguments
    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        *,
        layer: Literal["penultimate", "last"] = "penultimate",
        final_norm: bool = True,
        pooled: bool = False,
        projection_dim: int | None = None,
        vocabulary_size: int = 49408,
        length: int = 77,
        quick_gelu: bool = False,
        null: Null = "empty",
        max_chunks: int = 8,
    ) -> None:
        from open_clip.transformer import QuickGELU, TextTransformer

        if layer not in ("penultimate", "last"):
            raise ValueError(f"got conditioner.layer={layer}, expected penultimate or last")
        if heads < 1 or width % heads:
            raise ValueError(f"got conditioner.width={width}, expected a multiple of heads={heads}")
        if pooled and projection_dim == 0:
            raise ValueError("got conditioner.pooled=true and projection_dim=0, expected a projection to pool with")
        projection_dim = width if projection_dim is None else projection_dim
        super().__init__(
            CLIPTokenizer(length=length, padding="zero"),
            context_dim=width,
            vector_dim=projection_dim if pooled else 0,
            null=null,
            max_chunks=max_chunks,
        )
        self.layer, self.final_norm, self.pooled = layer, final_norm, pooled
        if quick_gelu:
            # Else left to the class, so that the hash of encoders that other embeddings were made by stays.
            self.quick_gelu = True
        activation = QuickGELU if quick_gelu else nn.GELU
        self.model = TextTransformer(
            length, vocabulary_size, width, heads, layers, output_dim=projection_dim, act_layer=activation
        )
        if projection_dim:
            # Of no use here, but files hold it, and writing one back should lose nothing.
            self.model.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.register_load_state_dict_post_hook(_renew_mask)
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, path: Path | str, **settings: Any) -> Self:
        """The text tower of a trained open_clip model; settings are those of the constructor but the geometry.

        Args:
            path: a file, a folder with open_clip_model.safetensors or open_clip_pytorch_model.bin, or a hub id.

        Raises:
            ValueError: there is none at the path.
        """
        source = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
        with explained(path, holds=f"a folder with {' or '.join(FILES)}, or such a file", source=source):
            whole = _read(_find(path))
            state = {name: tensor.float() for name, tensor in whole.items() if not name.startswith("visual.")}
            state.pop("attn_mask", None)
            with torch.device("meta"):
                encoder = cls(**open_clip_geometry(state), **settings)
            encoder.load_state_dict({f"model.{name}": tensor for name, tensor in state.items()}, assign=True)
        return encoder.requires_grad_(False)

    @property
    def token_embedding(self) -> nn.Embedding:
        return self.model.token_embedding

    def replace_token_embedding(self, table: nn.Embedding) -> None:
        """Puts another table in the place of `token_embedding`."""
        self.model.token_embedding, self.model.vocab_size = table, table.num_embeddings

    def encode_ids(self, ids: Tensor) -> Conditioning:
        """Token ids (B, L), each row with start and end, to Conditioning(context (B, L, context_dim), vector)."""
        model = self.model
        x = model.token_embedding(ids) + model.positional_embedding[: ids.shape[1]]
        *before, last = model.transformer.resblocks
        for block in before:
            x = self._through(block, x)
        states = {"penultimate": x}
        if self.layer == "last" or self.pooled:
            states["last"] = self._through(last, x)
        context = model.ln_final(states[self.layer]) if self.final_norm else states[self.layer]
        if not self.pooled:
            return Conditioning(context=context)
        rows = torch.arange(len(ids), device=ids.device)
        end = model.ln_final(states["last"][rows, first_end(ids, CLIPTokenizer.END)])
        return Conditioning(context=context, vector=end @ model.text_projection)

    def _through(self, block: nn.Module, x: Tensor) -> Tensor:
        """One block on (B, L, D); blocks of older open_clip versions take (L, B, D), and nothing would say so."""
        mask = self.model.attn_mask[: x.shape[1], : x.shape[1]]
        if block.attn.batch_first:  # type: ignore[union-attr]
            return block(x, attn_mask=mask)
        return block(x.transpose(0, 1), attn_mask=mask).transpose(0, 1)


def open_clip_geometry(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments of `OpenCLIPText` from the names and shapes of a text tower's weights.

    Heads are 64 wide, as in every OpenCLIP text tower from ViT-B to bigG: shapes cannot tell.
    """
    vocabulary_size, width = state["token_embedding.weight"].shape
    layers = {name.split(".")[2] for name in state if name.startswith("transformer.resblocks.")}
    projection = state.get("text_projection")
    return {
        "width": width,
        "layers": len(layers),
        "heads": max(width // 64, 1),
        "projection_dim": 0 if projection is None else projection.shape[1],
        "vocabulary_size": vocabulary_size,
        "length": len(state["positional_embedding"]),
    }


def _find(path: Path | str) -> Path:
    """The file itself, the one in a folder, or the one that the hub has."""
    place = Path(path).expanduser()
    if place.is_file():
        return place
    if place.is_dir():
        found = next((place / name for name in FILES if (place / name).is_file()), None)
        if found is None:
            raise FileNotFoundError("the folder has no such file")
        return found
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    safe, pickled = FILES
    try:
        return Path(hf_hub_download(str(path), safe))
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        return Path(hf_hub_download(str(path), pickled))


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _renew_mask(module: OpenCLIPText, _: Any) -> None:
    """Fills in what no file holds, where the encoder was built on the meta device and loaded with assign=True."""
    device = module.model.positional_embedding.device
    if module.model.attn_mask.is_meta and device.type != "meta":
        module.model.attn_mask = module.model.build_causal_mask().to(device)
