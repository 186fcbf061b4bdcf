"""The paper's equations: what the models minimise, as short pure functions.

    phase 1   ℓ_sup  = 1/n Σ_i 1/|J_i| Σ_{t∈J_i} −log p(x_t | X, z_0 … z_i)         weighted_nll
              + λ · 1/n Σ_i KL(bag(S_i) ‖ α_i), a warm-up that the paper has not    bag_kl
    phase 3   L_auto = L_exp + L_lat                                                DESIGN 6
              L_exp  = mean over <eot> and Ans of −log q                            weighted_nll
              L_lat  = mean over i of KL(p̃_i ‖ q_i)                                 latent_kl
              p̃_i    = softmax(log α_i + g), g ~ Gumbel(0, 1)                       gumbel_perturb

Every mean over a problem's tokens or latents is followed by one over the batch. Letters as in model.py.
"""
import numpy as np
import torch
import torch.nn.functional as F

from encoder import bag_weights


def weighted_nll(logits, target, weight):
    """Σ weight · −log p(target), mean over the batch. logits (B, P, V), target and weight (B, P).

    The layout's weights decide what it is: with those of llm_layout ℓ_sup, of latent_layout L_exp, of
    explicit_layout the loss of plain SFT.
    """
    logits = logits.flatten(0, 1).float()                                      # (B * P, V)
    nll = F.cross_entropy(logits, target.flatten(), reduction="none")          # (B * P,)
    return (nll * weight.flatten()).sum() / len(target)


def bag_kl(alpha, bag, n):
    """KL(bag_i ‖ α_i): bag_i has the tokens of chunk i with the weights of encoder.bag_weights.

    alpha (B, N, n_ordinary); bag int64 (B, N, c): the chunks, -1 past their ends; n (B,).
    """
    weight = bag_weights(bag, alpha.dtype)                                     # (B, N, c)
    same = bag[:, :, :, None] == bag[:, :, None, :]                            # (B, N, c, c)
    in_bag = (same * weight[:, :, None, :]).sum(3)                             # (B, N, c)
    in_alpha = alpha.gather(2, bag.clamp(min=0)).clamp(min=1e-9)               # (B, N, c)
    log_ratio = in_bag.clamp(min=1e-9).log() - in_alpha.log()                  # (B, N, c)
    kl = (weight * log_ratio).sum(2)                                           # (B, N)
    return (kl.sum(1) / n.clamp(min=1)).mean()


def gumbel_noise(seed, step, shape, scale=1.0):
    """float32 scale · Gumbel(0, 1): a function of (seed, step), so that a resumed run meets it again."""
    rng = np.random.default_rng([seed, step, 3])
    return torch.from_numpy(scale * rng.gumbel(size=shape).astype(np.float32))


def gumbel_perturb(values, noise):
    """p̃ = softmax(log α + g) over the stored entries of α. values, noise (B, N, K) -> (B, N, K)."""
    return (values.clamp(min=1e-30).log() + noise).softmax(2)


def latent_kl(p, ids, logits, n):
    """L_lat: KL(p̃ ‖ q), q over the whole vocabulary, p̃ on its K entries only.

    p, ids (B, N, K): p̃ and whose entries they are; logits (B, N, V), of q; n (B,): latents in a row.
    """
    logits = logits.float()
    log_q = logits.gather(2, ids) - logits.logsumexp(2, keepdim=True)          # (B, N, K)
    kl = (torch.xlogy(p, p) - p * log_q).sum(2)                                # (B, N)
    real = torch.arange(kl.size(1), device=kl.device) < n[:, None]             # (B, N)
    return (kl.where(real, 0).sum(1) / n.clamp(min=1)).mean()
