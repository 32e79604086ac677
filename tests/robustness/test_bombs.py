"""Small files that ask for much memory or time end in one message, or are read, in
little of both.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, time_limit
from tests.robustness.bombs import CONFIGURATIONS, FILES, PEAK, POLICIES
from tests.robustness.conftest import Commands

pytestmark = pytest.mark.slow


Limited = Callable[..., tuple[int, str]]


@pytest.fixture
def limited(command: Commands, tmp_path: Path) -> Limited:
    """Run a command under limits of memory and time; return its exit code and messages."""
    peak = command.notes / "peak"

    def run(*words: str) -> tuple[int, str]:
        peak.unlink(missing_ok=True)
        ended = command(
            *words, cwd=tmp_path, prepare="tests.robustness.bombs:limit", peak=str(peak)
        )
        assert ended.code >= 0, f"ended by signal {-ended.code}"
        assert "Traceback" not in ended.err, ended.err[-2000:]
        assert int(peak.read_text()) < PEAK
        return ended.code, ended.err

    return run


@pytest.mark.parametrize("kind", FILES)
def test_small_file_takes_little_memory(limited: Limited, tmp_path: Path, kind: str) -> None:
    path = FILES[kind](tmp_path)
    code, err = limited("inspect", path.name)
    assert code in {0, 3}
    assert code == 0 or path.name in err
    assert len(err) < 2500


def test_tensor_larger_than_its_storage_is_refused(limited: Limited, tmp_path: Path) -> None:
    code, err = limited("inspect", FILES["torch: expanded"](tmp_path).name)
    assert code == 3
    assert "storage" in err


@pytest.mark.parametrize("kind", POLICIES)
def test_small_policy_takes_little_memory(limited: Limited, tmp_path: Path, kind: str) -> None:
    (tmp_path / "p.toml").write_text(POLICIES[kind])
    code, err = limited("gate", "p.toml", "missing.jsonl")
    assert code in {2, 3}
    assert ("p.toml" in err) == (kind != "many rules")
    assert len(err) < 2500


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_small_configuration_takes_little(limited: Limited, tmp_path: Path, kind: str) -> None:
    path = CONFIGURATIONS[kind](tmp_path)
    with time_limit(60):
        code, err = limited("lint", str(ROOT / "sample_checkpoints" / "base"), str(path))
    assert code in {0, 1, 3}
    assert "unexpected" not in err
    assert len(err) < 2500
