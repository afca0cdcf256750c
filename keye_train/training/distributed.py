"""The processes of a run: who I am, on which device, and small agreements between all of them.

Started by torchrun or the deepspeed launcher, the environment says who is who; started plainly, the run is a group of
one, so that no other code has a special case for it.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)

# The first init of deepspeed.comm would compile a shared-memory extension (about a minute) that serves inference only.
# DeepSpeed documents this table of compatible ops as editable.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

# DeepSpeed 0.19 calls collectives by names that torch 2.13 renamed; nothing that a user could do about it.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")


@dataclass(frozen=True)
class World:
    """This process among all processes of the run."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    host_group: dist.ProcessGroup
    """Gloo group over all ranks: agreements on numbers that live on the CPU never wait for the device."""
    timeout: timedelta
    """Deadline of every collective."""

    @property
    def is_main(self) -> bool:
        """True on rank 0, the only rank that writes logs and manifests."""
        return self.rank == 0

    def sum_int(self, values: Sequence[int]) -> list[int]:
        """Element-wise sums over all ranks. Collective: every rank must reach this, with as many values."""
        tensor = torch.tensor(list(values), dtype=torch.int64)
        dist.all_reduce(tensor, group=self.host_group)
        return tensor.tolist()

    def max_int(self, value: int) -> int:
        """Largest value over all ranks. Collective: every rank must reach this."""
        return self.max_ints([value])[0]

    def max_ints(self, values: Sequence[int]) -> list[int]:
        """Element-wise largest values over all ranks. Collective: every rank must reach this, with as many values."""
        tensor = torch.tensor(list(values), dtype=torch.int64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.host_group)
        return tensor.tolist()

    def gather_texts(self, texts: Sequence[str]) -> list[list[str]]:
        """The texts of each rank, by rank. Collective: every rank must reach this."""
        own = json.dumps(list(texts)).encode()
        longest = self.max_int(len(own))
        padded = torch.frombuffer(bytearray(own.ljust(longest)), dtype=torch.uint8)
        found = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(found, padded, group=self.host_group)
        return [json.loads(bytes(text.tolist())) for text in found]

    def another_group(self) -> dist.ProcessGroup:
        """A gloo group over all ranks for one other thread: a group must see the same order of collectives on every
        rank. Collective: every rank must reach this.
        """
        return dist.new_group(backend="gloo", timeout=self.timeout)

    def barrier(self) -> None:
        """Wait for all ranks. Collective: every rank must reach this."""
        self.sum_int([0])

    def require_all(self, error: Exception | None, doing: str) -> None:
        """Fail on every rank when one failed, so that no rank is left waiting in the next collective.

        Collective: every rank must reach this.

        Raises:
            Exception: this rank's own ``error``; on the other ranks a RuntimeError that says how many failed.
        """
        failed = self.sum_int([error is not None])[0]
        if error is not None:
            raise error
        if failed:
            raise RuntimeError(f"{doing} failed on {failed} other rank(s); their logs say why")


def start(timeout_minutes: float) -> World:
    """Join the process group: nccl and the GPU of ``LOCAL_RANK`` where there is one, else gloo on the CPU.

    The group lives as long as the process: DeepSpeed keeps references to it, so it cannot be replaced. A second run in
    the same process uses the same group.

    Args:
        timeout_minutes: deadline of every collective.
    """
    if not torch.cuda.is_available():
        # DeepSpeed's launcher sets it; without it ZeRO-3 asks a program, numactl, for each bucket of gradients.
        os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not dist.is_initialized():
        _init_process_group(timedelta(minutes=timeout_minutes))
        atexit.register(dist.destroy_process_group)
    deepspeed.init_distributed(dist_backend=_backend(), auto_mpi_discovery=False, verbose=False)
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    timeout = timedelta(minutes=timeout_minutes)
    host_group = dist.new_group(backend="gloo", timeout=timeout)
    world = World(dist.get_rank(), dist.get_world_size(), local_rank, device, host_group, timeout)
    _limit_threads(world)
    if not world.is_main:  # what is no warning is the same on every rank
        logging.getLogger("keye_train").setLevel(logging.WARNING)
    return world


def _backend() -> str:
    return "nccl" if torch.cuda.is_available() else "gloo"


def _init_process_group(timeout: timedelta) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        os.environ.setdefault("LOCAL_RANK", "0")
        store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
        dist.init_process_group(
            _backend(), store=dist.PrefixStore(_launch(), store), rank=rank, world_size=size, timeout=timeout
        )
        return
    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed reads it from the environment
    # A group of one needs no address: an in-memory store cannot collide with another run on this machine.
    dist.init_process_group(_backend(), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def _launch() -> str:
    """Prefix of this launch in the store where ranks find each other.

    torchrun 2.13 hands one store to all restarts of a group, where a restarted rank finds the addresses of dead peers.
    On one node the count of restarts tells them apart; several nodes may count differently, there the launcher needs
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 (launch/torchrun.sh sets it), which gives each restart a store of its own.
    """
    one_node = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    return f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}" if one_node else "restart"


def _limit_threads(world: World) -> None:
    """Share the cores among the ranks of this machine unless OMP_NUM_THREADS decides.

    Torch's threads spin while they wait: with more of them than cores a step takes twice as long.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
    if world.is_main:
        logger.info("%d CPU threads for each rank; set OMP_NUM_THREADS to choose", torch.get_num_threads())
