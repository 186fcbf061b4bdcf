"""Phase 1: an encoder learns to write chunks of thought as superpositions, and an LLM to read them.

    python train_sup.py                              # the toy task, a few minutes on a laptop
    python train_sup.py --data gsm8k                 # GSM8K, downloaded once
    python train_sup.py --data gsm8k --init gpt2 --lr 1e-4     # from OpenAI's GPT-2
    python train_sup.py --no-cot                     # the baseline that answers at once
    torchrun --nproc-per-node 2 train_sup.py …       # several GPUs, or machines that share --out

First plain SFT on X <bot> S <eot> Ans, kept as sft.pt: the explicit-CoT baseline. Encoder and LLM start as copies of
it and learn together: the encoder turns chunk S_i into α_i, and the LLM, seeing X and z_0 … z_i but none of the text,
must predict chunk S_{i+1}. The only path from the loss to the encoder is through z. Next: python compress.py
"""
import copy
import pickle
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from data import UserError, load, splits
from encoder import (chunks, encoder_layout, evaluate, explicit_layout, llm_layout, place, summarize, superpose,
                     supervision_mask)
from model import GPT, GPT2, GPTConfig


# ---------------------------------------------------------------------------------------------- the losses

def weighted_nll(logits, target, weight):
    """−log q summed with the layout's weights, mean over the batch. logits (B, P, V), target, weight (B, P).

    With llm_layout's weights this is ℓ_sup = 1/n Σ_i 1/|J_i| Σ_{t∈J_i} −log p(x_t | X, z_0 … z_i), the paper's
    equation for phase 1; with explicit_layout's it is SFT; with those of phase 3 it is L_exp.
    """
    nll = F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="none")  # (B * P,)
    return (nll * weight.flatten()).sum() / len(target)


def bag_loss(alpha, bag, n):
    """KL(bag_i ‖ α_i), mean over a row's chunks, then over rows: a warm-up that the paper does not have.

    alpha (B, N, n_ordinary); bag (B, N, c): chunk i's own tokens, -1 past its end; n (B,) chunks in a row.
    bag_i is the distribution of a token drawn from chunk i.
    """
    real = bag >= 0                                                       # (B, N, c)
    size = real.sum(2).clamp(min=1)                                       # (B, N)
    log_alpha = alpha.gather(2, bag.clamp(min=0)).clamp(min=1e-9).log()   # (B, N, c)
    same = (bag[:, :, :, None] == bag[:, :, None, :]).sum(3)              # (B, N, c): how often each stands in its chunk
    kl = ((same / size[:, :, None]).log() - log_alpha).where(real, 0).sum(2) / size  # (B, N)
    return (kl.sum(1) / n.clamp(min=1)).mean()


# ----------------------------------------------------------------------------------------------- the ideas

class Explicit(nn.Module):
    """SFT: one model, one pass over X <bot> S <eot> Ans."""

    def __init__(self, llm):
        super().__init__()
        self.llm = llm

    def forward(self, seq):
        hidden = self.llm(self.llm.wte(seq.ids), seq.pos, at=seq.at)  # (B, P, C)
        return weighted_nll(self.llm.head(hidden), seq.target, seq.weight), {}


class Superposition(nn.Module):
    """Phase 1: one pass of the encoder for all summaries, one pass of the LLM for all continuations."""

    def __init__(self, encoder, llm, n_ordinary, top_k, local):
        super().__init__()
        self.encoder, self.llm, self.n_ordinary, self.top_k, self.local = encoder, llm, n_ordinary, top_k, local

    def forward(self, enc, seq, bag, bag_weight, rest=None, rest_weight=0.0):
        alpha = summarize(self.encoder, enc, self.n_ordinary)               # (B, N, n_ordinary)
        z = superpose(alpha, self.llm.wte.weight, self.top_k)               # (B, N, C)
        x = place(self.llm.wte(seq.ids), z, seq.latent)                     # (B, T, C)
        mask = supervision_mask(seq.seg, seq.latent if self.local else None)
        hidden = self.llm(x, seq.pos, mask, at=seq.at)                      # (B, P, C)
        sup = weighted_nll(self.llm.head(hidden), seq.target, seq.weight)
        kl = bag_loss(alpha, bag, enc.n)
        if rest is None:
            return sup + bag_weight * kl, {"sup": sup, "bag": kl}
        x = place(self.llm.wte(rest.ids), z, rest.latent)                   # (B, T, C)
        more = weighted_nll(self.llm.head(self.llm(x, rest.pos, at=rest.at)), rest.target, rest.weight)
        return sup + bag_weight * kl + rest_weight * more, {"sup": sup, "bag": kl, "rest": more}


def bags(batch, c):
    """int64 (B, N, c): each chunk's tokens, -1 past its end; no wider than the longest chain."""
    c = min(c, max(1, batch.s.shape[1]))
    width = -(-max(1, batch.s.shape[1]) // c) * c
    bag = torch.full((len(batch.rows), width), -1)
    s, ns = torch.from_numpy(batch.s), torch.from_numpy(batch.ns)
    bag[:, :s.size(1)] = s.where(torch.arange(s.size(1)) < ns[:, None], -1)
    return bag.view(len(bag), -1, c)  # (B, N, c)


def some_cut(batch, c, seed, step, rank=0, world=1):
    """int64 (B,): of every row so many chunks, 0 … n, drawn evenly; a function of (seed, step)."""
    n = chunks(batch.ns, c)
    return (np.random.default_rng([seed, step, 1]).random(len(n) * world)[rank::world] * (n + 1)).astype(np.int64)


def initial_model(args, env):
    """--init: a new GPT, OpenAI's GPT-2, or the LLM of a checkpoint; the flags of its shape then follow it."""
    if args.init in GPT2 and env.tokenizer.name != "gpt2":
        raise UserError(f"--init {args.init} reads GPT-2's tokens, which the toy task does not have; add --data gsm8k")
    try:
        if args.init == "scratch":
            model = GPT(GPTConfig(env.tokenizer.n_vocab, args.block_size, args.n_layer, args.n_head, args.n_embd))
        elif args.init in GPT2:
            model = GPT.from_gpt2(args.init, env.tokenizer.n_vocab)
        else:
            saved = common.load_checkpoint(Path(args.init))
            common.require_same(args.init, saved["config"], tokenizer=env.tokenizer.name)
            model = common.build(saved, "llm", "cpu")
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, HTTPException, pickle.UnpicklingError) as error:
        raise UserError(f"--init {args.init}: {error or type(error).__name__}")
    for field in common.SHAPE:
        env.config[field] = getattr(model.config, field)
        setattr(args, field, env.config[field])
    if args.init != "scratch" and env.rank == 0:
        print(f"--init {args.init}:", *(f"{field}={env.config[field]}" for field in common.SHAPE))
    return model.to(env.device)


def main(argv=None):
    p = common.parser(__doc__, "sup")
    p.add_argument("--no-cot", action="store_true", help="train the baseline that answers at once instead, X <bot> <eot> Ans, for --sft-steps, as no_cot.pt")
    p.add_argument("--bag", type=float, default=1.0, help="bag-of-tokens warm-up: weight at the start (default 1; 0 = off)")
    p.add_argument("--bag-until", type=float, default=2.0, help="… reaching 0 at this multiple of the steps (default 2: half is "
                   "left at the end)")
    p.add_argument("--rest", type=float, default=0.0, help="weight of a second loss: after the first k latents, k drawn anew, write "
                   "all that follows as text, so that the LLM can go on from any latent (default 0 = off)")
    p.add_argument("--local", action="store_true", help="ablation: a chunk sees only the z before it and itself, as in the authors' code")
    args, env = common.setup(p, "sup", argv)
    tokenizer, c = env.tokenizer, args.chunk_size

    # data and model
    llm = initial_model(args, env)
    train, val = splits(args, env, no_cot=args.no_cot)
    caps = train.caps(c)
    if args.data != "toy":
        load(args.data, "test", args.data_dir, args.cot)  # analyze.py needs it: say now if it is not there

    # explicit warm-up, or the no-CoT baseline
    explicit = args.out / "sft.pt"
    if args.no_cot and explicit.exists():  # the two are compared: they must be of the same problems
        common.require_same(explicit, common.load_checkpoint(explicit)["config"],
                            **{field: env.config[field] for field in ("data", "cot", "seed", *common.SHAPE)})
    elif args.overwrite and not args.no_cot and env.rank == 0:  # of the old phase 1 nothing may be found and resumed
        for old in "sup.pt", "sup.state.pt":
            (args.out / old).unlink(missing_ok=True)
    run = common.Run("no_cot" if args.no_cot else "sft", args, env, Explicit(llm), {"llm": llm}, train, args.sft_steps)
    for batch in run:
        run.update(*run.forward(explicit_layout(batch)))
        if run.evaluates:
            run.keep(evaluate(llm, val, env, "text", caps)["accuracy"])
    if args.no_cot:
        return
    llm = run.best_model("llm")

    # phase 1
    encoder = copy.deepcopy(llm)
    module = Superposition(encoder, llm, tokenizer.n_ordinary, args.top_k, args.local)
    run = common.Run("sup", args, env, module, {"encoder": encoder, "llm": llm}, train, args.steps)
    for batch in run:
        bag_weight = args.bag * max(0.0, 1 - run.step / max(1, args.bag_until * args.steps))
        inputs = [encoder_layout(batch, c, tokenizer.sum), llm_layout(batch, c), bags(batch, c), torch.tensor(bag_weight)]
        if args.rest:
            cut = some_cut(batch, c, args.seed, run.step, env.rank, env.world)
            inputs += [explicit_layout(batch, c, cut), torch.tensor(args.rest)]
        run.update(*run.forward(*inputs))
        if run.evaluates:
            run.keep(evaluate(llm, val, env, "gold", caps, encoder, c, args.top_k)["accuracy"])


if __name__ == "__main__":
    common.start(main)
