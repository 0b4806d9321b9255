"""Which versions are installed, and which of them are known to go wrong, alone or together."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

from ldm.cli.doctor_machine import Check
from ldm.cli.provenance import environment

# Packages that a known-bad combination names, besides those that a run folder records.
_OTHERS = (
    *("transformers", "diffusers", "gradio", "optuna", "hydra-optuna-sweeper", "sqlalchemy", "img2dataset"),
    *("lightning", "mosaicml-streaming"),
)


@dataclass(frozen=True)
class Bad:
    """A combination that is known to go wrong.

    Args:
        name: what to call it.
        holds: whether it is installed, of the versions by package.
        why: what happens, and what to do.
        status: "FAILED" where runs or the machine are in danger, "note" where one feature is.
    """

    name: str
    holds: Callable[[Mapping[str, Version]], bool]
    why: str
    status: str = "note"


def _between(package: str, *, below: str | None = None, least: str = "0") -> Callable[[Mapping[str, Version]], bool]:
    """Whether a package is installed in a version from `least` on and below `below`."""

    def holds(found: Mapping[str, Version]) -> bool:
        own = found.get(package)
        return own is not None and own >= Version(least) and (below is None or own < Version(below))

    return holds


def _both(*conditions: Callable[[Mapping[str, Version]], bool]) -> Callable[[Mapping[str, Version]], bool]:
    return lambda found: all(condition(found) for condition in conditions)


_STOLEN = "these wheels steal credentials (GHSA-w37p-236h-pfx3): change every password of this machine, then upgrade"
KNOWN = (
    *(
        Bad(f"{package} 2.6.2, 2.6.3", _between(package, least="2.6.2", below="2.6.4"), _STOLEN, "FAILED")
        for package in ("lightning", "pytorch-lightning")
    ),
    Bad(
        "pytorch-lightning < 2.6.6",
        _between("pytorch-lightning", below="2.6.6"),
        "a checkpoint can run code even with weights_only=True (CVE-2026-58659): upgrade to 2.6.6",
        "FAILED",
    ),
    Bad(
        "torch < 2.10",
        _between("torch", below="2.10"),
        "reading a foreign file with weights_only=True can corrupt memory (CVE-2026-24747): upgrade to 2.10",
        "FAILED",
    ),
    Bad(
        "hydra-core < 1.3.8",
        _between("hydra-core", below="1.3.8"),
        "a config can call what it likes (CVE-2026-68508 and its successors): upgrade to 1.3.8",
        "FAILED",
    ),
    Bad(
        "torchmetrics 1.9 + transformers 5",
        _both(_between("torchmetrics", below="1.9.1"), _between("transformers", least="5")),
        "torchmetrics' own CLIPScore crashes; ldm.metrics.CLIPScore does not use it",
    ),
    Bad(
        "diffusers < 0.42.1",
        _between("diffusers", below="0.42.1"),
        "loading a foreign pipeline can run its code (CVE-2026-44513, CVE-2026-45804): upgrade to 0.42.1",
    ),
    Bad(
        "gradio < 6.16",
        _between("gradio", below="6.16"),
        "a page that others reach gives them files (CVE-2026-28414): upgrade, or serve to 127.0.0.1 alone",
    ),
    Bad(
        "hydra-optuna-sweeper",
        _between("hydra-optuna-sweeper"),
        "it pulls optuna 2.10, whose sqlite storage crashes with current SQLAlchemy: use `ldm sweep`",
    ),
    Bad(
        "img2dataset + webdataset 1",
        _both(_between("img2dataset"), _between("webdataset", least="1")),
        "img2dataset needs webdataset 0.2: give it an environment of its own",
    ),
    Bad(
        "mosaicml-streaming + numpy 2.2",
        _both(_between("mosaicml-streaming"), _between("numpy", least="2.2")),
        "it needs numpy below 2.2 and transformers below 5: give it an environment of its own",
    ),
)


def versions() -> list[Check]:
    """The interpreter and the packages that results depend on."""
    found = environment()
    packages = ", ".join(f"{name} {number}" for name, number in found["packages"].items())
    checks = [Check("python", "ok", f"{found['python']} on {found['platform']}"), Check("packages", "ok", packages)]
    git = found["git"]
    if git:
        changed = " with changes that are not committed" if git["changed"] else ""
        checks.append(Check("source", "ok", f"git {git['revision'][:12]}{changed}"))
    return checks


def combinations(found: Mapping[str, Version] | None = None) -> list[Check]:
    """The known-bad combinations that are installed here."""
    installed = _installed() if found is None else found
    bad = [Check(one.name, one.status, one.why) for one in KNOWN if one.holds(installed)]
    return bad or [Check("none of them is here", "ok", f"{len(KNOWN)} are known")]


def _installed() -> dict[str, Version]:
    names = {*_OTHERS, *(environment()["packages"])} - {"ldm"}
    found = {}
    for name in names:
        try:
            number = re.match(r"[0-9.]+", version(name))
        except PackageNotFoundError:
            continue
        if number:
            found[name] = Version(number[0].rstrip("."))
    return found
