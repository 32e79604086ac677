"""Addresses, and checkpoints read by ranges from a web server: requests, responses, and secrets,
which are hidden.
"""

import io
import json
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_diag import deltas, inspect, spectrum
from lora_diag.adapters import locate
from lora_diag.errors import InputError
from lora_diag.running.fingerprint import fingerprint, legible
from lora_diag.storage import addresses as ranges
from lora_diag.storage import as_path, hide_secrets, open_checkpoint
from lora_diag.storage.remote import RangeStream
from tests.conftest import save_model
from tests.messages import mentions, raises_naming
from tests.storage.web import assert_equal, basic, large

HEAD = 2**16


pytestmark = pytest.mark.usefixtures("soon")


# Addresses.


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("s3://bucket/models/base/", "s3://bucket/models/base"),
        ("s3:/bucket/base", "s3://bucket/base"),
        ("s3://bucket//twice/base", "s3://bucket//twice/base"),
        ("gs://bucket", "gs://bucket"),
        ("HTTPS://host/a%20b/model.safetensors", "https://host/a%20b/model.safetensors"),
        ("https://user:p%40ss@host:8000/x?X-Amz-Signature=1#part", "https://host:8000/x"),
        ("https://host?sig=1", "https://host"),
        (" https://user:pass@host/x ", "https://host/x"),
        ("https://host/pkg@1.0/x", "https://host/pkg@1.0/x"),
        ("https://user:pass@[::1]:80/x?email=a@b", "https://[::1]:80/x"),
    ],
)
def test_address_is_shown_without_its_secrets(words, text):
    path = as_path(words)
    for seen in (
        str(path),
        repr(path),
        hide_secrets(path),
        legible(words).rstrip("/"),
        f"{path!r:>9}",
    ):
        assert text in seen
        assert "ss@" not in seen
        assert "sig" not in seen.lower()
    assert as_path(path) is path
    assert as_path(str(path)) == path
    assert hash(as_path(str(path))) == hash(path)


@given(
    st.sampled_from(["https", "http", "HTTPS"]),
    st.lists(
        st.text("abcxyz%40.~_-!$", min_size=1).map(lambda word: f"Zecret{word}Zecret"),
        min_size=2,
        max_size=2,
    ),
    st.text("abcxyz=&/+%3D:@?", max_size=20),
    st.sampled_from(["{}", "{}: cannot be read", "see '{}' and {}"]),
)
def test_secrets_are_hidden_in_any_spelling(scheme, user, query, around):
    address = f"{scheme}://{user[0]}:{user[1]}@host/folder/m.safetensors?Zecret={query}#Zecret"
    for message in (
        hide_secrets(around.replace("{}", address)),
        legible(around.replace("{}", address)),
    ):
        assert "Zecret" not in message
        assert "//host/folder/m.safetensors" in message


def test_addresses_in_messages_have_no_secrets():
    text = "cannot reach 'https://u:p@h/x?sig=1' nor s3://bucket/key, http://h/y#frag."
    assert hide_secrets(text) == "cannot reach 'https://h/x' nor s3://bucket/key, http://h/y"
    assert (
        hide_secrets("a plain: text / with // slashes @ and ?")
        == "a plain: text / with // slashes @ and ?"
    )


def test_remote_path_behaves_as_path():
    path = as_path("https://host/models/base/model.safetensors")
    assert (path.name, path.suffix) == ("model.safetensors", ".safetensors")
    assert str(path.parent) == "https://host/models/base"
    assert str(path.parent / "config.json") == "https://host/models/base/config.json"
    assert path.match("*.safetensors")
    assert not path.match("*.bin")
    root = as_path("s3://bucket")
    assert (root.name, root.parent) == ("", root)
    assert sorted([root / "b", root / "a"]) == [root / "a", root / "b"]
    assert str(as_path("s3://bucket/a?b".replace("?", "#")) / "50%") == "s3://bucket/a#b/50%"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("ftp://me:secret@host/x", "ftp://host/x: unsupported scheme"),
        ("s3://", "unsupported scheme"),
        ("s3://key:secret@bucket/x", "accepts no password"),
        ("s3://bucket/x?token=secret", "accepts no password and no query"),
        ("gs://me@bucket/x", "accepts no password"),
        ("https://?secret", "has no host"),
        ("http://me:pass/secret@host/x", "invalid host or port"),
        ("http://me:1/secret@host/x", "invalid host or port"),
        ("http://me:pass#secret@host/x", "invalid host or port"),
        ("http://me:pa@ss/secret@host/x", "invalid host or port"),
        ("s3://key:pass/secret@bucket/x", "invalid host or port"),
        ("http://host:99999/x.safetensors", "host:99999.*: invalid host or port"),
        ("http://[::1/x", "invalid host or port"),
        ("hf://name", "give hf://org/name"),
        ("hf://org/name/../../secret", "give hf://org/name"),
    ],
)
def test_invalid_addresses_are_refused(words, says):
    with pytest.raises(InputError, match=says) as caught:
        as_path(words)
    assert ":secret" not in str(caught.value)
    assert "=secret" not in str(caught.value)
    assert "secret@" not in str(caught.value)


# Reading.


@pytest.mark.parametrize(
    "name",
    ["base", "sharded", "bins", "base/model.safetensors", "sharded/model.safetensors.index.json"],
)
def test_checkpoint_is_same_from_server(web, folder, name):
    far = open_checkpoint(f"{web.url}/{name}/" if "." not in name else f"{web.url}/{name}")
    near = open_checkpoint(folder / name)
    assert str(far.path) == f"{web.url}/{name}"
    assert_equal(far, near)
    tensor = next(iter(near))
    spans = [(0, 7), (7, 7), (5, near[tensor].numel)]
    for one, other in zip(far.read_each(tensor, spans), near.read_each(tensor, spans), strict=True):
        assert torch.equal(one, other)


def test_only_header_and_tensor_are_read(web):
    size = 4 * 256 * 256
    spectrum(f"{web.url}/base", f"{web.url}/tuned", layers=r"layers\.2\.")
    data = [request for request in web.requests if request.status == 206 and request.range[0] > 0]
    assert sum(request.sent for request in data) == 2 * size
    # Besides, the first bytes of each file, and of the small ones all.
    assert web.sent <= 2 * size + 2 * (HEAD + 1000)
    keys = [(request.path, request.range) for request in web.requests]
    assert len(keys) == len(set(keys)), "asked twice"


def test_inspect_reads_headers_only(web):
    inspect(f"{web.url}/sharded")
    assert not [request for request in web.requests if request.range[0] > 0]
    assert len(web.requests) <= 20


def test_cluster_records_equal_local_run(web, folder):
    far = spectrum(f"{web.url}/base", f"{web.url}/tuned")
    near = spectrum(folder / "base", folder / "tuned")
    assert far.layers == near.layers
    assert far.left_out == near.left_out
    assert (
        far.end.model_copy(update={"sha256": near.end.sha256}) == near.end
    )  # of lines that name the inputs
    assert far.run.settings == near.run.settings
    assert [side.path for side in far.run.inputs] == [f"{web.url}/base", f"{web.url}/tuned"]
    for one, other in zip(far.run.inputs, near.run.inputs, strict=True):
        assert (one.role, one.kind, one.tensors, one.notes) == (
            other.role,
            other.kind,
            other.tensors,
            other.notes,
        )


def test_large_tensor_uses_several_connections(web):
    checkpoint = open_checkpoint(f"{web.url}/base")
    name = next(iter(checkpoint))
    web.requests.clear()
    checkpoint.read(name)
    assert (
        sorted(request.range[1] + 1 - request.range[0] for request in web.requests) == [2**16] * 4
    )


def test_whole_stream_is_one_request():
    """``io`` reads a raw stream to its end in pieces of 8 KiB, each of which would be a request."""
    requested = []
    stream = RangeStream(lambda buffer, start: requested.append((start, len(buffer))), 10**6)
    assert len(io.BufferedReader(stream, HEAD).read()) == 10**6
    assert requested == [(0, 10**6)]


def test_next_blocks_are_prefetched(web, monkeypatch):
    monkeypatch.setattr(deltas, "BLOCK_ENTRIES", 16 * 256)
    checkpoint = open_checkpoint(f"{web.url}/base")
    name = list(checkpoint)[-1]
    web.requests.clear()
    web.together, web.most = ranges.READ_AHEAD + 1, 0
    blocks = list(deltas.row_blocks(deltas.Side(checkpoint, name), (256, 256)))
    assert torch.equal(torch.cat(blocks), large(1)[name])
    assert web.most == ranges.READ_AHEAD + 1
    assert len(web.requests) == 16


def test_shards_are_opened_side_by_side(web, folder):
    web.together, web.held = 3, "/model-0"
    open_checkpoint(f"{web.url}/sharded")
    assert web.most == 3


def test_copy_in_another_process_opens_its_own_connections(web, folder):
    checkpoint = open_checkpoint(f"{web.url}/base")
    copy = pickle.loads(pickle.dumps(checkpoint))
    name = next(iter(copy))
    assert torch.equal(copy.read(name), open_checkpoint(folder / "base").read(name))
    assert len(pickle.dumps(checkpoint)) < HEAD  # the first bytes stay behind


def test_torch_file_download_is_noted(web, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    notes = open_checkpoint(f"{web.url}/bins").notes
    assert sum(mentions(note, "downloaded whole") for note in notes) == 3
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 100}))
    with pytest.raises(InputError, match="do not fit"):
        open_checkpoint(f"{web.url}/bins")


def test_missing_remote_file_is_reported(web):
    with raises_naming(InputError, "/nothing", "model.safetensors"):
        open_checkpoint(f"{web.url}/nothing")
    with raises_naming(InputError, "/base/other.safetensors"):
        open_checkpoint(f"{web.url}/base/other.safetensors")
    assert not locate(f"{web.url}/base").is_adapter


def test_shard_stays_in_folder(web_here, tmp_path):
    """``%2e%2e%2f`` is a plain name here, and must not become ``../`` there."""
    text = json.dumps({"weight_map": {"w": "%2e%2e%2fbase%2fmodel.safetensors"}})
    index = (
        save_model(tmp_path / "base", {"w": torch.ones(2, 2)}).with_name("bad")
        / "model.safetensors.index.json"
    )
    index.parent.mkdir()
    index.write_text(text)
    with pytest.raises(InputError, match="is missing from"):
        open_checkpoint(f"{web_here.url}/bad")
    assert web_here.requests[-1].path == "/bad/%252e%252e%252fbase%252fmodel.safetensors"
    index.write_text(text.replace("%2e%2e%2f", "../").replace("%2f", "/"))
    with raises_naming(InputError, "plain file"):
        open_checkpoint(f"{web_here.url}/bad")


def test_oversized_header_is_not_read(web_here, tmp_path):
    (tmp_path / "claims.safetensors").write_bytes((99_999_999).to_bytes(8, "little") + bytes(2**17))
    with raises_naming(InputError, "complete safetensors"):
        open_checkpoint(f"{web_here.url}/claims.safetensors")
    assert web_here.sent == HEAD


def test_fingerprint_follows_version(web, folder):
    def now():
        return fingerprint(open_checkpoint(f"{web.url}/sharded"))

    before, first = now(), folder / "sharded" / "model-00001-of-00003.safetensors"
    assert before == now()
    content = first.read_bytes()
    try:
        first.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert now() != before
    finally:
        first.write_bytes(content)
    assert now() == before
    # Without versions, pages of the file stand for it.
    web.names_versions = False
    assert before != now() == now()
    assert "not detected" in open_checkpoint(f"{web.url}/sharded").notes[0]


def test_credentials_go_to_server_only(web):
    web.user = basic("me", "p@ss")
    address = f"http://me:p%40ss@{web.host}/base"
    inventory = inspect(address)
    assert "p%40ss" not in inventory.model_dump_json()
    assert inventory.path == f"{web.url}/base"
    with raises_naming(InputError, "answers", 401) as caught:
        open_checkpoint(f"{web.url}/base")
    web.user = None
    result = spectrum(
        f"{web.url}/base/model.safetensors?sig=a%2Fb",
        f"{web.url}/tuned/model.safetensors?sig=c%2Fd",
    )
    assert {request.query for request in web.requests if request.query} == {
        "sig=a%2Fb",
        "sig=c%2Fd",
    }
    assert "sig" not in result.run.model_dump_json()
    # The signature is for one file: no other is requested.
    assert all(
        request.path.endswith("model.safetensors") for request in web.requests if request.query
    )
    assert "401" in str(caught.value)
