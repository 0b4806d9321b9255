"""Rows 24 to 26, 29 and 30: files, shards and configs that are hostile, do not fit, or are mistyped."""

from __future__ import annotations

import functools
import io
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.faults.bench_child import Outcome, Setting, in_time, steps_seen, wait_until
from tests.faults.bench_row import Result, row, shares
from tests.faults.rows_data import TOLERANT, sample, shard

# Seconds, behind the imports, within which a mistake is said.
PROMPT = 2.0


class Calls:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


class BuildsWith:
    """Pickles as a call, with a state that is set on what it returns."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.reduced = (function, arguments, {"x": 1})

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def payloads(marker: Path) -> Iterator[tuple[str, Any]]:
    """Objects whose unpickling creates a file."""
    import subprocess

    import torch

    shell, code = f"touch {marker}", f"open({str(marker)!r}, 'w')"
    yield "os.system", Calls(os.system, shell)
    yield "eval", Calls(eval, code)
    yield "exec", Calls(exec, code)
    yield "Popen", Calls(subprocess.Popen, ["touch", str(marker)])
    yield "Path.touch", Calls(Path.touch, marker)
    yield "partial", Calls(functools.partial(os.system, shell))
    yield "with state", BuildsWith(eval, code)
    yield "nested", {"state_dict": {"a": [torch.zeros(2), ({"b": Calls(os.system, shell)},)]}}
    yield "open", Calls(open, str(marker), "w")
    yield "load in load", Calls(pickle.loads, pickle.dumps(Calls(os.system, shell)))
    yield (
        "hyper_parameters",
        {
            "state_dict": {},
            "pytorch-lightning_version": "2.6.5",
            "hyper_parameters": {"_instantiator": "os.system", "args": shell},
            "more": Calls(os.system, shell),
        },
    )


def hostile_files(folder: Path, marker: Path) -> Iterator[tuple[str, Path]]:
    """Each payload in a checkpoint of torch, zipped and not, as a bare pickle, and in a sealed folder of ours."""
    import torch

    from ldm.training.checkpoint_files import seal

    for name, payload in payloads(marker):
        place = folder / name.replace(" ", "_")
        place.mkdir(parents=True)
        content = payload if isinstance(payload, dict) else {"state_dict": {"x": torch.zeros(1)}, "config": payload}
        for kind in ("zip", "old"):
            torch.save(content, place / f"{kind}.ckpt", _use_new_zipfile_serialization=kind == "zip")
            yield f"{name}, {kind}", place / f"{kind}.ckpt"
        (place / "bare.ckpt").write_bytes(pickle.dumps(payload))
        yield f"{name}, bare", place / "bare.ckpt"
        ours = place / "step=000000009.ckpt"
        ours.mkdir()
        torch.save(content, ours / "state.pt")
        seal(ours, facts={"step": 9})
        yield f"{name}, ours", ours


def num_armed(marker: Path) -> int:
    """How many of the payloads do create the file when nothing guards their unpickling."""
    armed = 0
    for _, payload in payloads(marker):
        with suppress(Exception):  # some fail once they have run
            pickle.loads(pickle.dumps(payload))
        armed += wait_until(marker.exists, 2)
        marker.unlink(missing_ok=True)
    return armed


@row(
    24,
    "checkpoints whose unpickling runs code",
    must_hold="refused by every way in; nothing runs",
    stock="runs with weights_only=False, which is the default for URLs",
)
def hostile_checkpoints(setting: Setting) -> Result:
    marker = setting.folder / "owned"

    def inject() -> dict[str, Any]:
        import ldm
        from ldm.interop.safe_load import read_file
        from ldm.training.checkpoint_parts import read, read_model

        opened, tried = [], 0
        for name, path in hostile_files(setting.folder / "files", marker):
            for way in (read, read_model, read_file, functools.partial(ldm.load, device="cpu")):
                tried += 1
                try:
                    way(path)
                except Exception:
                    continue
                opened.append(f"{name} by {getattr(way, '__name__', 'load')}")
        return {"tried": tried, "opened": opened, "ran": marker.exists()}

    found, armed = setting.call(inject), setting.call(lambda: num_armed(setting.folder / "control"))
    first = next(hostile_files(setting.folder / "more", marker))[1]
    ways = [["sample", f"checkpoint={first}", "prompt=x", "device=cpu"], setting.words(f"resume={first}", "run_id=x")]
    outcomes = [setting.ldm(*words) for words in ways]
    refused = [one.code for one in outcomes]
    found["said"] = [one.text[-1200:] for one in outcomes]
    executed = int(found["ran"] or marker.exists())
    held = executed == 0 and not found["opened"] and all(code == 2 for code in refused) and armed == 11
    figure = (
        f"{executed} executed of {found['tried']} ({armed} of 11 payloads proven, 4 files, 4 ways in); commands refuse "
        f"with {refused}"
    )
    return Result(held, figure, found)


@row(
    25,
    "shards that run code or lead out of their folder: .pyd, .pickle, pipe:, ../, a link",
    must_hold="nothing runs, no file appears outside",
    stock="a .pyd is unpickled and a pipe: is a shell command by default",
)
def hostile_shards(setting: Setting) -> Result:
    import fault_shards

    marker, control = setting.folder / "owned", setting.folder / "control"
    evil = pickle.dumps(fault_shards.Touches(marker))
    pickle.loads(pickle.dumps(fault_shards.Touches(control)))
    samples = [sample(f"s{i:02d}") for i in range(22)]
    samples += [[*sample("code"), *((f"code.{end}", evil) for end in ("pyd", "pkl", "pickle", "pth", "pt", "py"))]]
    samples += [sample("../../../up")]
    folder = shard(setting.folder / "deep" / "deeper" / "evil", samples)
    fault_shards.write_tar(folder / "npy.tar", [("a.npy", fault_shards.pickled_array(marker)), ("a.txt", b"red")])
    before = _everything(setting.folder)
    trained = setting.train("run_id=evil", f"data.train={folder}/00000.tar", TOLERANT)
    linked = setting.call(lambda: captions_of(links(setting.folder)))
    array = setting.train("run_id=array", f"data.train={folder}/npy.tar", "data.resolution=null")
    pipe = setting.train("run_id=pipe", f"data.train='pipe:touch {marker}'")
    piped = setting.train("run_id=piped", f"data.train=['{folder}/00000.tar','pipe:touch {marker}']")
    setting.ldm("data", "validate", f"shards={folder}")
    setting.ldm("data", "report", f"shards={folder}/00000.tar", f"out={setting.folder}/report")
    new = {path for path in _everything(setting.folder) - before if not path.startswith(("runs", "report", "output"))}
    outside = [path for path in new if "up" in Path(path).name]
    refused = [one.code for one in (array, pipe, piped)]
    executed = int(marker.exists())
    followed = sum(SECRET in caption for caption in linked)
    held = executed == 0 and not outside and all(code in (1, 2) for code in refused) and trained.code == 0
    held &= control.exists()
    held &= followed == 0 and linked.count("red") == 3
    figure = (
        f"{executed} executed, {len(outside)} files outside, {followed} links followed; trained on what is sound: exit "
        f"{trained.code}; others refused: {refused}"
    )
    return Result(held, figure, {"new": sorted(new)[:20], "trained": trained.errors or trained.text[-300:]})


SECRET = "what the link leads to"


def links(folder: Path) -> Path:
    """Shards in which captions are links to a file outside, beside three sound samples."""
    import tarfile

    (folder / "outside.txt").write_text(SECRET)
    place = shard(folder / "links", [sample(f"s{i}") for i in range(3)])
    with tarfile.open(place / "00000.tar", "a") as tar:
        for key, kind in {"soft": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE}.items():
            (name, picture), *_ = sample(key)
            member = tarfile.TarInfo(name)
            member.size = len(picture)
            tar.addfile(member, io.BytesIO(picture))
            link = tarfile.TarInfo(f"{key}.txt")
            link.type, link.linkname = kind, str(folder / "outside.txt")
            tar.addfile(link)
    return place


def captions_of(folder: Path) -> list[str]:
    """What is read of shards."""
    from ldm.data import ShardDataModule

    data = ShardDataModule(folder, folder, batch_size=1, resolution=16, max_bad_fraction=1.0)
    return [caption for batch in data.iterate_once("validation", 1) for caption in batch["caption"]]


def _everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


HOSTILE_TARGETS = (
    *("os.system", "posix.system", "builtins.eval", "builtins.exec", "subprocess.run", "pathlib.Path.touch"),
    *("shutil.rmtree", "pickle.loads", "torch.load", "torch.hub.load", "torch.nn.modules.module.torch.load"),
    *(
        "functools.partial",
        "importlib.import_module",
        "ldm.cli.main.main",
        "hydra.utils.instantiate",
        "webbrowser.open",
    ),
    *("ldm.training.trial.subprocess.Popen", "ldm.cli.job.os.system", "torchmetrics.multimodal.CLIPScore"),
)


@row(
    26,
    "a config that comes with weights calls what it likes, or reads the environment",
    must_hold="refused by an allowlist; nothing runs; credentials are not written down",
    stock="Hydra's blocklist, which its authors call no boundary",
)
def hostile_configs(setting: Setting) -> Result:
    marker, secret = setting.folder / "owned", "hf_averysecrettoken"

    def inject() -> list[str]:
        import torch

        import ldm
        from ldm.nn.weights import save_weights

        opened = []
        for number, target in enumerate((*HOSTILE_TARGETS, "${oc.env:HF_TOKEN}", "${oc.decode:os.system}")):
            node = {"_target_": target, "_args_": [f"touch {marker}"]}
            shapes = {
                "plain": {"model": node},
                "deep": {"model": {"_target_": "torch.nn.Identity", "a": [{"b": node}]}},
                "made": {"model": {"_target_": "torch.nn.Identity", "a": f"${{oc.create:{{_target_: {target}}}}}"}},
            }
            for name, config in shapes.items():
                path = setting.folder / f"{number}-{name}.safetensors"
                save_weights(path, {"x": torch.zeros(1)}, target="ldm.training.LatentDiffusionModule", config=config)
                try:
                    ldm.load(path, device="cpu")
                except ValueError as error:
                    if "got a config " in str(error):
                        continue
                opened.append(f"{target} {name}")
        return opened

    opened = setting.call(inject, HF_TOKEN=secret)
    words = ["trainer.max_steps=2", "run_id=x", "+callback.note.where=${oc.env:HF_TOKEN}"]
    setting.train(*words, HF_TOKEN=secret)
    leaks = [path.name for path in (setting.folder / "runs").rglob("*") if path.is_file() and secret in _text(path)]
    written = (setting.run_of("x") / "config.yaml").exists()
    held = not opened and not marker.exists() and not leaks and written
    tried = 3 * (len(HOSTILE_TARGETS) + 2)
    return Result(held, f"{int(marker.exists())} executed of {tried}, secret in {len(leaks)} files", {"opened": opened})


def _text(path: Path) -> str:
    return path.read_bytes().decode(errors="replace")


@row(
    29,
    "a checkpoint of another width",
    must_hold="one line with the cause and at most 5 names, exit 2, within 2 s, before data are read",
    stock="200 lines of keys",
)
def other_architecture(setting: Setting) -> Result:
    words = setting.words("run_id=wide", f"resume={setting.clean('clean')}", "+model.channels=16")
    outcome = setting.ldm(*words)
    line = outcome.errors[0] if outcome.errors else ""
    unread = not steps_seen(setting.run_of("wide"))
    prompt, within = in_time(outcome.seconds, PROMPT)
    held = outcome.code == 2 and len(outcome.errors) == 1 and len(line) < 1000 and prompt
    figure = f"exit {outcome.code} after {within}, one line of {len(line)} characters"
    if not setting.quick:
        figure += f"; {setting.anew(*words).seconds:.1f} s where torch and Lightning are yet to be imported"
    return Result(held and unread, figure, {"said": line or outcome.text[-800:]})


TYPOS = {
    "trainer.max_stepz=3": "max_steps",
    "+trainer.max_stepz=3": "max_steps",
    "trainer.max_steps=many": "max_steps",
    "callback=[chekpoint]": "checkpoint",
    "optimizer=adanw": "adamw",
    "experimnt=faulty": "experiment",
    "data.batch_sise=3": "batch_size",
}


@row(
    30,
    "typing errors: a key, an added key, a type, an option, a group",
    must_hold="one line that names the nearest, exit 2, within 2 s, no run folder",
    stock="Hydra's error for the first; the added key fails deep inside",
)
def typing_errors(setting: Setting) -> Result:
    outcomes: dict[str, Outcome] = {typo: setting.train("run_id=typo", typo) for typo in TYPOS}
    right = {
        typo: one.code == 2 and len(one.errors) == 1 and TYPOS[typo] in one.errors[0] for typo, one in outcomes.items()
    }
    # This one as a user types it, with every import.
    anew = setting.anew(*setting.words("run_id=typo", next(iter(TYPOS))))
    prompt, within = in_time(max(anew.seconds, *(one.seconds for one in outcomes.values())), PROMPT)
    clean = not setting.run_of("typo").exists()
    said = {typo: one.errors or one.text[-400:] for typo, one in outcomes.items() if not right[typo]}
    figure = f"{shares(right.values())} named in one line, at most {within}, all imports included"
    return Result(all(right.values()) and anew.code == 2 and prompt and clean, figure, {"wrong": said})
