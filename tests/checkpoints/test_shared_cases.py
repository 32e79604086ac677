"""Files of other programs, each with the change that a decoder of its own found."""

import json

import numpy as np
import pytest

from lora_diag.running.inputs import compare
from tests.conftest import SHARED, as_numpy

FOLDERS = SHARED / "formats"
CASES = sorted(
    path.parent.name
    for path in FOLDERS.glob("*/truth.json")
    if (path.parent / "base").exists() and (path.parent / "tuned").exists()
)


def test_policy_lines_are_found():
    if not FOLDERS.is_dir():
        pytest.skip("the shared cases are not here")
    assert len(CASES) > 15


@pytest.mark.parametrize("case", CASES)
def test_shared_case_has_true_change(case):
    folder = FOLDERS / case
    truth = json.loads((folder / "truth.json").read_text())
    result = compare(folder / "base", folder / "tuned").pairing
    assert not result.unpaired
    changes: dict[str, list[np.ndarray]] = {}  # of a stack of experts, one per expert
    for delta in result.deltas:
        change = np.concatenate([as_numpy(after) - as_numpy(before) for before, after in delta.blocks()])
        changes.setdefault(delta.layer.partition("[")[0], []).append(change)
    assert set(changes) == set(truth) - {"_meta"}
    for name, parts in changes.items():
        change = np.stack(parts) if len(parts) > 1 else parts[0]
        change = change.reshape(truth[name].get("shape", change.shape))
        np.testing.assert_allclose(np.linalg.norm(change), truth[name]["fro"], rtol=1e-6)
        for *at, value in truth[name].get("entries", []):
            assert change[tuple(at)] == pytest.approx(value, abs=1e-6)
