"""One pass in place of many: layouts and masks against the plain loops; superposition itself."""
import numpy as np
import pytest
import torch

from conftest import VOCAB, close, random_batch, rows, tiny
from encoder import (chunk_tokens, count_chunks, draw_followed, encoder_batch, explicit_batch,
                     induction_mask, insert_latents, latent_batch, llm_batch,
                     local_supervision_mask, ordinary_softmax, summarize, superpose,
                     superpose_sparse, supervision_mask, top_k_renormalized)

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
    return model.wte(torch.tensor(tokens))


def summaries(encoder, X, S):
    """α by the loop: for every chunk a separate pass over X S₀ … S_i <sum>."""
    for i in range(len(S)):
        hidden = read(encoder, embed(encoder, X + sum(S[:i + 1], []) + [VOCAB.sum]))
        yield encoder.head(hidden[-1])[:VOCAB.n_ordinary].softmax(0)


def some_followed(n):
    """Which chunk is followed to the end in rows of n (B,) chunks: −1, the last, and in between."""
    return np.full_like(n, -1), n - 1, n // 2 - 1, np.maximum(n - 2, -1)


def continuation(llm, X, z, text, c):
    """The hidden states that predict `text` behind X and z (k, C), by a pass for it alone."""
    x = torch.cat([embed(llm, X), z, embed(llm, text)])
    return read(llm, x, positions(len(X), len(z), c, len(text)))[-len(text) - 1:-1]


def random_latents(seq):
    """z float64 (B, N, C) for a layout of models made by `tiny`."""
    return torch.randn(*seq.summary_index.shape, 16, dtype=torch.float64)


# --------------------------------------------------------------------------- one pass = many passes

@pytest.mark.parametrize("c", SIZES)
def test_summaries_in_one_pass_equal_a_pass_for_each(c):
    encoder = tiny(0)
    batch = random_batch(CHAINS)
    alpha = summarize(encoder, encoder_batch(batch, c, VOCAB.sum), VOCAB.n_ordinary)
    for b, (X, S, _) in enumerate(rows(batch, c)):
        for i, one in enumerate(summaries(encoder, X, S)):
            close(alpha[b, i], one.float(), 1e-7)  # α is float32 whatever the model


@pytest.mark.parametrize("c", SIZES)
def test_text_is_computed_as_if_there_were_no_sum(c):
    encoder = tiny(0)
    batch = random_batch(CHAINS)
    enc = encoder_batch(batch, c, VOCAB.sum)
    hidden = encoder(encoder.wte(enc.ids), enc.pos, induction_mask(enc.segment))
    for b, (X, S, _) in enumerate(rows(batch, c)):
        text = X + sum(S, [])
        close(hidden[b][enc.segment[b] == 0][:len(text)], read(encoder, embed(encoder, text)))


@pytest.mark.parametrize("c", SIZES)
def test_continuations_in_one_pass_equal_a_pass_for_each(c):
    """Every prediction of chunk i + 1 is that of a separate pass over X z₀ … z_i S_{i+1}.

    The answer is the last chunk.
    """
    llm = tiny(1)
    batch = random_batch(CHAINS)
    seq = llm_batch(batch, c)
    z = random_latents(seq)
    x = insert_latents(llm.wte(seq.ids), z, seq.latent)
    hidden = llm(x, seq.pos, supervision_mask(seq.segment), index=seq.predict_index)
    for b, (X, S, answer) in enumerate(rows(batch, c)):
        parts = S[1:] + [answer]
        expected, targets, weights = [], [], []
        for i, part in enumerate(parts):
            seen = min(i + 1, len(S))  # without a chain the answer follows X
            expected.append(continuation(llm, X, z[b, :seen], part, c))
            targets += part
            weights += [1 / len(parts) / len(part)] * len(part)
        real = seq.loss_weight[b] > 0
        close(hidden[b][real], torch.cat(expected))
        assert seq.target[b][real].tolist() == targets
        close(seq.loss_weight[b][real], torch.tensor(weights), 1e-7)


@pytest.mark.parametrize("c", SIZES)
def test_phase_3_is_plain_causal(c):
    llm = tiny(1)
    batch = random_batch(CHAINS)
    seq = latent_batch(batch, c)
    N = seq.summary_index.size(1)
    z = random_latents(seq)
    x = insert_latents(llm.wte(seq.ids), z, seq.latent)
    hidden = llm(x, seq.pos, index=torch.cat([seq.summary_index, seq.predict_index], 1))
    for b, (X, S, answer) in enumerate(rows(batch, c)):
        n = len(S)
        real = seq.loss_weight[b] > 0
        one = torch.cat([embed(llm, X), z[b, :n], embed(llm, answer)])
        at = positions(len(X), n, c, len(answer))
        expected = read(llm, one, at)[len(X) - 1:-1]  # z₀ … z_{n-1}, then <eot> Ans, are predicted
        close(torch.cat([hidden[b, :n], hidden[b, N:][real]]), expected)
        assert seq.target[b][real].tolist() == answer
        assert seq.n[b] == n
        close(seq.loss_weight[b].sum(), torch.tensor(1.0), 1e-6)


def test_explicit_layout_is_the_text_itself():
    batch = random_batch(CHAINS)
    seq = explicit_batch(batch)
    for b, (X, S, answer) in enumerate(rows(batch, 3)):
        text = X + sum(S, []) + answer
        written = sum(S, []) + answer
        real = seq.loss_weight[b] > 0
        assert seq.ids[b, :len(text)].tolist() == text
        assert seq.pos[b, :len(text)].tolist() == list(range(len(text)))
        assert seq.target[b][real].tolist() == written
        assert seq.predict_index[b][real].tolist() == list(range(len(X) - 1, len(text) - 1))
        close(seq.loss_weight[b][real], torch.full((len(written),), 1 / len(written)), 1e-7)


@pytest.mark.parametrize("c", SIZES)
def test_text_after_latents_stands_where_it_would_in_the_text(c):
    """S_{i+1} and what is followed have, behind z_i, their positions in X S Ans."""
    batch = random_batch([7, 4, 1, 8])
    n = count_chunks(np.array([7, 4, 1, 8]), c)
    for follow in some_followed(n):
        seq = llm_batch(batch, c, follow)
        for b, (X, S, answer) in enumerate(rows(batch, c)):
            at = len(X) + np.arange(0, c * n[b] + 1, c)  # of S₀, S₁, …, <eot>
            pos, segment = seq.pos[b], seq.segment[b]
            assert pos[seq.latent[b] > 0].tolist() == (at[1:] - 1).tolist()
            for i in range(n[b]):
                text = pos[segment == (n[b] + 1 if i == follow[b] else i + 1)].tolist()
                assert text == list(range(at[i + 1], at[i + 1] + len(text)))


@pytest.mark.parametrize("c", SIZES)
def test_a_text_followed_to_the_end_equals_a_pass_for_it(c):
    """Whatever the chunk k that is followed: a plain pass over X z₀ … z_k S_{k+1} … S_{n-1} Ans.

    The other chunks are predicted as if it were not there.
    """
    llm = tiny(1)
    batch = random_batch(CHAINS)
    for follow in some_followed(count_chunks(np.array(CHAINS), c)):
        seq = llm_batch(batch, c, follow)
        z = random_latents(seq)
        x = insert_latents(llm.wte(seq.ids), z, seq.latent)
        hidden = llm(x, seq.pos, supervision_mask(seq.segment), index=seq.predict_index)
        for b, (X, S, answer) in enumerate(rows(batch, c)):
            n, k = len(S), follow[b]
            parts = S[1:] + [answer]
            expected, targets, weights = [], [], []
            if k == -1 and n:  # no chunk is read yet: the whole chain behind <bot>
                targets += sum(S, []) + answer
                expected.append(continuation(llm, X, z[b, :0], targets, c))
                weights += [1 / len(targets)] * len(targets)
            for i, part in enumerate(parts):
                text = sum(parts[i:], []) if i == k else part
                expected.append(continuation(llm, X, z[b, :min(i + 1, n)], text, c))
                targets += text
                sup = [1 / len(parts) / len(part)] * len(part)
                if i == k:
                    sup = [w + 1 / len(text) for w in sup + [0] * (len(text) - len(part))]
                weights += sup
            real = seq.loss_weight[b] > 0
            close(hidden[b][real], torch.cat(expected))
            assert seq.target[b][real].tolist() == targets
            close(seq.loss_weight[b][real], torch.tensor(weights), 1e-7)
            assert sum(weights) == pytest.approx(2 if n else 1)


def test_the_chunk_to_follow_is_drawn_evenly_and_anew():
    batch = random_batch([7, 0, 4] * 100)
    drawn = np.array([draw_followed(batch, 2, seed=0, step=step) for step in range(50)])
    for row, n in (0, 4), (1, 0), (2, 2):
        values, counts = np.unique(drawn[:, row::3], return_counts=True)
        assert values.tolist() == list(range(-1, n))
        mean = 5000 / (n + 1)
        assert (np.abs(counts - mean) < 5 * np.sqrt(mean)).all()
    assert (drawn[3] == draw_followed(batch, 2, seed=0, step=3)).all()
    assert (drawn[3] != draw_followed(batch, 2, seed=1, step=3)).any()
    assert (drawn[3] != drawn[4]).any()
    parts = [draw_followed(random_batch([7, 0] * 50), 2, 0, 3, rank, 2) for rank in (0, 1)]
    whole = draw_followed(random_batch([7, 7, 0, 0] * 50), 2, 0, 3)
    assert (np.stack(parts, 1).ravel() == whole).all()  # two processes draw what one does
    half = draw_followed(batch, 2, seed=0, step=3, from_start=0.5)[::3]
    assert 35 < (half == -1).sum() < 85 and set(half) == {-1, 0, 1, 2, 3}


@pytest.mark.parametrize("c", SIZES)
def test_no_position_is_beyond_the_longest_problem(c):
    """A problem is kept if X S Ans, S in whole chunks, fits; then every layout of it fits too."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        batch = random_batch(rng.integers(0, 9, 5), seed)
        x, s, a = batch.lengths
        n = count_chunks(s, c)
        longest = (x + n * c + a).max()
        followed = [llm_batch(batch, c, k) for k in some_followed(n)]
        for seq in (encoder_batch(batch, c, VOCAB.sum), llm_batch(batch, c), latent_batch(batch, c),
                    explicit_batch(batch), *followed):
            assert 0 <= seq.pos.min() and seq.pos.max() < longest
            for index in (seq.predict_index, seq.summary_index):
                assert ((0 <= index) & (index < seq.ids.size(1))).all()
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


# -------------------------------------------------------------------------------------------- masks

@pytest.mark.parametrize("c", SIZES)
@pytest.mark.parametrize("follow", [None, -1, 0, 1])
def test_no_chunk_reads_the_text_of_another(c, follow):
    """Change one text of the sequence: nothing outside it moves, by as much as a bit."""
    llm = tiny(1)
    n = count_chunks(9, c)
    seq = llm_batch(random_batch([9, 5, 0]), c, follow if follow is None else [follow, 0, -1])
    z = random_latents(seq)

    def run(ids):
        x = insert_latents(llm.wte(ids), z, seq.latent)
        return llm(x, seq.pos, supervision_mask(seq.segment))

    before = run(seq.ids)
    texts = set(seq.segment[0].tolist()) - {0}  # of the first row, of nine tokens
    assert len(texts) == n + (follow == -1)
    for text in texts:
        own = seq.segment == text
        own[1:] = False
        after = run(torch.where(own, (seq.ids + 1) % VOCAB.n_ordinary, seq.ids))
        assert torch.equal(before[~own], after[~own])
        assert (before[own] != after[own]).any(1).all()


def test_a_latent_reaches_all_that_follows_it():
    llm = tiny(1)
    seq = llm_batch(random_batch([8]), 2)
    z = torch.randn(1, 4, 16, dtype=torch.float64)

    def run(z):
        x = insert_latents(llm.wte(seq.ids), z, seq.latent)
        return llm(x, seq.pos, supervision_mask(seq.segment))

    before = run(z)
    real = seq.pos[0] > 0
    for i in range(4):
        other = z.clone()
        other[0, i] += 1
        moved = (run(other) != before).any(2)[0]
        later = torch.arange(len(moved)) >= (seq.latent[0] == i + 1).nonzero()[0, 0]
        assert torch.equal(moved & real, later & real)


def test_a_sum_is_seen_by_itself_alone():
    encoder = tiny(0)
    enc = encoder_batch(random_batch([8, 3]), 2, VOCAB.sum)
    mask = induction_mask(enc.segment)
    before = encoder(encoder.wte(enc.ids), enc.pos, mask)
    for slot in enc.summary_index[0]:
        ids = enc.ids.clone()
        ids[0, slot] = 3
        moved = (encoder(encoder.wte(ids), enc.pos, mask) != before).any(2)
        assert moved.nonzero().tolist() == [[0, slot]]


def test_masks_as_they_are_drawn():
    def mask(picture):
        lines = picture.strip().splitlines()
        return torch.tensor([[mark == "■" for mark in line.split()] for line in lines])

    segment = torch.tensor([[0, 0, -1, 0, 0, -1]])
    assert torch.equal(induction_mask(segment)[0], mask("""
        ■ · · · · ·
        ■ ■ · · · ·
        ■ ■ ■ · · ·
        ■ ■ · ■ · ·
        ■ ■ · ■ ■ ·
        ■ ■ · ■ ■ ■"""))
    segment = torch.tensor([[0, 0, 1, 1, 0, 2, 0, 3]])
    latent = torch.tensor([[0, 1, 0, 0, 2, 0, 3, 0]])
    assert torch.equal(supervision_mask(segment)[0], mask("""
        ■ · · · · · · ·
        ■ ■ · · · · · ·
        ■ ■ ■ · · · · ·
        ■ ■ ■ ■ · · · ·
        ■ ■ · · ■ · · ·
        ■ ■ · · ■ ■ · ·
        ■ ■ · · ■ · ■ ·
        ■ ■ · · ■ · ■ ■"""))
    # --ltsum local: a chunk sees its z and itself; z and the answer see what they always see
    assert torch.equal(local_supervision_mask(segment, latent)[0], mask("""
        ■ · · · · · · ·
        ■ ■ · · · · · ·
        · ■ ■ · · · · ·
        · ■ ■ ■ · · · ·
        ■ ■ · · ■ · · ·
        · · · · ■ ■ · ·
        ■ ■ · · ■ · ■ ·
        ■ ■ · · ■ · ■ ■"""))
    # a text that is followed to the end, behind z₀, sees the same under both masks
    segment = torch.tensor([[0, 0, 4, 4, 0, 2, 0, 3]])
    assert torch.equal(local_supervision_mask(segment, latent)[0], mask("""
        ■ · · · · · · ·
        ■ ■ · · · · · ·
        ■ ■ ■ · · · · ·
        ■ ■ ■ ■ · · · ·
        ■ ■ · · ■ · · ·
        · · · · ■ ■ · ·
        ■ ■ · · ■ · ■ ·
        ■ ■ · · ■ · ■ ■"""))


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
    close(superpose(alpha, E), dense)
    close(superpose(alpha, E, VOCAB.n_ordinary), dense)
    close(superpose(alpha, E, 1000), dense)  # more than there are: all of them
    top = torch.where(alpha >= alpha.topk(4, 2).values[..., -1:], alpha, 0)
    close(superpose(alpha, E, 4), superpose(top / top.sum(2, keepdim=True), E))
    values, ids = top_k_renormalized(alpha, 4)
    close(values.sum(2), torch.ones(2, 3, dtype=torch.float64))
    assert torch.equal(ids, alpha.topk(4, 2).indices)


def test_special_and_padded_ids_get_no_mass():
    logits = torch.zeros(VOCAB.n_vocab)
    logits[VOCAB.n_ordinary:] = 100.0
    alpha = ordinary_softmax(logits, VOCAB.n_ordinary)
    close(alpha, torch.full((VOCAB.n_ordinary,), 1 / VOCAB.n_ordinary), 1e-7)
    E = torch.randn(VOCAB.n_vocab, 16)
    E[VOCAB.n_ordinary:] = float("nan")  # nor may their embeddings be touched
    assert superpose(alpha[None], E).isfinite().all()
    assert superpose(alpha[None], E, 7).isfinite().all()


def test_each_latent_is_inserted_where_it_stands():
    x = torch.randn(2, 6, 3)
    z = torch.randn(2, 2, 3)
    latent = torch.tensor([[0, 1, 0, 2, 0, 0], [0, 0, 0, 0, 1, 0]])
    expected = x.clone()
    expected[0, 1] = z[0, 0]
    expected[0, 3] = z[0, 1]
    expected[1, 4] = z[1, 0]
    assert torch.equal(insert_latents(x, z, latent), expected)
