"""Buckets: a local server that speaks S3, and Google's file system played by one in memory."""

import sys
import zlib

import pytest

from lora_diag import inspect
from lora_diag.adapters import locate, open_adapter
from lora_diag.errors import InputError
from lora_diag.running.fingerprint import fingerprint
from lora_diag.storage import as_path, open_checkpoint, stores
from lora_diag.storage.addresses import TransientError
from tests.conftest import ROOT
from tests.storage.web import assert_equal

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("soon")]

fsspec = pytest.importorskip("fsspec")
NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    running = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture(scope="module")
def bucket(server, folder):
    """A bucket with the folder's files; returns a client to change them with."""
    import boto3

    settings = {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }
    settings |= {"AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="models")
        for file in sorted(folder.rglob("*.*")):
            client.upload_file(str(file), "models", str(file.relative_to(folder)))
        for file in sorted((ROOT / "sample_checkpoints" / "lora_r4").iterdir()):
            client.upload_file(str(file), "models", f"twice//lora_r4/{file.name}")
        yield client
        client.close()


@pytest.mark.parametrize(
    "name", ["base", "sharded", "base/model.safetensors", "sharded/model.safetensors.index.json"]
)
def test_checkpoint_is_same_from_bucket(bucket, folder, name):
    far, near = open_checkpoint(f"s3://models/{name}"), open_checkpoint(folder / name)
    assert far.notes == near.notes
    assert_equal(far, near)


def test_adapter_under_key_with_two_slashes(bucket):
    near = open_adapter(ROOT / "sample_checkpoints" / "lora_r4")
    assert open_adapter("s3://models/twice//lora_r4").weights() == near.weights()
    assert locate("s3://models/twice//lora_r4/adapter_model.safetensors").is_adapter
    assert inspect("s3://models/twice//lora_r4").path == "s3://models/twice//lora_r4"


def test_replaced_file_during_read_is_detected(bucket, folder):
    content = (folder / "tuned" / "model.safetensors").read_bytes()
    checkpoint = open_checkpoint("s3://models/tuned")
    before = fingerprint(checkpoint)
    try:
        for other in (content[:-1] + b"\0", content[:-4]):
            bucket.put_object(Bucket="models", Key="tuned/model.safetensors", Body=other)
            with pytest.raises(
                InputError,
                match=r"^s3://models/tuned/model\.safetensors: the file has changed since",
            ):
                checkpoint.read(NAME)
        bucket.put_object(Bucket="models", Key="tuned/model.safetensors", Body=content[:-1] + b"\0")
        assert fingerprint(open_checkpoint("s3://models/tuned")) != before
        bucket.delete_object(Bucket="models", Key="tuned/model.safetensors")
        with pytest.raises(InputError, match="has changed since its header was read"):
            checkpoint.read(NAME)
    finally:
        bucket.put_object(Bucket="models", Key="tuned/model.safetensors", Body=content)
    assert fingerprint(open_checkpoint("s3://models/tuned")) == before


@pytest.mark.parametrize(
    "where",
    ["s3://models/nothing", "s3://elsewhere/base", "s3://elsewhere", "s3://models/base/x.bin"],
)
def test_missing_remote_file_is_reported(bucket, where):
    with pytest.raises(InputError, match=f"^{where}: no such file or folder"):
        open_checkpoint(where)


def test_folder_without_weights(bucket):
    with pytest.raises(InputError, match=r"^s3://models: no weights found"):
        open_checkpoint("s3://models")


def read_from(monkeypatch, make):
    """Read 8 bytes through a client whose ``get_object`` is made from what is known of the file."""
    address = "s3://models/base/model.safetensors"
    store = as_path(address).store
    file_info = store.file_info(address)

    async def get_s3(bucket):
        return type("Client", (), {"get_object": staticmethod(make(file_info))})()

    with monkeypatch.context() as patch:
        patch.setattr(store._fs, "get_s3", get_s3)
        store.read_range(address, 0, memoryview(bytearray(8)), file_info)


def test_failures_of_bucket(bucket, monkeypatch):
    from botocore.exceptions import ClientError, NoCredentialsError

    def refusing(error):
        async def get_object(**words):
            raise error

        return get_object

    def status(code):
        return ClientError(
            {"Error": {"Code": "X"}, "ResponseMetadata": {"HTTPStatusCode": code}}, "GetObject"
        )

    for error, kind, says in (
        (status(503), TransientError, "answers 503"),
        (ConnectionResetError("reset"), TransientError, "reset"),
        (status(403), InputError, "access is denied"),
        (status(412), InputError, "has changed"),
        (status(400), InputError, "cannot be read"),
        (NoCredentialsError(), InputError, "no credentials"),
    ):
        with pytest.raises(kind, match=says):
            read_from(monkeypatch, lambda _, error=error: refusing(error))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ContentRange": "bytes 1-8/9"}, "sent 'bytes 1-8/9' instead of 'bytes 0-7/"),
        ({"ContentRange": None}, "instead of"),
        ({"ContentLength": 10**12}, "instead of"),
        ({"ETag": '"other"'}, "has changed"),
        ({"content": b"123456789"}, "more bytes than"),
        ({"content": b"1234567"}, "cut short"),
    ],
)
def test_inconsistent_store_is_detected(bucket, monkeypatch, change, says):
    class Body:
        content = change.get("content", b"12345678")

        async def __aenter__(self):
            return self

        async def __aexit__(self, *words):
            pass

        async def read(self):
            return self.content

    def make(file_info):
        async def get_object(**words):
            sent = {
                "ContentRange": f"bytes 0-7/{file_info.size}",
                "ContentLength": 8,
                "ETag": file_info.version,
            }
            return {**sent, "Body": Body(), **change}

        return get_object

    with pytest.raises((InputError, TransientError), match=says):
        read_from(monkeypatch, make)


# Google's, played by a file system in memory: gcsfs itself was not tried.


@pytest.fixture
def memory(monkeypatch, folder):
    from fsspec.implementations.memory import MemoryFileSystem

    class Played(MemoryFileSystem):
        protocol = "gs"
        store, pseudo_dirs = {}, [""]
        truncated = 0

        def ls(self, path, detail=True, **options):
            """As gcsfs reports it: a generation that changes with the content."""
            entries = super().ls(path, detail=True)
            files = [entry for entry in entries if entry["type"] == "file"]
            versions = {
                entry["name"]: zlib.crc32(super(Played, self).cat_file(entry["name"]))
                for entry in files
            }
            return [
                entry | {"generation": str(versions.get(entry["name"], ""))} for entry in entries
            ]

        def info(self, path, **options):
            return self.ls(path)[0]

        def cat_file(self, path, start=None, end=None, **options):
            content = super().cat_file(path, start=start, end=end, **options)
            return content[: len(content) - self.truncated]

    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "gs", Played)
    monkeypatch.setattr(stores, "_FILE_SYSTEMS", {})
    place = Played()
    place.put(str(folder / "base"), "/models/base", recursive=True)
    return place


def test_checkpoint_is_same_through_another_file_system(memory, folder):
    far, near = open_checkpoint("gs://models/base"), open_checkpoint(folder / "base")
    assert_equal(far, near)
    assert fingerprint(far) == fingerprint(open_checkpoint("gs://models/base"))


def test_foreign_file_system_is_checked(memory):
    checkpoint = open_checkpoint("gs://models/base")
    memory.__class__.truncated = 1
    with pytest.raises(InputError, match="cut short"):
        checkpoint.read(NAME)
    memory.__class__.truncated = 0
    content = memory.cat_file("/models/base/model.safetensors")
    memory.pipe_file("/models/base/model.safetensors", content[:-1] + b"\0")
    with pytest.raises(InputError, match="has changed since its header was read"):
        checkpoint.read(NAME)


def test_missing_library_is_named(monkeypatch):
    def missing(name, **options):
        raise ImportError(name)

    monkeypatch.setattr(fsspec, "filesystem", missing)
    monkeypatch.setattr(stores, "_FILE_SYSTEMS", {})
    for address, command in (
        ("s3://b/x", "pip install '.[remote]' s3fs"),
        ("gs://b/x", "pip install '.[remote]' gcsfs"),
        ("https://host/x.safetensors", "pip install '.[remote]'"),
    ):
        with pytest.raises(InputError) as caught:
            open_checkpoint(address)
        assert command in str(caught.value)
