import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ExpertPlacement(_message.Message):
    __slots__ = ("layer", "expert", "hosts", "slice")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    HOSTS_FIELD_NUMBER: _ClassVar[int]
    SLICE_FIELD_NUMBER: _ClassVar[int]
    layer: int
    expert: int
    hosts: _containers.RepeatedScalarFieldContainer[str]
    slice: int
    def __init__(self, layer: _Optional[int] = ..., expert: _Optional[int] = ..., hosts: _Optional[_Iterable[str]] = ..., slice: _Optional[int] = ...) -> None: ...

class Placement(_message.Message):
    __slots__ = ("epoch", "num_experts", "moe_layers", "expert_bytes", "experts", "num_slices", "slice_bytes")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NUM_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    MOE_LAYERS_FIELD_NUMBER: _ClassVar[int]
    EXPERT_BYTES_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    NUM_SLICES_FIELD_NUMBER: _ClassVar[int]
    SLICE_BYTES_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    num_experts: int
    moe_layers: _containers.RepeatedScalarFieldContainer[int]
    expert_bytes: int
    experts: _containers.RepeatedCompositeFieldContainer[ExpertPlacement]
    num_slices: int
    slice_bytes: int
    def __init__(self, epoch: _Optional[int] = ..., num_experts: _Optional[int] = ..., moe_layers: _Optional[_Iterable[int]] = ..., expert_bytes: _Optional[int] = ..., experts: _Optional[_Iterable[_Union[ExpertPlacement, _Mapping]]] = ..., num_slices: _Optional[int] = ..., slice_bytes: _Optional[int] = ...) -> None: ...

class GetPlacementRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchPlacementRequest(_message.Message):
    __slots__ = ("start_revision",)
    START_REVISION_FIELD_NUMBER: _ClassVar[int]
    start_revision: int
    def __init__(self, start_revision: _Optional[int] = ...) -> None: ...

class PlacementDelta(_message.Message):
    __slots__ = ("base_revision", "changed")
    BASE_REVISION_FIELD_NUMBER: _ClassVar[int]
    CHANGED_FIELD_NUMBER: _ClassVar[int]
    base_revision: int
    changed: _containers.RepeatedCompositeFieldContainer[ExpertPlacement]
    def __init__(self, base_revision: _Optional[int] = ..., changed: _Optional[_Iterable[_Union[ExpertPlacement, _Mapping]]] = ...) -> None: ...

class WatchPlacementResponse(_message.Message):
    __slots__ = ("revision", "snapshot", "delta")
    REVISION_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    revision: int
    snapshot: Placement
    delta: PlacementDelta
    def __init__(self, revision: _Optional[int] = ..., snapshot: _Optional[_Union[Placement, _Mapping]] = ..., delta: _Optional[_Union[PlacementDelta, _Mapping]] = ...) -> None: ...

class ExpertLoad(_message.Message):
    __slots__ = ("host", "layer", "expert", "rows_per_second", "rows", "slice")
    HOST_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    ROWS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    SLICE_FIELD_NUMBER: _ClassVar[int]
    host: str
    layer: int
    expert: int
    rows_per_second: float
    rows: int
    slice: int
    def __init__(self, host: _Optional[str] = ..., layer: _Optional[int] = ..., expert: _Optional[int] = ..., rows_per_second: _Optional[float] = ..., rows: _Optional[int] = ..., slice: _Optional[int] = ...) -> None: ...

class HostLoad(_message.Message):
    __slots__ = ("host", "incarnation", "rows_per_second", "busy_ratio", "queue_depth", "bytes_held", "num_resident", "num_mapped", "residency_hits", "residency_misses")
    HOST_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ROWS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    BUSY_RATIO_FIELD_NUMBER: _ClassVar[int]
    QUEUE_DEPTH_FIELD_NUMBER: _ClassVar[int]
    BYTES_HELD_FIELD_NUMBER: _ClassVar[int]
    NUM_RESIDENT_FIELD_NUMBER: _ClassVar[int]
    NUM_MAPPED_FIELD_NUMBER: _ClassVar[int]
    RESIDENCY_HITS_FIELD_NUMBER: _ClassVar[int]
    RESIDENCY_MISSES_FIELD_NUMBER: _ClassVar[int]
    host: str
    incarnation: int
    rows_per_second: float
    busy_ratio: float
    queue_depth: int
    bytes_held: int
    num_resident: int
    num_mapped: int
    residency_hits: int
    residency_misses: int
    def __init__(self, host: _Optional[str] = ..., incarnation: _Optional[int] = ..., rows_per_second: _Optional[float] = ..., busy_ratio: _Optional[float] = ..., queue_depth: _Optional[int] = ..., bytes_held: _Optional[int] = ..., num_resident: _Optional[int] = ..., num_mapped: _Optional[int] = ..., residency_hits: _Optional[int] = ..., residency_misses: _Optional[int] = ...) -> None: ...

class ListExpertLoadsRequest(_message.Message):
    __slots__ = ("window", "layer", "host", "page_size", "page_token")
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    window: _duration_pb2.Duration
    layer: int
    host: str
    page_size: int
    page_token: str
    def __init__(self, window: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., layer: _Optional[int] = ..., host: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListExpertLoadsResponse(_message.Message):
    __slots__ = ("loads", "hosts", "window", "next_page_token")
    LOADS_FIELD_NUMBER: _ClassVar[int]
    HOSTS_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    loads: _containers.RepeatedCompositeFieldContainer[ExpertLoad]
    hosts: _containers.RepeatedCompositeFieldContainer[HostLoad]
    window: _duration_pb2.Duration
    next_page_token: str
    def __init__(self, loads: _Optional[_Iterable[_Union[ExpertLoad, _Mapping]]] = ..., hosts: _Optional[_Iterable[_Union[HostLoad, _Mapping]]] = ..., window: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class WatchExpertLoadsRequest(_message.Message):
    __slots__ = ("interval", "top_k")
    INTERVAL_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    interval: _duration_pb2.Duration
    top_k: int
    def __init__(self, interval: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., top_k: _Optional[int] = ...) -> None: ...

class WatchExpertLoadsResponse(_message.Message):
    __slots__ = ("loads", "hosts", "window")
    LOADS_FIELD_NUMBER: _ClassVar[int]
    HOSTS_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    loads: _containers.RepeatedCompositeFieldContainer[ExpertLoad]
    hosts: _containers.RepeatedCompositeFieldContainer[HostLoad]
    window: _duration_pb2.Duration
    def __init__(self, loads: _Optional[_Iterable[_Union[ExpertLoad, _Mapping]]] = ..., hosts: _Optional[_Iterable[_Union[HostLoad, _Mapping]]] = ..., window: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...
