"""A paper card with what is built beside it: the composed experiment and the counts of its parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import OmegaConf

from ldm.cli.cards import card_names, experiment_of, read_card
from ldm.cli.compose import compose_command
from ldm.cli.errors import UserError, user_mistakes
from ldm.cli.meta import Counter, Part, first_stage_node, run_name

if TYPE_CHECKING:
    from ldm.generation.report import Card

# What a card says of training, and where an experiment sets it.
TRAINING = {"lr": "optimizer.lr", "steps": "trainer.max_steps"}


@dataclass(frozen=True)
class Paper:
    """A card, the experiment that it stands in, and what counts it.

    Args:
        experiment: such as paper/ldm4_celebahq.
        card: its card.
        library: of all papers, which share what they compose and count.
    """

    experiment: str
    card: Card
    library: Library

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved config as plain values, with `<result of NAME>` for what other runs leave."""
        return self.library.config(self.experiment)

    @property
    def requires(self) -> list[str]:
        """The experiments that have to be trained before."""
        lines = [line.split() for line in self.config.get("requires") or []]
        named = [word.partition("=")[2] for line in lines if line[:1] == ["train"] for word in line]
        return [experiment for experiment in named if experiment in self.library.names]

    @property
    def first_stage(self) -> Any:
        """The geometry of the autoencoder as a node."""
        return first_stage_node(
            self.config["autoencoder"], geometry=self.card.first_stage, of_experiment=self.library.autoencoder_of
        )

    def parts(self, *, flops: bool) -> dict[str, Part]:
        """Counts by part: network and encoder where there are some, first_stage."""
        counter, size, stage = self.library.counter, self.size, self.first_stage
        found = {}
        if self.config.get("network") is not None:
            channels, factor = latents_of(stage)
            encoder = self.config["conditioner"]
            found["network"] = counter.network(
                self.config["network"],
                encoder=encoder,
                latent_channels=channels,
                size=max(1, size // factor),
                flops=flops,
            )
            found["encoder"] = counter.encoder(encoder, flops=flops)
        found["first_stage"] = counter.first_stage(stage, size=size, flops=flops)
        return found

    def total(self, parts: dict[str, Part]) -> int:
        """Parameters of the parts that the paper's own number adds."""
        return sum(parts[name].parameters for name in self.card.total_of if name in parts)

    @property
    def size(self) -> int:
        """Pixels a side that it is trained at."""
        resolution = self.config["data"].get("resolution")
        sampled = (self.config["model"].get("sampling") or {}).get("image_size")
        found = resolution or sampled or 256
        return int(found if isinstance(found, int) else found[0])

    @property
    def training(self) -> dict[str, float]:
        """Batch size of all processes, learning rate and steps of the composed experiment."""
        found = {name: float(OmegaConf.select(OmegaConf.create(self.config), key)) for name, key in TRAINING.items()}
        pieces = self.config["trainer"].get("accumulate_grad_batches") or 1
        return {"batch_size": float(self.config["data"]["batch_size"] * pieces), **found}


class Library:
    """All cards; each experiment is composed once, each kind of network counted once."""

    def __init__(self) -> None:
        OmegaConf.register_new_resolver("result", lambda name: f"<result of {name}>", replace=True)
        self.names = card_names()
        self.counter = Counter()
        self._configs: dict[str, dict[str, Any]] = {}

    def paper(self, name: str) -> Paper:
        """The paper of a card's name, long or short.

        Raises:
            UserError: there is none, or its card is none.
        """
        experiment = experiment_of(name)
        return Paper(experiment, read_card(experiment), self)

    def papers(self, names: Sequence[str] | None = None) -> list[Paper]:
        """All papers, or those of these names."""
        return [self.paper(name) for name in (self.names if names is None else names)]

    def config(self, experiment: str) -> dict[str, Any]:
        """An experiment's resolved config as plain values."""
        if experiment not in self._configs:
            composed = compose_command("train", [f"experiment={experiment}"])
            composed.run_id, composed.run_dir = "<run_id>", "<run_dir>"
            if missing := OmegaConf.missing_keys(composed):
                raise UserError(f"{experiment}: {', '.join(sorted(missing))} have no value; set them")
            with user_mistakes():
                plain = OmegaConf.to_container(composed, resolve=True)
            self._configs[experiment] = cast("dict[str, Any]", plain)
        return self._configs[experiment]

    def autoencoder_of(self, name: str) -> Any:
        """The autoencoder's node of the experiment whose runs have this name.

        Raises:
            UserError: there is no such experiment.
        """
        found = next((one for one in self.names if run_name(one) == name), None)
        if found is None:
            raise UserError(f"autoencoder.path: got a result of {name}, expected that of a paper's experiment")
        return self.config(found)["autoencoder"]


def latents_of(stage: Any) -> tuple[int, int]:
    """Channels of the latents, and how many times smaller than images they are."""
    from ldm.cli.meta import on_meta

    autoencoder = on_meta(stage)
    return autoencoder.latent_channels, autoencoder.downsampling_factor


def decimals(printed: float | str) -> int:
    """Decimals of a number as printed: 1 of 55.3, 0 of 274; of text 2 of 1.10 and 1 of 8.0."""
    text = str(printed)
    is_whole = not isinstance(printed, str) and text.endswith(".0")
    return 0 if "e" in text.lower() or is_whole else len(text.partition(".")[2].rstrip())


def as_printed(value: float, printed: float | str) -> str:
    """A value to the digits of a printed number."""
    return f"{value:.{decimals(printed)}f}"


def agrees(value: float, printed: float | str) -> bool:
    """Whether a value rounds to a printed number."""
    return float(as_printed(value, printed)) == float(printed)


def evaluations_of(paper: Paper, runs: Path) -> list[Path]:
    """Folders of finished evaluations under the runs of a paper, the newest last."""
    found = (runs / run_name(paper.experiment)).glob("*/evaluations/*/evaluation.json")
    return [file.parent for file in sorted(found, key=lambda file: file.stat().st_mtime)]
