"""The effect of bf16 rounding on a planted update, and the verdict on it."""

import numpy as np
import torch

from lora_diag.layers.resolution import noise_of
from lora_diag.linalg.difference import difference
from lora_diag.metrics.resolution import signal_rank, verdict
from tests.benchmarks.recovery import update

N = 768


def ranks(s: np.ndarray) -> str:
    curve = np.cumsum(s**2) / (s**2).sum()
    return ", ".join(str(int((curve < share).sum()) + 1) for share in (0.9, 0.95, 0.99))


def rounding_table() -> str:
    """Return the table: true values, values of the files, and verdicts of loradiag."""
    lines = [
        "| update | rms | unchanged | ‖E‖/‖ΔW‖ | noise stated | true ranks 90, 95, 99% | read | signal | verdict |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for label, kind in (("rank 8", "rank 8"), ("power law 1/i", "1/i"), ("full rank", "noise")):
        for rms in (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5):
            rng = np.random.default_rng(0)
            base = torch.from_numpy(rng.standard_normal((N, N)) * 0.02).bfloat16()
            delta = update(N, N, kind, rms, rng).double().numpy()
            tuned = (base.double() + torch.from_numpy(delta)).bfloat16()
            result = difference([(base, tuned)], (N, N), torch.device("cpu"))
            seen = (tuned.double() - base.double()).numpy()
            s = np.linalg.svd(seen, compute_uv=False)
            seen_noise = noise_of(result.rounding.noise, result.rounding.sides)
            noise_fro, signal = seen_noise.fro, signal_rank(s, seen_noise.edge, complete=True)
            error = np.linalg.norm(seen - delta) / np.linalg.norm(delta)
            true = ranks(np.linalg.svd(delta, compute_uv=False))
            row = (label, f"{rms:g}", f"{result.unchanged:.2f}", f"{error:.2f}", f"{noise_fro / result.fro:.2f}", true)
            row += (ranks(s), str(signal), verdict(noise_fro, result.fro, signal))
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)
