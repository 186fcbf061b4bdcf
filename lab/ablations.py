"""Ablations: what the flags of train_sup.py put in the place of a part of the method.

    --ltim off         encoder_mask   a summary token sees the earlier ones
    --ltsum off        llm_mask       all text of earlier chunks is seen beside the latents
    --latents hidden   latent         z is the encoder's last hidden state, scaled, without any α

Hidden states are stored whole, and phase 3 learns them by regression.
"""
import torch

from encoder import (Parts, alpha_and_latent, causal_mask, induction_mask, ordinary_softmax,
                     supervision_mask)
from losses import mean_over_latents, read_chain, weighted_nll


def parts_of(args):
    """The encoder.Parts of a run. args: its settings, with ltim, ltsum and latents."""
    return Parts(
        encoder_mask=induction_mask if args.ltim == "on" else causal_mask,
        llm_mask=supervision_mask if args.ltsum == "on" else causal_mask,
        latent=hidden_latent if args.latents == "hidden" else alpha_and_latent)


# ------------------------------------------------------------------------------------ hidden states

def hidden_as_input(hidden, E):
    """A hidden state, scaled to be read like an embedding.

    It comes from a LayerNorm, so that its entries are about 1 in size; those of E about E.std().
    """
    return hidden * E.std().detach()


def hidden_latent(model, hidden, E, n_ordinary, top_k=0):
    """In place of encoder.alpha_and_latent: the same α, and the scaled hidden state as z."""
    return ordinary_softmax(model.head(hidden), n_ordinary), hidden_as_input(hidden, E)


def hidden_entries(hidden):
    """In place of encoder.top_k_renormalized: what the store holds of hidden states (B, N, C)."""
    return hidden.float(), torch.zeros_like(hidden, dtype=torch.int64)


def hidden_loss(llm, seq, states):
    """In place of losses.latent_loss: (L_exp, the regression loss of the latents).

    states float32 (B, N, C): the encoder's hidden states, input and target. A state that is copied
    may have any q, also one whose argmax is <eot>, which would end the chain in decoding. So the
    loss of the latents also keeps q off <eot>.
    """
    N = seq.alpha_index.size(1)
    hidden = read_chain(llm, seq, hidden_as_input(states, llm.wte.weight))     # (B, N + P, C)
    logits = llm.head(hidden)                                                  # (B, N + P, V)
    exp = weighted_nll(logits[:, N:], seq.target, seq.loss_weight)
    eot = seq.target[0, :1]  # every answer begins with it                     # (1,)
    error = (hidden[:, :N].float() - states).square().mean(2)                  # (B, N)
    logits = logits[:, :N].float()
    others = logits.index_fill(2, eot, -torch.inf)                             # (B, N, V)
    on_eot = logits.logsumexp(2) - others.logsumexp(2)  # −log(1 − q[<eot>])   # (B, N)
    return exp, mean_over_latents(error, seq.n) + mean_over_latents(on_eot, seq.n)
