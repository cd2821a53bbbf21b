"""The cluster and experts commands as an operator or a script meets them, against a real admin server."""

import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from cluster.admin.settings import AdminSettings
from llama4_dist.cli.app import app
from llama4_dist.cli.flags import parse_bytes, parse_seconds
from tests.cluster.admin_serving import Served, admin_serving
from tests.cluster.memory_control import MemoryControl
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, "-c", "from llama4_dist.cli import main; main()"]


def environment(**changes: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA4_DIST_")}
    return {**clean, "PYTHONPATH": str(ROOT), "COLUMNS": "120", "LINES": "40", **changes}


@contextmanager
def started(*arguments: str, **streams: int) -> Iterator[subprocess.Popen[str]]:
    """Run a command beside the test; what still runs at the end, because an assertion failed, is killed."""
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    no_colour = options.pop("no_colour", 0)
    env = environment(TERM="xterm-256color", **({"NO_COLOR": "1"} if no_colour else {}))
    with subprocess.Popen([*PROGRAM, *arguments], env=env, text=True, **options) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


@pytest.fixture
def control() -> MemoryControl:
    return MemoryControl(by_itself=True)


@pytest.fixture
def served(control: MemoryControl) -> Iterator[Served]:
    with admin_serving(control) as running:
        yield running


def here(served: Served, *arguments: str) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(app, [*arguments, "--server", served.address], env={"COLUMNS": "160"})


def test_status_shows_every_process(served: Served) -> None:
    shown = here(served, "cluster", "status")
    assert shown.exit_code == 0, shown.output
    for word in ("controller", "attention-0", "expert-3", "unix:/run/expert-3", "ready", "epoch 1", "4 expert hosts"):
        assert word in shown.stdout
    cluster = json.loads(here(served, "cluster", "status", "--json").stdout)
    assert [worker["worker"] for worker in cluster["workers"]][:3] == ["controller", "attention-0", "expert-0"]
    assert cluster["workers"][2]["num_experts"] == 4


def test_scale_follows_the_operation_to_its_summary(served: Served, control: MemoryControl) -> None:
    shown = here(served, "cluster", "scale", "--experts", "6")
    assert shown.exit_code == 0, shown.output
    for word in ("4 → 6 (+expert-4, +expert-5)", "done", "2.5 ms", "1.500 → 1.250", "one link was slow"):
        assert word in shown.stdout
    assert "planning is over" in shown.stderr
    assert control.view().epoch == 2
    again = json.loads(here(served, "cluster", "scale", "--experts", "3", "--json").stdout)
    assert (again["phase"], again["done"], again["change"]["removed"]) == (
        "done",
        True,
        ["expert-3", "expert-4", "expert-5"],
    )


def test_a_dry_run_shows_the_plan_and_changes_nothing(served: Served, control: MemoryControl) -> None:
    for command in (("scale", "--experts", "6"), ("rebalance",), ("drain", "expert-2")):
        shown = here(served, "cluster", *command, "--dry-run")
        assert shown.exit_code == 0, shown.output
        assert "nothing was changed" in shown.stdout
    assert json.loads(here(served, "cluster", "scale", "--experts", "6", "--dry-run", "--json").stdout)["validate_only"]
    assert control.operations() == ()


def test_no_wait_returns_at_once_and_the_operation_is_listed_and_cancelled(
    served: Served, control: MemoryControl
) -> None:
    control.by_itself = False
    begun = json.loads(here(served, "cluster", "scale", "--experts", "6", "--no-wait", "--json").stdout)
    assert (begun["phase"], begun["done"]) == ("planning", False)
    assert begun["name"] in here(served, "cluster", "operations").stdout
    assert "rolling back" in here(served, "cluster", "cancel", begun["name"].removeprefix("operations/")).stdout
    control.finish()
    (listed,) = json.loads(here(served, "cluster", "operations", "--json").stdout)
    assert (listed["name"], listed["phase"], listed["error_reason"]) == (begun["name"], "cancelled", "CANCELLED")


def test_no_operation_is_said_so(served: Served) -> None:
    assert "no operation" in here(served, "cluster", "operations").stdout
    assert json.loads(here(served, "cluster", "operations", "--json").stdout) == []


def test_a_repeated_request_id_finds_the_first_operation(served: Served, control: MemoryControl) -> None:
    first, second = (
        json.loads(here(served, "cluster", "scale", "--experts", "6", "--request-id", "once", "--json").stdout)
        for _ in range(2)
    )
    assert first["name"] == second["name"]
    assert len(control.operations()) == 1


def test_drain_and_rebalance_do_theirs(served: Served, control: MemoryControl) -> None:
    assert here(served, "cluster", "drain", "expert-1", "--drain-timeout", "5s").exit_code == 0
    assert "expert-1" not in [worker.worker for worker in control.view().workers]
    assert here(served, "cluster", "rebalance").exit_code == 0
    assert [operation.kind.value for operation in control.operations()] == ["rebalance", "drain"]


def test_a_failed_change_leaves_with_its_code_and_why(served: Served, control: MemoryControl) -> None:
    control.failure = "expert-4 ended while it loaded"
    shown = here(served, "cluster", "scale", "--experts", "6")
    assert shown.exit_code == 1
    assert "WORKER_LOST: expert-4 ended while it loaded" in shown.stdout
    as_json = here(served, "cluster", "scale", "--experts", "6", "--json")
    assert as_json.exit_code == 1
    assert json.loads(as_json.stdout)["error_reason"] == "WORKER_LOST"


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (("scale", "--experts", "0"), 2, "target_hosts"),
        (("scale", "--experts", "-1"), 2, "target_hosts"),
        (("scale", "--experts", "9"), 1, "room for 1 to 8"),
        (("scale",), 2, "--experts"),
        (("scale", "--experts", "6", "--drain-timeout", "soon"), 2, "--drain-timeout"),
        (("drain", "nobody"), 2, "nobody"),
        (("cancel", "77"), 2, "operations/77"),
    ],
)
def test_wrong_usage_names_the_thing(served: Served, arguments: tuple[str, ...], code: int, named: str) -> None:
    done = here(served, "cluster", *arguments)
    assert done.exit_code == code, done.output
    assert named in done.stderr
    assert isinstance(done.exception, SystemExit)


def test_a_second_change_is_told_the_first(served: Served, control: MemoryControl) -> None:
    control.by_itself = False
    name = json.loads(here(served, "cluster", "rebalance", "--no-wait", "--json").stdout)["name"]
    refused = here(served, "cluster", "scale", "--experts", "5", "--json")
    assert refused.exit_code == 1
    error = json.loads(refused.stdout)["error"]
    assert error["reason"] == "OPERATION_IN_PROGRESS"
    assert name in error["message"]


def test_nobody_there_is_exit_code_4(served: Served, control: MemoryControl) -> None:
    control.away = True
    assert here(served, "cluster", "status").exit_code == 4
    done = CliRunner().invoke(app, ["cluster", "watch", "--server", "127.0.0.1:1", "--json"])
    assert done.exit_code == 4


def test_the_token_comes_from_the_flag_or_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("admin admin-token-0123456789\nnormal-token-0123456789\n")
    file.chmod(0o600)
    with admin_serving(MemoryControl(), AdminSettings(token_file=file)) as served:
        assert here(served, "cluster", "status", "--token", "admin-token-0123456789").exit_code == 0
        assert here(served, "cluster", "status", "--token", "normal-token-0123456789").exit_code == 1
        by_environment = CliRunner().invoke(
            app,
            ["cluster", "status", "--server", served.address],
            env={"LLAMA4_DIST_TOKEN": "admin-token-0123456789"},
        )
        assert by_environment.exit_code == 0


def test_top_once_shows_digits_bars_and_a_legend(served: Served, control: MemoryControl) -> None:
    shown = here(served, "experts", "top", "--once", "--interval", "50ms")
    assert shown.exit_code == 0, shown.output
    for word in ("layer", "max/mean", "· idle", "expert-0", "rows/s", "busy", "queue"):
        assert word in shown.stdout
    loads = json.loads(here(served, "experts", "top", "--json", "--interval", "0.05", "--layer", "3").stdout)
    assert {one["layer"] for one in loads["experts"]} == {3}
    assert [one["host"] for one in loads["hosts"]] == [f"expert-{index}" for index in range(4)]
    assert (
        "no expert is placed" in here(served, "experts", "top", "--once", "--layer", "2", "--interval", "50ms").stdout
    )


@pytest.mark.parametrize(("given", "seconds"), [("1s", 1.0), ("500ms", 0.5), ("2.5", 2.5), ("3s ", 3.0)])
def test_times_are_read(given: str, seconds: float) -> None:
    assert parse_seconds(given) == seconds


@pytest.mark.parametrize(
    ("given", "num_bytes"),
    [("2GB", 2_000_000_000), ("1.5 GiB", 3 << 29), ("512MiB", 512 << 20), ("64k", 64_000), ("7B", 7), ("123", 123)],
)
def test_sizes_are_read(given: str, num_bytes: int) -> None:
    assert parse_bytes(given) == num_bytes


@pytest.mark.parametrize("given", ["", "GB", "-1", "2XB", "2 GBs", "1e9"])
def test_what_is_no_size_is_refused(given: str) -> None:
    with pytest.raises(typer.BadParameter, match="is no size: give"):
        parse_bytes(given)


def test_watch_prints_a_line_for_every_change_and_ends_cleanly(served: Served, control: MemoryControl) -> None:
    control.by_itself = False
    with started("cluster", "watch", "--json", "--server", served.address) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())["operation"] == ""
        name = control.scale(6).name
        assert json.loads(process.stdout.readline())["operation"] == name
        control.finish()
        assert json.loads(process.stdout.readline())["epoch"] == 2
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert process.stderr.read() == ""


def read_until(descriptor: int, word: str, timeout_s: float = 20.0) -> str:
    """Read a terminal until it showed the word."""
    shown, deadline_s = b"", time.monotonic() + timeout_s
    while word.encode() not in shown and (left_s := deadline_s - time.monotonic()) > 0:
        if select.select([descriptor], [], [], left_s)[0]:
            shown += os.read(descriptor, 65536)
    assert word.encode() in shown, shown
    return shown.decode(errors="replace")


@pytest.mark.parametrize("no_colour", [False, True])
@pytest.mark.parametrize(
    ("arguments", "word"),
    [(("experts", "top", "--interval", "100ms"), "max/mean"), (("cluster", "watch"), "expert-3")],
)
def test_a_live_view_draws_on_a_terminal_and_ends_with_ctrl_c(
    served: Served, control: MemoryControl, arguments: tuple[str, ...], word: str, no_colour: bool
) -> None:
    stop = threading.Event()

    def work() -> None:
        while not stop.wait(0.01):
            for pair, hosts in control.placement().hosts_of.items():
                control.add_rows(hosts[0], pair, 1 + pair[1])

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    with started(*arguments, "--server", served.address, stdin=child, stdout=child, no_colour=no_colour) as process:
        os.close(child)
        shown = read_until(parent, word)
        process.send_signal(signal.SIGINT)
        try:
            while chunk := os.read(parent, 65536):
                shown += chunk.decode(errors="replace")
        except OSError:
            pass  # the terminal's other end is closed
        assert process.wait(60) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
    stop.set()
    worker.join()
    os.close(parent)
    coloured = "\x1b[38;" in shown or "48;" in shown or "\x1b[32m" in shown
    assert coloured is not no_colour


def test_ctrl_c_leaves_the_operation_running_and_says_so(served: Served, control: MemoryControl) -> None:
    control.by_itself = False
    with started("cluster", "scale", "--experts", "6", "--server", served.address) as process:
        wait_until(lambda: bool(control.operations()))
        control.advance()
        assert process.stderr is not None
        shown = process.stderr.readline()
        assert "planning is over" in shown, "it follows the operation"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        rest = process.stderr.read()
    assert "operations/1 goes on" in rest
    assert "Traceback" not in rest
    assert control.view().operation == "operations/1"


def test_a_controller_that_goes_away_meanwhile_is_said_so(served: Served, control: MemoryControl) -> None:
    control.by_itself = False
    with started("cluster", "scale", "--experts", "6", "--server", served.address) as process:
        wait_until(lambda: bool(control.operations()))
        control.away = True
        assert process.wait(60) == 4
        assert process.stderr is not None
        assert "`llama4-dist cluster operations` shows it later" in process.stderr.read()


def test_a_watch_outlives_an_absent_controller(served: Served, control: MemoryControl) -> None:
    with started("cluster", "watch", "--server", served.address) as process:
        assert process.stdout is not None
        first = read_until(process.stdout.fileno(), "expert-3")
        assert "not answering" not in first
        control.away = True
        read_until(process.stdout.fileno(), "not answering (CONTROLLER_LOST)")
        control.away = False
        control.scale(6)
        control.finish()
        read_until(process.stdout.fileno(), "6 expert hosts")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


def test_the_commands_import_nothing_heavy_before_they_run() -> None:
    code = (
        "import sys\n"
        "from llama4_dist.cli.app import app\n"
        "from typer.testing import CliRunner\n"
        "for words in ('', 'cluster', 'cluster scale', 'experts', 'experts top'):\n"
        "    assert CliRunner().invoke(app, [*words.split(), '--help']).exit_code == 0, words\n"
        "print(sorted({'torch', 'ray', 'grpc', 'numpy', 'cluster', 'google'} & set(sys.modules)))\n"
        "import llama4_dist.cli.cluster_changes, llama4_dist.cli.experts_top\n"
        "print(sorted({'torch', 'ray', 'numpy', 'cluster'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]
