"""The Fisher of discarded tails against per-sequence gradients of autograd, in float64 and one
sequence at a time.
"""

import numpy as np
import pytest
import torch

import lora_diag
from lora_diag.probes.fisher.measure import FisherTail
from tests.messages import assert_names
from tests.probes.making import (
    bert,
    best,
    gpt2,
    ids_of,
    labelled,
    moved,
    opened,
    some_text,
    tensors,
)

RANKS = (0, 1, 3, 8)


def truth(base, tuned, sequences):
    """Per-sequence gradients, inputs and output gradients of every linear layer, of the model in
    float64.
    """
    model = opened(tuned, dtype=torch.float64)
    held, grads, inputs, outputs = {}, {}, {}, {}
    for name, module in model.named_modules():
        if type(module).__name__ in {"Linear", "Conv1D"}:

            def hook(module, args, out, name=name):
                out.retain_grad()
                held[name + ".weight"] = (args[0], out, module.weight)

            module.register_forward_hook(hook)
    predictions = 0
    for ids, label in sequences:
        model.zero_grad()
        ids = torch.tensor([ids])
        out = model(input_ids=ids, labels=ids if label is None else torch.tensor([label]))
        count = ids.shape[1] - 1 if label is None else 1
        (out.loss * count).backward()
        predictions += count
        for name, (x, y, weight) in held.items():
            grads.setdefault(name, []).append(weight.grad.numpy().copy())
            inputs.setdefault(name, []).append(x.detach().reshape(-1, x.shape[-1]))
            outputs.setdefault(name, []).append(y.grad.reshape(-1, y.shape[-1]))
    second = tuple(
        {
            name: (lambda rows: rows.T @ rows / len(rows))(torch.cat(each).numpy())
            for name, each in kept.items()
        }
        for kept in (inputs, outputs)
    )
    tokens = {name: sum(len(x) for x in each) for name, each in inputs.items()}
    return grads, *second, tokens, predictions


def check_records(results, base, tuned, sequences, transposed):
    """Compare every record with the definitions, by the gradients of ``truth``."""
    all_grads, all_c, all_g, all_tokens, predictions = truth(base, tuned, sequences)
    before, after = tensors(base), tensors(tuned)
    for record in results.whole:
        grads, c, g, tokens = (each[record.layer] for each in (all_grads, all_c, all_g, all_tokens))
        delta = after[record.layer] - before[record.layer]
        assert (record.predictions, record.tokens, record.sequences) == (
            predictions,
            tokens,
            len(grads),
        )
        assert record.fro == pytest.approx(np.linalg.norm(delta), rel=1e-6)
        scale = record.fisher[0] or 1.0
        for rank in range(len(record.fisher)):
            tail = delta - best(delta, rank)
            inner = np.array([(grad * tail).sum() for grad in grads])
            assert record.at(rank) == pytest.approx(
                (inner**2).sum() / predictions, rel=2e-3, abs=1e-6 * scale
            )
            if rank in RANKS:
                key, tail = str(rank), tail.T if transposed else tail
                assert record.linear[key] == pytest.approx(
                    -inner.sum() / predictions, rel=2e-3, abs=1e-4 * scale**0.5
                )
                assert record.weight[key] == pytest.approx((tail**2).sum(), rel=1e-4)
                assert record.data[key] == pytest.approx(np.trace(tail @ c @ tail.T), rel=1e-3)
                kfac = np.trace(g @ tail @ c @ tail.T) * tokens / predictions
                assert record.kfac[key] == pytest.approx(kfac, rel=2e-3)
        assert record.at(10**6) == 0


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fisher")
    base = gpt2(folder / "base")
    return base, moved(base, folder / "tuned", 0.05), some_text(folder, windows=5)


def test_ranks_of_causal_model_equal_computation_from_gradients(models):
    base, tuned, text = models
    results = lora_diag.probe_fisher(base, tuned, data=text, ranks=RANKS, batch=2)
    check_records(
        results, base, tuned, [(ids, None) for ids in ids_of(text).tolist()], transposed=True
    )
    assert [(record.labels, record.effect, record.on) for record in results.whole] == [
        ("data", None, None)
    ] * 8


def test_sequence_padding_is_ignored(tmp_path):
    base = bert(tmp_path / "base")
    tuned = moved(base, tmp_path / "tuned", 0.05)
    texts = ["short", "a much longer line", "also5", "mid one", "x"]
    file = labelled(tmp_path / "x.jsonl", texts)
    results = lora_diag.probe_fisher(base, tuned, data=file, ranks=RANKS, batch=5)
    check_records(
        results,
        base,
        tuned,
        [(list(t.encode()), i % 3) for i, t in enumerate(texts)],
        transposed=False,
    )
    layers = {record.layer for record in results.whole}
    assert layers >= {"bert.pooler.dense.weight", "bert.encoder.layer.0.output.dense.weight"}


def test_effects_equal_truncated_model(models, tmp_path):
    base, tuned, text = models
    held_out = some_text(tmp_path, "other", windows=3, source="shifted")
    layers = r"h\.1\.(attn\.c_attn|mlp\.c_fc)"
    options = {
        "data": text,
        "eval": [held_out],
        "ranks": (1, 3, 16),
        "layers": layers,
        "batch": 2,
    }
    results = lora_diag.probe_fisher(base, tuned, **options)
    before, after = tensors(base), tensors(tuned)
    ids = ids_of(held_out)

    def logits(weights):
        model = opened(tuned)
        model.load_state_dict(
            {k: torch.tensor(v).float() for k, v in weights.items()}, strict=False
        )
        with torch.no_grad():
            return model(input_ids=ids).logits[:, :-1].double().log_softmax(-1)

    whole = logits(after)
    targets = ids[:, 1:, None]
    assert len(results.whole) == 2
    for record in results.whole:
        assert record.on == "other"
        assert set(record.effect) == {"1", "3"}  # 16 truncates nothing
        for rank, result in record.effect.items():
            delta = after[record.layer] - before[record.layer]
            changed = logits({**after, record.layer: before[record.layer] + best(delta, int(rank))})
            gaps = (whole.gather(-1, targets) - changed.gather(-1, targets)).sum((1, 2)).numpy()
            assert result.gap == pytest.approx(gaps.sum() / 93, abs=1e-5)
            assert result.gap_error == pytest.approx(
                np.std(gaps, ddof=1) * np.sqrt(3) / 93, abs=1e-5
            )
            assert result.kl == pytest.approx(
                float((whole.exp() * (whole - changed)).sum()) / 93, rel=1e-2, abs=1e-7
            )
            assert result.loss == pytest.approx(
                -float(changed.gather(-1, targets).sum()) / 93, abs=1e-5
            )
    alone = lora_diag.probe_fisher(base, tuned, **{**options, "eval": []})
    assert [record.fisher for record in alone.whole] == [record.fisher for record in results.whole]


def test_half_fisher_is_kl_of_small_change(tmp_path):
    """With labels drawn from the model, many times over: the second-order law that gives F its
    meaning.
    """
    base = bert(tmp_path / "base")
    tuned = moved(base, tmp_path / "tuned", 0.01)
    file = labelled(
        tmp_path / "x.jsonl", [f"line {i % 7} of many" for i in range(700)], labels=(0,)
    )
    result = lora_diag.probe_fisher(
        base,
        tuned,
        data=file,
        labels="model",
        measure=True,
        ranks=(1,),
        batch=350,
        layers="output.dense",
    )
    for record in result.whole:
        assert record.at(1) / 2 == pytest.approx(record.effect["1"].kl, rel=0.25)
        assert record.labels == "model"


def test_layers_of_second_pass_get_same_labels(models, monkeypatch):
    base, tuned, text = models
    options = {"data": text, "ranks": (2,), "labels": "model", "seed": 3}
    one = lora_diag.probe_fisher(base, tuned, **options)
    monkeypatch.setattr("lora_diag.probes.fisher.measure.groups_of.__defaults__", (1,))
    many = lora_diag.probe_fisher(base, tuned, **options)
    assert [record.fisher for record in one.whole] == [record.fisher for record in many.whole]
    other = lora_diag.probe_fisher(base, tuned, **{**options, "seed": 4})
    assert [record.fisher for record in one.whole] != [record.fisher for record in other.whole]


def test_reused_layer_gradients_sum_before_square():
    eye = torch.eye(2, dtype=torch.float64)
    tail = FisherTail(
        torch.nn.Linear(2, 2), torch.tensor([2.0, 1.0], dtype=torch.float64), eye, eye, 5**0.5
    )
    x, g = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, -1.0]]])
    for _ in range(2):
        inner = tail.take_input(x, torch.ones(1, 1, dtype=torch.bool))
        tail.take_gradient(g, inner)
    tail.end_batch()
    assert tail.squares.tolist() == [(2 * (6 - 2)) ** 2, (2 * -2) ** 2, 0]
    assert tail.total.tolist() == [8, -4, 0]
    assert tail.take_input(torch.ones(5, 2), torch.ones(1, 3, dtype=torch.bool)) is None
    assert_names(tail.problem, "laid", "sequence")
