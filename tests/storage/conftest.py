"""A server of checkpoints whose tensors have several chunks."""

from contextlib import closing

import pytest

from lora_diag.storage import addresses as ranges
from tests.conftest import save_sharded, weights
from tests.storage.web import Web, large, save_large


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """base, tuned, sharded, and torch files."""
    root = tmp_path_factory.mktemp("served")
    save_large(root)
    save_sharded(root / "sharded", large(1))
    save_sharded(root / "bins", weights(1), suffix="bin")
    return root


@pytest.fixture
def web(folder):
    with closing(Web(folder)) as served:
        yield served


@pytest.fixture
def web_here(tmp_path):
    """A server of the test's own folder."""
    with closing(Web(tmp_path)) as served:
        yield served


@pytest.fixture
def soon(monkeypatch):
    """Small chunks, so that a tensor has several; and no waiting."""
    monkeypatch.setattr(ranges, "CHUNK_BYTES", 2**16)
    monkeypatch.setattr(ranges, "FIRST_WAIT", 0.001)
