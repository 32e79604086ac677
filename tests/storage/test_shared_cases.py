"""Files of other programs, each with the change that a decoder of its own found."""

import json

import numpy as np
import pytest

from lora_diag.running.inputs import compare
from tests.conftest import DATA, as_numpy

FOLDERS = [
    *DATA.glob("formats/*"),
    *(DATA / "cases" / name for name in ("bnb-nf4-double", "fp8-block-scaled")),
]
# The folder of a case, and of its TUNED.
CASES = [
    (folder, folder / side)
    for folder in sorted(FOLDERS)
    for side in ("tuned", "merged")
    if (folder / side).exists()
]
CASES = [
    (folder, tuned)
    for folder, tuned in CASES
    if (folder / "base").exists() and (folder / "truth.json").exists()
]


def test_no_case_is_missing():
    """Other tests take the folders that are there; here they are counted."""
    number = {
        kind: sum(path.is_dir() for path in (DATA / kind).iterdir())
        for kind in ("cases", "formats", "bad")
    }
    assert number == {"cases": 30, "formats": 36, "bad": 22}
    assert len(CASES) == 27
    assert len(list(DATA.glob("cases/*/truth.json"))) == 30


@pytest.mark.parametrize(("folder", "tuned"), CASES, ids=lambda path: path.name)
def test_shared_case_has_true_change(folder, tuned):
    truth = json.loads((folder / "truth.json").read_text())
    result = compare(folder / "base", tuned).pairing
    changes: dict[str, list[np.ndarray]] = {}  # of a stack of experts, one per expert
    for delta in result.deltas:
        change = np.concatenate(
            [as_numpy(after) - as_numpy(before) for before, after in delta.blocks()]
        )
        changes.setdefault(delta.layer.partition("[")[0], []).append(change)
    assert not result.unpaired
    assert set(changes) == set(truth) - {"_meta"}
    for name, parts in changes.items():
        change = np.stack(parts) if len(parts) > 1 else parts[0]
        change = change.reshape(truth[name].get("shape", change.shape))
        assert_true(change, truth[name])


def assert_true(change, truth):
    """Assert that a change has the norm, entries and singular values of a case."""
    np.testing.assert_allclose(np.linalg.norm(change), truth["fro"], rtol=1e-6)
    for *at, value in truth.get("entries", []):
        assert change[tuple(at)] == pytest.approx(value, abs=1e-6)
    if change.ndim == 2 and (expected := truth.get("s")):
        s = np.linalg.svd(change, compute_uv=False)
        np.testing.assert_allclose(s[: len(expected)], expected, rtol=1e-6, atol=1e-6 * s[0])
