"""What `ldm train` says and does where memory runs out."""

import pytest
from omegaconf import OmegaConf

from ldm.cli.errors import UserError
from ldm.cli.memory import check_memory, halve, remedies

CONFIG = {
    "run_id": "abc",
    "on_out_of_memory": "stop",
    "data": {"batch_size": 8},
    "trainer": {"devices": "1", "accumulate_grad_batches": 3, "precision": "32", "val_check_interval": 100},
    "network": {"_target_": "ldm.networks.UNet"},
}


def test_the_remedies_carry_the_run_s_own_numbers() -> None:
    assert remedies(OmegaConf.create(CONFIG)) == (
        "; the same steps in pieces of half the size: data.batch_size=4 trainer.accumulate_grad_batches=6 "
        "trainer.val_check_interval=200 run_id=abc, or on_out_of_memory=halve for that to be done by itself; "
        "+network.checkpoint_blocks=true computes activations twice instead of keeping them; "
        "trainer.precision=bf16-mixed halves them"
    )


def test_halving_keeps_the_samples_of_a_step_and_ends_at_an_odd_size() -> None:
    config = OmegaConf.create({**CONFIG, "on_out_of_memory": "halve", "data": {"batch_size": 12}})
    said = [halve(config), halve(config), halve(config)]
    assert said[0] == "data.batch_size=6 trainer.accumulate_grad_batches=6 trainer.val_check_interval=200"
    assert said[2] is None
    assert (config.data.batch_size, config.trainer.accumulate_grad_batches) == (3, 12)


def test_in_smaller_pieces_validation_sees_as_many_samples() -> None:
    for whole, halved in ((10, 20), (1.0, 1.0), (0, 0)):
        config = OmegaConf.create(CONFIG)
        config.trainer.limit_val_batches = whole
        config.on_out_of_memory = "halve"
        halve(config)
        assert config.trainer.limit_val_batches == halved and type(config.trainer.limit_val_batches) is type(whole)


@pytest.mark.parametrize("changed", [{"on_out_of_memory": "stop"}, {"data": {}}])
def test_nothing_is_halved_unasked_or_without_a_batch_size(changed: dict) -> None:
    assert halve(OmegaConf.create({**CONFIG, "on_out_of_memory": "halve", **changed})) is None


def test_halving_on_several_processes_is_refused_before_anything_begins() -> None:
    with pytest.raises(UserError, match="on_out_of_memory: got halve for several processes, expected stop"):
        check_memory(OmegaConf.create({**CONFIG, "on_out_of_memory": "halve", "trainer": {"devices": "2"}}))


def test_another_choice_is_refused() -> None:
    with pytest.raises(UserError, match="on_out_of_memory: got pray, expected stop or halve"):
        halve(OmegaConf.create({**CONFIG, "on_out_of_memory": "pray"}))


AUTOENCODER = {**CONFIG, "model": {"_target_": "ldm.training.AutoencoderModule"}}


def test_an_autoencoder_whose_steps_are_of_whole_batches_is_told_of_no_pieces() -> None:
    assert "accumulate_grad_batches" not in remedies(OmegaConf.create(AUTOENCODER))
    assert "accumulate_grad_batches=6" in remedies(
        OmegaConf.create({**CONFIG, "model": {"_target_": "ldm.training.LatentDiffusionModule"}})
    )


def test_halving_an_autoencoder_is_refused_before_anything_begins() -> None:
    with pytest.raises(UserError, match="on_out_of_memory: got halve for an autoencoder, whose steps are of whole"):
        check_memory(OmegaConf.create({**AUTOENCODER, "on_out_of_memory": "halve"}))


def test_a_model_that_a_function_makes_is_halved() -> None:
    config = OmegaConf.create({**CONFIG, "on_out_of_memory": "halve", "model": {"_target_": "ldm.load"}})
    assert (halve(config) or "").startswith("data.batch_size=4")
