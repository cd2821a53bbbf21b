"""llama4_dist.v1.ExpertService over a control plane: where experts live and how busy they are; changes nothing."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import islice

from cluster.admin.calls import AdminCalls
from cluster.admin.expert_wire import change_to_proto, expert_rate_to_proto, host_rate_to_proto, placement_to_proto
from cluster.admin.load_history import LoadHistory
from cluster.admin.load_rates import ExpertRate, rates
from cluster.admin.paging import invalid, page, seconds, to_duration
from cluster.admin.revised import Revised
from cluster.control import ControlPlane
from cluster.operation import PlacementView
from cluster.planning.placement import Pair
from llama4_dist.gateway.handlers import Context
from llama4_dist.v1 import experts_pb2

WINDOW_S, MIN_WINDOW_S, MAX_WINDOW_S = 1.0, 0.05, 60.0
DEFAULT_LOADS, MAX_LOADS = 1000, 10_000
MAX_PLACEMENTS = 16  # remembered for callers that come back


class ExpertService:
    """Methods named as in experts.proto."""

    def __init__(self, control: ControlPlane, calls: AdminCalls, *, watch_interval_s: float) -> None:
        self._control = control
        self._calls = calls
        self._interval_s = watch_interval_s
        self._history = LoadHistory(control, calls)
        self._known: OrderedDict[int, PlacementView] = OrderedDict()  # by epoch
        self._placements = Revised(self._read_placement, PlacementView.__eq__, max_age_s=watch_interval_s)

    async def GetPlacement(self, request: experts_pb2.GetPlacementRequest, context: Context) -> experts_pb2.Placement:
        """Return who holds what now."""
        return placement_to_proto(await self._calls.ask(self._control.placement))

    async def WatchPlacement(self, request: experts_pb2.WatchPlacementRequest, context: Context) -> None:
        """Send the placement, or what is different since `start_revision`, and then every change."""
        if request.start_revision < 0:
            raise invalid("start_revision", f"must be at least 0, not {request.start_revision}")
        _, view = await self._placements.latest()
        seen = view if request.start_revision == view.epoch else self._known.get(request.start_revision)
        while True:
            if view != seen:
                await context.write(change_to_proto(seen, view))
                seen = view
            await self._calls.pause(self._interval_s)
            _, view = await self._placements.latest()

    async def ListExpertLoads(
        self, request: experts_pb2.ListExpertLoadsRequest, context: Context
    ) -> experts_pb2.ListExpertLoadsResponse:
        """List a page of loads over a window."""
        given = request.window if request.HasField("window") else None
        window_s = seconds("window", given, default=WINDOW_S, least=MIN_WINDOW_S, most=MAX_WINDOW_S)
        before, now = await self._history.window(window_s)
        _, view = await self._placements.latest()
        found = rates(before, now, held_by(view))
        experts = [
            one
            for one in found.experts
            if request.host in ("", one.host) and (not request.HasField("layer") or request.layer == one.pair[0])
        ]
        shown, next_token = page(
            experts,
            position,
            size=request.page_size,
            token=request.page_token,
            default=DEFAULT_LOADS,
            most=MAX_LOADS,
        )
        hosts = [one for one in found.hosts if request.host in ("", one.load.host)]
        return experts_pb2.ListExpertLoadsResponse(
            loads=[expert_rate_to_proto(one, view.num_slices) for one in shown],
            hosts=map(host_rate_to_proto, hosts),
            window=to_duration(found.window_s),
            next_page_token=next_token,
        )

    async def WatchExpertLoads(self, request: experts_pb2.WatchExpertLoadsRequest, context: Context) -> None:
        """Send the loads of every interval."""
        given = request.interval if request.HasField("interval") else None
        interval_s = seconds("interval", given, default=WINDOW_S, least=MIN_WINDOW_S, most=MAX_WINDOW_S)
        if request.top_k < 0:
            raise invalid("top_k", f"must be at least 0, not {request.top_k}")
        before = await self._history.recent(interval_s)
        while True:
            now = await self._history.since(before.taken_s + interval_s)
            _, view = await self._placements.latest()
            found = rates(before, now, held_by(view))
            busiest = sorted(found.experts, key=lambda one: -one.rows_per_s)
            await context.write(
                experts_pb2.WatchExpertLoadsResponse(
                    loads=[
                        expert_rate_to_proto(one, view.num_slices) for one in islice(busiest, request.top_k or None)
                    ],
                    hosts=map(host_rate_to_proto, found.hosts),
                    window=to_duration(found.window_s),
                )
            )
            before = now

    async def _read_placement(self) -> PlacementView:
        view = await self._calls.ask(self._control.placement)
        self._known[view.epoch] = view
        while len(self._known) > MAX_PLACEMENTS:
            self._known.popitem(last=False)
        return view


def held_by(view: PlacementView) -> Mapping[str, Sequence[Pair]]:
    """List what each host holds."""
    held: dict[str, list[Pair]] = {}
    for pair, hosts in view.hosts_of.items():
        for host in hosts:
            held.setdefault(host, []).append(pair)
    return held


def position(one: ExpertRate) -> str:
    """Name a copy within a list of loads."""
    return f"{one.host}/{one.pair[0]}/{one.pair[1]}"
