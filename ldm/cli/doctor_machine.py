"""What `ldm doctor` finds out about one machine: device, threads, disks, environment."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ldm.cli.provenance import is_secret

# Of a disk, below which the user should know.
SLOW_MEGABYTES_PER_SECOND = 50
FEW_BYTES = 5e9
# Where two starts of one run may not see each other's lock, or where fsync is slow.
_NETWORK = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "cifs", "smb3", "fuse.sshfs", "ceph", "9p")


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Args:
        name: what was looked at.
        status: "ok", "note" or "FAILED".
        text: what was found and, unless all is well, what to do.
    """

    name: str
    status: str
    text: str


def device() -> list[Check]:
    """Processor, memory, accelerators and their driver."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    checks = [Check("cpu", "ok", f"{os.cpu_count()} cores, {memory / 1e9:.0f} GB of memory")]
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        if shutil.which("nvidia-smi"):
            return [*checks, Check("accelerator", "FAILED", f"there is a GPU that torch does not see; {built}")]
        return [*checks, Check("accelerator", "ok", f"none; {built}")]
    checks.append(Check("driver", "ok", f"{_driver()}, CUDA {torch.version.cuda}"))
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16: use precision=16-mixed"
        text = f"{found.name}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free, {found.major}.{found.minor}, {bf16}"
        busy = Check(f"cuda:{index}", "note", f"{text}; another process holds its memory")
        checks.append(busy if free < 0.8 * total else Check(f"cuda:{index}", "ok", text))
    return checks


def threads() -> list[Check]:
    """Whether threads and cores fit each other."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    allowed = _cpu_limit()
    checks = [
        Check("cores of this process", "ok", f"{cores}" + (f", of which {allowed:g} may be used" if allowed else ""))
    ]
    usable, number = min(cores, allowed or cores), torch.get_num_threads()
    told = {name: os.environ[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ}
    words = ", ".join(f"{name}={value}" for name, value in told.items())
    text = f"torch uses {number}" + (f" ({words})" if told else "")
    if number > usable + 0.5:
        return [
            *checks,
            Check("threads", "note", f"{text}, more than there are cores: set OMP_NUM_THREADS={usable:.0f}"),
        ]
    # Several processes a machine: each takes as many, unless told otherwise.
    advice = "" if told else "; with N processes on this machine set OMP_NUM_THREADS to cores / N"
    return [*checks, Check("threads", "ok", text + advice)]


def storage(folder: Path, *, megabytes: int) -> list[Check]:
    """The disk that run folders lie on, and that of temporary files."""
    there = next(place for place in (folder, *folder.parents) if place.is_dir())
    try:
        written, read = _speed(there, megabytes)
    except OSError as error:
        return [Check("disk", "FAILED", f"{there} cannot be written to ({error.strerror}): set paths.runs")]
    free, kind = shutil.disk_usage(there).free, _file_system(there)
    is_slow = written < SLOW_MEGABYTES_PER_SECOND
    advice = "; slow: checkpoint_io=background saves while training goes on" if is_slow else ""
    checks = [
        Check(
            "disk", "note" if is_slow else "ok", f"writes {written:.0f} MB/s with fsync, reads {read:.0f} MB/s{advice}"
        ),
        Check(
            "free space", "note" if free < FEW_BYTES else "ok", f"{free / 1e9:.1f} GB" + (f" on {kind}" if kind else "")
        ),
        _locks(there, kind),
    ]
    temporary = Path(tempfile.gettempdir())
    if temporary.stat().st_dev == there.stat().st_dev:
        checks.append(Check("TMPDIR", "ok", f"{temporary}, on the same file system"))
    else:
        told = "on another file system: Lightning's own checkpoints are not atomic then; ldm's never leave their folder"
        checks.append(Check("TMPDIR", "note", f"{temporary}, {told}"))
    return [*checks, *_shared_memory()]


def environment(variables: Mapping[str, str] = os.environ) -> list[Check]:
    """Variables that change results, speed or safety; values of secrets are never shown."""
    notes = {
        "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": ("FAILED", "loads whatever a checkpoint says, and runs it: unset it"),
        "CUDA_LAUNCH_BLOCKING": ("note", "makes the GPU wait for Python at each kernel: for debugging alone"),
        "NCCL_ASYNC_ERROR_HANDLING": ("note", "0 makes a rank's death a hang: leave it at 1"),
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": ("note", "0 makes a rank's death a hang: leave it at 3"),
        "PYTHONHASHSEED": ("ok", "is set; nothing in ldm depends on it"),
        "HF_HUB_OFFLINE": ("ok", "is set: nothing is fetched from the hub"),
    }
    checks = [Check(name, *notes[name]) for name in notes if variables.get(name)]
    secrets = sorted(name for name in variables if is_secret(name))
    told = f"{', '.join(secrets)}: hidden wherever ldm writes" if secrets else "none in variables"
    return [*checks, Check("credentials", "ok", told)]


def _speed(folder: Path, megabytes: int) -> tuple[float, float]:
    """(MB/s written through to the disk, MB/s read) of a file that goes again."""
    block = os.urandom(1 << 20)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".ldm-doctor-") as file:
        started = time.perf_counter()
        for _ in range(megabytes):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter() - started
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        started = time.perf_counter()
        while file.read(1 << 20):
            pass
        read = time.perf_counter() - started
    size = megabytes * (1 << 20) / 1e6
    return size / max(written, 1e-9), size / max(read, 1e-9)


def _locks(folder: Path, kind: str | None) -> Check:
    """Whether two starts of one run will see each other."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".ldm-doctor-") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            told = f"{kind or 'this file system'} has none ({error.strerror}); process ids guard run folders instead"
            return Check("file locks", "note", told)
    return Check(
        "file locks",
        "ok",
        f"work{f' on {kind}, also between machines if it is mounted so' if kind in _NETWORK else ''}",
    )


def _shared_memory() -> list[Check]:
    """What data loader workers hand batches over in."""
    place = Path("/dev/shm")
    if not place.is_dir():
        return []
    free = shutil.disk_usage(place).free
    told = f"{free / 1e9:.1f} GB free in {place}"
    if free < 1e9:
        return [
            Check("shared memory", "note", f"{told}: data.num_workers above 0 may die of it (docker: --shm-size=8g)")
        ]
    return [Check("shared memory", "ok", told)]


def _file_system(folder: Path) -> str | None:
    """The type of the file system that a folder is on, as Linux names it."""
    found, longest = None, -1
    with suppress(OSError):
        for line in Path("/proc/mounts").read_text().splitlines():
            _, point, kind, *_ = line.split()
            if folder.resolve().is_relative_to(point.replace("\\040", " ")) and len(point) > longest:
                found, longest = kind, len(point)
    return found


def _cpu_limit() -> float | None:
    """Cores' worth of time that a container may use, or None without a limit."""
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    return None


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "of unknown version"
