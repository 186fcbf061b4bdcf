"""Chunks, summaries, superposition: how text becomes latent tokens, and how a model reads them.

The encoder is a GPT that reads the question X, then the chain of thought S cut into chunks of c tokens,
each followed by the summary token L = <sum>. Its prediction there, restricted to the ordinary vocabulary, is

    α_i = softmax(logits at L_i)          a point of the simplex ΔV          (paper, section 3.1)
    z_i = Σ_v α_i[v] · E[v]               the latent token, in the convex hull of the LLM's embeddings E

and the LLM, another GPT, reads z_i in place of chunk i. Both compute all chunks of a problem in one pass: a
layout says where each token is stored, and a mask what it sees.

    n = latent tokens of one problem, at most N in a batch; the other letters are those of model.py
"""
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

# ------------------------------------------------------------------------- one problem: lists that grow


class Sequence:
    """One problem's sequence while it is laid out: parallel lists, one entry a slot."""

    def __init__(self, question):
        self.ids = []            # token ids; 0 at a latent token, where `insert_latents` puts z
        self.pos = []            # positions
        self.segment = []        # whose text it is: 0 everyone may see; i > 0 text i; -1 a <sum>
        self.latent = []         # i + 1 where z_i stands, else 0
        self.predict_index = []  # slots at which a token is predicted,
        self.target = []         # that token,
        self.loss_weight = []    # and the weight of its −log p
        self.summary_index = []  # slots at which α_i is predicted
        self.add_text(question, pos=0)

    def add_text(self, tokens, pos, segment=0, loss_weight=0.0):
        """Tokens at positions pos, pos + 1, …; with a weight, each is predicted from the slot before it."""
        slot, n = len(self.ids), len(tokens)
        self.ids += tokens
        self.pos += range(pos, pos + n)
        self.segment += [segment] * n
        self.latent += [0] * n
        if loss_weight:
            self.predict_index += range(slot - 1, slot - 1 + n)
            self.target += tokens
            self.loss_weight += [loss_weight] * n

    def add_summary(self, sum_id, pos):
        """The summary token L_i."""
        self.summary_index.append(len(self.ids))
        self.ids.append(sum_id)
        self.pos.append(pos)
        self.segment.append(-1)
        self.latent.append(0)

    def add_latent(self, i, pos):
        """The latent token z_i; phase 3 predicts it from the slot before it."""
        self.summary_index.append(len(self.ids) - 1)
        self.ids.append(0)
        self.pos.append(pos)
        self.segment.append(0)
        self.latent.append(i + 1)


def split_chunks(tokens, c):
    """[S₀, S₁, …]: c tokens each, the last may be short."""
    return [tokens[i:i + c] for i in range(0, len(tokens), c)]


def count_chunks(length, c):
    """How many chunks of c tokens a chain of `length` tokens makes; int or array."""
    return -(-length // c)


def encoder_layout(question, chunks, sum_id):
    """Phases 1 and 2, the encoder's sequence (DESIGN 4): X <bot> S₀ L S₁ L … S_{n-1} L.

        token     X  X  <bot>  a  b  L₀ c  d  L₁ e  L₂        chunks of two tokens, the last short
        position  0  1  2      3  4  5  5  6  7  7  8         text counts as if there were no L;
        segment   0  0  0      0  0 -1  0  0 -1  0 -1         L_i stands where the next chunk begins
    """
    row = Sequence(question)
    pos = len(question)
    for chunk in chunks:
        row.add_text(chunk, pos)
        pos += len(chunk)
        row.add_summary(sum_id, pos)
    return row


def llm_layout(question, chunks, answer, follow=None, follow_weight=1.0):
    """Phase 1, the LLM's sequence (DESIGN 4): X <bot> z₀ [S₁] z₁ [S₂] … z_{n-1} <eot> Ans.

        token     X  X  <bot>  z₀ c  d  z₁ e  z₂ <eot> Ans    S₀ is never predicted, only its z read
        position  0  1  2      3  4  5  4  5  5  6     7      each chunk counts on from its z
        segment   0  0  0      0  1  1  0  2  0  3     3

    The weights are those of ℓ_sup: 1/n for every chunk predicted (the answer is the last of them),
    shared by its tokens. Without any chunk it is X <bot> <eot> Ans.

    With `follow` = k one text goes on to the end: behind z_k stands S_{k+1} … S_{n-1} <eot> Ans, or
    with k = −1 the whole chain behind <bot>. Its tokens share the weight follow_weight.

        token     X  X  <bot>  z₀ c  d  e <eot> Ans z₁ e  z₂ <eot> Ans               follow = 0
        position  0  1  2      3  4  5  6 7     8   4  5  5  6     7
        segment   0  0  0      0  4  4  4 4     4   0  2  0  3     3
    """
    row = Sequence(question)
    nx, n = len(question), len(chunks)
    if n == 0:
        row.add_text(answer, pos=nx, segment=1, loss_weight=1 / len(answer))
    elif follow == -1:
        text = sum(chunks, []) + answer
        row.add_text(text, pos=nx, segment=n + 1, loss_weight=follow_weight / len(text))
    for i in range(n):
        row.add_latent(i, pos=nx + i)
        pos, segment = nx + i + 1, i + 1
        text = chunks[i + 1] if i + 1 < n else answer
        loss_weight = 1 / (n * len(text))
        if i != follow:
            row.add_text(text, pos, segment, loss_weight)
            continue
        rest = sum(chunks[i + 2:], []) + answer if i + 1 < n else []
        followed = follow_weight / (len(text) + len(rest))
        row.add_text(text, pos, segment=n + 1, loss_weight=loss_weight + followed)
        row.add_text(rest, pos + len(text), segment=n + 1, loss_weight=followed)
    return row


def latent_layout(question, chunks, answer):
    """Phase 3 (DESIGN 6), plain causal: X <bot> z₀ z₁ … z_{n-1} <eot> Ans.

    Each z_i is predicted from the slot before it (`summary_index`), and so are <eot> and the answer.
    """
    row = Sequence(question)
    nx, n = len(question), len(chunks)
    for i in range(n):
        row.add_latent(i, pos=nx + i)
    row.add_text(answer, pos=nx + n, loss_weight=1 / len(answer))
    return row


def explicit_layout(question, chunks, answer, read=0):
    """Plain SFT, causal: X <bot> S <eot> Ans; S and Ans are predicted, all tokens with one weight.

    With `read` the first so many chunks stand there as latents, and the rest follows as text:

        token     X  X  <bot>  z₀ z₁ e  <eot> Ans             read = 2
        position  0  1  2      3  4  5  6     7
    """
    row = Sequence(question)
    nx = len(question)
    for i in range(read):
        row.add_latent(i, pos=nx + i)
    text = sum(chunks[read:], []) + answer
    row.add_text(text, pos=nx + read, loss_weight=1 / len(text))
    return row


# ------------------------------------------------------------------------------- a batch: padded tensors

class Layout(NamedTuple):
    """A batch of sequences, int64 but for loss_weight; padding is 0, and has weight 0."""

    ids: torch.Tensor            # (B, T)
    pos: torch.Tensor            # (B, T)
    segment: torch.Tensor        # (B, T)
    latent: torch.Tensor         # (B, T)
    predict_index: torch.Tensor  # (B, P)
    target: torch.Tensor         # (B, P)
    loss_weight: torch.Tensor    # (B, P) float32
    summary_index: torch.Tensor  # (B, N)
    n: torch.Tensor              # (B,) latent tokens in each row

    def to(self, device):
        return Layout(*(tensor.to(device, non_blocking=True) for tensor in self))


def pad(rows, width, value=0, dtype=np.int64):
    """Lists of different length as one tensor (B, width), padded on the right with `value`."""
    length = np.array([len(row) for row in rows])
    real = np.arange(width) < length[:, None]                       # (B, width)
    out = np.full((len(rows), width), value, dtype)
    out[real] = np.fromiter(chain.from_iterable(rows), dtype, length.sum())
    return torch.from_numpy(out)


def collate(rows, T, P=1, N=1):
    """The Layout of a batch of Sequences; T slots (rounded up to 8), P predictions, N latents at least 1."""
    T, P, N = -(-int(T) // 8) * 8, max(1, int(P)), max(1, int(N))
    return Layout(
        ids=pad([row.ids for row in rows], T),
        pos=pad([row.pos for row in rows], T),
        segment=pad([row.segment for row in rows], T),
        latent=pad([row.latent for row in rows], T),
        predict_index=pad([row.predict_index for row in rows], P),
        target=pad([row.target for row in rows], P),
        loss_weight=pad([row.loss_weight for row in rows], P, dtype=np.float32),
        summary_index=pad([row.summary_index for row in rows], N),
        n=torch.tensor([len(row.summary_index) for row in rows]))


# Each of the following lays out the problems of a data.Batch with c tokens in a chunk. The widths are those
# of the batch's bucket: x, s, a are the token counts of all its problems, n those of their chunks.

def encoder_batch(batch, c, sum_id):
    x, s, _ = batch.bucket
    n = count_chunks(s, c)
    rows = [encoder_layout(p.question, split_chunks(p.chain, c), sum_id) for p in batch.problems]
    return collate(rows, T=(x + s + n).max(), N=n.max())


def llm_batch(batch, c, follow=None, follow_weight=1.0):
    """follow int (B,): the k of each row's llm_layout; None, or weight 0: nothing is followed."""
    x, s, a = batch.bucket
    n, text = count_chunks(s, c), np.maximum(s - c, 0) + a  # S₀ is not in it
    if follow is None or not follow_weight:
        follow = [None] * len(batch.problems)
    else:
        text = text + s + a
    rows = [llm_layout(p.question, split_chunks(p.chain, c), p.answer, k, follow_weight)
            for p, k in zip(batch.problems, follow)]
    return collate(rows, T=(x + n + text).max(), P=text.max(), N=n.max())


def latent_batch(batch, c):
    x, s, a = batch.bucket
    n = count_chunks(s, c)
    rows = [latent_layout(p.question, split_chunks(p.chain, c), p.answer) for p in batch.problems]
    return collate(rows, T=(x + n + a).max(), P=a.max(), N=n.max())


def explicit_batch(batch, c=1, read=None):
    """read int (B,): how many chunks of each row stand there as latents; None: no chunk."""
    x, s, a = batch.bucket
    read = [0] * len(batch.problems) if read is None else read
    rows = [explicit_layout(p.question, split_chunks(p.chain, c), p.answer, k)
            for p, k in zip(batch.problems, read)]
    return collate(rows, T=(x + s + a).max(), P=(s + a).max(), N=count_chunks(s, c).max())


def draw_chunk(batch, c, seed, step, rank=0, world=1, none=0.0):
    """int64 (B,): for each problem the last chunk that is read as a latent before text goes on.

    With probability `none` it is −1, no chunk at all; else −1 … n−1, drawn evenly. A function of
    (seed, step), so that a resumed run draws the same.
    """
    n = np.array([count_chunks(len(p.chain), c) for p in batch.problems])
    rng = np.random.default_rng([seed, step, 1])
    u = rng.random((2, len(n) * world))[:, rank::world]
    chunk = (u[0] * (n + 1)).astype(np.int64) - 1
    return np.where(u[1] < none, -1, chunk)


def chunk_bags(batch, c):
    """int64 (B, N, c): each chunk's tokens, -1 past its end; no wider than the bucket's longest chain."""
    longest = max(1, int(batch.bucket[1].max()))
    c = min(c, longest)
    N = count_chunks(longest, c)
    return pad([p.chain for p in batch.problems], N * c, value=-1).view(-1, N, c)  # (B, N, c)


# ----------------------------------------------------------------------------------------------- masks

def causal_mask(T, device):
    """bool (T, T): True where the slot of the row may see the slot of the column."""
    return torch.ones(T, T, dtype=torch.bool, device=device).tril()


def induction_mask(segment):
    """LTIM: causal, and no slot sees an earlier <sum>. segment (B, T) -> bool (B, T, T).

              a  b  L₀ c  d  L₁          so the text is computed as if there were no L,
        a     ■                          and L₁ as if L₀ had never been:
        b     ■  ■                       one pass equals n separate passes
        L₀    ■  ■  ■
        c     ■  ■  ·  ■
        d     ■  ■  ·  ■  ■
        L₁    ■  ■  ·  ■  ■  ■
    """
    T = segment.size(1)
    itself = torch.eye(T, dtype=torch.bool, device=segment.device)
    return causal_mask(T, segment.device) & ((segment[:, None, :] >= 0) | itself)


def supervision_mask(segment):
    """LTSuM: causal, and text is seen by its own segment alone. segment (B, T) -> bool (B, T, T).

              X  z₀ c  d  z₁ e  z₂ Ans
        X     ■
        z₀    ■  ■
        c     ■  ■  ■                    c d is chunk S₁, predicted from X z₀
        d     ■  ■  ■  ■
        z₁    ■  ■  ·  ·  ■              a latent sees no text,
        e     ■  ■  ·  ·  ■  ■           nor does a chunk see another's:
        z₂    ■  ■  ·  ·  ■  ·  ■        all they know of it is in the z
        Ans   ■  ■  ·  ·  ■  ·  ■  ■
    """
    key, query = segment[:, None, :], segment[:, :, None]
    return causal_mask(segment.size(1), segment.device) & ((key == 0) | (key == query))


def local_supervision_mask(segment, latent):
    """Ablation, as in the authors' code: a chunk sees the z before it and itself, nothing else.

    The latents, the answer and a text that is followed to the end see what they see under
    `supervision_mask`. latent (B, T) as in Layout.
    """
    key, query = segment[:, None, :], segment[:, :, None]
    n = latent.amax(1)[:, None, None]
    next_chunk = (query > 0) & (query < n)
    own_latent = latent[:, None, :] == query  # z_i, stored as i + 1, is followed by text i + 1
    return supervision_mask(segment) & (~next_chunk | (key == query) | own_latent)


# --------------------------------------------------------------------------------------- superposition

def ordinary_softmax(logits, n_ordinary):
    """α: float32 (..., n_ordinary), the softmax over the ordinary vocabulary; other ids get no mass."""
    return logits[..., :n_ordinary].float().softmax(-1)


def top_k_renormalized(alpha, k):
    """(values, ids) (..., K): α's k largest entries, scaled to sum to 1. k = 0, or beyond V: all of them."""
    values, ids = alpha.topk(min(k or alpha.size(-1), alpha.size(-1)), dim=-1)
    return values / values.sum(-1, keepdim=True), ids


def superpose(alpha, E, k=0):
    """z = Σ_v α[v]·E[v], over the whole vocabulary or the top k. alpha (..., V), E (≥V, C) -> (..., C)."""
    if k:
        return superpose_sparse(*top_k_renormalized(alpha, k), E)
    return alpha @ E[:alpha.size(-1)].to(alpha.dtype)


def superpose_sparse(values, ids, E):
    """The same from K stored entries: values (..., K), ids (..., K), E (V, C) -> z (..., C)."""
    K = values.size(-1)
    values, shape = values.reshape(-1, K).to(E.dtype), values.shape[:-1]
    z = F.embedding_bag(ids.reshape(-1, K), E, per_sample_weights=values, mode="sum")
    return z.view(*shape, -1)  # (..., C)


def bag_weights(bag, dtype=torch.float32):
    """The weights of a chunk's tokens in its bag: (B, N, c), falling, of sum 1; 0 past its end.

    They fall as m, m − 1, …, 1 over a chunk of m tokens, so that a bag still tells their order.
    bag int64 (B, N, c): the chunks' tokens, -1 past their ends.
    """
    real = bag >= 0                                                       # (B, N, c)
    rank = real.sum(2, keepdim=True) - torch.arange(bag.size(2), device=bag.device)
    weight = rank.clamp(min=0).to(dtype)                                  # (B, N, c)
    return weight / weight.sum(2, keepdim=True).clamp(min=1)


def superpose_bags(bag, E):
    """The plainest z, made without an encoder: α is the chunk's bag. (B, N, c) -> (B, N, C)."""
    return superpose_sparse(bag_weights(bag, E.dtype), bag.clamp(min=0), E)


def insert_latents(x, z, latent):
    """The embeddings x (B, T, C) with z_i of z (B, N, C) wherever `latent` (B, T) is i + 1."""
    index = (latent - 1).clamp(min=0)[:, :, None].expand(-1, -1, z.size(2))  # (B, T, C)
    return torch.where(latent[:, :, None] > 0, z.to(x.dtype).gather(1, index), x)


def summarize(encoder, layout, n_ordinary):
    """All summaries of a batch in one pass: α float32 (B, N, n_ordinary); past a row's n: anything."""
    x = encoder.wte(layout.ids)  # (B, T, C)
    mask = induction_mask(layout.segment)
    hidden = encoder(x, layout.pos, mask, index=layout.summary_index)  # (B, N, C)
    return ordinary_softmax(encoder.head(hidden), n_ordinary)
