"""Chunks, summaries, superposition: how text becomes latent tokens, and how a model reads and writes them.

The encoder is a GPT that reads the question X, then the chain of thought S cut into chunks of c tokens, each
followed by the summary token L = <sum>. Its prediction there, restricted to the ordinary vocabulary, is

    α_i = softmax(logits at L_i)          a point of the simplex ΔV          (paper, section 3.1)
    z_i = Σ_v α_i[v] · E[v]               the latent token, in the convex hull of the LLM's embeddings E

and the LLM, another GPT, reads z_i in place of chunk i. Both models compute all their chunks in one pass: the
layouts below say where each token is stored, and the masks what it sees.

    n = number of chunks, at most N in a batch     seg, latent, at, …: see Layout     other letters: model.py
"""
import functools
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from data import to_number
from model import KVCache

# ------------------------------------------------------------------------------------------------- layouts


class Layout(NamedTuple):
    """Where everything is in a batch of sequences, int64 but for weight. Padding is ids 0 with weight 0."""

    ids: torch.Tensor     # (B, T) tokens; at a latent token whatever, its vector is placed there
    pos: torch.Tensor     # (B, T) positions
    seg: torch.Tensor     # (B, T) whose text it is: 0 what everyone may see, i chunk i's, n (at least 1) the answer's; -1 a <sum>
    latent: torch.Tensor  # (B, T) i + 1 where z_i stands, else 0
    at: torch.Tensor      # (B, P) where something is predicted,
    target: torch.Tensor  # (B, P) what,
    weight: torch.Tensor  # (B, P) float32: and its weight in the loss; a row's weights sum to 1
    mark: torch.Tensor    # (B, N) where the <sum> L_i stands (encoder), or the slot before z_i, which predicts it (phase 3)
    n: torch.Tensor       # (B,) latent tokens in this row

    def to(self, device):
        return Layout(*(t.to(device, non_blocking=True) for t in self))


def chunks(ns, c):
    """How many chunks of c tokens a chain of ns tokens makes; the last may be short."""
    return -(-ns // c)


def put(out, at, value, keep):
    """out[b, at[b, j]] = value[b, j] wherever keep[b, j]: one scatter, for all rows at once."""
    at, value = np.broadcast_to(at, keep.shape), np.broadcast_to(value, keep.shape)
    b, j = keep.nonzero()
    out[b, at[b, j]] = value[b, j]


def encoder_layout(batch, c, sum_id):
    """Phase 1 and 2, the encoder's sequence (DESIGN 4), for chunks S₀ S₁ S₂ of two tokens, the last short:

        token     X  X  <bot>  a  b  L₀ c  d  L₁ e  L₂
        position  0  1  2      3  4  5  5  6  7  7  8      text counts as if there were no L;
        seg       0  0  0      0  0 -1  0  0 -1  0 -1      L_i stands where the next chunk begins
    """
    nx, ns, n = batch.nx[:, None], batch.ns[:, None], chunks(batch.ns, c)[:, None]
    B, N = len(batch.rows), max(1, -(-batch.s.shape[1] // c))
    T = batch.width(lambda nx, ns, na: nx + ns + chunks(ns, c))
    ids, pos, seg = np.zeros((3, B, T), np.int64)
    x, j, i = np.arange(batch.x.shape[1]), np.arange(batch.s.shape[1]), np.arange(N)
    read = np.minimum((i + 1) * c, ns)  # (B, N) chain tokens up to the end of chunk i
    put(ids, x, batch.x, x < nx)
    put(pos, x, x, x < nx)
    put(ids, nx + j + j // c, batch.s, j < ns)
    put(pos, nx + j + j // c, nx + j, j < ns)
    put(ids, nx + read + i, sum_id, i < n)
    put(pos, nx + read + i, nx + read, i < n)
    put(seg, nx + read + i, -1, i < n)
    none = np.zeros((B, 0), np.int64)
    return layout(ids, pos, seg, np.zeros_like(ids), none, none, none.astype(np.float32), (nx + read + i) * (i < n), n)


def llm_layout(batch, c, text=True):
    """Phase 1, the LLM's sequence (DESIGN 4). The first chunk is never predicted, only its summary read:

        token     X  X  <bot>  z₀ c  d  z₁ e  z₂ <eot> Ans
        position  0  1  2      3  4  5  4  5  5  6     7       each chunk counts on from its z
        seg       0  0  0      0  1  1  0  2  0  3     3

    Phase 3 (text=False) is the same without the chunks, X <bot> z₀ z₁ z₂ <eot> Ans, and plain causal. With no
    chunks at all it is the no-CoT sequence X <bot> <eot> Ans.
    Weights are those of ℓ_sup: 1/n for every chunk predicted (the answer is the last), shared by its tokens.
    """
    nx, ns, na, n = batch.nx[:, None], batch.ns[:, None], batch.na[:, None], chunks(batch.ns, c)[:, None]
    B, N = len(batch.rows), max(1, -(-batch.s.shape[1] // c))
    if text:
        T = batch.width(lambda nx, ns, na: nx + np.maximum(ns - c, 0) + chunks(ns, c) + na)
    else:
        T = batch.width(lambda nx, ns, na: nx + chunks(ns, c) + na)
    ids, pos, seg, latent = np.zeros((4, B, T), np.int64)
    x, i, a = np.arange(batch.x.shape[1]), np.arange(N), np.arange(batch.a.shape[1])
    j = np.arange(c, max(c, batch.s.shape[1])) if text else np.arange(0)  # the chain's tokens from chunk 1 on
    written = np.minimum(i * c, np.maximum(ns - c, 0)) if text else 0     # (B, N) of them, those before z_i
    z_at, s_at = nx + written + i, nx + j - c + j // c
    a_at = nx + (np.maximum(ns - c, 0) if text else 0) + n + a
    put(ids, x, batch.x, x < nx)
    put(pos, x, x, x < nx)
    put(pos, z_at, nx + i, i < n)
    put(latent, z_at, i + 1, i < n)
    put(ids, s_at, batch.s[:, c:] if text else 0, j < ns)
    put(pos, s_at, nx + j // c + j % c, j < ns)
    put(seg, s_at, j // c, j < ns)
    put(ids, a_at, batch.a, a < na)
    put(pos, a_at, nx + n + a, a < na)
    put(seg, a_at, np.maximum(n, 1), a < na)
    share = n if text else 1  # the number of things predicted; n = 0: the answer alone
    s_weight = (j < ns) / np.maximum(n * np.minimum(c, ns - j // c * c), 1)
    a_weight = (a < na) / (np.maximum(share, 1) * na)
    keep = np.concatenate([np.broadcast_to(j < ns, (B, len(j))), a < na], 1)
    at = np.concatenate([s_at, a_at], 1) - 1  # a token is predicted where the one before it stands
    target = np.concatenate([batch.s[:, c:] if text else batch.s[:, :0], batch.a], 1)
    return layout(ids, pos, seg, latent, at * keep, target * keep,
                  np.concatenate([s_weight, a_weight], 1).astype(np.float32), (z_at - 1) * (i < n), n)


def explicit_layout(batch, c=1, cut=None):
    """Plain SFT: X <bot> S <eot> Ans, causal; S and Ans are predicted, all with the same weight.

    With cut int64 (B,), the first cut[b] chunks of c tokens stand there as latents, and the rest follows as text:

        token     X  X  <bot>  z₀ z₁ e  <eot> Ans        cut = 2
        position  0  1  2      3  4  5  6     7
    """
    nx, ns, na = batch.nx[:, None], batch.ns[:, None], batch.na[:, None]
    k = np.zeros_like(nx) if cut is None else cut[:, None]
    read = np.minimum(k * c, ns)  # tokens of the chain that the latents stand for
    B, T = len(batch.rows), batch.width(lambda nx, ns, na: nx + ns + na)
    ids, latent = np.zeros((2, B, T), np.int64)
    x, j, a = (np.arange(part.shape[1]) for part in (batch.x, batch.s, batch.a))
    s_at, a_at, text = nx + k + j - read, nx + k + ns - read + a, (j >= read) & (j < ns)
    put(ids, x, batch.x, x < nx)
    put(latent, nx + j, j + 1, j < k)
    put(ids, s_at, batch.s, text)
    put(ids, a_at, batch.a, a < na)
    zero, pos = np.zeros_like(ids), np.minimum(np.arange(T), nx + k + ns - read + na - 1)
    keep = np.concatenate([text, a < na], 1)
    at, target = np.concatenate([s_at, a_at], 1) - 1, np.concatenate([batch.s, batch.a], 1)
    weight = (keep / (ns - read + na)).astype(np.float32)
    return layout(ids, pos, zero, latent, at * keep, target * keep, weight, np.zeros((B, 1), np.int64), k)


def layout(*arrays):
    *rest, n = arrays
    return Layout(*(torch.from_numpy(a) for a in rest), torch.from_numpy(n[:, 0].copy()))


# --------------------------------------------------------------------------------------------------- masks

def causal_mask(T, device):
    return torch.ones(T, T, dtype=torch.bool, device=device).tril()


def induction_mask(seg):
    """LTIM: causal, and no position sees an earlier <sum>. seg (B, T) -> bool (B, T, T).

              a  b  L₀ c  d  L₁          so the text is computed as if there were no L,
        a     ■                          and L₁ as if L₀ had never been:
        b     ■  ■                       one pass equals n separate passes
        L₀    ■  ■  ■
        c     ■  ■  ·  ■
        d     ■  ■  ·  ■  ■
        L₁    ■  ■  ·  ■  ■  ■
    """
    T = seg.size(1)
    own = torch.eye(T, dtype=torch.bool, device=seg.device)
    return causal_mask(T, seg.device) & ((seg[:, None, :] >= 0) | own)


def supervision_mask(seg, latent=None):
    """LTSuM: causal, and text is seen by its own chunk alone. seg (B, T) -> bool (B, T, T).

              X  z₀ c  d  z₁ e  z₂ Ans
        X     ■
        z₀    ■  ■
        c     ■  ■  ■                    c d is chunk S₁, predicted from X z₀
        d     ■  ■  ■  ■
        z₁    ■  ■  ·  ·  ■              a latent sees no text,
        e     ■  ■  ·  ·  ■  ■           nor does a chunk see another's:
        z₂    ■  ■  ·  ·  ■  ·  ■        all they know of it is in the z
        Ans   ■  ■  ·  ·  ■  ·  ■  ■

    With `latent` (B, T), an ablation as in the authors' code: S_{i+1} sees z_i, the one before it, and itself, and
    neither X nor the earlier z.
    """
    key, query = seg[:, None, :], seg[:, :, None]
    visible = (key == 0) | (key == query)
    if latent is not None:
        last = latent[:, None, :].eq(query)  # z_i is stored as i + 1, the number of the chunk it predicts
        n = seg.amax(1)[:, None, None]
        visible &= (query == 0) | (query == n) | (key == query) | last
    return causal_mask(seg.size(1), seg.device) & visible


# ------------------------------------------------------------------------------------------- superposition

def ordinary_softmax(logits, n_ordinary):
    """α: float32 (..., n_ordinary), the softmax over the ordinary vocabulary; special and padded ids get nothing."""
    return logits[..., :n_ordinary].float().softmax(-1)


def keep_top(alpha, k):
    """(values, ids) (..., K): α's k largest entries, scaled to sum to 1. k = 0, or beyond V: all of them."""
    values, ids = alpha.topk(min(k or alpha.size(-1), alpha.size(-1)), dim=-1)
    return values / values.sum(-1, keepdim=True), ids


def superpose(alpha, E, k=0):
    """z = Σ_v α[v]·E[v], over the whole vocabulary or the top k. alpha (..., V), E (≥V, C) -> (..., C)."""
    if k:
        return superpose_sparse(*keep_top(alpha, k), E)
    return alpha @ E[:alpha.size(-1)].to(alpha.dtype)


def superpose_sparse(values, ids, E):
    """The same from K stored entries: values (..., K), ids (..., K), E (V, C) -> z (..., C)."""
    K = values.size(-1)
    z = F.embedding_bag(ids.reshape(-1, K), E, per_sample_weights=values.reshape(-1, K).to(E.dtype), mode="sum")
    return z.view(*values.shape[:-1], -1)  # (..., C)


def place(x, z, latent):
    """Put z (B, N, C) into the token embeddings x (B, T, C) where `latent` (B, T) says so: one gather."""
    if not z.size(1):  # no chain of thought at all: nothing to place
        return x
    which = (latent - 1).clamp(min=0)[:, :, None].expand(-1, -1, z.size(2))  # (B, T, C)
    return torch.where(latent[:, :, None] > 0, z.to(x.dtype).gather(1, which), x)


def summarize(encoder, enc, n_ordinary):
    """All summaries of a batch in one pass: Layout -> α, float32 (B, N, n_ordinary); past a row's n: noise."""
    hidden = encoder(encoder.wte(enc.ids), enc.pos, induction_mask(enc.seg), at=enc.mark)  # (B, N, C)
    return ordinary_softmax(encoder.head(hidden), n_ordinary)


# --------------------------------------------------------------------------------- decoding and evaluation

class Decoded(NamedTuple):
    tokens: list           # of each row, the ids written, special ones too, up to <|endoftext|>
    latents: torch.Tensor  # int64 (B,) latent steps taken
    capped: torch.Tensor   # bool (B,) stopped by a cap: of latents, of tokens, or of the model's positions


@torch.no_grad()
def decode(llm, tokenizer, x, length, latent=False, top_k=0, max_latents=0, max_tokens=64, watch=None):
    """Answer a batch of prompts, greedily: as text or in latents, all rows together on one KV cache.

    x, length    float (B, T, C) prompts padded on the right, int64 (B,) their lengths. A prompt ends with
                 <bot> or a z to have the model think on, or with <eot> after latents of your own
    latent       think in latent tokens: each step feeds z = Σ q[v]·E[v], q the next-token distribution over the
                 ordinary vocabulary (or its `top_k`), until argmax q is <eot>; then text, as everyone
    max_*        caps on latent steps and on tokens; a row that meets one is marked in `capped`. A chain of
                 latents that is cut off is given its <eot>, and then answers
    watch        called at every latent step as watch(step, q (B, n_ordinary), rows (B,) bool)

    A row is stored at the slots every row uses, but stands at its own positions; padding is never visible.
    Each step feeds one vector a row and encodes nothing again.
    """
    B, T, _ = x.shape
    device, t = x.device, tokenizer
    steps = min((max_latents if latent else 0) + max_tokens, llm.config.block_size - int(length.min()))
    auto = torch.is_autocast_enabled(device.type)  # keys and values come in autocast's dtype: store them so
    dtype = torch.get_autocast_dtype(device.type) if auto else llm.wte.weight.dtype
    cache = KVCache(llm.config, B, T + max(steps, 0), device, dtype)
    slots = torch.arange(T + max(steps, 0), device=device)
    visible = (slots < length[:, None]) | (slots >= T)  # (B, S): the prompt's own slots, and those to come
    pos = slots[:T].clamp(max=llm.config.block_size - 1)  # padding may reach beyond the last position
    logits = llm.head(llm(x, pos, cache=cache, at=(length - 1)[:, None]))[:, 0]  # (B, V)
    thinking = torch.full((B,), bool(latent), device=device)
    done, capped = torch.zeros(B, dtype=torch.bool, device=device), torch.zeros(B, dtype=torch.bool, device=device)
    latents, written = torch.zeros(2, B, dtype=torch.int64, device=device)
    out = []
    for step in range(steps + 1):
        token = logits.argmax(1)  # (B,)
        cut = thinking & (token != t.eot) & (latents >= max_latents)
        capped |= cut
        token = token.masked_fill(cut, t.eot)
        thinking &= token != t.eot
        out.append(torch.where(thinking | done, -1, token))
        written += ~(thinking | done)
        done |= ~thinking & (token == t.eos)
        spent = ~done & ((length + step >= llm.config.block_size) | (written >= max_tokens) | (step == steps))
        capped |= spent
        done |= spent
        if done.all():
            break
        x = llm.wte(token)  # (B, C)
        if latent and thinking.any():
            q = ordinary_softmax(logits, t.n_ordinary)
            if watch:
                watch(step, q, thinking & ~done)
            x = torch.where(thinking[:, None], superpose(q, llm.wte.weight, top_k).to(x.dtype), x)
            latents += thinking & ~done
        pos = (length + step).clamp(max=llm.config.block_size - 1)[:, None]  # (B, 1); a row that is done stays
        logits = llm.head(llm(x[:, None], pos, visible[:, None, :T + step + 1], cache))[:, 0]
    out = torch.stack(out, 1).tolist()
    return Decoded([[i for i in row if i >= 0 and i != t.eos] for row in out], latents, capped)


@torch.no_grad()
def evaluate(llm, problems, env, thought, caps, encoder=None, chunk_size=0, top_k=0, limit=None, batch_size=None,
             prompt=None, watch=None):
    """Decode a split and score the answers.

    thought  'text': the model writes on from X (explicit CoT, no-CoT); 'latent': it thinks in latents;
             'gold': it is given the encoder's summaries of the true chain, and <eot>
    caps     (latents, tokens)
    prompt   called as prompt(batch): (x, length) as `decode` takes them, in place of X <bot>
    watch    called as watch(batch, …) where `decode` calls its own
    Returns accuracy, steps (mean between question and answer), capped, unparseable (counts), seconds, and answers,
    {row: (text, right, its ids)}.
    """
    t, start, answers, steps, capped, unparseable = env.tokenizer, time.time(), {}, 0, 0, 0
    batch_size = batch_size or (64 if thought == "gold" else 256)  # gold: (B, N, V) is large where V is
    for batch in problems.eval_batches(batch_size, limit):
        with env.autocast():
            if prompt:
                x, length = prompt(batch)
            elif thought == "gold":
                x, length = gold_prompt(llm, encoder, batch, env, chunk_size, top_k)
            else:
                x, length = llm.wte(torch.from_numpy(batch.x).to(env.device)), torch.from_numpy(batch.nx).to(env.device)
            out = decode(llm, t, x, length, thought == "latent", top_k, *caps, watch and functools.partial(watch, batch))
        capped += int(out.capped.sum())
        for row, tokens, latents in zip(batch.rows.tolist(), out.tokens, out.latents.tolist()):
            text = t.decode(tokens)
            number = to_number(text)
            unparseable += number is None
            answers[row] = (text, number == to_number(problems.problems[row]["answer"]), tokens)
            if thought == "text":
                latents = tokens.index(t.eot) if t.eot in tokens else len(tokens)
            elif thought == "gold":
                latents = int(chunks(problems.s.length[row], chunk_size))
            steps += latents
    n = len(answers)
    return dict(accuracy=sum(right for _, right, _ in answers.values()) / n, steps=steps / n, capped=capped,
                unparseable=unparseable, seconds=time.time() - start, answers=answers)


def gold_prompt(llm, encoder, batch, env, c, top_k):
    """X <bot> z₀ … z_{n-1} <eot> as (embeddings, lengths): the true chain, summarized."""
    enc, seq = encoder_layout(batch, c, env.tokenizer.sum).to(env.device), llm_layout(batch, c, text=False).to(env.device)
    z = superpose(summarize(encoder, enc, env.tokenizer.n_ordinary), llm.wte.weight, top_k)
    return place(llm.wte(seq.ids), z, seq.latent), torch.from_numpy(batch.nx).to(env.device) + seq.n + 1
