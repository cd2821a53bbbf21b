"""Faults that are proved to have taken hold, and to be gone again."""

from llama4_dist.chaos.faults.fault import Fault, FaultNotVerified, FaultUnavailable, must
from llama4_dist.chaos.faults.processes import Kill, Process, Stop

__all__ = ["Fault", "FaultNotVerified", "FaultUnavailable", "Kill", "Process", "Stop", "must"]
