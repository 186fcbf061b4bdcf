"""The losses of phases 1 and 3 against plain loops over their formulas, and how the gradient reaches the encoder."""
import math

import numpy as np
import pytest
import torch

import train_sup
from conftest import VOCAB, close, random_batch, rows, tiny
from encoder import encoder_layout, explicit_layout, llm_layout, superpose
from test_encoder import summaries
from train_latent import LatentReasoner, gumbel_noise, latent_kl, shake
from train_sup import Explicit, Superposition, bag_loss, bags

CHAINS = [7, 0, 4, 1]


def log_q(llm, x):
    """log q (T, V): what follows each vector of one row."""
    return llm.head(llm(x[None]))[0].log_softmax(1)


def test_explicit_loss():
    llm, batch = tiny(0), random_batch(CHAINS)
    total = 0
    for X, S, answer in rows(batch, 2):
        text, written = X + sum(S, []) + answer, sum(S, []) + answer
        q = log_q(llm, llm.wte(torch.tensor(text)))
        total += sum(-q[len(X) + t - 1, token] for t, token in enumerate(written)) / len(written)
    loss, _ = Explicit(llm)(explicit_layout(batch))
    close(loss.double(), total / len(CHAINS), 1e-5)


@pytest.mark.parametrize("c, top_k", [(1, 0), (2, 0), (3, 3), (4, 0)])
def test_sup_loss(c, top_k):
    """ℓ_sup = 1/N Σ_i 1/|J_i| Σ_{t∈J_i} −log p(x_t | X, z₀ … z_i), the answer being the last chunk."""
    encoder, llm, batch = tiny(0), tiny(1), random_batch(CHAINS)
    total = 0
    for X, S, answer in rows(batch, c):
        z = [superpose(alpha, llm.wte.weight, top_k) for alpha in summaries(encoder, X, S)]
        parts = S[1:] + [answer]
        for i, part in enumerate(parts):
            prefix = [llm.wte(torch.tensor(X)), *(z_j[None] for z_j in z[:i + 1])]
            q = log_q(llm, torch.cat(prefix + [llm.wte(torch.tensor(part))]))[-len(part) - 1:]
            total += sum(-q[t, token] for t, token in enumerate(part)) / len(part) / len(parts)
    module = Superposition(encoder, llm, VOCAB.n_ordinary, top_k, local=False)
    layouts = encoder_layout(batch, c, VOCAB.sum), llm_layout(batch, c), bags(batch, c)
    loss, figures = module(*layouts, torch.tensor(0.0))
    close(loss.double(), total / len(CHAINS), 1e-5)
    warm, figures = module(*layouts, torch.tensor(0.7))
    close(warm, figures["sup"] + 0.7 * figures["bag"], 1e-6)


@pytest.mark.parametrize("c", [1, 2, 3])
def test_bag_loss_is_a_dense_kl(c):
    batch, total = random_batch(CHAINS), 0
    alpha = torch.randn(len(CHAINS), 7, VOCAB.n_ordinary).softmax(2)[:, :-(-7 // c)]
    for b, (_, S, _) in enumerate(rows(batch, c)):
        for i, chunk in enumerate(S):
            bag = torch.bincount(torch.tensor(chunk), minlength=VOCAB.n_ordinary) / len(chunk)
            total += (torch.xlogy(bag, bag) - bag * alpha[b, i].log()).sum() / len(S)
    close(bag_loss(alpha, bags(batch, c), torch.from_numpy(-(-batch.ns // c))), total / len(CHAINS), 1e-5)


def sup_gradients(monkeypatch, cut):
    encoder, llm, batch = tiny(0), tiny(1), random_batch(CHAINS)
    module = Superposition(encoder, llm, VOCAB.n_ordinary, 0, local=False).requires_grad_()
    if cut:
        monkeypatch.setattr(train_sup, "superpose", lambda *args: superpose(*args).detach())
    _, figures = module(encoder_layout(batch, 2, VOCAB.sum), llm_layout(batch, 2), bags(batch, 2), torch.tensor(0.0))
    figures["sup"].backward()
    return [[p.grad for p in model.parameters()] for model in (encoder, llm)]


def test_the_loss_reaches_the_encoder_through_z_alone(monkeypatch):
    encoder, llm = sup_gradients(monkeypatch, cut=False)
    assert all(g is not None and g.abs().max() > 0 for g in encoder + llm)
    encoder, llm = sup_gradients(monkeypatch, cut=True)
    assert all(g is None for g in encoder) and all(g is not None for g in llm)


# -------------------------------------------------------------------------------------------------- phase 3

def stored(batch, c, K, seed=0):
    """Random α as phase 2 keeps them: values, ids (B, N, K), with garbage past a row's last latent."""
    g = torch.Generator().manual_seed(seed)
    shape = len(batch.rows), max(1, -(-batch.s.shape[1] // c)), VOCAB.n_ordinary
    ids = torch.rand(shape, generator=g).topk(K, 2).indices
    return torch.rand(shape, generator=g).softmax(2)[..., :K], ids


@pytest.mark.parametrize("c", [1, 2, 3])
def test_phase_3_losses(c):
    """L_exp: mean −log q over <eot> and Ans. L_lat: mean over latents of KL(p̃ ‖ q), q over the whole vocabulary."""
    llm, batch = tiny(1), random_batch(CHAINS)
    values, ids = stored(batch, c, K=4)
    noise = gumbel_noise(0, 0, values.shape)
    exp = lat = 0
    for b, (X, S, answer) in enumerate(rows(batch, c)):
        p = torch.zeros(len(S), VOCAB.n_vocab, dtype=torch.float64)  # p̃, dense
        for i in range(len(S)):
            weight = [v * math.exp(g) for v, g in zip(values[b, i].tolist(), noise[b, i].tolist())]
            for v, w in zip(ids[b, i].tolist(), weight):
                p[i, v] = w / sum(weight)
        q = log_q(llm, torch.cat([llm.wte(torch.tensor(X)), p @ llm.wte.weight, llm.wte(torch.tensor(answer))]))
        q = q[len(X) - 1:]  # from where z₀ is predicted
        if S:
            lat += sum((torch.xlogy(p[i], p[i]) - p[i] * q[i]).sum() for i in range(len(S))) / len(S)
        exp += sum(-q[len(S) + t, token] for t, token in enumerate(answer)) / len(answer)
    loss, figures = LatentReasoner(llm)(llm_layout(batch, c, text=False), values, ids, noise)
    close(figures["exp"].double(), exp / len(CHAINS), 1e-5)
    close(figures["lat"].double(), lat / len(CHAINS), 1e-5)
    close(loss, figures["exp"] + figures["lat"], 1e-6)


def test_sparse_kl_equals_dense_kl():
    g = torch.Generator().manual_seed(0)
    p, logits, n = torch.rand(3, 4, 6, generator=g), torch.randn(3, 4, 20, generator=g), torch.tensor([4, 0, 2])
    p[0, 0] = torch.eye(6)[2]  # a point mass: 0 log 0 = 0
    p, ids = p / p.sum(2, keepdim=True), torch.rand(3, 4, 20, generator=g).topk(6, 2).indices
    dense = torch.zeros(3, 4, 20).scatter(2, ids, p)
    kl = torch.nn.functional.kl_div(logits.log_softmax(2), dense, reduction="none").sum(2)  # (B, N)
    close(latent_kl(p, ids, logits, n), (kl[0].mean() + kl[2, :2].mean()) / 3, 1e-6)
    assert latent_kl(p, ids, logits, torch.zeros(3, dtype=torch.int64)) == 0


def test_shaken_alpha_is_a_softmax_of_log_alpha_plus_noise():
    values, noise = torch.rand(2, 3, 5).softmax(2), torch.randn(2, 3, 5)
    product = values * noise.exp()
    close(shake(values, noise), product / product.sum(2, keepdim=True), 1e-6)
    close(shake(values, torch.zeros(2, 3, 5)), values, 1e-6)  # no noise, no change
    padding = torch.zeros(2, 3, 5)  # past a row's last latent, or in a store of no latents: noise, but never NaN
    assert shake(padding, noise).isfinite().all()


def test_noise_is_gumbel():
    n = 200_000
    g = gumbel_noise(0, 0, (n,)).double().numpy()
    x = np.sort(g)
    distance = np.abs(np.exp(-np.exp(-x)) - (np.arange(n) + 0.5) / n).max()  # Kolmogorov-Smirnov: F(x) = exp(-exp(-x))
    assert distance < 1.95 / math.sqrt(n)  # exceeded once in a thousand
    assert abs(g.mean() - 0.5772156649) < 5 * g.std() / math.sqrt(n)
    assert abs(g.var() - math.pi ** 2 / 6) < 0.03
    assert np.allclose(gumbel_noise(0, 0, (n,), scale=0.5), 0.5 * g)


def test_noise_is_fresh_at_every_step_and_shared_out_by_rank():
    whole = gumbel_noise(5, 7, (6, 2, 3))
    assert torch.equal(whole, gumbel_noise(5, 7, (6, 2, 3)))
    assert not any(torch.equal(whole, gumbel_noise(*other, (6, 2, 3))) for other in ((5, 8), (6, 7)))
    parts = [gumbel_noise(5, 7, (6, 2, 3), rank, 3) for rank in range(3)]
    assert torch.equal(torch.stack(parts, 1).flatten(0, 1), whole)


def test_gumbel_max_draws_from_alpha():
    """What the noise is for: the largest entry of p̃ is token v with probability α[v]."""
    alpha = torch.tensor([0.5, 0.3, 0.15, 0.05])
    n = 100_000
    drawn = shake(alpha.expand(1, n, 4), gumbel_noise(1, 0, (1, n, 4))).argmax(2)
    share = torch.bincount(drawn[0], minlength=4) / n
    assert ((share - alpha).abs() < 5 * (alpha * (1 - alpha) / n).sqrt()).all()
