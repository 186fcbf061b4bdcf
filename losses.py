"""The paper's equations: what the models minimise, and the passes that compute it.

    phase 1   ℓ_sup  = 1/n Σ_{i<n} 1/|J_i| Σ_{t∈J_i} −log p(x_t | …)             weighted_nll
              where J_i is chunk S_{i+1}, or <eot> Ans for i = n − 1, x_t its token at slot t,
              and … are X, z₀ … z_i and the tokens of J_i before t
    phase 3   L_auto = L_exp + L_lat
              L_exp  = mean over the tokens of <eot> Ans of −log q               weighted_nll
              L_lat  = mean over i of KL(p̃_i ‖ q_i)                              latent_kl
              p̃_i    = softmax(log α_i + g), g = scale · Gumbel(0, 1) noise      gumbel_perturb

Phase 1 adds two terms that the paper does not have:

              λ · 1/n Σ_i KL(bag(S_i) ‖ α_i)                                     bag_kl
              the mean −log p of S_k … S_{n-1} <eot> Ans after z₀ … z_{k-1}      weighted_nll

Each is a mean over a problem's tokens or latents, then over the batch. q is the LLM's next-token
distribution, and q_i that at the slot before z_i; the letters of the shapes are those of model.py.
"""
import numpy as np
import torch
import torch.nn.functional as F

from encoder import (alpha_and_latent, causal_mask, chain_batch, generator, insert_latents,
                     sup_batch, supervision_mask)


def mean_over_latents(loss, n):
    """The mean of loss (B, N) over a row's n latents, then over the batch; n (B,)."""
    real = torch.arange(loss.size(1), device=loss.device) < n[:, None]         # (B, N)
    return (loss.where(real, 0).sum(1) / n.clamp(min=1)).mean()


def weighted_nll(logits, target, weight):
    """Σ weight · −log p(target) in each row, mean over the batch.

    logits (B, P, V); target int64 (B, P); weight float32 (B, P), 0 at padding. The weights, a
    layout's `loss_weight`, say what it is a mean over: with those of encoder.sup_layout over the
    chunks, with those of chain_layout over the tokens.
    """
    logits = logits.flatten(0, 1).float()                                      # (B * P, V)
    nll = F.cross_entropy(logits, target.flatten(), reduction="none")          # (B * P,)
    return (nll * weight.flatten()).sum() / len(target)                        # of B rows


def bag_kl(alpha, chunks, n):
    """KL(bag_i ‖ α_i), mean over a row's n latents and the batch.

    bag_i is the distribution of a token drawn from chunk i. alpha (B, N, n_ordinary); chunks int64
    (B, N, c): the tokens, -1 past a chunk's end, from `encoder.chunk_tokens`; n (B,).
    """
    real = chunks >= 0                                                         # (B, N, c)
    size = real.sum(2).clamp(min=1)                                            # (B, N)
    log_alpha = alpha.gather(2, chunks.clamp(min=0)).clamp(min=1e-9).log()     # (B, N, c)
    count = (chunks[:, :, :, None] == chunks[:, :, None, :]).sum(3)            # (B, N, c)
    log_bag = (count / size[:, :, None]).log()                                 # (B, N, c)
    # Σ_v bag[v] · f(v) is the mean of f over the chunk's tokens, repeats included
    kl = (log_bag - log_alpha).where(real, 0).sum(2) / size                    # (B, N)
    return mean_over_latents(kl, n)


def gumbel_noise(seed, step, shape, scale=1.0):
    """scale · Gumbel(0, 1), float32: a function of (seed, step)."""
    rng = generator(seed, step, "noise")
    return torch.from_numpy(scale * rng.gumbel(size=shape).astype(np.float32))


def gumbel_perturb(values, noise):
    """p̃ = softmax(log α + g) over the K stored entries of α.

    values (the entries), noise (g): float32 (B, N, K) -> p̃ (B, N, K). Without noise p̃ is α.
    """
    return (values.clamp(min=1e-30).log() + noise).softmax(2)


def latent_kl(p, ids, logits, n):
    """L_lat: KL(p̃ ‖ q), mean over a row's n latents and the batch.

    p (B, N, K): p̃ on its K entries, ids int64 (B, N, K): the token of each; logits (B, N, V) of q,
    which is normalized over the whole vocabulary; n (B,). No dense p̃ of width V is needed, since
    the entries where p̃ is 0 contribute nothing.
    """
    logits = logits.float()
    log_q = logits.gather(2, ids) - logits.logsumexp(2, keepdim=True)          # (B, N, K)
    return mean_over_latents((torch.xlogy(p, p) - p * log_q).sum(2), n)


# ----------------------------------------------------------------- the passes that they are made of

def text_loss(llm, seq, z=None, mask_of=causal_mask):
    """The mean −log p of the text of a Layout, its latents z (B, N, C) being read where they stand.

    mask_of: a function of the Layout. With the layout of sup_batch and supervision_mask it is
    ℓ_sup; with that of chain_batch, causal, it is the loss of a continuation, and without latents
    that of SFT.
    """
    x = llm.wte(seq.ids)                                                       # (B, T, C)
    if z is not None:
        x = insert_latents(x, z, seq.latent)
    hidden = llm(x, seq.pos, mask_of(seq), index=seq.predict_index)            # (B, P, C)
    return weighted_nll(llm.head(hidden), seq.target, seq.loss_weight)


def sup_losses(llm, z, batch, c, continued, k, mask_of=supervision_mask):
    """Phase 1: (ℓ_sup of the problems that are not continued, the loss of those that are).

    z (B, N, C) of an encoder.Batch; continued, k: which of its problems are, and after how many
    latents each, from encoder.draw_continuations. Each is a mean over its own problems, or 0
    without any.
    """
    others = np.setdiff1d(np.arange(len(z)), continued)
    sup = cont = z.new_zeros(())
    if len(others):
        seq = sup_batch(batch.some(others), c).to(z.device)
        sup = text_loss(llm, seq, z[others], mask_of)
    if len(continued):
        seq = chain_batch(batch.some(continued), c, k).to(z.device)
        cont = text_loss(llm, seq, z[continued])
    return sup, cont


def read_chain(llm, seq, z):
    """One causal pass over X <bot> z₀ … z_{n-1} <eot> Ans: its hidden states (B, N + P, C).

    The first N predict the z (B, N, C), the others <eot> Ans. seq: the Layout of latent_batch.
    """
    x = insert_latents(llm.wte(seq.ids), z, seq.latent)                        # (B, T, C)
    index = torch.cat([seq.alpha_index, seq.predict_index], 1)                 # (B, N + P)
    return llm(x, seq.pos, index=index)


@torch.no_grad()
def own_latents(llm, seq, z, n_ordinary, top_k, passes):
    """The chain z (B, N, C), which the LLM thinks anew: `passes` times, each z_i ← Σ q_i[v]·E[v].

    After k passes the first k latents are those that decoding would feed, and a later one is what
    the LLM thinks after latents that are in part its own. N passes make a chain of its own.
    """
    own = z
    for _ in range(passes):
        hidden = read_chain(llm, seq, own)[:, :z.size(1)]                      # (B, N, C)
        _, own = alpha_and_latent(llm, hidden, llm.wte.weight, n_ordinary, top_k)
    torch.clear_autocast_cache()  # of casts of the weights, which have no gradient here
    return own.to(z.dtype)


def latent_loss(llm, seq, z, p, ids):
    """Phase 3: (L_exp, L_lat). z (B, N, C): the input; p, ids (B, N, K): the target p̃, sparse."""
    N = seq.alpha_index.size(1)
    logits = llm.head(read_chain(llm, seq, z))                                 # (B, N + P, V)
    exp = weighted_nll(logits[:, N:], seq.target, seq.loss_weight)
    return exp, latent_kl(p, ids, logits[:, :N], seq.n)
