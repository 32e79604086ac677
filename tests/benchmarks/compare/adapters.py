"""A LoRA adapter that uses fewer directions than it has: what rank tools name, and what their smaller adapter is."""

from pathlib import Path

import torch

from tests.benchmarks.compare import tools
from tests.benchmarks.compare.inputs import EFFECTIVE_FOUR, Weights, best, make_adapter, make_pair, planted, singular
from tests.benchmarks.compare.output import fresh, spread, table, worst

Row = tuple[str, str, str, str]


def adapters(kohya: Path | None) -> None:
    """An adapter of rank 16 that uses 4 of its directions, alpha 32, plain and rsLoRA."""
    home = fresh("adapters")
    truth = make_pair(home, "llama", planted(EFFECTIVE_FOUR, 1e-3), torch.float32)
    for name, rslora in (("plain", False), ("rslora", True)):
        adapter = home / name
        make_adapter(adapter, truth, 16, 32, rslora)
        print(f"{'rsLoRA, scaling 32/√16 = 8' if rslora else 'scaling 32/16 = 2'}\n")
        rows = [ours(home, adapter, truth), gradience(home, adapter, truth), peft(home, adapter, truth)]
        if kohya and not rslora:
            rows += resized(kohya, adapter, truth)
        rows.append(("truth", "4", "1", f"{max(best(singular(t), 4) for t in truth.values()):.4f}"))
        table("tool | rank | its ‖ΔW‖ ÷ the true one | error of its smaller adapter", rows)


def ours(home: Path, adapter: Path, truth: Weights) -> Row:
    records = tools.loradiag_records("spectrum", adapter)
    norms = {name.removesuffix(".weight"): float(torch.linalg.norm(t)) for name, t in truth.items()}
    ratio = spread(record["fro"] / norms[record["layer"].removesuffix(".weight")] for record in records)
    ranks = ", ".join(spread(record["rank_at"][share] for record in records) for share in ("0.9", "0.95", "0.99"))
    out = home / f"ours-{adapter.name}"
    tools.done(tools.loradiag("extract", home / "base", adapter, "--energy", "0.99", "-o", out))
    error = f"{worst(tools.merged(home / 'base', out), truth):.4f}"
    return "loradiag spectrum; extract --energy 0.99", f"{ranks} at 90, 95, 99%", ratio, error


def gradience(home: Path, adapter: Path, truth: Weights) -> Row:
    audit = tools.gradience_audit(adapter)
    ranks = {name: f"{policy['uniform_median']:g}" for name, policy in audit["policy_global_suggestions"].items()}
    norms = {f"base_model.model.{n.removesuffix('.weight')}": float(torch.linalg.norm(t)) for n, t in truth.items()}
    layers = audit["policies"]["per_layer"]
    ratio = spread(layer["importance_metrics"]["frobenius_norm"] / norms[layer["layer_name"]] for layer in layers)
    out = home / f"gradience-{adapter.name}"
    tools.done(tools.gradience_truncate(adapter, out, 4))
    error = f"{worst(tools.merged(home / 'base', out), truth):.4f}"
    return "gradience audit; truncate --rank 4", ", ".join(f"{n} {r}" for n, r in ranks.items()), ratio, error


def peft(home: Path, adapter: Path, truth: Weights) -> Row:
    out = home / f"peft-{adapter.name}"
    tools.peft_convert(home / "base", adapter, out, 0.99)
    error = f"{worst(tools.merged(home / 'base', out), truth):.4f}"
    return "PEFT save_as_lora(rank=0.99)", spread(tools.peft_ranks(out, truth).values()), "-", error


def resized(kohya: Path, adapter: Path, truth: Weights) -> list[Row]:
    rows = []
    for method, value in (("sv_fro", 0.995), ("sv_ratio", 100), ("sv_cumulative", 0.99)):
        out = adapter.with_suffix(".resized.safetensors")
        words = ["--dynamic_method", method, "--dynamic_param", value]
        tools.done(tools.kohya_resize(kohya, adapter.with_suffix(".kohya.safetensors"), out, 16, *words))
        error = f"{worst(tools.kohya_updates(out, truth), truth):.4f}"
        rows.append((f"kohya resize {method} {value}", spread(tools.kohya_ranks(out, truth).values()), "-", error))
    return rows
