"""The ranks of a stage as processes that gather rows through torch.distributed: gloo on processors, NCCL on CUDA.

Hazard: a gloo receive that was cut half-way may wait for ever, and aborting does not wake it. The timeout ends most
waits, but whoever starts members must be able to kill one, and a member holds no lock while it gathers.
NCCL has not been run on a GPU yet; its watchdog ends a process whose peer is gone.
"""

import logging
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store  # those of torch.distributed, as its stubs name them

from llama4_dist.stages.ports import TIMEOUT_S, worker_lost

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"


class ProcessRanks:
    """`Ranks` over a process group of its own; there is no global group, so that a new one can follow a lost one."""

    def __init__(self, backend: Any, *, rank: int, num_ranks: int, device: torch.device) -> None:
        """`backend` is one of torch.distributed's; its stubs leave out what all of them have."""
        self.rank = rank
        self.num_ranks = num_ranks
        self.device = device
        self._backend = backend

    def gather(self, own_ND: Tensor) -> Tensor:
        if self._backend is None:
            raise worker_lost("this rank has left its stage")
        gathered = own_ND.new_empty(self.num_ranks, *own_ND.shape)
        try:
            self._backend._allgather_base(gathered.flatten(0, 1), own_ND.contiguous()).wait()
        except RuntimeError as error:  # what both backends raise: a closed connection, a timeout
            log.warning("rank_lost own=%d cause=%s", self.rank, _first_line(error))
            raise worker_lost("a rank of this stage is gone") from error
        return gathered

    def abort(self) -> None:
        """Close the connections, which tells who gathers with this rank; gloo's own `abort` leaves them open."""
        backend, self._backend = self._backend, None
        if backend is not None and self.device.type == "cuda":
            backend.abort()


def join_ranks(
    store: Store,
    *,
    rank: int,
    num_ranks: int,
    device: torch.device | str,
    formation: int = 0,
    address: str = LOOPBACK,
    timeout_s: float = TIMEOUT_S,
) -> ProcessRanks:
    """Meet the other ranks of a stage in `store` and return the way to them; WORKER_LOST where one does not come.

    A group that is formed anew takes the next `formation`. gloo listens on `address` and asks nobody for a secret: it
    must be the loopback, or an address of a network that only the cluster reaches. NCCL chooses its own interfaces.
    """
    device = torch.device(device)
    own_store = PrefixStore(f"ranks/{formation}", store)
    make = _nccl if device.type == "cuda" else _gloo
    try:
        backend = make(own_store, rank, num_ranks, timedelta(seconds=timeout_s), address)
    except RuntimeError as error:
        log.warning("ranks_did_not_meet own=%d cause=%s", rank, _first_line(error))
        raise worker_lost(f"the {num_ranks} ranks of a stage did not meet in {timeout_s:g} s") from error
    return ProcessRanks(backend, rank=rank, num_ranks=num_ranks, device=device)


def _gloo(store: Store, rank: int, num_ranks: int, timeout: timedelta, address: str) -> Any:
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=address)]
    options._timeout = timeout
    return gloo(store, rank, num_ranks, options)


def _nccl(store: Store, rank: int, num_ranks: int, timeout: timedelta, address: str) -> Any:
    nccl: Any = dist.ProcessGroupNCCL
    options = nccl.Options()
    options._timeout = timeout
    return nccl(store, rank, num_ranks, options)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:200]
