"""The losses of phases 1 and 3 against loops over their formulas; what the gradient reaches."""
import math

import numpy as np
import pytest
import torch

import encoder as encoding
from conftest import VOCAB, close, random_batch, rows, tiny
from encoder import (chunk_tokens, encoder_batch, explicit_batch, latent_batch, llm_batch,
                     summarize, superpose)
from losses import bag_kl, gumbel_noise, gumbel_perturb, latent_kl
from test_encoder import embed, positions, summaries
from train_latent import latent_loss
from train_sup import explicit_loss, sup_loss

CHAINS = [7, 0, 4, 1]


def log_q(llm, x, pos=None):
    """log q (T, V): what follows each vector of one row; pos: their positions, else 0, 1, …"""
    return llm.head(llm(x[None], None if pos is None else torch.tensor([pos])))[0].log_softmax(1)


# ------------------------------------------------------------------------------------------ phase 1

def test_explicit_loss():
    """The mean −log q of what is written after X."""
    llm = tiny(0)
    batch = random_batch(CHAINS)
    total = 0
    for X, S, answer in rows(batch, 2):
        written = sum(S, []) + answer
        q = log_q(llm, embed(llm, X + written))
        start = len(X) - 1
        total += sum(-q[start + t, token] for t, token in enumerate(written)) / len(written)
    close(explicit_loss(llm, explicit_batch(batch)).double(), total / len(CHAINS), 1e-5)


@pytest.mark.parametrize("c, top_k", [(1, 0), (2, 0), (3, 3), (4, 0)])
def test_sup_loss(c, top_k):
    """ℓ_sup = 1/N Σ_i 1/|J_i| Σ_{t∈J_i} −log p(x_t | X, z₀ … z_i); the answer is the last chunk."""
    encoder = tiny(0)
    llm = tiny(1)
    batch = random_batch(CHAINS)
    total = 0
    for X, S, answer in rows(batch, c):
        z = [superpose(alpha, llm.wte.weight, top_k)[None] for alpha in summaries(encoder, X, S)]
        parts = S[1:] + [answer]
        for i, part in enumerate(parts):
            x = torch.cat([embed(llm, X), *z[:i + 1], embed(llm, part)])
            q = log_q(llm, x, positions(len(X), len(z[:i + 1]), c, len(part)))[-len(part) - 1:]
            nll = sum(-q[t, token] for t, token in enumerate(part))
            total += nll / len(part) / len(parts)
    enc = encoder_batch(batch, c, VOCAB.sum)
    bag = chunk_tokens(batch, c)
    sup, kl = sup_loss(encoder, llm, enc, llm_batch(batch, c), bag, VOCAB.n_ordinary, top_k)
    close(sup.double(), total / len(CHAINS), 1e-5)
    close(kl, bag_kl(summarize(encoder, enc, VOCAB.n_ordinary), bag, enc.n), 1e-6)


@pytest.mark.parametrize("follow", [[-1, -1, -1, -1], [2, -1, 0, 0], [1, -1, 1, -1]])
def test_a_followed_text_adds_its_mean(follow):
    """To ℓ_sup comes the mean −log p of S_{k+1} … Ans behind X z₀ … z_k; not without a chain."""
    encoder = tiny(0)
    llm = tiny(1)
    batch = random_batch(CHAINS)
    total = 0
    for (X, S, answer), k in zip(rows(batch, 2), follow):
        if S:
            z = [superpose(alpha, llm.wte.weight)[None] for alpha in summaries(encoder, X, S)]
            text = sum(S[k + 1:], []) + answer
            x = torch.cat([embed(llm, X), *z[:k + 1], embed(llm, text)])
            q = log_q(llm, x, positions(len(X), k + 1, 2, len(text)))[-len(text) - 1:]
            total += sum(-q[t, token] for t, token in enumerate(text)) / len(text)
    inputs = chunk_tokens(batch, 2), VOCAB.n_ordinary
    enc = encoder_batch(batch, 2, VOCAB.sum)
    alone, _ = sup_loss(encoder, llm, enc, llm_batch(batch, 2), *inputs)
    both, _ = sup_loss(encoder, llm, enc, llm_batch(batch, 2, follow), *inputs)
    close((both - alone).double(), total / len(CHAINS), 1e-5)


def test_sup_loss_under_the_local_mask():
    """Under --ltsum local a chunk sees its z and itself: nothing else reaches it through one layer.

    z itself, which predicts the chunk's first token, sees X and every z before it, as does Ans.
    """
    encoder = tiny(0)
    llm = tiny(1, n_layer=1)
    batch = random_batch([6])
    enc = encoder_batch(batch, 2, VOCAB.sum)
    seq = llm_batch(batch, 2)
    inputs = enc, seq, chunk_tokens(batch, 2), VOCAB.n_ordinary
    local, kl = sup_loss(encoder, llm, *inputs, ltsum="local")
    full, same = sup_loss(encoder, llm, *inputs)
    assert torch.equal(kl, same)
    X, S, answer = next(rows(batch, 2))
    z = [superpose(alpha, llm.wte.weight)[None] for alpha in summaries(encoder, X, S)]
    total = 0
    for i, part in enumerate(S[1:]):
        x = torch.cat([embed(llm, X), *z[:i + 1]])
        q_first = log_q(llm, x, positions(len(X), i + 1, 2, 0))[-1:]
        x = torch.cat([z[i].double(), embed(llm, part)])
        pos = [len(X) + 2 * i + 1 + t for t in range(len(x))]
        q_rest = log_q(llm, x, pos)[1:]
        q = torch.cat([q_first, q_rest])
        total += sum(-q[t, token] for t, token in enumerate(part)) / len(part)
    x = torch.cat([embed(llm, X), *z, embed(llm, answer)])
    q = log_q(llm, x, positions(len(X), len(S), 2, len(answer)))[-len(answer) - 1:]
    total += sum(-q[t, token] for t, token in enumerate(answer)) / len(answer)
    close(local.double(), total / len(S), 1e-5)
    assert (local - full).abs() > 1e-3


@pytest.mark.parametrize("c", [1, 2, 3])
def test_bag_kl_is_a_dense_kl(c):
    batch = random_batch(CHAINS)
    n = -(-np.array(CHAINS) // c)
    alpha = torch.randn(len(CHAINS), 7, VOCAB.n_ordinary).softmax(2)[:, :max(n)]
    total = 0
    for b, (_, S, _) in enumerate(rows(batch, c)):
        for i, chunk in enumerate(S):
            bag = torch.bincount(torch.tensor(chunk), minlength=VOCAB.n_ordinary) / len(chunk)
            total += (torch.xlogy(bag, bag) - bag * alpha[b, i].log()).sum() / len(S)
    close(bag_kl(alpha, chunk_tokens(batch, c), torch.from_numpy(n)), total / len(CHAINS), 1e-5)


def sup_gradients():
    """The gradients of ℓ_sup alone, of (encoder, llm): a list each, None where there is none."""
    encoder = tiny(0).requires_grad_()
    llm = tiny(1).requires_grad_()
    batch = random_batch(CHAINS)
    sup, _ = sup_loss(encoder, llm, encoder_batch(batch, 2, VOCAB.sum), llm_batch(batch, 2),
                      chunk_tokens(batch, 2), VOCAB.n_ordinary)
    sup.backward()
    return [[p.grad for p in model.parameters()] for model in (encoder, llm)]


def test_the_loss_reaches_the_encoder_through_z_alone(monkeypatch):
    encoder, llm = sup_gradients()
    assert all(grad is not None and grad.abs().max() > 0 for grad in encoder + llm)
    monkeypatch.setattr(encoding, "superpose", lambda *args: superpose(*args).detach())
    encoder, llm = sup_gradients()
    assert all(grad is None for grad in encoder)
    assert all(grad is not None for grad in llm)


# ------------------------------------------------------------------------------------------ phase 3

def stored(seq, K, seed=0):
    """Random α as phase 2 keeps them: values, ids (B, N, K), garbage past a row's last latent."""
    g = torch.Generator().manual_seed(seed)
    shape = *seq.summary_index.shape, VOCAB.n_ordinary
    ids = torch.rand(shape, generator=g).topk(K, 2).indices
    return torch.rand(shape, generator=g).softmax(2)[..., :K], ids


@pytest.mark.parametrize("c", [1, 2, 3])
def test_phase_3_losses(c):
    """L_exp: mean −log q over <eot> and Ans. L_lat: mean over latents of KL(p̃ ‖ q).

    q is over the whole vocabulary.
    """
    llm = tiny(1)
    batch = random_batch(CHAINS)
    seq = latent_batch(batch, c)
    values, ids = stored(seq, K=4)
    noise = gumbel_noise(0, 0, values.shape)
    exp = lat = 0
    for b, (X, S, answer) in enumerate(rows(batch, c)):
        p = torch.zeros(len(S), VOCAB.n_vocab, dtype=torch.float64)  # p̃, dense
        for i in range(len(S)):
            pairs = zip(values[b, i].tolist(), noise[b, i].tolist())
            weight = [value * math.exp(g) for value, g in pairs]
            for v, w in zip(ids[b, i].tolist(), weight):
                p[i, v] = w / sum(weight)
        x = torch.cat([embed(llm, X), p @ llm.wte.weight, embed(llm, answer)])
        q = log_q(llm, x, positions(len(X), len(S), c, len(answer)))
        q = q[len(X) - 1:]  # from where z₀ is predicted
        if S:
            kl = sum((torch.xlogy(p[i], p[i]) - p[i] * q[i]).sum() for i in range(len(S)))
            lat += kl / len(S)
        exp += sum(-q[len(S) + t, token] for t, token in enumerate(answer)) / len(answer)
    found_exp, found_lat = latent_loss(llm, seq, values, ids, noise)
    close(found_exp.double(), exp / len(CHAINS), 1e-5)
    close(found_lat.double(), lat / len(CHAINS), 1e-5)


def test_sparse_kl_equals_dense_kl():
    g = torch.Generator().manual_seed(0)
    p = torch.rand(3, 4, 6, generator=g)
    logits = torch.randn(3, 4, 20, generator=g)
    n = torch.tensor([4, 0, 2])
    p[0, 0] = torch.eye(6)[2]  # a point mass: 0 log 0 = 0
    p = p / p.sum(2, keepdim=True)
    ids = torch.rand(3, 4, 20, generator=g).topk(6, 2).indices
    dense = torch.zeros(3, 4, 20).scatter(2, ids, p)
    kl = torch.nn.functional.kl_div(logits.log_softmax(2), dense, reduction="none").sum(2)  # (B, N)
    close(latent_kl(p, ids, logits, n), (kl[0].mean() + kl[2, :2].mean()) / 3, 1e-6)
    assert latent_kl(p, ids, logits, torch.zeros(3, dtype=torch.int64)) == 0


def test_perturbed_alpha_is_a_softmax_of_log_alpha_plus_noise():
    values = torch.rand(2, 3, 5).softmax(2)
    noise = torch.randn(2, 3, 5)
    product = values * noise.exp()
    close(gumbel_perturb(values, noise), product / product.sum(2, keepdim=True), 1e-6)
    close(gumbel_perturb(values, torch.zeros(2, 3, 5)), values, 1e-6)  # no noise, no change
    # past a row's last latent, or in a store of no latents, there is noise, but never NaN
    padding = torch.zeros(2, 3, 5)
    assert gumbel_perturb(padding, noise).isfinite().all()


def test_noise_is_gumbel():
    n = 200_000
    g = gumbel_noise(0, 0, (n,)).double().numpy()
    x = np.sort(g)
    # Kolmogorov-Smirnov: F(x) = exp(-exp(-x)); the bound is exceeded once in a thousand
    distance = np.abs(np.exp(-np.exp(-x)) - (np.arange(n) + 0.5) / n).max()
    assert distance < 1.95 / math.sqrt(n)
    assert abs(g.mean() - 0.5772156649) < 5 * g.std() / math.sqrt(n)
    assert abs(g.var() - math.pi ** 2 / 6) < 0.03
    assert np.allclose(gumbel_noise(0, 0, (n,), scale=0.5), 0.5 * g)


def test_noise_is_fresh_at_every_step_and_the_same_on_resuming():
    shape = 6, 2, 3
    noise = gumbel_noise(5, 7, shape)
    assert noise.shape == shape and noise.dtype == torch.float32
    assert torch.equal(noise, gumbel_noise(5, 7, shape))
    for seed, step in (5, 8), (6, 7), (7, 5):
        assert not (noise == gumbel_noise(seed, step, shape)).any()


def test_gumbel_max_draws_from_alpha():
    """What the noise is for: the largest entry of p̃ is token v with probability α[v]."""
    alpha = torch.tensor([0.5, 0.3, 0.15, 0.05])
    n = 100_000
    drawn = gumbel_perturb(alpha.expand(1, n, 4), gumbel_noise(1, 0, (1, n, 4))).argmax(2)
    share = torch.bincount(drawn[0], minlength=4) / n
    assert ((share - alpha).abs() < 5 * (alpha * (1 - alpha) / n).sqrt()).all()
