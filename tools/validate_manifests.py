"""Builds every overlay and checks it without a cluster; exit status 1 with each finding where one is wrong.

`--crd FILE` (several times) validates custom resources against real CustomResourceDefinitions instead of our schemas.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from llama4_dist.errors import ConfigError
from tools.manifests.commands import check_commands
from tools.manifests.network import check_network
from tools.manifests.objects import Overlay, build
from tools.manifests.probes import check_probes
from tools.manifests.references import check_references
from tools.manifests.rules import check_rules
from tools.manifests.schemas import Crds, check_schemas, read_crds
from tools.manifests.security import check_security
from tools.manifests.sizes import check_sizes

ROOT = Path(__file__).resolve().parents[1]
OVERLAYS = ROOT / "deploy" / "kubernetes" / "overlays"
CHECKS: Mapping[str, Callable[[Overlay], Iterator[str]]] = {
    "references": check_references,
    "probes": check_probes,
    "security": check_security,
    "network": check_network,
    "sizes": check_sizes,
    "rules": check_rules,
}


def findings(overlay: Overlay, crds: Crds) -> list[str]:
    """Return everything that is wrong with an overlay; later checks rely on what schemas and commands demand."""
    wrong = [f"schema: {finding}" for finding in check_schemas(overlay, crds)]
    wrong = wrong or [f"commands: {finding}" for finding in check_commands(overlay)]
    return wrong or [f"{name}: {finding}" for name, check in CHECKS.items() for finding in check(overlay)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the overlays named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overlays", nargs="*", type=Path, help="folders; default: all of deploy/kubernetes/overlays")
    parser.add_argument("--crd", action="append", default=[], type=Path, help="file with CustomResourceDefinitions")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    options = parser.parse_args(arguments)
    crds, console, answers = read_crds(options.crd), Console(), {}
    for folder in options.overlays or sorted(path for path in OVERLAYS.iterdir() if path.is_dir()):
        try:
            answers[str(folder)] = findings(build(folder), crds)
        except subprocess.CalledProcessError as error:
            answers[str(folder)] = [f"kustomize: {error.stderr.decode(errors='replace').strip()}"]
        except ConfigError as error:
            answers[str(folder)] = [f"plan: {error.message}"]
    if options.json:
        print(json.dumps(answers))
    else:
        for name, wrong in answers.items():
            console.print(
                f"[bold]{name}[/]: {'[red]' + str(len(wrong)) + ' findings[/]' if wrong else '[green]good[/]'}"
            )
            for finding in wrong:
                console.print(f"  {finding}", markup=False, highlight=False, soft_wrap=True)
    return 1 if any(answers.values()) else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
