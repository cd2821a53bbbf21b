"""Divides a number of copies over hosts by weight, within limits; it does not know what is copied."""

from collections.abc import Collection, Mapping
from math import floor


def share_out(
    total: int, *, limits: Mapping[str, int], weights: Mapping[str, float], held: Mapping[str, int]
) -> dict[str, int]:
    """Give every host its share of `total` by weight, at most its limit; what one cannot take the others share.

    Remainders go first to hosts that hold more than their share now, so that nothing moves for a rounding.
    """
    shares: dict[str, float] = {}
    open_hosts = sorted(limits)
    while open_hosts:
        left = total - sum(shares.values())
        level = left / sum(weights[host] for host in open_hosts)
        full = [host for host in open_hosts if level * weights[host] >= limits[host]]
        shares |= {host: limits[host] if full else level * weights[host] for host in full or open_hosts}
        open_hosts = [host for host in open_hosts if host not in shares]
    # The sum of floats may lie a hair below a whole number.
    quotas = {host: floor(share + 1e-9) for host, share in shares.items()}
    remainder = min(total, sum(limits.values())) - sum(quotas.values())
    takers = [host for host in quotas if shares[host] - quotas[host] > 1e-6]
    takers.sort(key=lambda host: (held.get(host, 0) <= quotas[host], quotas[host] - shares[host], host))
    for host in takers[:remainder]:
        quotas[host] += 1
    return quotas


def share_out_apart(
    total: int,
    *,
    limits: Mapping[str, int],
    weights: Mapping[str, float],
    held: Mapping[str, int],
    node_of: Mapping[str, str],
    node_limit: int,
) -> dict[str, int]:
    """Do the same with at most `node_limit` on a node as long as other nodes can take the rest.

    Above that a node would hold two copies of something.
    """
    fixed: dict[str, int] = {}
    while True:
        rest = [host for host in limits if host not in fixed]
        quotas = _share(total - sum(fixed.values()), rest, limits, weights, held)
        crowded = {node for node in node_of.values() if _on(quotas, node, node_of) > node_limit}
        if not crowded:
            break
        for node in sorted(crowded):
            members = [host for host in rest if node_of[host] == node]
            fixed |= _share(node_limit, members, limits, weights, held)
    quotas |= fixed
    beyond = total - sum(quotas.values())
    spare = {host: limit - quotas[host] for host, limit in limits.items()}
    over = share_out(beyond, limits=spare, weights=weights, held={})
    return {host: quota + over[host] for host, quota in quotas.items()}


def _share(
    total: int,
    hosts: Collection[str],
    limits: Mapping[str, int],
    weights: Mapping[str, float],
    held: Mapping[str, int],
) -> dict[str, int]:
    return share_out(total, limits={host: limits[host] for host in hosts}, weights=weights, held=held)


def _on(quotas: Mapping[str, int], node: str, node_of: Mapping[str, str]) -> int:
    return sum(quota for host, quota in quotas.items() if node_of[host] == node)
