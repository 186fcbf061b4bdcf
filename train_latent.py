"""Phase 3: the LLM learns to write the latent tokens itself, and to answer after them.

    python train_latent.py

The model starts as the LLM of phase 1, which can read latents. A problem is now X <bot> z_0 … z_{N-1} <eot> Ans, with
the α that phase 2 stored, plain causal, and the model learns to predict every next thing: the next α (L_lat), <eot> and
the answer (L_exp). At every step the α are shaken anew with Gumbel noise, input and target alike, so that the model
meets many chains around the one stored. It is scored by decoding: latents until it says <eot> by itself. Next:
python analyze.py
"""
import numpy as np
import torch
import torch.nn as nn

import common
from compress import Store, identity
from data import splits
from encoder import evaluate, llm_layout, place, superpose_sparse
from train_sup import weighted_nll


# ---------------------------------------------------------------------------------------------- the losses

def shake(values, gumbel):
    """p̃ = softmax(log α + g) over the stored support. values, gumbel (B, N, K) -> (B, N, K) (DESIGN 6)."""
    return (values.clamp(min=1e-30).log() + gumbel).softmax(2)


def latent_kl(p, ids, logits, n):
    """L_lat: KL(p̃ ‖ q), mean over a row's n latents, then over rows; q over the whole vocabulary, p̃ sparse.

    p, ids (B, N, K): the support of p̃; logits (B, N, V): where each latent is predicted; n (B,).
    """
    logits = logits.float()
    log_q = logits.gather(2, ids) - logits.logsumexp(2, keepdim=True)          # (B, N, K)
    kl = (torch.xlogy(p, p) - p * log_q).sum(2)                                # (B, N)
    real = torch.arange(kl.size(1), device=kl.device) < n[:, None]             # (B, N)
    return (kl.where(real, 0).sum(1) / n.clamp(min=1)).mean()


# ------------------------------------------------------------------------------------------------ the idea

class LatentReasoner(nn.Module):
    """Phase 3: one pass over X <bot> z_0 … z_{N-1} <eot> Ans."""

    def __init__(self, llm):
        super().__init__()
        self.llm = llm

    def forward(self, seq, values, ids, gumbel):
        p = shake(values, gumbel)                                              # (B, N, K)
        z = superpose_sparse(p, ids, self.llm.wte.weight)                      # (B, N, C)
        x = place(self.llm.wte(seq.ids), z, seq.latent)                        # (B, T, C)
        hidden = self.llm(x, seq.pos, at=torch.cat([seq.mark, seq.at], 1))     # (B, N + P, C)
        logits, N = self.llm.head(hidden), seq.mark.size(1)
        lat = latent_kl(p, ids, logits[:, :N], seq.n)
        exp = weighted_nll(logits[:, N:], seq.target, seq.weight)
        return exp + lat, {"exp": exp, "lat": lat}


def gumbel_noise(seed, step, size, rank=0, world=1, scale=1.0):
    """float32 scale · Gumbel(0, 1), a function of (seed, step): the same when a run is resumed or shared out."""
    g = np.random.default_rng([seed, step, 3]).gumbel(size=size).astype(np.float32)
    return torch.from_numpy(scale * g[rank::world])


def main(argv=None):
    p = common.parser(__doc__, "latent")
    p.add_argument("--noise", type=float, help="scale of the Gumbel noise (default: 1, as in the paper; toy: 0.25; 0 = off)")
    args, env = common.setup(p, "latent", argv)
    tokenizer, c = env.tokenizer, args.chunk_size

    # data and model
    train, val = splits(args, env)
    encoder = identity(env.parent["models"]["encoder"])
    store = Store(args.out / "latents", fingerprint=train.fingerprint, chunk_size=c, tokenizer=tokenizer.name, encoder=encoder,
                  **{} if args.top_k is None else {"top_k": args.top_k})
    caps = train.caps(c)
    llm = common.build(env.parent, "llm", env.device)
    env.config.update(encoder=encoder, store_top_k=store.top_k, caps=list(caps))

    # phase 3
    run = common.Run("latent", args, env, LatentReasoner(llm), {"llm": llm}, train, args.steps)
    for batch in run:
        seq = llm_layout(batch, c, text=False)
        values, ids = store(batch.rows, seq.mark.size(1))
        noise = gumbel_noise(args.seed, run.step, (args.batch_size, *values.shape[1:]), env.rank, env.world, args.noise)
        run.update(*run.forward(seq, values, ids, noise))
        if run.evaluates:
            val_result = evaluate(llm, val, env, "latent", caps, top_k=store.top_k)
            run.keep(val_result["accuracy"], steps=val_result["steps"])


if __name__ == "__main__":
    common.start(main)
