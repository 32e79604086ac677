"""How often ``verify-merge`` fails a right merge and passes a wrong scale: tables of
docs/reference/verify-merge.md.

python -m benchmarks.merge_scale
"""

import math
import tempfile
from collections import Counter
from collections.abc import Callable
from itertools import product, starmap
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.measure import print_table
from lora_diag.deltas import FactoredDelta, Side
from lora_diag.diagnostics.verify_merge.faults import MergedLayer
from lora_diag.diagnostics.verify_merge.measure import verify
from lora_diag.diagnostics.verify_merge.record import Merge
from lora_diag.storage import open_checkpoint

SCALES = (2.0, 1.5, 16 / math.sqrt(8))
WRONG = (0.99, 0.995, 0.998, 1.002, 1.005, 1.01, 1.015, 1.02, 1.05)
PARTS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)

# name -> (W, B, A, s) -> M: the orders of arithmetic in which mergers compute W + s·B·A.
ORDERS: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "in float32": lambda w, b, a, s: (w.float() + (b.float() @ a.float()) * s).to(w.dtype),
    "in the dtype": lambda w, b, a, s: w + (b.to(w.dtype) @ a.to(w.dtype)) * s,
    "B scaled first": lambda w, b, a, s: w + (b.to(w.dtype) * s) @ a.to(w.dtype),
    "A scaled first": lambda w, b, a, s: w + b.to(w.dtype) @ (a.to(w.dtype) * s),
    "product rounded first": lambda w, b, a, s: w + ((b.float() @ a.float()) * s).to(w.dtype),
    "fused": lambda w, b, a, s: torch.addmm(w, b.to(w.dtype), a.to(w.dtype), alpha=s),
    "scale in the dtype": lambda w, b, a, s: (
        w + (b.to(w.dtype) @ a.to(w.dtype)) * torch.tensor(s, dtype=w.dtype)
    ),
}


def factors(
    size: tuple[int, int], rank: int, relative: float, s: float, dtype: torch.dtype, seed: int
):
    """Return W of rms 0.02 in a dtype, and B and A in float32 of which s·B·A has ``relative`` times
    the rms of W.
    """
    rng = torch.Generator().manual_seed(seed)
    w = (torch.randn(*size, generator=rng) * 0.02).to(dtype)
    b, a = torch.randn(size[0], rank, generator=rng), torch.randn(rank, size[1], generator=rng)
    return w, b * (relative * 0.02 / float((s * (b @ a)).square().mean().sqrt())), a


def verified(w: Tensor, m: Tensor, b: Tensor, a: Tensor, s: float, diagonal: bool = False) -> Merge:
    """Return the result of verify-merge for one layer."""
    with tempfile.TemporaryDirectory() as folder:
        sides = []
        for name, weight in (("base", w), ("merged", m)):
            save_file({"w": weight.contiguous()}, Path(folder) / f"{name}.safetensors")
            sides.append(Side(open_checkpoint(Path(folder) / f"{name}.safetensors"), "w"))
        dtypes = (sides[0].dtype, str(b.dtype).removeprefix("torch."))
        shape = (len(b), a.shape[1])
        update = FactoredDelta(
            "w", shape, lambda: (b.double() * s, a.double()), dtypes, sides[0], True, s, diagonal
        )
        return verify(MergedLayer("w", shape, *sides, (update,)))


def main() -> None:
    torch.set_num_threads(1)
    dtypes, sizes, relatives = (
        (torch.bfloat16, torch.float16, torch.float32),
        ((64, 64), (512, 512)),
        (0.001, 0.01, 0.1),
    )
    head = [
        "dtype",
        "size",
        "rms(ΔW)/rms(W)",
        "error of c",
        "right: failed",
        *(f"× {c:g}" for c in WRONG),
    ]
    print_table(" | ".join(head), starmap(row, product(dtypes, sizes, relatives)))
    rows = (
        (
            str(dtype).removeprefix("torch."),
            f"{relative:g}",
            *(smallest(dtype, relative, each) for each in PATTERNS),
        )
        for dtype, relative in product(dtypes, relatives)
    )
    print_table(" | ".join(["dtype", "rms(ΔW)/rms(W)", *PATTERNS]), rows)


# name -> rows or columns (0, 1) of 512, and their scales for c.
PATTERNS: dict[str, tuple[int, Callable[[Tensor, float], None]]] = {
    "halves of the rows": (
        0,
        lambda f, c: f.copy_(torch.where(torch.arange(512) < 256, 1 + c, 1 - c)),
    ),
    "every other row": (
        0,
        lambda f, c: f.copy_(torch.where(torch.arange(512) % 2 == 0, 1 + c, 1 - c)),
    ),
    "halves of the columns": (
        1,
        lambda f, c: f.copy_(torch.where(torch.arange(512) < 256, 1 + c, 1 - c)),
    ),
    "64 rows": (0, lambda f, c: f[128:192].fill_(1 + c)),
    "one row": (0, lambda f, c: f[100:101].fill_(1 + c)),
    "one column": (1, lambda f, c: f[100:101].fill_(1 + c)),
}


def smallest(dtype: torch.dtype, relative: float, pattern: str) -> str:
    """Return the smallest fault of a pattern that is found in every merge."""
    axis, scale = PATTERNS[pattern]
    found = "none"
    for c in reversed(PARTS):
        for seed, s in enumerate(SCALES[:2]):
            w, b, a = factors((512, 512), 8, relative, s, dtype, seed)
            lines = torch.ones(512)
            scale(lines, c)
            m = ORDERS["in float32"](
                w, b * lines[:, None] if axis == 0 else b, a * lines if axis == 1 else a, s
            )
            if not verified(w, m, b, a, s).failed:
                return found
        found = f"{c:.1%}"
    return found


def row(dtype: torch.dtype, size: tuple[int, int], relative: float) -> list[str]:
    """Return the row of one dtype, size and relative update."""
    right, passed, tried, errors = Counter(), Counter(), Counter(), []
    for s in SCALES:
        w, b, a = factors(size, 8, relative, s, dtype, seed=int(10 * s))
        for order in ORDERS.values():
            record = verified(w, order(w, b, a, s), b, a, s)
            right[record.status] += 1
            errors.append(record.scale_error)
        for at, c in enumerate(WRONG):
            order = list(ORDERS.values())[
                at % 6
            ]  # not the last: a wrong scale that is rounded is another one
            record = verified(w, order(w, b, a, s * c), b, a, s)
            tried[c] += 1
            passed[c] += record.status in {"ok", "coarse"}
    cells = [
        str(dtype).removeprefix("torch."),
        f"{size[0]}²",
        f"{relative:g}",
        f"{max(errors):.1g}",
    ]
    unclear = f", {right['inconclusive']} unclear" if right["inconclusive"] else ""
    failed = sum(right.values()) - right["ok"] - right["coarse"] - right["inconclusive"]
    cells.append(f"{failed} of {sum(right.values())}{unclear}")
    return [*cells, *(f"{passed[c]}/{tried[c]}" for c in WRONG)]


if __name__ == "__main__":
    main()
