"""Decoding in a batch, on a cache, against a loop that reads one row over again for every step."""
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import decode as decoding
from conftest import VOCAB, random_batch, rows, tiny
from data import Problems
from decode import (Decoded, continuation_prompt, decode, evaluate, gold_prompt, latents_prompt,
                    question_prompt)
from encoder import ordinary_softmax, pad, superpose
from test_encoder import embed, positions, summaries


def decode_one(llm, x, pos=None, c=0, top_k=0, max_latents=0, max_tokens=64):
    """One prompt x (T, C), no cache: (ids written, latent steps, was a cap met).

    pos: its positions, a list; by default 0, 1, …
    """
    written, latents, capped = [], 0, False
    pos = list(pos or range(len(x)))
    while True:
        logits = llm.head(llm(x[None], torch.tensor([pos])))[0, -1]
        token = int(logits.argmax())
        if c and token != VOCAB.eot and latents == max_latents:
            token = VOCAB.eot
            capped = True
        c = 0 if token == VOCAB.eot else c
        if not c:
            written.append(token)
            if token == VOCAB.eos:
                return written[:-1], latents, capped
        pos.append(pos[-1] + (c or 1))
        if len(written) == max_tokens or pos[-1] >= llm.config.block_size:
            return written, latents, True
        if c:
            latents += 1
            alpha = ordinary_softmax(logits, VOCAB.n_ordinary)
            fed = superpose(alpha, llm.wte.weight, top_k)
        else:
            fed = llm.wte.weight[token]
        x = torch.cat([x, fed[None].to(x.dtype)])


def speaker(seed, B=8):
    """A model whose rows stop early, late or never, and prompts for it, as `decode` takes them.

    Past a row's end stands garbage.
    """
    llm = tiny(seed, block_size=40)
    llm.wpe.weight.mul_(4)  # so that it does not say one thing for ever
    questions = [question for question, _, _ in random_batch([0] * B, seed).problems]
    length = torch.tensor([len(question) for question in questions])
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB.n_ordinary, (B, int(length.max())), generator=g)  # (B, T)
    for row, question in zip(ids, questions):
        row[:len(question)] = torch.tensor(question)
    return llm, llm.wte(ids), torch.arange(ids.size(1)).expand(B, -1), length


@pytest.mark.parametrize("how", [
    dict(),
    dict(max_tokens=3),
    dict(c=1, max_latents=30),
    dict(c=2, max_latents=30),
    dict(c=2, max_latents=30, top_k=3),
    dict(c=4, max_latents=4, max_tokens=4),
    dict(c=2, max_latents=0),
    dict(c=3, max_latents=200),
], ids=str)
def test_batched_and_cached_equals_one_by_one(how):
    """Rows stop by themselves, meet a cap, or run out of positions, each at its own step."""
    caps = set()
    for seed in (0, 2, 3, 7):
        llm, x, pos, length = speaker(seed)
        out = decode(llm, VOCAB, x, pos, length, **how)
        for b, n in enumerate(length):
            expected = decode_one(llm, x[b, :n], **how)
            assert (out.tokens[b], int(out.latents[b]), bool(out.capped[b])) == expected
            caps.add(expected[2])
    assert caps == {False, True}  # both kinds of ending were there to compare


def test_question_prompts_are_the_questions():
    llm = tiny(1)
    batch = random_batch([5, 0, 8, 1])
    x, pos, length = question_prompt(llm, batch, SimpleNamespace(device="cpu"))
    for b, (X, _, _) in enumerate(rows(batch, 1)):
        assert torch.equal(x[b, :length[b]], embed(llm, X))
    assert x.size(1) == length.max()


@pytest.mark.parametrize("c", [1, 2, 4])
@pytest.mark.parametrize("top_k", [0, 3])
@pytest.mark.parametrize("block_size", [22, 40])  # at 22 padding goes beyond the last position
def test_gold_prompts_are_the_summaries_of_the_chain(c, top_k, block_size):
    encoder = tiny(0, block_size)
    llm = tiny(1, block_size)
    batch = random_batch([5, 0, 8, 1], question_lengths=[3, 5, 7, 2])
    env = SimpleNamespace(tokenizer=VOCAB, device="cpu")
    x, pos, length = gold_prompt(llm, encoder, batch, env, c, top_k)
    out = decode(llm, VOCAB, x, pos, length, max_tokens=10)
    for b, (X, S, _) in enumerate(rows(batch, c)):
        z = [superpose(alpha.float(), llm.wte.weight, top_k)[None]
             for alpha in summaries(encoder, X, S)]
        prompt = torch.cat([embed(llm, X), *z, embed(llm, [VOCAB.eot])])
        torch.testing.assert_close(x[b, :length[b]], prompt, rtol=0, atol=1e-6)  # α is float32
        expected = decode_one(llm, prompt, positions(len(X), len(z), c, 1), max_tokens=10)
        assert (out.tokens[b], 0, bool(out.capped[b])) == expected


@pytest.mark.parametrize("c", [1, 2, 4])
def test_continuation_prompts_end_after_k_summaries(c):
    """k = 0 … n in turn over the problems, and no <eot>: the model goes on by itself."""
    encoder, llm = tiny(0), tiny(1)
    batch = random_batch([5, 0, 8, 1, 8, 8, 3])
    env = SimpleNamespace(tokenizer=VOCAB, device="cpu")
    x, pos, length = continuation_prompt(llm, encoder, batch, env, c, 0)
    for b, (X, S, _) in enumerate(rows(batch, c)):
        k = b % (len(S) + 1)
        z = [superpose(alpha.float(), llm.wte.weight)[None] for alpha in summaries(encoder, X, S)]
        prompt = torch.cat([embed(llm, X), *z[:k]])
        torch.testing.assert_close(x[b, :length[b]], prompt, rtol=0, atol=1e-6)
        assert pos[b, :length[b]].tolist() == positions(len(X), k, c, 0)


@pytest.mark.parametrize("c", [1, 2])
def test_a_chain_is_cut_where_the_model_ends(c):
    """What is left of it leaves room for <eot>."""
    llm = tiny(1, block_size=10)
    batch = random_batch([0, 0], question_lengths=[3, 7])
    z = torch.randn(2, 9, 16, dtype=torch.float64)
    x, pos, length = latents_prompt(llm, batch, z, [9, 9], c, [VOCAB.eot], "cpu")
    for b, (X, _, _) in enumerate(rows(batch, 1)):
        k = (9 - len(X)) // c
        expected = [embed(llm, X), z[b, :k], embed(llm, [VOCAB.eot])]
        assert torch.equal(x[b, :length[b]], torch.cat(expected))
        assert pos[b, :length[b]].tolist() == positions(len(X), k, c, 1)


def test_a_q_that_is_returned_is_fed_in_place_of_the_models_own():
    """Fed its own q it decodes as before; fed a token's, as if that token had been written."""
    llm, x, pos, length = speaker(3)
    own = decode(llm, VOCAB, x, pos, length, c=2, max_latents=6)
    same = decode(llm, VOCAB, x, pos, length, c=2, max_latents=6,
                  on_latent=lambda step, q, z, rows: q)
    assert same.tokens == own.tokens
    one_hot = torch.eye(VOCAB.n_ordinary)[5].expand(len(x), -1)
    forced = decode(llm, VOCAB, x, pos, length, c=2, max_latents=1,
                    on_latent=lambda step, q, z, rows: one_hot)
    for b in (forced.latents == 1).nonzero()[:, 0].tolist():
        prompt = torch.cat([x[b, :length[b]], embed(llm, [5, VOCAB.eot])])
        at = positions(int(length[b]), 1, 2, 1)
        if forced.capped[b]:
            assert forced.tokens[b][1:] == decode_one(llm, prompt, at, max_tokens=63)[0]
    assert (forced.latents == 1).any()


@pytest.mark.parametrize("c", [2, 6])
def test_latent_steps_can_be_watched(c):
    """As long as some row takes one. With c = 6 rows run out of positions while they think."""
    llm, x, pos, length = speaker(3)
    seen = torch.zeros(8, dtype=torch.int64)
    steps = []

    def on_latent(step, q, z, rows):
        assert step == len(steps) and q.shape == (8, VOCAB.n_ordinary) and rows.any()
        torch.testing.assert_close(q.sum(1), torch.ones(8))
        torch.testing.assert_close(z, superpose(q, llm.wte.weight.float()))
        steps.append(step)
        seen.add_(rows)

    out = decode(llm, VOCAB, x, pos, length, c=c, max_latents=30, on_latent=on_latent)
    assert torch.equal(seen, out.latents)
    assert c == 2 or any(not text for text in out.tokens)
    assert len(set(seen.tolist())) > 1


def test_decoding_encodes_nothing_again():
    """The prompt once, then one vector a row and step."""
    llm, x, pos, length = speaker(0)
    fed = []
    llm.register_forward_pre_hook(lambda module, args: fed.append(args[0].size(1)))
    decode(llm, VOCAB, x, pos, length, c=2, max_latents=5, max_tokens=9)
    assert fed == [x.size(1)] + [1] * (5 + 9 - 1)


# --------------------------------------------------------------------------------- scoring a split

WRITTEN = {  # what the canned model says to each question; right, tokens before <eot>
    "1 + 500?": ("<eot>#### 1.2.3", False, 0),
    "1 + 1?": ("7<eot>#### 2", True, 1),
    "1 + 20 + 300?": ("<eot>#### 32", False, 0),
    "1 + 3?": ("77 8", True, 3),  # no <eot>: all of it is thought
    "1 + 40?": ("<eot>#### many", False, 0),
}
ANSWERS = ["501", "2", "321", "8", "41"]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_a_split_is_scored(monkeypatch, toy_tokenizer, batch_size):
    """Each row by its own answer, whatever the order of the batches; counts and means over all."""
    t = toy_tokenizer
    problems = Problems([{"question": question, "chain": "12 34 56", "answer": answer}
                         for question, answer in zip(WRITTEN, ANSWERS)], t, block_size=64)

    def canned(llm, tokenizer, x, pos, length, c, top_k, max_latents, max_tokens, on_latent):
        tokens, latents = [], []
        for question, n in zip(x.tolist(), length.tolist()):
            text = WRITTEN[t.decode(question[:n - 1])][0]
            before, eot, after = text.partition("<eot>")
            tokens.append(t.encode(before) + [t.eot] * bool(eot) + t.encode(after))
            latents.append(n)
        return Decoded(tokens, torch.tensor(latents), torch.tensor(latents) > 7)

    def prompt(batch):
        questions = [p.question for p in batch.problems]
        length = torch.tensor([len(question) for question in questions])
        return pad(questions, int(length.max())), None, length

    monkeypatch.setattr(decoding, "decode", canned)
    env = SimpleNamespace(tokenizer=t, device="cpu", autocast=nullcontext)
    lengths = [len(t.encode(question)) + 1 for question in WRITTEN]
    steps = {
        "text": [before for _, _, before in WRITTEN.values()],
        "latent": lengths,
        "gold": [-(-len(t.encode("12 34 56")) // 2)] * 5,
    }
    for thought in steps:
        found = evaluate(None, problems, env, thought, (9, 9), chunk_size=2,
                         batch_size=batch_size, prompt=prompt)
        assert found["accuracy"] == 2 / 5 and found["unparseable"] == 2
        assert found["capped"] == sum(n > 7 for n in lengths) > 0
        assert found["steps"] == sum(steps[thought]) / 5
        for row, (text, right, _) in enumerate(WRITTEN.values()):
            assert found["answers"][row][:2] == (text, right)
    few = evaluate(None, problems, env, "text", (9, 9), limit=2, batch_size=1, prompt=prompt)
    assert sorted(few["answers"]) == [0, 1] and few["accuracy"] == 1 / 2
