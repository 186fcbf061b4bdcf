"""A pruned vocabulary: the same tokens for the texts it is pruned to, no loss for any other."""
import random

import tiktoken

from data import Tokenizer
from lab.sources import load_problems
from lab.vocabulary import gpt2_vocabulary, prune_ranks, unions, vocabulary_texts

TEXTS = ["Ida has 14 pens, and Bo's aunt buys 3 boxes of 6.", "<<3*6=18>> <<14+18=32>>", "#### 32"]
OTHERS = ["", " ", "naïve café: 12½ €, 汉字 🙂", "zebras  &\n\tquaggas", "e\u0301\u200b\x00",
          "<|endoftext|>", "".join(map(chr, range(32, 400))), "0123456789" * 9]


def encoding_of(ranks, pattern):
    return tiktoken.Encoding("test", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def check(ranks, pattern, texts, others):
    """Prune, and compare with the whole vocabulary; the pruned ranks."""
    kept = prune_ranks(ranks, pattern, texts)
    whole, pruned = encoding_of(ranks, pattern), encoding_of(kept, pattern)
    assert list(kept.values()) == list(range(len(kept)))
    assert {bytes([b]) for b in range(256)} <= kept.keys() <= ranks.keys()
    ids = [ranks[token] for token in kept]
    assert ids == sorted(ids)  # the order of rank stays
    for text in texts:
        assert [ids[i] for i in pruned.encode_ordinary(text)] == whole.encode_ordinary(text)
    assert all(pruned.decode(pruned.encode_ordinary(text)) == text for text in others)
    return kept


def test_pruned_gpt2(gpt2_tokenizer):
    pattern, ranks = gpt2_vocabulary()
    kept = check(ranks, pattern, TEXTS, OTHERS)
    assert 256 < len(kept) < 400 and b" boxes" in kept and b" quagga" not in kept
    assert prune_ranks(kept, pattern, TEXTS) == kept
    assert len(prune_ranks(ranks, pattern, [])) == 256


def test_any_vocabulary_of_merges():
    """Random merges of three letters: words in which a union often could have been another."""
    rng = random.Random(0)
    for _ in range(50):
        tokens = [bytes([b]) for b in range(256)]
        letters = [b"a", b"b", b"c"]
        while len(tokens) < 286:
            union = b"".join(rng.choices(letters, k=2))
            if union not in tokens:
                tokens.append(union)
                letters.append(union)
        words = ["".join(rng.choices("abc", k=rng.randint(1, 30))) for _ in range(20)]
        check({token: rank for rank, token in enumerate(tokens)}, r"\w+|\W", words[:5], words)


def test_unions_are_those_on_the_way():
    ranks = {token: rank for rank, token in enumerate([b"a", b"b", b"c", b"bc", b"ab", b"abc"])}
    assert unions(b"abc", ranks) == {b"bc", b"abc"}  # bc comes before ab
    assert unions(b"a", ranks) == {b"a"}


def test_a_pruned_tokenizer_is_named_after_what_it_kept(gpt2_tokenizer):
    others = [text.replace("14", "15") for text in TEXTS]
    one, again, other = (Tokenizer("gpt2", texts) for texts in (TEXTS, TEXTS[::-1], others))
    assert one.name == again.name != other.name and one.n_ordinary == other.n_ordinary
    assert one.name.startswith(f"gpt2-{one.n_ordinary}-")
    assert gpt2_tokenizer.name == "gpt2" and gpt2_tokenizer.n_ordinary == 50256
    for text in TEXTS + OTHERS:
        ids = one.encode(text)
        assert one.decode(ids) == text and all(0 <= i < one.n_ordinary for i in ids)
        assert ids == again.encode(text)
    assert [one.eos, one.bot, one.eot, one.sum] == list(range(one.n_ordinary, one.n_ordinary + 4))
    assert one.n_vocab % 64 == 0 and one.n_ordinary + 4 <= one.n_vocab < one.n_ordinary + 4 + 64


def test_pruned_to_gsm8k(gsm8k, gpt2_tokenizer):
    pattern, ranks = gpt2_vocabulary()
    texts = vocabulary_texts(load_problems("gsm8k", "train", gsm8k, "text"))
    test = vocabulary_texts(load_problems("gsm8k", "test", gsm8k, "text"))
    kept = check(ranks, pattern, texts, test)
    assert 17000 < len(kept) < 18000
    whole, pruned = encoding_of(ranks, pattern), encoding_of(kept, pattern)
    length = sum(len(whole.encode_ordinary(text)) for text in test)
    assert length < sum(len(pruned.encode_ordinary(text)) for text in test) < 1.02 * length
