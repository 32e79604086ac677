"""A LoRA adapter that uses fewer directions than it has: what rank tools name, and what their smaller adapter is.

And adapters that are damaged.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.benchmarks.compare import tools
from tests.benchmarks.compare.inputs import (
    EFFECTIVE_FOUR,
    Weights,
    best,
    kohya_name,
    make_adapter,
    make_pair,
    planted,
    singular,
)
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
    ratio = spread(row["delta_fro_norm"] / norms[row["name"]] for row in audit["layer_data"]["layer_rows"])
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


VICTIM = "model.layers.0.self_attn.q_proj.weight"
CONVERT = """
import sys
from pathlib import Path
from tests.benchmarks.compare.tools import peft_convert
peft_convert(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), 4)
"""


def damaged(kohya: Path | None) -> None:
    """An adapter with one NaN in one lora_B; one whose lora_B has a column less than its lora_A has rows."""
    for what in ("nan", "shape"):
        home = fresh(f"damaged-{what}")
        truth = make_pair(home, "llama", planted(EFFECTIVE_FOUR, 1e-3), torch.float32)
        base, adapter, flat = home / "base", home / "adapter", home / "adapter.kohya.safetensors"
        make_adapter(adapter, truth, 16, 32)
        module = VICTIM.removesuffix(".weight")
        spoil(adapter / "adapter_model.safetensors", f"base_model.model.{module}.lora_B.weight", what)
        spoil(flat, f"{kohya_name(VICTIM)}.lora_up.weight", what)
        out = {name: home / name for name in ("ours", "gradience", "peft", "kohya.safetensors")}
        runs = {
            "loradiag spectrum": (tools.loradiag("spectrum", adapter), None),
            "loradiag extract": (tools.loradiag("extract", base, adapter, "--rank", 4, "-o", out["ours"]), "ours"),
            "gradience audit": (tools.audited(adapter), None),
            "gradience truncate": (tools.gradience_truncate(adapter, out["gradience"], 4), "gradience"),
            "PEFT save_as_lora": (tools.run([sys.executable, "-c", CONVERT, base, adapter, out["peft"]]), "peft"),
        }
        if kohya:
            file = out["kohya.safetensors"]
            runs["kohya resize"] = tools.kohya_resize(kohya, flat, file, 4), "kohya.safetensors"
        print(f"{what} in lora_B of {module}, one of {len(truth)}\n")
        rows = []
        for name, (ran, folder) in runs.items():
            (home / f"{name}.txt").write_text(ran.text)
            left = "-" if not folder else "an adapter" if any(out[folder].rglob("*.safetensors")) else "nothing"
            left = "an adapter" if folder and out[folder].is_file() else left
            rows.append((name, ran.code, "yes" if "q_proj" in ran.text else "no", left, ran.last[:120]))
        table("tool | exit code | prints the name | leaves | last line", rows)


def spoil(file: Path, name: str, what: str) -> None:
    tensors = load_file(file)
    if what == "nan":
        tensors[name][3, 5] = float("nan")
    else:
        tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, file, {"format": "pt"})
