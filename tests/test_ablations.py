"""Each ablation: what is seen, what is fed, what is learned, and that every script knows of it."""
import json
from inspect import unwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import VOCAB, close, pipeline, random_batch, rows, run_script, tiny
from decode import decode
from encoder import (causal_mask, encoder_batch, induction_mask, latent_batch, ordinary_softmax,
                     summary_states, supervision_mask)
from lab.ablations import hidden_as_input, hidden_entries, hidden_loss, parts_of
from lab.files import UserError, build, load, weights_id
from losses import sup_losses
from test_encoder import embed, positions, read
from test_losses import mean_nll

CHAINS = [7, 0, 4, 1]


def parts(ltim="on", ltsum="on", latents="superposition"):
    return parts_of(SimpleNamespace(ltim=ltim, ltsum=ltsum, latents=latents))


def test_what_is_seen_without_the_masks():
    assert parts().llm_mask == supervision_mask
    assert parts().encoder_mask == induction_mask
    assert parts(ltsum="off").llm_mask == causal_mask == parts(ltim="off").encoder_mask


def test_a_hidden_latent_is_the_hidden_state():
    """Scaled to the embeddings' size; the loss of phase 1 reaches the encoder through it."""
    encoder, llm = tiny(0), tiny(1)
    batch = random_batch(CHAINS)
    enc = encoder_batch(batch, 2, VOCAB.sum)
    states = summary_states(encoder, enc)
    hidden = parts(latents="hidden")
    alpha, z = hidden.latent(encoder, states, llm.wte.weight, VOCAB.n_ordinary)
    assert torch.equal(z, states * llm.wte.weight.std())
    assert torch.equal(alpha, ordinary_softmax(encoder.head(states), VOCAB.n_ordinary))
    values, ids = hidden_entries(states)
    assert torch.equal(values, states.float()) and ids.shape == values.shape
    encoder.requires_grad_()
    states = summary_states(encoder, enc)
    _, z = hidden.latent(encoder, states, llm.wte.weight, VOCAB.n_ordinary)
    sup, cont = sup_losses(llm, z, batch, 2, np.array([2]), [1])
    (sup + cont).backward()
    assert all(p.grad is not None and p.grad.any() for p in encoder.h.parameters())


def test_phase_3_on_hidden_states():
    """L_exp as ever; in place of L_lat the mean squared error of the states before the latents.

    And there the probability that the chain goes on.
    """
    llm, batch = tiny(1), random_batch(CHAINS)
    seq = latent_batch(batch, 2, [len(S) for _, S, _ in rows(batch, 2)])
    target = torch.randn(*seq.alpha_index.shape, 16)
    exp = lat = 0
    for b, (X, S, answer) in enumerate(rows(batch, 2)):
        n = len(S)
        z = hidden_as_input(target[b, :n], llm.wte.weight)
        exp += mean_nll(llm, X, list(z), answer, 2)
        if n:
            x = torch.cat([embed(llm, X), z.double()])
            hidden = read(llm, x, positions(len(X), n, 2, 0))[len(X) - 1:-1]
            lat += ((hidden - target[b, :n]) ** 2).mean()
            lat -= (1 - llm.head(hidden).softmax(1)[:, VOCAB.eot]).log().mean()
    found_exp, found_lat = hidden_loss(llm, seq, target)
    close(found_exp.double(), exp / len(CHAINS), 1e-5)
    close(found_lat.double(), lat / len(CHAINS), 1e-5)


@pytest.mark.parametrize("hidden, flags", [
    (False, ["--ltim", "off", "--ltsum", "off"]), (True, ["--latents", "hidden"]),
], ids=["no masks", "hidden"])
def test_the_pipeline_with_ablations(hidden, flags, tmp_path, monkeypatch):
    """Every later script reads what phase 1 said of its latents; a hidden state has no tokens."""
    for function in summary_states, sup_losses, decode:
        function = unwrap(function)
        # the last default is the method's own part: no script may fall back on it
        defaults = (*function.__defaults__[:-1], pytest.fail)
        monkeypatch.setattr(function, "__defaults__", defaults)
    pipeline(tmp_path, sup=["--chunk-size", 8, *flags])
    run_script("analyze", "--limit", 4, "--out", tmp_path)
    sup, last = (load(tmp_path / f"{name}.pt") for name in ("sup", "latent"))
    assert last["settings"]["ltim"] == ("on" if hidden else "off")
    assert (last["settings"]["latents"] == "hidden") == hidden
    started = build(sup, "llm", "cpu")
    assert last["made_of"]["start"] == weights_id({"llm": started})
    assert (load(tmp_path / "latents.pt")["values"] < 0).any() == hidden
    assert (json.loads(Path(tmp_path, "report.json").read_text())["collapse"] is None) == hidden
    assert ("cannot be cut" in Path(tmp_path, "report.html").read_text("utf-8")) == hidden
    if hidden:
        with pytest.raises(UserError, match="a hidden state has no entries"):
            run_script("compress", "--top-k", 5, "--out", tmp_path)
