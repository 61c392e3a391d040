"""Several processes training one model: ``torchrun`` starts them, DDP keeps their weights equal.

Every function here also works, and does nothing special, in an ordinary single process.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nasdet.measure.machine import parse_device


def active() -> bool:
    """Whether a process group stands."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number, 0 when alone."""
    return dist.get_rank() if active() else 0


def world_size() -> int:
    """How many processes train together, 1 when alone."""
    return dist.get_world_size() if active() else 1


def is_main() -> bool:
    """Whether this process writes the run's files and shows its progress: rank 0, also before the group stands."""
    return (rank() if active() or not launched() else int(os.environ["RANK"])) == 0


def launched() -> bool:
    """Whether ``torchrun`` (or another launcher that sets ``RANK`` and ``WORLD_SIZE``) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def local_device(device: str | torch.device | None = None) -> torch.device:
    """The device of this process: ``device`` when given, else ``cuda:LOCAL_RANK`` when there is a GPU, else the CPU.

    A GPU is made torch's current one, whose generator checkpoints hold. ``ValueError`` for a device that is not there.
    """
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device is None:
        here = torch.cuda.is_available()
        chosen = torch.device("cuda", local % torch.cuda.device_count()) if here else torch.device("cpu")
    else:
        chosen = parse_device(device)
        if chosen.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device must be one that is here, got {chosen} but torch finds no GPU")
        if chosen.type == "cuda" and chosen.index is None:
            chosen = torch.device("cuda", local)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    return chosen


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the group that ``torchrun`` announces (nccl on GPU, gloo on CPU) for the time of the block.

    Does nothing when no launcher started this process, or when the group already stands.
    """
    if not launched() or active():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device, **_meeting_place())
    else:
        dist.init_process_group("gloo", **_meeting_place())
    try:
        yield
        dist.barrier()  # gloo aborts a process whose peer is gone while it takes its leave
    except BaseException:
        if device.type != "cuda":  # nccl would wait for others who wait for this process: its end is what ends them
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _meeting_place() -> dict[str, Any]:
    """Where processes that ``torchrun`` started again find each other: its store has the addresses of those before.

    On one machine, whose processes are all restarted as often; those of several may not be.
    """
    if not restarted() or os.environ.get("LOCAL_WORLD_SIZE") != os.environ["WORLD_SIZE"]:
        return {}
    store, place, size = next(dist.rendezvous("env://"))
    own = dist.PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    return {"store": own, "rank": place, "world_size": size}


def restarted() -> bool:
    """Whether ``torchrun --max-restarts`` has started this process again: it then goes on where the last one was."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def barrier() -> None:
    """Wait for the other processes."""
    if active():
        dist.barrier()


def gather_objects(value: Any) -> list[Any]:
    """``value`` of every process, in rank order, on every process (plain Python data of our own ranks)."""
    if not active():
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def mean_over_ranks(values: Mapping[str, float]) -> dict[str, float]:
    """The mean of each named value over the processes that have it."""
    columns: dict[str, list[float]] = {}
    for row in gather_objects(dict(values)):
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    return {name: sum(column) / len(column) for name, column in columns.items()}


class LossModule(nn.Module):
    """A detector whose ``forward`` returns its loss terms, which is what DDP must see to average gradients.

    ``forward(images, targets) -> dict[str, Tensor]`` is ``model.loss(model(images), targets)``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, targets: list[dict[str, Any]]) -> dict[str, Tensor]:
        return self.model.loss(self.model(images), targets)  # type: ignore[operator]  # a detector's method, not a tensor


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace every gradient by its mean over the processes, in one message for each dtype.

    For models of sampled paths, in the place of DDP, which also sends zeros for all that is on no path. The same
    parameters must have gradients in all processes; a gradient of None stays None.
    """
    if not active():
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in by_dtype.values():
        message = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(message)
        message /= world_size()
        for gradient, mean in zip(gradients, message.split([one.numel() for one in gradients]), strict=True):
            gradient.copy_(mean.view(gradient.shape))


def share_state(model: nn.Module) -> None:
    """Give every process the parameters and buffers of process 0."""
    if active():
        for value in model.state_dict().values():
            dist.broadcast(value, 0)


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """``LossModule(model)``, inside DDP when several processes train.

    SyncBN comes from ``sync_batch_norm``, called *before* this. Every parameter must get a gradient in every step: see
    ``average_gradients`` for models of which parts run.
    """
    module = LossModule(model)
    if not active():
        return module
    if device.type == "cpu" and any(isinstance(part, nn.SyncBatchNorm) for part in model.modules()):
        raise ValueError("norm must not be sync_bn for several processes on CPUs, which have none: use bn or gn")
    return DistributedDataParallel(module, device_ids=[device.index] if device.type == "cuda" else None)


def sync_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """``model`` with every BatchNorm as SyncBatchNorm when several GPUs train; unchanged otherwise (CPU has none)."""
    if active() and device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model
