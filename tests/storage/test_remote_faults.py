"""Servers that drop connections, fail, lie and change files: the right bytes, or one error."""

import pytest
import torch

from lora_diag.errors import InputError
from lora_diag.storage import open_checkpoint, stores
from lora_diag.storage.addresses import fill
from lora_diag.storage.stores import FileInfo
from tests.messages import raises_naming
from tests.storage.web import large

NAME = "model.layers.1.mlp.up_proj.weight"


pytestmark = pytest.mark.usefixtures("soon")


@pytest.mark.parametrize(
    ("fault", "times"),
    [("drop", 3), ("drop", 30), ("500", 2), ("503", 4), ("429", 1), ("short", 3), ("short", 30)],
)
def test_transient_fault_is_retried(web, fault, times):
    """A dropped or shortened answer is gone on from, however often: every one brings some bytes."""
    checkpoint = open_checkpoint(f"{web.url}/base")
    web.fault, web.times = fault, times
    assert torch.equal(checkpoint.read(NAME), large(1)[NAME].reshape(-1))
    assert web.times == 0
    # Bytes received before an interruption are not requested again.
    repeated = (
        sum(
            request.sent
            for request in web.requests
            if request.status == 206 and request.range[0] > 0
        )
        - 2**18
    )
    assert repeated == 0


def test_first_request_is_retried(web):
    for fault, times in (("500", 2), ("drop", 2), ("short", 2)):
        web.fault, web.times, web.at_all = fault, times, True
        assert len(open_checkpoint(f"{web.url}/base/model.safetensors")) == 4
        assert web.times == 0


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("500", r"cannot be read: the server answers 500 \(5 attempts\)"),
        ("ignore", r"sent the whole file instead of a range"),
        ("shifted", r"the server sent bytes [\d,]+ to [\d,]+ instead of"),
        ("less", r"the server sent bytes [\d,]+ to [\d,]+ instead of"),
        ("other size", r"has changed since its header was read"),
        ("changed", r"has changed since its header was read"),
        ("no range", r"invalid Content-Range header"),
        ("gzip", r"sends the file encoded as gzip"),
        ("long", r"sent more bytes than requested"),
        ("endless", r"sent more bytes than requested"),
        ("404", r"has changed since its header was read.*404"),
        ("412", r"has changed since its header was read.*412"),
        ("403", r"answers 403: the file is not public"),
        ("418", r"answers 418"),
        ("302", r"redirects to http://elsewhere\.invalid/x; give that address"),
    ],
)
def test_permanent_fault_is_one_error_and_never_data(web, fault, says):
    checkpoint = open_checkpoint(f"{web.url}/base")
    web.fault = fault
    with pytest.raises(InputError, match=says) as caught:
        checkpoint.read(NAME)
    assert str(caught.value).startswith(f"{web.url}/base/model.safetensors: ")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("at_all", [False, True])
def test_server_that_sends_byte_by_byte_is_given_up(web, monkeypatch, at_all):
    """A byte every 0.05 s was always progress: a header took an hour."""
    checkpoint = open_checkpoint(f"{web.url}/base/model.safetensors")
    monkeypatch.setattr(stores, "READ_SECONDS", 0.2)
    web.fault, web.at_all = "drip", at_all
    with raises_naming(
        InputError, "model.safetensors", "less than 65,536 bytes arrived in 0.2 s", "5 attempts"
    ):
        open_checkpoint(f"{web.url}/tuned/model.safetensors") if at_all else checkpoint.read(NAME)


def test_server_that_drops_after_few_bytes_is_given_up(web):
    checkpoint = open_checkpoint(f"{web.url}/base/model.safetensors")
    web.fault = "crumb"
    with raises_naming(InputError, "received 10 of", "5 attempts"):
        checkpoint.read(NAME)


@pytest.mark.parametrize(
    "fault", ["shifted", "less", "no range", "gzip", "long", "endless", "403", "302"]
)
def test_unfounded_header_is_refused_remotely(web, fault):
    web.fault, web.at_all = fault, True
    with pytest.raises(InputError):
        open_checkpoint(f"{web.url}/base/model.safetensors")


def test_short_header_response_is_refused(web):
    web.fault, web.times, web.at_all = "less", 1, True
    with pytest.raises(InputError, match=r"the server sent bytes up to [\d,]+ instead of 65,536"):
        open_checkpoint(f"{web.url}/base/model.safetensors")


def test_range_beyond_end_is_not_requested():
    with raises_naming(InputError, "byte 10", "header"):
        fill(None, "a", memoryview(bytearray(5)), 6, FileInfo(10, "version"))


def test_large_file_without_ranges_is_refused_early(web, folder):
    file = folder / "large.safetensors"
    with file.open("wb") as stream:
        stream.truncate(20_000_000)
    web.fault, web.at_all = "ignore", True
    with raises_naming(InputError, "20,000,000 bytes"):
        open_checkpoint(f"{web.url}/large.safetensors")
    # A small one is taken whole, once.
    web.requests.clear()
    assert torch.equal(
        open_checkpoint(f"{web.url}/base/model.safetensors").read(NAME), large(1)[NAME].reshape(-1)
    )
    assert [
        request.status for request in web.requests if request.path.endswith(".safetensors")
    ] == [200]


def test_replaced_file_during_read_is_detected(web, folder):
    checkpoint = open_checkpoint(f"{web.url}/tuned")
    checkpoint.read(NAME)
    file = folder / "tuned" / "model.safetensors"
    content = file.read_bytes()
    for other in (content[:-1] + b"\0", content[:-4], None):
        file.write_bytes(other) if other else file.unlink()
        with pytest.raises(InputError, match="has changed since its header was read"):
            checkpoint.read(NAME)
    file.write_bytes(content)


def test_unreachable_server_is_reported(web):
    checkpoint = open_checkpoint(f"{web.url}/base")
    web.close()
    with raises_naming(InputError, "5 attempts"):
        checkpoint.read("model.layers.3.mlp.up_proj.weight")
    with raises_naming(InputError, "5 attempts"):
        open_checkpoint(f"{web.url}/base")
