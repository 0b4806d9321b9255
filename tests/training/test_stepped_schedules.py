"""The learning-rate schedules of latent diffusion's configs."""

import pytest
import torch

from ldm.training.optim import cosine_steps, linear_steps


def rates(make, steps: list[int]) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=2.0)
    factor = make(optimizer).lr_lambdas[0]
    return [factor(step) for step in steps]


def test_the_linear_one_of_churches_warms_up_and_stays() -> None:
    found = rates(lambda o: linear_steps(o, num_steps=500, num_warmup_steps=100, start_factor=1e-6), [0, 50, 100, 499])
    assert found == pytest.approx([1e-6, 0.5 + 5e-7, 1.0, 1.0])


def test_the_linear_one_falls_to_its_last_factor() -> None:
    found = rates(lambda o: linear_steps(o, num_steps=200, num_warmup_steps=100, final_factor=0.2), [150, 200, 900])
    assert found == pytest.approx([0.6, 0.2, 0.2])


def test_the_cosine_of_inpainting_has_its_published_factors() -> None:
    def make(optimizer: torch.optim.Optimizer):
        return cosine_steps(
            optimizer,
            num_steps=50000,
            num_warmup_steps=1000,
            start_factor=0.001,
            peak_factor=0.1,
            final_factor=0.0001,
        )

    # LambdaWarmUpCosineScheduler(warm_up_steps=1000, lr_min=0.0001, lr_max=0.1, lr_start=0.001, max_decay_steps=50000)
    assert rates(make, [0, 500, 1000, 25500, 50000, 60000]) == pytest.approx(
        [0.001, 0.0505, 0.1, (0.1 + 0.0001) / 2, 0.0001, 0.0001]
    )
