"""Paper cards: the node `card` of an experiment, found by the experiment's name."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from hydra.core.global_hydra import GlobalHydra

from ldm.cli.compose import conf_folder
from ldm.cli.errors import UserError, closest, user_mistakes

if TYPE_CHECKING:
    from ldm.generation.report import Card

EXPERIMENTS, PAPERS = "experiment", "paper"


def read_card(name: str) -> Card:
    """The card of an experiment, such as paper/ldm4_celebahq, or of a yaml file or run folder with a node `card`.

    Raises:
        UserError: there is none, or it is none.
    """
    file = card_file(name)
    from ldm.generation.report import Card

    with user_mistakes():
        return Card.read(card_node(file), source=str(name))


def card_file(name: str) -> Path:
    """The yaml that a name means: paper/ldm4_celebahq, or ldm4_celebahq for short.

    Raises:
        UserError: there is none.
    """
    given = Path(name).expanduser()
    named = [folder / f"{part}{name}.yaml" for folder in experiment_folders() for part in ("", f"{PAPERS}/")]
    found = next((place for place in (given, given / "config.yaml", *named) if place.is_file()), None)
    if found is None:
        near = closest(name, [*(names := card_names()), *(one.removeprefix(f"{PAPERS}/") for one in names)])
        hint = f"did you mean {near}?" if near else "expected one that `ldm papers` lists, or a yaml file"
        raise UserError(f"card: got {name}, which is no experiment with a card; {hint}")
    return found


def experiment_of(name: str) -> str:
    """The experiment of a card, by its name or its short name.

    Raises:
        UserError: there is none, or it is a file that no command can compose.
    """
    file = card_file(name)
    for folder in experiment_folders():
        if file.is_relative_to(folder):
            return file.relative_to(folder).with_suffix("").as_posix()
    raise UserError(f"card: got {name}, expected an experiment by name; see `ldm papers`")


def card_names() -> list[str]:
    """The experiments that have a card."""
    found = []
    for folder in experiment_folders():
        for file in sorted(folder.rglob("*.yaml")):
            if "\ncard:" in file.read_text():
                found.append(file.relative_to(folder).with_suffix("").as_posix())
    return found


def card_node(file: Path, *, loader: type[Any] | None = None) -> Any:
    """The node `card` of a yaml file as plain values, over those of the experiments that it begins from; or None.

    Args:
        loader: of yaml; None reads numbers as OmegaConf does.
    """
    reads_with: Any = loader or _Loader
    content = _content(file, file.stat().st_mtime_ns, reads_with)
    own = content.get("card")
    if not isinstance(own, dict):
        return own
    node: dict[str, Any] = {}
    for base in _bases(file, content):
        node = _merged(node, card_node(base, loader=loader) or {})
    return _merged(node, own)


def printed_figure(experiment: str, row: str, figure: str, value: float) -> str:
    """A published figure with the digits that its card writes, 3.60 rather than 3.6.

    Args:
        experiment: whose card it is.
        row: a name of its `rows`, or "" for the card's own.
        figure: a name in `published`.
        value: of the figure, which the command line may have changed.
    """
    node = card_node(card_file(experiment), loader=yaml.BaseLoader) or {}
    own = (node.get("rows") or {}).get(row) or {}
    text = (own.get("published") or node.get("published") or {}).get(figure)
    return text if isinstance(text, str) and float(text) == value else str(value)


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """As Hydra merges: dicts by key, everything else replaced."""
    found = dict(base)
    for name, value in changes.items():
        before = found.get(name)
        found[name] = _merged(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return found


@cache
def _content(file: Path, changed: int, loader: type[Any]) -> dict[str, Any]:
    content = yaml.load(file.read_text(), Loader=loader)
    return content if isinstance(content, dict) else {}


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML as OmegaConf reads it, where 1e-4 is a number; a hundred cards are read in a second."""


_FLOAT = re.compile(r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9][0-9_]*)[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def _bases(file: Path, content: dict[str, Any]) -> list[Path]:
    """The files of the experiments, such as /experiment/paper/kl_f8, that its list of defaults begins from."""
    defaults = content.get("defaults") or []
    names = [str(one).removeprefix("/") for one in defaults if str(one).startswith(f"/{EXPERIMENTS}/")]
    own = next((folder for folder in file.parents if folder.name == EXPERIMENTS), file.parent)
    roots = [folder.parent for folder in (own, *experiment_folders())]
    found = [next((place for root in roots if (place := root / f"{name}.yaml").is_file()), None) for name in names]
    return [place for place in found if place is not None]


def experiment_folders() -> list[Path]:
    """Where experiments are: those of this package, and those of `--config-dir`."""
    folders = [conf_folder()]
    if GlobalHydra.instance().is_initialized():
        found = GlobalHydra.instance().config_loader().get_search_path().get_path()
        folders += [Path(one.path.removeprefix("file://")) for one in found if one.path and "://" in one.path]
    return [place for place in dict.fromkeys(folder / EXPERIMENTS for folder in folders) if place.is_dir()]
