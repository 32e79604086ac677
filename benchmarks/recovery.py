"""Accuracy, false positives and coverage of ``recover`` on updates that are known, rounded to
bfloat16.

    python -m benchmarks.recovery planted 5      rank 8 and σ ~ 1/i, 768², by seed
    python -m benchmarks.recovery coverage 1     of the intervals of ‖X‖, C(r) and ranks, by kind of X and W
    python -m benchmarks.recovery speed [BASE TUNED]    a planted 4096² layer, or a model; idle machine

Errors are ‖X̂_r − X‖_F/‖X‖_F against the update before rounding.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.measure import machine, print_table, run
from lora_diag.deltas import StoredDelta, pair
from lora_diag.layers.recovery import RecoveryEstimate, recover_layer
from lora_diag.records.vocabulary import Hidden
from lora_diag.storage import open_checkpoint

CPU = torch.device("cpu")
RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
SAMPLES = Path("sample_checkpoints")


def estimate(
    base: Tensor, tuned: Tensor, seed: int = 0, memory: int | None = None
) -> tuple[RecoveryEstimate, StoredDelta]:
    """Estimate one layer, through files as a user's."""
    with tempfile.TemporaryDirectory() as folder:
        sides = []
        for name, side in (("base", base), ("tuned", tuned)):
            save_file(
                {"layers.0.up_proj.weight": side.contiguous()}, Path(folder) / f"{name}.safetensors"
            )
            sides.append(open_checkpoint(Path(folder) / f"{name}.safetensors"))
        (delta,) = pair(*sides).deltas
        assert isinstance(delta, StoredDelta)
        fro = float((tuned.double() - base.double()).norm())
        return recover_layer(delta, fro, RANKS, seed, CPU, memory), delta


def truncated(matrix: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def gap(found: Tensor, x: Tensor) -> float:
    return float((found.double() - x.double()).norm() / x.double().norm())


def weight(m: int, n: int, rng: np.random.Generator, kind: str = "normal") -> Tensor:
    """Return a start of training: ``normal``, ``t3``, ``uniform``, or normal with ``outliers`` or
    unequal ``rows``.
    """
    w = rng.normal(size=(m, n)) * 0.02
    if kind == "t3":
        w = rng.standard_t(3, size=(m, n)) * 0.02 / math.sqrt(3)
    elif kind == "uniform":
        w = rng.uniform(-0.035, 0.035, (m, n))
    elif kind == "outliers":
        w[:, 7] *= 50
        w[3] *= 20
    elif kind == "rows":
        w *= np.exp(0.7 * rng.normal(size=(m, 1)))
    return torch.from_numpy(w)


def bf16_weight(m: int, n: int, rng: np.random.Generator) -> Tensor:
    return weight(m, n, rng).bfloat16().float()


def update(m: int, n: int, kind: str, rms: float, rng: np.random.Generator) -> Tensor:
    """Return X.

    Args:
        m: Rows.
        n: Columns.
        kind: ``rank R``, ``1/i``, ``noise``, ``flat`` or ``t3`` noise; ``rank R + noise`` has half
            of the energy in each. ``, rows`` and ``, both`` multiply rows, or rows and columns, by
            log-normal numbers, ``, few rows`` divides seven eighths of the rows by 5, and
            ``, t3 columns`` has t-distributed columns.
        rms: Root mean square of its entries.
        rng: Random numbers.
    """
    base, _, scales = kind.partition(", ")
    if base == "1/i":
        u, v = (np.linalg.qr(rng.normal(size=(k, min(m, n))))[0] for k in (m, n))
        x = (u / np.arange(1, min(m, n) + 1)) @ v.T
    elif base == "noise":
        x = rng.normal(size=(m, n))
    elif base == "flat":
        x = rng.uniform(-1.0, 1.0, (m, n))
    elif base == "t3":
        x = rng.standard_t(3, (m, n))
    else:
        rank = int(base.split()[1])
        right = (
            rng.standard_t(3, (rank, n)) if scales == "t3 columns" else rng.normal(size=(rank, n))
        )
        x = rng.normal(size=(m, rank)) @ right / math.sqrt(rank)
        if base.endswith("noise"):
            x = x + rng.normal(size=(m, n))
    if scales == "rows":
        x = x * np.exp(rng.normal(size=(m, 1)))
    elif scales == "both":
        x = x * np.exp(0.7 * rng.normal(size=(m, 1))) * np.exp(0.7 * rng.normal(size=(1, n)))
    elif scales == "few rows":
        x[m // 8 :] /= 5
    return torch.from_numpy(x * rms / math.sqrt((x**2).mean())).float()


def compared(w: Tensor, x: Tensor, rank: int, seed: int = 0) -> dict[str, float | str]:
    """Return the estimate from round(W + X) with the true values."""
    t = (w + x).bfloat16()
    result, _ = estimate(w.bfloat16(), t, seed)
    hidden, d = result.hidden, t.float() - w
    whole = float(x.double().norm())
    plain = gap(truncated(d, rank), x)
    return {
        "unchanged": hidden.unchanged,
        "norm": hidden.fro_estimate / whole if hidden.fro_estimate else math.nan,
        "files": float(d.double().norm()) / whole,
        "best": gap(truncated(x, rank), x),
        "svd": plain,
        "recovered": gap(truncated(result.matrix(), rank), x)
        if hidden.status == "recovered"
        else plain,
        "status": hidden.status,
        "rule": hidden.rule or "",
    }


def planted(seeds: int = 5) -> None:
    """Print errors of rank 8 by seed, and their mean and largest."""
    print_table(
        "update | seed | unchanged | ‖X‖ | ‖D‖ | best r = 8 | SVD of D | recovered | verdict",
        _planted_rows(seeds),
    )


def _planted_rows(seeds: int) -> Iterator[tuple[object, ...]]:
    for kind, rms in (("rank 8", 3e-5), ("rank 8", 1e-5), ("rank 8", 3e-6), ("1/i", 1e-5)):
        errors = []
        for seed in range(100, 100 + seeds):
            rng = np.random.default_rng(seed)
            w, x = bf16_weight(768, 768, rng), update(768, 768, kind, rms, rng)
            got = compared(w, x, 8, seed)
            errors.append(float(got["recovered"]))
            sizes = (f"{got[name]:.3f}" for name in ("norm", "files", "best", "svd"))
            verdict = f"{got['status']} {got['rule']}"
            yield (
                f"{kind}, {rms:g}",
                seed,
                f"{got['unchanged']:.1%}",
                *sizes,
                f"{got['recovered']:.4f}",
                verdict,
            )
        yield (
            f"{kind}, {rms:g}",
            "mean, worst",
            *[""] * 5,
            f"{np.mean(errors):.4f}, {max(errors):.4f}",
            "",
        )


def whole(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def real_updates() -> Iterator[tuple[Tensor, Tensor]]:
    """Yield W and X of the sample model's fine-tune."""
    before, after = (whole(SAMPLES / side) for side in ("base", "full_ft"))
    for name, w in before.items():
        if (
            w.dim() == 2
            and min(w.shape) > 32
            and not any(part in name for part in ("embed", "head", "norm"))
        ):
            yield w.float(), after[name].float() - w.float()


# X of ``coverage``, and W, start and root mean square of X for each.
PLAIN = ("rank 1", "rank 2", "rank 4", "rank 8", "rank 8 + noise", "1/i", "noise", "flat", "t3")
UPDATES = (
    *PLAIN,
    "rank 4, rows",
    "rank 4, both",
    "rank 4, few rows",
    "rank 2, t3 columns",
    "noise, both",
)
SETTINGS = (
    ("normal", "stored", 1e-5),
    ("normal", "stored", 3e-6),
    ("normal", "rounded", 2e-5),
    ("outliers", "rounded", 1e-5),
    ("t3", "stored", 6e-6),
    ("rows", "stored", 1e-5),
)


@dataclass(slots=True)
class Covered:
    """Which intervals hold the truth."""

    layers: int = 0
    norms: list[bool] = field(default_factory=list)
    halves: list[float] = field(default_factory=list)
    curves: list[bool] = field(default_factory=list)
    ranks: list[bool] = field(default_factory=list)

    def add(self, hidden: Hidden, x: Tensor) -> None:
        self.layers += 1
        if hidden.status not in ("recovered", "size_only"):
            return
        assert hidden.fro_interval is not None
        s = torch.linalg.svdvals(x.double()).numpy()
        low, high = hidden.fro_interval
        self.norms.append(low <= math.sqrt((s**2).sum()) <= high)
        self.halves.append(math.log(high / low) / 2)
        if hidden.energy_interval is None or hidden.rank_at_interval is None:
            return
        curve = np.cumsum(s**2) / (s**2).sum()
        for r in RANKS[:6]:
            low, high = hidden.energy_interval[str(r)]
            self.curves.append(low - 1e-9 <= curve[r - 1] <= high + 1e-9)
        least, most = hidden.rank_at_interval["0.9"]
        true = int(np.searchsorted(curve, 0.9)) + 1
        self.ranks.append((least or len(s)) <= true <= (most or len(s)))

    def row(self, label: str) -> list[str]:
        half = f"{np.median(self.halves):.1%}" if self.halves else "-"
        words = [
            f"{sum(v)} of {len(v)}" if v else "-" for v in (self.norms, self.curves, self.ranks)
        ]
        refused = f"{self.layers - len(self.norms)} of {self.layers}"
        return [label, refused, words[0], half, *words[1:]]


def measure_coverage(seeds: int, first: int) -> dict[str, Covered]:
    """Return which intervals hold the truth: by kind of X, by setting, and in layers of the sample
    model.
    """
    by: dict[str, Covered] = {}

    def measure(w: Tensor, x: Tensor, start: str, seed: int, *labels: str) -> None:
        origin = w.bfloat16().double() if start == "stored" else w.double()
        hidden = estimate(w.bfloat16(), (origin + x.double()).float().bfloat16(), seed)[0].hidden
        for label in labels:
            by.setdefault(label, Covered()).add(hidden, x)

    for kind in UPDATES:
        for shape, start, rms in SETTINGS:
            for seed in range(first, first + seeds):
                rng = np.random.default_rng(
                    [seed, UPDATES.index(kind), SETTINGS.index((shape, start, rms))]
                )
                w, x = weight(128, 160, rng, shape), update(128, 160, kind, rms, rng)
                measure(w, x, start, seed, f"X: {kind}", f"W: {shape}, {start}, {rms:g}", "planted")
    for i, (w, x) in enumerate(islice(real_updates(), 14)):
        for c, start in ((0.01, "stored"), (0.003, "stored"), (0.01, "rounded")):
            measure(w, x * c, start, i, f"sample model, {start}, c = {c:g}")
    return by


def coverage(seeds: int = 1, first: int = 9000) -> None:
    head = (
        "layers | refused | ‖X‖ in its interval | ± | C(r) in its interval | r@90% in its interval"
    )
    print_table(
        head, (covered.row(label) for label, covered in measure_coverage(seeds, first).items())
    )


def speed(*model: str) -> None:
    """Print the time of records and of a whole recovered checkpoint: of a model, or of a planted
    4096² layer.
    """
    print(machine())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sides = [Path(side) for side in model] or [
            folder / "base.safetensors",
            folder / "tuned.safetensors",
        ]
        if not model:
            rng = np.random.default_rng(0)
            w, x = bf16_weight(4096, 4096, rng), update(4096, 4096, "rank 8", 1e-5, rng)
            for file, weights in zip(sides, (w, w + x), strict=True):
                save_file({"layers.0.up_proj.weight": weights.bfloat16()}, file)
        command = [sys.executable, "-m", "lora_diag", "recover", "-q", *sides]
        outputs = {
            "records": ["-o", folder / "records.jsonl"],
            "checkpoint": ["--checkpoint", "-o", folder / "whole"],
        }
        used = ((what, run([*command, *words])) for what, words in outputs.items())
        rows = (
            (what, f"{each.wall:.0f}", f"{each.cpu:.0f}", f"{each.peak_mib:.0f}")
            for what, each in used
        )
        print_table("recover | wall s | processor s | MiB", rows)


if __name__ == "__main__":
    if sys.argv[1] == "speed":
        speed(*sys.argv[2:])
    else:
        {"planted": planted, "coverage": coverage}[sys.argv[1]](*map(int, sys.argv[2:]))
