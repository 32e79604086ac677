"""Random subspaces against a dense projection, training against a plain loop, and what interrupting
leaves.
"""

import math

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard as dense_hadamard

import lora_diag
from lora_diag.probes.intrinsic.measure import Fastfood, Subspace, count_scales, hadamard
from lora_diag.probes.intrinsic.record import Intrinsic
from lora_diag.probes.intrinsic.show import find_reached, select_lines
from tests.probes.making import bert, gpt2, lettered, loss_after, loss_of, opened, some_text

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
CPU = torch.device("cpu")


def drawn(size, dim, total, seed):
    """P's rows of one tensor, column by column, and the same written out from the definition with
    SciPy.
    """
    one = Fastfood(size, dim, total, torch.Generator().manual_seed(seed), CPU)
    result = torch.stack([one.times(unit) for unit in torch.eye(dim)], 1)
    block = 2 ** math.ceil(math.log2(dim)) if dim > 1 else 1
    generator, blocks = torch.Generator().manual_seed(seed), math.ceil(size / block)
    signs = (
        torch.randint(0, 2, (blocks, block), generator=generator, dtype=torch.int8).numpy() * 2.0
        - 1
    )
    order = torch.randperm(block, generator=generator).numpy()
    normal = torch.randn(blocks, block, generator=generator).double().numpy()
    h = dense_hadamard(block).astype(float)
    swap = np.eye(block)[order]
    whole = np.concatenate(
        [h @ np.diag(normal[i]) @ swap @ h @ np.diag(signs[i]) for i in range(blocks)]
    )
    return one, result, whole[:size, :dim] / math.sqrt(block * total)


@given(st.integers(0, 6), st.integers(1, 4))
@settings(deadline=None, max_examples=20)
def test_fast_transform_is_hadamard_matrix(exponent, rows):
    x = torch.randn(rows, 2**exponent, dtype=torch.float64)
    np.testing.assert_allclose(
        hadamard(x).numpy(), x.numpy() @ dense_hadamard(2**exponent), atol=1e-12
    )


@given(st.integers(1, 90), st.integers(1, 40), st.integers(0, 50))
@settings(deadline=None, max_examples=25)
def test_projection_and_its_adjoint_match_definition(size, dim, seed):
    one, result, truth = drawn(size, dim, 3 * size, seed)
    np.testing.assert_allclose(result.numpy(), truth, atol=1e-5 * np.abs(truth).max())
    z, w = torch.randn(dim, requires_grad=True), torch.randn(size)
    (pulled,) = torch.autograd.grad(one.times(z) @ w, z)
    np.testing.assert_allclose(pulled.numpy(), truth.T @ w.double().numpy(), atol=1e-4)
    np.testing.assert_allclose(
        one.times(z).detach().numpy(), truth @ z.detach().double().numpy(), atol=1e-4
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return gpt2(tmp_path_factory.mktemp("case") / "base")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Training and held-out texts."""
    folder = tmp_path_factory.mktemp("texts")
    return some_text(folder, "train", windows=12), some_text(
        folder, "held", windows=2, source="shifted"
    )


@pytest.mark.parametrize("method", ["plain", "said"])
def test_subspace_is_base_at_first_and_same_for_same_seed(base, method):
    inner = transformers.GPT2LMHeadModel.from_pretrained(base).requires_grad_(False).eval()
    before = {name: value.clone() for name, value in inner.state_dict().items()}
    ids = torch.arange(12).view(2, 6)
    one, same, other = (Subspace(inner, 20, seed, method, 0.1) for seed in (3, 3, 4))
    with torch.no_grad():
        assert torch.equal(one(input_ids=ids).logits, inner(input_ids=ids).logits)
        for each in (one, same, other):
            each.z.copy_(torch.linspace(-1, 1, len(each.z)))
            if each.scales is not None:
                each.scales.copy_(torch.arange(len(each.scales)) * 1.0)
        moved = one.weights()
        assert torch.equal(one(input_ids=ids).logits, same(input_ids=ids).logits)
        assert not torch.equal(one(input_ids=ids).logits, other(input_ids=ids).logits)
        one.fix()
        assert torch.equal(one(input_ids=ids).logits, same(input_ids=ids).logits)
    trained = [name for name, parameter in one.named_parameters() if parameter.requires_grad]
    assert sum(dict(one.named_parameters())[name].numel() for name in trained) == 20
    assert set(moved) == {name for name, _ in inner.named_parameters()}
    change = math.sqrt(sum(float((moved[name] - before[name]).norm() ** 2) for name in moved))
    if method == "plain":
        assert change == pytest.approx(float(one.z.detach().norm()), rel=0.2)
    else:  # two blocks, two embeddings, and the last norm's weight and bias
        assert count_scales(inner) == len(one.scales) == 6
        generator = torch.Generator().manual_seed(3)
        order = ["wte", "wpe", "h.0", "h.1", "ln_f.weight", "ln_f.bias"]
        for name, weight in inner.named_parameters():
            layer = next(i for i, word in enumerate(order) if f"transformer.{word}" in name)
            p = Fastfood(
                weight.numel(), 14, sum(map(torch.Tensor.numel, inner.parameters())), generator, CPU
            )
            change = (1 + 0.01 / 0.1 * layer) * p.times(one.z.detach())
            torch.testing.assert_close(
                moved[name].reshape(-1), (weight.reshape(-1) + change), atol=1e-6, rtol=1e-5
            )
    assert all(torch.equal(value, before[name]) for name, value in inner.state_dict().items())


def trained(base, train, held, steps, batch, lr, dim=None, seed=0):
    """The loss after training, in full or in a subspace with P written out, by a plain loop."""
    model = transformers.GPT2LMHeadModel.from_pretrained(base).eval()
    named = dict(model.named_parameters())
    start = torch.cat([each.detach().reshape(-1) for each in named.values()])
    if dim is not None:
        total, generator, rows = len(start), torch.Generator().manual_seed(seed), []
        for each in named.values():
            one = Fastfood(each.numel(), dim, total, generator, CPU)
            rows.append(torch.stack([one.times(unit) for unit in torch.eye(dim)], 1))
        p = torch.cat(rows)
    z = torch.zeros(len(start) if dim is None else dim, requires_grad=True)
    sizes = [each.numel() for each in named.values()]

    def loss(ids):
        flat = start + (z if dim is None else p @ z)
        parts = zip(named.items(), flat.split(sizes), strict=True)
        state = {name: part.view_as(each) for (name, each), part in parts}
        return torch.func.functional_call(model, state, (), {"input_ids": ids, "labels": ids}).loss

    torch.manual_seed(seed)
    return loss_after(model, [z], loss, train, held, lr, steps, batch, 0)


OPTIONS = {
    "dims": (5, 40),
    "lr": (3e-3, 1e-2),
    "full_lr": (3e-3,),
    "ranks": (1,),
    "lora_lr": (1e-2,),
}
OPTIONS["widen"] = 0


def test_runs_equal_plain_loop(base, texts):
    train, held = texts
    records = lora_diag.probe_intrinsic(
        base, data=train, eval=[held], steps=5, batch=3, **OPTIONS
    ).whole
    model = opened(base)
    total = sum(each.numel() for each in model.parameters())
    runs = {(r.dim, r.lr, r.seed): r for r in records if r.subject == "subspace"}
    assert len(runs) == 2 * 2 + 2
    for (dim, lr, seed), record in runs.items():
        assert lr == pytest.approx(record.pace * math.sqrt(total / dim))
        assert record.params == dim
        if dim == 40 or seed == 1:
            assert record.loss == pytest.approx(
                trained(base, train, held, 5, 3, lr, dim, seed), abs=1e-4
            )
    for dim in OPTIONS["dims"]:
        best = min((r for r in runs.values() if r.dim == dim and r.seed == 0), key=lambda r: r.loss)
        assert (dim, best.lr, 1) in runs
    full = [r for r in records if r.subject == "full"]
    assert [r.params for r in full] == [total, total]
    assert full[0].loss == pytest.approx(trained(base, train, held, 5, 3, 3e-3), abs=1e-4)
    lora = [r for r in records if r.subject == "lora"]
    # c_attn, c_proj, c_fc, c_proj of two blocks: d_in + d_out each
    assert {r.params for r in lora} == {2 * (16 + 48 + 16 + 16 + 16 + 64 + 64 + 16)}
    assert records[0].loss == pytest.approx(loss_of(model, held))


def planted(records):
    """Records of a made-up problem: dimensions, and the share that each seed reaches; full gains 1
    nat from 3.
    """
    common = {"set": "held", "data": "0", "tokens": 1}
    yield Intrinsic(subject="base", params=0, loss=3.0, **common)
    yield Intrinsic(subject="full", params=9, lr=1e-3, pace=1e-3, loss=2.0, **common)
    for subject, size, lr, shares in records:
        name = {"dim": size} if subject == "subspace" else {"rank": size}
        for seed, share in enumerate(shares):
            yield Intrinsic(
                subject=subject, params=size, lr=lr, seed=seed, loss=3 - share, **name, **common
            )


def test_smallest_size_uses_own_best_rate():
    runs = [
        ("subspace", 10, 0.1, (0.5, 0.4)),
        ("subspace", 100, 0.1, (0.95, 0.87)),
        ("subspace", 100, 0.2, (0.7,)),
        ("subspace", 300, 0.1, (0.88, 0.9)),
        ("subspace", 1000, 0.1, (1.1, 0.99)),
        ("lora", 1, 0.1, (0.3, 0.3)),
        ("lora", 2, 0.1, (0.5, 0.3)),
    ]
    result = select_lines([*planted(runs)], "held", "held", 0)
    assert {line.lr for line in result if line.subject == "subspace"} == {0.1}
    answer = find_reached(result, "subspace", 0.9)
    assert (answer.line.size, answer.below.size, answer.certain, answer.missed) == (
        100,
        10,
        False,
        (300,),
    )
    assert answer.line.share == pytest.approx(0.91)
    assert answer.line.edge
    assert not answer.below.edge
    assert find_reached(result, "subspace", 0.95).certain
    lora = find_reached(result, "lora", 0.9)
    assert (lora.line, lora.below.size) == (None, 2)


def test_dimension_is_null_without_gain_of_full_fine_tuning():
    records = [
        r if r.subject != "full" else r.model_copy(update={"loss": 3.5}) for r in planted([])
    ]
    records += [r for r in planted([("subspace", 10, 0.1, (0.5, 0.4))]) if r.subject == "subspace"]
    result = select_lines(records, "held", "held", 0)
    assert find_reached(result, "subspace", 0.9).line is None


def test_more_dimensions_gain_more_where_optimum_is_in_reach(tmp_path):
    """A classifier that has to tell three letters apart: few directions are not enough, some
    hundreds are.
    """
    base = bert(tmp_path / "base")
    result = lora_diag.probe_intrinsic(
        base,
        data=lettered(tmp_path, "train", 9),
        eval=[lettered(tmp_path, "held", 9, 1)],
        dims=(1, 8, 600),
        ranks=(),
        lr=(1e-2,),
        full_lr=(1e-2,),
        steps=12,
        repeats=2,
        tokenizer="bytes",
    )
    shares = [
        line.share
        for line in select_lines(result.whole, "held", "held", 0)
        if line.subject == "subspace"
    ]
    assert shares[0] < shares[1] < shares[2]
    assert shares[0] < 0.3
    assert shares[2] > 0.7
