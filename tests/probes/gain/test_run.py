"""The gain by layer and direction against dense gradients of autograd, in float64, one sequence at
a time, on many more points of the path than the command uses.
"""

import json

import numpy as np
import peft
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lora_diag
from lora_diag.errors import InputError, NothingComparedError, UsageError
from lora_diag.probes.gain.record import Gain, LayerGain
from tests.messages import assert_names, raises_naming
from tests.probes.making import bert, gpt2, ids_of, labelled, moved, opened, some_text, tensors

POINTS = 24


def truth(base, tuned, sequences):
    """−∫⟨∇ℓ_s, ·⟩dt of every parameter as ``(sequences, *shape)``, the loss of each sequence at both
    ends, and the number of predictions.
    """
    model = opened(base, dtype=torch.float64)
    start = {name: value.clone() for name, value in model.named_parameters()}
    end = dict(opened(tuned, dtype=torch.float64).named_parameters())
    points, weights = np.polynomial.legendre.leggauss(POINTS)
    integrals = {name: [] for name in start}
    ends = []
    predictions = 0

    def loss_at(t, ids, label):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(start[name] + t * (end[name] - start[name]))
        model.zero_grad()
        count = ids.shape[1] - 1 if label is None else 1
        return model(input_ids=ids, labels=ids if label is None else label).loss * count

    for ids, label in sequences:
        ids = torch.tensor([ids])
        label = None if label is None else torch.tensor([label])
        sums = {name: torch.zeros_like(value) for name, value in start.items()}
        for point, weight in zip((points + 1) / 2, weights / 2, strict=True):
            loss_at(point, ids, label).backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    sums[name] -= weight * parameter.grad
        for name, value in sums.items():
            integrals[name].append(value.numpy())
        ends.append([loss_at(t, ids, label).item() for t in (0.0, 1.0)])
        predictions += ids.shape[1] - 1 if label is None else 1
    return {name: np.array(value) for name, value in integrals.items()}, np.array(ends), predictions


def check(results, base, tuned, sequences, rel=2e-3):
    """Compare every record with the definitions."""
    integrals, ends, predictions = truth(base, tuned, sequences)
    model_names = dict(opened(base).named_parameters())
    before, after = tensors(base), tensors(tuned)
    (gain,) = results.whole_of(Gain)
    scale = abs(gain.gain)
    measured = (ends[:, 0] - ends[:, 1]).sum() / predictions
    assert gain.gain == pytest.approx(measured, abs=1e-5 * ends.sum() / predictions)
    assert gain.base_nll == pytest.approx(ends[:, 0], rel=1e-5)
    assert gain.tuned_nll == pytest.approx(ends[:, 1], rel=1e-5)
    assert gain.tokens == sum(gain.predictions) == predictions
    records = results.whole_of(LayerGain)
    for record in records:
        name = next(each for each in model_names if each.endswith(record.layer))
        delta = after[record.layer] - before[record.layer]
        by_sequence = (integrals[name] * delta).reshape(len(sequences), -1).sum(1)
        assert record.by_sequence == pytest.approx(
            by_sequence, rel=rel, abs=1e-4 * scale * predictions
        )
        assert record.gain == pytest.approx(
            by_sequence.sum() / predictions, rel=rel, abs=1e-4 * scale
        )
        assert record.fro == pytest.approx(np.linalg.norm(delta), rel=1e-5)
        if not record.sigma:
            continue
        u, s, vh = np.linalg.svd(delta, full_matrices=False)
        total = integrals[name].sum(0) / predictions
        assert record.sigma == pytest.approx(s, rel=1e-4, abs=1e-6)
        expected = s * np.einsum("oi,on,in->i", u, total, vh)
        # Nearly equal singular values have vectors of their own in every solver.
        is_apart = np.abs(np.diff(s, prepend=np.inf)) > 1e-3 * s[0]
        is_apart &= np.abs(np.diff(s, append=-np.inf)) > 1e-3 * s[0]
        found = np.array(record.directions)
        assert found[is_apart] == pytest.approx(expected[is_apart], rel=1e-2, abs=2e-4 * scale)
        assert record.rest == 0
        assert found.sum() == pytest.approx(record.gain, abs=1e-5)
        assert record.negative == pytest.approx(found[found < 0].sum(), abs=1e-6)
    return gain, records


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gain")
    base = gpt2(folder / "base")
    return base, moved(base, folder / "tuned", 0.03), some_text(folder, windows=5)


def test_layers_and_directions_of_causal_model_equal_autograd(models):
    base, tuned, text = models
    results = lora_diag.probe_gain(base, tuned, data=text, nodes=9, batch=2)
    sequences = [(ids, None) for ids in ids_of(text).tolist()]
    gain, records = check(results, base, tuned, sequences)
    # The tied head and embedding are one weight, the position embeddings, norms and biases whole.
    names = {record.layer for record in records}
    assert names == set(tensors(base))
    assert gain.residual == pytest.approx(0, abs=2e-5)  # rounding to float32
    assert gain.attributed == pytest.approx(sum(record.gain for record in records))
    assert not results.left_out


def test_padded_classifier_equals_autograd(tmp_path):
    base = bert(tmp_path / "base")
    tuned = moved(base, tmp_path / "tuned", 0.05)
    texts = ["short", "a much longer line", "also5", "mid one", "x"]
    file = labelled(tmp_path / "x.jsonl", texts)
    results = lora_diag.probe_gain(base, tuned, data=file, nodes=9, batch=3)
    sequences = [(list(t.encode()), i % 3) for i, t in enumerate(texts)]
    gain, records = check(results, base, tuned, sequences)
    assert {"classifier.bias", "bert.pooler.dense.weight"} <= {record.layer for record in records}
    assert gain.residual == pytest.approx(0, abs=1e-3 * abs(gain.gain))


def test_errors_equal_formula_over_blocks_of_sequences(models):
    base, tuned, text = models
    results = lora_diag.probe_gain(base, tuned, data=text, layers=r"h\.0\.attn\.c_attn\.weight")
    (record,) = results.whole_of(LayerGain)
    (gain,) = results.whole_of(Gain)
    counts = np.array(gain.predictions)
    n, size = len(counts), 2

    def error(values):
        rest = values - values.sum() / counts.sum() * counts
        sums = [rest[i : i + size].sum() for i in range(n - size + 1)]
        return np.sqrt(n / size * n / (n - size) * np.mean(np.square(sums))) / counts.sum()

    assert record.gain_error == pytest.approx(error(np.array(record.by_sequence)), rel=1e-3)
    whole = np.subtract(gain.base_nll, gain.tuned_nll)
    assert gain.gain_error == pytest.approx(error(whole), rel=1e-3)
    assert len(record.direction_errors) == len(record.directions)
    assert gain.residual is None  # the path moves layers that were not selected


def test_quadrature_error_is_distance_from_every_second_node(models):
    base, tuned, text = models
    five = lora_diag.probe_gain(base, tuned, data=text, nodes=5)
    three = lora_diag.probe_gain(base, tuned, data=text, nodes=3)
    for fine, coarse in zip(five.whole_of(LayerGain), three.whole_of(LayerGain), strict=True):
        # Simpson's rule is both the rule of three nodes and that on every second one of five.
        assert fine.quadrature_error == pytest.approx(abs(fine.gain - coarse.gain), abs=1e-7)


def adapter_of(base, folder, seed=3, **options):
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=3, lora_alpha=6, fan_in_fan_out=True, target_modules=["c_attn", "c_proj"], **options
    )
    model = peft.get_peft_model(transformers.GPT2LMHeadModel.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder / "adapter")
    model.merge_and_unload().save_pretrained(folder / "merged")
    return folder / "adapter", folder / "merged"


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_factors_and_merged_weights_give_equal_numbers(models, tmp_path, options):
    base, _, text = models
    adapter, merged = adapter_of(base, tmp_path, **options)
    factored = lora_diag.probe_gain(base, adapter, data=text)
    dense = lora_diag.probe_gain(base, merged, data=text)
    by_layer = {record.layer: record for record in dense.whole_of(LayerGain)}
    (gain,) = factored.whole_of(Gain)
    for record in factored.whole_of(LayerGain):
        other = by_layer[record.layer]
        assert record.gain == pytest.approx(other.gain, abs=1e-4 * abs(gain.gain))
        count = len(record.directions)
        assert record.directions == pytest.approx(
            other.directions[:count], abs=2e-3 * abs(gain.gain)
        )
    assert gain.residual == pytest.approx(0, abs=1e-2 * abs(gain.gain))


def test_energy_without_gain_is_told_from_gain(models, tmp_path):
    """Positions that no sequence has carry most of the energy; a bias all the gain."""
    base, _, text = models
    model = opened(base)
    with torch.no_grad():
        model.transformer.wpe.weight[16:] += 5.0
        model.transformer.ln_f.bias += torch.linspace(-1, 1, 16)
    model.save_pretrained(tmp_path / "planted")
    results = lora_diag.probe_gain(base, tmp_path / "planted", data=text, length=16)
    records = {record.layer: record for record in results.whole_of(LayerGain)}
    (gain,) = results.whole_of(Gain)
    wpe, bias = records["transformer.wpe.weight"], records["transformer.ln_f.bias"]
    assert wpe.fro > 10 * bias.fro
    assert wpe.gain == 0
    assert bias.gain == pytest.approx(gain.gain, rel=1e-2)
    assert abs(bias.gain) > 1e-3


def test_top_keeps_first_directions_and_states_the_rest(models):
    base, tuned, text = models
    options = {"data": text, "layers": r"c_attn\.weight"}
    whole = lora_diag.probe_gain(base, tuned, **options)
    some = lora_diag.probe_gain(base, tuned, top=2, **options)
    for full, cut in zip(whole.whole_of(LayerGain), some.whole_of(LayerGain), strict=True):
        assert len(cut.directions) == 2
        assert cut.directions == pytest.approx(full.directions[:2], rel=1e-4, abs=1e-9)
        assert cut.gain == pytest.approx(full.gain, rel=1e-4, abs=1e-8)
        assert cut.rest == pytest.approx(sum(full.directions[2:]), rel=1e-3, abs=1e-7)


def test_layers_of_second_pass_get_same_numbers(models, monkeypatch):
    base, tuned, text = models
    one = lora_diag.probe_gain(base, tuned, data=text, nodes=3)
    monkeypatch.setattr("lora_diag.probes.gain.integral.groups_of.__defaults__", (1,))
    many = lora_diag.probe_gain(base, tuned, data=text, nodes=3)
    assert [r.gain for r in one.whole_of(LayerGain)] == pytest.approx(
        [r.gain for r in many.whole_of(LayerGain)], rel=1e-5, abs=1e-9
    )


def test_resumed_run_ends_with_same_records(models, tmp_path):
    base, tuned, text = models
    options = {"data": text, "nodes": 3, "layers": "attn", "output": tmp_path / "gain.jsonl"}
    whole = lora_diag.probe_gain(base, tuned, **options)
    lines = options["output"].read_text().splitlines(keepends=True)
    options["output"].write_text("".join(lines[:4]))
    again = lora_diag.probe_gain(base, tuned, resume=True, **options)
    assert again.whole == whole.whole


@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    width=st.sampled_from([4, 8]),
    layers=st.integers(1, 2),
    is_tied=st.booleans(),
    size=st.floats(0.005, 0.05),
    seed=st.integers(0, 99),
)
def test_layers_add_up_to_the_gain(tmp_path_factory, width, layers, is_tied, size, seed):
    folder = tmp_path_factory.mktemp("law")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=is_tied,
        bos_token_id=None,
        eos_token_id=None,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")
    tuned = moved(folder / "base", folder / "tuned", size, seed)
    text = some_text(folder, windows=3)
    results = lora_diag.probe_gain(folder / "base", tuned, data=text, length=16)
    (gain,) = results.whole_of(Gain)
    assert abs(gain.residual) <= 3e-6 + gain.quadrature_error
    assert gain.attributed == pytest.approx(
        sum(sum(record.by_sequence) for record in results.whole_of(LayerGain)) / gain.tokens,
        abs=1e-6,
    )


def test_shifted_text_has_its_own_integral(models, tmp_path):
    base, tuned, text = models
    other = some_text(tmp_path, "other", windows=3, source="shifted")
    both = lora_diag.probe_gain(base, tuned, data=text, shifted=[other], nodes=3)
    alone = lora_diag.probe_gain(base, tuned, data=other, nodes=3)
    expected = [record.gain for record in alone.whole_of(LayerGain)]
    found = [record.gain for record in both.whole_of(LayerGain) if record.shifted]
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize(
    ("options", "error", "facts"),
    [
        ({"nodes": 4}, UsageError, ("nodes", "odd")),
        ({"nodes": 1}, UsageError, ("nodes", "3")),
        ({"layers": "nothing"}, NothingComparedError, ("layers",)),
        ({"data": "absent.txt"}, InputError, ("absent.txt",)),
    ],
)
def test_bad_options_are_named(models, options, error, facts):
    base, tuned, text = models
    with raises_naming(error, *facts):
        lora_diag.probe_gain(base, tuned, **{"data": text, **options})


def test_two_shifted_texts_are_refused(models):
    base, tuned, text = models
    with raises_naming(UsageError, "shifted", "one file"):
        lora_diag.probe_gain(base, tuned, data=text, shifted=[text, text])


def test_update_that_is_not_finite_is_named(models, tmp_path):
    base, _, text = models
    model = opened(base)
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "bad")
    with raises_naming(InputError, "h.0.attn.c_attn.weight"):
        lora_diag.probe_gain(base, tmp_path / "bad", data=text)


def test_command_prints_and_writes(models, tmp_path, loradiag):
    base, tuned, text = models
    output = tmp_path / "gain.jsonl"
    words = ["probe", "gain", base, tuned, "--data", text, "--nodes", 3, "-o", output]
    done = loradiag(*words)
    assert done.code == 0
    records = [json.loads(line) for line in output.read_text().splitlines()]
    (gain,) = (record for record in records if record.get("record") == "gain")
    assert_names(done.out, f"{gain['gain']:+.4f}", "nats")
    assert_names(done.out, f"{gain['attributed']:+.4f}", "residual")


def test_change_within_its_error_has_no_fractions(models, tmp_path, loradiag):
    base, _, text = models
    tuned = moved(base, tmp_path / "tuned", 1e-4)
    done = loradiag("probe", "gain", base, tuned, "--data", text, "--nodes", 3)
    assert done.code == 0
    assert_names(done.out, "not significant", "no fractions")
    assert "of gain" not in done.out
    assert "Where" not in done.out
