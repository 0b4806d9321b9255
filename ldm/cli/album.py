"""Where `ldm sample` puts what it makes: pictures with their settings, previews, trajectories, an animation."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.chain import shown
from ldm.cli.console import heading, say
from ldm.cli.run_folder import write_json

if TYPE_CHECKING:
    from PIL.Image import Image

    from ldm.generation import Order, Pipeline, Task
    from ldm.generation.pipeline import Step
    from ldm.generation.retouching import Retouch
    from ldm.samplers import State


PREVIEWS, TRAJECTORIES = "previews", "trajectories"


class Album:
    """A folder with NNNNN_<prompt>_<seed>.png for each order, grid.png and samples.json.

    A picture on the way to another seed has both in its name: <seed>-<other seed>.

    Args:
        record: the settings that all pictures share.
        retouches: what is done to finished pictures.
        preview_every: steps between pictures of the x_0 that the model believes in, in previews/; None makes none.
        with_trajectories: also every step of each picture as a strip, in trajectories/.
    """

    def __init__(
        self,
        folder: Path,
        orders: Sequence[Order],
        *,
        task: Task,
        record: dict[str, Any],
        retouches: Sequence[Retouch] = (),
        preview_every: int | None = None,
        with_trajectories: bool = False,
    ) -> None:
        self.folder, self.orders, self.task, self.record = folder, list(orders), task, record
        self.retouches, self.preview_every = retouches, preview_every
        self.with_trajectories = with_trajectories
        self.pictures: list[Image] = []
        self.samples: list[dict[str, Any]] = []
        self._states: list[State] = []

    def take(self, step: Step, pipeline: Pipeline) -> None:
        """Keeps what is wanted of a step, and the pictures of the last one."""
        if self.with_trajectories:
            # On the CPU: latents are small, but the steps of a large batch are many.
            self._states.append(to_cpu(step.state))
        if step.is_last:
            self._keep_pictures(step, pipeline)
            self._keep_trajectories(step, pipeline)
        elif self.preview_every and step.number and step.number % self.preview_every == 0:
            self._keep_previews(step, pipeline)

    def finish(self) -> None:
        """Writes what needs all pictures, and says where everything is."""
        from ldm.generation import grid

        grid(self.pictures).save(self.folder / "grid.png")
        write_json(self.folder / "samples.json", self.samples)
        heading(f"{len(self.samples)} picture{'s' if len(self.samples) > 1 else ''} in {shown(self.folder.absolute())}")
        say(f"  all in one  {shown((self.folder / 'grid.png').absolute())}")
        if self.task.frames_per_second is not None:
            say(f"  animation   {shown(self._animate(self.task.frames_per_second).absolute())}")
        for name in (PREVIEWS, TRAJECTORIES):
            if (self.folder / name).is_dir():
                say(f"  {name:<12}{shown((self.folder / name).absolute())}")
        say(f"  settings    {shown((self.folder / 'samples.json').absolute())}")

    def _keep_pictures(self, step: Step, pipeline: Pipeline) -> None:
        from PIL.PngImagePlugin import PngInfo

        from ldm.generation import to_pil
        from ldm.generation.retouching import retouched

        self.folder.mkdir(parents=True, exist_ok=True)
        pictures = to_pil(self.task.finish(pipeline.decode(step.state.x)))
        for number, picture in zip(range(step.part.start, step.part.stop), pictures, strict=True):
            picture = retouched(picture, self.retouches)
            entry = {
                "file": f"{self._stem(number)}.png",
                **described(self.orders[number]),
                **self.record,
                "image_size": picture.height if picture.height == picture.width else [picture.height, picture.width],
            }
            information = PngInfo()
            information.add_text("ldm", json.dumps(entry))
            information.add_text("parameters", parameters(entry, picture))
            picture.save(self.folder / entry["file"], pnginfo=information)
            self.pictures.append(picture)
            self.samples.append(entry)

    def _keep_trajectories(self, step: Step, pipeline: Pipeline) -> None:
        from ldm.generation.postprocess import strip

        if not self._states:
            return
        folder = self.folder / TRAJECTORIES
        folder.mkdir(exist_ok=True)
        for row, number in enumerate(range(step.part.start, step.part.stop)):
            steps = [pipeline.believed(state, row=row) for state in self._states[1:]]
            strip(list(zip(*steps, strict=True))).save(folder / f"{self._stem(number)}.png")
        self._states.clear()

    def _keep_previews(self, step: Step, pipeline: Pipeline) -> None:
        from ldm.generation import to_pil

        assert step.state.prediction is not None
        folder = self.folder / PREVIEWS
        folder.mkdir(parents=True, exist_ok=True)
        previews = to_pil(pipeline.decode(step.state.prediction.x_0))
        for number, preview in zip(range(step.part.start, step.part.stop), previews, strict=True):
            preview.save(folder / f"{self._stem(number)}_step{step.number:04d}.png")
        batch = f"pictures {step.part.start + 1} to {step.part.stop} of {len(self.orders)}"
        say(f"{batch}: step {step.number} of {step.num_steps} in {shown(folder.absolute())}", style="dim")

    def _animate(self, frames_per_second: float) -> Path:
        path = self.folder / "animation.gif"
        first, *rest = self.pictures
        first.save(path, save_all=True, append_images=rest, duration=round(1000 / frames_per_second), loop=0)
        return path

    def _stem(self, number: int) -> str:
        order = self.orders[number]
        seeds = f"{order.seed}" if order.other_seed is None else f"{order.seed}-{order.other_seed}"
        return f"{number:05d}_{slug(order.prompt)}_{seeds}"


def to_cpu(state: State) -> State:
    """The same state in main memory."""
    from ldm.diffusion import Prediction

    prediction = state.prediction and Prediction(*(part.cpu() for part in state.prediction))
    return state._replace(x=state.x.cpu(), prediction=prediction)


def described(order: Order) -> dict[str, Any]:
    """An order as plain values; the end of a way that it does not go is left out."""
    values = asdict(order)
    if order.other_prompt is None and order.other_seed is None:
        del values["amount"]
    return {name: value for name, value in values.items() if value is not None}


def slug(prompt: str, *, length: int = 40) -> str:
    """A prompt as part of a file name."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")
    return words[:length].rstrip("-") or "picture"


def parameters(entry: dict[str, Any], picture: Image) -> str:
    """The settings in the text form that picture viewers for generated images read."""
    negative = f"\nNegative prompt: {entry['negative_prompt']}" if entry["negative_prompt"] else ""
    values = {
        "Steps": entry["num_steps"],
        "Sampler": entry["sampler"],
        "CFG scale": entry["guidance"].get("scale"),
        "Seed": entry["seed"],
        **_way(entry),
        "Size": f"{picture.width}x{picture.height}",
        "Model": entry["checkpoint"],
    }
    return f"{entry['prompt']}{negative}\n" + ", ".join(f"{name}: {value}" for name, value in values.items())


def _way(entry: dict[str, Any]) -> dict[str, Any]:
    """How far a picture is on the way to another seed and prompt, where it is on one."""
    if "amount" not in entry:
        return {}
    # In JSON's quotes, as a prompt may hold the commas that part the settings.
    prompt = {"Variation prompt": json.dumps(entry["other_prompt"])} if "other_prompt" in entry else {}
    seed = {"Variation seed": entry["other_seed"]} if "other_seed" in entry else {}
    return {**prompt, **seed, "Variation strength": entry["amount"]}
