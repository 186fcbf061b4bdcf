"""One pass stands for many: layouts and masks against the plain loops they replace, and the superposition itself."""
import numpy as np
import pytest
import torch

from conftest import VOCAB, close, random_batch, rows, tiny
from encoder import (chunks, encoder_layout, explicit_layout, induction_mask, keep_top, llm_layout, ordinary_softmax,
                     place, summarize, superpose, superpose_sparse, supervision_mask)

SIZES = [1, 2, 3, 4]
CHAINS = [7, 0, 4, 1, 8, 2]  # short last chunks, chains shorter than a chunk, no chain at all, in one batch


def read(model, x):
    """The last layer's hidden states of one row of vectors, in a plain causal pass."""
    return model(x[None])[0]


def summaries(encoder, X, S):
    """α by the loop: for every chunk a separate pass over X S₀ … S_i <sum>."""
    for i in range(len(S)):
        hidden = read(encoder, encoder.wte(torch.tensor(X + sum(S[:i + 1], []) + [VOCAB.sum])))
        yield encoder.head(hidden[-1])[:VOCAB.n_ordinary].softmax(0)


# ------------------------------------------------------------------------------------- one pass = many passes

@pytest.mark.parametrize("c", SIZES)
def test_summaries_in_one_pass_equal_a_pass_for_each(c):
    encoder, batch = tiny(0), random_batch(CHAINS)
    alpha = summarize(encoder, encoder_layout(batch, c, VOCAB.sum), VOCAB.n_ordinary)
    for b, (X, S, _) in enumerate(rows(batch, c)):
        for i, one in enumerate(summaries(encoder, X, S)):
            close(alpha[b, i], one.float(), 1e-7)  # α is float32 whatever the model


@pytest.mark.parametrize("c", SIZES)
def test_text_is_computed_as_if_there_were_no_sum(c):
    encoder, batch = tiny(0), random_batch(CHAINS)
    enc = encoder_layout(batch, c, VOCAB.sum)
    hidden = encoder(encoder.wte(enc.ids), enc.pos, induction_mask(enc.seg))
    for b, (X, S, _) in enumerate(rows(batch, c)):
        text = torch.tensor(X + sum(S, []))
        close(hidden[b][enc.seg[b] == 0][:len(text)], read(encoder, encoder.wte(text)))


@pytest.mark.parametrize("c", SIZES)
def test_continuations_in_one_pass_equal_a_pass_for_each(c):
    """Every prediction of chunk i + 1 is that of a separate pass over X z₀ … z_i S_{i+1}; the answer is the last chunk."""
    llm, batch = tiny(1), random_batch(CHAINS)
    seq = llm_layout(batch, c)
    N = seq.mark.size(1)
    z = torch.randn(len(CHAINS), N, 16, dtype=torch.float64)
    hidden = llm(place(llm.wte(seq.ids), z, seq.latent), seq.pos, supervision_mask(seq.seg), at=seq.at)
    for b, (X, S, answer) in enumerate(rows(batch, c)):
        parts = S[1:] + [answer]
        expected, targets, weights = [], [], []
        for i, part in enumerate(parts):
            seen = min(i + 1, len(S))  # without a chain the answer follows X
            x = torch.cat([llm.wte(torch.tensor(X)), z[b, :seen], llm.wte(torch.tensor(part))])
            expected.append(read(llm, x)[-len(part) - 1:-1])
            targets += part
            weights += [1 / len(parts) / len(part)] * len(part)
        real = seq.weight[b] > 0
        close(hidden[b][real], torch.cat(expected))
        assert seq.target[b][real].tolist() == targets
        close(seq.weight[b][real], torch.tensor(weights), 1e-7)


@pytest.mark.parametrize("c", SIZES)
def test_phase_3_is_plain_causal(c):
    llm, batch = tiny(1), random_batch(CHAINS)
    seq = llm_layout(batch, c, text=False)
    N = seq.mark.size(1)
    z = torch.randn(len(CHAINS), N, 16, dtype=torch.float64)
    hidden = llm(place(llm.wte(seq.ids), z, seq.latent), seq.pos, at=torch.cat([seq.mark, seq.at], 1))
    for b, (X, S, answer) in enumerate(rows(batch, c)):
        n, real = len(S), seq.weight[b] > 0
        x = torch.cat([llm.wte(torch.tensor(X)), z[b, :n], llm.wte(torch.tensor(answer))])
        expected = read(llm, x)[len(X) - 1:-1]  # where z₀ … z_{n-1} are predicted, then <eot> and the answer
        close(torch.cat([hidden[b, :n], hidden[b, N:][real]]), expected)
        assert seq.target[b][real].tolist() == answer and seq.n[b] == n
        close(seq.weight[b].sum(), torch.tensor(1.0), 1e-6)


def test_explicit_layout_is_the_text_itself():
    batch = random_batch(CHAINS)
    seq = explicit_layout(batch)
    for b, (X, S, answer) in enumerate(rows(batch, 3)):
        text, written = X + sum(S, []) + answer, sum(S, []) + answer
        real = seq.weight[b] > 0
        assert seq.ids[b, :len(text)].tolist() == text and seq.pos[b, :len(text)].tolist() == list(range(len(text)))
        assert seq.target[b][real].tolist() == written
        assert seq.at[b][real].tolist() == list(range(len(X) - 1, len(text) - 1))
        close(seq.weight[b][real], torch.full((len(written),), 1 / len(written)), 1e-7)


@pytest.mark.parametrize("c", SIZES)
def test_some_latents_then_the_rest_as_text(c):
    """Whatever the cut, 0 … n: every prediction is that of a plain pass over X z_0 … z_{k-1} S_k … S_{n-1} Ans."""
    llm, batch = tiny(1), random_batch(CHAINS)
    n = chunks(batch.ns, c)
    z = torch.randn(len(CHAINS), max(n), 16, dtype=torch.float64)
    for cut in (np.zeros_like(n), n, n // 2, np.maximum(n - 1, 0)):
        seq = explicit_layout(batch, c, cut)
        hidden = llm(place(llm.wte(seq.ids), z, seq.latent), seq.pos, at=seq.at)
        for b, (X, S, answer) in enumerate(rows(batch, c)):
            written, real = sum(S[cut[b]:], []) + answer, seq.weight[b] > 0
            x = torch.cat([llm.wte(torch.tensor(X)), z[b, :cut[b]], llm.wte(torch.tensor(written))])
            close(hidden[b][real], read(llm, x)[-len(written) - 1:-1])
            assert seq.target[b][real].tolist() == written and seq.pos[b].max() == len(x) - 1


@pytest.mark.parametrize("c", SIZES)
def test_no_position_is_beyond_the_longest_problem(c):
    """A problem is kept if X S Ans fits the model; then every layout of it fits as well."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        batch = random_batch(rng.integers(0, 9, 5), seed)
        longest = (batch.nx + batch.ns + batch.na).max()
        for seq in (encoder_layout(batch, c, VOCAB.sum), llm_layout(batch, c), llm_layout(batch, c, text=False),
                    explicit_layout(batch)):
            assert 0 <= seq.pos.min() and seq.pos.max() < longest
            for at in (seq.at, seq.mark):
                assert ((0 <= at) & (at < seq.ids.size(1))).all()
            assert seq.ids.size(1) % 8 == 0  # few widths, so that a compiled model is compiled few times


# ------------------------------------------------------------------------------------------------------ masks

@pytest.mark.parametrize("c", SIZES)
def test_no_chunk_reads_the_text_of_another(c):
    """Change one chunk's text: nothing outside it moves, by as much as a bit."""
    llm, batch = tiny(1), random_batch([9, 5, 0])
    seq = llm_layout(batch, c)
    z = torch.randn(3, seq.mark.size(1), 16, dtype=torch.float64)

    def run(ids):
        return llm(place(llm.wte(ids), z, seq.latent), seq.pos, supervision_mask(seq.seg))

    before = run(seq.ids)
    for chunk in range(1, chunks(9, c)):
        own = seq.seg == chunk
        own[1:] = False  # of the first row, of nine tokens
        after = run(torch.where(own, (seq.ids + 1) % VOCAB.n_ordinary, seq.ids))
        assert torch.equal(before[~own], after[~own])
        assert (before[own] != after[own]).any(1).all()


def test_a_latent_reaches_all_that_follows_it():
    llm, batch, c = tiny(1), random_batch([8]), 2
    seq = llm_layout(batch, c)
    z = torch.randn(1, 4, 16, dtype=torch.float64)

    def run(z):
        return llm(place(llm.wte(seq.ids), z, seq.latent), seq.pos, supervision_mask(seq.seg))

    before, real = run(z), seq.pos[0] > 0
    for i in range(4):
        other = z.clone()
        other[0, i] += 1
        moved = (run(other) != before).any(2)[0]
        later = torch.arange(len(moved)) >= (seq.latent[0] == i + 1).nonzero()[0, 0]
        assert torch.equal(moved & real, later & real)


def test_a_sum_is_seen_by_itself_alone():
    encoder, batch = tiny(0), random_batch([8, 3])
    enc = encoder_layout(batch, 2, VOCAB.sum)
    before = encoder(encoder.wte(enc.ids), enc.pos, induction_mask(enc.seg))
    for mark in enc.mark[0]:
        ids = enc.ids.clone()
        ids[0, mark] = 3
        moved = (encoder(encoder.wte(ids), enc.pos, induction_mask(enc.seg)) != before).any(2)
        assert moved.nonzero().tolist() == [[0, mark]]


def test_masks_as_they_are_drawn():
    def mask(picture):
        return torch.tensor([[x == "■" for x in row.split()] for row in picture.strip().splitlines()])

    enc = torch.tensor([[0, 0, -1, 0, 0, -1]])
    assert torch.equal(induction_mask(enc)[0], mask("""
        ■ · · · · ·
        ■ ■ · · · ·
        ■ ■ ■ · · ·
        ■ ■ · ■ · ·
        ■ ■ · ■ ■ ·
        ■ ■ · ■ ■ ■"""))
    seg, latent = torch.tensor([[0, 0, 1, 1, 0, 2, 0, 3]]), torch.tensor([[0, 1, 0, 0, 2, 0, 3, 0]])
    assert torch.equal(supervision_mask(seg)[0], mask("""
        ■ · · · · · · ·
        ■ ■ · · · · · ·
        ■ ■ ■ · · · · ·
        ■ ■ ■ ■ · · · ·
        ■ ■ · · ■ · · ·
        ■ ■ · · ■ ■ · ·
        ■ ■ · · ■ · ■ ·
        ■ ■ · · ■ · ■ ■"""))
    assert torch.equal(supervision_mask(seg, latent)[0], mask("""
        ■ · · · · · · ·
        ■ ■ · · · · · ·
        · ■ ■ · · · · ·
        · ■ ■ ■ · · · ·
        ■ ■ · · ■ · · ·
        · · · · ■ ■ · ·
        ■ ■ · · ■ · ■ ·
        ■ ■ · · ■ · ■ ■"""))  # --local: a chunk sees its z and itself; z and the answer see what they always see


# ---------------------------------------------------------------------------------------------- superposition

def test_one_hot_alpha_is_the_token_embedding():
    E, v = torch.randn(VOCAB.n_vocab, 16), torch.arange(VOCAB.n_ordinary)
    alpha = torch.eye(VOCAB.n_ordinary)[None]
    for z in (superpose(alpha, E), superpose(alpha, E, 1), superpose(alpha, E, 5),
              superpose_sparse(torch.ones(1, VOCAB.n_ordinary, 1), v[None, :, None], E)):
        assert torch.equal(z[0], E[v])


def test_sparse_superposition_equals_dense():
    E, alpha = torch.randn(VOCAB.n_vocab, 16).double(), torch.rand(2, 3, VOCAB.n_ordinary).double().softmax(2)
    dense = torch.einsum("bnv,vc->bnc", alpha, E[:VOCAB.n_ordinary])
    close(superpose(alpha, E), dense)
    close(superpose(alpha, E, VOCAB.n_ordinary), dense)
    close(superpose(alpha, E, 1000), dense)  # more than there are: all of them
    top = torch.where(alpha >= alpha.topk(4, 2).values[..., -1:], alpha, 0)
    close(superpose(alpha, E, 4), superpose(top / top.sum(2, keepdim=True), E))
    values, where = keep_top(alpha, 4)
    close(values.sum(2), torch.ones(2, 3, dtype=torch.float64))
    assert torch.equal(where, alpha.topk(4, 2).indices)


def test_special_and_padded_ids_get_no_mass():
    logits = torch.zeros(VOCAB.n_vocab)
    logits[VOCAB.n_ordinary:] = 100.0
    alpha = ordinary_softmax(logits, VOCAB.n_ordinary)
    close(alpha, torch.full((VOCAB.n_ordinary,), 1 / VOCAB.n_ordinary), 1e-7)
    E = torch.randn(VOCAB.n_vocab, 16)
    E[VOCAB.n_ordinary:] = float("nan")  # nor may their embeddings be touched
    assert superpose(alpha[None], E).isfinite().all() and superpose(alpha[None], E, 7).isfinite().all()


def test_place_puts_each_latent_where_it_stands():
    x, z = torch.randn(2, 6, 3), torch.randn(2, 2, 3)
    latent = torch.tensor([[0, 1, 0, 2, 0, 0], [0, 0, 0, 0, 1, 0]])
    expected = x.clone()
    expected[0, 1], expected[0, 3], expected[1, 4] = z[0, 0], z[0, 1], z[1, 0]
    assert torch.equal(place(x, z, latent), expected)
