"""Fine-tuning changes what it says it trains, and nothing else; what it writes is what it learned."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from finetune_models import CLIP, finetuning, tiny_pretrained, tiny_sdxl
from safetensors.torch import load_file
from tiny_models import quiet_trainer, write_colours
from torch import Tensor
from torch.testing import assert_close

from ldm.conditioners import CLIPText, Combined, Conditioner, OpenCLIPText, SizeCrop, TextEncoder
from ldm.data import Record, ShardDataModule, StreamSettings, write_shards
from ldm.diffusion.weightings import MinSNR
from ldm.generation import Pipeline
from ldm.interop import write_ldm
from ldm.interop.lora import apply_lora
from ldm.interop.model import CarriedConditioner, build_denoiser
from ldm.interop.textual_inversion import apply_embedding
from ldm.networks import UNet
from ldm.training.finetune import Finetuning, _reweighted, pretrained
from ldm.training.finetune_adapters import LoRA, TextualInversion, used_blocks
from ldm.training.frozen import restore_frozen

MakeTrainer = Callable[..., pl.Trainer]
MakeData = Callable[..., ShardDataModule]
EXACT = {"rtol": 0, "atol": 0}
# One of the captions.
WORD = TextualInversion("my-red", "a cat", num_vectors=2)

# What is trained, and the names of its parameters.
KINDS: dict[str, tuple[Any, Callable[[str], bool]]] = {
    "lora of the network": (LoRA(rank=2), lambda name: ".lora_" in name and name.startswith("denoiser.")),
    "lora of everything": (LoRA(rank=2, alpha=3, layers="all", text_encoder=True), lambda name: ".lora_" in name),
    "word": (WORD, lambda name: name.endswith("token_embedding.rows")),
    "network": (None, lambda name: name.startswith("denoiser.")),
}


def batch_of(**columns: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(4, 3, 16, 16, generator=generator) * 2 - 1
    captions = ["a my-red toy", "a dog", "a dog", "a my-red toy"]
    return {"image": image, "caption": captions, "index": torch.arange(4), "position": torch.arange(4) + 30, **columns}


@pytest.fixture
def make_data(make_data: MakeData, tmp_path: Path) -> MakeData:
    """Builds the data module of colours whose names are new words."""
    write_colours(tmp_path / "words", prefix="my-")
    return partial(make_data, folder=tmp_path / "words")


def values(module: Finetuning) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.trained.named_parameters()}


@dataclass(frozen=True)
class Run:
    """A kind of fine-tuning after two steps: what there was before, and what it wrote."""

    adapter: Any
    before: dict[str, Tensor]
    module: Finetuning
    folder: Path
    written: dict[str, str]

    @property
    def trained(self) -> set[str]:
        return {name for name, p in self.module.trained.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """Trains a kind once for all tests."""
    folder = tmp_path_factory.mktemp("runs")
    write_colours(folder / "colours", prefix="my-")

    @cache
    def run(kind: str) -> Run:
        adapter, _ = KINDS[kind]
        data = ShardDataModule(folder / "colours", batch_size=6, resolution=16)
        module = finetuning(adapter=adapter)
        before = values(module)
        quiet_trainer(max_steps=2).fit(module, data)
        config = {"model": {"pretrained": {"path": None}}}
        return Run(adapter, before, module, folder / kind, module.finish(folder / kind, data=data, config=config))

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_training_changes_what_is_trained_and_nothing_else(kind: str, run_of: Callable[[str], Run]) -> None:
    run, is_trained = run_of(kind), KINDS[kind][1]
    after = values(run.module)
    changed = {name for name, value in after.items() if not torch.equal(value, run.before[name])}
    assert changed == {name for name in after if is_trained(name)} != set()


@pytest.mark.parametrize("kind", KINDS)
def test_written_weights_hold_and_rebuild_the_average(kind: str, run_of: Callable[[str], Run]) -> None:
    run = run_of(kind)
    state, again = load_file(run.folder / "weights.safetensors"), finetuning(adapter=run.adapter)
    assert len(state) == len(run.trained)
    target = again.ema.module
    target.load_state_dict(restore_frozen(target, state), strict=True)
    expected, found = (module.pipeline().images(["a my-red toy"], seeds=[1]) for module in (run.module, again))
    assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("kind", ["lora of everything", "word"])
def test_checkpoints_hold_what_is_trained_and_resume_as_if_never_stopped(
    kind: str, make_data: MakeData, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    straight, first, second = (finetuning(adapter=KINDS[kind][0]) for _ in range(3))
    make_trainer(max_steps=2).fit(straight, make_data())
    begun = make_trainer(max_steps=1)
    begun.fit(first, make_data())
    begun.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    assert len(saved) == 2 * sum(map(KINDS[kind][1], values(first)))  # the parameters and their average
    make_trainer(max_steps=2).fit(second, make_data(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    for name, value in values(straight).items():
        assert_close(values(second)[name], value, **EXACT)


def test_the_average_shares_all_that_is_frozen() -> None:
    module = finetuning()
    average = dict(module.ema.module.named_parameters())
    for name, parameter in module.trained.named_parameters():
        assert (average[name] is parameter) == (not parameter.requires_grad)


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_the_written_lora_makes_the_same_pictures(format: Any, run_of: Callable[[str], Run], tmp_path: Path) -> None:
    run, model = run_of("lora of everything"), tiny_pretrained()
    average = run.module.ema.module
    written = replace(run.adapter, format=format).write(average.denoiser, average.conditioner, tmp_path)
    assert written == {"lora": run.written["lora"]}
    apply_lora(model.denoiser, model.conditioner, tmp_path / "lora.safetensors")
    pipeline = Pipeline(
        model.denoiser, conditioner=model.conditioner, autoencoder=model.autoencoder, settings=run.module.sampling
    )
    expected = run.module.pipeline().images(["a my-red toy"], seeds=[1])
    assert_close(pipeline.images(["a my-red toy"], seeds=[1]), expected, rtol=1e-4, atol=1e-4)


def test_fused_attention_of_sdxl_is_trained_too(make_data: MakeData, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    module, data = (
        finetuning(pretrained=tiny_sdxl(), adapter=LoRA(rank=2, layers="all", text_encoder=True)),
        make_data(),
    )
    before = values(module)
    make_trainer(max_steps=2).fit(module, data)
    changed = {name for name, value in values(module).items() if not torch.equal(value, before[name])}
    fused = {name for name in before if ".parametrizations." in name and not name.endswith(".original")}
    assert len(fused) == 2 * 2 * 2
    assert changed == {name for name in before if ".lora_" in name} | fused
    module.finish(tmp_path, data=data, config={"model": {}})
    assert len(load_file(tmp_path / "weights.safetensors")) == len(changed)
    model = tiny_sdxl()
    apply_lora(model.denoiser, model.conditioner, tmp_path / "lora.safetensors")
    found, expected = (c({"caption": ["a toy"]}) for c in (model.conditioner, module.ema.module.conditioner))
    assert_close(found.context, expected.context, rtol=1e-4, atol=1e-4)
    assert_close(found.vector, expected.vector, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("encoder", "expected"),
    [
        (CLIPText(CLIP), 2),
        (CLIPText(CLIP, layer=1), 1),
        (CLIPText(CLIP, layer=-2), 1),
        (CLIPText(CLIP, layer=1, pooled=True), 2),
        (OpenCLIPText(8, 3, 2), 2),
        (OpenCLIPText(8, 3, 2, layer="last"), 3),
        (OpenCLIPText(8, 3, 2, pooled=True), 3),
    ],
)
def test_blocks_that_the_output_depends_on_are_those_with_a_gradient(encoder: TextEncoder, expected: int) -> None:
    encoder.requires_grad_(True)
    output = encoder({"caption": ["a toy"]})
    sum(part.sum() for part in output.parts().values()).backward()
    trained = {name for name, parameter in encoder.named_parameters() if parameter.grad is not None}
    blocks = {int(found[1]) for name in trained if (found := re.search(r"\.(?:layers|resblocks)\.(\d+)\.", name))}
    assert blocks == set(range(used_blocks(encoder))) == set(range(expected))


@pytest.mark.parametrize(("format", "name"), [("diffusers", "learned_embeds"), ("a1111", "my-red")])
def test_the_written_embedding_says_the_same_word(
    format: Any, name: str, run_of: Callable[[str], Run], tmp_path: Path
) -> None:
    run = run_of("word")
    assert run.written["embedding"] == "learned_embeds.safetensors"
    average = run.module.ema.module
    written = replace(run.adapter, format=format).write(average.denoiser, average.conditioner, tmp_path)
    assert written == {"embedding": f"{name}.safetensors"}
    conditioner = tiny_pretrained().conditioner
    assert apply_embedding(conditioner, tmp_path / f"{name}.safetensors") == "my-red"
    caption = {"caption": ["a My-Red toy"]}
    assert_close(conditioner(caption).context, average.conditioner(caption).context, **EXACT)


def test_a_new_word_starts_as_the_mean_of_known_ones() -> None:
    encoder = tiny_pretrained().conditioner
    table, known = encoder.token_embedding.weight, encoder.tokenizer.encode("a cat")
    rows = finetuning(adapter=WORD).trained.conditioner.token_embedding.rows
    assert_close(rows, table[known].mean(0).expand(2, -1), **EXACT)


def test_nothing_changes_before_the_first_step() -> None:
    fresh, adapted = finetuning(adapter=None), finetuning()
    pictures = [module.pipeline().images(["a dog"], seeds=[0]) for module in (fresh, adapted)]
    assert_close(*pictures, **EXACT)


@pytest.mark.parametrize("adapter", [LoRA(rank=4, layers="all"), WORD], ids=["lora", "word"])
def test_the_loss_of_one_batch_falls(adapter: Any) -> None:
    module = finetuning(adapter=adapter)
    parameters = [p for p in module.trained.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.05 if adapter is not WORD else 1.0)
    losses = []
    for _ in range(15):
        loss = module.loss(batch_of(), module.trained, 0, 0.0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < (0.9 if adapter is not WORD else 0.999) * losses[0]


def test_the_loss_of_priors_has_its_own_weight() -> None:
    batch = batch_of(is_prior=torch.tensor([0, 1, 1, 0]))
    plain, weighted = (finetuning(prior_weight=w) for w in (None, 0.25))
    expected = plain.loss(batch, plain.trained, 0, 0.0) * torch.tensor([1, 0.25, 0.25, 1])
    assert_close(weighted.loss(batch, weighted.trained, 0, 0.0), expected)


def test_a_weight_for_priors_needs_the_column(make_data: MakeData, make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match=r"prior_weight=1.0 and data.columns=\['number'\], expected is_prior"):
        make_trainer(max_steps=1).fit(finetuning(prior_weight=1.0), make_data(columns=["number"]))


@pytest.mark.parametrize(
    ("options", "data", "steps", "message"),
    [
        (
            {"prior_weight": 0.5},
            {"columns": ["is_prior"]},
            1,
            "shards without a picture of the class, expected samples",
        ),
        ({"adapter": TextualInversion("my-cat", "a cat")}, {}, 1, "token=my-cat, which no caption of data.train holds"),
        (
            {"adapter": TextualInversion("my-cat", "a cat")},
            {"mode": "stream", "stream": StreamSettings(epoch_samples=20)},
            1,
            "data.mode=stream, expected indexed",
        ),
        ({}, {"resolution": 14}, 1, "data.resolution=14, expected a multiple of 4.*; set data.resolution=16"),
        ({}, {}, 0, "trainer.max_steps=0, expected at least 1"),
        (
            {"pretrained": replace(tiny_pretrained(), conditioner=Combined([CLIPText(CLIP), SizeCrop()]))},
            {"columns": ["number", "crop_top"]},
            1,
            r"expected original_height, .* too, .*set data.columns=\[number,crop_top,original_height,",
        ),
    ],
    ids=["priors", "word", "stream", "resolution", "steps", "columns"],
)
def test_what_does_not_fit_is_refused_before_the_first_step(
    options: dict[str, Any],
    data: dict[str, Any],
    steps: int,
    message: str,
    make_data: MakeData,
    make_trainer: MakeTrainer,
    tmp_path: Path,
) -> None:
    zeros = {"number": 0, "is_prior": 0, "crop_top": 0}
    pictures = (Record(np.zeros((16, 16, 3), np.uint8), "a toy", zeros) for _ in range(6))
    write_shards(tmp_path / "plain", pictures)
    module, trainer = finetuning(**options), make_trainer(max_steps=steps)
    with pytest.raises(ValueError, match=message):
        trainer.fit(module, make_data(folder=tmp_path / "plain", **data))
    assert trainer.global_step == 0


@pytest.mark.parametrize(
    ("network", "conditioner", "reason"),
    [
        (
            UNet(
                9,
                4,
                model_channels=8,
                channel_mult=[1],
                num_res_blocks=1,
                attention_resolutions=[],
                num_heads=2,
                norm_groups=4,
            ),
            CLIPText(CLIP),
            "reads 5 channels",
        ),
        (tiny_pretrained().network, CarriedConditioner("bert", {}), "conditioner is unknown"),
    ],
)
def test_models_that_shards_cannot_train_are_refused(network: UNet, conditioner: Conditioner, reason: str) -> None:
    model = tiny_pretrained()
    model = replace(model, denoiser=build_denoiser(network, model.family), conditioner=conditioner)
    with pytest.raises(ValueError, match=f"got a model of sd1, whose .*{reason}.*, expected one of sd1, sd2, sdxl,"):
        finetuning(pretrained=model)


def test_recomputed_blocks_give_the_same_gradients() -> None:
    gradients = []
    for checkpoint_blocks in (False, True):
        module = finetuning(checkpoint_blocks=checkpoint_blocks)
        assert module.trained.denoiser.network.checkpoint_blocks == checkpoint_blocks
        module.loss(batch_of(), module.trained, 0, 0.0).mean().backward()
        gradients.append({name: p.grad for name, p in module.trained.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() != set()
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient)


def test_a_weighting_takes_the_place_of_the_familys() -> None:
    plain, weighted = (finetuning(weighting=w) for w in (None, MinSNR(gamma=1.0)))
    losses = [module.loss(batch_of(), module.trained, 0, 0.0) for module in (plain, weighted)]
    assert (losses[0] - losses[1]).abs().max() > 0.01


def test_a_weighting_leaves_the_distance_and_the_bound_as_they_are() -> None:
    start = tiny_pretrained()
    start.denoiser.distance, start.denoiser.bound_weight = "absolute", 0.5
    trained = _reweighted(start.denoiser, MinSNR(gamma=1.0))
    assert isinstance(trained.weighting, MinSNR)
    assert (trained.distance, trained.bound_weight) == ("absolute", 0.5)


def test_the_network_is_in_training_mode_and_frozen_encoders_are_not() -> None:
    module = finetuning(adapter=None)
    assert module.trained.denoiser.network.training
    assert not any(part.training for part in module.trained.conditioner.modules())
    assert not any(part.training for part in module.autoencoder.modules())


def test_guidance_works_without_condition_dropout() -> None:
    module = finetuning()
    assert (module.condition_dropout, module.sampling.guidance.scale) == (0, 2)


def test_a_file_of_half_precision_trains_in_float32(tmp_path: Path) -> None:
    path = write_ldm(tiny_pretrained(), tmp_path / "model.safetensors", dtype=torch.float16)
    module = finetuning(pretrained=pretrained(str(path)))
    assert {value.dtype for value in module.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pretrained(None), "checkpoint: got none, expected a file or folder to start from"),
        (lambda: LoRA(rank=0), "adapter.rank=0, expected at least 1"),
        (lambda: LoRA(layers="some"), "adapter.layers=some, expected one of attention, transformer, all"),
        (lambda: LoRA(format="bin"), "adapter.format=bin, expected one of kohya, diffusers"),
        (lambda: TextualInversion("x", "cat", num_vectors=0), "adapter.num_vectors=0"),
        (lambda: TextualInversion("x", "cat", format="pt"), "adapter.format=pt, expected one of diffusers, a1111"),
        (lambda: finetuning(adapter=TextualInversion("my-x", " ")), "adapter.initializer=' ', expected a word"),
        (lambda: finetuning(adapter=TextualInversion("dog", "cat")), "token=dog, a word that the text encoder knows"),
        (lambda: finetuning(prior_weight=-1), "prior_weight=-1, expected a positive number"),
    ],
)
def test_wrong_settings_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
