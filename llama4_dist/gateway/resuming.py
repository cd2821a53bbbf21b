"""Whether a stream can go on where its caller says it broke off; knows no engine and no ledger."""

from llama4_dist.errors import FieldViolation, InvalidRequestError, NotFoundError
from llama4_dist.gateway.running import RunningRequest
from llama4_dist.rpc.wire import GenerationCall, invalid


def check_resume(call: GenerationCall, resume: tuple[int, ...]) -> None:
    """Refuse a resume that names no request, or not each of its sequences."""
    if not call.request_id:
        raise invalid("request.request_id", "is missing: a resume names the request it goes on with")
    if len(resume) != call.sampling.n:
        raise out_of_range(f"has {len(resume)} entries: give one for each of the {call.sampling.n} sequences")


async def reached(running: RunningRequest, resume: tuple[int, ...]) -> None:
    """Wait for the tokens that there were; refuse to go on after tokens that were never generated."""
    while not running.caught_up and running.error is None:
        await running.changed()
    if isinstance(running.error, NotFoundError) or (running.error is not None and not running.begun):
        raise running.error
    for index, (position, produced) in enumerate(zip(resume, running.state.num_tokens, strict=True)):
        if position > produced:
            raise out_of_range(f"asks for token {position} of sequence {index}, which has {produced}: start again")


def out_of_range(description: str) -> InvalidRequestError:
    """Build the error of a resume at a place that does not exist."""
    return InvalidRequestError(
        [FieldViolation(field="resume.next_token_index", description=description)], reason="OUT_OF_RANGE"
    )
