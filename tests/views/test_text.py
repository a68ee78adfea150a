import json
import pickle

import numpy as np
import pytest
import torch

from mvpretrain.views.text import BEGIN, END, TextConfig

CAPTIONS = {"meta": {"captions": ["a dog", "a brown dog", "an animal"]}, "caption": "one cat", "size": 3}


def decode_bytes(ids: list[int]) -> str:
    """The text of the bytes tokenizer's ids; a character cut in the middle is left out."""
    return bytes(i - 1 for i in ids if 0 < i < BEGIN).decode("utf-8", errors="ignore")


def tokens(item) -> list[int]:
    """The ids under the mask, which must be a prefix."""
    count = int(item.mask.sum())
    assert item.mask[:count].all() and item.data.dtype == torch.int64
    return item.data[:count].tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A word-level tokenizer as transformers saves one."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {w: i for i, w in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "dog", "cat"])}
    raw = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore
    raw.post_processor = processors.TemplateProcessing(  # pyright: ignore
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    path = tmp_path_factory.mktemp("tokenizer")
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=raw, **special).save_pretrained(path)
    return path


@pytest.mark.parametrize("text", ["plain", "Grüße, 世界 🌍", "x" * 30])
def test_bytes_come_back(text):
    item = TextConfig(length=40).build(train=False)(text.encode())
    ids = tokens(item)
    assert ids[0] == BEGIN and ids[-1] == END == item.data.max()
    assert decode_bytes(ids) == text and item.data.shape == (40,) and not item.data[len(ids) :].any()
    assert all(i == b + 1 for i, b in zip(ids[1:-1], text.encode()))


def test_long_text_keeps_its_end_and_drops_a_cut_character():
    item = TextConfig(length=6).build(train=False)("abc世界")
    assert tokens(item)[-1] == END and len(tokens(item)) == 6
    assert decode_bytes(tokens(item)) == "abc"


def test_openclip_tokens_are_open_clips_own():
    import open_clip

    reference = open_clip.get_tokenizer("ViT-B-32")
    transform = TextConfig(tokenizer="openclip:ViT-B-32", length=12).build(train=False)
    for text in ["a photo of a dog", "Wow!! <end_of_text> again", "word " * 40]:
        item = transform(text)
        assert torch.equal(item.data, reference([text], context_length=12)[0])
        assert tokens(item)[-1] == 49407 and len(tokens(item)) <= 12
    assert tokens(transform("!"))[1:-1] == [256]
    assert TextConfig(tokenizer="openclip:ViT-B-32").vocabulary() == 49408


@pytest.mark.parametrize("model", ["ViT-B-16-SigLIP", "roberta-ViT-B-32"])
def test_openclip_tokenizers_of_a_hub_are_refused(model):
    with pytest.raises(ValueError, match="is on a hub and nothing is downloaded"):
        TextConfig(tokenizer=f"openclip:{model}").build(train=False)


def test_huggingface_folder(folder):
    config = TextConfig(tokenizer=f"huggingface:{folder}", length=6)
    transform = config.build(train=False)
    assert tokens(transform("a dog")) == [1, 4, 5, 2] and transform("a dog").data.tolist() == [1, 4, 5, 2, 0, 0]
    assert tokens(transform("a cat a cat a cat a cat")) == [1, 4, 6, 4, 6, 2]
    assert config.vocabulary() == 7


def test_a_portable_tokenizer_outlives_its_folder(folder, tmp_path):
    config = TextConfig(tokenizer=f"huggingface:{folder}", length=6)
    (moved := tmp_path / "export").mkdir()
    portable = config.portable(moved)
    assert portable.tokenizer.startswith(f"huggingface:{moved}") and portable.portable(tmp_path / "again") != portable
    assert torch.equal(portable.build(False)("a dog").data, config.build(False)("a dog").data)
    assert TextConfig().portable(moved) == TextConfig()


@pytest.mark.parametrize(
    ("settings", "first", "all_of_them"),
    [
        ({"key": "caption"}, "one cat", {"one cat"}),
        ({"key": "meta.captions"}, "a dog", {"a dog", "a brown dog", "an animal"}),
        ({"key": "meta.captions.1"}, "a brown dog", {"a brown dog"}),
    ],
)
def test_a_key_picks_and_of_several_texts_training_draws(settings, first, all_of_them):
    config = TextConfig.model_validate({"field": "json", **settings})
    for raw in (CAPTIONS, json.dumps(CAPTIONS), json.dumps(CAPTIONS).encode()):
        assert decode_bytes(tokens(config.build(train=False)(raw))) == first
    torch.manual_seed(0)
    train = config.build(train=True)
    assert {decode_bytes(tokens(train(CAPTIONS))) for _ in range(40)} == all_of_them


def test_lines_are_several_texts_and_the_seed_decides():
    raw = b"first\n\n second \r\nthird\n"
    assert decode_bytes(tokens(TextConfig(lines=True).build(train=False)(raw))) == "first"
    train = TextConfig(lines=True).build(train=True)
    drawn = [[(torch.manual_seed(s), decode_bytes(tokens(train(raw))))[1] for s in range(20)] for _ in range(2)]
    assert drawn[0] == drawn[1] and set(drawn[0]) == {"first", "second", "third"}
    assert decode_bytes(tokens(TextConfig().build(train=False)(raw))).startswith("first\n\n second")


@pytest.mark.parametrize(
    ("settings", "raw", "says"),
    [
        ({}, b"\xff\xfe", "not UTF-8"),
        ({}, b"", "text is empty"),
        ({}, b" \n\t", "text is empty"),
        ({"lines": True}, b"\n\n", "text is empty"),
        ({}, 7, "got 7"),
        ({"key": "caption"}, b"no json", "picks from JSON"),
        ({"key": "captoin"}, CAPTIONS, "did you mean 'caption'"),
        ({"key": "meta.captions.9"}, CAPTIONS, "a list"),
        ({"key": "size"}, CAPTIONS, "got 3"),
        ({"key": "none"}, {"none": None}, "got None"),
        ({"key": "empty"}, {"empty": []}, "text is empty"),
    ],
)
def test_bad_text_is_refused_with_the_reason(settings, raw, says):
    with pytest.raises(ValueError, match=says):
        TextConfig.model_validate(settings).build(train=False)(raw)


def test_bad_tokenizers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="known: bytes, openclip:MODEL, huggingface:FOLDER"):
        TextConfig(tokenizer="byte")
    with pytest.raises(ValueError, match="did you mean 'ViT-B-32'"):
        TextConfig(tokenizer="openclip:ViT-B32").build(train=False)
    with pytest.raises(ValueError, match="no such folder"):
        TextConfig(tokenizer="huggingface:bert-base-uncased").build(train=False)
    with pytest.raises(ValueError, match="holds no tokenizer"):
        TextConfig(tokenizer=f"huggingface:{tmp_path}").build(train=False)


def test_blank_and_pickling(folder):
    for tokenizer in ("bytes", "openclip:ViT-B-32", f"huggingface:{folder}"):
        transform = TextConfig(tokenizer=tokenizer, length=9).build(train=True)
        blank = transform.blank()
        assert blank.data.tolist() == [0] * 9 and blank.mask is not None and blank.mask.tolist() == [True] + 8 * [False]
        copy = pickle.loads(pickle.dumps(transform))
        assert torch.equal(copy("a dog").data, transform("a dog").data)


def test_sketches_tell_the_quantised_latent():
    config = TextConfig(field="json", key="a.0.b")
    latent = np.array([-2.0, -0.5, 0.0, 0.5, 2.0])
    assert TextConfig().sketch(latent) == "ba de fi go hu"
    assert decode_bytes(tokens(config.build(False)(config.sketch(latent)))) == "ba de fi go hu"
    assert len(set(str(TextConfig().sketch(np.zeros(40))).split())) == 40
