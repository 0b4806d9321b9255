"""Golden messages: a mistake is one line that names the nearest right thing, and exit code 2."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ldm.cli.main import main

TOY = "experiment=toy"
SHOWS_ALL = "`ldm train experiment=toy --cfg job` shows them all"

MESSAGES = {
    ("train", TOY, "trainer.max_stepz=3"): (
        f"trainer.max_stepz: there is no such setting; did you mean trainer.max_steps? {SHOWS_ALL}"
    ),
    ("train", TOY, "max_steps=3"): f"max_steps: there is no such setting; did you mean trainer.max_steps? {SHOWS_ALL}",
    ("train", TOY, "experimnt=x"): f"experimnt: there is no such setting; did you mean experiment? {SHOWS_ALL}",
    ("train", TOY, "zzz=3"): f"zzz: there is no such setting; {SHOWS_ALL}",
    ("train", "experiment=toi"): "experiment=toi: there is no such option; did you mean toy? Options: ",
    ("train", "experiment=finetune/lra"): (
        "experiment=finetune/lra: there is no such option; did you mean finetune/lora? Options: "
    ),
    ("train", TOY, "strategy=dpp"): (
        "strategy=dpp: there is no such option; did you mean ddp? Options: auto, ddp, ddp_find_unused, deepspeed, fsdp"
    ),
    ("train", TOY, "+trainer.max_stepz=3"): (
        "+trainer.max_stepz: did you mean trainer.max_steps? "
        "To add trainer.max_stepz all the same, write ++trainer.max_stepz"
    ),
    ("train", TOY, "+modle.width=3"): (
        "+modle.width: did you mean model.width? To add modle.width all the same, write ++modle.width"
    ),
    ("train", TOY, "+model.width=3"): "+model.width: this key exists already; leave out the +",
    ("train", TOY, "trainer.max_steps=many"): "trainer.max_steps: got 'many', expected a number, such as 20",
    ("train", TOY, "trainer.max_steps=true"): "trainer.max_steps: got True, expected a number, such as 20",
    ("train", TOY, "trainer.use_distributed_sampler=maybe"): (
        "trainer.use_distributed_sampler: got 'maybe', expected true or false, such as False"
    ),
    ("train", TOY, "requires=toy"): "requires: got 'toy', expected a list, such as []",
    ("train", TOY, "model.width=1,2"): (
        "model.width=1,2: several values; add -m to run each of them, or write one list: key=[a,b]"
    ),
    ("train", TOY, "nonsense"): (
        "nonsense: Hydra cannot read this; write key=value, and quote text with signs: key='\"a, b\"'"
    ),
    ("data encode", "targets={big: {resolution: 64}}"): "targets: it has no big yet; write +targets={...}",
    ("train", TOY, "model.width=[1,2]"): (
        "model.width: got [1, 2], expected a number, such as 4; to set a list all the same, write ++model.width=[1,2]"
    ),
    ("train", TOY, "~callback"): (
        "~callback: a list of this group, or no choice at all; leave all of it out with callback=[]"
    ),
    ("train", TOY, "+logger=wandb"): (
        "logger: this group has its choice already; choose another with logger=..., without a +"
    ),
    ("train", TOY, "seed=1.5"): "seed: got 1.5, expected a whole number from 0 on",
    ("train", TOY, "seed='${oc.env:HOME}'"): "seed: got '/",
    ("train", "experiment=finetune/lora", "schedule=cosine"): (
        "schedule=cosine: nothing in finetune_lora reads schedule, so that it would change nothing; leave it out"
    ),
    ("launch", "experiment=digits_classifier", "compile=blocks"): "compile=blocks: nothing in digits_classifier reads",
    ("sweep", "experiment=digits_autoencoder", "+space.times=[uniform,logit_normal]"): (
        "space: times=uniform: nothing in digits_autoencoder reads times"
    ),
    ("train", TOY, "name=a/b"): "name: got 'a/b', expected letters, digits and _.+-, as it names a folder",
    ("train", TOY, "run_id=.."): "run_id: got '..', expected letters, digits and _.+-, as it names a folder",
    ("train", TOY, "resume=nowhere"): (
        "resume: got nowhere, which does not exist; expected auto, never, a checkpoint or a run folder"
    ),
    ("train", TOY, "debug=null"): "debug=null: a group cannot be set to null; leave it out with ~debug",
    ("train", TOY, "data.folder=${nothing.here}"): "data.folder: Interpolation key 'nothing.here' not found",
    ("train", TOY, "data.folder='${result:toy_rows}'"): "data.folder: no finished run of toy_rows under ",
    ("shard", "dataset=digts"): "dataset=digts: there is no such option; did you mean digits? Options: ",
    ("shard", "sampler=euler"): "sampler: `ldm shard` does not use this group; add it with +sampler=...",
    ("sample",): "prompt: got none; write prompt=",
    ("sample", "prompt=a", "prompt_file=b"): "prompt and prompt_file: got both, expected one of them; leave one out",
    ("sample", "prompt_file=nix.txt"): "prompt_file: got nix.txt, which is not a file; expected one prompt a line",
    ("sample", "prompt=a", "num_images=0"): "num_images: got 0, expected a positive integer",
    ("sample", "prompt=a"): "no finished run under ",
    (
        "sample",
        "prompt=a",
        "checkpoint=nowhere",
    ): "checkpoint: got nowhere, which does not exist; expected a run folder",
}


@pytest.mark.parametrize("words", MESSAGES, ids=" ".join)
def test_a_mistake_is_one_line(
    words: tuple[str, ...], ldm: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ldm(*words) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {MESSAGES[words]}")
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.width=0"], "model: width: got 0, expected at least 1"),
        (["++model.widht=3"], "model: toy_training.ToyModel takes no 'widht'; did you mean width?"),
        (["model._target_=toy_training.ToyModle"], "model: cannot import toy_training.ToyModle; check its spelling"),
        (["trainer.precision=17"], "Precision '17' is invalid"),
        (["++trainer.max_stepz=3"], "pytorch_lightning.Trainer takes no 'max_stepz'; did you mean max_steps?"),
        (["data.folder=nowhere"], "no data in nowhere; write it first"),
        (["callback.checkpoint.keep=0"], "callback.checkpoint: keep: got 0, expected at least 2"),
    ],
)
def test_what_a_constructor_refuses_is_one_line_and_leaves_no_folder(
    overrides: list[str], message: str, ldm: Callable[..., int], capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    assert ldm("train", TOY, *overrides) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {message}")
    assert printed.count("\n") == 1
    assert list(folder.glob("runs/toy/*")) == []


def test_a_config_file_that_is_not_yaml_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "experiment").mkdir()
    (folder / "experiment" / "broken.yaml").write_text("model: [unclosed\n")
    assert main(["train", "--config-dir", str(folder), "experiment=broken"]) == 2
    printed = capsys.readouterr().err
    assert "broken.yaml" in printed
    assert printed.count("\n") == 1


def test_an_error_in_training_itself_is_not_hidden(ldm: Callable[..., int]) -> None:
    with pytest.raises(ValueError, match="training itself went wrong"):
        ldm("train", TOY, "model.fail_at=3")


def test_ldm_traceback_shows_where_a_mistake_arose(ldm: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDM_TRACEBACK", "1")
    with pytest.raises(Exception, match="expected at least 1") as raised:
        ldm("train", TOY, "model.width=0")
    assert raised.value.__cause__ is not None


def test_a_key_that_only_resembles_another_may_be_added(ldm: Callable[..., int], folder: Path) -> None:
    assert ldm("train", TOY, "+trainer.max_time=null", "trainer.max_steps=1") == 0
