"""A config that comes with a checkpoint calls only what computes."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import ldm
from ldm.cli.compose import conf_folder
from ldm.cli.main import main
from ldm.cli.trust import check_targets, is_harmless, targets
from ldm.nn.weights import save_weights


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "pathlib.Path.write_text",
        "shutil.copyfile",
        "builtins.eval",
        "torch.load",
        "torch.nn.modules.module.torch.load",
        "torch.hub.load",
        "ldm.data.write_shards",
        "ldm.nn.weights.save_weights",
        "ldm.cli.main.main",
        "ldm.generation.memory.torch.hub.load",
        "ldm.generation.pipeline.Path.unlink",
        "ldm.training.trial.Path",
        "ldm.training.trial.subprocess.Popen",
        "torch.nn.modules.module.OrderedDict",
        "torch.nn.Identity.load",
        "torchmetrics.multimodal.CLIPScore",
        "torchmetrics.image.FrechetInceptionDistance",
        "ldmx.networks.UNet",
        "${oc.env:HOME}",
        "ldm",
        "load",
        "",
    ],
)
def test_what_does_more_than_compute_is_refused(target: str) -> None:
    assert not is_harmless(target)
    with pytest.raises(ValueError, match="got a config that calls"):
        check_targets({"network": [{"_target_": target}]})


def test_every_part_of_a_model_that_ldm_ships_is_allowed() -> None:
    groups = ("model", "network", "autoencoder", "conditioner", "schedule", "parameterization", "weighting", "times")
    groups += ("sampler", "discretization", "guidance", "optimizer", "lr_schedule", "discriminator")
    files = [path for group in groups for path in (conf_folder() / group).rglob("*.yaml")]
    assert len(files) > 100
    for path in files:
        check_targets(OmegaConf.to_container(OmegaConf.load(path), resolve=False))


@pytest.mark.parametrize("target", ["torch.nn.Linear", "torchmetrics.classification.Accuracy", "not_there.Net"])
def test_classes_that_compute_are_harmless_and_others_are_not(target: str) -> None:
    assert is_harmless(target) == (not target.startswith("not_there"))


@pytest.mark.parametrize("text", ["${oc.env:HF_TOKEN}", "${oc.create:{_target_:os.system}}", "a ${b.${oc.env:X}}"])
def test_what_a_resolver_would_read_or_make_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"got a config with .*, expected values alone"):
        check_targets({"network": {"_target_": "torch.nn.Identity", "settings": [text]}})


def test_a_trusted_package_may_be_called() -> None:
    config = {"network": {"_target_": "mylab.nets.Net"}}
    check_targets(config, trust=["mylab"])
    check_targets(config, trust=["mylab.nets.Net"])
    with pytest.raises(
        ValueError, match=r"calls mylab.nets.Net, expected parts of ldm or torch alone; .* trust=\[mylab\]"
    ):
        check_targets(config, trust=["my"])
    assert list(targets(config)) == ["mylab.nets.Net"]


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_a_file_that_asks_for_more_runs_nothing(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    victim, path = tmp_path / "victim.txt", tmp_path / f"evil.{suffix}"
    config = {"model": {"_target_": "pathlib.Path.write_text", "_args_": [str(victim), "owned"]}}
    if suffix == "ckpt":
        torch.save({"config": config, "state_dict": {}, "pytorch-lightning_version": "2.6.6"}, path)
    else:
        save_weights(path, {"x": torch.zeros(1)}, target="ldm.training.LatentDiffusionModule", config=config)
    with pytest.raises(ValueError, match=r"got a config that calls pathlib\.Path\.write_text"):
        ldm.load(path, device="cpu")
    assert main(["sample", f"checkpoint={path}", "prompt=x", f"out={tmp_path / 'out'}", "device=cpu"]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "trust=[pathlib]" in printed
    assert not victim.exists()
