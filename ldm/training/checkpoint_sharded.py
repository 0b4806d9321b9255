"""Checkpoints that every process writes its own shard of, under the same manifest as all others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pytorch_lightning.strategies import FSDPStrategy, ModelParallelStrategy
from pytorch_lightning.strategies.strategy import Strategy

from ldm.training.checkpoint_files import (
    Place,
    StorageError,
    local_path,
    put_in_place,
    seal,
    temporary_beside,
    verify,
)
from ldm.training.checkpoint_parts import STATE, facts_of, refuse_code
from ldm.training.frozen import restore_frozen


class SealsShards(Strategy):
    """Beside a strategy that saves through torch.distributed.checkpoint: adds the manifest, and renames last.

    All processes write into a temporary folder; when all have, the first one flushes and hashes what is there, writes
    the manifest, verifies it and renames the folder. Saving is not done in the background.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Place, storage_options: Any = None) -> None:
        """Saves in shards, or gathered where the strategy is set to; to be called on every rank.

        Raises:
            StorageError: the place is not on a file system of this machine.
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
        if isinstance(self, ModelParallelStrategy):
            return self._save_distributed_checkpoint
        return bool(getattr(self, "_state_dict_type", None) == "sharded")


class SealedFSDP(SealsShards, FSDPStrategy):
    """Fully sharded data parallelism whose checkpoints, sharded or gathered, follow the protocol."""

    def load_checkpoint(self, checkpoint_path: Place, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads model and optimizers from a checkpoint, whichever way it was saved, and returns it.

        A sharded one must have been verified: see `checkpoint_folders.newest_valid`.
        """
        path = Path(self.broadcast(checkpoint_path))
        if not (path / STATE).is_file() and not list(path.glob("state.*.pt")):
            return super().load_checkpoint(path, weights_only=weights_only)
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
