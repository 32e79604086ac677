"""Masked language models: which tokens are hidden, and losses against a script of transformers
alone.
"""

import json
import random

import numpy as np
import pytest
import torch
import transformers
from tokenizers import pre_tokenizers

import lora_diag
from lora_diag.errors import InputError, UsageError
from lora_diag.models.data import read_texts
from lora_diag.models.opening import open_model
from tests import oracles
from tests.messages import assert_names, raises_naming
from tests.models.test_data import save_tokenizer
from tests.probes.making import EVAL, best, moved, tensors

LENGTH, PAD, CLS, SEP, MASK = 24, 0, 1, 2, 3
AROUND = "[CLS] $A [SEP]"


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """BASE, TUNED, a text of words and its tokenizer."""
    folder = tmp_path_factory.mktemp("masked")
    words = (EVAL / "in_domain.txt").read_text().split()[:700]
    text = folder / "text.txt"
    text.write_text(" ".join(words))
    splitter = pre_tokenizers.Whitespace()
    known = sorted(
        {word for word, _ in splitter.pre_tokenize_str(text.read_text())}
        | {"The", "year", "1936", "a"}
    )
    vocabulary = {
        word: i for i, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", *known])
    }
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
    )
    base = folder / "base"
    transformers.BertForMaskedLM(config).save_pretrained(base)
    save_tokenizer(base, vocabulary, AROUND, "[UNK]", pad_token="[PAD]", mask_token="[MASK]")
    return base, moved(base, folder / "tuned", 0.05), text, vocabulary


def windows(text, vocabulary):
    """The text in windows between [CLS] and [SEP], by hand."""
    words = [word for word, _ in pre_tokenizers.Whitespace().pre_tokenize_str(text.read_text())]
    ids = [vocabulary[word] for word in words]
    room = LENGTH - 2
    return [[CLS, *ids[at : at + room], SEP] for at in range(0, len(ids) - room + 1, room)]


def sequences(base, path):
    model = open_model(base, torch.device("cpu"), length=LENGTH)
    return read_texts(path, model)


def test_masking_hides_fifteen_percent(case):
    base, _, text, vocabulary = case
    result = sequences(base, text)
    whole = windows(text, vocabulary)
    assert len(result.sequences) == len(whole)
    places = []
    for sequence, original in zip(result.sequences, whole, strict=True):
        hidden = [i for i, label in enumerate(sequence.labels) if label != -100]
        assert len(hidden) == round(0.15 * (LENGTH - 2))
        assert [sequence.labels[i] for i in hidden] == [original[i] for i in hidden]
        assert list(sequence.ids) == [
            MASK if i in hidden else token for i, token in enumerate(original)
        ]
        assert not {0, LENGTH - 1} & set(hidden)
        places += hidden
    assert len(set(places)) > LENGTH / 2  # not the same places everywhere
    assert_names(result.about, "15%", "replaced", "seed 0")


def test_mask_depends_on_position_only(case):
    base, tuned, text, _ = case
    save = transformers.AutoTokenizer.from_pretrained(base)
    save.save_pretrained(tuned)
    assert sequences(base, text).sequences == sequences(tuned, text).sequences
    model = open_model(base, torch.device("cpu"), length=LENGTH)
    whole = sequences(base, text).sequences
    assert read_texts(text, model, 3).sequences == tuple(
        whole[i * len(whole) // 3] for i in range(3)
    )


def test_mask_is_fixed_by_seed_and_line(case, tmp_path):
    base, _, text, _ = case
    file = tmp_path / "x.jsonl"
    file.write_text((json.dumps({"text": " ".join(text.read_text().split()[:20])}) + "\n") * 3)
    for number, result in enumerate(sequences(base, file).sequences):
        order, count = random.Random(f"0:{number}"), len(result.ids) - 2
        draws = [order.random() for _ in range(count)]
        hidden = [place for place, label in enumerate(result.labels, -1) if label != -100]
        assert hidden == sorted(np.argsort(draws)[: max(1, round(0.15 * count))].tolist())


def test_only_completions_are_masked(case, tmp_path):
    base, _, text, _ = case
    words = text.read_text().split()
    file = tmp_path / "x.jsonl"
    rows = [
        {"prompt": " ".join(words[:9]), "completion": " ".join(words[9:60])},
        {"text": "a"},
        {"text": ""},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = sequences(base, file)
    first, second = result.sequences
    options = len(open_model(base, torch.device("cpu")).tokens.ids(rows[0]["prompt"]))
    hidden = [i for i, label in enumerate(first.labels) if label != -100]
    assert min(hidden) > options
    assert (len(first.ids), first.ids[0], first.ids[-1]) == (LENGTH, CLS, SEP)
    assert second.ids == (CLS, MASK, SEP)
    assert result.notes == (
        f"1 of 3 lines were cut to {LENGTH} tokens",
        "1 of 3 lines have nothing to predict and are left out",
    )


def losses(base, weights, text, own):
    """Mean loss of each sequence by transformers' own masked loss, the mask taken from
    the package.
    """
    model = transformers.BertForMaskedLM(transformers.AutoConfig.from_pretrained(base))
    state = {name: torch.from_numpy(value).float() for name, value in weights.items()}
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    model.tie_weights()
    model.eval()
    with torch.no_grad():
        return np.array(
            [
                model(input_ids=torch.tensor([s.ids]), labels=torch.tensor([s.labels])).loss.item()
                for s in own.sequences
            ]
        )


def test_truncation_losses_equal_independent_script(case):
    base, tuned, text, _ = case
    result = lora_diag.probe_truncation(
        base, tuned, eval=[text], ranks=(0, 2), length=LENGTH, batch=4
    ).whole
    own = sequences(base, text)
    w, t = tensors(base), tensors(tuned)
    matrices = [n for n in w if w[n].ndim == 2 and "embeddings" not in n and "decoder" not in n]
    assert len(matrices) == 13  # six in each block, one before the decoder
    cut = {rank: {**t, **{n: w[n] + best(t[n] - w[n], rank) for n in matrices}} for rank in (0, 2)}
    expected = {
        ("base", None): w,
        ("tuned", None): t,
        ("truncated", 0): cut[0],
        ("truncated", 2): cut[2],
    }
    assert [(r.subject, r.rank) for r in result] == list(expected)
    of_tuned = losses(base, t, text, own)
    for record in result:
        each = losses(base, expected[record.subject, record.rank], text, own)
        assert record.loss == pytest.approx(each.mean(), abs=1e-4)  # every sequence hides as many
        assert record.gap == pytest.approx((each - of_tuned).mean(), abs=1e-4)
        assert record.gap_error == pytest.approx(oracles.error_of_mean(each - of_tuned), abs=1e-4)
    assert result[0].tokens == len(own.sequences) * round(0.15 * (LENGTH - 2))


def test_outputs_compare_masked_predictions(case, tmp_path):
    base, tuned, text, _ = case
    other = moved(base, tmp_path / "other", 0.05, seed=3)
    record = lora_diag.probe_outputs(base, tuned, [other], eval=[text], length=LENGTH).whole[2]
    own = sequences(base, text)

    def logits(folder):
        model = transformers.BertForMaskedLM.from_pretrained(folder).eval()
        with torch.no_grad():
            result = [
                model(input_ids=torch.tensor([s.ids])).logits[0][torch.tensor(s.labels) != -100]
                for s in own.sequences
            ]
        return torch.cat(result).double().numpy()

    z_base, z_tuned, z_other = map(logits, (base, tuned, other))
    expected = np.linalg.norm(z_tuned - z_other) / np.linalg.norm(z_tuned - z_base)
    assert record.distance == pytest.approx(expected, rel=1e-4)
    assert record.agreement == pytest.approx((z_other.argmax(1) == z_tuned.argmax(1)).mean())
    assert len(record.hidden) == 3


def test_activations_respect_attention_mask(case, tmp_path):
    base, _, text, _ = case
    result = lora_diag.probe_activations(
        base, data=text, output=tmp_path / "c.safetensors", length=LENGTH
    )
    own = sequences(base, text)
    model = transformers.BertForMaskedLM.from_pretrained(base).eval()
    ids = torch.tensor([s.ids for s in own.sequences])
    with torch.no_grad():
        x = model.bert.embeddings(ids).double()
    query = next(item for item in result.layers if "0.attention.self.query" in item.layer)
    assert query.square == pytest.approx(float((x**2).sum() / (x.shape[0] * x.shape[1])), rel=1e-5)
    assert "mask" in result.about


def test_without_mask_token_there_is_one_message(case, tmp_path):
    base, _, _, vocabulary = case
    bare = moved(base, tmp_path / "bare")
    save_tokenizer(bare, vocabulary, AROUND, "[UNK]", pad_token="[PAD]")
    with raises_naming(InputError, "mask token"):
        open_model(bare, torch.device("cpu"))
    with raises_naming(UsageError, "--tokenizer bytes", "mask token"):
        open_model(base, torch.device("cpu"), tokenizer="bytes")
