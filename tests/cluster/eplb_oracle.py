"""DeepSeek's published load balancing of experts (EPLB), written slowly from its description, to compare plans with.

A layer at a time: the redundant slots go one by one to the expert whose copies are busiest, then copies are packed on
hosts, the heaviest first, each on the least loaded host with a free slot. The hierarchical form packs groups of experts
on nodes first and does the rest inside each node. Source: the description at github.com/deepseek-ai/EPLB.
"""

from collections.abc import Sequence

Packs = list[list[int]]  # per pack the indices of what it holds


def pack(weights: Sequence[float], num_packs: int) -> Packs:
    """Pack things into packs of equally many, the heaviest first, each into the lightest pack that is not full."""
    size = len(weights) // num_packs
    assert size * num_packs == len(weights)
    packs: Packs = [[] for _ in range(num_packs)]
    for thing in sorted(range(len(weights)), key=lambda thing: -weights[thing]):
        pack_open = [one for one in packs if len(one) < size]
        min(pack_open, key=lambda one: sum(weights[held] for held in one)).append(thing)
    return packs


def replicate(loads: Sequence[float], num_slots: int) -> list[int]:
    """Return how many copies each expert gets: every further slot goes to the expert with most load per copy."""
    copies = [1] * len(loads)
    for _ in range(num_slots - len(loads)):
        copies[max(range(len(loads)), key=lambda expert: loads[expert] / copies[expert])] += 1
    return copies


def eplb_global(loads: Sequence[float], num_hosts: int, num_slots: int) -> Packs:
    """Return the experts each host holds; one may be there twice."""
    copies = replicate(loads, num_slots)
    slots = [expert for expert, num in enumerate(copies) for _ in range(num)]
    return [
        [slots[slot] for slot in held] for held in pack([loads[expert] / copies[expert] for expert in slots], num_hosts)
    ]


def eplb_hierarchical(
    loads: Sequence[float], num_hosts: int, num_slots: int, *, num_groups: int, num_nodes: int
) -> Packs:
    """Do the same with groups packed on nodes first; hosts of node 0 come first."""
    size = len(loads) // num_groups
    groups = [list(range(group * size, (group + 1) * size)) for group in range(num_groups)]
    packs: Packs = []
    for node in pack([sum(loads[expert] for expert in group) for group in groups], num_nodes):
        experts = [expert for group in node for expert in groups[group]]
        inside = eplb_global([loads[expert] for expert in experts], num_hosts // num_nodes, num_slots // num_nodes)
        packs += [[experts[at] for at in held] for held in inside]
    return packs


def ratio(packs: Packs, loads: Sequence[float]) -> float:
    """Return the busiest host's load over the mean; an expert's rows are spread evenly over its copies."""
    copies = [sum(held.count(expert) for held in packs) for expert in range(len(loads))]
    busy = [sum(loads[expert] / copies[expert] for expert in held) for held in packs]
    return max(busy) * len(busy) / sum(busy)
