"""Curvature against dense Hessians in float64 of transformers' own loss, against curvlinops, and in
a convex case.
"""

import json
import math
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch.func import functional_call

import lora_diag
from lora_diag.models.data import Texts, read_texts
from lora_diag.models.losses import Losses
from lora_diag.models.opening import open_model
from lora_diag.models.swapping import FULL
from lora_diag.probes.curvature import measure as loss_bound
from lora_diag.probes.curvature.measure import LossFunction, estimate_traces
from tests.probes.making import (
    SAMPLES,
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

LAYERS = {"query": "bert.encoder.layer.0.attention.self.query.weight", "head": "classifier.weight"}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A classifier before and after, and lines that it classifies."""
    folder = tmp_path_factory.mktemp("case")
    base = bert(folder / "base")
    text = labelled(folder / "held.jsonl", [chr(97 + i % 5) * (3 + i) for i in range(9)])
    return base, moved(base, folder / "tuned", size=0.3), text


class Dense:
    """Loss, gradient and Hessian in one weight of a classifier, by transformers' loss and autograd
    in float64.
    """

    def __init__(self, folder, text, layer):
        self.layer = layer
        self.model = opened(folder).double()
        self.model.set_attn_implementation("eager")
        items = [json.loads(line) for line in text.read_text().splitlines()]
        longest = max(len(item["text"]) for item in items)
        self.words = {
            "input_ids": torch.tensor(
                [[*item["text"].encode(), *[0] * (longest - len(item["text"]))] for item in items]
            ),
            "attention_mask": torch.tensor(
                [[1] * len(i["text"]) + [0] * (longest - len(i["text"])) for i in items]
            ),
            "labels": torch.tensor([item["label"] for item in items]),
        }
        self.weight = dict(self.model.named_parameters())[layer].detach()

    def loss(self, weight):
        return functional_call(self.model, {self.layer: weight}, (), self.words).loss

    def value(self, weight=None):
        with torch.no_grad():
            return float(self.loss(self.weight if weight is None else torch.as_tensor(weight)))

    def gradient(self):
        weight = self.weight.clone().requires_grad_(True)
        return torch.autograd.grad(self.loss(weight), weight)[0].numpy().reshape(-1)

    def hessian(self, weight=None):
        weight = self.weight if weight is None else torch.as_tensor(weight)
        h = torch.autograd.functional.hessian(self.loss, weight)
        return h.reshape(weight.numel(), weight.numel()).numpy()


@pytest.fixture(scope="module")
def at_base(case):
    base, _, text = case
    return Dense(base, text, LAYERS["query"])


@pytest.fixture(scope="module")
def at_tuned(case):
    _, tuned, text = case
    return Dense(tuned, text, LAYERS["query"])


def curved_at(folder, text, layers, matrix="hessian", size=4):
    model = open_model(folder, torch.device("cpu"), tokenizer="bytes")
    shapes = {name: tuple(dict(model.module.named_parameters())[name].shape) for name in layers}
    return model, LossFunction(model, read_texts(text, model), size, shapes, matrix)


# What curvlinops imports scripts functions, which torch 2.13 deprecates.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_products_equal_curvlinops(case, matrix):
    from curvlinops import GGNLinearOperator, HessianLinearOperator

    layers = [LAYERS["query"], LAYERS["head"], "bert.embeddings.word_embeddings.weight"]
    model, loss_function = curved_at(case[0], case[2], layers, matrix)
    texts = read_texts(case[2], model)
    # one by one, so that nothing is padded
    batches = [
        ({"ids": torch.tensor([one.ids])}, torch.tensor(one.labels)) for one in texts.sequences
    ]

    class Predicts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model.module

        def forward(self, x):
            return self.inner(input_ids=x["ids"], attention_mask=torch.ones_like(x["ids"])).logits

    predicts = Predicts()
    parameters = [
        parameter for name, parameter in model.module.named_parameters() if name in layers
    ]
    kind = HessianLinearOperator if matrix == "hessian" else GGNLinearOperator
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        operator = kind(
            predicts,
            torch.nn.CrossEntropyLoss(),
            parameters,
            batches,
            check_deterministic=False,
            batch_size_fn=lambda x: 1,
        )
        names = [name for name, _ in model.module.named_parameters() if name in layers]
        x = torch.randn(loss_function.params, generator=torch.Generator().manual_seed(0))
        parts = loss_function.split(x)
        truth = operator @ [parts[name].contiguous() for name in names]
    result = loss_function.split(loss_function.product(x))
    for name, part in zip(names, truth, strict=True):
        torch.testing.assert_close(
            result[name], part, atol=1e-5 * float(part.abs().max()), rtol=1e-3
        )


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_products_of_language_models_are_gradient_differences(tmp_path, kind):
    """Llama has SiLU and grouped queries, GPT-2 a tied head and transposed weights."""
    base = SAMPLES / "base" if kind == "llama" else gpt2(tmp_path / "base")
    text = some_text(tmp_path, windows=3)
    model = open_model(base, torch.device("cpu"), length=32)
    shapes = {
        n: tuple(p.shape)
        for n, p in model.module.named_parameters()
        if p.ndim == 2 and ("mlp" in n or "attn" in n)
    }
    loss_function = LossFunction(model, read_texts(text, model), 2, shapes)
    x = torch.randn(loss_function.params, generator=torch.Generator().manual_seed(0))
    result = loss_function.split(loss_function.product(x))
    reference = opened(base).double()
    named, ids = dict(reference.named_parameters()), ids_of(text)
    before = {name: named[name].detach().clone() for name in shapes}

    def gradient(step):
        with torch.no_grad():
            for name, part in loss_function.split(x).items():
                named[name].copy_(before[name] + step * part.double())
        loss = reference(input_ids=ids, labels=ids).loss
        return torch.autograd.grad(loss, [named[name] for name in shapes])

    h = 1e-4
    for name, up, down in zip(shapes, gradient(h), gradient(-h), strict=True):
        truth = (up - down) / (2 * h)
        assert (result[name] - truth).abs().max() <= 1e-3 * truth.abs().max()


def test_one_matrix_of_stack_has_its_block_of_hessian(tmp_path):
    """As experts are stored: ``name[3]`` is a part of a parameter, here a row of one."""
    model, text = (
        open_model(gpt2(tmp_path / "base"), torch.device("cpu")),
        some_text(tmp_path, windows=2),
    )
    texts, name = read_texts(text, model), "transformer.h.0.attn.c_attn.weight"
    whole = LossFunction(model, texts, 2, {name: (16, 48)})
    parts = LossFunction(model, texts, 2, {f"{name}[3]": (1, 48), f"{name}[5]": (1, 48)})
    x = torch.randn(96, generator=torch.Generator().manual_seed(0))
    spread = torch.zeros(16, 48)
    spread[[3, 5]] = x.view(2, 48)
    truth = whole.product(spread.reshape(-1)).view(16, 48)[[3, 5]].reshape(-1)
    torch.testing.assert_close(parts.product(x), truth, atol=1e-6, rtol=1e-4)
    before = whole.weights()
    parts.put(parts.weights() + 1)
    changed = (whole.weights() - before).view(16, 48)
    assert set(changed.abs().sum(1).nonzero().flatten().tolist()) == {3, 5}


def test_trace_is_unbiased_jointly_and_layer_by_layer(case):
    layers = [LAYERS["query"], LAYERS["head"]]
    _, loss_function = curved_at(case[0], case[2], layers)
    together, alone = estimate_traces(loss_function, 40, seed=1)
    truth = {layer: np.trace(Dense(case[0], case[2], layer).hessian()) for layer in layers}
    for layer in layers:
        assert abs(alone[layer].mean - truth[layer]) <= 4 * alone[layer].error
        assert alone[layer].error < abs(truth[LAYERS["head"]])
    assert together.mean == pytest.approx(sum(each.mean for each in alone.values()), rel=1e-5)
    generator, samples = torch.Generator().manual_seed(5), []
    for _ in range(3):
        signs = (torch.randint(0, 2, (loss_function.params,), generator=generator) * 2 - 1).float()
        samples.append(float(signs @ loss_function.product(signs)))
    three, _ = estimate_traces(loss_function, 3, seed=5)
    assert three.mean == pytest.approx(np.mean(samples), rel=1e-4)
    assert three.error == pytest.approx(np.std(samples, ddof=1) / math.sqrt(3), rel=1e-4)
    signs = (
        torch.randint(0, 2, (loss_function.params,), generator=torch.Generator().manual_seed(1)) * 2
        - 1
    ).float()
    one, _ = estimate_traces(loss_function, 1, seed=1)
    assert one.error is None
    assert one.mean == pytest.approx(float(signs @ loss_function.product(signs)), rel=1e-4)


@pytest.fixture(scope="module")
def measured(case):
    base, tuned, text = case
    return lora_diag.probe_curvature(
        base,
        tuned,
        eval=[text],
        layers="query",
        ranks=(0, 2, 9, 16),
        along=(0.05, 0.1),
        eigenvalues=4,
        batch=4,
        tokenizer="bytes",
    )


def of_rank(measured):
    return [record for record in measured.whole if record.record == "loss_bound"]


def test_eigenvalues_at_tuned_equal_dense_hessian(measured, at_tuned):
    joint, layer = (record for record in measured.whole if record.record == "curvature")
    truth = np.linalg.eigvalsh(at_tuned.hessian())
    np.testing.assert_allclose(joint.eigenvalues, truth[::-1][:4], atol=1e-3 * truth[-1])
    assert joint.smallest == pytest.approx(truth[0], abs=1e-3 * truth[-1])
    assert joint.gradient == pytest.approx(np.linalg.norm(at_tuned.gradient()), rel=1e-4)
    assert joint.loss == pytest.approx(at_tuned.value(), abs=1e-5)
    assert (joint.layer, joint.at, joint.params, joint.tokens) == (None, "tuned", 256, 9)
    assert (layer.layer, layer.gradient, layer.eigenvalues) == (LAYERS["query"], joint.gradient, ())


def test_model_bound_and_gap_equal_independent_computation(case, measured, at_tuned):
    name, records = LAYERS["query"], of_rank(measured)
    before, after = tensors(case[0])[name], tensors(case[1])[name]
    delta, g, h = after - before, at_tuned.gradient(), at_tuned.hessian()
    top = np.linalg.eigvalsh(h)[-1]
    assert [(record.rank, record.along) for record in records] == [
        (r, t) for r in (0, 2, 9) for t in (0.05, 0.1, 1.0)
    ]
    for record in records:
        e = record.along * (best(delta, record.rank) - delta)
        flat = e.reshape(-1)
        assert record.tail_energy == pytest.approx((flat**2).sum(), rel=1e-4)
        if record.along == 1:
            s = np.linalg.svd(delta, compute_uv=False)
            assert record.tail_energy == pytest.approx((s[record.rank :] ** 2).sum(), rel=1e-4)
        assert record.linear == pytest.approx(
            g @ flat, abs=1e-4 * np.linalg.norm(g) * np.linalg.norm(flat)
        )
        assert record.quadratic == pytest.approx(
            0.5 * flat @ h @ flat, abs=1e-4 * top * (flat**2).sum()
        )
        assert record.upper == pytest.approx(top / 2 * (flat**2).sum(), rel=2e-3)
        gap = at_tuned.value(after + e) - at_tuned.value()
        assert record.gap == pytest.approx(gap, abs=2e-6)
        there = at_tuned.hessian(after + e)
        assert record.curvature == pytest.approx(
            flat @ there @ flat / (flat**2).sum(), abs=1e-3 * np.abs(there).max()
        )
        assert record.holds == (gap <= g @ flat + top / 2 * (flat**2).sum())


def test_model_is_exact_for_small_steps(measured):
    """What it leaves out falls with the cube of the step."""
    for rank in (0, 2, 9):
        small, double = (r for r in of_rank(measured) if r.rank == rank and r.along < 1)
        assert small.predicted / small.gap == pytest.approx(1, abs=0.05)
        left = [abs(record.gap - record.predicted) for record in (small, double)]
        assert left[0] <= left[1] / 4 + 1e-6


def test_curvature_is_at_most_largest_eigenvalue(measured):
    joint = measured.whole[0]
    for record in of_rank(measured):
        rayleigh = 2 * record.quadratic / record.tail_energy
        assert (
            joint.smallest - 1e-3 * joint.eigenvalues[0] <= rayleigh <= joint.eigenvalues[0] * 1.001
        )


class Bowl:
    """L(w) = ½wᵀHw, in the place of a model, of its loss as a function of weights, and of what
    swaps these.
    """

    layers: ClassVar = {"a": (1, 2)}
    texts, size, model = Texts("x", "x", (), "0", ""), 1, None

    def __init__(self, h, start, end):
        self.h, self.w, self.end = h, start, end
        self.put, self.weights = lambda w: setattr(self, "w", w.clone()), lambda: self.w.clone()

    def arrange(self, ranks, others):
        assert (ranks, others) == ({"a": 1}, FULL)
        self.w = self.end.clone()

    def product(self, x):
        return self.h @ x

    def losses(self, *words):
        return Losses(0.5 * (self.w @ self.h @ self.w)[None], torch.ones(1, dtype=torch.float64))


@pytest.mark.parametrize("way", [0, 1])
def test_bounds_are_tight_on_quadratic(monkeypatch, way):
    h = torch.diag(torch.tensor([2.0, 0.5], dtype=torch.float64))
    start, change = (
        torch.tensor([1.0, -3.0], dtype=torch.float64),
        torch.eye(2, dtype=torch.float64)[way] * 0.7,
    )
    bowl = Bowl(h, start, start + change)
    monkeypatch.setattr(loss_bound, "measure", bowl.losses)
    point = loss_bound.TunedPoint(start, h @ start, bowl.losses(), 2.0, 0.5)
    for record in loss_bound.measure_bounds(bowl, bowl, point, 1, (1.0, 0.5), lambda: None):
        assert record.gap == pytest.approx(record.linear + record.quadratic)
        assert record.gap == pytest.approx(record.linear + (record.lower if way else record.upper))
        assert record.upper == pytest.approx(4 * record.lower)
        assert record.holds
    assert torch.equal(bowl.w, bowl.end)
    flatter = replace(point, largest=h[way, way].item() * 0.9)
    low = loss_bound.measure_bounds(bowl, bowl, flatter, 1, (1.0,), lambda: None)
    assert not low[0].holds  # the loss bends more on the way than λ allows


def test_lower_bound_needs_strong_convexity(measured):
    joint = measured.whole[0]
    assert not joint.strongly_convex
    assert all(record.lower is None for record in of_rank(measured))
    convex = joint.model_copy(update={"smallest": joint.eigenvalues[0] / 100})
    assert convex.strongly_convex
    assert not convex.model_copy(update={"smallest": joint.eigenvalues[0] * 1e-5}).strongly_convex


def test_loss_bound_holds_if_convex(case, tmp_path):
    """The last layer of a classifier alone: softmax regression, trained until its gradient is
    nothing.
    """
    base, name = case[0], LAYERS["head"]
    # every text with several labels, or the optimum would lie at infinity
    texts = [*(word for word in ("aaa", "bcbcb", "dd") for _ in range(4)), "dd"]
    text = labelled(tmp_path / "mixed.jsonl", texts, labels=(0, 0, 1, 2, 0, 0, 1, 2, 0, 0, 1, 2, 1))
    dense = Dense(base, text, name)
    weight = dense.weight.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [weight], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = dense.loss(weight)
        loss.backward()
        return loss

    optimizer.step(closure)
    model = opened(base)
    with torch.no_grad():
        model.classifier.weight.copy_(weight)
    model.save_pretrained(tmp_path / "tuned")
    result = lora_diag.probe_curvature(
        base,
        tmp_path / "tuned",
        eval=[text],
        layers="^classifier",
        ranks=(0, 1, 2),
        along=(0.25, 0.5),
        eigenvalues=2,
        tokenizer="bytes",
    )
    joint = result.whole[0]
    stored = tensors(tmp_path / "tuned")[name]
    delta = stored - tensors(base)[name]
    assert (
        abs(joint.smallest) <= 1e-5 * joint.eigenvalues[0]
    )  # convex, and flat where all logits move alike
    assert not joint.strongly_convex
    checked = 0
    for record in of_rank(result):
        e = best(delta, record.rank) - delta
        points = np.linspace(0, record.along, 9)
        largest = max(np.linalg.eigvalsh(dense.hessian(stored + t * e))[-1] for t in points)
        energy = record.tail_energy
        # λ the largest on the whole way: the condition holds, so the bound must
        assert record.gap <= record.linear + largest / 2 * energy * 1.001 + 1e-6
        assert record.gap >= record.linear - 1e-6  # convex: above its tangent
        if joint.eigenvalues[0] >= largest * 0.999:
            assert record.holds
            checked += 1
    assert checked
    assert all(
        abs(r.linear) <= 0.02 * r.gap for r in of_rank(result) if r.along == 1 and r.gap > 1e-4
    )


def test_gradient_at_base_is_projected_on_top_eigenpairs(case, at_base):
    base, _, text = case
    options = {
        "eval": [text],
        "layers": "query",
        "eigenvalues": 6,
        "batch": 9,
        "tokenizer": "bytes",
    }
    _, joint = lora_diag.probe_curvature(base, **options).whole
    _, own = lora_diag.probe_curvature(base, by="layer", **options).whole
    values, vectors = np.linalg.eigh(at_base.hessian())
    g, v = at_base.gradient(), vectors[:, ::-1][:, :6]
    c = v.T @ g
    p = (v @ c).reshape(16, 16)
    s2 = np.linalg.svd(p, compute_uv=False) ** 2
    for record, is_joint in ((joint, True), (own, False)):
        surrogate = record.surrogate
        assert (surrogate.eigenpairs, surrogate.joint, record.at) == (6, is_joint, "base")
        assert surrogate.share == pytest.approx((c**2).sum() / (g**2).sum(), rel=2e-2)
        assert surrogate.random == pytest.approx(6 / 256)
        assert surrogate.pairs_at == 1 + int((np.cumsum(c**2) < 0.9 * (c**2).sum()).sum())
        for share, rank in surrogate.rank_at.items():
            assert rank == 1 + int((np.cumsum(s2) < float(share) * s2.sum()).sum())
    assert joint.eigenvalues == ()
    np.testing.assert_allclose(own.eigenvalues, values[::-1][:6], atol=1e-3 * values[-1])


def test_every_layer_has_eigenvalues_of_its_own_block(case):
    base, tuned, text = case
    options = {
        "layers": "query|key",
        "ranks": (4,),
        "eigenvalues": 1,
        "trace_vectors": 2,
        "tokenizer": "bytes",
        "by": "layer",
    }
    result = lora_diag.probe_curvature(base, tuned, eval=[text], **options)
    joint, *layers = (record for record in result.whole if record.record == "curvature")
    assert {record.layer for record in layers} == {
        LAYERS["query"],
        LAYERS["query"].replace("query", "key"),
    }
    for record in layers:
        truth = np.linalg.eigvalsh(Dense(tuned, text, record.layer).hessian())
        assert record.eigenvalues[0] == pytest.approx(truth[-1], rel=2e-3)
        assert record.smallest == pytest.approx(truth[0], abs=2e-3 * truth[-1])
        assert record.params == 256
        # no block bends more than the whole (Cauchy's interlacing theorem)
        assert record.eigenvalues[0] <= joint.eigenvalues[0] * 1.001
    assert joint.params == 512
    assert joint.gradient == pytest.approx(
        math.hypot(*(record.gradient for record in layers)), rel=1e-5
    )
