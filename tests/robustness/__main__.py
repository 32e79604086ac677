"""``python -m tests.robustness``: damage inputs at random and see what the commands make of them;
``make fuzz``.
"""

import argparse
import collections
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from tests.robustness.children import run_batch, until
from tests.robustness.kinds import KINDS
from tests.robustness.material import make

# Figures and pages take a hundred times as long as the rest.
SHARE = {"pages": 10, "words": 2}


def main() -> int:
    """Try inputs for a time, or a number of each kind; print counts and findings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--inputs", type=int, default=100, help="of each kind, each time round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument(
        "--only", type=int, help="this number of one kind alone, to see a finding again"
    )
    parser.add_argument(
        "--log", type=Path, help="append findings and counts to this file after every batch"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    # Imported here, once, so that no child pays for it.
    import lora_diag.decisions.extract.run
    import lora_diag.diagnostics.overlap.measure
    import lora_diag.diagnostics.verify_merge.measure
    import lora_diag.plots
    import lora_diag.reports.html  # noqa: F401

    tried: collections.Counter[str] = collections.Counter()
    findings = []
    with tempfile.TemporaryDirectory() as folder:
        whole = make(Path(folder))
        for turn in until(options.minutes) if options.minutes else range(1):
            for kind in options.kinds:
                size = max(1, options.inputs // SHARE.get(kind, 1))
                numbers = range(turn * size, (turn + 1) * size)
                if options.only is not None:
                    numbers = range(options.only, options.only + 1)
                done, result = run_batch(kind, numbers, options.seed, whole)
                tried[kind] += done
                findings += result
                if options.log:
                    with options.log.open("a") as log:
                        log.writelines(json.dumps(asdict(one)) + "\n" for one in result)
                        log.write(
                            json.dumps(
                                {"tried": tried, "all": tried.total(), "findings": len(findings)}
                            )
                            + "\n"
                        )
    for one in findings[:20]:
        sys.stdout.write(
            f"\n{one.kind} {one.number} (seed {options.seed}): "
            f"{' '.join(one.words)}\n{one.problem}\n"
        )
    sys.stdout.write(
        json.dumps({"tried": tried, "all": tried.total(), "findings": len(findings)}) + "\n"
    )
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
