"""Processor time of what each command imports, as Markdown: ``python -m benchmarks.imports``."""

import subprocess
import sys

from lora_diag import catalog

# Imports in the order in which a command does: what all share, the function, torch, and what
# measures.
CHILD = """
import importlib, pkgutil, sys, time
from lora_diag import catalog
import lora_diag.cli.app
name, times = sys.argv[1], [time.process_time()]
feature, command = {name: (feature, command) for name, feature, command in catalog.commands()}[name]
feature.function_of(command)
own_torch = "torch" in sys.modules
times.append(time.process_time())
import torch
times.append(time.process_time())
package = importlib.import_module(feature.package)
for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
    if module.name.rpartition(".")[2] not in ("figures", "show"):
        importlib.import_module(module.name)
times.append(time.process_time())
print(*times, int(own_torch))
"""


def main() -> None:
    """Print a row for each command."""
    print(
        "| command | common, s | its function, s | torch, s | its other modules, s "
        "|\n|---|---:|---:|---:|---:|"
    )
    for name, _, _ in catalog.commands():
        done = subprocess.run(
            [sys.executable, "-c", CHILD, name], capture_output=True, text=True, check=True
        )
        common, function, torch, rest, own_torch = map(float, done.stdout.split())
        steps = (common, function - common, torch - function, rest - torch)
        shown = [f"{step:.2f}" for step in steps]
        if own_torch:
            shown[2] = "in its function"
        print(f"| `{name}` | {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    main()
