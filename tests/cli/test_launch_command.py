"""`ldm launch`: what each launcher's file says, that it starts what it says, and what is refused before."""

import ast
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_helpers import CONFIG_DIR, environment, only, read_json
from torch.distributed.run import parse_args

CPU = ["experiment=toy", "trainer.accelerator=cpu", "trainer.max_steps=3"]
# Fields of a SkyPilot task that it knows and their types (docs.skypilot.co, reference/yaml-spec), as far as ours goes.
SKYPILOT = {
    "name": str,
    "workdir": str,
    "num_nodes": int,
    "setup": str,
    "run": str,
    "file_mounts": {"/mnt/runs": {"source": str, "mode": str}},
    "resources": {
        "infra": str,
        "accelerators": str,
        "image_id": str,
        "use_spot": bool,
        "disk_size": int,
        "job_recovery": {"max_restarts_on_errors": int},
    },
}
# Of a TrainJob (kubeflow/trainer, pkg/apis/trainer/v1alpha1/trainjob_types.go, from 2.2 on).
POD = {
    "terminationGracePeriodSeconds": int,
    "volumes": [{"name": str, "persistentVolumeClaim": {"claimName": str}}],
    "containers": [{"name": str, "volumeMounts": [{"name": str, "mountPath": str}]}],
}
JOBS = [{"name": str, "template": {"spec": {"template": {"spec": POD}}}}]
KUBEFLOW = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str, "namespace": str},
    "spec": {
        "runtimeRef": {"name": str},
        "trainer": {
            "image": str,
            "numNodes": int,
            "numProcPerNode": int,
            "command": [str],
            "args": [str],
            "resourcesPerNode": {
                "limits": {"cpu": int, "memory": str, "nvidia.com/gpu": int},
                "requests": {"cpu": int, "memory": str},
            },
        },
        "runtimePatches": [
            {"manager": str, "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": JOBS}}}},
        ],
    },
}


@pytest.fixture
def launch(ldm: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Composes a file in this process and returns it as it is printed."""

    def run(*overrides: str) -> str:
        assert ldm("launch", *overrides) == 0
        return capsys.readouterr().out

    return run


def machine(folder: Path) -> dict[str, str]:
    """Variables of a machine on which `python` is this one and the stand-ins of `folder` come first."""
    places = [str(folder), str(Path(sys.executable).parent), os.environ["PATH"]]
    return {**environment(), "PATH": os.pathsep.join(places)}


def directives(text: str) -> dict[str, str]:
    """What a script asks of sbatch."""
    asked = [line.removeprefix("#SBATCH --").partition("=") for line in text.splitlines() if line.startswith("#SBATCH")]
    return {name: value for name, _, value in asked}


def training(text: str) -> list[str]:
    """The words behind `ldm.cli.main` of the line that starts it."""
    (line,) = [line for line in text.splitlines() if "-m ldm.cli.main " in line]
    return shlex.split(line.partition("-m ldm.cli.main ")[2])


def fits(node: Any, fields: Any) -> None:
    """Fails where a document has a field that is unknown, or of another type."""
    if isinstance(fields, dict):
        assert isinstance(node, dict)
        assert set(node) <= set(fields)
        for key, value in node.items():
            fits(value, fields[key])
    elif isinstance(fields, list):
        assert isinstance(node, list)
        for value in node:
            fits(value, fields[0])
    else:
        assert type(node) is fields


def test_slurm_gets_what_was_asked_and_the_trainer_what_follows(launch: Callable[..., str], folder: Path) -> None:
    training_settings = ["experiment=toy", "trainer.accelerator=auto"]
    text = launch("launch=slurm", "nodes=4", "gpus_per_node=8", "time=12:00:00", "partition=gpu", *training_settings)
    asked = directives(text)
    assert asked.pop("job-name").startswith("toy-")
    assert asked == {
        "nodes": "4",
        "ntasks-per-node": "8",
        "gpus-per-node": "8",
        "time": "12:00:00",
        "partition": "gpu",
        "chdir": str(folder),
        "output": "slurm-%x-%j.out",
        "open-mode": "append",
        "requeue": "",
        "signal": "USR1@120",
    }
    follows = ["trainer.devices=8", "trainer.num_nodes=4", "trainer.accelerator=gpu", "strategy=ddp"]
    assert training(text) == ["train", *CONFIG_DIR, *training_settings, *follows]
    assert "null" not in text
    assert "None" not in text
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_what_no_gpu_does_is_asked_of_none(launch: Callable[..., str]) -> None:
    assert "gpus-per-node" not in directives(launch("launch=slurm", "gpus_per_node=2", *CPU))
    assert "accelerators" not in yaml.safe_load(launch("launch=skypilot", *CPU))["resources"]
    assert "resourcesPerNode" not in yaml.safe_load(launch("launch=kubeflow", "image=mine", *CPU))["spec"]["trainer"]


@pytest.mark.parametrize(("launcher", "key"), [("skypilot", "bucket"), ("kubeflow", "claim")])
def test_it_is_said_where_a_run_would_go_with_its_machines(
    ldm: Callable[..., int], capsys: pytest.CaptureFixture[str], launcher: str, key: str
) -> None:
    words = [f"launch={launcher}", *(["image=mine"] if launcher == "kubeflow" else [])]
    assert ldm("launch", *words) == 0
    assert f"{key}: got none, so that the run goes with its machines" in capsys.readouterr().err
    assert ldm("launch", *words, f"{key}=mine") == 0
    assert "goes with its machines" not in capsys.readouterr().err


def test_machines_of_a_cloud_install_what_goes_along(launch: Callable[..., str]) -> None:
    document = yaml.safe_load(launch("launch=skypilot"))
    # Nobody published the name `ldm`: an index would give somebody else's package, or none.
    assert (document["workdir"], document["setup"]) == (".", "pip install .")


def test_a_share_that_a_gpu_cannot_hold_goes_through_in_pieces_of_the_same_steps(launch: Callable[..., str]) -> None:
    words = training(launch("launch=slurm", "gpus_per_node=4", "max_batch_per_gpu=3", "trainer.val_check_interval=100"))
    # 32 samples a step: 8 for each of 4 processes, 2 at once.
    pieces = ["data.batch_size=8", "trainer.accumulate_grad_batches=4", "trainer.val_check_interval=400"]
    assert [word for word in words if word in pieces] == pieces


def test_a_file_is_written_and_said_how_to_submit(
    ldm: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["launch=slurm", "image=repo/ldm:1", "setup=module load cuda; x='a b'", "+extra.note='${name} b'"]
    assert ldm("launch", *words, "out=jobs/mine.sbatch") == 0
    text = (folder / "jobs" / "mine.sbatch").read_text()
    assert "\nmodule load cuda; x='a b'\n" in text
    assert "--container-image=repo/ldm:1" in text
    # What the training's config resolves is left to it.
    assert "+extra.note='${name} b'" in training(text)
    said = capsys.readouterr()
    assert said.out == "wrote jobs/mine.sbatch\n"
    assert said.err.endswith("submit it:  sbatch jobs/mine.sbatch\n")
    assert "not finished yet: ldm shard dataset=digits" in said.err
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["launch=slurm", "optimzer.lr=1"], "optimzer.lr: there is no such setting; did you mean optimizer.lr?"),
        (["launch=slurm", "partion=a"], "partion: there is no such setting; did you mean partition?"),
        (["launch=slrm"], "launch=slrm: there is no such option; did you mean slurm?"),
        (["launch=torchrun", "time=3"], "time: there is no such setting"),
        (["launch=kubeflow"], "image has no value; set it with image=..."),
        (["launch=kubeflow", "image=a", "setup=b"], "setup: launch=kubeflow has no place for it; leave it out"),
        (["launch=python", "nodes=2"], "nodes: got 2, expected 1 for this launcher; choose launch=slurm, "),
        (["launch=slurm", "nodes=0"], "nodes: got 0, expected a whole number from 1 on"),
        (["launch=slurm", "trainer.devices=3"], "trainer.devices=3: this follows from nodes and gpus_per_node"),
        (["launch=slurm", "experiment=digits_latents"], "model: experiment digits_latents sets none"),
        (
            ["launch=slurm", "nodes=3", "gpus_per_node=5"],
            "data.batch_size: got 32 for 15 processes, expected a multiple of 15, because it counts the samples of all "
            "of them together; the nearest: data.batch_size=30 or data.batch_size=45",
        ),
        (
            ["launch=slurm", "experiment=digits_autoencoder", "gpus_per_node=4", "max_batch_per_gpu=3"],
            "max_batch_per_gpu: got 3 for an autoencoder, whose steps are of whole batches, expected at least 4",
        ),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_written(
    ldm: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    assert ldm("launch", "out=file", *words) == 2
    assert capsys.readouterr().err.startswith(f"error: {line}")
    assert list(folder.iterdir()) == []


def test_a_task_of_skypilot_has_fields_that_it_knows_and_starts_torchrun_on_each_node(
    launch: Callable[..., str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["infra=aws", "image=docker:ldm", "disk_size=500", "use_spot=true", "bucket=s3://mine/runs"]
    settings += ["experiment=toy", "trainer.accelerator=gpu"]
    document = yaml.safe_load(launch("launch=skypilot", "nodes=2", "gpus_per_node=8", *settings))
    fits(document, SKYPILOT)
    assert document["resources"]["accelerators"] == "H100:8"
    assert document["num_nodes"] == 2
    (folder / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@" > words\n')
    (folder / "python").chmod(0o755)
    # What SkyPilot tells the second of two machines.
    told = {"NODE_IPS": "10.0.0.1\n10.0.0.2", "NUM_NODES": "2", "NODE_RANK": "1", "NUM_GPUS_PER_NODE": "8"}
    variables = {f"SKYPILOT_{name}": value for name, value in told.items()}
    subprocess.run(["bash", "-c", document["run"]], env={**machine(folder), **variables}, check=True)
    started = (folder / "words").read_text().splitlines()
    assert started[:2] == ["-m", "torch.distributed.run"]
    place = parse_args(started[2:])
    assert (place.nnodes, place.nproc_per_node, place.node_rank) == ("2", "8", 1)
    assert (place.master_addr, place.training_script) == ("10.0.0.1", "ldm.cli.main")
    assert "paths.runs=/mnt/runs" in place.training_script_args


def test_a_trainjob_has_fields_that_kubeflow_knows_and_its_torchrun_takes_its_place_from_the_runtime(
    launch: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["image=repo/ldm:1", "claim=runs", "cpu=64", "mem=512Gi", "namespace=ours"]
    settings += ["experiment=toy", "trainer.accelerator=gpu"]
    document = yaml.safe_load(launch("launch=kubeflow", "nodes=2", "gpus_per_node=8", *settings))
    fits(document, KUBEFLOW)
    assert (document["apiVersion"], document["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    trainer = document["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 8)
    assert trainer["resourcesPerNode"]["limits"] == {"cpu": 64, "memory": "512Gi", "nvidia.com/gpu": 8}
    # What the runtime tells the second of two pods.
    told = {"NNODES": "2", "NPROC_PER_NODE": "8", "NODE_RANK": "1", "MASTER_ADDR": "first", "MASTER_PORT": "29400"}
    for name, value in told.items():
        monkeypatch.setenv(f"PET_{name}", value)
    assert trainer["command"][:3] == ["python", "-m", "torch.distributed.run"]
    place = parse_args([*trainer["command"][3:], *trainer["args"]])
    assert (place.nnodes, place.nproc_per_node, place.node_rank) == ("2", "8", 1)
    assert (place.master_addr, place.master_port, place.training_script) == ("first", 29400, "ldm.cli.main")
    assert place.training_script_args[0] == "train"


def words_of_ray(text: str) -> list[str]:
    """The training's words in the program that Ray runs."""
    nodes = {node.targets[0].id: node.value for node in ast.parse(text).body if isinstance(node, ast.Assign)}
    command = nodes["COMMAND"]
    assert isinstance(command, ast.List) and isinstance(command.elts[-1], ast.Starred)
    return list(ast.literal_eval(command.elts[-1].value))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["launch=python"], training),
        (["launch=kubeflow", "image=ours"], lambda text: yaml.safe_load(text)["spec"]["trainer"]["args"]),
        (["launch=ray"], words_of_ray),
    ],
    ids=["shell", "yaml", "python"],
)
def test_every_sign_of_an_override_reaches_the_training_as_it_was_typed(
    launch: Callable[..., str], settings: list[str], words: Callable[[str], list[str]]
) -> None:
    typed = [
        *("data.size=${oc.env:SIZE,8}", "+extra.note=\"a, 'b' = `c` $HOME\"", "+extra.own={x: 1, y: [2, 3]}"),
        *(r"+extra.escaped=\${seed}", r'+extra.twice="\\${seed}"', r"+extra.path=C:\runs"),
    ]
    found = words(launch(*settings, "experiment=toy", *typed))
    assert [word for word in found if word in typed] == typed


@pytest.mark.slow
def test_plain_python_trains(launch: Callable[..., str], folder: Path) -> None:
    (folder / "train.sh").write_text(launch("launch=python", *CPU))
    subprocess.run(["bash", "train.sh"], env=machine(folder), check=True, timeout=120)
    assert read_json(only(folder, "runs/toy/*/result.json"))["name"] == "toy"


@pytest.mark.slow
def test_torchrun_starts_one_machine(launch: Callable[..., str], folder: Path) -> None:
    (folder / "train.sh").write_text(launch("launch=torchrun", "gpus_per_node=2", *CPU))
    subprocess.run(["bash", "train.sh"], env=machine(folder), check=True, timeout=120)
    assert only(folder, "runs/toy/*/result.json").is_file()


@pytest.mark.slow
def test_torchrun_on_each_of_two_machines_makes_one_group(launch: Callable[..., str], folder: Path) -> None:
    with_port = ["launch=torchrun_nodes", "nodes=2", f"port={free_port()}"]
    (folder / "train.sh").write_text(launch(*with_port, *CPU))
    variables = {**machine(folder), "HEAD": "localhost"}
    both = [subprocess.Popen(["bash", "train.sh"], env=variables) for _ in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    # Alone, each would have trained a run of its own or been refused the other's folder.
    assert len(only(folder, "runs/toy/*/command.txt").read_text().splitlines()) == 1
    assert only(folder, "runs/toy/*/result.json").is_file()


SBATCH = """#!/usr/bin/env python3
# Runs a script as SLURM would: again when it was requeued.
import os, re, subprocess, sys
asked = dict(re.findall(r"^#SBATCH --([\\w-]+)=?(.*)$", open(sys.argv[1]).read(), re.M))
nodes, tasks = int(asked["nodes"]), int(asked["ntasks-per-node"])
job = {"JOB_ID": "4711", "JOB_NAME": asked["job-name"], "NNODES": nodes, "NTASKS": nodes * tasks,
       "NTASKS_PER_NODE": tasks, "JOB_NODELIST": "localhost", "NODELIST": "localhost"}
for restart in range(3):
    told = {f"SLURM_{name}": str(value) for name, value in {**job, "RESTART_COUNT": restart}.items()}
    code = subprocess.run(["bash", sys.argv[1]], env={**os.environ, **told}, cwd=asked["chdir"]).returncode
    with open("codes", "a") as file:
        file.write(f"{code}\\n")
    if not os.path.exists("requeued"):
        sys.exit(code)
    os.remove("requeued")
"""
SRUN = """#!/usr/bin/env python3
# Starts the tasks of a job on this machine; the worst code is its own.
import os, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
tasks = [
    subprocess.Popen(words, env={**os.environ, "SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NODEID": "0"})
    for rank in map(str, range(int(os.environ["SLURM_NTASKS"])))
]
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/bin/sh
case "$1 $2" in
  "show hostnames") echo localhost;;
  "show job") echo "JobId=4711 Requeue=1";;
  "requeue 4711") touch requeued;;
  *) exit 1;;
esac
"""


@pytest.mark.slow
def test_a_job_of_slurm_is_signalled_saves_is_requeued_and_goes_on(launch: Callable[..., str], folder: Path) -> None:
    """Both tasks get USR1 at step 3, as at the end of the time; they agree to stop within ten steps."""
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    signalled = ["model.kill_at=3", "model.signal_number=10", "callback=[checkpoint,preemption]"]
    words = ["launch=slurm", "gpus_per_node=2", "experiment=toy", "trainer.accelerator=cpu", *signalled]
    (folder / "train.sbatch").write_text(launch(*words, "setup=export LDM_NOTE=here"))
    done = subprocess.run(["sbatch", "train.sbatch"], env=machine(folder), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert (folder / "codes").read_text().split() == ["143", "0"]
    assert "stopped by SIGUSR1, and back in the queue; saved" in done.stdout
    assert "going on from runs/toy/" in done.stdout
    assert only(folder, "runs/toy/*/result.json").is_file()
    steps = [line.split(",")[0] for line in only(folder, "runs/toy/*/metrics.csv").read_text().splitlines()[1:]]
    assert len(steps) == len(set(steps))


@pytest.mark.slow
def test_ray_train_gives_two_workers_their_places(launch: Callable[..., str], folder: Path) -> None:
    pytest.importorskip("ray")
    (folder / "train_ray.py").write_text(launch("launch=ray", "gpus_per_node=2", "address=null", *CPU))
    variables = {**machine(folder), "RAY_USAGE_STATS_ENABLED": "0"}
    subprocess.run([sys.executable, "train_ray.py"], env=variables, check=True, timeout=240)
    assert only(folder, "runs/toy/*/result.json").is_file()
    assert len(only(folder, "runs/toy/*/command.txt").read_text().splitlines()) == 1


def free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])
