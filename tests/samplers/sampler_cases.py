"""Every sampler and every path, and what they need to run."""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion import parameterizations, schedules
from ldm.diffusion.parameterizations import X0, Epsilon, Parameterization, V, Velocity
from ldm.diffusion.schedules import Cosine, Linear, RectifiedFlow, ScaledLinear, Schedule
from ldm.samplers import (
    DDIM,
    DDPM,
    DEIS,
    KDPM2,
    LCM,
    LMS,
    PLMS,
    Churn,
    DPMSolverPP2M,
    DPMSolverPP2MSDE,
    DPMSolverPP2S,
    DPMSolverPP3MSDE,
    DPMSolverPPSDE,
    Euler,
    EulerAncestral,
    EulerMaruyama,
    Heun,
    Interval,
    Restart,
    Sampler,
    UniPC,
)

SCHEDULES: dict[str, Schedule] = {
    "linear": Linear(),
    "scaled_linear": ScaledLinear(),
    "zero_terminal_snr": ScaledLinear(zero_terminal_snr=True),
    "cosine": Cosine(),
    "edm": schedules.EDM(sigma_max=20.0, sigma_data=0.6),
    "rectified_flow": RectifiedFlow(),
}
PARAMETERIZATIONS: dict[str, Parameterization] = {
    "epsilon": Epsilon(),
    "x_0": X0(),
    "v": V(),
    "velocity": Velocity(),
    "edm": parameterizations.EDM(),
}
# The order in which the error falls: on curved paths (scaled_linear, edm) and on rectified flow, whose start at pure
# noise leaves second order to all but the method that is straight in t.
DETERMINISTIC: dict[str, tuple[Sampler, int, int]] = {
    "euler": (Euler(), 1, 1),
    "churn_0": (Churn(churn=0.0), 2, 2),
    "ddim": (DDIM(eta=0.0), 1, 1),
    "heun": (Heun(), 2, 2),
    "kdpm2": (KDPM2(), 2, 2),
    "dpmpp_2m": (DPMSolverPP2M(), 2, 2),
    "dpmpp_2s": (DPMSolverPP2S(), 2, 2),
    "dpmpp_sde_eta_0": (DPMSolverPPSDE(eta=0.0), 2, 2),
    "dpmpp_2m_sde_eta_0": (DPMSolverPP2MSDE(eta=0.0), 2, 2),
    "dpmpp_2m_sde_heun_eta_0": (DPMSolverPP2MSDE(eta=0.0, solver="heun"), 2, 2),
    "plms": (PLMS(), 2, 3),
    "lms_1": (LMS(order=1), 1, 1),
    "lms_2": (LMS(order=2), 2, 2),
    "lms_3": (LMS(order=3), 3, 2),
    "lms_4": (LMS(), 4, 2),
    "deis_1": (DEIS(order=1), 1, 1),
    "deis_3": (DEIS(), 3, 2),
    "unipc_1": (UniPC(order=1), 2, 2),
    "unipc_2": (UniPC(), 3, 2),
    "unipc_3": (UniPC(order=3), 4, 2),
    "unipc_2_bh1": (UniPC(variant="bh1"), 3, 2),
}
STOCHASTIC: dict[str, Sampler] = {
    "ddpm": DDPM(),
    "ddpm_large": DDPM(variance="large"),
    "ddim_eta_1": DDIM(eta=1.0),
    "ddim_eta_half": DDIM(eta=0.5),
    "euler_ancestral": EulerAncestral(),
    "euler_maruyama": EulerMaruyama(),
    "churn": Churn(noise=1.0),
    "kdpm2_ancestral": KDPM2(eta=1.0),
    "dpmpp_2s_ancestral": DPMSolverPP2S(eta=1.0),
    "dpmpp_sde": DPMSolverPPSDE(),
    "dpmpp_sde_eta_half": DPMSolverPPSDE(eta=0.5),
    "dpmpp_2m_sde": DPMSolverPP2MSDE(),
    "dpmpp_2m_sde_heun": DPMSolverPP2MSDE(solver="heun"),
    "dpmpp_3m_sde": DPMSolverPP3MSDE(),
    "restart": Restart(Heun(), intervals=[Interval(0.3, 2.0, num_restarts=2, num_steps=12)]),
    "restart_euler_twice": Restart(Euler(), intervals=[Interval(0.2, 1.0, num_steps=20), Interval(0.5, 5.0)]),
}
SAMPLERS = {name: sampler for name, (sampler, _, _) in DETERMINISTIC.items()} | STOCHASTIC | {"lcm": LCM()}


def no_noise() -> Tensor:
    raise AssertionError("a deterministic sampler asked for noise")


def seeded_noise(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(1)
    return lambda: torch.randn(shape, generator=generator, dtype=dtype)


def smooth_times(num_steps: int, schedule: Schedule) -> Tensor:
    """Times that refine evenly: cubes of a ramp in the noise level, or t itself on rectified flow."""
    ramp = 1 - torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    if isinstance(schedule, RectifiedFlow):
        return ramp
    return schedule.time_of(ramp**3 * schedule.ratio(torch.tensor(schedule.t_max, dtype=torch.float64)))
