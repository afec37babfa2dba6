"""The engines that train one network on several processes: DDP and FSDP2, by Accelerate's plugins."""

import os

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DDPCommunicationHookType,
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
)
from timm.layers import convert_sync_batchnorm
from torch import nn

from cmpe_se.errors import UserError
from cmpe_se.training.config import TrainingConfig

_MIXED_PRECISION = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
SHARDED_OPTIMIZERS = ("adamw", "lamb", "lars", "lion", "nadamw", "rmsproptf", "sgd", "sgdw")
"""Those that were compared: their steps on sharded parameters are those on whole ones, but for rounding."""


def create_accelerator(config: TrainingConfig, *, cpu: bool, processes: int) -> Accelerator:
    """Accelerate for a run's settings.

    Args:
        config: of the run.
        cpu: compute on CPUs.
        processes: of the run.

    Raises:
        UserError: settings that do not go together, here or in the configuration of ``accelerate launch``.
    """
    _refuse_other_plugins(config)
    precision = _MIXED_PRECISION[config.precision]
    if _is_sharded(config, processes):
        _refuse_with_shards(config, cpu)
        # Precision is that of autocast, as without shards: gates are computed in float32.
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="NO_WRAP", cpu_ram_efficient_loading=False
        )
        accelerator = Accelerator(cpu=cpu, mixed_precision=precision, fsdp_plugin=plugin)
        os.environ.pop("ACCELERATE_USE_FSDP", None)  # Accelerate's note for later ones, which may be of another run
        plugin.mixed_precision_policy = None
        if accelerator.distributed_type == DistributedType.MULTI_CPU:  # Accelerate asks for an accelerator, PyTorch not
            accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
        return accelerator
    if config.gradient_compression == "batched_power_sgd" and cpu and processes > 1:  # PyTorch's asks CUDA to wait
        raise UserError("gradient_compression batched_power_sgd needs accelerators; on CPUs take power_sgd")
    handlers = []
    if config.freeze_epochs or config.gradient_compression:
        hook = DDPCommunicationHookType(config.gradient_compression or "no")
        # Frozen parameters get no gradient for the other processes to wait for.
        unused = bool(config.freeze_epochs)
        handlers = [DistributedDataParallelKwargs(find_unused_parameters=unused, comm_hook=hook)]
    return Accelerator(cpu=cpu, mixed_precision=precision, kwargs_handlers=handlers)


def is_sharded_run(accelerator: Accelerator) -> bool:
    """Whether the processes of a run have a part of the network each."""
    return accelerator.distributed_type == DistributedType.FSDP


def shard(network: nn.Module) -> None:
    """Share out a network that Accelerate does not know, as the moving average, in the way of the one that it does."""
    from torch.distributed.fsdp import fully_shard

    fully_shard(network)


def with_synchronised_norms(network: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The network with batch norms that see the images of all processes, in the place of those that see their own's.

    Raises:
        UserError: several processes on CPUs, for which PyTorch has no such norm.
    """
    if accelerator.num_processes == 1:
        return network
    if accelerator.device.type == "cpu":
        raise UserError(
            "sync_batchnorm needs accelerators, as PyTorch's SyncBatchNorm does; on CPUs leave --sync-batchnorm out"
        )
    return convert_sync_batchnorm(network)


def _is_sharded(config: TrainingConfig, processes: int) -> bool:
    return config.parallel == "fsdp" and processes > 1


def _refuse_other_plugins(config: TrainingConfig) -> None:
    """Settings of ``accelerate launch`` that would not be heeded, or break the loop."""
    for name, words in (("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Megatron-LM"), ("PARALLELISM_CONFIG", "a mesh")):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise UserError(
                f"Accelerate's configuration asks for {words}, and cmpe-se trains by DDP or FSDP2; choose MULTI_GPU "
                "there, and --parallel ddp or fsdp here"
            )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and config.parallel != "fsdp":
        raise UserError("Accelerate's configuration asks for FSDP; give --parallel fsdp too, or choose MULTI_GPU there")
    if (steps := os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")) != "1":
        raise UserError(
            f"Accelerate's configuration asks for {steps} gradient-accumulation steps, and those of a run are its own; "
            f"give --accumulate {steps}, and 1 there"
        )
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", _MIXED_PRECISION[config.precision]):
        word = {value: key for key, value in _MIXED_PRECISION.items()}.get(asked)
        advice = f"give --precision {word}, or choose" if word else "choose"
        raise UserError(
            f"Accelerate's configuration asks for {asked}, and the run's precision is {config.precision}; {advice} no "
            "mixed precision there"
        )


def _refuse_with_shards(config: TrainingConfig, cpu: bool) -> None:
    if cpu and torch.accelerator.is_available():
        raise UserError("parallel fsdp is for the accelerators of this machine; leave --device cpu out")
    for wrong, words in (
        (config.precision == "float16", "precision float16: take bfloat16"),
        (config.compile, "compile"),
        (config.freeze_epochs > 0, "freeze_epochs"),
        (config.sync_batchnorm, "sync_batchnorm"),
        (config.gradient_compression is not None, "gradient_compression"),
        (
            config.optimizer not in SHARDED_OPTIMIZERS,
            f"optimizer {config.optimizer}: take one of {', '.join(SHARDED_OPTIMIZERS)}",
        ),
    ):
        if wrong:
            raise UserError(f"parallel fsdp does not go with {words}; or train with --parallel ddp")
