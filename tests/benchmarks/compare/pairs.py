"""Base and fine-tune as checkpoints: what tools say of an update that rounding hides, and of one of full rank."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from tests.benchmarks.compare import tools
from tests.benchmarks.compare.inputs import (
    LOW_RANK,
    POWER_LAW,
    RANK,
    Weights,
    about,
    energy,
    error,
    excess,
    fresh,
    make_adapter,
    make_pair,
    planted,
    rank_at,
    singular,
    spread,
    stored,
    table,
    worst,
)


def floor(kohya: Path | None) -> None:
    """A rank-16 update in a bf16 pair, above and below the rounding floor."""
    for rms in (1e-3, 1e-5):
        home = fresh(f"floor{rms:g}")
        truth = make_pair(home, "llama", planted(LOW_RANK, rms), torch.bfloat16)
        files = stored(home)
        shares = spread(error(files[name], update) for name, update in truth.items())
        ranks = spread(rank_at(singular(update), 0.9) for update in files.values())
        overlap = spread(subspace(files[name], update) for name, update in truth.items())
        print(f"rms {rms:g} on weights of rms 0.02; planted: rank 16, {rank_at(LOW_RANK.numpy(), 0.9)} at 90%.")
        print(f"In the files: ‖rounding‖/‖planted‖ {shares}; rank at 90% {ranks}; share of the planted left")
        print(f"subspace in the 16 largest left vectors {overlap}.\n")
        measured(home, truth)
        extracted(home, truth, kohya)


def subspace(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Return ‖U_16ᵀ Û_16‖_F²/16: the overlap of two spaces of left singular vectors."""
    u, v = np.linalg.svd(found.numpy())[0][:, :RANK], np.linalg.svd(truth.numpy())[0][:, :RANK]
    return float(((u.T @ v) ** 2).sum() / RANK)


def measured(home: Path, truth: Weights) -> None:
    base, tuned = home / "base", home / "tuned"
    ours = about(tools.loradiag_records("spectrum", base, tuned), "layer", truth)
    deltas = about(tools.modeldelta(base, tuned, home / "m.json")[1], "name", truth)
    watched = about(tools.weightwatcher(base, tuned)[1], "longname", truth)
    square = [w for w in watched if w["M"] == w["N"]]
    oblong = [w for w in watched if w["M"] != w["N"]]
    resolution = [record["resolution"] for record in ours]
    rows = [
        ("loradiag: verdict", ", ".join(sorted({r["verdict"] for r in resolution}))),
        ("loradiag: signal rank", spread(r["signal_rank"] for r in resolution)),
        ("loradiag: rank at 90%, records only", spread(record["rank_at"]["0.9"] for record in ours)),
        ("modeldelta: effective rank", spread(m["effective_rank"] for m in deltas)),
        ("modeldelta: energy of the 16 largest", spread(m["concentration_top_k"] for m in deltas)),
        ("WeightWatcher: spikes, square matrices", spread(w["num_spikes"] for w in square)),
        ("WeightWatcher: spikes, 2:1 matrices", spread(w["num_spikes"] for w in oblong)),
        ("WeightWatcher: stable rank", spread(w["stable_rank"] for w in watched)),
        ("WeightWatcher: warning", ", ".join(sorted({w["warning"] or "none" for w in watched}))),
    ]
    table("tool and figure | all layers", rows)


def extracted(home: Path, truth: Weights, kohya: Path | None) -> None:
    base, tuned = home / "base", home / "tuned"
    rows = []
    for choice in (["--rank", RANK], ["--signal"]):
        out = home / f"ours{choice[0]}"
        ran = tools.loradiag("extract", base, tuned, *choice, "-o", out)
        says = next((line for line in ran.text.splitlines() if line.startswith("Resolution")), ran.last)
        rows.append(
            (f"loradiag {choice[0]}", "nothing written" if ran.code else f"{distance(base, out, truth):.3f}", says)
        )
    tools.done(tools.mergekit(base, tuned, home / "mergekit", RANK))
    rows.append(("mergekit --max-rank 16", f"{distance(base, home / 'mergekit', truth):.3f}", "-"))
    if kohya:
        tools.done(tools.kohya_extract(kohya, base, tuned, home / "k.safetensors", RANK))
        result = tools.kohya_updates(home / "k.safetensors", truth)
        rows.append(("kohya flux_extract --dim 16", f"{worst(result, truth):.3f}", "-"))
    table("adapter by | error against what was planted | says", rows)


def distance(base: Path, adapter: Path, truth: Weights) -> float:
    return worst(tools.merged(base, adapter), truth)


def decay(kohya: Path | None) -> None:
    """A full-rank update with σ_i ∝ i^−0.7: figures, and adapters against the Eckart-Young optimum."""
    home = fresh("decay")
    make_pair(home, "llama", planted(POWER_LAW, 1e-3), torch.float32)
    truth = stored(home)
    spectra = {name: singular(update) for name, update in truth.items()}
    for r in (8, 16, 64):
        print(f"C({r}) = {spread(energy(s, r) for s in spectra.values())}; ", end="")
    print(f"rank at 90% {spread(rank_at(s, 0.9) for s in spectra.values())}\n")
    figures(home, spectra)
    make_adapter(home / "whole", truth, max(len(s) for s in spectra.values()), 512)
    table("rank 16 by | error ÷ optimum − 1", fixed(home, truth, spectra, kohya))
    table("rank for 90% of the energy by | less the true one", automatic(home, spectra, kohya))
    table("rank 16 from a bf16 pair by | error ÷ optimum − 1", half())


def figures(home: Path, spectra: Mapping[str, np.ndarray]) -> None:
    """Compare measured values with float64."""
    base, tuned = home / "base", home / "tuned"
    ranks = (8, 16, 64)
    ours = about(tools.loradiag_records("spectrum", base, tuned, "--ranks", "8,16,64"), "layer", spectra)
    curve = [abs(x["energy"][str(r)] - energy(spectra[x["layer"]], r)) for x in ours for r in ranks]
    deltas = {r: about(tools.modeldelta(base, tuned, home / "m.json", r)[1], "name", spectra) for r in ranks}
    shares = [abs(m["concentration_top_k"] - energy(spectra[m["name"]], r)) for r in ranks for m in deltas[r]]
    watched = about(tools.weightwatcher(base, tuned)[1], "longname", spectra)
    energies = {w["longname"]: spectra[f"{w['longname']}.weight"] ** 2 for w in watched}
    stable = [abs(w["stable_rank"] * energies[w["longname"]][0] / energies[w["longname"]].sum() - 1) for w in watched]
    rows = [
        ("loradiag spectrum: C(8), C(16), C(64)", f"{max(curve):.0e}"),
        ("modeldelta --top-k 8, 16, 64: concentration", f"{max(shares):.0e}"),
        ("WeightWatcher: stable rank, relatively (no C(r))", f"{max(stable):.0e}"),
    ]
    table("figure | largest error", rows)


def fixed(home: Path, truth: Weights, spectra: Mapping[str, np.ndarray], kohya: Path | None) -> list[tuple[str, str]]:
    """Extract rank 16 with every tool; those that take no pair get the update as an adapter of full rank."""
    base, tuned, whole = home / "base", home / "tuned", home / "whole"
    for method in ("auto", "exact"):
        out = home / f"ours-{method}"
        tools.done(tools.loradiag("extract", base, tuned, "--rank", RANK, "--method", method, "-o", out))
    tools.done(tools.mergekit(base, tuned, home / "mergekit", RANK))
    tools.peft_convert(base, whole, home / "peft", RANK)
    result = {
        "loradiag extract": tools.merged(base, home / "ours-auto"),
        "loradiag extract --method exact": tools.merged(base, home / "ours-exact"),
        "mergekit": tools.merged(base, home / "mergekit"),
        "PEFT save_as_lora, from an adapter of full rank": tools.merged(base, home / "peft"),
    }
    for dtype, name in (("fp16", "fp16, the default"), ("fp32", "fp32")):
        out = home / f"gradience-{dtype}"
        tools.done(tools.gradience_truncate(whole, out, RANK, "--dtype", dtype))
        result[f"gradience truncate, {name}, from the same"] = tools.merged(base, out)
    if kohya:
        file = home / "k.safetensors"
        tools.done(tools.kohya_extract(kohya, base, tuned, file, RANK))
        result["kohya flux_extract"] = tools.kohya_updates(file, truth)
        tools.done(tools.kohya_extract(kohya, base, tuned, file, RANK, "--clamp_quantile", "1"))
        result["kohya flux_extract --clamp_quantile 1"] = tools.kohya_updates(file, truth)
        tools.done(tools.kohya_resize(kohya, whole.with_suffix(".kohya.safetensors"), file, RANK))
        result["kohya resize, from an adapter of full rank"] = tools.kohya_updates(file, truth)
    return [(name, excess(update, truth, spectra)) for name, update in result.items()]


def automatic(home: Path, spectra: Mapping[str, np.ndarray], kohya: Path | None) -> list[tuple[str, str]]:
    """Ask for 90% of the energy, in each tool's own words."""
    base, tuned, whole = home / "base", home / "tuned", home / "whole"
    tools.done(tools.loradiag("extract", base, tuned, "--energy", "0.9", "-o", home / "ours90"))
    tools.peft_convert(base, whole, home / "peft90", 0.9)
    layers = tools.gradience_audit(whole)["layer_data"]["layer_rows"]
    prefix = "base_model.model."
    result = {
        "loradiag extract --energy 0.9": tools.peft_ranks(home / "ours90", spectra),
        "PEFT save_as_lora(rank=0.9)": tools.peft_ranks(home / "peft90", spectra),
        "gradience audit, energy rank": {
            f"{row['name'].removeprefix(prefix)}.weight": int(row["energy_rank_90"]) for row in layers
        },
    }
    if kohya:
        words = ["--dynamic_method", "sv_fro", "--dynamic_param", 0.9**0.5]
        file = home / "k90.safetensors"
        tools.done(tools.kohya_resize(kohya, whole.with_suffix(".kohya.safetensors"), file, 512, *words))
        result["kohya resize sv_fro 0.9487 (√0.9)"] = tools.kohya_ranks(file, spectra)
    return [(name, spread(ranks[n] - rank_at(s, 0.9) for n, s in spectra.items())) for name, ranks in result.items()]


def half() -> list[tuple[str, str]]:
    """Extract the same update from a bf16 pair; the optimum is that for what the files hold."""
    home = fresh("decay-bf16")
    base, tuned = home / "base", home / "tuned"
    make_pair(home, "llama", planted(POWER_LAW, 1e-3), torch.bfloat16)
    truth = stored(home)
    spectra = {name: singular(update) for name, update in truth.items()}
    tools.done(tools.loradiag("extract", base, tuned, "--rank", RANK, "-o", home / "ours"))
    tools.done(tools.loradiag("extract", base, tuned, "--rank", RANK, "--dtype", "bfloat16", "-o", home / "ours16"))
    tools.done(tools.mergekit(base, tuned, home / "mergekit", RANK))
    return [
        ("loradiag extract", excess(tools.merged(base, home / "ours"), truth, spectra)),
        ("loradiag extract --dtype bfloat16", excess(tools.merged(base, home / "ours16"), truth, spectra)),
        ("mergekit, factors in the files' bf16", excess(tools.merged(base, home / "mergekit"), truth, spectra)),
    ]
