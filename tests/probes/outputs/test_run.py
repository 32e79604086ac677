"""Distances of outputs against logits of transformers and PEFT themselves, in float64 NumPy."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.special import log_softmax
from scipy.stats import t as student_t

import lora_diag
import lora_diag.probes.outputs.measure as measuring
from lora_diag.catalog import read_results
from lora_diag.errors import UsageError
from lora_diag.models.losses import Forgetting, Losses
from tests import oracles
from tests.messages import assert_names
from tests.probes.making import (
    SAMPLES,
    bert,
    gpt2,
    ids_of,
    labelled,
    moved,
    opened,
    some_text,
    tensors,
)

# PEFT asks transformers for what it calls otherwise by now.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def outputs_of(model, windows):
    """The logits (tokens, classes) of every predicted position, and the hidden states (depths,
    tokens, size).
    """
    with torch.no_grad():
        outputs = [model(input_ids=one[None], output_hidden_states=True) for one in windows]
    states = torch.cat([torch.stack(output.hidden_states)[:, 0] for output in outputs], 1)
    return torch.cat(
        [output.logits[0, :-1] for output in outputs]
    ).double().numpy(), states.double().numpy()


@pytest.fixture
def small(tmp_path):
    """BASE, TUNED, another update, a text."""
    base = gpt2(tmp_path / "base")
    return (
        base,
        moved(base, tmp_path / "tuned"),
        moved(base, tmp_path / "other", seed=3),
        some_text(tmp_path),
    )


@pytest.fixture
def case(tmp_path):
    """BASE, TUNED, an adapter, a reference, a text."""
    base, tuned = SAMPLES / "base", SAMPLES / "full_ft"
    return (
        base,
        tuned,
        SAMPLES / "lora_r16",
        moved(tuned, tmp_path / "other", 0.002),
        some_text(tmp_path, length=64),
    )


@pytest.mark.parametrize("memory", [2**30, 1])
def test_probe_equals_independent_computation(case, monkeypatch, memory):
    base, tuned, adapter, reference, text = case
    monkeypatch.setattr(measuring, "OUTPUT_BYTES", memory)  # all at once, or batch by batch
    result = lora_diag.probe_outputs(
        base, tuned, [adapter], reference=reference, eval=[text], length=64, batch=2
    )
    windows = ids_of(text, 64)
    models = {
        "base": (base,),
        "tuned": (tuned,),
        "adapter": (base, adapter),
        "reference": (reference,),
    }
    z = {name: outputs_of(opened(*paths), windows)[0] for name, paths in models.items()}
    wanted = windows[:, 1:].reshape(-1).numpy()
    p = log_softmax(z["tuned"], 1)
    losses = {
        name: -log_softmax(each, 1)[np.arange(len(wanted)), wanted] for name, each in z.items()
    }
    assert [record.subject for record in result.whole] == list(z)
    for record in result.whole:
        own, tuned_z, base_z = z[record.subject], z["tuned"], z["base"]
        q = log_softmax(own, 1)
        distance = np.linalg.norm(tuned_z - own) / np.linalg.norm(tuned_z - base_z)
        assert record.loss == pytest.approx(losses[record.subject].mean(), abs=1e-5)
        assert record.distance == pytest.approx(distance, rel=1e-4, abs=1e-6)
        assert record.kl == pytest.approx((np.exp(p) * (p - q)).sum(1).mean(), rel=1e-3, abs=1e-7)
        assert record.agreement == pytest.approx((own.argmax(1) == tuned_z.argmax(1)).mean())
        each = (losses[record.subject] - losses["tuned"]).reshape(len(windows), -1).mean(1)
        assert record.gap == pytest.approx(each.mean(), abs=1e-5)
        assert record.gap_error == pytest.approx(oracles.error_of_mean(each), abs=1e-5)
        assert record.change == pytest.approx(
            (losses[record.subject] - losses["base"]).mean(), abs=1e-5
        )
        each = (losses[record.subject] - losses["base"]).reshape(len(windows), -1).mean(1)
        assert record.change_error == pytest.approx(oracles.error_of_mean(each), abs=1e-5)
        base_p = log_softmax(base_z, 1)
        divergences = (np.exp(base_p) * (base_p - q)).sum(1)
        assert record.kl_base == pytest.approx(divergences.mean(), rel=1e-3, abs=1e-7)
        each = divergences.reshape(len(windows), -1).mean(1)
        assert record.kl_base_error == pytest.approx(
            oracles.error_of_mean(each), rel=1e-3, abs=1e-7
        )
        assert record.confident == pytest.approx(
            (losses[record.subject] < np.log(2)).mean(), abs=1e-9
        )
        mean = {name: each.mean() for name, each in losses.items()}
        share = (mean["base"] - mean[record.subject]) / (mean["base"] - mean["tuned"])
        assert record.kept == pytest.approx(share, abs=1e-4)
        sums = losses[record.subject].reshape(len(windows), -1).sum(1)
        np.testing.assert_allclose(record.nll, sums, atol=1e-3)
        assert record.predictions == ((63,) * len(windows) if record.subject == "base" else ())
        assert record.name == {"adapter": str(adapter), "reference": str(reference)}.get(
            record.subject, ""
        )


def hidden_distances(models, windows):
    """Return how far the states of the third model are from those of TUNED, by what BASE is, at
    each depth.
    """
    base, tuned, own = (outputs_of(model, windows)[1] for model in models)
    return np.linalg.norm(tuned - own, axis=(1, 2)) / np.linalg.norm(tuned - base, axis=(1, 2))


def test_hidden_states_are_compared_depth_by_depth(case):
    base, tuned, adapter, _, text = case
    result = lora_diag.probe_outputs(base, tuned, [adapter], eval=[text], length=64, batch=2).whole
    models = opened(base), opened(tuned), opened(base, adapter)
    expected = hidden_distances(models, ids_of(text, 64))
    assert len(result[2].hidden) == 5  # embeddings and four blocks
    np.testing.assert_allclose(result[2].hidden, expected, rtol=1e-4)
    assert (result[0].hidden, result[1].hidden) == ((1.0,) * 5, (0.0,) * 5)


def test_unchanged_depth_has_no_distance(small):
    base, tuned, other, text = small
    weights = tensors(base) | {
        k: v for k, v in tensors(tuned).items() if "h.1." in k
    }  # only the second block moved
    save_file(
        {name: torch.from_numpy(value).float() for name, value in weights.items()},
        tuned / "model.safetensors",
    )
    result = lora_diag.probe_outputs(base, tuned, [other], eval=[text]).whole
    assert result[2].hidden[:2] == (None, None)
    assert result[2].hidden[2] > 0


def test_hidden_states_exclude_padding(tmp_path):
    base = bert(tmp_path / "base")
    tuned, other = (
        moved(base, tmp_path / name, 0.05, seed) for name, seed in (("tuned", 1), ("other", 3))
    )
    texts = ["abc" * (i + 1) for i in range(6)]
    file = labelled(tmp_path / "x.jsonl", texts)

    ids = [torch.tensor(list(text.encode())) for text in texts]
    expected = hidden_distances([opened(folder) for folder in (base, tuned, other)], ids)
    result = lora_diag.probe_outputs(
        base, tuned, [other], eval=[file], tokenizer="bytes", batch=4
    ).whole
    np.testing.assert_allclose(result[2].hidden, expected, rtol=1e-4)


def test_sample_adapter_losses_match_readme():
    message = json.loads((SAMPLES / "losses.json").read_text())["losses"]
    names, evaluate = ("base", "full_ft", "lora_r4", "lora_r16"), [SAMPLES / "eval" / "shifted.txt"]
    base, tuned, *adapters = (SAMPLES / name for name in names)
    result = lora_diag.probe_outputs(base, tuned, adapters, eval=evaluate)
    for record, name in zip(result.whole, names, strict=True):
        assert record.loss == pytest.approx(message[name]["shifted"], abs=1e-4)


def test_lost_at_most_is_upper_end_of_one_sided_interval():
    base, model = (Losses.of(sums, (2, 2, 2)) for sums in ((2.0, 4.0, 3.0), (3.0, 4.5, 5.0)))
    fields = Forgetting(kl=[0.1, 0.2, 0.3]).compare(model, base)
    each = np.array([0.5, 0.25, 1.0])  # below four sequences: N - 1 degrees of freedom
    error = each.std(ddof=1) / 3**0.5
    assert fields["change_error"] == pytest.approx(error)
    assert fields["lost_at_most"] == pytest.approx(each.mean() + error * student_t.ppf(0.95, 2))
    one = Forgetting(kl=[0.1]).compare(Losses.of([3.0], [2]), Losses.of([2.0], [2]))
    assert (one["change"], one["lost_at_most"], one["kl_base_error"]) == (0.5, None, None)


def test_results_are_independent_of_adapter_order(tmp_path):
    base = gpt2(tmp_path / "base")
    tuned, one, two = (
        moved(base, tmp_path / name, 0.1, seed) for seed, name in enumerate(("tuned", "one", "two"))
    )
    text = some_text(tmp_path)

    def losses(*order):
        return {
            r.name: (r.loss, r.kl)
            for r in lora_diag.probe_outputs(base, tuned, order, eval=[text]).whole
        }

    assert losses(one, two) == losses(two, one)


def test_full_fine_tune_alone_is_compared_with_base(small):
    base, tuned, other, text = small
    alone = lora_diag.probe_outputs(base, tuned, eval=[text]).whole
    both = lora_diag.probe_outputs(base, tuned, [other], eval=[text]).whole
    assert [(record.subject, record.loss, record.change) for record in alone] == [
        (record.subject, record.loss, record.change)
        for record in both
        if record.subject != "adapter"
    ]


def test_run_begun_with_other_sequences_is_not_resumed(small, tmp_path):
    """Earlier versions used the first N sequences for --max-sequences N; the text is the same."""
    base, tuned, other, text = small
    output = tmp_path / "cut.jsonl"
    options = {"eval": [text], "output": output, "max_sequences": 2}
    lora_diag.probe_outputs(base, tuned, [other], **options)
    first, *records = output.read_text().splitlines(keepends=True)
    earlier = json.loads(first)
    assert earlier["inputs"][-1]["notes"]
    earlier["inputs"][-1]["notes"] = ["the first 2 of 3 sequences, by --max-sequences"]
    output.write_text(json.dumps(earlier) + "\n" + records[0])
    before = output.read_bytes()
    with pytest.raises(UsageError) as error:
        lora_diag.probe_outputs(base, tuned, [other], **options, resume=True)
    assert_names(str(error.value), "cut.jsonl", "held_out.txt", "first 2 of 3")
    assert output.read_bytes() == before


def test_adapters_of_a_run_are_compared_as_equals(tmp_path, loradiag):
    """In the order of their steps, not of the shell; and their losses are those of a comparison
    with TUNED.
    """
    names = {"checkpoint-100": "lora_r16", "checkpoint-20": "lora_r4"}
    for name, sample in names.items():
        shutil.copytree(SAMPLES / sample, tmp_path / name)
    text = some_text(tmp_path, length=64)
    words = (
        "probe",
        "outputs",
        SAMPLES / "base",
        *names,
        "--eval",
        text,
        "--length",
        "64",
        "-o",
        "equals.jsonl",
    )
    ran = loradiag(*words)
    assert ran.code == 0, ran.err
    equals = read_results(tmp_path / "equals.jsonl").whole
    assert [record.name for record in equals] == [
        "",
        "checkpoint-20",
        "checkpoint-100",
    ]  # the first is BASE
    full = lora_diag.probe_outputs(
        SAMPLES / "base",
        SAMPLES / "full_ft",
        [tmp_path / name for name in names],
        eval=[text],
        length=64,
    ).whole
    losses = {
        record.name.rpartition("/")[2]: record.loss
        for record in full
        if record.subject == "adapter"
    }
    for record in equals[1:]:
        assert record.loss == pytest.approx(losses[record.name], abs=1e-6)
        assert (record.gap, record.kept, record.distance, record.kl, record.hidden) == (None,) * 5
    assert_names(ran.out, "checkpoint-100", "checkpoint-20", "sequences would decide")
    assert loradiag("report", "equals.jsonl", "-o", "equals.md", "--format", "md").code == 0
    page = (tmp_path / "equals.md").read_text(encoding="utf-8")
    assert_names(page, "checkpoint-20", "checkpoint-100", "base")
    assert "does as well as the full fine-tune" not in page


@pytest.mark.parametrize(
    ("given", "models", "tuned", "others"),
    [
        (None, ["full", "lora-9", "lora-10"], "full", ["lora-9", "lora-10"]),
        (None, ["lora-10", "lora-9"], None, ["lora-9", "lora-10"]),
        (None, ["lora-9", "full"], None, ["lora-9", "full"]),
        (None, ["full-20", "full-3", "lora-9"], None, ["full-3", "full-20", "lora-9"]),
        (None, ["full-20", "lora-9"], "full-20", ["lora-9"]),
        ("lora-10", ["lora-10", "lora-9"], "lora-10", ["lora-9"]),
        ("full-3/", ["full-20", "full-3"], "full-3/", ["full-20"]),
    ],
)
def test_first_model_is_tuned_unless_it_is_an_equal(
    tmp_path, monkeypatch, given, models, tuned, others
):
    monkeypatch.chdir(tmp_path)
    for name in ("full", "full-3", "full-20", "lora-9", "lora-10"):
        (tmp_path / name).mkdir()
        file = "adapter_model.safetensors" if "lora" in name else "model.safetensors"
        save_file({"a.weight": torch.ones(1)}, tmp_path / name / file)
    monkeypatch.setattr(measuring, "probe_outputs", lambda base, tuned, others: (tuned, others))
    assert measuring.compare_models("base", models, given) == (tuned, others)


def test_estimate_of_time_includes_comparison_of_logits(small, monkeypatch):
    class BegunError(Exception):
        pass

    def begin(*args):
        raise BegunError

    compared, divergence = [], measuring.divergence
    monkeypatch.setattr(
        measuring, "divergence", lambda p, q: compared.append(p.shape) or divergence(p, q)
    )
    monkeypatch.setattr(measuring, "measure_outputs", begin)
    with pytest.raises(BegunError):
        lora_diag.probe_outputs(*small[:2], eval=[small[3]], length=16, batch=2)
    assert len(compared) == 2 * 2  # with BASE and with TUNED, for each sequence of a batch
