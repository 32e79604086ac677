"""Texts cut into sequences, with a real tokenizer that puts tokens around them."""

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from lora_diag.errors import InputError
from lora_diag.models.data import read_texts
from lora_diag.models.opening import open_model
from tests.probes.making import bert, gpt2

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "purred"]


def save_tokenizer(folder, vocabulary, around, unk, **tokens):
    """Save a tokenizer of words in a model's folder; the words 1 and 2 are around a text as in the
    template ``around``.
    """
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unk))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [(word, i) for word, i in vocabulary.items() if i in {1, 2}]
    tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=special)
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unk, **tokens
    )
    wrapped.save_pretrained(folder)
    return folder


def with_tokenizer(folder, around):
    """Save a tokenizer of eight words."""
    vocabulary = {
        word: i
        for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS, "The", "year", "1936"])
    }
    return save_tokenizer(
        folder, vocabulary, around, "<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def read(folder, file, content, length):
    file.write_text(content)
    model = open_model(folder, torch.device("cpu"), length=length)
    return read_texts(file, model)


def test_every_window_starts_with_what_tokenizer_puts_first(tmp_path):
    folder = with_tokenizer(gpt2(tmp_path / "base"), "<s> $A")
    texts = read(folder, tmp_path / "x.txt", " ".join(WORDS), 4)
    assert [sequence.ids for sequence in texts.sequences] == [
        (1, 4, 5, 6),
        (1, 7, 8, 9),
    ]  # two words are left over
    assert all(sequence.labels == sequence.ids for sequence in texts.sequences)


def test_prompt_is_not_predicted_and_long_line_is_cut(tmp_path):
    folder = with_tokenizer(gpt2(tmp_path / "base"), "<s> $A")
    lines = '{"prompt": "the cat", "completion": "sat on"}\n{"text": "a mat and purred the cat"}\n'
    texts = read(folder, tmp_path / "x.jsonl", lines, 5)
    first, second = texts.sequences
    assert (first.ids, first.labels) == ((1, 4, 5, 6, 7), (-100, -100, -100, 6, 7))
    assert (second.ids, second.labels) == ((1, 8, 9, 10, 11), (-100, 8, 9, 10, 11))
    assert texts.notes == ("1 of 2 lines were cut to 5 tokens",)


def test_max_sequences_are_spread_over_file(tmp_path):
    file, words = tmp_path / "x.txt", [WORDS[i % 7 // 3] for i in range(21)]
    file.write_text(" ".join(words))
    model = open_model(with_tokenizer(gpt2(tmp_path / "base"), "$A"), torch.device("cpu"), length=3)
    whole = read_texts(file, model).sequences
    part = read_texts(file, model, max_sequences=3)
    assert (len(whole), part.sequences) == (7, (whole[0], whole[2], whole[4]))
    assert part.notes == ("3 of 7 sequences, evenly spaced, by --max-sequences",)


def test_classifier_keeps_both_ends_of_long_line(tmp_path):
    folder = with_tokenizer(bert(tmp_path / "base"), "<s> $A </s>")
    texts = read(
        folder, tmp_path / "x.jsonl", '{"text": "the cat sat on a mat", "label": "other"}\n', 5
    )
    assert texts.sequences[0].ids == (1, 4, 5, 6, 2)
    assert texts.sequences[0].labels == (2,)


@pytest.mark.parametrize("label", ["nobody", 3, -1, None, 1.5])
def test_unknown_label_is_named(tmp_path, label):
    import json

    line = json.dumps({"text": "the cat", "label": label})
    with pytest.raises(InputError, match=r"x\.jsonl: line 1"):
        read(bert(tmp_path / "base"), tmp_path / "x.jsonl", line, 5)


def test_non_utf8_text_is_refused(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"abc\xff")
    with pytest.raises(InputError, match=r"is not UTF-8 text \(byte 3\)"):
        read_texts(tmp_path / "x.txt", open_model(gpt2(tmp_path / "base"), torch.device("cpu")))
