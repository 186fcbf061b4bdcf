"""The losses of phases 1 and 3 against loops over their formulas; what the gradient reaches."""
import json
import math

import numpy as np
import pytest
import torch

from conftest import VOCAB, close, pipeline, random_batch, rows, tiny
from encoder import (alpha_and_latent, chunk_tokens, encoder_batch, latent_batch, summary_states,
                     superpose, superpose_sparse, text_batch)
from losses import bag_kl, gumbel_noise, gumbel_perturb, latent_loss, sup_losses, text_loss
from test_encoder import continuation, embed, positions, read, summaries

CHAINS = [7, 0, 4, 1]


def mean_nll(llm, X, z, text, c):
    """The mean −log p of the tokens of a text after X and z, a list of k vectors."""
    z = torch.stack(z) if z else torch.zeros(0, 16)
    log_p = llm.head(continuation(llm, X, z.double(), text, c)).log_softmax(1)
    return -log_p[range(len(text)), text].mean()


def alpha_and_z(encoder, llm, batch, c, top_k=0):
    """α and z of a batch, as train_sup.py makes them."""
    states = summary_states(encoder, encoder_batch(batch, c, VOCAB.sum))
    return alpha_and_latent(encoder, states, llm.wte.weight, VOCAB.n_ordinary, top_k)


# ------------------------------------------------------------------------------------------ phase 1

def test_text_alone():
    """SFT: the mean −log q of what is written after X."""
    llm, batch = tiny(0), random_batch(CHAINS)
    total = sum(mean_nll(llm, X, [], sum(S, []) + answer, 1) for X, S, answer in rows(batch, 1))
    close(text_loss(llm, text_batch(batch)).double(), total / len(CHAINS), 1e-5)


@pytest.mark.parametrize("continued, k", [([], []), ([2], [0]), ([2, 0], [1, 3]), ([0, 1], [2, 0]),
                                          ([3, 1, 2, 0], [1, 0, 2, 0])])
@pytest.mark.parametrize("c, top_k", [(1, 0), (2, 0), (3, 3)])
def test_sup_losses(c, top_k, continued, k):
    """ℓ_sup = 1/n Σ_i 1/|J_i| Σ_{t∈J_i} −log p(x_t | X, z₀ … z_i); the answer is the last chunk.

    Of the problems that are continued: the mean −log p of S_k … Ans after X z₀ … z_{k-1}.
    """
    encoder, llm, batch = tiny(0), tiny(1), random_batch(CHAINS)
    sup, cont = [torch.zeros(())], [torch.zeros(())]
    latents = dict(zip(continued, k))
    for b, (X, S, answer) in enumerate(rows(batch, c)):
        z = [superpose(alpha, llm.wte.weight, top_k) for alpha in summaries(encoder, X, S)]
        if b in latents:
            rest = sum(S[latents[b]:], []) + answer
            cont.append(mean_nll(llm, X, z[:latents[b]], rest, c))
        else:
            parts = S[1:] + [answer]
            nll = [mean_nll(llm, X, z[:i + 1], part, c) for i, part in enumerate(parts)]
            sup.append(sum(nll) / len(parts))
    _, z = alpha_and_z(encoder, llm, batch, c, top_k)
    found = sup_losses(llm, z, batch, c, np.array(continued, dtype=int), k)
    for one, each in zip(found, (sup, cont)):
        close(one.double(), sum(each).double() / max(1, len(each) - 1), 1e-5)


@pytest.mark.parametrize("c", [1, 2, 3])
def test_bag_loss_is_a_dense_kl(c):
    encoder, batch = tiny(0), random_batch(CHAINS)
    total = 0
    for X, S, _ in rows(batch, c):
        for alpha, chunk in zip(summaries(encoder, X, S), S):
            bag = torch.bincount(torch.tensor(chunk), minlength=VOCAB.n_ordinary) / len(chunk)
            total += (torch.xlogy(bag, bag) - bag * alpha.log()).sum() / len(S)
    alpha, _ = alpha_and_z(encoder, tiny(1), batch, c)
    n = torch.tensor([len(S) for _, S, _ in rows(batch, c)])
    chunks = chunk_tokens([p.chain for p in batch.problems], c)
    close(bag_kl(alpha, chunks, n).double(), total / len(CHAINS), 1e-5)


@pytest.mark.parametrize("continued", [[], [0, 2]])
@pytest.mark.parametrize("through_z", [True, False])
def test_the_loss_reaches_the_encoder_through_z_alone(through_z, continued):
    encoder, llm = tiny(0).requires_grad_(), tiny(1).requires_grad_()
    batch = random_batch([7, 4, 5])
    _, z = alpha_and_z(encoder, llm, batch, 2)
    which = np.array(continued, dtype=int)
    losses = sup_losses(llm, z if through_z else z.detach(), batch, 2, which, [1, 2])
    losses[len(continued) > 0].backward()
    for model, reached in (encoder, through_z), (llm, True):
        assert {p.grad is not None and p.grad.any().item() for p in model.parameters()} == {reached}


# ------------------------------------------------------------------------------------------ phase 3

@pytest.mark.parametrize("c", [1, 2, 3])
@pytest.mark.parametrize("chains", [CHAINS, [0, 0]])
def test_latent_loss(c, chains):
    """L_exp: mean −log q over <eot> and Ans. L_lat: mean over latents of a dense KL(p̃ ‖ q)."""
    llm, batch = tiny(1), random_batch(chains)
    seq = latent_batch(batch, c, [len(S) for _, S, _ in rows(batch, c)])
    g = torch.Generator().manual_seed(0)
    ids = torch.rand(*seq.alpha_index.shape, VOCAB.n_ordinary, generator=g).topk(4, 2).indices
    p = torch.rand(ids.shape, generator=g)
    p[0, 0] = torch.eye(4)[2]  # a point mass: 0 log 0 = 0
    p = p / p.sum(2, keepdim=True)
    exp = lat = torch.zeros(())
    for b, (X, S, answer) in enumerate(rows(batch, c)):
        n = len(S)
        dense = torch.zeros(n, VOCAB.n_vocab).scatter(1, ids[b, :n], p[b, :n]).double()
        z = dense @ llm.wte.weight
        exp = exp + mean_nll(llm, X, list(z), answer, c)
        if n:
            hidden = read(llm, torch.cat([embed(llm, X), z]), positions(len(X), n, c, 0))
            log_q = llm.head(hidden[len(X) - 1:-1]).log_softmax(1)  # where the z are predicted
            lat = lat + (torch.xlogy(dense, dense) - dense * log_q).sum() / n
    found_exp, found_lat = latent_loss(llm, seq, superpose_sparse(p, ids, llm.wte.weight), p, ids)
    close(found_exp.double(), exp.double() / len(chains), 1e-5)
    close(found_lat.double(), lat.double() / len(chains), 1e-5)


def test_perturbed_alpha_is_a_softmax_of_log_alpha_plus_noise():
    values = torch.rand(2, 3, 5).softmax(2)
    noise = torch.randn(2, 3, 5)
    product = values * noise.exp()
    close(gumbel_perturb(values, noise), product / product.sum(2, keepdim=True), 1e-6)
    close(gumbel_perturb(values, torch.zeros(2, 3, 5)), values, 1e-6)  # no noise, no change
    # past a row's last latent, or in a store of no latents, there is noise, but never NaN
    assert gumbel_perturb(torch.zeros(2, 3, 5), noise).isfinite().all()


def test_noise_is_gumbel_and_fresh_at_every_step():
    n = 200_000
    g = gumbel_noise(5, 7, (n,))
    # Kolmogorov-Smirnov: F(x) = exp(-exp(-x)); the bound is exceeded once in a thousand
    x = np.sort(g.double().numpy())
    distance = np.abs(np.exp(-np.exp(-x)) - (np.arange(n) + 0.5) / n).max()
    assert distance < 1.95 / math.sqrt(n)
    close(gumbel_noise(5, 7, (n,), scale=0.5), 0.5 * g, 1e-6)
    assert g.dtype == torch.float32 and torch.equal(g, gumbel_noise(5, 7, (n,)))
    for seed, step in (5, 8), (6, 7), (7, 5):
        assert (g == gumbel_noise(seed, step, (n,))).float().mean() < 1e-3


# ---------------------------------------------------------------------------------------- the loops

@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_the_loops_minimise_the_sums_that_they_log(share, tmp_path, monkeypatch):
    """Phase 1: ℓ_sup + the continuations' loss + λ · KL, where λ falls from --bag to its half.

    Phase 3: L_exp + L_lat.
    """
    minimised = []
    backward = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward",
                        lambda loss: (minimised.append(loss.item()), backward(loss)))
    steps, bag = 6, 0.7
    pipeline(tmp_path, sup=["--sft-steps", 1, "--steps", steps, "--bag-steps", 2, "--bag", bag,
                            "--continuation", share], latent=["--steps", 3, "--on-policy", share])
    logged = []
    for loop in "sft", "sup", "latent":
        lines = (tmp_path / f"{loop}.jsonl").read_text("utf-8").splitlines()
        logged += [row for row in map(json.loads, lines) if "loss" in row]
    assert [row["loss"] for row in logged] == pytest.approx(minimised, abs=1e-5)
    _, *sup = logged[:-3]
    for step, row in enumerate(sup):
        bags = bag * (1 - 0.5 * step / steps) * row["bag"]
        assert row["loss"] == pytest.approx(row["sup"] + row["cont"] + bags, abs=1e-5)
        assert row["bag"] > 0
        assert (row["sup"] > 0) == (step >= 2 and share < 1)
        assert (row["cont"] > 0) == (step >= 2 and share > 0)
    for row in logged[-3:]:
        assert row["loss"] == pytest.approx(row["exp"] + row["lat"], abs=1e-5)
        assert row["exp"] > 0 and row["lat"] > 0
    assert len(sup) == steps
