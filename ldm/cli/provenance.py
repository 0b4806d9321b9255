"""What a run folder records of where a run came from, and what it must not record."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ldm

PACKAGES = (
    "ldm",
    "torch",
    "pytorch-lightning",
    "hydra-core",
    "omegaconf",
    "webdataset",
    "torchmetrics",
    "tokenizers",
    "open_clip_torch",
    "einops",
    "safetensors",
    "numpy",
    "scikit-learn",
    "pillow",
    "wandb",
)
REDACTED = "<redacted>"
# Names as in WANDB_API_KEY, and the settings that carry a credential: not `caption_key`, not `pad_token`.
_SECRET = re.compile(
    r"[A-Z0-9_]*(?:KEY|TOKEN|SECRET|PASSWORD)[A-Z0-9_]*"
    r"|\w*(?:password|passwd|secret)\w*|(?:\w+_)?(?:api|access|private)_?key|(?:\w+_)?(?:api|access|auth|hf)_?token"
)

# user:password@ of an address, and the parameters that sign one.
_IN_URL = re.compile(
    r"(?<=://)[^/\s@]+(?=@)|(?<=[?&])((?:x-amz-|x-goog-)?(?:signature|credential|security-token)|sig|token|\w*key)=[^&\s]+",
    re.I,
)


def is_secret(name: str) -> bool:
    """Whether a setting or variable of this name holds a credential."""
    return _SECRET.fullmatch(name) is not None


def redact(node: Any) -> Any:
    """A copy of a nested config whose credentials are hidden, wherever they stand."""
    if isinstance(node, dict):
        return {key: REDACTED if value and is_secret(str(key)) else redact(value) for key, value in node.items()}
    if isinstance(node, list):
        return [redact(item) for item in node]
    return hide_values(node) if isinstance(node, str) else node


def redact_override(override: str) -> str:
    """A command-line word with its value hidden if it is a credential."""
    key, equals, _ = override.partition("=")
    secret = equals and is_secret(key.lstrip("+").rpartition(".")[2])
    return f"{key}={REDACTED}" if secret else hide_values(override)


def environment() -> dict[str, Any]:
    """Versions, git revision and device, for environment.json."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "git": _git(),
        "device": _device(),
    }


def hide_values(text: str) -> str:
    """Hides the values of this process's credential variables inside a text, and credentials inside addresses."""
    for name, value in os.environ.items():
        if len(value) >= 8 and is_secret(name):
            text = text.replace(value, REDACTED)
    if "://" not in text:
        return text
    return _IN_URL.sub(lambda found: f"{found[1]}={REDACTED}" if found[1] else REDACTED, text)


def _version(package: str) -> str | None:
    if package == "ldm":
        return ldm.__version__
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Revision of the source checkout, or of the current folder where the package is installed."""
    checkout = Path(ldm.__file__).resolve().parent.parent
    folder = checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()
    try:
        revision = _run_git(folder, "rev-parse", "HEAD")
        return {"revision": revision, "changed": bool(_run_git(folder, "status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _run_git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def _device() -> dict[str, Any]:
    """The processor and, once torch is loaded, the accelerators."""
    device: dict[str, Any] = {"cpu": platform.processor() or platform.machine(), "cpu_count": os.cpu_count()}
    torch = sys.modules.get("torch")
    if torch is not None:
        device["threads"] = torch.get_num_threads()
        device["cuda"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return device
