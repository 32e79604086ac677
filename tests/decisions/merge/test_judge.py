"""Losses of merges and the choice among them, compared with transformers and NumPy themselves."""

import numpy as np
import pytest

import lora_diag
from lora_diag.decisions.merge import METHODS, MergeOptions, judge
from lora_diag.decisions.merge.judge import MergeJudge
from lora_diag.decisions.merge.record import MergedLoss
from lora_diag.decisions.merge.run import list_candidates
from lora_diag.errors import InputError, UsageError
from lora_diag.running.options import fill_options
from lora_diag.running.probing import ProbeRun
from tests import oracles
from tests.messages import assert_names
from tests.probes.making import gpt2, moved, some_text, tensors, window_losses

SCALES = (0.5, 1.0)
measure = ProbeRun.measure


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """BASE, two fine-tunes, the text of the first one's task, a text of none."""
    folder = tmp_path_factory.mktemp("merged")
    base = gpt2(folder / "base")
    updates = [moved(base, folder / name, 0.05, seed) for name, seed in (("one", 1), ("two", 2))]
    texts = some_text(folder, "first", 12), some_text(folder, "second", 9, source="shifted")
    return base, updates, *texts


def merged(case, output, **options):
    base, updates, first, second = case
    texts = [f"one={first}", str(second)]
    return lora_diag.merge(base, updates, output, checkpoint=True, eval=texts, batch=4, **options)


def losses_of(case, make):
    """Losses of the windows of both texts, with weights made from those of BASE and
    both updates.
    """
    base, updates, *texts = case
    weights, one, two = map(tensors, (base, *updates))
    made = {
        name: make(weights[name], one[name] - weights[name], two[name] - weights[name])
        for name in weights
    }
    return {text.stem: window_losses(base, made, text, 32) for text in texts}


@pytest.mark.slow
def test_texts_of_one_file_name_are_told_apart(case, tmp_path):
    """By the update whose task each is; two texts of one name and one update remain an error."""
    base, updates, *texts = case
    files = [tmp_path / name / "eval.txt" for name in ("one", "two")]
    for file, text in zip(files, texts, strict=True):
        file.parent.mkdir()
        file.write_text(text.read_text())
    named = [f"one={files[0]}", f"two={files[1]}"]
    found = lora_diag.merge(base, updates, tmp_path / "out", checkpoint=True, eval=named, batch=4)
    assert {record.set for record in found.whole_of(MergedLoss)} == {"one", "two"}
    with pytest.raises(UsageError, match="eval"):
        lora_diag.merge(
            base,
            updates,
            tmp_path / "b",
            checkpoint=True,
            eval=[f"one={file}" for file in files],
            batch=4,
        )


@pytest.mark.slow
def test_all_methods_are_judged_and_the_best_is_written(case, tmp_path):
    found = merged(case, tmp_path / "out", method="all", scales=SCALES)
    records = found.whole_of(MergedLoss)
    expected = {
        ("base", None): losses_of(case, lambda w, a, b: w),
        ("alone", None): losses_of(case, lambda w, a, b: w + a),
        **{("mean", s): losses_of(case, lambda w, a, b, s=s: w + s * (a + b) / 2) for s in SCALES},
        **{("sum", s): losses_of(case, lambda w, a, b, s=s: w + s * (a + b)) for s in SCALES},
    }
    base, alone = expected["base", None], expected["alone", None]["first"]
    methods = {record.method for record in records if record.scale is not None}
    assert methods == {name for name, method in METHODS.items() if not method.needs_factors}
    assert len(records) == 2 + 1 + 2 * len(methods) * len(SCALES)
    costs = {}
    for record in records:
        half = {"first": 6, "second": 4}[record.set]
        assert record.skipped == half
        costs[record.method, record.scale] = record.cost
        if (record.method, record.scale) not in expected:
            continue
        own = expected[record.method, record.scale]
        changes = (own[record.set] - base[record.set])[half:]
        assert record.loss == pytest.approx(own[record.set][half:].mean(), abs=2e-5)
        assert record.change == pytest.approx(changes.mean(), abs=2e-5)
        assert record.change_error == pytest.approx(oracles.error_of_mean(changes), abs=2e-5)
        assert (record.gap is None) == (record.set == "second")
        if record.gap is not None:
            assert record.gap == pytest.approx((own["first"] - alone)[half:].mean(), abs=2e-5)
        if record.scale is not None:
            rises = (own["first"] - alone)[:6].mean(), (own["second"] - base["second"])[:4].mean()
            assert record.cost == pytest.approx(max(rises), abs=2e-5)
    best = min((key for key in costs if key[1] is not None), key=costs.__getitem__)
    chosen = {(record.method, record.scale) for record in records if record.chosen}
    assert chosen == {best}
    assert (found.run.settings["method"], found.run.settings["scale"]) == best
    written = window_losses(case[0], tensors(tmp_path / "out"), case[2], 32)[6:]
    (best_record,) = (record for record in records if record.chosen and record.set == "first")
    assert written.mean() == pytest.approx(best_record.loss, abs=2e-5)


@pytest.mark.slow
def test_choice_by_the_mean_of_one_method(case, tmp_path, monkeypatch):
    found = merged(case, tmp_path / "out", method="sum", scales=(0.25, 1.0), choose="mean")
    one, two = (losses_of(case, lambda w, a, b, s=s: w + s * (a + b)) for s in (0.25, 1.0))
    base, alone = losses_of(case, lambda w, a, b: w), losses_of(case, lambda w, a, b: w + a)
    costs = [
        np.mean(
            [
                (own["first"] - alone["first"])[:6].mean(),
                (own["second"] - base["second"])[:4].mean(),
            ]
        )
        for own in (one, two)
    ]
    records = found.whole_of(MergedLoss)
    assert sorted({r.cost for r in records if r.scale is not None}) == pytest.approx(
        sorted(costs), abs=2e-5
    )
    assert found.run.settings["scale"] == (0.25, 1.0)[int(np.argmin(costs))]
    monkeypatch.setattr(
        MergeJudge, "judge", lambda *arguments: pytest.fail("a finished merge is not judged again")
    )
    again = merged(
        case, tmp_path / "out", method="sum", scales=(0.25, 1.0), choose="mean", resume=True
    )
    assert again.whole_of(MergedLoss) == records


@pytest.mark.slow
def test_merge_with_a_loss_that_is_nan_is_not_chosen(case, tmp_path, monkeypatch):
    """Not even if only a sequence after those that choose has one."""
    chosen = merged(case, tmp_path / "clean", method="sum", scales=SCALES).run.settings["scale"]

    def spoil(run, texts, label):
        found = measure(run, texts, label)
        if label == f"sum λ={chosen:g}":
            for losses in found.values():
                losses.sums[-1] = float("nan")
        return found

    monkeypatch.setattr(ProbeRun, "measure", spoil)
    found = merged(case, tmp_path / "out", method="sum", scales=SCALES)
    assert {found.run.settings["scale"]} == {*SCALES} - {chosen}
    spoilt = [record for record in found.whole_of(MergedLoss) if record.scale == chosen]
    assert {(record.loss, record.cost, record.nll) for record in spoilt} == {(None, None, ())}


@pytest.mark.slow
def test_rounded_checkpoint_is_judged_as_written(case, tmp_path):
    """Also weights that no update changes, and λ within the rounding."""
    base, updates, first, _ = case
    for update in updates:
        lora_diag.extract(base, update, output=tmp_path / update.name, rank=2, layers="c_fc")
    adapters, out = [tmp_path / update.name for update in updates], tmp_path / "out"
    options = {
        "eval": [f"two={first}"],
        "output_dtype": "bfloat16",
        "batch": 4,
        "scales": [0.3],
    }
    found = lora_diag.merge(base, adapters, out, checkpoint=True, **options)
    (best_record,) = (record for record in found.whole_of(MergedLoss) if record.chosen)
    assert best_record.loss == pytest.approx(
        window_losses(base, tensors(out), first, 32).mean(), abs=2e-6
    )


@pytest.mark.slow
def test_interruption_leaves_nothing_and_resume_checks_settings(case, tmp_path, monkeypatch):
    def interrupt(run, texts, label):
        if "sum" in label:
            raise KeyboardInterrupt
        return measure(run, texts, label)

    with monkeypatch.context() as patch:
        patch.setattr(ProbeRun, "measure", interrupt)
        with pytest.raises(KeyboardInterrupt):
            merged(case, tmp_path / "out", method="sum")
    assert not list(tmp_path.iterdir())
    merged(case, tmp_path / "out", method="sum")
    for other in ({"method": "mean"}, {"method": "sum", "scale": 2.0}):
        with pytest.raises(UsageError):
            merged(case, tmp_path / "out", resume=True, **other)


def test_names_and_paths_may_contain_an_equals_sign(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("text.txt", "rank=4.txt", "lr=1=x.txt"):
        (tmp_path / name).touch()
    names = ["lr", "lr=1", "rank"]
    texts = [
        "lr=text.txt",
        "lr=1=text.txt",
        "lr=rank=4.txt",
        "rank=4.txt",
        "lr=1=x.txt",
        "rank=none.txt",
    ]
    assert judge.read_tasks(texts, names) == [
        (0, "text.txt"),
        (1, "text.txt"),
        (0, "rank=4.txt"),
        (None, "rank=4.txt"),
        (None, "lr=1=x.txt"),
        (2, "none.txt"),
    ]


def test_density_applies_to_the_methods_that_trim():
    options = {
        **fill_options(MergeOptions, {}),
        "method": "all",
        "density": 0.3,
        "eval": ["text.txt"],
    }
    found = {candidate.method: candidate.density for candidate in list_candidates(options, 2)}
    assert found == {method: None if method.density is None else 0.3 for method in METHODS.values()}


@pytest.mark.slow
def test_single_merge_of_adapters_is_judged_by_all_sequences(case, tmp_path):
    base, updates, first, _ = case
    for update in updates:
        lora_diag.extract(base, update, output=tmp_path / update.name, rank=3)
    adapters = [tmp_path / update.name for update in updates]
    found = lora_diag.merge(
        base, adapters, tmp_path / "out", eval=[f"two={first}"], batch=4, rank=2
    )
    by_method = {record.method: record for record in found.whole_of(MergedLoss)}
    assert {record.skipped for record in by_method.values()} == {0}
    probed = lora_diag.probe_outputs(
        base, None, [adapters[1], tmp_path / "out"], eval=[first], batch=4
    ).whole
    assert [by_method[name].loss for name in ("base", "alone", "mean")] == pytest.approx(
        [record.loss for record in probed], abs=1e-6
    )
    assert (by_method["mean"].chosen, by_method["mean"].update) == (True, str(adapters[1]))


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"method": "all"}, ["method='all'", "eval"]),
        ({"scales": [0.5]}, ["scales", "eval"]),
        ({"eval": ["three=text.txt"]}, ["three", "one", "two"]),
        ({"eval": ["one=text.txt"]}, ["text.txt"]),
    ],
)
def test_unusable_texts_and_options_are_refused(case, tmp_path, options, facts):
    base, updates, *_ = case
    with pytest.raises((UsageError, InputError)) as error:
        lora_diag.merge(base, updates, tmp_path / "out", checkpoint=True, **options)
    assert_names(str(error.value), *facts)
    assert not list(tmp_path.iterdir())


def test_text_too_short_to_choose_by_is_refused(case, tmp_path):
    with pytest.raises(UsageError) as error:
        merged(case, tmp_path / "out", method="all", max_sequences=4)
    assert_names(str(error.value), "first.txt", "4 sequences")
    assert not list(tmp_path.iterdir())
