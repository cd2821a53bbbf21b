import datetime

from google.longrunning import operations_pb2 as _operations_pb2
from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.rpc import status_pb2 as _status_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerRole(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_ROLE_UNSPECIFIED: _ClassVar[WorkerRole]
    WORKER_ROLE_CONTROLLER: _ClassVar[WorkerRole]
    WORKER_ROLE_ATTENTION: _ClassVar[WorkerRole]
    WORKER_ROLE_EXPERT: _ClassVar[WorkerRole]
    WORKER_ROLE_STAGE: _ClassVar[WorkerRole]

class WorkerState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_STATE_UNSPECIFIED: _ClassVar[WorkerState]
    WORKER_STATE_NEW: _ClassVar[WorkerState]
    WORKER_STATE_LOADING: _ClassVar[WorkerState]
    WORKER_STATE_READY: _ClassVar[WorkerState]
    WORKER_STATE_DRAINING: _ClassVar[WorkerState]
    WORKER_STATE_LOST: _ClassVar[WorkerState]

class OperationKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OPERATION_KIND_UNSPECIFIED: _ClassVar[OperationKind]
    OPERATION_KIND_SCALE: _ClassVar[OperationKind]
    OPERATION_KIND_REBALANCE: _ClassVar[OperationKind]
    OPERATION_KIND_DRAIN: _ClassVar[OperationKind]
    OPERATION_KIND_REPAIR: _ClassVar[OperationKind]

class OperationPhase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OPERATION_PHASE_UNSPECIFIED: _ClassVar[OperationPhase]
    OPERATION_PHASE_PLANNING: _ClassVar[OperationPhase]
    OPERATION_PHASE_PROVISIONING: _ClassVar[OperationPhase]
    OPERATION_PHASE_LOADING: _ClassVar[OperationPhase]
    OPERATION_PHASE_VERIFYING: _ClassVar[OperationPhase]
    OPERATION_PHASE_COMMITTING: _ClassVar[OperationPhase]
    OPERATION_PHASE_DRAINING: _ClassVar[OperationPhase]
    OPERATION_PHASE_ROLLING_BACK: _ClassVar[OperationPhase]
    OPERATION_PHASE_DONE: _ClassVar[OperationPhase]
    OPERATION_PHASE_CANCELLED: _ClassVar[OperationPhase]
    OPERATION_PHASE_FAILED: _ClassVar[OperationPhase]
WORKER_ROLE_UNSPECIFIED: WorkerRole
WORKER_ROLE_CONTROLLER: WorkerRole
WORKER_ROLE_ATTENTION: WorkerRole
WORKER_ROLE_EXPERT: WorkerRole
WORKER_ROLE_STAGE: WorkerRole
WORKER_STATE_UNSPECIFIED: WorkerState
WORKER_STATE_NEW: WorkerState
WORKER_STATE_LOADING: WorkerState
WORKER_STATE_READY: WorkerState
WORKER_STATE_DRAINING: WorkerState
WORKER_STATE_LOST: WorkerState
OPERATION_KIND_UNSPECIFIED: OperationKind
OPERATION_KIND_SCALE: OperationKind
OPERATION_KIND_REBALANCE: OperationKind
OPERATION_KIND_DRAIN: OperationKind
OPERATION_KIND_REPAIR: OperationKind
OPERATION_PHASE_UNSPECIFIED: OperationPhase
OPERATION_PHASE_PLANNING: OperationPhase
OPERATION_PHASE_PROVISIONING: OperationPhase
OPERATION_PHASE_LOADING: OperationPhase
OPERATION_PHASE_VERIFYING: OperationPhase
OPERATION_PHASE_COMMITTING: OperationPhase
OPERATION_PHASE_DRAINING: OperationPhase
OPERATION_PHASE_ROLLING_BACK: OperationPhase
OPERATION_PHASE_DONE: OperationPhase
OPERATION_PHASE_CANCELLED: OperationPhase
OPERATION_PHASE_FAILED: OperationPhase

class LayerExperts(_message.Message):
    __slots__ = ("layer", "experts", "slices")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    SLICES_FIELD_NUMBER: _ClassVar[int]
    layer: int
    experts: _containers.RepeatedScalarFieldContainer[int]
    slices: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, layer: _Optional[int] = ..., experts: _Optional[_Iterable[int]] = ..., slices: _Optional[_Iterable[int]] = ...) -> None: ...

class Worker(_message.Message):
    __slots__ = ("worker", "role", "state", "incarnation", "pid", "node", "addresses", "epoch", "num_experts", "memory_bytes", "experts", "group", "stage", "rank", "first_layer", "num_layers", "formation")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NUM_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    FORMATION_FIELD_NUMBER: _ClassVar[int]
    worker: str
    role: WorkerRole
    state: WorkerState
    incarnation: int
    pid: int
    node: str
    addresses: _containers.RepeatedScalarFieldContainer[str]
    epoch: int
    num_experts: int
    memory_bytes: int
    experts: _containers.RepeatedCompositeFieldContainer[LayerExperts]
    group: str
    stage: int
    rank: int
    first_layer: int
    num_layers: int
    formation: int
    def __init__(self, worker: _Optional[str] = ..., role: _Optional[_Union[WorkerRole, str]] = ..., state: _Optional[_Union[WorkerState, str]] = ..., incarnation: _Optional[int] = ..., pid: _Optional[int] = ..., node: _Optional[str] = ..., addresses: _Optional[_Iterable[str]] = ..., epoch: _Optional[int] = ..., num_experts: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., experts: _Optional[_Iterable[_Union[LayerExperts, _Mapping]]] = ..., group: _Optional[str] = ..., stage: _Optional[int] = ..., rank: _Optional[int] = ..., first_layer: _Optional[int] = ..., num_layers: _Optional[int] = ..., formation: _Optional[int] = ...) -> None: ...

class Cluster(_message.Message):
    __slots__ = ("model", "epoch", "num_replicas", "workers", "operation", "num_slices")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NUM_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    NUM_SLICES_FIELD_NUMBER: _ClassVar[int]
    model: str
    epoch: int
    num_replicas: int
    workers: _containers.RepeatedCompositeFieldContainer[Worker]
    operation: str
    num_slices: int
    def __init__(self, model: _Optional[str] = ..., epoch: _Optional[int] = ..., num_replicas: _Optional[int] = ..., workers: _Optional[_Iterable[_Union[Worker, _Mapping]]] = ..., operation: _Optional[str] = ..., num_slices: _Optional[int] = ...) -> None: ...

class GetClusterRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListWorkersRequest(_message.Message):
    __slots__ = ("page_size", "page_token", "role")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    role: WorkerRole
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., role: _Optional[_Union[WorkerRole, str]] = ...) -> None: ...

class ListWorkersResponse(_message.Message):
    __slots__ = ("workers", "next_page_token")
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[Worker]
    next_page_token: str
    def __init__(self, workers: _Optional[_Iterable[_Union[Worker, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class WatchClusterRequest(_message.Message):
    __slots__ = ("heartbeat",)
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    heartbeat: _duration_pb2.Duration
    def __init__(self, heartbeat: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class WatchClusterResponse(_message.Message):
    __slots__ = ("revision", "cluster", "heartbeat")
    REVISION_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    revision: int
    cluster: Cluster
    heartbeat: Heartbeat
    def __init__(self, revision: _Optional[int] = ..., cluster: _Optional[_Union[Cluster, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("time",)
    TIME_FIELD_NUMBER: _ClassVar[int]
    time: _timestamp_pb2.Timestamp
    def __init__(self, time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class ScaleExpertPoolRequest(_message.Message):
    __slots__ = ("target_hosts", "validate_only", "request_id", "drain_timeout")
    TARGET_HOSTS_FIELD_NUMBER: _ClassVar[int]
    VALIDATE_ONLY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    DRAIN_TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    target_hosts: int
    validate_only: bool
    request_id: str
    drain_timeout: _duration_pb2.Duration
    def __init__(self, target_hosts: _Optional[int] = ..., validate_only: _Optional[bool] = ..., request_id: _Optional[str] = ..., drain_timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class RebalanceExpertsRequest(_message.Message):
    __slots__ = ("validate_only", "request_id", "drain_timeout")
    VALIDATE_ONLY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    DRAIN_TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    validate_only: bool
    request_id: str
    drain_timeout: _duration_pb2.Duration
    def __init__(self, validate_only: _Optional[bool] = ..., request_id: _Optional[str] = ..., drain_timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class DrainWorkerRequest(_message.Message):
    __slots__ = ("worker", "validate_only", "request_id", "drain_timeout")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    VALIDATE_ONLY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    DRAIN_TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    worker: str
    validate_only: bool
    request_id: str
    drain_timeout: _duration_pb2.Duration
    def __init__(self, worker: _Optional[str] = ..., validate_only: _Optional[bool] = ..., request_id: _Optional[str] = ..., drain_timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class ClusterChange(_message.Message):
    __slots__ = ("hosts_before", "hosts_after", "added_hosts", "removed_hosts", "freed_nodes", "num_moves", "num_bytes", "balance_before", "balance_after")
    HOSTS_BEFORE_FIELD_NUMBER: _ClassVar[int]
    HOSTS_AFTER_FIELD_NUMBER: _ClassVar[int]
    ADDED_HOSTS_FIELD_NUMBER: _ClassVar[int]
    REMOVED_HOSTS_FIELD_NUMBER: _ClassVar[int]
    FREED_NODES_FIELD_NUMBER: _ClassVar[int]
    NUM_MOVES_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    BALANCE_BEFORE_FIELD_NUMBER: _ClassVar[int]
    BALANCE_AFTER_FIELD_NUMBER: _ClassVar[int]
    hosts_before: int
    hosts_after: int
    added_hosts: _containers.RepeatedScalarFieldContainer[str]
    removed_hosts: _containers.RepeatedScalarFieldContainer[str]
    freed_nodes: _containers.RepeatedScalarFieldContainer[str]
    num_moves: int
    num_bytes: int
    balance_before: float
    balance_after: float
    def __init__(self, hosts_before: _Optional[int] = ..., hosts_after: _Optional[int] = ..., added_hosts: _Optional[_Iterable[str]] = ..., removed_hosts: _Optional[_Iterable[str]] = ..., freed_nodes: _Optional[_Iterable[str]] = ..., num_moves: _Optional[int] = ..., num_bytes: _Optional[int] = ..., balance_before: _Optional[float] = ..., balance_after: _Optional[float] = ...) -> None: ...

class OperationMetadata(_message.Message):
    __slots__ = ("kind", "phase", "progress_percent", "change", "hosts_ready", "moves_done", "bytes_moved", "paused_ms", "epoch", "warnings", "create_time", "end_time", "request_id")
    KIND_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_PERCENT_FIELD_NUMBER: _ClassVar[int]
    CHANGE_FIELD_NUMBER: _ClassVar[int]
    HOSTS_READY_FIELD_NUMBER: _ClassVar[int]
    MOVES_DONE_FIELD_NUMBER: _ClassVar[int]
    BYTES_MOVED_FIELD_NUMBER: _ClassVar[int]
    PAUSED_MS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    END_TIME_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    kind: OperationKind
    phase: OperationPhase
    progress_percent: int
    change: ClusterChange
    hosts_ready: int
    moves_done: int
    bytes_moved: int
    paused_ms: float
    epoch: int
    warnings: _containers.RepeatedCompositeFieldContainer[_status_pb2.Status]
    create_time: _timestamp_pb2.Timestamp
    end_time: _timestamp_pb2.Timestamp
    request_id: str
    def __init__(self, kind: _Optional[_Union[OperationKind, str]] = ..., phase: _Optional[_Union[OperationPhase, str]] = ..., progress_percent: _Optional[int] = ..., change: _Optional[_Union[ClusterChange, _Mapping]] = ..., hosts_ready: _Optional[int] = ..., moves_done: _Optional[int] = ..., bytes_moved: _Optional[int] = ..., paused_ms: _Optional[float] = ..., epoch: _Optional[int] = ..., warnings: _Optional[_Iterable[_Union[_status_pb2.Status, _Mapping]]] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., end_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., request_id: _Optional[str] = ...) -> None: ...
