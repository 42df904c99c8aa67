"""The processes that share one run: `torch.distributed` as torchrun starts it, or a single process.

Every process runs the same code on its own batches. What they tell each other is listed here, and nothing else of the
project knows `torch.distributed`. Sums are added in the order of the ranks, so that the same number of processes always
gives the same bytes.
"""

import contextlib
import datetime
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map_only

from llmprune import torchrun
from llmprune.devices import is_shortage
from llmprune.errors import DeviceError, PeerError
from llmprune.heartbeat import Heartbeat, meet

T = TypeVar("T")

# Of a tensor that travels at once: what the owner of a sum needs in addition to it.
_SLAB_BYTES = 64 << 20

# Into how many slabs a triangle is cut at least: the more, the less of the other triangle goes with it.
_STEPS = 8

# A process may wait for others that solve, or that read a large checkpoint. One that has died closes its connections.
TIMEOUT = datetime.timedelta(days=2)

# How long machines wait for each other in the beginning.
_MEETING = datetime.timedelta(minutes=10)

_heartbeat: Heartbeat | None = None


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those of a run.

    Attributes:
        rank: its number, from 0; the first one writes, and shows progress.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def own(self, numbers: Sequence[int]) -> list[int]:
        """This process's share of some numbers: every `size`-th."""
        return list(numbers[self.rank :: self.size])

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in order; each gets them, with tensors on the CPU."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _talking():
            dist.all_gather_object(values, _portable(value))
        return values

    def gather_at(self, owner: int, value: T) -> list[T]:
        """The values of all processes, in order; only the owner gets them, with tensors on the CPU, the others none."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.rank == owner else None
        with _talking():
            dist.gather_object(_portable(value), values, dst=owner)
        return values or []

    def share(self, value: T | None) -> T:
        """The first process's value; each gets it, with tensors on the CPU."""
        if self.size == 1:
            return cast(T, value)
        box = [_portable(value) if self.first else None]
        with _talking():
            dist.broadcast_object_list(box, src=0)
        return cast(T, box[0])

    def once(self, action: Callable[[], T]) -> T:
        """What an action returns that only the first process carries out."""
        return self.share(action() if self.first else None)

    def send(self, tensor: Tensor, owner: int) -> None:
        """Replace a contiguous tensor by the owner's."""
        if self.size > 1:
            with _talking():
                dist.broadcast(tensor, src=owner)

    def sum_at(self, owner: int, tensor: Tensor, *, lower: bool = False) -> None:
        """Replace the owner's tensor by the sum over all processes, in the order of the ranks.

        Args:
            owner: number of the process that gets it; the others keep what they have.
            tensor: of the same shape and dtype everywhere, contiguous.
            lower: only the lower triangle of a square matrix counts.
        """
        if self.size == 1:
            return
        rows = tensor.view(len(tensor), -1) if tensor.dim() > 1 else tensor.view(-1, 1)
        step = max(1, _SLAB_BYTES // max(rows[:1].nbytes, 1))
        if lower:
            step = min(step, -(-len(rows) // _STEPS))
        with _talking():
            for start in range(0, len(rows), step):
                slab = rows[start : start + step]
                self._sum_slab(owner, slab[:, : min(start + step, rows.shape[1])] if lower else slab)

    def total(self, tensor: Tensor) -> None:
        """Replace a contiguous tensor by the sum over all processes; each gets it."""
        self.sum_at(0, tensor)
        self.send(tensor, 0)

    def _sum_slab(self, owner: int, slab: Tensor) -> None:
        if self.rank != owner:
            dist.send(slab.contiguous(), dst=owner)
            return
        added, received = torch.zeros_like(slab), torch.empty_like(slab, memory_format=torch.contiguous_format)
        for rank in range(self.size):
            if rank == owner:
                added += slab
            else:
                dist.recv(received, src=rank)
                added += received
        slab.copy_(added)


SINGLE = Ranks()


def require_gpus(device: str, processes: int) -> None:
    """Refuse several processes that compute on GPUs but have none for each.

    Args:
        device: as in a recipe.
        processes: how many of them are on this machine.

    Raises:
        DeviceError: this machine has fewer GPUs, or all are to use the same.
    """
    if not _on_gpu(device):
        return
    if ":" in device:
        raise DeviceError(
            f"device {device!r} for several processes",
            expected="a GPU for each process",
            fix="set device: cuda, and choose GPUs by CUDA_VISIBLE_DEVICES",
        )
    if (found := torch.cuda.device_count()) < processes:
        raise DeviceError(
            f"{processes} processes on a machine with {found} visible CUDA devices",
            expected="a GPU for each process",
            fix=f"start at most {found} processes on it, or set device: cpu" if found else "set device: cpu",
        )


def _on_gpu(device: str) -> bool:
    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())


def join(device: str) -> Ranks:
    """Meet the other processes that torchrun has started; without torchrun, or with one process, be a single one.

    Args:
        device: as in a recipe; decides how processes talk.

    Raises:
        DeviceError: the processes cannot meet, or there is not a GPU for each of them.
    """
    if not torchrun.started() or not dist.is_available():
        return SINGLE
    if not dist.is_initialized():
        torchrun.end_with_torchrun()
        require_gpus(device, torchrun.neighbours())
        on_gpu = _on_gpu(device)
        if on_gpu:
            torch.cuda.set_device(torchrun.place())
        with _meeting():
            _await_machines()
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=TIMEOUT)
            _listen_to_machines()
    elif "cpu:" not in (config := dist.get_backend_config()):
        raise DeviceError(
            f"this program has initialised torch.distributed with {config} alone, and counts are summed on the CPU",
            expected="a process group for tensors on the CPU as well",
            fix='init_process_group("cpu:gloo,cuda:nccl"), or leave it to llmprune',
        )
    if _heartbeat is not None:
        _heartbeat.finished = False
    return Ranks(dist.get_rank(), dist.get_world_size())


def finished() -> None:
    """The run is over: from now on, this process may end without the others."""
    if _heartbeat is not None:
        _heartbeat.finished = True


@contextlib.contextmanager
def _meeting() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, KeyError) as error:
        raise DeviceError(
            f"the processes of the run cannot meet: {str(error).splitlines()[0]}",
            expected="torchrun's environment variables, and a network between the nodes",
            fix="start with torchrun --nproc-per-node N -m llmprune prune ..., or --processes N",
        ) from error


def _await_machines() -> None:
    """Where torchrun on one machine has started and on another has not, or has failed, say so."""
    if not torchrun.on_several_machines() or not torchrun.holds_store():
        return
    missing = meet(_store(), torchrun.number(), torchrun.processes(), _MEETING.total_seconds())
    if missing:
        others = ", ".join(map(str, missing))
        raise RuntimeError(f"after {_MEETING.total_seconds() / 60:.0f} minutes, without process {others}")


def _listen_to_machines() -> None:
    global _heartbeat
    if torchrun.on_several_machines():
        _heartbeat = Heartbeat(_store(), dist.get_rank(), dist.get_world_size())
        _heartbeat.start()


def _store() -> Any:
    """A connection of its own to the store by which the processes meet."""
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(*place, is_master=False, timeout=_MEETING)  # type: ignore[attr-defined] # not in __all__
    return dist.PrefixStore(f"llmprune/{torchrun.attempt()}", store)  # type: ignore[attr-defined]


def _portable(value: T) -> T:
    """The value with its tensors on the CPU: another process has other GPUs, or would use that of this one."""
    return cast(T, tree_map_only(Tensor, Tensor.cpu, value))


def _said(error: RuntimeError) -> str:
    """The first sentence of gloo or NCCL, without the place in its source code."""
    return re.sub(r"^\[[^\]]*\] ", "", str(error).partition("\n")[0]).partition(". ")[0]


@contextlib.contextmanager
def _talking() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if is_shortage(error):  # of this process, which says so itself
            raise
        raise PeerError(
            f"another process of this run has ended: {_said(error)}",
            expected="all processes of the run until its end",
            fix="see the message of the other process; then continue with --resume",
        ) from error
