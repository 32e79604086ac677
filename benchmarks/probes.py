"""Probes with default options on a real model: wall and processor time, memory, and what was
reduced, as Markdown.

    python -m benchmarks.probes BASE TUNED TRAIN.txt EVAL.txt --length 64
    python -m benchmarks.probes BASE TUNED TRAIN.txt EVAL.txt --length 64 --only curvature
    sensitivity

One run each, an hour in all: each is meant to take ten minutes on two cores that are otherwise
idle. Of ``tune`` with ``--time 20m`` the plan, which is printed if the smallest search fits.
"""

import argparse
import json
from pathlib import Path

from benchmarks.__main__ import FOLDER, LORADIAG
from benchmarks.measure import machine, print_table, run


def main() -> None:
    """Run the probes, and print a row for each."""
    parser = argparse.ArgumentParser()
    for name in ("base", "tuned", "train", "evaluate"):
        parser.add_argument(name)
    parser.add_argument("--length", default="64")
    parser.add_argument("--only", nargs="*")
    given = parser.parse_args()
    pair, data = [given.base, given.tuned], ["--data", given.train]
    probes = {
        "curvature": pair,
        "sensitivity": [given.base, *data],
        "intrinsic": [given.base, *data],
        "truncation": pair,
        "strength": pair,
        "fisher": [*pair, *data],
    }
    FOLDER.mkdir(exist_ok=True)
    rows = []
    for name, words in probes.items():
        if given.only and name not in given.only:
            continue
        output = FOLDER / f"probe-{name}.jsonl"
        texts = ["--eval", given.evaluate, "--length", given.length]
        used = run([*LORADIAG, "probe", name, *words, *texts, "-o", output, "--overwrite", "-q"])
        first, *records = map(json.loads, Path(output).read_text().splitlines())
        reduced = "; ".join(first["settings"].get("reduced", ["nothing"]))
        products = sum(record.get("products", 0) for record in records)
        note = f"{reduced}{f'; {products} products for λ and μ' if products else ''}"
        rows.append((name, f"{used.wall:.0f}", f"{used.cpu:.0f}", f"{used.peak_mib:.0f}", note))
    print_table("probe | wall s | processor s | peak MiB | reduced", rows)
    plan = [
        "tune",
        given.base,
        *data,
        "--eval",
        given.evaluate,
        "--params",
        "2.5M",
        "--time",
        "20m",
        "--dry-run",
    ]
    if not given.only or "tune" in given.only:
        used = run([*LORADIAG, *plan, "-o", FOLDER / "tune"])
        print(f"\ntune --time 20m, 512 tokens: planned in {used.wall:.0f} s")
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
