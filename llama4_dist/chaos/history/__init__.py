"""The record of a run, token by token, and its judgement by somebody who was not there."""

from llama4_dist.chaos.history.events import Event, EventKind, HistoryError, read_history, reference_key
from llama4_dist.chaos.history.recorder import History, Recorder, changed_fields, recorded_async_stream, recorded_stream

__all__ = [
    "Event",
    "EventKind",
    "History",
    "HistoryError",
    "Recorder",
    "changed_fields",
    "read_history",
    "recorded_async_stream",
    "recorded_stream",
    "reference_key",
]
