"""Tokens of long captions: those of the whole caption, at a cost that does not depend on its length."""

import json
import pickle
import time

import numpy as np
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from tiny_shards import good_sample, picture, write_tar

from focalclip.config import DataConfig, TextTowerConfig
from focalclip.data.loader import TrainLoader
from focalclip.interop import open_clip as ours
from focalclip.models.text import MAX_CHARACTERS, create_tokenizer


def letters(count: int, seed: int = 0, low: int = ord("a"), high: int = ord("z") + 1) -> str:
    return "".join(map(chr, np.random.default_rng(seed).integers(low, high, count)))


def prose(characters: int, words: str = "the quick brown fox's jumps, over 12 lazy-dogs & cats!") -> str:
    return " ".join(np.random.default_rng(0).choice(words.split(), characters // 5))


CAPTIONS = {
    "letters": letters(1500),
    "capitals": letters(700, 1, ord("A"), ord("Z") + 1),
    "base64": letters(1200, 2, ord("/"), ord("z")),
    "chinese": letters(400, 3, 0x4E00, 0x9FFF),
    "thai": letters(600, 4, 0x0E01, 0x0E3A),
    "hangul": letters(400, 5, 0xAC00, 0xD7A0),
    "one-letter": "a" * 1501,
    "two-letters": "ab" * 701,
    "laughter": "haha" * 300 + "h",
    "emoji": "\U0001f602" * 401,
    "flags": "\U0001f1fa\U0001f1f8" * 201,
    "signs": "=" * 1003 + "!" * 501,
    "no-space-english": prose(3000).replace(" ", ""),
    "prose": prose(60_000),
    "prose-of-lines": prose(60_000).replace(" the ", "\n"),
    "spaces": "a" + " " * 40_000 + "dog" + "\n" * 40_000 + "cat",
    "controls": "a\x00\x01" * 20_000,
    "nested": f"a &{'amp;' * 200}lt; b &{'#38;amp;#x26;' * 30}eacute; " * 10,
    "nested-html": f"<b> a &{'amp;' * 20}lt; b &amp;amp;eacute; " * 400,
    "entities": "&lt;b&gt; &eacute;t&eacute; &amp;amp;amp;amp; " * 1000,
    "html": "<b>&eacute;t&eacute;</b> " * 2000,
    "mojibake": "cafÃ© â€œdÃ©jÃ vuâ€\x9d " * 2000,
    "numbers": "3.14159 " * 4000,
    "special": "<start_of_text> a <END_OF_TEXT> b " * 1000,
    "final-sigma": "ΟΔΥΣΣΕΥΣ " * 3000,
    "surrogate": "a \ud83d dog " * 3000,
    "wide": "".join(chr(0xFF21 + i % 26) + "\u3000" * (i % 5 == 0) for i in range(18_000)),
    "combining": "e\u0301" * 3000,
}


@pytest.mark.parametrize("length", [8, 77])
@pytest.mark.parametrize("case", CAPTIONS)
def test_tokens_of_long_captions_are_those_of_open_clip(case, length, both):
    mine, theirs = both[length]
    assert torch.equal(mine([CAPTIONS[case]]), theirs([CAPTIONS[case]]))


@pytest.fixture(scope="module")
def both():
    """Tokenizer and reference by context length."""
    config = {n: TextTowerConfig(context_length=n, width=32, heads=2, layers=1, causal=False) for n in (8, 77)}
    return {n: (create_tokenizer(config[n]), SimpleTokenizer(context_length=n)) for n in config}


@pytest.mark.parametrize(
    "caption",
    [letters(40_000), "a" * 40_001, "ab" * 20_001, prose(90_000).replace(" ", ""), letters(40_000, 3, 0x4E00, 0x9FFF)],
    ids=["letters", "one letter", "two letters", "english", "chinese"],
)
def test_cutting_a_long_caption_changes_nothing(caption, both, monkeypatch):
    """Not even of one word; whole words are merged as by open_clip, see below."""
    cut = both[77][0]([caption])
    monkeypatch.setattr("focalclip.models.text.MAX_CHARACTERS", len(caption))
    assert torch.equal(cut, both[77][0]([caption]))


def test_captions_of_printable_ascii_skip_the_cleaning_that_changes_nothing_in_them(both):
    """Twice: the second time every word is known."""
    signs = [chr(i) for i in range(32, 127)]
    rng = np.random.default_rng(0)
    captions = ["".join(rng.choice(signs, rng.integers(0, 90))) for _ in range(500)]
    captions += ["It's  A dog's LIFE", "AT&amp;T", "a\tb\r\nc", "\x1b[31mred", "<start_of_text>x<end_of_text>", ""]
    one, other = both[77]
    for _ in range(2):
        tokens = one(captions)
        assert torch.equal(tokens, other(captions)[:, : tokens.shape[1]])


def test_whole_words_are_merged_as_by_open_clip(both):
    """All tokens of a word, not only those within the context: random letters, and words made of tokens."""
    bpe = both[77][1]
    tokens = [token.removesuffix("</w>") for token in bpe.encoder][:40_000]
    generator = np.random.default_rng(0)
    for _ in range(100):
        word = "".join(generator.choice(tokens, 12))
        assert ours._merge(word, bpe.bpe_ranks) == bpe.bpe(word).split(" ")


def test_every_merge_comes_after_those_of_its_parts(both):
    """What the order of merges relies on."""
    ranks = both[77][1].bpe_ranks
    made: dict[str, int] = {}
    for pair, rank in ranks.items():
        assert all(made.get(part, -1) < rank for part in pair)
        assert made.setdefault("".join(pair), rank) == rank, "made in one way alone"


@pytest.mark.parametrize(
    "caption",
    [
        letters(64_000),
        letters(64_000, 0, 0x4E00, 0x9FFF),
        "a" * 5_000_000,
        "&" + "amp;" * 1_000_000,
        "&" + "#38;" * 1_000_000,
        "x " * 1_000_000,
    ],
    ids=["letters", "chinese", "one letter", "entities", "references", "words"],
)
def test_a_caption_costs_at_most_a_second_or_so(caption, both):
    begin = time.process_time()
    both[77][0]([caption])
    assert time.process_time() - begin < 3  # hours where the cost grows with the square


def test_cache_of_words_is_bounded(both, monkeypatch):
    monkeypatch.setattr(ours, "_CACHED_WORDS", 100)
    tokenizer = create_tokenizer(TextTowerConfig(context_length=77))
    captions = [" ".join(letters(6, seed) for seed in range(n, n + 40)) for n in range(0, 400, 40)]
    for caption in captions:
        assert torch.equal(tokenizer([caption]), both[77][1]([caption])[:, : tokenizer([caption]).shape[1]])
        assert len(tokenizer.tokenizer.cache) <= 200
    assert torch.equal(pickle.loads(pickle.dumps(tokenizer))(captions), tokenizer(captions))
    assert tokenizer([]).shape == (0, 77)


# Hugging Face


@pytest.fixture(scope="module", params=["wordpiece", "bpe", "unigram"])
def hugging_face(request, tmp_path_factory):
    """A folder with a small tokenizer of each kind, trained on the spot, and a BERT of its vocabulary."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    kinds = {
        "wordpiece": (tokenizers.models.WordPiece(unk_token="[UNK]"), tokenizers.trainers.WordPieceTrainer),
        "bpe": (tokenizers.models.BPE(), tokenizers.trainers.BpeTrainer),
        "unigram": (tokenizers.models.Unigram(), tokenizers.trainers.UnigramTrainer),
    }
    model, trainer = kinds[request.param]
    tokenizer = tokenizers.Tokenizer(model)
    if request.param == "wordpiece":
        tokenizer.normalizer = tokenizers.normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    elif request.param == "bpe":
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    else:
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    options = {"unk_token": "[UNK]"} if request.param == "unigram" else {}
    texts = [prose(2000), letters(2000), letters(300, 1, 0x4E00, 0x4EFF)]
    tokenizer.train_from_iterator(texts, trainer(vocab_size=600, special_tokens=special, **options))
    folder = tmp_path_factory.mktemp(request.param)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    fast.save_pretrained(folder)
    bert = transformers.BertConfig(vocab_size=len(fast), hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    (folder / "config.json").write_text(json.dumps(bert.to_dict()))
    return create_tokenizer(TextTowerConfig(name=f"transformers:{folder}", context_length=16))


@pytest.mark.parametrize("case", [case for case in CAPTIONS if case != "surrogate"])
def test_tokens_of_long_captions_are_those_of_the_whole_one(hugging_face, case):
    caption = CAPTIONS[case] * (1 + MAX_CHARACTERS // len(CAPTIONS[case]))
    whole = hugging_face.tokenizer([caption], padding="max_length", truncation=True, max_length=16, return_tensors="pt")
    assert torch.equal(hugging_face([caption]), whole["input_ids"])


def test_a_lone_surrogate_is_the_fault_of_its_sample(hugging_face, tmp_path):
    """transformers refuses it with an error that speaks of types."""
    members = [m for number in range(7) for m in good_sample(number)]
    members += [("bad.png", picture(0)), ("bad.json", b'{"caption": "a \\ud83d dog"}')]
    shard = write_tar(tmp_path / "a.tar", members)
    batch = next(iter(TrainLoader([shard], DataConfig(batch_size=8, workers=0), 16, hugging_face, seed=0)))
    (fault,) = batch.faults
    assert fault.startswith("a.tar: bad: caption cannot be tokenised (")
    assert batch.tokens.shape == (8, 16)
