"""The systemd units: their flags exist, and their commands make a cluster that outlives its driver on this machine."""

import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import ray
import yaml

from llama4_dist.client import Client, ConnectOptions
from llama4_dist.deploy.overlay_file import read_overlay
from llama4_dist.deploy.plan_file import read_plan
from llama4_dist.deploy.serve_files import driver_settings, gateway_settings
from llama4_dist.errors import UnavailableError
from llama4_dist.request import Sampling
from tests.checkpoints import make_checkpoint
from tests.deploy.conftest import OVERLAYS, ROOT
from tests.tokenizers_tiny import make_tokenizer
from tests.waiting import wait_until
from tools.manifests.commands import parse

UNITS = ROOT / "deploy" / "bare-metal"
PROGRAM = [sys.executable, "-c", "from llama4_dist.cli import main; main()"]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
START_S = 100
NAMES = sorted(path.name for path in UNITS.glob("*.service"))


def entries(unit: str, key: str) -> list[str]:
    return re.findall(rf"^{key}=(.*)$", (UNITS / unit).read_text(), re.MULTILINE)


def command(unit: str) -> list[str]:
    (line,) = entries(unit, "ExecStart")
    return line.split()


def variables(file: str) -> dict[str, str]:
    """Read an example of an environment file as systemd does: quotes around a value are not part of it."""
    lines = (line for line in (UNITS / file).read_text().splitlines() if line and not line.startswith("#"))
    return {name: value.strip("'") for name, _, value in (line.partition("=") for line in lines)}


@pytest.mark.parametrize("name", NAMES)
def test_a_units_variables_are_all_in_its_example(name: str) -> None:
    file = "gateway.env.example" if "gateway" in name else "ray.env.example"
    assert set(re.findall(r"\$\{([A-Za-z_]+)\}", " ".join(command(name)))) <= set(variables(file))


@pytest.mark.parametrize("name", NAMES)
def test_a_units_flags_exist(name: str) -> None:
    program, *arguments = command(name)
    arguments = [re.sub(r"\$\{[A-Za-z_]+\}", "1", word) for word in arguments]
    if Path(program).name == "llama4-dist":
        assert parse(["llama4-dist", *arguments]) == ""
        return
    answer = subprocess.run([*RAY, "start", "--help"], capture_output=True, text=True, timeout=60)
    for word in arguments[1:]:
        assert word.partition("=")[0] in answer.stdout.split() or word.partition("=")[0] in answer.stdout, word


@pytest.mark.parametrize("name", NAMES)
def test_systemd_takes_a_unit(name: str, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze here")
    (tmp_path / name).write_text((UNITS / name).read_text().replace("/opt/llama4/venv/bin/", "/bin/true "))
    ran = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / name)], capture_output=True, text=True, timeout=60
    )
    assert not [line for line in ran.stderr.splitlines() if name in line], ran.stderr


def test_a_gateways_unit_waits_for_its_longest_stream() -> None:
    (stop_s,) = entries("llama4-gateway.service", "TimeoutStopSec")
    settings = read_overlay(OVERLAYS / "scout-h100" / "deploy.yaml")
    assert int(stop_s) > settings.drain_timeout_s


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class Machine:
    """Runs units as systemd would, with ports and folders of the test's own."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.temporary = Path(tempfile.mkdtemp(prefix="l4-"))  # Ray's sockets need a short path
        self.address = ray.util.get_node_ip_address()
        self.ports = {str(port): str(free_port()) for port in (6379, 50051, 50052, 50053, 9100)}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.token = secrets.token_hex(16)
        plan, settings = (
            read_plan(OVERLAYS / "local-cpu" / "plan.json"),
            read_overlay(OVERLAYS / "local-cpu" / "deploy.yaml"),
        )
        told = {"model": str(model), "max_context": 256, "experts": 2}
        (folder / "serve.yaml").write_text(yaml.safe_dump(driver_settings(plan, settings) | told))
        (folder / "gateway.yaml").write_text(yaml.safe_dump(gateway_settings(plan, settings) | {"model": str(model)}))
        for name, text in (("secret", secrets.token_hex(32)), ("tokens", self.token)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o600)
        self.environment = self._environment()

    def _environment(self) -> dict[str, str]:
        own = {
            "NODE_ADDRESS": self.address,
            "RAY_HEAD": f"{self.address}:{self.ports['6379']}",
            "DIRECTORY": f"{self.address}:{self.ports['50053']}",
            "RAY_CPUS": "8",
            "RAY_GPUS": "0",
            "RAY_RESOURCES": json.dumps({"llama4_expert": 2, "llama4_attention": 1}),
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_TMPDIR": str(self.temporary),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("LLAMA4_DIST_", "RAY_"))}
        return clean | variables("ray.env.example") | own

    def at(self, port: int, host: str = "") -> str:
        return f"{host or self.address}:{self.ports[str(port)]}"

    def start(self, unit: str) -> None:
        environment = dict(self.environment)
        for entry in entries(unit, "Environment"):
            name, _, value = entry.partition("=")
            environment[name] = self.own(value)
        program, *arguments = command(unit)
        words = [*(RAY if Path(program).name == "ray" else PROGRAM), *(self.own(word) for word in arguments)]
        with (self.folder / f"{unit}.log").open("ab") as log:
            self.processes[unit] = subprocess.Popen(
                words, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def own(self, word: str) -> str:
        """Put in variables, and the test's own ports and folder."""
        word = re.sub(r"\$\{([A-Za-z_]+)\}", lambda found: self.environment[found[1]], word)
        word = word.replace("/etc/llama4/", f"{self.folder}/")
        return re.sub(r"(?<=[:=])(6379|50051|50052|50053|9100)$", lambda found: self.ports[found[1]], word)

    def stop(self, unit: str, number: int = signal.SIGTERM) -> int:
        process = self.processes.pop(unit)
        process.send_signal(number)
        return process.wait(timeout=60)

    def log(self) -> str:
        return "\n".join(f"== {file.name}\n{file.read_text()[-3000:]}" for file in sorted(self.folder.glob("*.log")))

    def close(self) -> None:
        family = [child for process in self.processes.values() for child in self._family(process.pid)]
        for unit in list(self.processes):
            with suppress(subprocess.TimeoutExpired):
                self.stop(unit)
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(self.temporary, ignore_errors=True)

    @staticmethod
    def _family(pid: int) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            return [process, *process.children(recursive=True)]
        return []


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    model = make_checkpoint(tmp_path / "tiny-scout", "scout")
    make_tokenizer(model)
    made = Machine(tmp_path, model)
    try:
        yield made
    finally:
        made.close()


def answer(machine: Machine) -> tuple[int, ...]:
    options = ConnectOptions(token=machine.token, timeout_s=60)
    with Client(machine.at(50051), options) as client:
        client.wait_ready(START_S)
        return client.generate([5, 6, 7, 8], Sampling(max_tokens=12, temperature=0.0)).outputs[0].token_ids


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_units_make_a_cluster_that_outlives_its_driver(machine: Machine) -> None:
    try:
        machine.start("llama4-ray-head.service")
        wait_for_port(machine, 6379)
        machine.start("llama4-gateway.service")  # before there is a cluster: it waits
        machine.start("llama4-driver.service")  # before there is a node for its workers: it waits too
        machine.start("llama4-ray-node.service")
        first = answer(machine)
        assert len(first) == 12
        with Client(machine.at(50052, "127.0.0.1")) as admin:
            assert admin.health("readiness"), "the probe that manifests use"

        machine.stop("llama4-driver.service", signal.SIGKILL)
        with Client(machine.at(50051), ConnectOptions(token=machine.token)) as client:
            wait_until(lambda: is_gone(client), "without a driver there are no workers")
            assert client.health("liveness"), "the gateway itself lives on, or Kubernetes would end it"
        machine.start("llama4-driver.service")
        assert answer(machine) == first

        assert machine.stop("llama4-gateway.service") == 0
        assert machine.stop("llama4-driver.service") == 0
    except BaseException:
        print(machine.log())
        raise


def wait_for_port(machine: Machine, port: int) -> None:
    def listens() -> bool:
        with suppress(OSError), socket.create_connection((machine.address, int(machine.ports[str(port)])), 1):
            return True
        return False

    wait_until(listens, f"something listens on {port}")


def is_gone(client: Client) -> bool:
    with suppress(UnavailableError):
        return not client.health("readiness")
    return False


def test_shell_words_of_units_need_no_quotes() -> None:
    for name in NAMES:
        (line,) = entries(name, "ExecStart")
        assert shlex.split(line) == line.split()
