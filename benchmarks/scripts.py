"""Plain loops that loradiag is compared with: ``python -m benchmarks.scripts NAME PATH...``."""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open


def read_pairs(base: Path, tuned: Path) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield name, BASE and TUNED of every matrix."""
    for shard in sorted(base.glob("*.safetensors")):
        with safe_open(shard, "pt") as before, safe_open(tuned / shard.name, "pt") as after:
            for name in before.keys():  # noqa: SIM118 (not a mapping)
                if before.get_slice(name).get_shape()[1:]:
                    yield name, before.get_tensor(name), after.get_tensor(name)


def floor(base: Path, tuned: Path) -> None:
    """Read both files, subtract, take the float64 norm: what no measurement of ΔW can
    do without.
    """
    for _, before, after in read_pairs(base, tuned):
        torch.linalg.vector_norm(after.float() - before.float(), dtype=torch.float64)


def svdvals(base: Path, tuned: Path) -> None:
    """The loop that everybody writes."""
    for _, before, after in read_pairs(base, tuned):
        torch.linalg.svdvals(after.float() - before.float())


def weightwatcher(base: Path, tuned: Path) -> None:
    """WeightWatcher's deltas, and its table as one line of JSON."""
    import weightwatcher as ww

    details = ww.WeightWatcher(model=str(tuned), base_model=str(base)).analyze(mp_fit=True)
    print(f"\n{details.to_json(orient='records')}")


def losses(base: Path, tuned: Path, adapter: Path, text: Path) -> None:
    """The mean loss of BASE, TUNED and BASE with the adapter on a text: the loop that
    ``probe outputs`` replaces.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.real import LENGTH, SEQUENCES

    ids = AutoTokenizer.from_pretrained(base)(
        text.read_text(encoding="utf-8"), return_tensors="pt"
    )["input_ids"]
    sequences = (
        ids[0, : SEQUENCES * LENGTH].view(-1, LENGTH) if ids.numel() >= SEQUENCES * LENGTH else ids
    )
    for path in (base, tuned, adapter):
        model = AutoModelForCausalLM.from_pretrained(
            base if path == adapter else path, dtype=torch.float32
        )
        if path == adapter:
            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        with torch.no_grad():
            print([float(model(input_ids=row[None], labels=row[None]).loss) for row in sequences])


def loradiag_each(*adapters: Path) -> None:
    """The spectrum of every adapter, in one process."""
    import lora_diag

    for adapter in adapters:
        lora_diag.spectrum(adapter)


def gradience_each(*adapters: Path) -> None:
    """The same with gradience's audit."""
    from gradience.vnext.audit import audit_lora_peft_dir

    for adapter in adapters:
        audit_lora_peft_dir(adapter, compute_udr=False)


SCRIPTS = {
    script.__name__: script
    for script in (floor, svdvals, weightwatcher, losses, loradiag_each, gradience_each)
}

if __name__ == "__main__":
    name, *paths = sys.argv[1:]
    SCRIPTS[name](*map(Path, paths))
