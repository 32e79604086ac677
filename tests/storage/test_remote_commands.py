"""Every command that opens a checkpoint or adapter takes an address, and none shows or stores its
secrets.
"""

import asyncio
import json
import shutil
import sys
from collections import Counter
from contextlib import closing
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

import pytest

from lora_diag import read_results, spectrum
from lora_diag.errors import InputError
from lora_diag.storage import hub as hub_module
from tests.conftest import ROOT
from tests.messages import assert_names
from tests.storage.web import Web

pytestmark = pytest.mark.slow

SAMPLES = ROOT / "sample_checkpoints"
QPROJ = ("--layers", r"layers\.0\.self_attn\.q_proj")


@pytest.fixture(scope="module")
def web():
    with closing(Web(SAMPLES)) as served:
        yield served


def far(words, url):
    return [word.replace("@", f"{url}/") for word in words]


@pytest.mark.parametrize(
    "words",
    [
        ["spectrum", "@base", "@full_ft", *QPROJ],
        ["spectrum", "@lora_r4", *QPROJ],
        ["spectrum", "@base", "--gradients", "@gradients/grad_step000000.safetensors", *QPROJ],
        ["fleet", "@lora_r4", "@lora_r16", *QPROJ],
        ["residual", "@base", "@full_ft", "@lora_r4", "@lora_r16", *QPROJ],
        ["overlap", "@base", "@full_ft", "@gradients/grad_step000000.safetensors", *QPROJ],
        ["interference", "@base", "@lora_r4", "@lora_r16", *QPROJ],
        ["interference", "@lora_r4", "@lora_r16", *QPROJ],
        ["intruders", "@base", "@lora_r4", *QPROJ],
        ["verify-merge", "@base", "@lora_r4", "@full_ft", *QPROJ],
        ["inspect", "@base"],
        ["inspect", "@lora_r16", "--by", "layer"],
        ["plan", "@base"],
        ["plan", "@base/config.json"],
    ],
    ids=lambda words: " ".join(words[:4]),
)
def test_command_output_equal_for_address_and_folder(web, run, words):
    web.requests.clear()
    remote = run(*far(words, web.url))
    local = run(*far(words, SAMPLES))
    assert (remote.code, local.code) in {(0, 0), (1, 1)}, remote.err
    # The same text, but for the place and the blanks that its length costs.
    assert remote.out.replace(web.url, str(SAMPLES)).split() == local.out.split()
    assert web.requests
    counts = Counter((request.path, request.range) for request in web.requests)
    twice = {path for (path, _), count in counts.items() if count > 1}
    # Factors are looked at before they are measured; these two commands go over a weight several
    # times.
    assert all("lora" in path for path in twice) or words[0] in {"intruders", "verify-merge"}


def test_extract_and_gate_accept_addresses(web, run, tmp_path):
    done = run(
        "extract", f"{web.url}/base", f"{web.url}/full_ft", "--rank", "2", *QPROJ, "-o", "adapter"
    )
    assert done.code == 0, done.err
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == f"{web.url}/base"
    run("residual", SAMPLES / "base", SAMPLES / "full_ft", SAMPLES / "lora_r4", "-o", "r.jsonl")
    assert run("gate", "init", "r.jsonl", "-o", "policy.toml").code == 0
    words = [f"{web.url}/base", "--tuned", f"{web.url}/full_ft", "--adapter", f"{web.url}/lora_r4"]
    assert run("gate", "policy.toml", "--base", *words).code == 0


def test_resume_requires_same_inputs(run, web_here, tmp_path):
    for name in ("base", "full_ft"):
        shutil.copytree(SAMPLES / name, tmp_path / name)
    words = (
        "spectrum",
        *far(["@base", "@full_ft"], web_here.url),
        "--layers",
        r"layers\.0",
        "-o",
        "s.jsonl",
    )
    assert run(*words).code == 0
    whole = (tmp_path / "s.jsonl").read_text()
    begun = "".join(whole.splitlines(keepends=True)[:3])
    (tmp_path / "s.jsonl").write_text(begun)
    assert run(*words, "--resume").code == 0
    assert (tmp_path / "s.jsonl").read_text() == whole
    (tmp_path / "s.jsonl").write_text(begun)
    # One bit of one weight: the size is unchanged, and so is nearly every page.
    file = next((tmp_path / "full_ft").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content)
    done = run(*words, "--resume")
    assert done.code == 2
    assert_names(done.err, "full_ft", "changed")
    assert (tmp_path / "s.jsonl").read_text() == begun


def test_failures_give_one_message_and_exit_code_3(web, run):
    for words, says in (
        (("spectrum", f"{web.url}/base", f"{web.url}/elsewhere"), "/elsewhere: no weights found"),
        (("inspect", "s3://"), "s3://: unsupported scheme"),
        (("inspect", f"{web.url}/x.safetensors"), "/x.safetensors: no such file or folder"),
        (("inspect", "http://127.0.0.1:9/base"), "cannot be read"),
        (
            ("probe", "truncation", f"{web.url}/base", f"{web.url}/full_ft", "--eval", __file__),
            "download it",
        ),
    ):
        done = run(*words)
        assert done.code == 3, done.err
        assert done.err.startswith("Error: ")
        assert says in done.err
        assert done.err.count("\n") == 1


def test_results_are_written_to_this_machine(web, run, tmp_path):
    for words in (
        ("-o", "s3://b/s.jsonl"),
        ("--output", "https://me:hidden@host/s.jsonl"),
        ("--output=https://h/s",),
    ):
        done = run("spectrum", SAMPLES / "base", SAMPLES / "full_ft", *QPROJ, *words)
        assert done.code == 2
        assert_names(done.err, "local path")
        assert "hidden" not in done.err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def hub(tmp_path):
    """The Hub, played by two local servers: one that knows repositories, one that has
    their files.
    """
    pytest.importorskip("huggingface_hub")
    commit = "0123456789abcdef0123456789abcdef01234567"
    names = [str(file.relative_to(SAMPLES)) for file in SAMPLES.rglob("*") if file.is_file()]
    listing = {"id": "org/name", "sha": commit, "siblings": [{"rfilename": name} for name in names]}
    place = tmp_path / "hub" / "api" / "models" / "org" / "name" / "revision" / "main"
    place.parent.mkdir(parents=True)
    place.write_text(json.dumps(listing))
    with closing(Web(SAMPLES)) as files, closing(Web(tmp_path / "hub")) as front:
        moved = {
            f"/org/name/resolve/{commit}/{name}/": f"{files.url}/{name}"
            for name in ("base", "full_ft")
        }
        front.moved = moved
        yield front, files


def test_hub_commands_read_remote_model(hub, loradiag, tmp_path):
    front, files = hub
    env = {"HF_ENDPOINT": front.url, "HF_TOKEN": "hf_hidden", "HF_HOME": str(tmp_path / "home")}
    words = ("spectrum", "hf://org/name@main/base", "hf://org/name@main/full_ft", *QPROJ)
    done = loradiag(*words, "-o", "s.jsonl", env=env, anew=True)
    assert done.code == 0, done.err
    result = read_results(tmp_path / "s.jsonl")
    assert result.layers == spectrum(SAMPLES / "base", SAMPLES / "full_ft", layers=QPROJ[1]).layers
    assert result.run.inputs[0].path == "hf://org/name@main/base"
    assert "at commit 0123456789abcdef" in result.run.inputs[0].notes[0]
    # The token goes to the Hub, not to where it keeps its files; and nothing of a file is kept.
    assert {
        request.headers.get("authorization")
        for request in front.requests
        if "/org/name" in request.path
    } == {"Bearer hf_hidden"}
    # Nothing but the named model is asked for, such as huggingface_hub's list of programs.
    assert {"/".join(request.path.split("/")[:5]) for request in front.requests} == {
        "/api/models/org/name",
        "/org/name/resolve/0123456789abcdef0123456789abcdef01234567",
    }
    assert files.requests
    assert not any("authorization" in request.headers for request in files.requests)
    assert "hf_hidden" not in done.out + done.err + (tmp_path / "s.jsonl").read_text()
    assert not list((tmp_path / "home").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("endpoint", "follows"), [("http://127.0.0.1", True), ("http://localhost", False)]
)
def test_hub_redirects_to_public_addresses_only(hub, monkeypatch, endpoint, follows):
    """A file host on the private network, with the Hub there as well or not."""

    async def is_public(host):
        return host == "localhost"

    monkeypatch.setattr(hub_module, "_is_public", is_public)
    front, files = hub
    root = f"{endpoint}:{front.url.rpartition(':')[2]}/org/name/resolve/0123456789abcdef0123456789abcdef01234567"
    store = hub_module.HubStore(
        "hf://org/name", root, ["base/config.json"], "0123", {"Authorization": "Bearer x"}
    )
    if follows:
        size = (SAMPLES / "base" / "config.json").stat().st_size
        assert store.file_info("hf://org/name/base/config.json").size == size
    else:
        with pytest.raises(InputError) as caught:
            store.file_info("hf://org/name/base/config.json")
        assert_names(str(caught.value), files.url, "HF_ENDPOINT")
        assert "secret" not in str(caught.value)
        assert not files.requests


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        *((host, True) for host in ("1.1.1.1", "2606:4700:4700::1111")),
        *(
            (host, False)
            for host in ("127.0.0.1", "::1", "169.254.169.254", "10.0.0.1", "localhost")
        ),
        *((host, False) for host in ("::ffff:127.0.0.1", "fe80::1%lo")),
    ],
)
def test_private_addresses_are_recognized(host, expected):
    assert asyncio.run(hub_module._is_public(host)) is expected


def test_inspect_of_address_imports_no_torch(web):
    import subprocess

    code = (
        f"import sys; sys.argv = ['loradiag', 'inspect', '{web.url}/base']\nfrom lora_diag.cli "
        "import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\nassert 'torch' "
        "not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_certificate_is_checked(web, loradiag, tmp_path):
    certificate = self_signed(tmp_path)
    with closing(Web(SAMPLES, certificate)) as secure:
        trusting = loradiag(
            "inspect", f"{secure.url}/lora_r4", env={"SSL_CERT_FILE": str(certificate)}, anew=True
        )
        assert trusting.code == 0, trusting.err
        assert trusting.out.startswith(f"{secure.url}/lora_r4: PEFT LoRA")
        doubting = loradiag("inspect", f"{secure.url}/lora_r4")
        assert doubting.code == 3
        assert_names(doubting.err, "certificate verify")
        assert doubting.err.count("\n") == 1


def self_signed(folder):
    """Write a key and its certificate for 127.0.0.1."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    private = key.private_bytes(pem, form, serialization.NoEncryption())
    file = folder / "certificate.pem"
    file.write_bytes(private + certificate.public_bytes(pem))
    return file
