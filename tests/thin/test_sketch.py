"""Sketches: what they estimate, how well, and that a product and its matrix have one."""

import math

import numpy as np
import pytest

from lora_diag.thin import BOTH, COLUMNS, LENGTH, ROWS, fold, sketch


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))


@pytest.mark.parametrize("target", [0.0, 0.6, 0.95, 0.999])
@pytest.mark.parametrize(("rank", "kept"), [(1, 1.0), (16, 1.0), (16, 0.05), (50, 1.0)])
def test_sketch_cosines_have_stated_error(target, rank, kept):
    """The root mean square of the errors over 60 pairs is near (1 − c²)/√d: never twice that, at
    rank one 2.6 times.

    Also where only a few rows are not small, at regular distances: what structured buckets would
    add up.
    """
    rng = np.random.default_rng(3)
    errors = []
    for trial in range(60):
        x, y = (
            rng.standard_normal((300, rank)) @ rng.standard_normal((rank, 50)) for _ in range(2)
        )
        if kept < 1:
            small = np.arange(300) % int(1 / kept) > 0
            x[small], y[small] = 1e-3 * x[small], 1e-3 * y[small]
        x /= np.linalg.norm(x)
        y -= (x * y).sum() * x
        y = target * x + math.sqrt(1 - target**2) * y / np.linalg.norm(y)
        errors.append(cosine(sketch(x, f"layer{trial}"), sketch(y, f"layer{trial}")) - target)
    most = 2.6 if rank == 1 else 2.0
    assert np.sqrt(np.mean(np.square(errors))) < most * (1 - target**2) / math.sqrt(LENGTH)


def test_sketch_has_norm_of_matrix_on_average():
    rng = np.random.default_rng(1)
    norms = []
    for trial in range(200):
        x = rng.standard_normal((40, 30))
        norms.append(float(np.square(sketch(x, str(trial))).sum() / np.square(x).sum()))
    assert np.mean(norms) == pytest.approx(1, abs=4 * math.sqrt(2 / LENGTH / 200))


def test_product_and_its_matrix_have_one_sketch():
    rng = np.random.default_rng(2)
    b, a = rng.standard_normal((30, 3)), rng.standard_normal((3, 20))
    assert sketch((b, a), "x") == pytest.approx(sketch(b @ a, "x"), abs=1e-12)
    assert not np.allclose(sketch((b, a), "x"), sketch((b, a), "y"))


@pytest.mark.parametrize("scale", [2.0**120, 2.0**-100, 2.0**400])
def test_sketch_scales_with_its_factors(scale):
    rng = np.random.default_rng(4)
    b, a = rng.standard_normal((12, 3)), rng.standard_normal((3, 20))
    assert (sketch((b * scale, a * scale), "x") == sketch((b, a), "x") * scale * scale).all()


def test_sums_beyond_float32_are_added_in_float64():
    x = np.full((5000, 2), 3e38, np.float32)
    assert fold(x, ROWS) == pytest.approx(fold(x.astype(np.float64), ROWS))
    assert fold(x / 4, ROWS).dtype == np.float64
    assert fold(x / 1e30, ROWS).dtype == np.float32


def test_sketches_of_orthogonal_spaces_are_orthogonal():
    """Hashes of rows and columns are independent also of a square matrix: else all projectors would
    look alike.
    """
    q = np.linalg.qr(np.random.default_rng(6).standard_normal((64, 32)))[0]
    first, second = (sketch((u, u.T), "x") for u in (q[:, :16], q[:, 16:]))
    assert abs(cosine(first, second)) < 4 / math.sqrt(LENGTH)


@pytest.mark.parametrize(("rows", "columns"), [(1024, 16), (700, 3), (1, 1)])
@pytest.mark.parametrize("by", [ROWS, COLUMNS, BOTH])
def test_fold_adds_each_row_to_one_bucket(rows, columns, by):
    """Also a stack whose columns are stored one by one, at distances that are multiples of 4096
    bytes.
    """
    hashed = fold(np.eye(rows), by)
    assert (np.abs(hashed).sum(axis=0) == len(by)).all()
    assert set(np.unique(hashed)) <= {-1.0, 0.0, 1.0}
    stored = np.random.default_rng(7).standard_normal((3, columns, rows)).astype(np.float32)
    for stack in (stored.transpose(0, 2, 1), np.ascontiguousarray(stored.transpose(0, 2, 1))):
        folded = fold(stack, by)
        assert folded.dtype == np.float32
        assert folded == pytest.approx(hashed @ stack.astype(np.float64), abs=1e-4)
        assert (folded[1] == fold(stack[1], by)).all()
