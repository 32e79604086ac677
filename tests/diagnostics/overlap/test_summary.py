"""The records that the overlap table and its summary take from those of a run."""

from lora_diag.diagnostics.overlap.record import Overlap
from lora_diag.diagnostics.overlap.show import tracks
from tests.building import build, results

A, B = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"


def tracks_of(records, role="tuned", **options):
    inputs = [("base", "base"), (role, role), ("gradients", "gradients")]
    return tracks(results(records, command="overlap", inputs=inputs, ranks=[16]), **options)


def record(layer, step, rank=16):
    return build(Overlap, layer=layer, shape=(512, 512), step=step, rank=rank, kappa=0.5, gradient_fro=1.0)


def test_adapter_is_shown_at_its_own_rank_and_checkpoint_at_16():
    records = [record(A, 0, rank) for rank in (8, 16, 32)]
    assert tracks_of(records)[0].rank == 16
    assert tracks_of(records, role="adapter")[0].rank == 32
    assert tracks_of(records, rank=8)[0].rank == 8
    assert tracks_of(records[:1] + records[2:])[0].rank == 32


def test_records_in_order_of_training_are_joined_by_layer():
    found = tracks_of([record(layer, step) for step in (20, 0, 10) for layer in (A, B)])
    assert [(track.layer, [r.step for r in track.records]) for track in found] == [(A, [0, 10, 20]), (B, [0, 10, 20])]
