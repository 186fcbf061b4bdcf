"""Phase 1: an encoder learns to write chunks of a chain of thought as superpositions, and an LLM
to read them.

    python train_sup.py                                        # the toy task, on a laptop
    python train_sup.py --baselines                            # afterwards: what to compare with
    python train_sup.py --data gsm8k                           # GSM8K, downloaded once
    python train_sup.py --data gsm8k --init gpt2 --lr 1e-4     # from OpenAI's GPT-2
    torchrun --nproc-per-node 2 train_sup.py …                 # several GPUs

First a warm-up, supervised fine-tuning (SFT) on X <bot> S <eot> Ans, kept as sft.pt: an LLM that
thinks in text. Encoder and LLM then start as copies of it. For a few updates the encoder alone
learns that α_i should hold the tokens of chunk S_i. Then both learn together: the encoder turns S_i
into α_i, and the LLM, which sees X and z₀ … z_i but no text of the chain, must predict chunk
S_{i+1}; after one z_k of each problem it must write all the rest. The only path from this loss to
the encoder is through z. Next: compress.py
"""
import copy
import pickle
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path

import torch

import common
from data import UserError, load, splits
from decode import evaluate
from encoder import (alpha_and_latent, chunk_tokens, draw_followed, encoder_batch, explicit_batch,
                     insert_latents, llm_batch, local_supervision_mask, open_supervision_mask,
                     summarize, summary_states, supervision_mask)
from losses import bag_kl, weighted_nll
from model import GPT, GPT2, GPTConfig
from optim import Optimizer, schedule

FROM_START = 0.25  # share of problems whose followed text starts before any latent, besides those
                   # that draw_followed draws so among all chunks
TRAINED_WITH = ("batch_size", "lr", "init")  # what the baselines have in common with the warm-up


def add_flags(p):
    add = p.add_argument_group("baselines").add_argument
    add("--baselines", action="store_true", help="train what latent reasoning is compared with "
        "instead: explicit.pt goes on from sft.pt, no_cot.pt answers at once, X <bot> <eot> Ans")
    add("--baseline-steps", type=int, help="updates of each baseline, those of sft.pt included "
        "(default: as many as sft.pt, sup.pt and latent.pt in --out had)")
    add = p.add_argument_group("ablations").add_argument
    add("--bag", type=float, default=1.0, help="bag-of-tokens loss on α: its weight λ, which "
        "falls to a half of this (default: 1; 0 = off)")
    add("--bag-steps", type=int, help="the first of --steps, in which the encoder learns by that "
        "loss alone")
    add("--follow", type=float, default=1.0, help="weight of the text that is followed to the end "
        "behind one z of each problem (default: 1; 0 = ℓ_sup without such a text)")
    add("--encoder-first", type=int, default=0, metavar="N", help="the LLM stays "
        "frozen for N updates after --bag-steps, as in the released code (default: 0)")
    add("--ltim", choices=["on", "off"], default="on", help="off: a summary token sees the "
        "earlier ones")
    add("--ltsum", choices=["on", "local", "off"], default="on", help="what a chunk sees. local: "
        "the z before it and itself, as in the released code; off: all text before it as well")
    add("--latents", choices=["superposition", "hidden"], default="superposition", help="hidden: "
        "z is the encoder's last hidden state, and phase 3 learns it by regression")


# ---------------------------------------------------------------------------------------- the ideas

def explicit_loss(llm, seq):
    """SFT, one pass over X <bot> S <eot> Ans: the mean −log q of the tokens of S and Ans."""
    hidden = llm(llm.wte(seq.ids), seq.pos, index=seq.predict_index)           # (B, P, C)
    return weighted_nll(llm.head(hidden), seq.target, seq.loss_weight)


def bag_loss(encoder, enc, chunks, n_ordinary):
    """The encoder alone, one pass over the layout `enc`: KL(bag ‖ α). chunks int64 (B, N, c)."""
    alpha = summarize(encoder, enc, n_ordinary)                                # (B, N, n_ordinary)
    return bag_kl(alpha, chunks, enc.n)


LTSUM = {  # --ltsum: the LLM's mask of a layout, bool (B, T, T)
    "on": lambda seq: supervision_mask(seq.segment),
    "local": lambda seq: local_supervision_mask(seq.segment, seq.latent),
    "off": lambda seq: open_supervision_mask(seq.segment, seq.latent),
}


def sup_loss(encoder, llm, enc, seq, chunks, n_ordinary, top_k=0, ltsum="on"):
    """Phase 1: (ℓ_sup, with the term of the followed text if `seq` has one; the KL of bag_kl).

    One pass of the encoder computes all summaries of the layout `enc`, one pass of the LLM all
    continuations of the layout `seq`. chunks int64 (B, N, c), from encoder.chunk_tokens.
    """
    states = summary_states(encoder, enc)                                      # (B, N, C)
    alpha, z = alpha_and_latent(encoder, states, llm.wte.weight, n_ordinary, top_k)
    x = insert_latents(llm.wte(seq.ids), z, seq.latent)                        # (B, T, C)
    hidden = llm(x, seq.pos, LTSUM[ltsum](seq), index=seq.predict_index)       # (B, P, C)
    sup = weighted_nll(llm.head(hidden), seq.target, seq.loss_weight)
    return sup, bag_kl(alpha, chunks, enc.n)


# ---------------------------------------------------------------------------------------- the loops

def train_explicit(name, llm, train, val, steps, args, env):
    """SFT, saved as `name`. Returns the model that was best on validation."""
    caps = train.caps(args.chunk_size)
    train.make_buckets(chain_slots=1)
    common.compile_blocks([llm], args)
    optimizer = Optimizer({llm: args.lr}, env.device)
    run = common.Run(name, args, env, {"llm": llm}, optimizer, train, steps)
    for step in run:
        batch = train.train_batch(step, args.batch_size, args.seed, env.rank, env.world)
        seq = explicit_batch(batch).to(env.device)
        with env.autocast():
            loss = explicit_loss(llm, seq)
        loss.backward()
        common.average_gradients(optimizer.parameters, env.world)
        norm = torch.nn.utils.clip_grad_norm_(optimizer.parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * schedule(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        run.log(loss=loss, norm=norm)
        if run.evaluates:
            run.save(evaluate(llm, val, env, "text", caps)["accuracy"])
    return run.best_model("llm")


def train_superposition(encoder, llm, train, val, args, env):
    """The bag loss alone trains the encoder first; then ℓ_sup, too, trains encoder and LLM."""
    c, tokenizer, steps = args.chunk_size, env.tokenizer, args.steps
    caps = train.caps(c)
    # a token of the chain, its latent included, takes 1 + 1/c slots of the encoder's sequence and,
    # with the followed text, up to 2 + 1/c of the LLM's: one set of buckets for the mean of the two
    train.make_buckets(chain_slots=1.5 + 1 / c)
    common.compile_blocks([encoder, llm], args)
    optimizer = Optimizer({encoder: args.lr, llm: args.lr}, env.device)
    bag_steps = args.bag_steps if args.bag else 0
    models = {"encoder": encoder, "llm": llm}
    run = common.Run("sup", args, env, models, optimizer, train, steps, depends=(
        "chunk_size", "top_k", "bag", "bag_steps", "encoder_first", "follow", "ltsum"))
    for step in run:
        batch = train.train_batch(step, args.batch_size, args.seed, env.rank, env.world)
        enc = encoder_batch(batch, c, tokenizer.sum).to(env.device)
        chunks = chunk_tokens(batch, c).to(env.device)
        with env.autocast():
            if step < bag_steps:  # as long as z means nothing, the LLM has nothing to learn
                rate = schedule(step, bag_steps)
                kl = bag_loss(encoder, enc, chunks, tokenizer.n_ordinary)
                sup = torch.zeros_like(kl)
            else:
                rate = schedule(step - bag_steps, steps - bag_steps)  # a ramp and a cosine again
                follow = draw_followed(batch, c, args.seed, step, env.rank, env.world,
                                       from_start=FROM_START)  # (B,)
                seq = llm_batch(batch, c, follow, args.follow).to(env.device)
                sup, kl = sup_loss(encoder, llm, enc, seq, chunks, tokenizer.n_ordinary,
                                   args.top_k, args.ltsum)
        bag_weight = args.bag * (1 - 0.5 * step / steps)  # not to 0: α would leave its chunk again
        loss = sup + bag_weight * kl
        loss.backward()
        if step < bag_steps + args.encoder_first:
            llm.zero_grad(set_to_none=True)  # without a gradient it stays as it is
        common.average_gradients(optimizer.parameters, env.world)
        norm = torch.nn.utils.clip_grad_norm_(optimizer.parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * rate
        optimizer.step()
        optimizer.zero_grad()
        run.log(loss=loss, sup=sup, bag=kl, norm=norm)
        if run.evaluates:
            gold, rest = (evaluate(llm, val, env, thought, caps, encoder, c, args.top_k)["accuracy"]
                          for thought in ("gold", "continue"))
            run.save((gold + rest) / 2, gold=gold, rest=rest)


def train_baselines(llm, train, val, args, env):
    """Explicit and no chain of thought, with as many updates as latent reasoning has in all."""
    sft = common.load_checkpoint(args.out / "sft.pt")
    same = {field: env.config[field] for field in (*common.PROBLEMS, *common.SHAPE, *TRAINED_WITH)}
    common.require_same(args.out / "sft.pt", sft["config"], **same, fingerprint=train.fingerprint)
    steps = args.baseline_steps
    if steps is None:
        later = [common.load_checkpoint(args.out / file) for file in ("sup.pt", "latent.pt")]
        steps = sft["config"]["sft_steps"] + sum(phase["config"]["steps"] for phase in later)
    explicit = common.build(sft, "llm", env.device)
    rest = max(0, steps - sft["config"]["sft_steps"])
    train_explicit("explicit", explicit, train, val, rest, args, env)
    train, val = splits(args, env, no_cot=True)
    train_explicit("no_cot", llm, train, val, steps, args, env)


# --------------------------------------------------------------------------------------- the script

def initial_model(args, env):
    """--init: a new GPT, OpenAI's GPT-2, or the LLM of a checkpoint; its shape then goes into args.

    Raises UserError where the weights can't be had, or read other tokens.
    """
    if args.init in GPT2 and env.tokenizer.name != "gpt2":
        raise UserError(f"--init {args.init} reads GPT-2's tokens, which the toy task does not "
                        "have; add --data gsm8k")
    try:
        if args.init == "scratch":
            model = GPT(GPTConfig(env.tokenizer.n_vocab, args.block_size, args.n_layer,
                                  args.n_head, args.n_embd))
        elif args.init in GPT2:
            model = GPT.from_gpt2(args.init, env.tokenizer.n_vocab)
        else:
            saved = common.load_checkpoint(Path(args.init))
            common.require_same(args.init, saved["config"], tokenizer=env.tokenizer.name)
            model = common.build(saved, "llm", "cpu")
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, HTTPException,
            pickle.UnpicklingError) as error:
        raise UserError(f"--init {args.init}: {error or type(error).__name__}")
    for field in common.SHAPE:
        env.config[field] = getattr(model.config, field)
        setattr(args, field, env.config[field])
    if args.init != "scratch" and env.rank == 0:
        print(f"--init {args.init}:", *(f"{field}={env.config[field]}" for field in common.SHAPE))
    return model.to(env.device)


def main(argv=None):
    p = common.parser(__doc__, "sup")
    add_flags(p)
    args, env = common.setup(p, "sup", argv)
    llm = initial_model(args, env)
    train, val = splits(args, env)
    if args.data != "toy":  # analyze.py needs the test split: say now if it is missing
        load(args.data, "test", args.data_dir, args.cot)
    if args.baselines:
        train_baselines(llm, train, val, args, env)
        common.say_next("analyze.py", args, env)
        return
    llm = train_explicit("sft", llm, train, val, args.sft_steps, args, env)
    llm.config = replace(llm.config, ltim=args.ltim == "on",
                         hidden_latents=args.latents == "hidden")
    encoder = copy.deepcopy(llm)
    train_superposition(encoder, llm, train, val, args, env)
    common.say_next("compress.py", args, env)


if __name__ == "__main__":
    common.start(main)
