"""Holds a partition of the attention side against quantised linears: no rank's part may cut inputs that share a scale.

Pure: knows entries and shares, reads nothing.
"""

from collections.abc import Iterable, Mapping

from llama4_dist.checkpoint.expert_format import shown_numbers
from llama4_dist.checkpoint.names import is_routed
from llama4_dist.checkpoint.quantised_blocks import check_cut
from llama4_dist.checkpoint.quantised_tensors import QuantisedEntry
from llama4_dist.checkpoint.scheme import Scheme
from llama4_dist.config import ModelConfig
from llama4_dist.partition import Partition, Share, shares_of


def check_shares(
    config: ModelConfig, partition: Partition, quantised: Mapping[str, QuantisedEntry], scheme: Scheme | None
) -> tuple[Share, ...]:
    """Return the shares of all members; ValueError, with the numbers of ranks that fit, where one cuts a group."""
    shares = shares_of(config, partition)
    if scheme is None:
        return shares
    linears = {name: entry.shape[1] for name, entry in quantised.items() if not is_routed(name)}
    found = _first_cut(shares, linears, scheme)
    if found is not None:
        fitting = [n for n in range(1, config.num_heads + 1) if _fits(config, n, linears, scheme)]
        raise ValueError(
            f"num_ranks={partition.num_ranks} cuts groups of {found}, which is quantised ({scheme.title}): "
            f"take one of {shown_numbers(fitting)}"
        )
    return shares


def _first_cut(shares: Iterable[Share], linears: Mapping[str, int], scheme: Scheme) -> str | None:
    """Return a linear that a share would cut within a group, if there is one."""
    for share in shares:
        for name, width in linears.items():
            _, columns = share.cut(name)
            try:
                check_cut(columns or range(width), width, scheme)
            except ValueError:
                return name
    return None


def _fits(config: ModelConfig, num_ranks: int, linears: Mapping[str, int], scheme: Scheme) -> bool:
    try:
        shares = shares_of(config, Partition(num_ranks=num_ranks))
    except ValueError:
        return False
    return _first_cut(shares, linears, scheme) is None
