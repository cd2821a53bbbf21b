"""Log lines: what an object says, what is bound, and what never gets there."""

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from llama4_dist.client import Client, ConnectOptions
from llama4_dist.errors import Llama4Error
from llama4_dist.gateway.settings import GatewaySettings
from llama4_dist.request import Sampling
from llama4_dist.telemetry.logs import bound, fields_of, json_lines
from tests.gateway.scripted_engine import ScriptedEngine
from tests.gateway.serving import byte_tokenizer, serving

TOKEN = "the-secret-token-of-a-client"
PROMPT = "attack at dawn, zanzibar"


class Lines:
    """What was logged, as objects."""

    def __init__(self) -> None:
        self.stream = io.StringIO()
        self.epoch = 3
        self.handler = logging.StreamHandler(self.stream)
        self.handler.setFormatter(json_lines(lambda: {"worker": "attention-0", "epoch": self.epoch}))

    @property
    def all(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]

    def of(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.all if line["event"] == event]


@pytest.fixture
def lines() -> Iterator[Lines]:
    lines, root = Lines(), logging.getLogger()
    level = root.level
    root.addHandler(lines.handler)
    root.setLevel(logging.DEBUG)
    yield lines
    root.removeHandler(lines.handler)
    root.setLevel(level)


log = logging.getLogger("llama4_dist.some.part")


def test_a_line_names_the_event_and_its_values_as_what_they_are(lines: Lines) -> None:
    log.warning("host_lost host=%s rows=%d after_s=%.3f cause=%s", "expert-1", 7, 0.25, OSError("gone"))
    (line,) = lines.all
    assert line["level"] == "warning"
    assert line["logger"] == "llama4_dist.some.part"
    assert line["event"] == "host_lost"
    assert line["message"] == "host_lost host=expert-1 rows=7 after_s=0.250 cause=gone"
    assert line["fields"] == {"host": "expert-1", "rows": 7, "after_s": 0.25, "cause": "gone"}
    assert (line["worker"], line["epoch"]) == ("attention-0", 3)
    assert isinstance(line["ts"], float)


def test_the_process_is_asked_for_each_line_anew(lines: Lines) -> None:
    log.info("one")
    lines.epoch = 4
    log.info("two")
    assert [line["epoch"] for line in lines.all] == [3, 4]


def test_a_message_whose_values_have_no_keys_has_no_fields(lines: Lines) -> None:
    log.info("%s of %d went wrong with key=%s", "some", 3, "x")
    log.info("all 100%% well")
    assert ["fields" in line for line in lines.all] == [False, False]
    record = logging.LogRecord("x", 20, "f", 1, "a=%s", ({"not": "a tuple"},), None)
    assert fields_of(record) == {}


def test_a_line_with_a_traceback_is_one_line(lines: Lines) -> None:
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        log.exception("step_failed request_id=%s", "r1")
    (line,) = lines.all
    assert line["request_id"] == "r1"
    assert "ValueError: first\nsecond" in line["exc_info"]


async def test_what_is_bound_is_the_tasks_own(lines: Lines) -> None:
    async def serve(request_id: str) -> None:
        with bound(request_id=request_id, trace_id=""):
            await asyncio.sleep(0.01)
            log.info("served")

    await asyncio.gather(serve("a"), serve("b"))
    log.info("served")
    assert [line.get("request_id") for line in lines.of("served")] == ["a", "b", None]
    assert all("trace_id" not in line for line in lines.all)


def test_no_token_no_prompt_and_no_answer_is_ever_logged(lines: Lines, tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(TOKEN + "\n")
    file.chmod(0o600)
    engine = ScriptedEngine()
    with serving(engine, byte_tokenizer(), GatewaySettings(token_file=file)) as served:
        with Client(served.address, ConnectOptions(token=TOKEN)) as client:
            whole = client.generate(PROMPT, Sampling(max_tokens=40), request_id="r1")
            list(client.stream_generate(PROMPT, Sampling(max_tokens=40)))
            with pytest.raises(Llama4Error):
                client.generate(PROMPT, Sampling(max_tokens=10**9))
        with (
            pytest.raises((Llama4Error, grpc.RpcError)),
            Client(served.address, ConnectOptions(token="the-wrong-token-of-a-client")) as stranger,
        ):
            stranger.generate(PROMPT, Sampling(max_tokens=1))
    written = lines.stream.getvalue()
    assert lines.of("request_ended")[0]["request_id"] == "r1"
    for secret in (TOKEN, "wrong-token", "zanzibar", whole.text, str(list(PROMPT.encode()))[1:-1]):
        assert secret not in written


def test_nothing_is_logged_per_token_above_debug(lines: Lines) -> None:
    counts = []
    with serving(ScriptedEngine(), byte_tokenizer()) as served, Client(served.address) as client:
        for max_tokens in (2, 200):
            before = len(lines.all)
            client.generate([1, 2, 3], Sampling(max_tokens=max_tokens, ignore_eos=True))
            counts.append(len([line for line in lines.all[before:] if line["level"] != "debug"]))
    assert counts[0] == counts[1]
