"""Ranks by measured tails F(r), which need not be convex: against every choice that there is."""

import contextlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_diag
from lora_diag.decisions.allocate.measure import Budget, Constraints, allocate
from lora_diag.errors import InputError, UsageError
from lora_diag.probes.fisher.record import Fisher
from lora_diag.records import ResultsWriter, Run, totals
from tests.decisions.allocate.records import record, results
from tests.messages import assert_names, raises_naming

LAYERS = tuple(f"model.layers.{i}.mlp.up_proj.weight" for i in range(3))
SHAPES = ((15, 12), (18, 12), (12, 24))
VALUES = 4  # of each update, below the break-even rank


def spectra(*, layers=LAYERS, **more):
    rng = np.random.default_rng(0)
    return [
        record(name, shape, rng.random(VALUES) + 0.1, complete=True, **more)
        for name, shape in zip(layers, SHAPES, strict=False)
    ]


def curves(seed):
    """Any non-negative numbers that end at 0: some rise, some are flat."""
    rng = np.random.default_rng(seed)
    return {
        name: (*(rng.random(VALUES) * rng.choice([1.0, 10.0])).round(2).tolist(), 0.0)
        for name in LAYERS
    }


def check(chosen, losses, budget, allowed):
    """Hold an allocation against all choices."""
    sizes = [sum(shape) for shape in SHAPES]
    total = sum(losses[name][0] for name in LAYERS)
    best = -float("inf")
    for ranks in itertools.product(allowed, repeat=3):
        if sum(rank * size for rank, size in zip(ranks, sizes, strict=True)) <= budget:
            best = max(
                best,
                total - sum(losses[name][rank] for name, rank in zip(LAYERS, ranks, strict=True)),
            )
    ranks = {layer.layer: layer.rank for layer in chosen.layers}
    kept = total - sum(losses[name][rank] for name, rank in ranks.items())
    certificate = chosen.certificate
    assert sum(rank * size for rank, size in zip(ranks.values(), sizes, strict=True)) <= budget
    assert certificate.kept * total == pytest.approx(max(kept, 0.0), abs=1e-9)
    assert best / total <= certificate.bound + 1e-9
    assert not certificate.optimal or kept >= best - 1e-9
    for layer in chosen.layers:
        assert layer.fisher == losses[layer.layer][layer.rank]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    budget=st.integers(27, 360),
    most=st.integers(1, 4),
    least=st.integers(0, 2),
)
def test_bound_holds_for_every_choice_and_best_corner_is_chosen(seed, budget, most, least):
    least = min(least, most)
    losses, result = curves(seed), spectra()
    with contextlib.suppress(
        UsageError
    ):  # the first rank that lowers anything may be beyond the budget
        chosen = allocate(
            result, Budget("params", budget, "--params"), Constraints(least, most), losses=losses
        )
        check(chosen, losses, budget, range(least, most + 1))


def test_rank_with_costlier_tail_than_lower_rank_is_not_chosen():
    losses = {LAYERS[0]: (4.0, 1.0, 3.0, 2.0, 0.0), LAYERS[1]: (0.0,) * 5, LAYERS[2]: (0.0,) * 5}
    for budget, rank in ((27, 1), (54, 1), (81, 1), (108, 4)):
        result = allocate(spectra(), Budget("params", budget, "x"), Constraints(), losses=losses)
        assert [layer.rank for layer in result.layers] == [rank, 0, 0]


def fisher(name, shape, curve, fro):
    at = {"2": curve[2]}
    return Fisher(
        layer=name, shape=shape, set="text", labels="data", sequences=7, predictions=70, tokens=80, fro=fro,
        fisher=curve, linear=at, weight=at, data=at, kfac=at,
    )  # fmt: skip


def stored(path, records, command="probe fisher", end=True):
    run = Run(command=command, version="0", inputs=(), settings={"ranks": [2]})
    with ResultsWriter(path, run) as writer:
        writer.append(*records)
        if end:
            writer.append(totals([], []))
    return path


def test_layer_weights_accept_probe_fisher_file(tmp_path):
    result, losses = spectra(), curves(3)
    records = [fisher(each.layer, each.shape, losses[each.layer], each.fro) for each in result]
    path = stored(tmp_path / "f.jsonl", records)
    by_file = lora_diag.allocate(results(*result), params=180, layer_weights=path)
    chosen = allocate(result, Budget("params", 180, "--params 180"), Constraints(), losses=losses)
    assert by_file.layers == chosen.layers
    assert by_file.run.inputs[-1].role == "weights"
    assert_names(by_file.run.inputs[-1].kind, 7, "gradients")
    part = stored(tmp_path / "part.jsonl", records[:2])
    lacking = lora_diag.allocate(results(*result), params=180, layer_weights=part)
    assert lacking.layers[2].rank == 0
    assert_names(lacking.run.inputs[-1].notes[0], "1 layers", "measured")


def test_files_without_these_layers_are_refused(tmp_path):
    result, losses = spectra(), curves(3)
    records = [fisher(each.layer, each.shape, losses[each.layer], each.fro) for each in result]
    other = stored(
        tmp_path / "other.jsonl", [fisher("x.weight", (5, 4), (1.0, 1.0, 1.0, 1.0, 0.0), 1.0)]
    )
    with raises_naming(UsageError, "measurement", "spectra"):
        lora_diag.allocate(results(*result), params=180, layer_weights=other)
    off = stored(
        tmp_path / "off.jsonl",
        [record.model_copy(update={"fro": record.fro * 1.1}) for record in records],
    )
    with raises_naming(InputError, "measure", "update"):
        lora_diag.allocate(results(*result), params=180, layer_weights=off)
    cut = stored(tmp_path / "cut.jsonl", records, end=False)
    with pytest.raises(InputError, match="did not finish"):
        lora_diag.allocate(results(*result), params=180, layer_weights=cut)
    assert lora_diag.allocate(
        results(*result), params=180, layer_weights=cut, allow_unfinished=True
    ).layers
    with pytest.raises(UsageError, match="relative"):
        lora_diag.allocate(
            results(*result),
            params=180,
            layer_weights=stored(tmp_path / "f.jsonl", records),
            relative=True,
        )
    with pytest.raises(InputError, match="probe truncation"):
        lora_diag.allocate(
            results(*result),
            params=180,
            layer_weights=stored(tmp_path / "t.jsonl", records, command="probe truncation"),
        )
