"""False alarms of ``lint``: its findings on adapters that are known to work, each with its BASE.

``python -m benchmarks.lint_alarms FOLDER...``: every adapter below the folders, with the ``base``
next to it.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from lora_diag import lint
from lora_diag.adapters import is_adapter
from lora_diag.errors import LoradiagError
from lora_diag.linting.record import LintFinding


def find_pairs(root: Path) -> list[tuple[Path, Path]]:
    """Return the adapters below a folder with their BASE: the folder ``base`` next to them, or one
    above.
    """
    pairs = []
    for config in sorted(
        {path.parent for path in root.rglob("adapter_*")} | set(root.rglob("*.gguf"))
    ):
        bases = [parent / "base" for parent in config.parents if (parent / "base").is_dir()]
        if bases and is_adapter(config):
            pairs.append((config, bases[0]))
    return pairs


def main(roots: list[Path]) -> None:
    """Print the findings, and the number of adapters by their worst finding."""
    worst = Counter[str]()
    for adapter, base in (pair for root in roots for pair in find_pairs(root)):
        try:
            findings = lint(base, adapter).whole_of(LintFinding)
        except LoradiagError as error:
            print(f"{adapter}: cannot be read: {error}")
            worst["unreadable"] += 1
            continue
        worst[findings[0].severity if findings else "clean"] += 1
        for finding in findings:
            if finding.severity != "note":
                print(f"{adapter}: {finding.severity} {finding.id}: {finding.evidence}")
    print(", ".join(f"{count} {kind}" for kind, count in worst.most_common()))


if __name__ == "__main__":
    main([Path(word) for word in sys.argv[1:]])
