"""Damaged adapters of every family: each ends in numbers or in one message, never in a
traceback.
"""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_diag.adapters import open_adapter
from lora_diag.errors import LoradiagError
from lora_diag.storage import open_checkpoint
from tests.adapters.making import base, dense, normal, write

pytestmark = pytest.mark.slow

P = "base_model.model.fc"
LORA = {f"{P}.lora_A.weight": (2, 6), f"{P}.lora_B.weight": (8, 2)}
K = "lora_unet_fc"
KOHYA = {f"{K}.lora_up.weight": (8, 2), f"{K}.lora_down.weight": (2, 6)}
LOKR = {f"{P}.lokr_w1_a": (2, 2), f"{P}.lokr_w1_b": (2, 3), f"{P}.lokr_w2": (4, 2)}
STARTS = [
    ({"peft_type": "LORA", "r": 2, "lora_alpha": 3}, LORA),
    ({"peft_type": "LORA", "r": 2, "lora_alpha": 3}, LORA | {f"{P}.lora_magnitude_vector": (8,)}),
    ({"peft_type": "LORA", "r": 2, "lora_alpha": 3}, LORA | {f"{P}.lora_B.bias": (8,)}),
    ({"peft_type": "LORA", "r": 2, "lora_alpha": 3, "kasa_config": {}}, LORA | {f"{P}.lora_diag": (2,)}),
    (
        {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "use_bdlora": {"nblocks": 2, "target_modules_bd_b": ["fc"]}},
        {f"{P}.lora_A.weight": (2, 6), f"{P}.lora_B.weight": (8, 1)},
    ),
    ({"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_parameters": ["fc.weight"]}, LORA),
    (
        {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "trainable_token_indices": [3]},
        {f"{P}.token_adapter.trainable_tokens_delta": (1, 6), "base_model.model.embed.lora_embedding_A": (2, 8),
         "base_model.model.embed.lora_embedding_B": (6, 2)},
    ),
    (
        {"peft_type": "ADALORA", "init_r": 2, "lora_alpha": 3},
        {f"{P}.lora_A": (2, 6), f"{P}.lora_B": (8, 2), f"{P}.lora_E": (2, 1)},
    ),
    (
        {"peft_type": "LOHA", "r": 2, "alpha": 3},
        {f"{P}.hada_w1_a": (8, 2), f"{P}.hada_w1_b": (2, 6), f"{P}.hada_w2_a": (8, 2), f"{P}.hada_w2_b": (2, 6)},
    ),
    ({"peft_type": "LOKR", "r": 2, "alpha": 3}, LOKR),
    (
        {"peft_type": "VERA", "r": 2},
        {f"{P}.vera_lambda_b": (8,), f"{P}.vera_lambda_d": (2,), "base_model.vera_A": (2, 9),
         "base_model.vera_B": (9, 2)},
    ),
    ({"peft_type": "IA3", "feedforward_modules": ["x"]}, {f"{P}.ia3_l": (8, 1)}),
    ({"peft_type": "OFT", "num_cayley_neumann_terms": 4}, {f"{P}.oft_R.weight": (2, 3)}),
    ({"peft_type": "FOURIERFT", "scaling": 3.0, "random_loc_seed": 7}, {f"{P}.fourierft_spectrum": (5,)}),
    ({"peft_type": "LN_TUNING"}, {f"{P}.ln_tuning_layers.weight": (8, 6)}),
    ({"peft_type": "TRAINABLE_TOKENS", "token_indices": [1, 2]}, {f"{P}.trainable_tokens_delta": (2, 6)}),
    (
        {"fine_tune_type": "dora", "lora_parameters": {"scale": 2, "rank": 2}},
        {"fc.lora_a": (6, 2), "fc.lora_b": (2, 8), "fc.m": (8,)},
    ),
    (None, KOHYA | {f"{K}.alpha": (), f"{K}.dora_scale": (8, 1)}),
    (
        None,
        {f"{K}.lora_up.weight": (8, 2, 1, 1), f"{K}.lora_mid.weight": (2, 2, 1, 1),
         f"{K}.lora_down.weight": (2, 6, 1, 1)},
    ),
    (None, {f"{K}.diff": (8, 6), f"{K}.diff_b": (8,)}),
    (None, {"unet.processor.fc_lora.up.weight": (8, 2), "unet.processor.fc_lora.down.weight": (2, 6)}),
]  # fmt: skip
JUNK = st.sampled_from(
    [
        None,
        0,
        -1,
        1.5,
        10**30,
        10**400,
        float("inf"),
        "",
        "x",
        [],
        [1],
        [[0, 1]],
        {},
        {"fc": 1},
        {"a": "b"},
        True,
    ]
)
SHAPES = st.lists(st.integers(0, 8), max_size=4).map(tuple)


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_damaged_file_gives_numbers_or_one_message(data):
    config, shapes = data.draw(st.sampled_from(STARTS))
    shapes = dict(shapes)
    for _ in range(data.draw(st.integers(0, 2))):
        name = data.draw(st.sampled_from(sorted(shapes)))
        shapes[name] = data.draw(SHAPES)
    if data.draw(st.booleans()) and len(shapes) > 1:
        del shapes[data.draw(st.sampled_from(sorted(shapes)))]
    if config is not None and data.draw(st.booleans()):
        keys = {
            *config,
            "rank_pattern",
            "alpha_pattern",
            "layer_replication",
            "use_rslora",
            "init_lora_weights",
        }
        config = config | {data.draw(st.sampled_from(sorted(keys))): data.draw(JUNK)}
    folder = Path(tempfile.mkdtemp())
    try:
        name = (
            "adapter_model.safetensors"
            if config is not None
            else "pytorch_lora_weights.safetensors"
        )
        write(folder / "adapter" / name, {name: normal(*shape) for name, shape in shapes.items()})
        if config is not None:
            (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
        weights = {"fc.weight": normal(8, 6), "fc.bias": normal(8), "embed.weight": normal(8, 6)}
        for on in (None, open_checkpoint(base(folder, weights))):
            measure(folder / "adapter", on)
    finally:
        shutil.rmtree(folder)


def measure(path, on) -> None:
    try:
        pairing, _ = open_adapter(path).pair(on)
        for delta in pairing.deltas:
            assert isinstance(dense(delta), np.ndarray)
    except LoradiagError:
        pass
