"""Output of each tool for the same planted inputs, and its correctness; as Markdown.

    python -m tests.benchmarks.compare [PARTS] [--kohya SD_SCRIPTS]

Tools from the package index are installed in ``.bench/peers``, each in an environment of its own. kohya's scripts are
no package: they run from a checkout that you name, with its requirements installed in ``.bench/peers/kohya``; without
it their rows are left out. Needs transformers and peft (``pip install -e '.[train]'``). docs/comparison.md has the
results.
"""

import argparse
from pathlib import Path

from tests.benchmarks.compare.adapters import adapters, broken, damaged, layouts
from tests.benchmarks.compare.pairs import decay, floor
from tests.benchmarks.compare.tools import version

PARTS = {part.__name__: part for part in (floor, decay, adapters, damaged, layouts, broken)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=list(PARTS))
    parser.add_argument("--kohya", type=Path, help="a checkout of sd-scripts")
    chosen = parser.parse_args()
    names = ("mergekit", "modeldelta", "weightwatcher", "gradience", "peft", "transformers", "torch")
    print(", ".join(f"{name} {version(name)}" for name in names))
    for part in chosen.parts:
        print(f"\n### {PARTS[part].__doc__}\n", flush=True)
        PARTS[part](chosen.kohya.absolute() if chosen.kohya else None)
