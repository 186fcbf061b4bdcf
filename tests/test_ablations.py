"""Each ablation against the plain loop that says what it leaves out."""
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import train_sup
from conftest import VOCAB, close, random_batch, rows, tiny
from compress import top_entries
from data import UserError
from decode import decode
from encoder import (alpha_and_latent, chunk_tokens, encoder_batch, hidden_as_input, insert_latents,
                     latent_batch, llm_batch, summarize, summary_states)
from test_decode import speaker
from test_encoder import embed, random_latents, read
from test_scripts import TINY, call  # noqa: F401  (call is a fixture)
from train_latent import hidden_loss
from train_sup import sup_loss

CHAINS = [7, 0, 4, 1]


def with_flags(model, **flags):
    model.config = replace(model.config, **flags)
    return model


@pytest.mark.parametrize("c", [1, 2, 3])
def test_without_ltim_a_summary_token_sees_the_earlier_ones(c):
    """α_i is that of a plain causal pass over X S₀ L₀ … S_i L_i."""
    encoder = with_flags(tiny(0), ltim=False)
    batch = random_batch(CHAINS)
    alpha = summarize(encoder, encoder_batch(batch, c, VOCAB.sum), VOCAB.n_ordinary)
    masked = summarize(tiny(0), encoder_batch(batch, c, VOCAB.sum), VOCAB.n_ordinary)
    for b, (X, S, _) in enumerate(rows(batch, c)):
        tokens, pos = list(X), list(range(len(X)))
        for i, chunk in enumerate(S):
            first = len(X) + c * i
            tokens += chunk + [VOCAB.sum]
            pos += range(first, first + len(chunk) + 1)
            logits = encoder.head(read(encoder, embed(encoder, tokens), pos)[-1])
            one = logits[:VOCAB.n_ordinary].softmax(0)
            close(alpha[b, i], one.float(), 1e-7)
            assert ((alpha[b, i] - masked[b, i]).abs().max() > 1e-4) == (i > 0)


def test_without_ltsum_the_text_before_is_seen():
    """The LLM's pass is plain causal over X z₀ [S₁] z₁ [S₂] …, but for the text that is followed.

    To change that text changes nothing else.
    """
    llm = tiny(1)
    batch = random_batch([8])
    for follow in None, [1]:
        seq = llm_batch(batch, 2, follow)
        z = random_latents(seq)
        mask = train_sup.LTSUM["off"](seq)

        def run(ids, mask):
            return llm(insert_latents(llm.wte(ids), z, seq.latent), seq.pos, mask)

        found = run(seq.ids, mask)
        followed = seq.segment == 5
        if not follow:
            close(found, run(seq.ids, None))
        else:
            other = run(torch.where(followed, (seq.ids + 1) % VOCAB.n_ordinary, seq.ids), mask)
            assert torch.equal(found[~followed], other[~followed])
            assert (found[followed] != other[followed]).any(1).all()


def test_a_hidden_latent_is_the_hidden_state():
    """Scaled to the embeddings' size; the loss of phase 1 reaches the encoder through it."""
    encoder, llm = (with_flags(tiny(seed), hidden_latents=True) for seed in (0, 1))
    batch = random_batch(CHAINS)
    enc = encoder_batch(batch, 2, VOCAB.sum)
    states = summary_states(encoder, enc)
    E = llm.wte.weight
    alpha, z = alpha_and_latent(encoder, states, E, VOCAB.n_ordinary)
    assert torch.equal(z, states * E.std())
    assert torch.equal(alpha, summarize(encoder, enc, VOCAB.n_ordinary))
    values, ids, _ = top_entries(encoder, states, VOCAB.n_ordinary, 16)
    close(values, states.float(), 0)
    encoder.requires_grad_()
    sup, _ = sup_loss(encoder, llm, enc, llm_batch(batch, 2), chunk_tokens(batch, 2),
                      VOCAB.n_ordinary)
    sup.backward()
    assert all(p.grad is not None and p.grad.any() for p in encoder.h.parameters())


def test_phase_3_on_hidden_states():
    """L_exp as ever; in place of L_lat the mean squared error of the states before the latents.

    And there the probability that the chain goes on.
    """
    llm = with_flags(tiny(1), hidden_latents=True)
    batch = random_batch(CHAINS)
    seq = latent_batch(batch, 2)
    target = torch.randn(*seq.summary_index.shape, 16)
    exp = lat = 0
    for b, (X, S, answer) in enumerate(rows(batch, 2)):
        n = len(S)
        x = torch.cat([embed(llm, X), hidden_as_input(target[b, :n], llm.wte.weight).double(),
                       embed(llm, answer)])
        pos = [*range(len(X)), *range(len(X) + 1, len(X) + 2 * n, 2),
               *range(len(X) + 2 * n, len(X) + 2 * n + len(answer))]
        hidden = read(llm, x, pos)[len(X) - 1:]
        q = llm.head(hidden).log_softmax(1)
        if n:
            lat += ((hidden[:n] - target[b, :n]) ** 2).mean()
            lat -= (1 - q[:n, VOCAB.eot].exp()).log().mean()
        exp += sum(-q[n + t, token] for t, token in enumerate(answer)) / len(answer)
    found_exp, found_lat = hidden_loss(llm, seq, target, None, None)
    close(found_exp.double(), exp / len(CHAINS), 1e-5)
    close(found_lat.double(), lat / len(CHAINS), 1e-5)


def test_decoding_feeds_hidden_states_back():
    llm, x, pos, length = speaker(3)
    with_flags(llm, hidden_latents=True)
    fed = []
    out = decode(llm, VOCAB, x, pos, length, c=2, max_latents=3, max_tokens=1,
                 on_latent=lambda step, q, z, active: fed.append((z, active)))
    for b, n in enumerate(length):
        one, at = x[b, :n], list(range(n))
        for z, active in fed:
            if not active[b]:
                break
            hidden = llm(one[None], torch.tensor([at]))[0, -1]
            close(z[b], hidden_as_input(hidden, llm.wte.weight))
            one, at = torch.cat([one, z[b][None]]), at + [at[-1] + 2]
    assert (out.latents > 1).any()


@pytest.mark.parametrize("flags, latent", [
    (["--ltim", "off", "--ltsum", "off"], ["--start", "sft"]),
    (["--latents", "hidden", "--encoder-first", 1], []),
], ids=["no masks", "hidden"])
def test_the_pipeline_with_ablations(call, capsys, flags, latent):  # noqa: F811
    """Every later script reads what phase 1 said of its latents; a hidden state has no tokens."""
    call("train_sup", *TINY, *flags, "--out", "run")
    call("compress", "--out", "run")
    call("train_latent", "--steps", 2, *latent, "--out", "run")
    call("analyze", "--limit", 4, "--out", "run")
    config = torch.load("run/latent.pt", weights_only=True)["config"]["model"]
    assert config["ltim"] == ("--ltim" not in flags)
    assert config["hidden_latents"] == ("--latents" in flags)
    values = np.load("run/latents/values.npy")
    assert (values < 0).any() == ("--latents" in flags)
    assert ("of α's mass" in capsys.readouterr().out) == ("--latents" not in flags)
    report = json.loads(Path("run/report.json").read_text("utf-8"))
    assert (report["collapse"] is None) == ("--latents" in flags)
    assert ("cannot be cut" in Path("run/report.html").read_text("utf-8")) == ("--latents" in flags)
    if "--latents" in flags:
        for script in "compress", "train_latent", "analyze":
            with pytest.raises(UserError, match="a hidden state has no entries"):
                call(script, "--top-k", 5, "--out", "run")


def test_the_llm_is_frozen_while_the_encoder_is_first(call):  # noqa: F811
    steps = ["--bag-steps", 0, "--steps", 2, "--encoder-first"]
    call("train_sup", *TINY, *steps, 2, "--out", "run")
    sft, sup = (torch.load(f"run/{name}.pt", weights_only=True)["models"] for name in
                ("sft", "sup"))
    assert all(torch.equal(sft["llm"][name], p) for name, p in sup["llm"].items())
    assert not all(torch.equal(sft["llm"][name], p) for name, p in sup["encoder"].items())
    call("train_sup", *TINY, *steps, 1, "--out", "other")
    other = torch.load("other/sup.pt", weights_only=True)["models"]
    assert not all(torch.equal(sft["llm"][name], p) for name, p in other["llm"].items())


def test_phase_3_can_start_from_the_explicit_model(call):  # noqa: F811
    call("train_sup", *TINY, "--out", "run")
    call("compress", "--out", "run")
    call("train_latent", "--steps", 0, "--start", "sft", "--out", "run")
    sft, latent = (torch.load(f"run/{name}.pt", weights_only=True)["models"]["llm"]
                   for name in ("sft", "latent"))
    assert all(torch.equal(sft[name], p) for name, p in latent.items())
