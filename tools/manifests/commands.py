"""Parses every container's command with the command line's own parser, and its settings with the settings' own."""

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from llama4_dist.cli.app import app
from llama4_dist.errors import ConfigError
from llama4_dist.settings import ServeSettings, load_settings
from tools.manifests.objects import Object, Overlay, Pod

OURS, DRIVER, HUB = "llama4-dist", "llama4-driver", "hf"
VARIABLES = {"POD_IP": "10.0.0.1"}


def check_commands(overlay: Overlay) -> Iterator[str]:
    """Yield commands that do not exist, flags they do not take and settings that are refused."""
    for pod in overlay.pods():
        for container in pod.containers:
            for words in commands_of(container):
                problem = parse(words)
                if problem:
                    yield f"{pod.name}: {container['name']}: {problem}"
            yield from (f"{pod.name}: {problem}" for problem in _settings_problems(overlay, pod, container))


def commands_of(container: Object) -> Iterator[list[str]]:
    """Yield the commands of a container and of its probes; Ray's own are KubeRay's."""
    if container.get("args"):
        yield [expand(word, container) for word in container["args"]]
    for kind in ("startup", "liveness", "readiness"):
        command = container.get(f"{kind}Probe", {}).get("exec", {}).get("command")
        if command:
            yield command


def expand(word: str, container: Object) -> str:
    """Put in what Kubernetes would for $(NAME)."""
    values = VARIABLES | {one["name"]: one["value"] for one in container.get("env", ()) if "value" in one}
    return re.sub(r"\$\(([A-Za-z_]+)\)", lambda found: values.get(found[1], found[0]), word)


def parse(words: Sequence[str]) -> str:
    """Return what is wrong with a command line; nothing is run."""
    program, *arguments = words
    if program == HUB:
        return "" if arguments[:1] == ["download"] and len(arguments) >= 2 else f"hf {arguments} fetches nothing"
    if program not in (OURS, DRIVER):
        return f"{program} is no program of the image"
    arguments = arguments if program == OURS else ["serve", *arguments]
    try:
        flags_of(arguments)
    except TyperException as error:
        return f"`{' '.join(words)}`: {message_of(error)}"
    return ""


def flags_of(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the flags of the innermost command; raise TyperException as the program itself would."""
    command: Any = typer.main.get_command(app)
    context = command.make_context(OURS, list(arguments))
    while isinstance(command, TyperGroup):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, list(rest), parent=context)
    return dict(context.params)


def message_of(error: Exception) -> str:
    """Return an error's own words."""
    return str(getattr(error, "message", error))


def settings_of(overlay: Overlay, pod: Pod, container: Object) -> ServeSettings | None:
    """Return what a serving container's file, environment and flags say together; None for other containers."""
    words = next(commands_of(container), [])
    if words[:1] != [DRIVER] and words[:2] != [OURS, "gateway"]:
        return None
    flags = flags_of(["serve", *words[1:]] if words[0] == DRIVER else words[1:])
    file = flags.pop("config")
    flags.pop("as_json")
    text = _mounted(overlay, pod, container, file)
    environment = {one["name"]: one["value"] for one in container.get("env", ()) if "value" in one}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as written:
        written.write(text)
        written.flush()
        return load_settings(flags, file=Path(written.name), environ=environment)


def _settings_problems(overlay: Overlay, pod: Pod, container: Object) -> Iterator[str]:
    try:
        settings_of(overlay, pod, container)
    except (ConfigError, TyperException) as error:
        yield f"{container['name']}: {message_of(error)}"


def _mounted(overlay: Overlay, pod: Pod, container: Object, file: Path) -> str:
    """Return the text of a ConfigMap's key that is mounted at `file`."""
    mounts = {mount["mountPath"]: mount["name"] for mount in container.get("volumeMounts", ())}
    volumes: Mapping[str, Object] = {volume["name"]: volume for volume in pod.spec.get("volumes", ())}
    volume = volumes.get(mounts.get(str(file.parent), ""), {})
    name = volume.get("configMap", {}).get("name")
    for one in overlay.of("ConfigMap"):
        if one["metadata"]["name"] == name and file.name in one.get("data", {}):
            return str(one["data"][file.name])
    raise ConfigError(f"--config={file} is no key of a ConfigMap that is mounted there")
