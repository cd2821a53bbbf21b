"""google.longrunning.Operations over a control plane; knows names and phases, not what an operation does."""

import asyncio

from google.longrunning import operations_pb2
from google.protobuf import empty_pb2

from cluster.admin.calls import AdminCalls
from cluster.admin.cluster_wire import operation_to_proto
from cluster.admin.paging import invalid, page, seconds
from cluster.control import ControlPlane
from cluster.operation import Operation
from llama4_dist.gateway.handlers import Context

PARENTS = ("", "operations")
DEFAULT_OPERATIONS, MAX_OPERATIONS = 50, 1000
WAIT_S, MAX_WAIT_S = 30.0, 3600.0
FIRST_POLL_S, MAX_POLL_S = 0.02, 0.5
ANSWER_S = 0.2  # kept back of a caller's deadline, so that the answer arrives before it passes


class OperationsService:
    """Methods named as in google/longrunning/operations.proto."""

    def __init__(self, control: ControlPlane, calls: AdminCalls) -> None:
        self._control = control
        self._calls = calls

    async def GetOperation(
        self, request: operations_pb2.GetOperationRequest, context: Context
    ) -> operations_pb2.Operation:
        """Return one operation."""
        return operation_to_proto(await self._operation(request.name))

    async def ListOperations(
        self, request: operations_pb2.ListOperationsRequest, context: Context
    ) -> operations_pb2.ListOperationsResponse:
        """List a page of operations, newest first."""
        if request.name not in PARENTS:
            raise invalid("name", "must be empty or `operations`: there is one collection")
        if request.filter:
            raise invalid("filter", "is not supported: list without one")
        operations = await self._calls.ask(self._control.operations)
        found, next_token = page(
            operations,
            lambda operation: operation.name,
            size=request.page_size,
            token=request.page_token,
            default=DEFAULT_OPERATIONS,
            most=MAX_OPERATIONS,
        )
        return operations_pb2.ListOperationsResponse(
            operations=[operation_to_proto(operation) for operation in found], next_page_token=next_token
        )

    async def WaitOperation(
        self, request: operations_pb2.WaitOperationRequest, context: Context
    ) -> operations_pb2.Operation:
        """Return the operation when it has ended, or as it is when the time is over."""
        given = request.timeout if request.HasField("timeout") else None
        timeout_s = seconds("timeout", given, default=WAIT_S, least=0.0, most=MAX_WAIT_S)
        if (remaining_s := context.time_remaining()) is not None:
            timeout_s = min(timeout_s, remaining_s - ANSWER_S)
        loop = asyncio.get_running_loop()
        deadline_s, poll_s = loop.time() + timeout_s, FIRST_POLL_S
        while True:
            operation = await self._operation(request.name)
            left_s = deadline_s - loop.time()
            if operation.phase.final or left_s <= 0:
                return operation_to_proto(operation)
            await self._calls.pause(min(poll_s, left_s))
            poll_s = min(2 * poll_s, MAX_POLL_S)

    async def CancelOperation(
        self, request: operations_pb2.CancelOperationRequest, context: Context
    ) -> empty_pb2.Empty:
        """Ask an operation to roll back; how it ended is read from the operation."""
        await self._calls.ask(self._control.cancel, named(request.name))
        return empty_pb2.Empty()

    async def DeleteOperation(
        self, request: operations_pb2.DeleteOperationRequest, context: Context
    ) -> empty_pb2.Empty:
        """Forget an operation that has ended."""
        await self._calls.ask(self._control.delete, named(request.name))
        return empty_pb2.Empty()

    async def _operation(self, name: str) -> Operation:
        return await self._calls.ask(self._control.operation, named(name))


def named(name: str) -> str:
    """Return the name; InvalidRequestError for an empty one."""
    if not name:
        raise invalid("name", "is missing: give an operation's name, e.g. operations/1")
    return name
