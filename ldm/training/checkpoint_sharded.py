"""Checkpoints that every process writes its own shard of, under the same manifest as all others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from pytorch_lightning.strategies.strategy import Strategy
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from ldm.training.checkpoint_files import (
    Damaged,
    Place,
    StorageError,
    local_path,
    put_in_place,
    seal,
    temporary_beside,
    verify,
)
from ldm.training.checkpoint_folders import check_space
from ldm.training.checkpoint_io import failure
from ldm.training.checkpoint_parts import STATE, facts_of, num_bytes, refuse_code
from ldm.training.frozen import drop_frozen, restore_frozen

# What Lightning calls the file beside the shards.
METADATA = "meta.pt"


class SealsShards(Strategy):
    """Beside a strategy that saves through torch.distributed.checkpoint: adds the manifest, and renames last.

    All processes write into a temporary folder; when all have, the first one flushes and hashes what is there, writes
    the manifest, verifies it and renames the folder. Saving is not done in the background.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Place, storage_options: Any = None) -> None:
        """Saves in shards, or gathered where the strategy is set to; to be called on every rank.

        Raises:
            StorageError: the place is not on a file system of this machine, or the disk refused.
        """
        if not self.saves_shards:
            Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)
            return
        path = local_path(self.broadcast(filepath))
        if path is None:
            raise StorageError(f"{filepath}: got a remote store, expected a shared folder: shards go there alone")
        temporary: Path = self.broadcast(temporary_beside(path))
        facts = facts_of(checkpoint)
        refuse_code({key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")})
        needed = num_bytes(checkpoint)
        if self.is_global_zero:
            check_space(path, needed + needed // 10)
        with _refused_by_the_disk(path, needed):
            super().save_checkpoint(checkpoint, temporary, storage_options)
            self.barrier("shards are written")
            if self.is_global_zero:
                seal(temporary, facts=facts)
                verify(temporary)
                put_in_place(temporary, path)
        self.barrier("shards are in place")

    @property
    def saves_shards(self) -> bool:
        """Whether each process writes what it holds."""
        if isinstance(self, DeepSpeedStrategy):
            return True
        if isinstance(self, ModelParallelStrategy):
            return self._save_distributed_checkpoint
        return bool(getattr(self, "_state_dict_type", None) == "sharded")


@contextmanager
def _refused_by_the_disk(path: Path, needed: int) -> Iterator[None]:
    """Says in one line what the disk refused, also where torch gathers the errors of all ranks."""
    try:
        yield
    except CheckpointException as found:
        error = next((one for one, _ in found.failures.values()), found)
        if not isinstance(error, OSError):
            raise
        raise failure(path, error, needed) from error
    except (OSError, Damaged) as error:
        raise failure(path, error, needed) from error


class SealedFSDP(SealsShards, FSDPStrategy):
    """Fully sharded data parallelism whose checkpoints, sharded or gathered, follow the protocol."""

    def load_checkpoint(self, checkpoint_path: Place, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads model and optimizers from a checkpoint, whichever way it was saved, and returns it.

        A sharded one must have been verified: see `checkpoint_folders.newest_valid`.
        """
        path = Path(self.broadcast(checkpoint_path))
        if not is_gathered(path):
            return {"state_dict": {}, **super().load_checkpoint(path, weights_only=weights_only)}
        checkpoint = self.checkpoint_io.load_checkpoint(path, weights_only=weights_only)
        self._load_gathered(checkpoint)
        return checkpoint

    def _load_gathered(self, checkpoint: dict[str, Any]) -> None:
        from torch.distributed.fsdp import (
            FullOptimStateDictConfig,
            FullStateDictConfig,
            OptimStateKeyType,
            StateDictType,
        )
        from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

        module = self.lightning_module
        assert self.model is not None
        assert module is not None
        # On every rank: each takes its shards out of the whole.
        whole = FullStateDictConfig(offload_to_cpu=True, rank0_only=False)
        moments = FullOptimStateDictConfig(offload_to_cpu=True, rank0_only=False)
        with FSDP.state_dict_type(self.model, StateDictType.FULL_STATE_DICT, whole, moments):
            self.model.load_state_dict(restore_frozen(module, checkpoint["state_dict"]), strict=module.strict_loading)
            for optimizer, state in zip(self.optimizers, checkpoint.get("optimizer_states", []), strict=False):
                named = FSDP.rekey_optim_state_dict(state, OptimStateKeyType.PARAM_NAME, self.model)
                optimizer.load_state_dict(FSDP.optim_state_dict_to_load(self.model, optimizer, named))

    def _configure_launcher(self) -> None:
        # Lightning refuses its own class on a CPU, and so before it starts processes.
        if self.root_device.type == "cpu":
            raise ValueError("strategy: got fsdp on a CPU, expected GPUs; set strategy=ddp or trainer.accelerator=gpu")
        super()._configure_launcher()


class SealedFSDP2(SealsShards, ModelParallelStrategy):
    """FSDP's second version over all processes, whose checkpoints, sharded or gathered, follow the protocol."""

    def setup_environment(self) -> None:
        """Lets every process hold a part."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def setup(self, trainer: pl.Trainer) -> None:
        """Raises ValueError for a module that does not spread its parts."""
        if not is_overridden("configure_model", self.lightning_module):
            raise ValueError(
                f"strategy: got fsdp2 with {type(self.lightning_module).__name__}, expected a module that spreads its "
                "parts, such as LatentDiffusionModule; set strategy=ddp"
            )
        super().setup(trainer)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of an optimizer: this rank's part by name, or gathered on rank 0 by number as without sharding."""
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        whole = not self._save_distributed_checkpoint
        options = StateDictOptions(full_state_dict=whole, cpu_offload=True)
        assert self.model is not None
        state: dict[str, Any] = get_optimizer_state_dict(self.model, optimizer, options=options)
        if not whole or not self.is_global_zero:
            return state
        numbers = {name: number for number, name in enumerate(self._names(optimizer))}
        return {
            "state": {numbers[name]: values for name, values in state["state"].items()},
            "param_groups": [
                {**group, "params": [numbers[name] for name in group["params"]]} for group in state["param_groups"]
            ],
        }

    def load_checkpoint(self, checkpoint_path: Place, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads model and optimizers from a checkpoint, whichever way it was saved, and returns it.

        A sharded one must have been verified: see `checkpoint_folders.newest_valid`.
        """
        path = Path(self.broadcast(checkpoint_path))
        if is_gathered(path):
            checkpoint = self.checkpoint_io.load_checkpoint(path, weights_only=weights_only)
            self._load_gathered(checkpoint)
            return checkpoint
        self._load_shards(path)
        # The tensors are where they belong; what reads a checkpoint after this expects the key.
        return {"state_dict": {}, **torch.load(path / METADATA, map_location="cpu", weights_only=True)}

    def _load_gathered(self, checkpoint: dict[str, Any]) -> None:
        module, whole = self.lightning_module, StateDictOptions(full_state_dict=True)
        assert module is not None
        state: dict[str, Any] = restore_frozen(module, checkpoint["state_dict"])
        set_model_state_dict(module, state, options=whole)
        for optimizer, saved in zip(self.optimizers, checkpoint.get("optimizer_states", []), strict=True):
            names = self._names(optimizer)
            named: dict[str, Any] = {
                "state": {names[number]: values for number, values in saved["state"].items()},
                "param_groups": [
                    {**group, "params": [names[number] for number in group["params"]]}
                    for group in saved["param_groups"]
                ],
            }
            set_optimizer_state_dict(module, optimizer, named, options=whole)

    def _load_shards(self, path: Path) -> None:
        module = self.lightning_module
        assert module is not None
        own: dict[str, Any] = get_model_state_dict(module)
        states: dict[str, Any] = {"state_dict": drop_frozen(module, own)}
        for number, optimizer in enumerate(self.optimizers):
            states[f"optimizer_{number}"] = get_optimizer_state_dict(module, optimizer)
        distributed_checkpoint.load(states, checkpoint_id=path)
        set_model_state_dict(module, states["state_dict"], options=StateDictOptions(strict=False))
        for number, optimizer in enumerate(self.optimizers):
            set_optimizer_state_dict(module, optimizer, states[f"optimizer_{number}"])

    def _names(self, optimizer: Optimizer) -> list[str]:
        """Names of an optimizer's parameters, in its own order."""
        assert self.lightning_module is not None
        names = {id(parameter): name for name, parameter in self.lightning_module.named_parameters()}
        return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


class SealedDeepSpeed(SealsShards, DeepSpeedStrategy):
    """DeepSpeed on GPUs, whose checkpoints, in its own format, follow the protocol; only DeepSpeed reads them."""

    def setup_environment(self) -> None:
        """Raises ValueError on a CPU."""
        if self.root_device.type == "cpu":
            raise ValueError(
                "strategy: got deepspeed on a CPU, expected GPUs; set strategy=fsdp2 or trainer.accelerator=gpu"
            )
        super().setup_environment()

    def load_checkpoint(self, checkpoint_path: Place, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads model and optimizer from a checkpoint that DeepSpeed saved."""
        return {"state_dict": {}, **super().load_checkpoint(checkpoint_path, weights_only=weights_only)}


def is_gathered(path: Path) -> bool:
    """Whether a checkpoint holds whole tensors, not the shards of some ranks."""
    return (path / STATE).is_file() or bool(list(path.glob("state.*.pt")))
