"""Chooses which copies of a layer stay where they are: as many as quotas, copies and nodes allow; it adds none."""

from cluster.planning.layer_state import LayerState, LayerTask


def keep(task: LayerTask) -> LayerState:
    """Return the state with all copies that need not go."""
    state = LayerState(task, task.held)
    for expert in range(len(task.loads)):
        _drop_surplus(state, expert)
    for host in range(len(task.quotas)):
        _drop_over_quota(state, host)
    return state


def _drop_surplus(state: LayerState, expert: int) -> None:
    """Drop copies that are too many, or too many on one node, from the fullest hosts."""
    task = state.task

    def fullness(host: int) -> tuple[int, int]:
        return len(state.held[host]) - task.quotas[host], host

    for node in sorted({task.nodes[host] for host in state.holders[expert]}):
        while len(crowd := state.on_node(expert, node)) > task.node_limits[expert]:
            state.drop(expert, max(crowd, key=fullness))
    while len(state.holders[expert]) > task.copies[expert]:
        state.drop(expert, max(state.holders[expert], key=fullness))


def _drop_over_quota(state: LayerState, host: int) -> None:
    """Drop what is above the quota so that the load that stays is the host's share."""
    task = state.task
    share = sum(task.loads) * task.weights[host] / sum(task.weights)
    while (surplus := len(state.held[host]) - task.quotas[host]) > 0:
        wanted = (state.busy[host] - share) / surplus

        def misfit(expert: int, wanted: float = wanted) -> tuple[float, int, int]:
            return round(abs(task.copy_load(expert) - wanted), 9), -state.shared(expert, host), expert

        state.drop(min(state.held[host], key=misfit), host)
