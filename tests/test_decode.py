"""Decoding in a batch, on a cache, against a loop that reads one row over again for every step."""
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import lab.evaluate
from conftest import VOCAB, close, random_batch, rows, tiny
from data import Problems
from decode import Decoded, Reader, decode, latents_prompt, question_prompt
from encoder import Parts, alpha_and_latent, pad, superpose
from lab.ablations import hidden_latent
from lab.evaluate import continuation_prompt, evaluate, gold_prompt
from test_encoder import embed, positions, summaries


def decode_one(llm, x, pos=None, c=0, top_k=0, max_latents=0, max_tokens=64,
               latent=alpha_and_latent):
    """One prompt x (T, C), no cache: (ids written, latent steps, was a cap met).

    pos: its positions, a list; by default 0, 1, …
    """
    written, latents, capped, block = [], 0, False, llm.config.block_size
    pos = list(pos or range(len(x)))
    while True:
        hidden = llm(x[None], torch.tensor([pos]))[0, -1]
        token = int(llm.head(hidden).argmax())
        if c and token != VOCAB.eot and (latents == max_latents or pos[-1] + c >= block):
            token = VOCAB.eot
            capped = True
        c = 0 if token == VOCAB.eot else c
        if c:
            latents += 1
            _, fed = latent(llm, hidden, llm.wte.weight, VOCAB.n_ordinary, top_k)
        else:
            written.append(token)
            if token == VOCAB.eos:
                return written[:-1], latents, capped
            if len(written) == max_tokens or pos[-1] + 1 >= block:
                return written, latents, True
            fed = llm.wte.weight[token]
        pos.append(pos[-1] + (c or 1))
        x = torch.cat([x, fed[None].to(x.dtype)])


def result(out, row):
    return out.tokens[row], int(out.latents[row]), bool(out.capped[row])


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
    dict(c=2, max_latents=30, latent=hidden_latent),
    dict(c=4, max_latents=4, max_tokens=4),
    dict(c=2, max_latents=0),
    dict(c=3, max_latents=200),
    dict(c=1, max_latents=10 ** 9, max_tokens=10 ** 9),  # no memory holds a cache of so many
], ids=lambda how: " ".join(f"{key}={getattr(value, '__name__', value)}"
                           for key, value in how.items()) or "text")
def test_batched_and_cached_equals_one_by_one(how):
    """Rows stop by themselves, meet a cap, or run out of positions, each at its own step.

    Nothing is encoded again: after the prompts a row is fed one vector at a time.
    """
    caps = set()
    for seed in 2, 3:
        llm, x, pos, length = speaker(seed)
        fed = []
        hook = llm.register_forward_pre_hook(lambda _, args: fed.append(args[0].size(1)))
        out = decode(llm, VOCAB, x, pos, length, **how)
        hook.remove()
        assert fed[0] == x.size(1) and set(fed[1:]) == {1}
        for b, n in enumerate(length):
            expected = decode_one(llm, x[b, :n], **how)
            alone = decode(llm, VOCAB, x[[b], :n], pos[[b], :n], length[[b]], **how)
            for found, row in (out, b), (alone, 0):
                assert result(found, row) == expected
            caps.add(expected[2])
    assert caps == {False, True}  # both kinds of ending were there to compare


@pytest.mark.parametrize("c", [2, 6])
def test_latent_steps_can_be_watched(c):
    """As long as some row takes one. With c = 6 rows run out of positions while they think."""
    llm, x, pos, length = speaker(3)
    seen = torch.zeros(8, dtype=torch.int64)
    steps = []

    def on_latent(step, q, z, active):
        assert q.shape == (8, VOCAB.n_ordinary) and active.any()
        close(q.sum(1), torch.ones(8), 1e-5)
        close(z, superpose(q, llm.wte.weight.float()), 1e-5)
        steps.append(step)
        seen.add_(active)

    out = decode(llm, VOCAB, x, pos, length, c=c, max_latents=30, on_latent=on_latent)
    assert torch.equal(seen, out.latents) and len(set(seen.tolist())) > 1
    assert steps == list(range(max(seen)))
    assert c == 2 or (length + c * (out.latents + 1) > 40).any()


def test_what_a_row_is_fed_while_it_waits_is_invisible(monkeypatch):
    """Whatever it is, at whatever position; and the row goes on from where it was."""
    def feed_more(reader, x, pos, active):
        x = torch.where(active[:, None], x, 100 * torch.randn_like(x))
        feed(reader, x, torch.where(active, pos, torch.randint(40, pos.shape)), active)
        fed.append(active)

    llm, *prompt = speaker(3)
    expected = decode(llm, VOCAB, *prompt, c=2, max_latents=30)
    feed, fed = Reader.feed, []
    monkeypatch.setattr(Reader, "feed", feed_more)
    out = decode(llm, VOCAB, *prompt, c=2, max_latents=30)
    assert all(result(out, row) == result(expected, row) for row in range(8))
    assert (torch.stack(fed).int().diff(dim=0) == 1).any()  # some wait, and then write


@pytest.mark.parametrize("c", [0, 2])
def test_a_prompt_may_fill_the_model(c):
    llm = tiny(2, block_size=5)
    x, at = embed(llm, [3, 1, 4, 1, VOCAB.bot]), torch.arange(5)
    out = decode(llm, VOCAB, x[None], at[None], torch.tensor([5]), c=c, max_latents=9)
    assert result(out, 0) == decode_one(llm, x, c=c, max_latents=9)


def test_a_q_that_is_returned_is_fed_in_place_of_the_models_own():
    """Fed a token's q it writes as if that token had been there, at the place of a latent."""
    llm, x, pos, length = speaker(3)
    one_hot = torch.eye(VOCAB.n_ordinary)[5].expand(len(x), -1)
    forced = decode(llm, VOCAB, x, pos, length, c=2, max_latents=1,
                    on_latent=lambda step, q, z, active: one_hot)
    cut = (forced.latents == 1) & forced.capped
    assert cut.any()
    for b in cut.nonzero()[:, 0].tolist():
        prompt = torch.cat([x[b, :length[b]], embed(llm, [5, VOCAB.eot])])
        at = positions(int(length[b]), 1, 2, 1)
        assert forced.tokens[b] == [VOCAB.eot] + decode_one(llm, prompt, at, max_tokens=63)[0]


# ------------------------------------------------------------------------------------------ prompts

@pytest.mark.parametrize("kind", ["question", "gold", "continuation"])
@pytest.mark.parametrize("c", [1, 2, 4])
@pytest.mark.parametrize("block_size", [22, 40])  # at 22 padding goes beyond the last position
def test_prompts_and_what_is_written_after_them(kind, c, block_size):
    """X <bot>; then all summaries and <eot>; or k of them, k = 0 … n in turn over the problems."""
    encoder, llm = tiny(0, block_size), tiny(1, block_size)
    batch = random_batch([5, 0, 8, 1, 8, 3], question_lengths=[3, 5, 7, 2, 4, 3])
    env = SimpleNamespace(tokenizer=VOCAB, device="cpu", parts=Parts())
    if kind == "question":
        x, pos, length = question_prompt(llm, batch)
    else:
        prompt_of = {"gold": gold_prompt, "continuation": continuation_prompt}[kind]
        x, pos, length = prompt_of(batch, llm, encoder, env, c)
    out = decode(llm, VOCAB, x, pos, length, max_tokens=10)
    assert x.size(1) == length.max()
    for b, (X, S, _) in enumerate(rows(batch, c)):
        k = {"question": 0, "gold": len(S), "continuation": b % (len(S) + 1)}[kind]
        end = [VOCAB.eot] if kind == "gold" else []
        z = [superpose(alpha.float(), llm.wte.weight)[None] for alpha in summaries(encoder, X, S)]
        prompt = torch.cat([embed(llm, X), *z[:k], embed(llm, end)])
        at = positions(len(X), k, c, len(end))
        close(x[b, :length[b]], prompt.double(), 1e-6)  # α is float32
        assert pos[b, :length[b]].tolist() == at
        assert result(out, b) == decode_one(llm, prompt, at, max_tokens=10)


@pytest.mark.parametrize("c", [1, 2])
def test_a_chain_is_cut_where_the_model_ends(c):
    """What is left of it leaves room for <eot>."""
    llm = tiny(1, block_size=10)
    batch = random_batch([0, 0], question_lengths=[3, 7])
    z = torch.randn(2, 9, 16, dtype=torch.float64)
    x, pos, length = latents_prompt(llm, batch, z, [9, 9], c, [VOCAB.eot])
    for b, (X, _, _) in enumerate(rows(batch, 1)):
        k = (9 - len(X)) // c
        expected = [embed(llm, X), z[b, :k], embed(llm, [VOCAB.eot])]
        assert torch.equal(x[b, :length[b]], torch.cat(expected))
        assert pos[b, :length[b]].tolist() == positions(len(X), k, c, 1)


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
    watched = []

    def canned(llm, tokenizer, x, pos, length, on_latent, **options):
        assert options == dict(c=c, top_k=3, max_latents=8, max_tokens=9, latent="latent")
        on_latent("step")
        tokens = []
        for question, n in zip(x.tolist(), length.tolist()):
            before, eot, after = WRITTEN[t.decode(question[:n - 1])][0].partition("<eot>")
            tokens.append(t.encode(before) + [t.eot] * bool(eot) + t.encode(after))
        return Decoded(tokens, length, length > 7)

    def prompt(batch):
        questions = [p.question for p in batch.problems]
        length = torch.tensor([len(question) for question in questions])
        return pad(questions, int(length.max())), None, length

    monkeypatch.setattr(lab.evaluate, "decode", canned)
    env = SimpleNamespace(tokenizer=t, device="cpu", autocast=nullcontext,
                          parts=Parts(latent="latent"))
    score = partial(evaluate, None, problems, env, (8, 9), prompt, top_k=3, batch_size=batch_size,
                    on_latent=lambda batch, step: watched.extend(batch.rows.tolist()))
    lengths = [len(t.encode(question)) + 1 for question in WRITTEN]
    for c, steps in (0, [before for _, _, before in WRITTEN.values()]), (2, lengths):
        found = score(c=c)
        assert found["accuracy"] == 2 / 5 and found["unparseable"] == 2
        assert found["capped"] == sum(n > 7 for n in lengths) > 0
        assert found["steps"] == sum(steps) / 5
        for row, (text, right, _) in enumerate(WRITTEN.values()):
            assert found["answers"][row][:2] == (text, right)
            assert t.decode(found["answers"][row][2]) == text
    assert sorted(watched) == sorted([*range(5)] * 2)
    few = score(c=c, limit=2)
    assert sorted(few["answers"]) == [0, 1] and few["accuracy"] == 1 / 2
