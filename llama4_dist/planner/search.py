"""Finds the best layouts of so many devices: enumerate, refuse, estimate all, compute the best exactly."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from llama4_dist.checkpoint.expert_slices import GRAINS
from llama4_dist.errors import ConfigError
from llama4_dist.planner import formats
from llama4_dist.planner.layout import Layout
from llama4_dist.planner.memory import memory_of
from llama4_dist.planner.parse import MOST_GPUS
from llama4_dist.planner.plan import Plan, evaluate, refusals
from llama4_dist.planner.request import Objective, PlanRequest
from llama4_dist.planner.roofline import ESTIMATE

MOST_SLICES = 16  # more would send a row sixteen times and more
MOST_STAGES = 8
MOST_BATCH = 4096  # sequences of one group
CROWDED = 0.25  # share of a device that weights take before a group is cut into twice as many stages
SAFE = 0.99  # of the time asked for: an estimate is not exact
EXACT = 12  # layouts whose figures are computed with all draws


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Plans, the best first; the whole cloud of estimates; and how many layouts were refused for what."""

    plans: tuple[Plan, ...]
    estimates: tuple[Plan, ...]
    refused: tuple[tuple[str, int], ...]


def search(request: PlanRequest, *, top: int = 5) -> Found:
    """Return the `top` layouts by the objective; ConfigError with the reasons when none is possible."""
    refused: Counter[str] = Counter()
    estimates: list[Plan] = []
    for shape in shapes(request):
        reasons = refusals(request, shape)
        if reasons:
            refused[reasons[0]] += 1
        elif judged := list(_estimates(request, shape)):
            estimates += judged
        else:
            refused[_too_many(request, shape)] += 1
    if not estimates:
        raise ConfigError(_nothing(request, refused))
    in_time = [plan for plan in estimates if _in_time(request, plan)]
    if not in_time:
        raise ConfigError(_too_slow(request, estimates))
    best = _best_of_each_shape(request, in_time)[: max(EXACT, top)]
    plans = [evaluate(request, _fullest_in_time(request, plan)) for plan in best]
    kept = sorted((plan for plan in plans if _in_time(request, plan)), key=lambda plan: rank(request, plan))
    if not kept:
        raise ConfigError(_too_slow(request, plans))
    return Found(plans=tuple(kept[:top]), estimates=tuple(estimates), refused=tuple(refused.most_common()))


def rank(request: PlanRequest, plan: Plan) -> tuple[float, ...]:
    """Return what sorts plans; the smaller the better. Ties go to fewer devices, then to the simpler layout."""
    simple = (plan.layout.num_gpus, plan.layout.stages, plan.layout.slices, plan.layout.microbatches)
    match request.objective:
        case Objective.THROUGHPUT:
            return (-round(plan.tokens_per_s, 1), *simple)
        case Objective.LATENCY:
            return (round(plan.step.step_s, 7), -plan.tokens_per_s, *simple)
        case Objective.COST:
            return (round(plan.price_per_million_tokens, 4), plan.step.step_s, *simple)


def shapes(request: PlanRequest) -> Iterator[Layout]:
    """Yield layouts with a batch of one: every cut of a group, every number of slices, hosts that fill evenly."""
    config, devices = request.geometry.config, request.num_gpus
    for stages, ranks in _cuts(request):
        for slices in _powers(min(MOST_SLICES, max(1, config.expert_width // GRAINS[0]))):
            for hosts in _divisors(config.num_experts * slices * request.defaults.replicas):
                for groups in _group_numbers((devices - hosts) // (stages * ranks), request.objective):
                    yield request.with_layout(stages=stages, ranks=ranks, slices=slices, hosts=hosts, groups=groups)


def _cuts(request: PlanRequest) -> Iterator[tuple[int, int]]:
    """Yield stages and ranks of a group; stages only while weights crowd the memory: each part reads weights again."""
    config = request.geometry.config
    weights = request.geometry.trunk_parameters * formats.weight_bytes(request.defaults.dtype)
    for stages in _powers(min(MOST_STAGES, config.num_layers)):
        for ranks in _powers(min(request.hardware.devices_per_node, config.num_heads)):
            if stages == 1 or weights / (stages // 2 * ranks) > CROWDED * request.bytes_per_gpu:
                yield stages, ranks


def _estimates(request: PlanRequest, shape: Layout) -> Iterator[Plan]:
    most = memory_of(request.geometry, shape, request.traffic.context, request.bytes_per_gpu).most_sequences
    for sequences in _batches(request, shape, min(most, MOST_BATCH)):
        whole = evaluate(request, replace(shape, sequences=sequences), samples=ESTIMATE)
        yield whole
        # A second part can only hide what is exposed; and a part of one sequence is not cut again.
        if sequences >= 2 * shape.stages and whole.step.terms.exposed_s(1) > 0:
            yield evaluate(request, replace(shape, sequences=sequences, microbatches=2), samples=ESTIMATE)


def _too_many(request: PlanRequest, shape: Layout) -> str:
    memory = memory_of(request.geometry, shape, request.traffic.context, request.bytes_per_gpu)
    number = memory.most_sequences * shape.groups
    return f"the KV memory of {shape.groups} groups of {shape.gpus_per_group} GPUs holds {number} sequences at most"


def _batches(request: PlanRequest, shape: Layout, most: int) -> list[int]:
    if request.batch is not None:
        wanted = -(-request.batch // shape.groups)
        return [wanted] if wanted <= most else []
    if request.objective is Objective.LATENCY:
        return [1] if most else []
    return sorted({*_powers(most)[::2], most // 2, most * 3 // 4, most} - {0})


def _fullest_in_time(request: PlanRequest, plan: Plan) -> Layout:
    """Return the layout with the largest batch that is still in time; as it is where nothing asks for a time."""
    if request.slo_tpot_s is None or request.batch is not None or request.objective is Objective.LATENCY:
        return plan.layout
    limit_s = request.slo_tpot_s * SAFE
    most = min(MOST_BATCH, plan.memory.most_sequences)

    def step_s(sequences: int) -> float:
        return evaluate(request, replace(plan.layout, sequences=sequences), samples=ESTIMATE).step.step_s

    larger = range(plan.layout.sequences, most + 1)
    number = bisect_right(larger, limit_s, key=step_s)
    return replace(plan.layout, sequences=larger[max(0, number - 1)])


def _best_of_each_shape(request: PlanRequest, plans: list[Plan]) -> list[Plan]:
    best: dict[Layout, Plan] = {}
    for plan in sorted(plans, key=lambda plan: rank(request, plan)):
        best.setdefault(replace(plan.layout, sequences=1, microbatches=1), plan)
    return list(best.values())


def _in_time(request: PlanRequest, plan: Plan) -> bool:
    return request.slo_tpot_s is None or plan.step.step_s <= request.slo_tpot_s


def _nothing(request: PlanRequest, refused: Counter[str]) -> str:
    """Say what stands in the way: the devices that would be enough, else the reasons met most often."""
    batch = f" with {request.batch} sequences" if request.batch else ""
    asked = f"{request.num_gpus}x{request.hardware.name}"
    model = f"{request.model} in {request.defaults.dtype} at context {request.traffic.context}{batch}"
    fleet = smallest_fleet(request)
    if fleet is not None and fleet.num_gpus > request.num_gpus:
        return f"no layout of {asked} serves {model}: the smallest needs {fleet.num_gpus} devices ({fleet.describe()})"
    telling = [reason for reason, _ in refused.most_common() if not reason.startswith("it needs")]
    reasons = "; ".join(telling[-2:] if request.batch else telling[:2]) or "there is no legal layout"
    return f"no layout of {asked} serves {model}: {reasons}"


def smallest_fleet(request: PlanRequest) -> Layout | None:
    """Return the layout with the fewest devices that holds the model and one sequence; None if there is none."""
    unbounded = replace(request, num_gpus=MOST_GPUS)
    fits = [shape for shape in shapes(replace(request, num_gpus=1)) if not refusals(unbounded, shape)]
    return min(fits, key=lambda shape: (shape.num_gpus, shape.stages, shape.slices), default=None)


def _too_slow(request: PlanRequest, plans: list[Plan]) -> str:
    assert request.slo_tpot_s is not None, "only an objective refuses what fits"
    best = min(plans, key=lambda plan: plan.step.step_s)
    return (
        f"no layout takes at most {1e3 * request.slo_tpot_s:g} ms per token; the fastest, {best.layout.describe()}, "
        f"takes {1e3 * best.step.step_s:.1f} ms: relax --slo-tpot or add devices"
    )


def _group_numbers(most: int, objective: Objective) -> list[int]:
    """All that fit for throughput; fewer too where idle devices cost nothing."""
    if most < 1:
        return [1]  # refused with the number of devices it needs
    if objective is Objective.LATENCY:
        return [1]
    return [most] if objective is Objective.THROUGHPUT else sorted({most, -(-most // 2), -(-most // 4), 1})


def _powers(most: int) -> list[int]:
    return [1 << power for power in range(most.bit_length()) if 1 << power <= most]


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
