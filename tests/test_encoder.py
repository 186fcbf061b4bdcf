"""One pass in place of many: layouts and masks against the plain loops; superposition itself."""
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import VOCAB, close, random_batch, rows, tiny
from encoder import (alpha_and_latent, chain_batch, chain_layout, chunk_tokens, count_chunks,
                     draw_continuations, encoder_batch, encoder_layout, induction_mask,
                     insert_latents, latent_batch, ordinary_softmax, summary_states, sup_batch,
                     sup_layout, superpose, superpose_sparse, supervision_mask, text_batch,
                     top_k_renormalized)

SIZES = [1, 2, 3, 4]
CHAINS = [7, 0, 4, 1, 8, 2]  # short last chunks, less than a chunk, and no chain, in one batch


def read(model, x, pos=None):
    """The last layer's hidden states (T, C) of one row of vectors, in a plain causal pass.

    pos: their positions, a list; by default 0, 1, …
    """
    return model(x[None], None if pos is None else torch.tensor([pos]))[0]


def positions(nx, k, c, text):
    """X, then k latents, each at the place of its chunk's last token, then `text` tokens."""
    return [*range(nx), *(nx + c * i - 1 for i in range(1, k + 1)),
            *range(nx + c * k, nx + c * k + text)]


def embed(model, tokens):
    """One row of ids as vectors (T, C)."""
    return model.wte(torch.tensor(tokens, dtype=torch.int64))


def summaries(encoder, X, S):
    """α by the loop: for every chunk a separate pass over X S₀ … S_i <sum>."""
    for i in range(len(S)):
        hidden = read(encoder, embed(encoder, X + sum(S[:i + 1], []) + [VOCAB.sum]))
        yield encoder.head(hidden[-1])[:VOCAB.n_ordinary].softmax(0)


def continuation(llm, X, z, text, c):
    """The hidden states that predict `text` after X and z (k, C), by a pass for it alone."""
    x = torch.cat([embed(llm, X), z, embed(llm, text)])
    return read(llm, x, positions(len(X), len(z), c, len(text)))[-len(text) - 1:-1]


def random_latents(seq):
    """z float64 (B, N, C) for a layout of models made by `tiny`."""
    return torch.randn(*seq.alpha_index.shape, 16, dtype=torch.float64)


# --------------------------------------------------------------------------- one pass = many passes

@pytest.mark.parametrize("c", SIZES)
def test_summaries_in_one_pass_equal_a_pass_for_each(c):
    """And the text is computed as if there were no <sum>."""
    encoder = tiny(0)
    batch = random_batch(CHAINS)
    enc = encoder_batch(batch, c, VOCAB.sum)
    states = summary_states(encoder, enc)
    alpha, _ = alpha_and_latent(encoder, states, encoder.wte.weight, VOCAB.n_ordinary)
    hidden = encoder(encoder.wte(enc.ids), enc.pos, induction_mask(enc))
    for b, (X, S, _) in enumerate(rows(batch, c)):
        assert enc.n[b] == len(S)
        for i, one in enumerate(summaries(encoder, X, S)):
            close(alpha[b, i], one.float(), 1e-7)  # α is float32 whatever the model
        text = X + sum(S, [])
        close(hidden[b][enc.segment[b] == 0][:len(text)], read(encoder, embed(encoder, text)))


def assert_read(seq, mask, batch, c, texts):
    """What `seq` predicts in one pass is what a pass for each text predicts, weight for weight.

    texts: for each row [(k, text, the weight of a token)]: the text after X z₀ … z_{k-1}. Under the
    causal mask, None, each z is predicted as well, from the slot before it.
    """
    llm, z = tiny(1), random_latents(seq)
    x = insert_latents(llm.wte(seq.ids), z, seq.latent)
    hidden = llm(x, seq.pos, mask, index=torch.cat([seq.predict_index, seq.alpha_index], 1))
    before_text, before_z = hidden.split([seq.target.size(1), z.size(1)], 1)
    for b, (X, _, _) in enumerate(rows(batch, c)):
        real = seq.loss_weight[b] > 0
        passes = [continuation(llm, X, z[b, :k], text, c) for k, text, _ in texts[b]]
        close(before_text[b][real], torch.cat(passes))
        assert seq.target[b][real].tolist() == [t for _, text, _ in texts[b] for t in text]
        weights = [weight for _, text, weight in texts[b] for _ in text]
        close(seq.loss_weight[b][real], torch.tensor(weights), 1e-7)
        n = max(k for k, _, _ in texts[b])
        assert seq.n[b] == n
        if mask is None:
            chain = torch.cat([embed(llm, X), z[b, :n]])
            close(before_z[b, :n], read(llm, chain, positions(len(X), n, c, 0))[len(X) - 1:-1])


@pytest.mark.parametrize("c", SIZES)
def test_chunks_in_one_pass_equal_a_pass_for_each(c):
    """S_{i+1} after z_i, each weighing 1/n; the answer is the last chunk, or follows X alone."""
    batch = random_batch(CHAINS)
    seq = sup_batch(batch, c)
    texts = []
    for _, S, answer in rows(batch, c):
        parts = S[1:] + [answer]
        texts.append([(min(i + 1, len(S)), part, 1 / len(parts) / len(part))
                      for i, part in enumerate(parts)])
    assert_read(seq, supervision_mask(seq), batch, c, texts)


@pytest.mark.parametrize("c", SIZES)
def test_a_text_after_some_latents_equals_a_pass_for_it(c):
    """S_k … S_{n-1} Ans after X z₀ … z_{k-1}, from k = 0, all text, to k = n, none of the chain."""
    batch = random_batch(CHAINS)
    n = count_chunks(np.array(CHAINS), c)
    for most in range(max(n) + 1):
        k = np.minimum(most, n)
        texts = [sum(S[first:], []) + answer for first, (_, S, answer) in zip(k, rows(batch, c))]
        texts = [[(first, text, 1 / len(text))] for first, text in zip(k, texts)]
        assert_read(chain_batch(batch, c, k), None, batch, c, texts)
    assert all(map(torch.equal, text_batch(batch), chain_batch(batch, c, 0 * n)))
    assert all(map(torch.equal, latent_batch(batch, c, n), chain_batch(batch, c, n)))


def test_phase_3_may_have_fewer_latents_than_chunks():
    """Then <eot> and the answer move up."""
    batch, n = random_batch(CHAINS), [2, 0, 1, 1, 3, 0]
    texts = [[(k, answer, 1 / len(answer))] for k, (_, _, answer) in zip(n, rows(batch, 2))]
    assert_read(latent_batch(batch, 2, n), None, batch, 2, texts)


# ------------------------------------------------------------------------------- as they are drawn

def drawn(function, name):
    """The lines of numbers that the drawings in a docstring have under this name."""
    lines = re.findall(rf"^ +{name}((?: +-?\d+)+)", function.__doc__, re.MULTILINE)
    return [[int(number) for number in line.split()] for line in lines]


def test_layouts_are_as_drawn():
    X, chunks, answer = [1, 2, VOCAB.bot], [[3, 4], [5, 6], [7]], [VOCAB.eot, 8]
    for function, *arguments in ((encoder_layout, X, chunks, VOCAB.sum),
                                 (sup_layout, X, chunks, answer, 2)):
        seq = function(*arguments)
        assert drawn(function, "position") == [seq.pos]
        assert drawn(function, "segment") == [seq.segment]
    chains = [chain_layout(X, sum(chunks, []), answer, 2, k) for k in (0, 1, 3)]
    assert drawn(chain_layout, "position") == [seq.pos for seq in chains]


@pytest.mark.parametrize("mask, segment", [
    (induction_mask, [0, 0, -1, 0, 0, -1]),
    (supervision_mask, [0, 0, 1, 1, 0, 2, 0, 3]),
])
def test_masks_are_as_drawn(mask, segment):
    lines = [re.findall("[■·]", line) for line in mask.__doc__.splitlines()]
    lines = [[mark == "■" for mark in line] for line in lines if line]
    layout = sup_batch(random_batch([4]), 2)._replace(segment=torch.tensor([segment]))
    found = mask(layout)[0]
    assert [row[:i + 1] for i, row in enumerate(found.tolist())] == lines
    assert not found.triu(1).any()


# ------------------------------------------------------------------------- widths, bags and draws

def layouts(batch, c, k):
    """A batch in all layouts; k: the latents of each row, where some of its chunks are text."""
    return (encoder_batch(batch, c, VOCAB.sum), sup_batch(batch, c), chain_batch(batch, c, k),
            text_batch(batch), latent_batch(batch, c, k))


@pytest.mark.parametrize("c", SIZES)
def test_no_position_is_beyond_the_longest_problem(c):
    """A problem is kept if X S Ans, S in whole chunks, fits; then every layout of it fits too."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        batch = random_batch(rng.integers(0, 9, 5), seed)
        n = np.array([count_chunks(len(p.chain), c) for p in batch.problems])
        ends = [len(p.question) + c * k + len(p.answer) for p, k in zip(batch.problems, n)]
        for seq in *layouts(batch, c, rng.integers(0, n + 1)), latent_batch(batch, c, n):
            assert seq.pos.min() == 0 and (seq.pos.amax(1) < torch.tensor(ends)).all()


@pytest.mark.parametrize("c", [*SIZES, 50])
def test_a_batch_is_as_wide_as_its_longest_row(c):
    """And a row has in it what it has alone, then zeros."""
    batch = random_batch(CHAINS)
    k = count_chunks(np.array(CHAINS), c) // 2
    alone = [layouts(batch.some([b]), c, k[[b]]) for b in range(len(k))]
    for whole, *single in zip(layouts(batch, c, k), *alone):
        assert whole.ids.size(1) % 8 == 0 and whole.pos[:, -8:].any()
        for field, *fields in zip(whole, *single):  # (B, width), and (1, its width) of each row
            width = max(row.numel() for row in fields)
            padded = [F.pad(row.flatten(), (0, width - row.numel())) for row in fields]
            assert torch.equal(field.view(len(k), -1), torch.stack(padded))


@pytest.mark.parametrize("c", [*SIZES, 50])
def test_bags_hold_the_chunks(c):
    """And there are as many of them as the encoder has summaries."""
    for batch in (random_batch(CHAINS), random_batch([0, 0])):
        bags = chunk_tokens([p.chain for p in batch.problems], c)
        assert bags.shape == (*encoder_batch(batch, c, VOCAB.sum).alpha_index.shape, c)
        for bag, (_, S, _) in zip(bags.tolist(), rows(batch, c)):
            assert [[token for token in chunk if token >= 0] for chunk in bag[:len(S)]] == S
            assert all(token == -1 for chunk in bag[len(S):] for token in chunk)


@pytest.mark.parametrize("share, count", [(0, 0), (0.4, 12), (1, 30)])
def test_continuations_are_drawn_anew(share, count):
    """Of just that share of the rows; k = 0 … n, at most k in a share sqrt((k + 1) / (n + 1))."""
    def draw(step, seed=0):
        return draw_continuations(batch, 2, share, seed, step)

    batch, steps = random_batch([7, 0, 4] * 10), 2000
    drawn_rows, ks = map(np.array, zip(*map(draw, range(steps))))     # (steps, count) each
    assert drawn_rows.shape == ks.shape == (steps, count)
    assert all(len(set(row)) == count for row in drawn_rows.tolist())

    def even(counts, mean):
        return (np.abs(counts - mean) <= 5 * np.sqrt(mean)).all()

    assert even(np.bincount(drawn_rows.flat, minlength=30), steps * count / 30)
    for place, n in enumerate([4, 0, 2]):
        found = np.bincount(ks[drawn_rows % 3 == place], minlength=n + 1)  # (n + 1,)
        shares = np.diff(np.sqrt(np.arange(n + 2) / (n + 1)))
        assert len(found) == n + 1 and even(found, found.sum() * shares)
    again, other_step, other_seed = draw(3), draw(4), draw(3, seed=1)
    assert all(map(np.array_equal, again, (drawn_rows[3], ks[3])))
    for other in other_step, other_seed:
        assert count == 0 or not any(map(np.array_equal, again, other))


# ------------------------------------------------------------------------------------ superposition

def test_one_hot_alpha_is_the_token_embedding():
    E = torch.randn(VOCAB.n_vocab, 16)
    v = torch.arange(VOCAB.n_ordinary)
    alpha = torch.eye(VOCAB.n_ordinary)[None]
    ones = torch.ones(1, VOCAB.n_ordinary, 1)
    for z in (superpose(alpha, E), superpose(alpha, E, 1), superpose(alpha, E, 5),
              superpose_sparse(ones, v[None, :, None], E)):
        assert torch.equal(z[0], E[v])


def test_sparse_superposition_equals_dense():
    E = torch.randn(VOCAB.n_vocab, 16).double()
    alpha = torch.rand(2, 3, VOCAB.n_ordinary).double().softmax(2)
    dense = torch.einsum("bnv,vc->bnc", alpha, E[:VOCAB.n_ordinary])
    for k in 0, VOCAB.n_ordinary, 1000:  # more than there are: all of them
        close(superpose(alpha, E, k), dense)
    top = torch.where(alpha >= alpha.topk(4, 2).values[..., -1:], alpha, 0)
    values, ids = top_k_renormalized(alpha, 4)
    top = top / top.sum(2, keepdim=True)
    close(torch.zeros_like(alpha).scatter(2, ids, values), top)
    assert (values.diff(dim=2) <= 0).all()
    close(superpose(alpha, E, 4), superpose(top, E))


def test_special_and_padded_ids_get_no_mass():
    logits = torch.zeros(VOCAB.n_vocab)
    logits[VOCAB.n_ordinary:] = 100.0
    alpha = ordinary_softmax(logits, VOCAB.n_ordinary)
    close(alpha, torch.full((VOCAB.n_ordinary,), 1 / VOCAB.n_ordinary), 1e-7)
    E = torch.randn(VOCAB.n_vocab, 16)
    E[VOCAB.n_ordinary:] = float("nan")  # nor may their embeddings be touched
    assert superpose(alpha[None], E).isfinite().all()
    assert superpose(alpha[None], E, 7).isfinite().all()
