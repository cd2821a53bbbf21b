"""The command line as a person or a script meets it: a real tiny checkpoint, exit codes and JSON."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from llama4_dist.cli.app import app
from llama4_dist.client import Client
from llama4_dist.request import Sampling
from tests.checkpoints import make_checkpoint
from tests.tokenizers_tiny import make_tokenizer

ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, "-c", "from llama4_dist.cli import main; main()"]


def environment(**changes: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA4_DIST_")}
    return {**clean, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **changes}


def run(*arguments: str, stdin: str = "", **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *arguments], input=stdin, env=environment(**changes), capture_output=True, text=True, timeout=60
    )


def here(*arguments: str, stdin: str = "") -> Result:
    """Run a command in this process: a new one costs seconds of imports."""
    return CliRunner().invoke(app, arguments, input=stdin)


@pytest.fixture(autouse=True)
def log_handlers() -> Iterator[None]:
    """Give the root logger its handlers back: a command run here points them at a stream that ends with it."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkpoint(tmp_path_factory.mktemp("model") / "tiny-scout", "scout")
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def served(model: Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    command = [*PROGRAM, "serve", "--model", str(model), "--address", "127.0.0.1:0", "--json"]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, json.loads(process.stdout.readline())
        if process.poll() is None:
            process.kill()


def test_help_comes_at_once_and_needs_no_heavy_import() -> None:
    code = (
        "import sys, time; sys.argv = ['llama4-dist', '--help']\n"
        "from llama4_dist.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = sorted({'torch', 'ray', 'grpc', 'numpy'} & set(sys.modules))\n"
        "print(time.process_time(), heavy, file=sys.stderr)"
    )
    shown = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    seconds, _, heavy = shown.stderr.strip().partition(" ")
    assert heavy == "[]"
    assert float(seconds) < 0.5  # processor time, interpreter included: wall time would measure the neighbours
    assert "serve" in shown.stdout


def test_version_and_doctor_speak_json() -> None:
    assert json.loads(here("version", "--json").stdout)["version"].count(".") == 2
    checks = {check["name"]: check["state"] for check in json.loads(here("doctor", "--json").stdout)["checks"]}
    assert checks["engine"] == checks["cluster"] == checks["protobuf"] == "ok"


def test_doctor_refuses_the_pure_python_protobuf_parser() -> None:
    done = run("doctor", "--json", PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION="python")
    assert done.returncode == 1
    assert {"protobuf": "error"}.items() <= {c["name"]: c["state"] for c in json.loads(done.stdout)["checks"]}.items()


def test_inspect_counts_what_the_config_says(model: Path) -> None:
    shown = json.loads(here("inspect", str(model), "--json").stdout)
    config = json.loads((model / "config.json").read_text())
    assert (shown["num_layers"], shown["num_experts"]) == (config["num_hidden_layers"], config["num_local_experts"])
    assert (shown["origin"], shown["part"], shown["is_sparse"]) == (None, None, False)


def test_generate_is_reproducible_and_matches_its_token_ids(model: Path) -> None:
    flags = ("--model", str(model), "--max-tokens", "8", "--temperature", "0", "--json")
    by_text = json.loads(run("generate", "the user", *flags).stdout)
    by_ids = json.loads(here("generate", "--token-ids", ",".join(map(str, by_text["prompt_token_ids"])), *flags).stdout)
    assert by_text["outputs"][0]["token_ids"] == by_ids["outputs"][0]["token_ids"]
    assert by_text["usage"]["completion_tokens"] == len(by_ids["outputs"][0]["token_ids"])


def test_slices_and_a_bound_on_memory_change_no_token(model: Path) -> None:
    flags = ("generate", "the user", "--model", str(model), "--max-tokens", "8", "--temperature", "0", "--json")
    whole = json.loads(here(*flags).stdout)
    cut = json.loads(here(*flags, "--expert-slices", "2", "--expert-memory", "200KiB").stdout)
    assert cut["outputs"][0]["token_ids"] == whole["outputs"][0]["token_ids"]


def test_tokenize_round_trips_and_keeps_special_tokens_plain(model: Path) -> None:
    shown = json.loads(here("tokenize", "--model", str(model), "--json", stdin="user <|eot|>").stdout)
    assert "".join(shown["tokens"]) == "user <|eot|>"
    assert max(shown["token_ids"]) < 256


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["serve"], 2, "model"),
        (["serve", "--model", "absent"], 3, "absent"),
        (["serve", "--model", "{model}", "--address", "0.0.0.0:0"], 2, "token_file"),
        (["serve", "--model", "{model}", "--experts", "-1"], 2, "experts"),
        (["serve", "--model", "{model}", "--token-file", "absent.txt"], 2, "absent.txt"),
        (["serve", "--model", "{model}", "--kv-cache-bytes", "10"], 2, "kv_cache_bytes"),
        (
            ["serve", "--model", "{model}", "--weights", "int8", "--device", "cuda"],
            2,
            "weights='int8' is for processors",
        ),
        (["serve", "--model", "{model}", "--expert-slices", "0"], 2, "expert_slices"),
        (["serve", "--model", "{model}", "--stages", "0"], 2, "stages"),
        (["serve", "--model", "{model}", "--tensor", "3"], 2, "num_ranks=3 does not divide num_heads"),
        (["serve", "--model", "{model}", "--experts", "1", "--stages", "99"], 2, "num_stages=99 exceeds num_layers"),
        (["generate", "hello", "--model", "{model}", "--expert-slices", "999"], 2, "expert_slices=999 does not fit"),
        (["generate", "hello", "--model", "{model}", "--expert-memory", "2XB"], 2, "'2XB' is no size"),
        (["generate", "hello"], 2, "--model"),
        (["generate", "hello", "--model", "{model}", "--server", "127.0.0.1:1"], 2, "--server"),
        (["generate", "hello", "--model", "{model}", "--temperature", "nan"], 2, "temperature"),
        (["generate", "--model", "{model}", "--token-ids", "1,x"], 2, "--token-ids"),
        (["inspect", "absent"], 3, "absent"),
        (["no-such-command"], 2, "no-such-command"),
    ],
)
def test_wrong_usage_names_the_thing_and_leaves_with_its_code(
    model: Path, arguments: list[str], code: int, named: str
) -> None:
    done = here(*(argument.format(model=model) for argument in arguments))
    assert done.exit_code == code, done.stderr
    assert named in done.stderr
    assert isinstance(done.exception, SystemExit)


def test_a_busy_port_is_named(model: Path, served: tuple[subprocess.Popen[str], dict[str, Any]]) -> None:
    done = here("serve", "--model", str(model), "--address", served[1]["address"])
    assert done.exit_code == 2
    assert served[1]["address"] in done.stderr


def test_a_command_without_its_packages_says_which_to_install() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['llama4-dist', 'inspect', 'absent']\n"
        "from llama4_dist.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "needs torch" in done.stderr
    assert "llama4-dist[serve]" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_color_is_honoured() -> None:
    done = run("inspect", "absent", FORCE_COLOR="1")
    plain = run("inspect", "absent", FORCE_COLOR="1", NO_COLOR="1")
    assert "\x1b[1;31m" in done.stderr
    assert "\x1b[1;31m" not in plain.stderr


def test_commands_reach_a_running_server(served: tuple[subprocess.Popen[str], dict[str, Any]]) -> None:
    address = served[1]["address"]
    answer = json.loads(here("chat", "hello", "--server", address, "--max-tokens", "4", "--json").stdout)
    assert answer["usage"]["completion_tokens"] <= 4
    ids = json.loads(here("tokenize", "the user", "--server", address, "--json").stdout)
    assert "".join(ids["tokens"]) == "the user"


def test_sigterm_lets_a_running_stream_end(served: tuple[subprocess.Popen[str], dict[str, Any]]) -> None:
    process, ready = served
    with Client(ready["address"]) as client:
        stream = client.stream_generate([5, 6, 7], Sampling(max_tokens=60, ignore_eos=True, temperature=0.0))
        deltas = iter(stream)
        next(deltas)
        process.send_signal(signal.SIGTERM)
        for _ in deltas:
            pass
        assert stream.completion.usage.completion_tokens == 60
    begun = time.monotonic()
    assert process.wait(60) == 0
    assert time.monotonic() - begun < 20


def test_a_gateway_waits_for_its_cluster_no_longer_than_told(model: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("0123456789abcdef0123456789abcdef")
    (tmp_path / "secret").chmod(0o600)
    began = time.monotonic()
    answer = run(
        *("gateway", "--model", str(model), "--directory", "127.0.0.1:9", "--address", "127.0.0.1:0", "--json"),
        LLAMA4_DIST_DIRECTORY_TIMEOUT_S="0.5",
        LLAMA4_DIST_CLUSTER_SECRET_FILE=str(tmp_path / "secret"),
    )
    assert answer.returncode == 4, answer.stdout + answer.stderr
    assert time.monotonic() - began < 30, "the default would be 60 s"
