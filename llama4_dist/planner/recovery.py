"""How long a host's weights take to come back from each place that may have them; bytes over bandwidths."""

from llama4_dist.errors import ConfigError
from llama4_dist.planner.hardware import Hardware

SOURCES = ("peer", "nvlink", "host", "storage")


def reload_s(num_bytes: float, hardware: Hardware, source: str, *, efficiency: float = 0.8) -> float:
    """Return the seconds to load so many bytes from another node, a neighbour, the node's memory or its disk.

    `efficiency` is that of links; memory and disk are given as what they reach.
    """
    bandwidths = {
        "peer": hardware.nic_bandwidth * efficiency,
        "nvlink": hardware.nvlink_bandwidth * efficiency,
        "host": hardware.host_bandwidth,
        "storage": hardware.storage_bandwidth,
    }
    if source not in bandwidths:
        raise ConfigError(f"source={source!r} holds no weights: choose one of {', '.join(SOURCES)}")
    return num_bytes / bandwidths[source]
