"""Small files that ask for much memory or time end in one message, or are read, in little of both."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.robustness.bombs import FILES, PEAK, POLICIES
from tests.served import Server

pytestmark = pytest.mark.slow


class Limited:
    """Runs commands under limits of memory and time."""

    def __init__(self, notes: Path) -> None:
        self._server, self._peak = Server(notes), notes / "peak"

    def __call__(self, *words: str, cwd: Path) -> tuple[int, str]:
        """Return the exit code of a command and its messages; fail if it took too much."""
        job = {"environment": {**os.environ}, "prepare": "tests.robustness.bombs:limit", "peak": str(self._peak)}
        self._peak.unlink(missing_ok=True)
        code, _, err = self._server.run(words, cwd, **job)
        assert code >= 0, f"ended by signal {-code}"
        assert "Traceback" not in err.decode(), err.decode()[-2000:]
        assert int(self._peak.read_text()) < PEAK
        return code, err.decode()

    def close(self) -> None:
        self._server.close()


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Limited]:
    commands = Limited(tmp_path_factory.mktemp("notes"))
    yield commands
    commands.close()


@pytest.mark.parametrize("kind", FILES)
def test_small_file_takes_little_memory(limited: Limited, tmp_path: Path, kind: str) -> None:
    path = FILES[kind](tmp_path)
    code, err = limited("inspect", path.name, cwd=tmp_path)
    assert code in {0, 3}
    assert code == 0 or path.name in err
    assert len(err) < 2500


def test_tensor_larger_than_its_storage_is_refused(limited: Limited, tmp_path: Path) -> None:
    code, err = limited("inspect", FILES["torch: expanded"](tmp_path).name, cwd=tmp_path)
    assert code == 3
    assert "storage" in err


@pytest.mark.parametrize("kind", POLICIES)
def test_small_policy_takes_little_memory(limited: Limited, tmp_path: Path, kind: str) -> None:
    (tmp_path / "p.toml").write_text(POLICIES[kind])
    code, err = limited("gate", "p.toml", "missing.jsonl", cwd=tmp_path)
    assert code in {2, 3}
    assert ("p.toml" in err) == (kind != "many rules")
    assert len(err) < 2500
