"""The engine on a cluster: a real one of two nodes, whose workers and nodes die while
they measure.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_diag
from lora_diag import Ray
from lora_diag.diagnostics.fleet.measure import FleetPath, FleetSettings, Member, _measure_on_worker
from lora_diag.errors import InputError, UsageError
from lora_diag.models.data import read_texts
from lora_diag.models.opening import open_model
from lora_diag.probes.sweep import SweepOptions
from lora_diag.running import training_runs
from lora_diag.running.engines import ray as engine
from lora_diag.running.engines.ray import import_ray
from lora_diag.running.engines.worker import Job, open_job
from lora_diag.running.layers import DevicePlan, plan_device
from lora_diag.running.training_runs import Site, TrainRun, drop_sequences, open_site
from lora_diag.storage import open_checkpoint
from lora_diag.tuning.record import TuneDecision, TunePlan, TuneTrial
from lora_diag.tuning.search import Tuner
from lora_diag.version import __version__
from tests.conftest import PATIENCE, ROOT, save_model
from tests.linalg.test_hidden import planted
from tests.messages import raises_naming
from tests.probes.making import gpt2, some_text
from tests.running.engines import faulty
from tests.storage.web import Web

# The module: ``lora_diag.spectrum`` is the function.
api = sys.modules["lora_diag.diagnostics.spectrum.run"]
LAST = "model.layers.1.self_attn.q_proj.weight"


class TwoNodes:
    """The cluster, and how to cut its power."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.running.engines.two_nodes"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.address = self.said()

    def said(self) -> str:
        line = self.process.stdout.readline().strip()
        assert line, "the cluster did not start"
        return line

    def tell(self, word: str) -> None:
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        assert self.said() == "done"

    def end(self) -> None:
        with self.process:
            self.process.stdin.close()
            self.process.wait(timeout=PATIENCE)


@pytest.fixture(scope="module")
def cluster():
    """A cluster of two nodes with one core each, and this process connected to it."""
    ray = import_ray()
    before = signal.getsignal(signal.SIGTERM)
    nodes = TwoNodes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Ray's own, of its start
            ray.init(address=nodes.address, log_to_driver=False, logging_level="CRITICAL")
        yield nodes
        ray.shutdown()
    finally:
        signal.signal(signal.SIGTERM, before)
        nodes.end()


@pytest.fixture
def pair(pair_of_models):
    return pair_of_models[0], pair_of_models[1]


def both(tmp_path, command, *inputs, **options):
    """Return the bytes of the results file of one machine, and of the cluster."""
    measure = getattr(lora_diag, command)
    for name, on in (("local", None), ("cluster", Ray())):
        measure(*inputs, output=tmp_path / name, engine=on, **options)
    return (tmp_path / "local").read_bytes(), (tmp_path / "cluster").read_bytes()


SAMPLES = ROOT / "sample_checkpoints"
COMMANDS = {
    "spectrum": (SAMPLES / "base", SAMPLES / "full_ft"),
    "spectrum without torch": (SAMPLES / "lora_r16",),
    "residual": (
        SAMPLES / "base",
        SAMPLES / "full_ft",
        [SAMPLES / "lora_r4", SAMPLES / "lora_r16"],
    ),
    "overlap": (SAMPLES / "base", SAMPLES / "full_ft", [SAMPLES / "gradients"]),
    "interference": ([SAMPLES / "lora_r4", SAMPLES / "lora_r16"],),
    "intruders": (SAMPLES / "base", SAMPLES / "lora_r4"),
    "geometry": (SAMPLES / "base", SAMPLES / "full_ft"),
    "verify_merge": (SAMPLES / "base", SAMPLES / "lora_r4", SAMPLES / "full_ft"),
    "fleet": ([SAMPLES / "*"],),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_every_diagnostic_gives_same_bytes_as_on_one_machine(cluster, tmp_path, case):
    command, layers = case.split()[0], r"layers\.[01]\.(self_attn\.q|mlp\.up|input)"
    local, there = both(tmp_path, command, *COMMANDS[case], layers=layers)
    assert local == there
    assert b'"end"' in local


def test_extract_writes_same_adapter(cluster, pair, tmp_path):
    for name, on in (("local", None), ("cluster", Ray())):
        (tmp_path / name).mkdir()
        lora_diag.extract(*pair, tmp_path / name / "adapter", params=400, engine=on)
    local, there = (tmp_path / name / "adapter" for name in ("local", "cluster"))
    assert (local / "extraction.jsonl").read_bytes() == (there / "extraction.jsonl").read_bytes()
    assert (local / "adapter_model.safetensors").read_bytes() == (
        there / "adapter_model.safetensors"
    ).read_bytes()


def test_recover_writes_same_checkpoint_and_adapter(cluster, tmp_path):
    base, _, tuned = (part.bfloat16() for part in planted(96, 80, 3, 2e-5, 1))
    for name, weight in (("base", base), ("tuned", tuned)):
        save_model(
            tmp_path / name, {LAST: weight, LAST.replace("q_proj", "k_proj"): weight.flip(0)}
        )
    for name, on in (("local", None), ("cluster", Ray())):
        (tmp_path / name).mkdir()
        for kind, ways in (("full", {"checkpoint": True}), ("budget", {"params": 400})):
            lora_diag.recover(
                tmp_path / "base", tmp_path / "tuned", tmp_path / name / kind, engine=on, **ways
            )
    for file in (
        "full/model.safetensors",
        "full/recovery.jsonl",
        "budget/adapter_model.safetensors",
    ):
        assert (tmp_path / "local" / file).read_bytes() == (
            tmp_path / "cluster" / file
        ).read_bytes()


def test_killed_node_does_not_change_results(cluster, pair, tmp_path, monkeypatch):
    import ray

    lora_diag.spectrum(*pair, output=tmp_path / "local")
    head, marker = ray.get_runtime_context().get_node_id(), tmp_path / "on the second node"
    monkeypatch.setattr(
        api, "_measure_layer", partial(faulty.waits_on_the_second_node, marker, head)
    )

    def cut_the_power():
        until(marker)
        cluster.tell("kill")

    killer = threading.Thread(target=cut_the_power)
    killer.start()
    lora_diag.spectrum(*pair, output=tmp_path / "cluster", engine=Ray())
    killer.join()
    cluster.tell("add")
    assert (tmp_path / "local").read_bytes() == (tmp_path / "cluster").read_bytes()


def test_layer_that_kills_workers_is_named(cluster, pair, tmp_path, monkeypatch):
    lora_diag.spectrum(*pair, output=tmp_path / "local")
    monkeypatch.setattr(engine, "RETRIES", 0)
    monkeypatch.setattr(api, "_measure_layer", partial(faulty.kills_its_worker, tmp_path, 99, LAST))
    with pytest.raises(InputError, match=rf"^{LAST}: a worker died while it measured it"):
        lora_diag.spectrum(*pair, output=tmp_path / "cluster", engine=Ray())
    whole, left = ((tmp_path / name).read_bytes() for name in ("local", "cluster"))
    assert whole.startswith(left)
    assert left.count(b"\n") == 1 + 9  # of ten matrices
    monkeypatch.undo()
    lora_diag.spectrum(*pair, output=tmp_path / "cluster", resume=True)  # on this machine
    assert (tmp_path / "cluster").read_bytes() == whole


@pytest.fixture
def tiny(tmp_path):
    """BASE and texts of training runs, which have one thread here as on the nodes, whose GPU is one
    in name alone.
    """
    texts = {
        "data": some_text(tmp_path, "train", windows=7),
        "eval": [some_text(tmp_path, windows=2, source="shifted")],
    }
    return gpt2(tmp_path / "base"), {**texts, "steps": 2, "batch": 2, "repeats": 2, "device": "cpu"}


def test_sweep_whose_worker_dies_resumes_to_same_bytes(cluster, tiny, tmp_path, monkeypatch):
    base, options = tiny
    options |= {"ranks": (1, 2), "lr": (1e-2,), "widen": 0, "quantized": "nf4"}
    lora_diag.probe_sweep(base, output=tmp_path / "local", **options)
    whole, there, progress = (tmp_path / "local").read_bytes(), tmp_path / "cluster", []
    label = "r=2 lr=0.01 seed 0"
    monkeypatch.setattr(engine, "RETRIES", 0)
    monkeypatch.setattr(
        training_runs,
        "train_on_worker",
        partial(faulty.kills_its_worker_in_a_run, tmp_path, 1, label),
    )
    with pytest.raises(
        InputError, match=f"^{label}: a worker died while it measured it.*lower batch"
    ):
        lora_diag.probe_sweep(base, output=there, engine=Ray(), **options)
    left = there.read_bytes()
    assert whole.startswith(left)
    assert (
        left.count(b'"record":"probe"') == 2 + 1
    )  # BASE, rounded and not, and the first run of r=1
    lora_diag.probe_sweep(
        base, output=there, resume=True, engine=Ray(), on_progress=progress.append, **options
    )
    assert there.read_bytes() == whole
    assert progress[-1].done == progress[-1].total


def test_tune_time_limit_on_cluster_and_local_resume(cluster, tiny, tmp_path, monkeypatch, undrawn):
    """Time is up while the pilot is trained, which is ended; with more time here, all is as of one
    machine.
    """
    base, options = tiny
    options |= {"params": 1100, "ranks": (2,), "lr": (1e-2,), "widen": 0, "no_full": True}
    local = lora_diag.tune(base, tmp_path / "local", time="1h", **options)
    marker, original = tmp_path / "began", Tuner.left.fget
    monkeypatch.setattr(
        Tuner, "left", property(lambda self: -1.0 if marker.exists() else original(self))
    )
    monkeypatch.setattr(
        training_runs, "train_on_worker", partial(faulty.never_ends, marker, "pilot")
    )
    run = tmp_path / "cluster"
    result = lora_diag.tune(base, run, time="1h", engine=Ray(), **options)
    outcomes = {one.name: one.outcome for one in result.whole_of(TuneDecision)}
    assert outcomes["non-uniform ranks"] == "not tried"
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    assert result.whole_of(TunePlan)[0].slots == 2
    assert (run / "sweep.jsonl").read_bytes() == (tmp_path / "local" / "sweep.jsonl").read_bytes()
    monkeypatch.undo()
    repeated = lora_diag.tune(base, run, resume=True, time="2h", **options)
    assert repeated.whole_of(TuneTrial) == local.whole_of(TuneTrial)
    untimed = [
        [one.model_copy(update={"seconds": None}) for one in each.whole_of(TuneDecision)]
        for each in (repeated, local)
    ]
    assert untimed[0] == untimed[1]
    adapters = [
        tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("local", "cluster")
    ]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the GPU that is wanted")
def test_local_training_uses_requested_device_and_threads(cluster, tiny):
    base, options = tiny
    with raises_naming(UsageError, "GPUs", "machine"):
        lora_diag.probe_sweep(base, engine=Ray(), **options | {"device": "auto"})
    with raises_naming(UsageError, "concurrent=2", 1, "engine"):
        lora_diag.probe_sweep(base, concurrent=2, **options)
    torch.set_num_threads(3)  # a step is timed here with the threads of a run
    with TrainRun("probe sweep", {**options, "engine": Ray()}, SweepOptions).joined():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3


def test_worker_refuses_texts_that_differ(tiny):
    base, options = tiny
    text = read_texts(options["data"], open_model(base, torch.device("cpu")))
    site = Site(
        str(base),
        "cpu",
        "float32",
        None,
        "auto",
        (drop_sequences(text),),
        None,
        open_checkpoint(base),
    )
    assert open_site(site)[1] == text
    with raises_naming(InputError, "train.txt", "other contents"):
        open_site(replace(site, texts=(replace(drop_sequences(text), hash="0123456789abcdef"),)))


def test_local_run_resumes_on_cluster(cluster, pair, tmp_path):
    lora_diag.spectrum(*pair, output=tmp_path / "local")
    whole = (tmp_path / "local").read_bytes()
    (tmp_path / "begun").write_bytes(b"".join(whole.splitlines(keepends=True)[:4]))
    lora_diag.spectrum(*pair, output=tmp_path / "begun", resume=True, engine=Ray())
    assert (tmp_path / "begun").read_bytes() == whole


def test_cluster_reports_unmeasurable_layer_like_local(cluster, pair, tmp_path, monkeypatch):
    base, tuned = pair
    tensors = load_file(tuned / "model.safetensors")
    tensors[LAST][3, 4] = torch.nan
    save_file(tensors, tuned / "model.safetensors")
    local, there = both(tmp_path, "spectrum", base, tuned)
    assert local == there
    assert b'"non_finite"' in local
    monkeypatch.setattr(api, "_measure_layer", partial(faulty.cannot_read, LAST))
    message = []
    for name, on in (("local2", None), ("cluster2", Ray())):
        with pytest.raises(InputError) as error:
            lora_diag.spectrum(base, tuned, output=tmp_path / name, engine=on)
        message.append((str(error.value), (tmp_path / name).read_bytes()))
    assert message[0] == message[1]
    assert LAST in message[0][0]


def test_inputs_on_this_machine_only_are_named(cluster, pair, tmp_path):
    folder = os.open(pair[1], os.O_RDONLY)  # of this process alone
    try:
        with raises_naming(InputError, "/model.safetensors", "not visible", "storage"):
            lora_diag.spectrum(
                pair[0], f"/proc/self/fd/{folder}", output=tmp_path / "r", engine=Ray()
            )
    finally:
        os.close(folder)
    assert not (tmp_path / "r").exists()


def test_cluster_without_gpu_is_an_error(cluster, pair, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "MAX_WAIT_SECONDS", 0.1)
    monkeypatch.setattr(engine, "QUERY_SECONDS", 0.2)
    with raises_naming(InputError, "1 CPU", "2 GPUs"):
        lora_diag.spectrum(*pair, output=tmp_path / "r", engine=Ray(gpus_per_task=2))


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="the GPU of the second node is one in name alone"
)
def test_gpu_invisible_to_torch_is_an_error(cluster, pair):
    with raises_naming(UsageError, "0 CUDA", "devices"):
        lora_diag.spectrum(*pair, engine=Ray(gpus_per_task=0.5))


def test_workers_read_addresses_themselves(cluster, pair, tmp_path):
    web = Web(tmp_path)
    try:
        local, there = both(
            tmp_path, "spectrum", f"{web.url}/base", f"{web.url}/tuned", layers="lm_head"
        )
    finally:
        web.close()
    assert local == there


def test_ctrl_c_stops_cluster_and_leaves_resumable_file(cluster, pair, tmp_path):
    """By the command line, and with a worker killed before, of which Ray itself would tell on
    standard output.
    """
    lora_diag.spectrum(*pair, output=tmp_path / "local")
    first, *_ = layers = [record.layer for record in lora_diag.read_results(tmp_path / "local")]
    words = [
        "spectrum",
        *pair,
        "-o",
        "r.jsonl",
        "--json",
        "--engine",
        "ray",
        "--ray-address",
        cluster.address,
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.running.engines.faulty", tmp_path, first, layers[-1], *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    until(tmp_path / "waiting")
    until(
        lambda: (
            (tmp_path / "r.jsonl").exists() and (tmp_path / "r.jsonl").read_bytes().count(b"\n") > 1
        )
    )
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert err.decode() == "interrupted; a run with -o continues with --resume\n"
    assert (
        (tmp_path / "r.jsonl").read_bytes().startswith(out)
    )  # the interrupt may come between file and output
    assert out
    assert (tmp_path / "killed0").exists()
    worker = int((tmp_path / "waiting").read_text())
    until(
        lambda: (
            not Path(f"/proc/{worker}/cmdline").exists()
            or not Path(f"/proc/{worker}/cmdline").read_bytes()
        )
    )
    lora_diag.spectrum(*pair, output=tmp_path / "r.jsonl", resume=True)
    assert (tmp_path / "r.jsonl").read_bytes() == (tmp_path / "local").read_bytes()


def until(there):
    """Wait for a file, or for something to be so."""
    end = time.monotonic() + PATIENCE
    while not (there.exists() if isinstance(there, Path) else there()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def job(**changed) -> Job:
    return Job(**{"version": __version__, "folder": str(ROOT), "files": (), "work": b"", **changed})


def test_worker_refuses_changed_inputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").write_bytes(b"12345")
    with raises_naming(InputError, "loradiag", "0.0.1", "same version"):
        open_job(job(version="0.0.1"))
    with pytest.raises(InputError, match=r"^none: not visible to the worker on .*: No such file"):
        open_job(job(files=(("none", 5),), folder=str(tmp_path)))
    with pytest.raises(InputError, match=r"^model: has 5 bytes on .* instead of 6;"):
        open_job(job(files=(("model", 6),), folder=str(tmp_path)))


def test_worker_refuses_missing_adapters(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"12345")
    seen = FleetPath.read(tmp_path)
    (tmp_path / "training.log").write_bytes(b"what is beside it may grow")
    seen.check_unchanged()
    (tmp_path / "adapter_model.safetensors").write_bytes(b"1234")
    for path in (tmp_path, tmp_path / "none"):
        with raises_naming(InputError, "worker", "other files"):
            FleetPath(path, seen.digest).check_unchanged()
    assert FleetPath.read(tmp_path / "none").digest == ""


@pytest.mark.parametrize("other", ["lora_r4", "base"])
def test_worker_refuses_other_adapter_or_base(other):
    """Under the same path it would be measured as if it were the one that was meant."""
    seen = {name: FleetPath.read(SAMPLES / name) for name in ("lora_r4", "base")}
    seen[other] = replace(seen[other], digest="0123456789abcdef")
    settings = FleetSettings(seen["base"], r"layers\.0\..*q_proj", None, "cpu")
    with raises_naming(InputError, other, "worker"):
        _measure_on_worker(Member("one", seen["lora_r4"]), settings)


def test_invalid_options_are_refused():
    for gpus in (-1.0, float("inf"), float("nan"), 1.5):
        with raises_naming(UsageError, f"--gpus-per-task {gpus:g}"):
            Ray(gpus_per_task=gpus).check()
    with raises_naming(UsageError, "--ray-address", "ray://10.0.0.1:10001"):
        Ray(address="ray://10.0.0.1:10001").check()


def test_file_comparison_needs_no_gpu(monkeypatch):
    monkeypatch.setattr(engine, "import_ray", lambda: None)
    files = [SAMPLES / name for name in ("base", "lora_r4", "full_ft")]
    with raises_naming(UsageError, "gpus_per_task", "verify-merge"):
        lora_diag.verify_merge(*files, engine=Ray(gpus_per_task=1))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://10.0.0.1:8265", r"^RAY_ADDRESS=http://10.0.0.1:8265: .*HOST:PORT.*ray job submit"),
        ("", r"pip install '\.\[ray\]'"),
    ],
)
def test_unusable_ray_is_refused(monkeypatch, address, message):
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=message):
        Ray().check()


def test_ray_address_without_cluster_is_reported():
    with raises_naming(InputError, "127.0.0.1:1", "no Ray cluster answers"):
        engine._check_answers("RAY_ADDRESS=127.0.0.1:1", "127.0.0.1:1")


@pytest.mark.slow
@pytest.mark.parametrize("answer", [b"HTTP/1.1 400", b""])
def test_server_that_is_no_ray_cluster_is_reported(monkeypatch, answer):
    monkeypatch.setattr(engine, "ANSWER_SECONDS", 2.0)
    clients = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            with suppress(OSError):  # closed
                while True:
                    clients.append(server.accept()[0])
                    clients[-1].sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        address = "{}:{}".format(*server.getsockname())
        with raises_naming(InputError, address, "no Ray cluster answered within", "HOST:PORT"):
            engine._check_answers(address, address)
        server.shutdown(socket.SHUT_RDWR)
    thread.join()
    for client in clients:
        client.close()


@pytest.mark.parametrize(
    "address", ["there", ":6379", "10.0.0.1:", "10.0.0.1:70000", "10.0.0.1:http"]
)
def test_invalid_address_is_reported(address):
    with raises_naming(UsageError, "HOST:PORT"):
        engine._check_answers(f"--ray-address {address}", address)


def test_devices_of_cluster_follow_from_its_gpus(monkeypatch):
    monkeypatch.setattr(engine, "import_ray", lambda: None)
    assert (
        plan_device(Ray(), "auto") == plan_device(Ray(), "cpu") == DevicePlan("cpu", "cpu", "cpu")
    )
    assert plan_device(Ray(gpus_per_task=1), "auto").tasks == "cuda"
    for on, device in (
        (Ray(), "cuda"),
        (Ray(gpus_per_task=1), "cpu"),
        (Ray(gpus_per_task=1), "cuda:1"),
    ):
        with raises_naming(UsageError, f"--device {device}", "cluster"):
            plan_device(on, device)


class FakeRay:
    """Nodes that come and go."""

    def __init__(self, *nodes):
        self.listed = list(nodes)

    def nodes(self):
        return [{"Alive": True, "Resources": node} for node in self.listed]


def test_cluster_without_large_nodes_is_reported(monkeypatch):
    monkeypatch.setattr(engine, "MAX_WAIT_SECONDS", 0.05)
    monkeypatch.setattr(engine, "QUERY_SECONDS", 0.02)
    ray = FakeRay({"CPU": 8.0}, {"CPU": 2.0}, {})
    cluster = engine._Cluster(ray, 0)
    assert (cluster.largest, cluster.slots, cluster.capacity(None).cores) == (8, 10, 10)
    ray.listed = [{"CPU": 2.0}]
    time.sleep(0.03)
    cluster.poll(2)  # enough for what waits
    time.sleep(0.06)
    with raises_naming(InputError, "node", "8 CPUs"):
        cluster.poll(8)


def test_lost_head_is_reported(monkeypatch):
    monkeypatch.setattr(engine, "LOST_SECONDS", 0.3)
    monkeypatch.setattr(engine, "QUERY_SECONDS", 0.02)
    ray = FakeRay({"CPU": 8.0})
    with socket.create_server(("127.0.0.1", 0)) as head:
        cluster = engine._Cluster(ray, 0, {"the head": head.getsockname()})
        time.sleep(0.03)
        cluster.poll(1)
    del ray.listed  # without its head, a cluster is not asked for its nodes
    time.sleep(0.03)
    cluster.poll(1)
    time.sleep(0.4)
    with raises_naming(InputError, "the head", "is lost", "--resume"):
        cluster.poll(1)


def test_gpu_task_gets_share_of_cores():
    cluster = engine._Cluster(
        FakeRay({"CPU": 32.0, "GPU": 8.0}, {"CPU": 16.0, "GPU": 2.0}, {"CPU": 64.0}), 0.5
    )
    assert cluster.slots == 20
    assert cluster.threads(engine.MachineLayout(4, 100))(10**9) == 2
    assert cluster.capacity(None).max_batches == 40
    assert cluster.capacity(3).max_batches == 3
