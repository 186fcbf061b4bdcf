"""One pass in place of many: layouts and masks against the plain loops; superposition itself."""
import re

import numpy as np
import pytest
import torch

from conftest import VOCAB, close, random_batch, rows, tiny
from encoder import (alpha_and_latent, chunk_tokens, count_chunks, draw_followed, encoder_batch,
                     encoder_layout, explicit_batch, induction_mask, insert_latents, latent_batch,
                     latent_layout, llm_batch, llm_layout, ordinary_softmax, summary_states,
                     superpose, superpose_sparse, supervision_mask, top_k_renormalized)

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
    return torch.randn(*seq.summary_index.shape, 16, dtype=torch.float64)


def some_followed(n):
    """Which chunk is followed to the end in rows of n (B,) chunks: −1, the last, and in between."""
    return np.full_like(n, -1), n - 1, n // 2 - 1, np.maximum(n - 2, -1)


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


def assert_read(llm, seq, mask, batch, c, texts):
    """What `seq` predicts in one pass is what a pass for each text predicts, weight for weight.

    texts: for each row [(k, text, the weights of its tokens)]: the text after X z₀ … z_{k-1}
    """
    z = random_latents(seq)
    x = insert_latents(llm.wte(seq.ids), z, seq.latent)
    hidden = llm(x, seq.pos, mask, index=seq.predict_index)
    for b, (X, _, _) in enumerate(rows(batch, c)):
        real = seq.loss_weight[b] > 0
        passes = [continuation(llm, X, z[b, :k], text, c) for k, text, _ in texts[b]]
        close(hidden[b][real], torch.cat(passes))
        assert seq.target[b][real].tolist() == [t for _, text, _ in texts[b] for t in text]
        weights = [w for _, _, weights in texts[b] for w in weights]
        close(seq.loss_weight[b][real], torch.tensor(weights), 1e-7)


def sup_texts(S, answer):
    """The texts of ℓ_sup: S_{i+1} after z_i. The answer is the last chunk, or follows X alone."""
    parts = S[1:] + [answer]
    return [(min(i + 1, len(S)), part, [1 / len(parts) / len(part)] * len(part))
            for i, part in enumerate(parts)]


@pytest.mark.parametrize("c", SIZES)
def test_chunks_in_one_pass_equal_a_pass_for_each(c):
    batch = random_batch(CHAINS)
    seq = llm_batch(batch, c)
    texts = [sup_texts(S, answer) for _, S, answer in rows(batch, c)]
    assert_read(tiny(1), seq, supervision_mask(seq), batch, c, texts)


@pytest.mark.parametrize("c", SIZES)
def test_a_text_followed_to_the_end_equals_a_pass_for_it(c):
    """Whatever the chunk k that is followed: a pass over X z₀ … z_k S_{k+1} … S_{n-1} Ans.

    Its weight is 0.5 in all; the other chunks are predicted as if it were not there.
    """
    batch = random_batch(CHAINS)
    for follow in some_followed(count_chunks(np.array(CHAINS), c)):
        seq = llm_batch(batch, c, follow, 0.5)
        texts = []
        for (_, S, answer), k in zip(rows(batch, c), follow):
            row = sup_texts(S, answer)
            rest = sum(S[k + 1:], []) + answer
            each = 0.5 / len(rest)
            if k >= 0:
                _, part, weights = row[k]
                weights = weights + [0] * (len(rest) - len(part))  # S_{k+1} counts in both
                row[k] = k + 1, rest, [w + each for w in weights]
            elif S:
                row.insert(0, (0, rest, [each] * len(rest)))
            texts.append(row)
        assert_read(tiny(1), seq, supervision_mask(seq), batch, c, texts)


@pytest.mark.parametrize("c", SIZES)
def test_phase_3_is_plain_causal(c):
    """The answer after all z; and each z is predicted from the slot before it."""
    llm = tiny(1)
    batch = random_batch(CHAINS)
    seq = latent_batch(batch, c)
    texts = [[(len(S), answer, [1 / len(answer)] * len(answer))]
             for _, S, answer in rows(batch, c)]
    assert_read(llm, seq, None, batch, c, texts)
    z = random_latents(seq)
    x = insert_latents(llm.wte(seq.ids), z, seq.latent)
    hidden = llm(x, seq.pos, index=seq.summary_index)
    for b, (X, S, _) in enumerate(rows(batch, c)):
        one = read(llm, torch.cat([embed(llm, X), z[b, :len(S)]]), positions(len(X), len(S), c, 0))
        close(hidden[b, :len(S)], one[len(X) - 1:-1])
        assert seq.n[b] == len(S)


def test_explicit_layout_is_the_text_itself():
    batch = random_batch(CHAINS)
    seq = explicit_batch(batch)
    written = [sum(S, []) + answer for _, S, answer in rows(batch, 3)]
    texts = [[(0, text, [1 / len(text)] * len(text))] for text in written]
    assert_read(tiny(1), seq, None, batch, 3, texts)
    assert (seq.n == 0).all()


# ------------------------------------------------------------------------------- as they are drawn

def drawn(function, name):
    """The lines of numbers that the drawings in a docstring have under this name."""
    lines = re.findall(rf"^ +{name}((?: +-?\d+)+)", function.__doc__, re.MULTILINE)
    return [[int(number) for number in line.split()] for line in lines]


def test_layouts_are_as_drawn():
    X, chunks, answer = [1, 2, VOCAB.bot], [[3, 4], [5, 6], [7]], [VOCAB.eot, 8]
    for function, sequences in (
            (encoder_layout, [encoder_layout(X, chunks, VOCAB.sum)]),
            (llm_layout, [llm_layout(X, chunks, answer, 2),
                          llm_layout(X, chunks, answer, 2, follow=0)]),
            (latent_layout, [latent_layout(X, chunks, answer, 2)])):
        assert drawn(function, "position") == [seq.pos for seq in sequences]
        segments = [seq.segment for seq in sequences]
        assert drawn(function, "segment") == (segments if function != latent_layout else [])


@pytest.mark.parametrize("mask, segment", [
    (induction_mask, [0, 0, -1, 0, 0, -1]),
    (supervision_mask, [0, 0, 1, 1, 0, 2, 0, 3]),
])
def test_masks_are_as_drawn(mask, segment):
    lines = [re.findall("[■·]", line) for line in mask.__doc__.splitlines()]
    lines = [[mark == "■" for mark in line] for line in lines if line]
    layout = llm_batch(random_batch([4]), 2)._replace(segment=torch.tensor([segment]))
    found = mask(layout)[0]
    assert [row[:i + 1] for i, row in enumerate(found.tolist())] == lines
    assert not found.triu(1).any()


# ------------------------------------------------------------------------- widths, bags and draws

@pytest.mark.parametrize("c", SIZES)
def test_no_position_is_beyond_the_longest_problem(c):
    """A problem is kept if X S Ans, S in whole chunks, fits; then every layout of it fits too."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        batch = random_batch(rng.integers(0, 9, 5), seed)
        x, s, a = batch.lengths
        n = count_chunks(s, c)
        followed = [llm_batch(batch, c, k) for k in some_followed(n)]
        for seq in (encoder_batch(batch, c, VOCAB.sum), llm_batch(batch, c), latent_batch(batch, c),
                    explicit_batch(batch), *followed):
            assert 0 <= seq.pos.min() and seq.pos.max() < (x + n * c + a).max()
            assert seq.ids.size(1) % 8 == 0


@pytest.mark.parametrize("c", [*SIZES, 50])
def test_a_batch_is_padded_as_its_bucket_needs(c):
    """Two rows of a batch, laid out alone, have the whole batch's widths and their own contents."""
    whole = random_batch(CHAINS)
    few = [5, 1]  # neither of them the longest
    part = type(whole)(whole.rows[few], [whole.problems[b] for b in few], whole.lengths)
    follow = count_chunks(whole.lengths[1], c) // 2 - 1
    for of_part, of_whole in (
            (explicit_batch(part), explicit_batch(whole)),
            (latent_batch(part, c), latent_batch(whole, c)),
            (llm_batch(part, c), llm_batch(whole, c)),
            (llm_batch(part, c, follow[few]), llm_batch(whole, c, follow)),
            (encoder_batch(part, c, VOCAB.sum), encoder_batch(whole, c, VOCAB.sum))):
        assert all(torch.equal(a, b[few]) for a, b in zip(of_part, of_whole))
    assert torch.equal(chunk_tokens(part, c), chunk_tokens(whole, c)[few])


@pytest.mark.parametrize("c", [*SIZES, 50])
def test_bags_hold_the_chunks(c):
    """And there are as many of them as the encoder has summaries."""
    for batch in (random_batch(CHAINS), random_batch([0, 0])):
        bags = chunk_tokens(batch, c)
        assert bags.shape[:2] == encoder_batch(batch, c, VOCAB.sum).summary_index.shape
        assert bags.size(2) == min(c, max(1, batch.lengths[1].max()))  # a long chunk costs nothing
        for bag, (_, S, _) in zip(bags.tolist(), rows(batch, c)):
            assert [[token for token in chunk if token >= 0] for chunk in bag[:len(S)]] == S
            assert all(token == -1 for chunk in bag[len(S):] for token in chunk)


def test_the_chunk_to_follow_is_drawn_evenly_and_anew():
    batch = random_batch([7, 0, 4] * 100)
    drawn = np.array([draw_followed(batch, 2, seed=0, step=step) for step in range(50)])
    for row, n in (0, 4), (1, 0), (2, 2):
        values, counts = np.unique(drawn[:, row::3], return_counts=True)
        assert values.tolist() == list(range(-1, n))
        mean = 5000 / (n + 1)
        assert (np.abs(counts - mean) < 5 * np.sqrt(mean)).all()
    assert (drawn[3] == draw_followed(batch, 2, seed=0, step=3)).all()
    assert (drawn[3] != drawn[4]).any()
    assert (drawn[3] != draw_followed(batch, 2, seed=1, step=3)).any()
    half = draw_followed(batch, 2, seed=0, step=3, from_start=0.5)[::3]
    assert 35 < (half == -1).sum() < 85 and set(half) == {-1, 0, 1, 2, 3}


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
    values, ids, mass = top_k_renormalized(alpha, 4)
    close(mass, top.sum(2))
    close(torch.zeros_like(alpha).scatter(2, ids, values), top / mass[..., None])
    assert (values.diff(dim=2) <= 0).all()
    close(superpose(alpha, E, 4), superpose(top / mass[..., None], E))


def test_special_and_padded_ids_get_no_mass():
    logits = torch.zeros(VOCAB.n_vocab)
    logits[VOCAB.n_ordinary:] = 100.0
    alpha = ordinary_softmax(logits, VOCAB.n_ordinary)
    close(alpha, torch.full((VOCAB.n_ordinary,), 1 / VOCAB.n_ordinary), 1e-7)
    E = torch.randn(VOCAB.n_vocab, 16)
    E[VOCAB.n_ordinary:] = float("nan")  # nor may their embeddings be touched
    assert superpose(alpha[None], E).isfinite().all()
    assert superpose(alpha[None], E, 7).isfinite().all()
