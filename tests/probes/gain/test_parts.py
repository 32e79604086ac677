"""Measured losses with a part of the update: every record against weights that NumPy builds from the
files in float64 and the model's own loss; what is chosen by them; and what ``extract`` and
``allocate`` write.
"""

import json
from itertools import accumulate

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

import lora_diag
from lora_diag.errors import InputError, UsageError
from lora_diag.metrics.statistics import paired_half
from lora_diag.probes.gain.choice import find_best_drop
from lora_diag.probes.gain.parts import find_smallest
from lora_diag.probes.gain.record import Gain, GainLoss, LayerGain
from lora_diag.records.names import module_type_of
from tests.messages import assert_names, raises_naming
from tests.probes.making import gpt2, ids_of, moved, some_text, tensors, window_losses

LENGTH, WINDOWS = 32, 24
# Of 24 windows the first 14 choose and the last 7 judge.
FIRST, LAST = 14, 7


def trained(base, folder, text, part="", rate=1e-2, steps=60):
    """BASE after a few steps of AdamW on a text, of the parameters with such a name."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel.from_pretrained(base)
    weights = [value for name, value in model.named_parameters() if part in name]
    optimizer = torch.optim.AdamW(weights, lr=rate)
    ids = ids_of(text)
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """BASE, TUNED, its text and a shifted one, and the results on both, measured by parts."""
    folder = tmp_path_factory.mktemp("parts")
    text = some_text(folder, "text", WINDOWS)
    other = some_text(folder, "other", WINDOWS, source="shifted")
    base = trained(gpt2(folder / "start"), folder / "base", other)
    tuned = trained(base, folder / "tuned", text, ".h.", 5e-3, 15)
    output = folder / "gain.jsonl"
    results = lora_diag.probe_gain(
        base, tuned, data=text, eval=[text], shifted=[other], measure=True, output=output
    )
    return base, tuned, text, other, output, results


def ordered_directions(results):
    """Layer and place of the directions with a positive gain, by gain per parameter."""
    found = [
        (gain / sum(record.shape), record.layer, place)
        for record in results.whole_of(LayerGain)
        if not record.shifted
        for place, gain in enumerate(record.directions)
        if gain > 0
    ]
    return [(layer, place) for _, layer, place in sorted(found, key=lambda item: -item[0])]


def costly_directions(results, threshold):
    """Layer and place of what costs on the shifted text, and gains at most a fraction of it."""
    gains, others = (
        {r.layer: r.directions for r in results.whole_of(LayerGain) if r.shifted == shifted}
        for shifted in (False, True)
    )
    return [
        (layer, place)
        for layer, values in gains.items()
        for place, gain in enumerate(values)
        if (cost := -others[layer][place]) > 0 and gain <= threshold * cost
    ]


def weights_of(record, results, before, after):
    """The weights of the model that a record is about."""
    split = [r.layer for r in results.whole_of(LayerGain) if r.sigma and not r.shifted]
    if record.subject == "base":
        return before
    if record.subject in {"tuned", "without", "alone"}:
        inside, outside = {"tuned": (after, after), "without": (before, after)}.get(
            record.subject, (after, before)
        )
        return {n: (inside if module_type_of(n) == record.name else outside)[n] for n in after}
    chosen = {layer: [] for layer in split}
    if record.subject == "uniform":
        chosen = {layer: list(range(record.amount)) for layer in split}
    elif record.subject == "directions":
        for layer, place in ordered_directions(results)[: record.amount]:
            chosen[layer].append(place)
    else:
        for layer, place in costly_directions(results, float(record.name)):
            chosen[layer].append(place)
        assert sum(map(len, chosen.values())) == record.amount
    weights = dict(after)
    for layer, places in chosen.items():
        u, s, vh = np.linalg.svd(after[layer] - before[layer], full_matrices=False)
        part = (u[:, places] * s[places]) @ vh[places] if places else 0.0
        weights[layer] = (after if record.subject == "dropped" else before)[layer] + (
            -part if record.subject == "dropped" else part
        )
    return weights


def test_every_loss_equals_that_of_weights_from_the_files(case):
    base, tuned, text, other, _, results = case
    before, after = tensors(base), tensors(tuned)
    records = results.whole_of(GainLoss)
    subjects = {record.subject for record in records}
    assert subjects >= {"base", "tuned", "without", "alone", "uniform", "directions", "dropped"}
    losses = {}
    for record in records:
        path = other if record.shifted else text
        key = (record.subject, record.name, record.amount, path)
        if key not in losses:
            weights = weights_of(record, results, before, after)
            losses[key] = window_losses(base, weights, path, LENGTH)
        part = slice(-LAST, None) if record.set.endswith("-end") else slice(FIRST)
        own = losses[key][part]
        ends = [window_losses(base, each, path, LENGTH)[part] for each in (before, after)]
        assert record.sequences == len(own)
        assert record.tokens == len(own) * (LENGTH - 1)
        assert record.loss == pytest.approx(own.mean(), abs=2e-5)
        assert record.gap == pytest.approx((own - ends[1]).mean(), abs=2e-5)
        change = (ends[0] - ends[1]).mean()
        kept = (ends[0] - own).mean() / change
        assert record.kept == pytest.approx(kept, abs=1e-4 / abs(change))
        # By overlapping blocks of neighbouring windows.
        n, size = len(own), int(np.sqrt(len(own)))
        rest = ends[0] - own - kept * (ends[0] - ends[1])
        sums = np.array([rest[i : i + size].sum() for i in range(n - size + 1)])
        error = np.sqrt(n / size * n / (n - size) * np.mean(sums**2)) / n / abs(change)
        assert record.kept_error == pytest.approx(error, rel=2e-2, abs=1e-3)


def test_parts_that_choose_and_judge_are_apart(case):
    *_, results = case
    assert {gain.set for gain in results.whole_of(Gain)} == {"text", "other"}
    searched = [r for r in results.whole_of(GainLoss) if r.subject in {"uniform", "dropped"}]
    assert {record.set for record in searched} == {"text-end", "other-end"}
    notes = [note for side in results.run.inputs for note in side.notes]
    assert_names(notes, "first 14 of 24")
    assert_names(notes, "last 7")


def test_smallest_choice_that_is_enough_is_found(case):
    *_, results = case
    for subject in ("uniform", "directions"):
        kept = {
            r.amount: r.kept
            for r in results.whole_of(GainLoss)
            if r.subject == subject and not r.shifted
        }
        enough = min(amount for amount, share in kept.items() if share >= 0.9)
        below = max((amount for amount in kept if amount < enough), default=0)
        assert all(share < 0.9 for amount, share in kept.items() if amount < enough)
        assert enough - below <= max(1, enough // 64)


@given(st.integers(1, 5000), st.data())
def test_search_ends_at_the_smallest_within_its_resolution(most, data):
    least = data.draw(st.integers(1, most + 1))
    tried = []
    found = find_smallest(most, lambda count: tried.append(count) or count >= least)
    if least > most:
        assert found is None
    else:
        assert least <= found <= least + max(1, found // 64)
        assert found in tried
    assert len(tried) == len(set(tried)) <= 26
    assert all(1 <= count <= most for count in tried)


def test_chosen_directions_are_extracted(case, tmp_path):
    base, tuned, _, _, output, results = case
    before, after = tensors(base), tensors(tuned)
    ordered = ordered_directions(results)
    sizes = {layer: sum(before[layer].shape) for layer, _ in ordered}
    total = list(accumulate(sizes[layer] for layer, _ in ordered))[9]
    folder = tmp_path / "adapter"
    found = lora_diag.extract(base, tuned, folder, directions=output, params=total)
    assert sum(record.rank for record in found) == 10
    stored = load_file(folder / "adapter_model.safetensors")
    for record in found:
        places = sorted(place for layer, place in ordered[:10] if layer == record.layer)
        assert list(record.places) == places
        u, s, vh = np.linalg.svd(after[record.layer] - before[record.layer], full_matrices=False)
        expected = (u[:, places] * s[places]) @ vh[places]
        a, b = (
            stored[f"base_model.model.transformer.{record.module}.lora_{side}.weight"]
            if f"base_model.model.transformer.{record.module}.lora_{side}.weight" in stored
            else stored[f"base_model.model.{record.module}.lora_{side}.weight"]
            for side in "AB"
        )
        assert pytest.approx(expected, abs=1e-4 * s[0]) == (b @ a).T
        lost = np.linalg.norm(after[record.layer] - before[record.layer] - expected)
        assert record.epsilon == pytest.approx(lost / np.linalg.norm(s), rel=1e-3)
        assert record.retained == pytest.approx((s[places] ** 2).sum() / (s**2).sum(), rel=1e-3)
        assert record.epsilon >= record.least_epsilon - 1e-6


def test_measured_loss_of_the_choice_is_in_its_card(case, tmp_path, loradiag):
    base, tuned, _, _, output, results = case
    choices = [r for r in results.whole_of(GainLoss) if r.subject == "directions" and not r.shifted]
    best = min((r for r in choices if r.kept >= 0.9), key=lambda record: record.amount)
    folder = tmp_path / "adapter"
    done = loradiag("extract", base, tuned, "--directions", output, "--keep", 0.9, "-o", folder)
    assert done.code == 0, done.err
    card = (folder / "README.md").read_text()
    half = 100 * paired_half(best.kept_error, best.sequences)
    assert_names(card, best.amount, f"loss {best.loss:.4f}", "text-end", f"±{half:.1f}%")
    lines = (folder / "extraction.jsonl").read_text().splitlines()
    assert sum(json.loads(line).get("rank", 0) for line in lines) == best.amount


def test_drop_keeps_all_but_what_costs(case, tmp_path):
    base, tuned, _, _, output, results = case
    best = find_best_drop(results)
    folder = tmp_path / "adapter"
    if not best:
        with raises_naming(UsageError, "none", "90%"):
            lora_diag.extract(base, tuned, folder, directions=output, drop=True)
        return
    found = lora_diag.extract(base, tuned, folder, directions=output, drop=True)
    total = sum(len(r.sigma) for r in results.whole_of(LayerGain) if not r.shifted)
    assert sum(record.rank for record in found) == total - best[0].amount


def loss_record(subject, shifted, gap, kept, name="0", error=0.01):
    return GainLoss(
        set="b" if shifted else "a",
        shifted=shifted,
        subject=subject,
        name=name,
        amount=3,
        data="0",
        tokens=100,
        sequences=100,
        loss=1.0,
        gap=gap,
        gap_error=error,
        kept=kept,
        kept_error=error,
    )


@pytest.mark.parametrize(
    ("cost", "kept", "is_dropped"),
    [(-0.1, 0.99, True), (-0.1, 0.91, False), (-0.0235, 0.99, False), (0.1, 0.99, False)],
    ids=["saves", "keeps-too-little", "significant-only-alone", "costs"],
)
def test_only_what_saves_significantly_is_dropped(case, cost, kept, is_dropped):
    *_, results = case
    whole = (
        loss_record("dropped", False, 0.01, kept),
        loss_record("dropped", True, cost, 1.0),
        loss_record("dropped", False, 0.5, 0.2, name="1"),
        loss_record("dropped", True, -0.5, 1.0, name="1"),
    )
    found = find_best_drop(lora_diag.Results(results.run, (), (), None, whole))
    assert bool(found) == is_dropped


def test_ranks_are_allocated_by_gain(case, tmp_path, loradiag):
    *_, output, results = case
    gains = {
        r.layer: np.maximum(r.directions, 0)
        for r in results.whole_of(LayerGain)
        if r.sigma and not r.shifted
    }
    budget = 600
    found = lora_diag.allocate(output, params=budget)
    ranks = {record.layer: record.rank for record in found}
    kept = sum(gains[layer][:rank].sum() for layer, rank in ranks.items())
    assert sum(record.params for record in found) <= budget
    sizes = {record.layer: sum(record.shape) for record in found}
    # No exchange of the last rank of one layer for the next one of another is better.
    for taken in (layer for layer in ranks if ranks[layer]):
        for given_to in ranks:
            change = sizes[given_to] - sizes[taken]
            if taken == given_to or change + sum(r.params for r in found) > budget:
                continue
            curve = {layer: np.concatenate([[0], np.cumsum(g)]) for layer, g in gains.items()}
            best = max(curve[given_to][: ranks[given_to] + 2][-1], 0)
            exchanged = kept - gains[taken][ranks[taken] - 1] + best
            exchanged -= curve[given_to][ranks[given_to]]
            assert exchanged <= kept + found.whole[0].gap * sum(g.sum() for g in gains.values())
    for record in found:
        assert record.fisher == pytest.approx(gains[record.layer][record.rank :].sum(), rel=1e-6)
    done = loradiag("allocate", output, "--params", budget)
    assert_names(done.out, "Gain kept", "directions that lower the loss")


def test_choice_of_another_update_is_refused(case, tmp_path):
    base, _, _, _, output, _ = case
    stranger = moved(base, tmp_path / "stranger", 0.05)
    with raises_naming(InputError, "singular value", "directions"):
        lora_diag.extract(base, stranger, tmp_path / "adapter", directions=output, params="2k")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({}, ("directions", "exactly one")),
        ({"params": "1k", "drop": True}, ("directions", "exactly one")),
        ({"keep": 0.9, "rank": 3}, ("exactly one option",)),
        ({"keep": 1.0}, ("no measured", "100%")),
        ({"params": 10}, ("params", "too small", "parameters")),
        ({"keep": 0.9, "recover": True}, ("directions", "recover")),
    ],
)
def test_contradicting_options_of_extract_are_named(case, tmp_path, options, facts):
    base, tuned, _, _, output, _ = case
    with raises_naming(UsageError, *facts):
        lora_diag.extract(base, tuned, tmp_path / "a", directions=output, **options)


def test_amount_without_directions_is_named(case, tmp_path, loradiag):
    base, tuned, *_ = case
    done = loradiag("extract", base, tuned, "--keep", 0.9, "-o", tmp_path / "a")
    assert done.code == 2
    assert_names(done.err, "--keep", "--directions FILE")


def test_text_that_chose_may_not_judge(case, tmp_path):
    base, tuned, text, *_ = case
    content = text.read_bytes()
    near = tmp_path / "near.txt"
    near.write_bytes(content[: 10 * LENGTH] + some_text(tmp_path, "x", 24).read_bytes()[:96])
    with raises_naming(InputError, "near.txt", "sequences are also in", "text.txt"):
        lora_diag.probe_gain(base, tuned, data=text, eval=[near])
    short = tmp_path / "short.txt"
    short.write_bytes(content[: 9 * LENGTH])
    with raises_naming(InputError, "short.txt", "9 sequences", "too few"):
        lora_diag.probe_gain(base, tuned, data=short, eval=[short])


def test_common_sequences_are_left_out(case, tmp_path):
    base, tuned, text, other, *_ = case
    mixed = tmp_path / "mixed.txt"
    mixed.write_bytes(text.read_bytes()[: 2 * LENGTH] + other.read_bytes()[: 10 * LENGTH])
    results = lora_diag.probe_gain(base, tuned, data=text, eval=[mixed])
    (side,) = [side for side in results.run.inputs if side.role == "eval"]
    assert side.tensors == 10
    assert_names(side.notes, "2 sequences", "text", "left out")


def test_nothing_is_searched_without_significant_gain(case, loradiag):
    base, tuned, text, other, *_ = case
    done = loradiag("probe", "gain", base, tuned, "--data", text, "--eval", other, "--nodes", 3)
    assert done.code == 0, done.err
    assert_names(done.out, "Gain on other", "no significant gain", "nothing is searched")
    assert "Enough" not in done.out


def test_command_prints_three_numbers_and_choices(case, loradiag):
    base, tuned, text, other, output, _ = case
    done = loradiag(
        *("probe", "gain", base, tuned, "--data", text, "--eval", text, "--shifted", other),
        *("--measure", "-o", output, "--resume"),
    )
    assert done.code == 0, done.err
    assert_names(done.out, "of gain", "energy", "lost without", "alone")
    assert_names(done.out, "Enough on text-end", "uniform r=", "by gain per parameter")
    assert_names(done.out, "Drop")
    assert_names(done.out, "Next", "loradiag extract", "chosen/")


@pytest.mark.parametrize("by", ["type", "layer"])
def test_part_that_is_the_whole_update_has_all_of_it(case, tmp_path, by):
    """A part that is the whole update: nothing is left without it, and all is had alone."""
    base, tuned, text, *_ = case
    after, before = tensors(tuned), tensors(base)
    model = transformers.GPT2LMHeadModel.from_pretrained(base)
    name = "h.0.mlp.c_fc.weight"
    with torch.no_grad():
        model.transformer.get_parameter(name).copy_(torch.from_numpy(after[f"transformer.{name}"]))
    one = tmp_path / "one"
    model.save_pretrained(one)
    assert before.keys() == after.keys()
    results = lora_diag.probe_gain(base, one, data=text, measure=True, by=by)
    kept = {r.subject: r.kept for r in results.whole_of(GainLoss) if r.name}
    names = {r.name for r in results.whole_of(GainLoss) if r.name}
    assert len(names) == 1
    assert kept == pytest.approx({"without": 0.0, "alone": 1.0}, abs=1e-9)
