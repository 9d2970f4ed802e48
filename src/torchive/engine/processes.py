"""One process or several: Accelerate knows which, from ``torchrun`` or ``accelerate launch``."""

from __future__ import annotations

import atexit
from typing import Any

import torch
from torch import nn

from torchive.engine.recipe import Recipe, RecipeError


def start_processes(recipe: Recipe, *, unused: bool = False) -> Any:
    """The ``Accelerator`` of a run; ``unused`` where a step leaves out some parameters.

    Raises:
        RecipeError: the precision is not to be had here, or the batch cannot be shared evenly.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedDataParallelKwargs

    AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
    cpu = recipe.train.cpu or not torch.cuda.is_available()
    try:
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=recipe.train.precision,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused)],
        )
    except ValueError as error:
        raise RecipeError(f"train.precision={recipe.train.precision}: {error}") from error
    if recipe.train.precision == "fp16" and accelerator.device.type == "cpu":
        raise RecipeError("train.precision=fp16 needs a GPU; bf16 also works on a CPU")
    if recipe.data.batch_size % accelerator.num_processes:
        raise RecipeError(
            f"data.batch_size {recipe.data.batch_size} cannot be shared evenly by {accelerator.num_processes} processes"
        )
    if accelerator.num_processes > 1:
        atexit.unregister(_leave)
        atexit.register(_leave)
    return accelerator


def _leave() -> None:
    """Leave the group in order: a process that ends within it may abort as its threads are torn down."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def share_buffers(model: nn.Module) -> None:
    """Give all processes the buffers of the first."""
    for buffer in model.buffers():
        torch.distributed.broadcast(buffer, 0)


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process."""
    value = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX)
    return bool(value)


def placed(model: nn.Module, device: torch.device | str, *, channels_last: bool) -> nn.Module:
    """The model moved to a device, in place; 4-D weights in channels-last layout if asked for."""
    model.to(device)
    if channels_last:
        for parameter in model.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model
