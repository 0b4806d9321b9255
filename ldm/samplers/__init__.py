"""Samplers: from noise to data in steps, and the times at which they step."""

from ldm.samplers.base import Noise, Process, Sampler, State
from ldm.samplers.ddim import DDIM
from ldm.samplers.ddpm import DDPM
from ldm.samplers.discretizations import Discretization, Karras, Trailing, Uniform
from ldm.samplers.dpmpp import DPMSolverPP2M
from ldm.samplers.euler import Euler
from ldm.samplers.heun import Heun

__all__ = [
    "DDIM",
    "DDPM",
    "DPMSolverPP2M",
    "Discretization",
    "Euler",
    "Heun",
    "Karras",
    "Noise",
    "Process",
    "Sampler",
    "State",
    "Trailing",
    "Uniform",
]
