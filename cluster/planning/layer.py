"""Puts one layer's experts on hosts: keeps what can stay, places the rest by load, then exchanges to even out.

Hosts are numbers here; their quotas are given, so memory is not this file's business.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from cluster.planning.exchange import exchange
from cluster.planning.keep import keep
from cluster.planning.layer_state import LayerState, LayerTask
from cluster.planning.matching import Matching
from cluster.planning.policy import PlanPolicy
from cluster.planning.siblings import Siblings, part


def place_layer(task: LayerTask, policy: PlanPolicy) -> list[set[int]]:
    """Return each expert's hosts; a copy for which no host is left is missing."""
    matching = Matching(
        need=task.copies,
        room=task.quotas,
        group_of=task.nodes,
        least=[[0] * len(task.quotas) for _ in task.loads],
        most=[[1] * len(task.quotas) for _ in task.loads],
        group_most=[[limit] * task.num_nodes for limit in task.node_limits],
    )
    for expert, hosts in enumerate(keep(task).holders):
        for host in hosts:
            matching.put(expert, host)

    def stays(expert: int, host: int) -> bool:
        return host in task.held[expert]

    # A copy that had to go from one of its hosts may stay on another, if that one lets another go.
    matching.augment(only=stays)
    _place_rest(task, matching)
    matching.augment(cheap=stays)
    # Nodes without memory for one copy of each: some experts have two copies on a node.
    matching.group_most = [[num] * task.num_nodes for num in task.copies]
    matching.augment()
    holders = _holders(matching)
    loads = [task.copy_load(expert) for expert in range(len(task.loads))]
    if 1 < task.num_slices <= len(task.weights) // max(task.copies):  # otherwise there are too few hosts to part all
        # For this alone no copy moves that is there: which host is asked first is free, and chosen afterwards.
        come_anyway = _allowed(task, holders, replace(policy, rebalance=False))
        part(holders, task.num_slices, loads, task.weights, come_anyway)
    exchange(holders, loads, task.weights, _allowed(task, holders, policy), policy.min_gain)
    return holders


def _holders(matching: Matching) -> list[set[int]]:
    return [{host for host, count in enumerate(counts) if count} for counts in matching.count]


def _place_rest(task: LayerTask, matching: Matching) -> None:
    """Place missing copies, the heaviest first, each on the least busy host, as EPLB packs.

    Of equally busy ones it takes one without another slice of the expert, and then the host that shares least with the
    expert's others, so that no host stands in for another alone. Source: github.com/deepseek-ai/EPLB, balanced_packing.
    """
    state = LayerState(task, _holders(matching))
    order = sorted(range(len(task.loads)), key=lambda expert: -task.copy_load(expert))
    for expert in order:
        while matching.need[expert] > 0 and (options := matching.open_columns(expert)):
            host = _least_busy(state, expert, options)
            matching.put(expert, host)
            state.put(expert, host)


def _least_busy(state: LayerState, expert: int, options: Sequence[int]) -> int:
    load = state.task.copy_load(expert)
    levels = [(state.busy[host] + load) / state.task.weights[host] for host in options]
    lowest = min(levels) * (1 + 1e-9)
    equal = [host for host, level in zip(options, levels, strict=True) if level <= lowest]
    siblings = Siblings(state.holders, state.task.num_slices)
    return min(equal, key=lambda host: (siblings.on(expert, host), state.shared(expert, host), host))


def _allowed(task: LayerTask, holders: Sequence[set[int]], policy: PlanPolicy) -> Callable[[int, int, int], bool]:
    """Return what says whether an expert may go from one host to another."""

    def may(expert: int, source: int, target: int) -> bool:
        if target in holders[expert] or not (policy.rebalance or source not in task.held[expert]):
            return False
        node = task.nodes[target]
        others = sum(task.nodes[host] == node for host in holders[expert] if host != source)
        return others < task.node_limits[expert]

    return may
