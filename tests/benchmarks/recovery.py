"""Accuracy, false positives and coverage of ``recover`` on updates that are known, rounded to bfloat16.

    python -m tests.benchmarks.recovery planted 5      rank 8 and σ ~ 1/i, 768², by seed
    python -m tests.benchmarks.recovery layers         the sample model's fine-tune, scaled; also .bench/encoder
    python -m tests.benchmarks.recovery noise 100      layers without a direction
    python -m tests.benchmarks.recovery bf16 6         training without master weights, which has no hidden update
    python -m tests.benchmarks.recovery coverage 1     of the intervals of ‖X‖, C(r) and ranks, by kind of X and W
    python -m tests.benchmarks.recovery speed 4096     time and memory of one layer
    python -m tests.benchmarks.recovery speed 4096 512 the same within 512 MiB, in row blocks

Every row is one table row in Markdown. Errors are ‖X̂_r − X‖_F/‖X‖_F against the update before rounding.
"""

from __future__ import annotations

import math
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_diag.checkpoints import open_checkpoint
from lora_diag.deltas import StoredDelta, pair
from lora_diag.layers.recovery import Estimate, recover_layer
from lora_diag.records.vocabulary import Hidden

CPU = torch.device("cpu")
RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
SAMPLES = Path("sample_checkpoints")
ENCODER = Path(".bench/encoder")


def estimate(base: Tensor, tuned: Tensor, seed: int = 0, memory: int | None = None) -> tuple[Estimate, StoredDelta]:
    """Estimate one layer, through files as a user's."""
    with tempfile.TemporaryDirectory() as folder:
        sides = []
        for name, side in (("base", base), ("tuned", tuned)):
            save_file({"layers.0.up_proj.weight": side.contiguous()}, Path(folder) / f"{name}.safetensors")
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
    """Return a start of training: ``normal``, ``t3``, ``uniform``, or normal with ``outliers`` or unequal ``rows``."""
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
        kind: ``rank R``, ``1/i``, ``noise``, ``flat`` or ``t3`` noise; ``rank R + noise`` has half of the energy in
            each. ``, rows`` and ``, both`` multiply rows, or rows and columns, by log-normal numbers, ``, few rows``
            divides seven eighths of the rows by 5, and ``, t3 columns`` has t-distributed columns.
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
        right = rng.standard_t(3, (rank, n)) if scales == "t3 columns" else rng.normal(size=(rank, n))
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
        "recovered": gap(truncated(result.matrix(), rank), x) if hidden.status == "recovered" else plain,
        "status": hidden.status,
        "rule": hidden.rule or "",
        "start": hidden.start or "",
    }


def planted(seeds: int = 5) -> None:
    print("| update | seed | unchanged | ‖X‖ | ‖D‖ | best r = 8 | SVD of D | recovered | verdict |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|---|")
    for kind, rms in (("rank 8", 3e-5), ("rank 8", 1e-5), ("rank 8", 3e-6), ("1/i", 1e-5)):
        errors = []
        for seed in range(100, 100 + seeds):
            rng = np.random.default_rng(seed)
            w, x = bf16_weight(768, 768, rng), update(768, 768, kind, rms, rng)
            got = compared(w, x, 8, seed)
            errors.append(float(got["recovered"]))
            print(
                f"| {kind}, {rms:g} | {seed} | {got['unchanged']:.1%} | {got['norm']:.3f} | {got['files']:.3f} | "
                f"{got['best']:.3f} | {got['svd']:.3f} | {got['recovered']:.4f} | {got['status']} {got['rule']} |",
                flush=True,
            )
        print(f"| {kind}, {rms:g} | mean, worst | | | | | | {np.mean(errors):.4f}, {max(errors):.4f} | |", flush=True)


def whole(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def pairs_of_layers() -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (name, W, X) of real updates: the sample model's, and the encoder's where it was trained."""
    sources = [("llama", SAMPLES / "base", SAMPLES / "full_ft"), ("encoder", ENCODER / "base", ENCODER / "full")]
    for label, base, tuned in sources:
        if not base.exists():
            continue
        before, after = (whole(side) for side in (base, tuned))
        for name, w in before.items():
            if w.dim() == 2 and min(w.shape) > 32 and not any(part in name for part in ("embed", "head", "norm")):
                yield f"{label} {name}", w.float(), after[name].float() - w.float()


def layers(scales: str = "0.02,0.01,0.003") -> None:
    print("| layer | c | unchanged | ‖X‖ | ‖D‖ | best r = 16 | SVD of D | recovered | verdict | start |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|---|---|")
    norms: list[float] = []
    worse: list[float] = []
    for name, w, x in pairs_of_layers():
        for c in map(float, scales.split(",")):
            for start in ("stored", "rounded"):
                scaled = x * c
                origin = w.bfloat16().float() if start == "stored" else w
                t = (origin + scaled).bfloat16()
                result, _ = estimate(w.bfloat16(), t)
                hidden = result.hidden
                if hidden.status == "not_hidden":
                    continue
                d = t.float() - w.bfloat16().float()
                svd = gap(truncated(d, 16), scaled)
                mine = gap(truncated(result.matrix(), 16), scaled) if hidden.status == "recovered" else svd
                norm = hidden.fro_estimate / float(scaled.double().norm()) if hidden.fro_estimate else math.nan
                norms.append(norm)
                worse.append(mine - svd)
                print(
                    f"| {name} {start} | {c:g} | {hidden.unchanged:.1%} | {norm:.4f} | "
                    f"{float(d.norm() / scaled.norm()):.3f} | {gap(truncated(scaled, 16), scaled):.3f} | "
                    f"{svd:.4f} | {mine:.4f} | {hidden.status} {hidden.rule or ''} | {hidden.start} |",
                    flush=True,
                )
    known = np.array([norm for norm in norms if norm == norm])
    off = np.abs(known - 1)
    print(
        f"\n{len(norms)} cases, {len(norms) - len(known)} refused; ‖X‖ {known.min():.4f} to {known.max():.4f}, off by "
        f"{off.mean():.2%} on average, {(off > 0.02).sum()} over 2%; at most {max(worse):.4f} worse than SVD of D"
    )


def noise(layers: int = 100) -> None:
    """Directions where there are none."""
    accepted, inside, ratios = 0, 0, []
    for seed in range(layers):
        rng = np.random.default_rng(1000 + seed)
        rms = (3e-5, 1e-5, 3e-6)[seed % 3]
        w, x = bf16_weight(256, 256, rng), update(256, 256, "noise", rms, rng)
        hidden = estimate(w.bfloat16(), (w + x).bfloat16(), seed)[0].hidden
        accepted += hidden.status == "recovered"
        low, high = hidden.fro_interval or (math.nan, math.nan)
        true = float(x.double().norm())
        inside += low <= true <= high
        ratios.append((hidden.fro_estimate or math.nan) / true)
    known = [ratio for ratio in ratios if not math.isnan(ratio)]
    print(
        f"{layers} layers of noise, 256²: {accepted} with directions, {layers - len(known)} refused; "
        f"‖X‖ {min(known):.3f} to {max(known):.3f}, inside the interval in {inside}"
    )


def bf16_run(start: Tensor, rate: float, drift: float, steps: int, stochastic: bool, rng: torch.Generator) -> Tensor:
    """Train without master weights: every step is rounded to bfloat16. Steps as Adam takes them."""
    lean, now = drift * torch.randn(start.shape, generator=rng), start.clone()
    for _ in range(steps):
        moved = now - rate * torch.tanh(torch.randn(start.shape, generator=rng) + lean)
        if stochastic:
            low = torch.randint(0, 65536, start.shape, generator=rng, dtype=torch.int32)
            now = ((moved.view(torch.int32) + low) & -65536).view(torch.float32)
        else:
            now = moved.bfloat16().float()
    return now


def bf16(seeds: int = 6) -> None:
    """Verdicts on training without master weights."""
    print("| rounding | rate | drift | steps | verdicts | unchanged | χ²/df | misplaced | start |")
    print("|---|--:|--:|--:|---|--:|--:|--:|---|")
    for stochastic in (False, True):
        for rate in (1e-5, 3e-6, 1e-6):
            for drift in (0.1, 1.0):
                for steps in (40, 200):
                    result = []
                    for seed in range(seeds):
                        rng = torch.Generator().manual_seed(2000 + seed)
                        start = (torch.randn(256, 256, generator=rng) * 0.02).bfloat16().float()
                        now = bf16_run(start, rate, drift, steps, stochastic, rng)
                        result.append(estimate(start.bfloat16(), now.bfloat16())[0].hidden)
                    words = ", ".join(
                        f"{sum(h.status == s for h in result)} {s}" for s in sorted({h.status for h in result})
                    )

                    starts = ", ".join(sorted({h.start or "" for h in result}))

                    def spread(values: list[float | None]) -> str:
                        known = [v for v in values if v is not None]
                        return f"{min(known):.3g}–{max(known):.3g}" if known else ""

                    print(
                        f"| {'stochastic' if stochastic else 'nearest'} | {rate:g} | {drift:g} | {steps} | {words} | "
                        f"{spread([h.unchanged for h in result])} | {spread([h.fit_chi for h in result])} | "
                        f"{spread([h.fit_misplaced for h in result])} | {starts} |",
                        flush=True,
                    )


# X of ``coverage``, and W, start and root mean square of X for each.
PLAIN = ("rank 1", "rank 2", "rank 4", "rank 8", "rank 8 + noise", "1/i", "noise", "flat", "t3")
UPDATES = (*PLAIN, "rank 4, rows", "rank 4, both", "rank 4, few rows", "rank 2, t3 columns", "noise, both")
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

    def row(self, label: str) -> str:
        half = f"{np.median(self.halves):.1%}" if self.halves else "-"
        words = [f"{sum(v)} of {len(v)}" if v else "-" for v in (self.norms, self.curves, self.ranks)]
        refused = f"{self.layers - len(self.norms)} of {self.layers}"
        return f"| {' | '.join([label, refused, words[0], half, *words[1:]])} |"


def measure_coverage(seeds: int, first: int) -> dict[str, Covered]:
    """Return which intervals hold the truth: by kind of X, by setting, and in layers of the sample model."""
    by: dict[str, Covered] = {}
    real = [(name, w, x) for name, w, x in pairs_of_layers() if name.startswith("llama")][:14]

    def measure(w: Tensor, x: Tensor, start: str, seed: int, *labels: str) -> None:
        origin = w.bfloat16().double() if start == "stored" else w.double()
        hidden = estimate(w.bfloat16(), (origin + x.double()).float().bfloat16(), seed)[0].hidden
        for label in labels:
            by.setdefault(label, Covered()).add(hidden, x)

    for kind in UPDATES:
        for shape, start, rms in SETTINGS:
            for seed in range(first, first + seeds):
                rng = np.random.default_rng([seed, UPDATES.index(kind), SETTINGS.index((shape, start, rms))])
                w, x = weight(128, 160, rng, shape), update(128, 160, kind, rms, rng)
                measure(w, x, start, seed, f"X: {kind}", f"W: {shape}, {start}, {rms:g}", "planted")
    for i, (_, w, x) in enumerate(real):
        for c, start in ((0.01, "stored"), (0.003, "stored"), (0.01, "rounded")):
            measure(w, x * c, start, i, f"sample model, {start}, c = {c:g}")
    return by


def coverage(seeds: int = 1, first: int = 9000) -> None:
    print("| layers | refused | ‖X‖ in its interval | ± | C(r) in its interval | r@90% in its interval |")
    print("|---|--:|--:|--:|--:|--:|")
    for label, covered in measure_coverage(seeds, first).items():
        print(covered.row(label), flush=True)


def speed(side: int = 4096, mebibytes: int | None = None) -> None:
    rng = np.random.default_rng(5)
    w, x = bf16_weight(side, side, rng), update(side, side, "rank 8", 1e-5, rng)
    t = (w + x).bfloat16()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin, worked = time.perf_counter(), time.process_time()
    result, _ = estimate(w.bfloat16(), t, memory=None if mebibytes is None else mebibytes * 2**20)
    seconds, worked = time.perf_counter() - begin, time.process_time() - worked
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    how = f"{side}², row blocks" if mebibytes else f"{side}²"
    print(
        f"{how}: {seconds:.1f} s ({worked:.1f} s of processors), {torch.get_num_threads()} threads, "
        f"{result.hidden.iterations} iterations of the last fit, {result.hidden.status}; peak {peak / 1024:.0f} MiB "
        f"({before / 1024:.0f} before)"
    )


PARTS = {part.__name__: part for part in (planted, layers, noise, bf16, coverage, speed)}

if __name__ == "__main__":
    name, *rest = sys.argv[1:]
    PARTS[name](*(value if name == "layers" else int(value) for value in rest))  # type: ignore[operator]
