"""Weights stored another way round, tied or in stacks of experts; and weights that are damaged."""

import json
from pathlib import Path

import torch

from tests.benchmarks.compare import tools
from tests.benchmarks.compare.inputs import LOW_RANK, Weights, error, make_adapter, make_pair, planted, spoil, stored
from tests.benchmarks.compare.output import RANK, about, fresh, spread, table


def layouts(kohya: Path | None) -> None:
    """GPT-2's Conv1D, tied embeddings, experts one by one in the file and fused; each matrix moved by rank 16."""
    for family in ("gpt2", "llama-tied", "mixtral", "gpt_oss"):
        home = fresh(f"layout-{family}")
        make_pair(home, family, planted(LOW_RANK, 1e-3), torch.float32, embeddings=family == "llama-tied")
        names = sorted(stored(home))
        print(f"{family}, {len(names)} weights of two or three dimensions moved\n")
        table("tool | result", [*extracted(home, family), *seen(home, names)])


def extracted(home: Path, family: str) -> list[tuple[str, str]]:
    base, tuned, truth = home / "base", home / "tuned", tools.moved(home)
    ran = tools.loradiag("extract", base, tuned, "--rank", RANK, "-o", home / "ours")
    rows = [("loradiag extract", applied(ran, base, home / "ours", truth))]
    for more in ([], ["--embed-lora"]) if family == "llama-tied" else ([],):
        out = home / "-".join(["mergekit", *more])
        ran = tools.mergekit(base, tuned, out, RANK, *more)
        rows.append((" ".join(["mergekit", *more]), applied(ran, base, out, truth)))
    if family == "gpt2":
        make_conv1d_adapter(home / "adapter", truth)
        tools.peft_convert(base, home / "adapter", home / "peft", RANK)
        rows.append(("PEFT save_as_lora, of an adapter", applied(tools.Ran(0, ""), base, home / "peft", truth)))
    return rows


def applied(ran: tools.Ran, base: Path, adapter: Path, truth: Weights) -> str:
    """Say how far the base with the adapter merged in is from the fine-tune."""
    if ran.code:
        return f"exit {ran.code}: {ran.last}"
    result = tools.merged(base, adapter)
    errors = {name: error(result[name], update) for name, update in truth.items()}
    off = [f"{name} {value:.2f}" for name, value in errors.items() if value > 1e-3]
    return f"merged, error {max(errors.values()):.0e} at most" if not off else f"merged, error of {', '.join(off)}"


def make_conv1d_adapter(folder: Path, truth: Weights) -> None:
    """Write a PEFT adapter of rank 16 for GPT-2's Conv1D, whose weights are stored (in, out)."""
    make_adapter(folder, {name: update.T for name, update in truth.items()}, RANK, RANK)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"fan_in_fan_out": True}))


def seen(home: Path, names: list[str]) -> list[tuple[str, str]]:
    """Say how many of the weights that moved tools have figures of, and which."""
    base, tuned = home / "base", home / "tuned"
    records = tools.loradiag_records("spectrum", base, tuned)
    ours = [record for record in records if record["layer"].partition("[")[0] in names and record["fro"]]
    deltas = about(tools.modeldelta(base, tuned, home / "m.json")[1], "name", names)
    watched = about(tools.weightwatcher(base, tuned)[1], "longname", names)
    count = len(names)
    covered = len({record["layer"].partition("[")[0] for record in ours})
    ranks = {
        "loradiag spectrum": (covered, f"signal rank {spread(r['resolution']['signal_rank'] for r in ours)}"),
        "modeldelta": (len(deltas), f"effective rank {spread(m['effective_rank'] for m in deltas)}"),
        "WeightWatcher": (len(watched), f"spikes {spread(w['num_spikes'] for w in watched)}"),
    }
    return [(name, f"figures of {result} of {count}; {figure}") for name, (result, figure) in ranks.items()]


def broken(kohya: Path | None) -> None:
    """One NaN in one weight; one weight with a row less."""
    for what in ("nan", "shape"):
        home = fresh(f"broken-{what}")
        base, tuned = home / "base", home / "tuned"
        truth = make_pair(home, "llama", planted(LOW_RANK, 1e-3), torch.float32)
        victim = spoil(tuned, what)
        delta, deltas = tools.modeldelta(base, tuned, home / "m.json")
        watch, watched = tools.weightwatcher(base, tuned)
        extract = tools.loradiag("extract", base, tuned, "--rank", RANK, "-o", home / "ours")
        ours = about(tools.loradiag_records("spectrum", base, tuned), "layer", truth)
        merge = tools.mergekit(base, tuned, home / "mergekit", RANK)
        runs = [
            ("loradiag spectrum", tools.loradiag("spectrum", base, tuned), f"figures of {len(ours)}"),
            ("loradiag extract", extract, wrote(home / "ours" / "adapter_model.safetensors")),
            ("modeldelta", delta, f"figures of {len(about(deltas, 'name', truth))}"),
            ("WeightWatcher", watch, f"figures of {len(about(watched, 'longname', truth))}"),
            ("mergekit", merge, wrote(home / "mergekit" / "adapter_model.safetensors")),
        ]
        if kohya:
            file = home / "k.safetensors"
            runs.append(("kohya flux_extract", tools.kohya_extract(kohya, base, tuned, file, RANK), wrote(file)))
        print(f"{what} in {victim}, one of {len(truth)} weights that moved\n")
        for name, ran, _ in runs:
            (home / f"{name}.txt").write_text(ran.text)
        name = victim.removesuffix(".weight")
        head = "tool | exit code | names the weight in a message | leaves | last line"
        rows = ((tool, r.code, "yes" if complains(r, name) else "no", left, r.last[:120]) for tool, r, left in runs)
        table(head, rows)


def complains(ran: tools.Ran, name: str) -> bool:
    """Return whether a line names the weight and its problem."""
    words = ("nan", "shape", "size", "finite", "skip")
    return any(name in line and any(word in line.lower() for word in words) for line in ran.text.splitlines())


def wrote(file: Path) -> str:
    return "an adapter" if file.exists() else "nothing"
