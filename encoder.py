"""Chunks, summaries, superposition: how text becomes latent tokens, and how a model reads them.

The encoder is a GPT that reads the question X, then the chain of thought S cut into chunks S₀, S₁,
… of c tokens, each followed by the summary token L = <sum>. Its prediction at L_i, restricted to
the ordinary vocabulary (all tokens but the special ones), gives the latent token of chunk i:

    α_i = softmax(logits at L_i)     a distribution: a point of the simplex ΔV
    z_i = Σ_v α_i[v] · E[v]          a point in the convex hull of the LLM's input embeddings E

The LLM, another GPT, reads z_i in place of S_i. Each model handles all chunks of a problem in one
pass: a layout says which token is in which slot and at which position, and a mask (LTIM and LTSuM
in the paper) which slots it sees. This file goes from one problem's layout to a batch, then to the
masks, then to α and z.

    n = latent tokens of one problem, at most N in a batch; the other letters are those of model.py
"""
import itertools
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

# ------------------------------------------------------------------------------ problems, as tokens

class Tokens(NamedTuple):
    """One problem as lists of ids."""

    question: list  # X, which ends in <bot>
    chain: list     # S
    answer: list    # Ans, from <eot> to <|endoftext|>


class Batch(NamedTuple):
    """Some problems of a split."""

    rows: np.ndarray  # (B,) which
    problems: list    # their Tokens

    def some(self, index):
        """The Batch of those problems alone; index int (b,), in 0 … B − 1."""
        return Batch(self.rows[index], [self.problems[i] for i in index])


# --------------------------------------------------------------------- one problem: lists that grow

class Sequence:
    """One problem's sequence while it is laid out.

    ids, pos, segment and latent have one entry a slot. predict_index, target and loss_weight have
    one entry a predicted token, alpha_index one a latent token.
    """

    def __init__(self, question):
        self.ids = []            # token ids; 0 at a latent token, where `insert_latents` puts z
        self.pos = []            # positions
        self.segment = []        # which later slots see it: 0 all of them; i > 0 those of segment
                                 # i alone (S_i, or for i = n <eot> Ans); -1 none: a <sum>
        self.latent = []         # i + 1 at z_i, else 0
        self.predict_index = []  # slots whose logits predict a token: the slot before it,
        self.target = []         # that token,
        self.loss_weight = []    # and the weight of its −log p
        self.alpha_index = []    # slots whose logits give α_i: L_i in the encoder's sequence; in
                                 # the LLM's the slot before z_i, which phase 3 alone asks for
        self.add_text(question, pos=0)

    def add_text(self, tokens, pos, segment=0, loss_weight=0.0):
        """Append tokens at positions pos, pos + 1, …

        With a loss_weight each of them is predicted, the first from the slot before the text.
        """
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
        """Append the summary token L_i, at which the encoder predicts α_i."""
        self.alpha_index.append(len(self.ids))
        self.add_text([sum_id], pos, segment=-1)

    def add_latent(self, i, pos):
        """Append the latent token z_i; phase 3 predicts its α_i from the slot before it."""
        self.alpha_index.append(len(self.ids) - 1)
        self.add_text([0], pos)
        self.latent[-1] = i + 1


def split_chunks(tokens, c):
    """[S₀, S₁, …]: c tokens each; the last may be shorter."""
    return [tokens[i:i + c] for i in range(0, len(tokens), c)]


def count_chunks(length, c):
    """The number of chunks in a chain of `length` tokens (an int or an integer array)."""
    return -(-length // c)


def latent_pos(nx, i, c):
    """The position of z_i: that of its chunk's last token, after a question of nx tokens.

    So whatever follows a latent stands where it would stand in the text. A last chunk that is
    shorter counts as full: in decoding nobody knows its length.
    """
    return nx + c * (i + 1) - 1


def encoder_layout(question, chunks, sum_id):
    """The encoder's sequence in phases 1 and 2, a Sequence: X <bot> S₀ L₀ S₁ L₁ … S_{n-1} L_{n-1}.

        token     X  X  <bot>  a  b  L₀ c  d  L₁ e  L₂    chunks ab, cd, e
        position  0  1  2      3  4  5  5  6  7  7  8     the text counts as if there were no L;
        segment   0  0  0      0  0 -1  0  0 -1  0 -1     L_i has the position of the next token
    """
    row = Sequence(question)
    pos = len(question)
    for chunk in chunks:
        row.add_text(chunk, pos)
        pos += len(chunk)
        row.add_summary(sum_id, pos)
    return row


def sup_layout(question, chunks, answer, c):
    """The LLM's sequence of ℓ_sup, a Sequence: X <bot> z₀ [S₁] z₁ [S₂] … z_{n-1} <eot> Ans.

        token     X  X  <bot>  z₀ c  d  z₁ e  z₂ <eot> Ans    S₀ is read as z₀, never predicted;
        position  0  1  2      4  5  6  6  7  8  9     10     z₁ takes the place of c d, and e
        segment   0  0  0      0  1  1  0  2  0  3     3      goes on from there (c = 2)

    Each of S₁ … S_{n-1} and `answer`, which are <eot> and Ans, weighs 1/n, shared equally by its
    tokens. Without any chunk the sequence is X <bot> <eot> Ans.
    """
    row = Sequence(question)
    nx, n = len(question), len(chunks)
    if n == 0:
        row.add_text(answer, nx, loss_weight=1 / len(answer))
    for i, text in enumerate([*chunks, answer][1:]):  # after z_i S_{i+1}, after the last the answer
        pos = latent_pos(nx, i, c)
        row.add_latent(i, pos)
        row.add_text(text, pos + 1, segment=i + 1, loss_weight=1 / (n * len(text)))
    return row


def chain_layout(question, chain, answer, c, k):
    """The first k chunks as latents, the rest as text, causal, a Sequence:

        X <bot> z₀ … z_{k-1} S_k … S_{n-1} <eot> Ans

        token     X  X  <bot>  a  b  c  d  e  <eot> Ans    k = 0, all text: supervised fine-tuning
        position  0  1  2      3  4  5  6  7  8     9
        token     X  X  <bot>  z₀ c  d  e  <eot> Ans       k = 1: a continuation, in phase 1 (c = 2)
        position  0  1  2      4  5  6  7  8     9
        token     X  X  <bot>  z₀ z₁ z₂ <eot> Ans          k = n, all latents: phase 3
        position  0  1  2      4  6  8  9     10           (the last chunk counts as full)

    The tokens of the text share the weight 1.
    """
    row = Sequence(question)
    nx = len(question)
    for i in range(k):
        row.add_latent(i, latent_pos(nx, i, c))
    text = chain[c * k:] + answer
    row.add_text(text, latent_pos(nx, k - 1, c) + 1, loss_weight=1 / max(1, len(text)))
    return row


# -------------------------------------------------------------------------- a batch: padded tensors

class Layout(NamedTuple):
    """A batch of Sequences as int64 tensors (loss_weight: float32), padded on the right with 0."""

    ids: torch.Tensor            # (B, T)
    pos: torch.Tensor            # (B, T)
    segment: torch.Tensor        # (B, T)
    latent: torch.Tensor         # (B, T)
    predict_index: torch.Tensor  # (B, P)
    target: torch.Tensor         # (B, P)
    loss_weight: torch.Tensor    # (B, P), 0 at padding
    alpha_index: torch.Tensor    # (B, N)
    n: torch.Tensor              # (B,) latent tokens, valid entries of alpha_index, in each row

    def to(self, device):
        return Layout(*(tensor.to(device, non_blocking=True) for tensor in self))

    def some(self, rows):
        return Layout(*(tensor[rows] for tensor in self))


def pad(rows, width, value=0, dtype=np.int64):
    """Lists of at most `width` entries as one tensor (B, width), filled up with `value`."""
    length = np.array([len(row) for row in rows])
    real = np.arange(width) < length[:, None]                       # (B, width)
    out = np.full((len(rows), width), value, dtype)
    out[real] = np.fromiter(itertools.chain.from_iterable(rows), dtype, length.sum())
    return torch.from_numpy(out)


def collate(rows):
    """The Layout of Sequences, as wide as the longest: T a multiple of 8, P and N at least 1.

    (Of eight, since a GPU multiplies matrices of such sizes faster.)
    """
    T = -(-max(len(row.ids) for row in rows) // 8) * 8
    P = max(1, *(len(row.target) for row in rows))
    N = max(1, *(len(row.alpha_index) for row in rows))
    return Layout(
        ids=pad([row.ids for row in rows], T),
        pos=pad([row.pos for row in rows], T),
        segment=pad([row.segment for row in rows], T),
        latent=pad([row.latent for row in rows], T),
        predict_index=pad([row.predict_index for row in rows], P),
        target=pad([row.target for row in rows], P),
        loss_weight=pad([row.loss_weight for row in rows], P, dtype=np.float32),
        alpha_index=pad([row.alpha_index for row in rows], N),
        n=torch.tensor([len(row.alpha_index) for row in rows]))


# Each of the next functions lays out the problems of a Batch, with c tokens in a chunk: a Layout.

def encoder_batch(batch, c, sum_id):
    return collate([encoder_layout(p.question, split_chunks(p.chain, c), sum_id)
                    for p in batch.problems])


def sup_batch(batch, c):
    return collate([sup_layout(p.question, split_chunks(p.chain, c), p.answer, c)
                    for p in batch.problems])


def chain_batch(batch, c, k):
    """k int (B,): how many of its chunks each problem has as latents."""
    return collate([chain_layout(*p, c, latents) for p, latents in zip(batch.problems, k)])


def text_batch(batch):
    """No latents: X <bot> S <eot> Ans."""
    return chain_batch(batch, 1, [0] * len(batch.problems))


def latent_batch(batch, c, n):
    """No text of the chain: X <bot> z₀ … z_{n-1} <eot> Ans.

    n int (B,): each problem's latents, fewer than its chunks where steps share a place
    (compress.py).
    """
    return collate([chain_layout(p.question, [], p.answer, c, latents)
                    for p, latents in zip(batch.problems, n)])


# ------------------------------------------------------------ what training draws and compares with

DRAWS = {"continuations": 1, "noise": 3, "on-policy": 4}


def generator(seed, step, what):
    """Random numbers for one of DRAWS: a function of (seed, step), so that resuming repeats it."""
    return np.random.default_rng([seed, step, DRAWS[what]])


def draw_rows(rng, B, share):
    """A share of the rows 0 … B − 1 at random, int64 (b,)."""
    return rng.permutation(B)[:round(share * B)]


def draw_continuations(batch, c, share, seed, step):
    """Which problems of a batch are continued, and after how many latents: (rows, k), int64 arrays.

    rows   `share` of the batch's, at random
    k      0 … n for each of them, few more often than many: a share sqrt(x) has at most x·(n + 1)
    """
    rng = generator(seed, step, "continuations")
    rows = draw_rows(rng, len(batch.problems), share)
    n = np.array([count_chunks(len(p.chain), c) for p in batch.problems])[rows]
    k = ((n + 1) * rng.random(len(rows)) ** 2).astype(np.int64)
    return rows, k


def chunk_tokens(chains, c):
    """Each chunk's tokens, int64 (B, N, c), -1 past its end. chains: B lists."""
    N = max(1, count_chunks(max(map(len, chains)), c))
    return pad(chains, N * c, value=-1).view(-1, N, c)


# -------------------------------------------------------------------------------------------- masks

def causal_mask(layout):
    """bool (T, T): True where the row's slot may see the column's, here itself and all before."""
    T, device = layout.segment.size(1), layout.segment.device
    return torch.ones(T, T, dtype=torch.bool, device=device).tril()


def induction_mask(layout):
    """LTIM: causal, and no slot sees an earlier <sum>. A Layout of T slots -> bool (B, T, T).

              a  b  L₀ c  d  L₁          so the text is computed as if there were no L,
        a     ■                          and L₁ as if there were no L₀:
        b     ■  ■                       one pass equals n separate passes over X S₀ … S_i L_i
        L₀    ■  ■  ■
        c     ■  ■  ·  ■
        d     ■  ■  ·  ■  ■
        L₁    ■  ■  ·  ■  ■  ■
    """
    causal = causal_mask(layout)
    itself = torch.eye(len(causal), dtype=torch.bool, device=causal.device)
    return causal & ((layout.segment[:, None, :] >= 0) | itself)


def supervision_mask(layout):
    """LTSuM: causal, and a segment > 0 is seen by itself alone. A Layout -> bool (B, T, T).

              X  z₀ c  d  z₁ e  z₂ Ans
        X     ■
        z₀    ■  ■
        c     ■  ■  ■                    c d is chunk S₁, predicted from X and z₀
        d     ■  ■  ■  ■
        z₁    ■  ■  ·  ·  ■              a latent sees no text,
        e     ■  ■  ·  ·  ■  ■           and a chunk no other chunk's text: what
        z₂    ■  ■  ·  ·  ■  ·  ■        they know of it has come through the z
        Ans   ■  ■  ·  ·  ■  ·  ■  ■
    """
    key, query = layout.segment[:, None, :], layout.segment[:, :, None]
    return causal_mask(layout) & ((key == 0) | (key == query))


# ------------------------------------------------------------------------------------ superposition

def ordinary_softmax(logits, n_ordinary):
    """α, float32 (..., n_ordinary): the softmax over the ordinary ids 0 … n_ordinary - 1 alone."""
    return logits[..., :n_ordinary].float().softmax(-1)


def top_k_renormalized(alpha, k):
    """(values, ids): α's k largest entries, scaled to sum to 1, and their ids, both (..., K).

    If k is larger than their number, all are kept.
    """
    values, ids = alpha.topk(min(k, alpha.size(-1)), dim=-1)
    return values / values.sum(-1, keepdim=True), ids


def superpose(alpha, E, k=0):
    """z = Σ_v α[v]·E[v], over all v, or over the top k renormalized.

    alpha (..., n_ordinary), E (V, C) -> z (..., C).
    """
    if k:
        return superpose_sparse(*top_k_renormalized(alpha, k), E)
    return alpha @ E[:alpha.size(-1)].to(alpha.dtype)


def superpose_sparse(values, ids, E):
    """z from K entries of α: values (..., K), ids int64 (..., K), E (V, C) -> z (..., C)."""
    K = values.size(-1)
    values, shape = values.reshape(-1, K).to(E.dtype), values.shape[:-1]
    z = F.embedding_bag(ids.reshape(-1, K), E, per_sample_weights=values, mode="sum")
    return z.view(*shape, -1)  # (..., C)


def insert_latents(x, z, latent):
    """x (B, T, C) with z_i, of z (B, N, C), in the slots where `latent`, int64 (B, T), is i + 1."""
    index = (latent - 1).clamp(min=0)[:, :, None].expand(-1, -1, z.size(2))  # (B, T, C)
    return torch.where(latent[:, :, None] > 0, z.to(x.dtype).gather(1, index), x)


def summary_states(encoder, layout, mask_of=induction_mask):
    """The hidden states at all L of a batch, in one pass of the encoder: (B, N, C).

    layout is that of encoder_batch, mask_of a function of it. The entries past a row's n have no
    meaning.
    """
    x = encoder.wte(layout.ids)                                                # (B, T, C)
    return encoder(x, layout.pos, mask_of(layout), index=layout.alpha_index)


def alpha_and_latent(model, hidden, E, n_ordinary, top_k=0):
    """(α float32 (..., n_ordinary), z (..., C)) of a model's hidden states (..., C).

    The model is the encoder, or the LLM that thinks; E are the embeddings of the LLM that reads z,
    which is made of all α or of its `top_k` entries.
    """
    alpha = ordinary_softmax(model.head(hidden), n_ordinary)
    return alpha, superpose(alpha, E, top_k)


class Parts(NamedTuple):
    """The parts of the method that an ablation can replace, to see what each is for."""

    encoder_mask: Callable = induction_mask  # of a Layout
    llm_mask: Callable = supervision_mask    # of a Layout
    latent: Callable = alpha_and_latent      # (α, z) of hidden states
