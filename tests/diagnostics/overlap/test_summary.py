"""What the overlap table and its summary say, from records made by hand."""

from lora_diag.diagnostics.overlap.record import Overlap
from lora_diag.diagnostics.overlap.show import overlap_table, tracks
from lora_diag.metrics.subspaces import overlap_by_chance
from lora_diag.records import End, Results, Run, RunInput
from tests.building import build
from tests.messages import assert_names


def record(layer, step, kappa, rank=16, tangent=None, **more):
    random = overlap_by_chance((512, 512), rank)
    fields = {"tangent": min(1.0, kappa + 0.2) if tangent is None and kappa is not None else tangent, **more}
    chances = {f"{name}_random": getattr(random, name) for name in ("kappa", "tangent", "left", "right")}
    fields |= {"left": kappa, "right": kappa, "gradient_fro": 0.0 if kappa is None else 1.0} | chances
    return build(Overlap, layer=layer, shape=(512, 512), step=step, rank=rank, kappa=kappa, **fields)


def results(records, role="tuned", left_out=(), end=True, ranks=(16,)):
    roles = ("base", role, "gradients")
    sides = tuple(RunInput(role=name, path=f"{name}/", kind="a file", tensors=1) for name in roles)
    last = End(layers=1, left_out=0, fro=None, base_fro=None) if end else None
    run = Run(command="overlap", version="0", inputs=sides, settings={"ranks": list(ranks)})
    return Results(run, tuple(records), tuple(left_out), last)


def flat(found, **options):
    return " ".join(overlap_table(found, 200, **options).split())


A, B = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"


def test_layer_at_baseline_is_named_with_step():
    kappas = {0: 0.4, 10: 0.05, 20: 0.3, 30: 0.06, 40: 0.05}
    result = results([record(A, t, k, tangent=0.26) for t, k in kappas.items()] + [record(B, t, 0.5) for t in kappas])
    text = flat(result)
    assert "Containment partly" in text
    assert "layers.0.self_attn.q_proj (0.05, since step 30)" in text
    assert "the gradients are outside" in text


def test_complete_subspaces_suggest_no_rank():
    """At full rank κ and its baseline are both 1, which says nothing of a higher rank."""
    near, full = record(A, 0, 0.031), record(A, 0, 1.0, rank=512, tangent=1.0)
    assert full.kappa_random == 1
    text = flat(results([near.model_copy(update={"tangent": 0.26}), full], ranks=(16, 512)))
    assert "use a higher rank" not in text
    assert_names(text, "gradients", "outside")


def test_adapter_is_shown_at_its_own_rank_and_checkpoint_at_16():
    records = [record(A, 0, 0.5, rank) for rank in (8, 16, 32)]
    assert tracks(results(records))[0].rank == 16
    assert tracks(results(records, role="adapter"))[0].rank == 32
    assert tracks(results(records), rank=8)[0].rank == 8
    assert tracks(results(records[:1] + records[2:]))[0].rank == 32


def test_records_in_order_of_training_are_joined_by_layer():
    result = results([record(layer, step, 0.5) for step in (20, 0, 10) for layer in (A, B)])
    assert [(track.layer, [r.step for r in track.records]) for track in tracks(result)] == [
        (A, [0, 10, 20]),
        (B, [0, 10, 20]),
    ]


def test_many_steps_are_binned_and_table_still_fits():
    result = results([record(A, step, 0.1 + step / 2000) for step in range(0, 1000, 5)])
    for width in (60, 80, 140):
        text = overlap_table(result, width)
        assert max(map(len, text.splitlines())) <= width
        assert "995" in text
    assert "over steps" in overlap_table(result, 80)
    assert "rises" in overlap_table(result, 80)
