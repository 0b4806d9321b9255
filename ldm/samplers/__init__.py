"""Samplers: from noise to data in steps, and the times at which they step.

| sampler | asks a step | order | looks back | noise |
|---|---|---|---|---|
| Euler, DDIM (eta = 0) | 1 | 1 | | |
| Heun, KDPM2, DPMSolverPP2S | 2 | 2 | | |
| DPMSolverPP2M | 1 | 2 | yes | |
| PLMS | 1, the first 2 | 2; even steps in tau 3 | yes | |
| LMS, DEIS (order p) | 1 | p | yes | |
| UniPC (order p) | 1 | p + 1 | yes | |
| DDPM, DDIM (eta > 0), EulerAncestral | 1 | | | each step |
| KDPM2, DPMSolverPP2S (eta > 0) | 2 | | | each step |
| DPMSolverPPSDE | 2 | eta = 0: 2 | | two draws a step |
| DPMSolverPP2MSDE, DPMSolverPP3MSDE | 1 | eta = 0: 2 | yes | each step |
| LCM | 1 | | | each step but the last |
| EulerMaruyama | 1 | noise = 0: 1 | | each step |
| Churn | its sampler's | its sampler's | | each step in its range |
| Restart | its sampler's, and its intervals' | its sampler's | | each restart |

The order is that of one step from exact answers, to the flow. A run starts with lower orders, which leaves high ones
second order in the limit; on smooth times the higher order shows over the numbers of steps that are used.
"""

from ldm.samplers.base import Evaluation, Noise, Process, Sampler, State
from ldm.samplers.churn import Churn
from ldm.samplers.ddim import DDIM
from ldm.samplers.ddpm import DDPM
from ldm.samplers.discretizations import (
    CompVis,
    Discretization,
    DistilledSteps,
    Leading,
    Linspace,
    Shifted,
    Trailing,
)
from ldm.samplers.dpmpp import DPMSolverPP2M, DPMSolverPP2S
from ldm.samplers.dpmpp_sde import DPMSolverPP2MSDE, DPMSolverPP3MSDE, DPMSolverPPSDE
from ldm.samplers.euler import Euler, EulerAncestral
from ldm.samplers.euler_maruyama import EulerMaruyama
from ldm.samplers.heun import Heun
from ldm.samplers.kdpm2 import KDPM2
from ldm.samplers.lcm import LCM
from ldm.samplers.linear_multistep import DEIS, LMS, PLMS
from ldm.samplers.noise_levels import AlignYourSteps, Beta, Exponential, Karras, NoiseLevels
from ldm.samplers.restart import Interval, Restart
from ldm.samplers.unipc import UniPC

__all__ = [
    "DDIM",
    "DDPM",
    "DEIS",
    "KDPM2",
    "LCM",
    "LMS",
    "PLMS",
    "AlignYourSteps",
    "Beta",
    "Churn",
    "CompVis",
    "DPMSolverPP2M",
    "DPMSolverPP2MSDE",
    "DPMSolverPP2S",
    "DPMSolverPP3MSDE",
    "DPMSolverPPSDE",
    "Discretization",
    "DistilledSteps",
    "Euler",
    "EulerAncestral",
    "EulerMaruyama",
    "Evaluation",
    "Exponential",
    "Heun",
    "Interval",
    "Karras",
    "Leading",
    "Linspace",
    "Noise",
    "NoiseLevels",
    "Process",
    "Restart",
    "Sampler",
    "Shifted",
    "State",
    "Trailing",
    "UniPC",
]
