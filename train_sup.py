"""Phase 1: an encoder learns to write chunks of a chain of thought as superpositions, and an LLM
to read them.

    python train_sup.py                              # the toy task, on a laptop
    python train_sup.py --baselines                  # afterwards: what to compare with
    python train_sup.py --data easy                  # easy problems of GSM8K, on a laptop
    python train_sup.py --data gsm8k                 # all of GSM8K, on a GPU
    python train_sup.py --data gsm8k --init gpt2     # from OpenAI's GPT-2

First a warm-up, supervised fine-tuning (SFT) on X <bot> S <eot> Ans, kept as sft.pt: an LLM that
thinks in text. Encoder and LLM then start as copies of it. For a few updates the encoder alone
learns that α_i should hold the tokens of chunk S_i. Then both learn together: the encoder turns S_i
into α_i, and the LLM must read z in place of text. In half of the problems (ℓ_sup) it sees X and
z₀ … z_i but no text of the chain, and must predict chunk S_{i+1}, for all i at once. The others are
continued: after X and z₀ … z_{k-1} it must write all the rest. The only path from these losses to
the encoder is through z. The loss of the first updates goes on beside them, with a weight that
falls to its half. Next: compress.py

args are the flags; env is the device, the tokenizer, the precision and the masks (lab/setup.py). A
Run logs, saves and resumes (lab/run.py). made_of are the ids of what a model was made of.
"""
import copy
from functools import partial

import torch

from encoder import chunk_tokens, draw_continuations, encoder_batch, summary_states, text_batch
from lab.evaluate import continuation_prompt, evaluate, gold_prompt
from lab.files import build, load
from lab.flags import SHAPE, settings_of
from lab.gpt2 import GPT2, from_gpt2
from lab.optim import Optimizer, schedule
from lab.run import Run
from lab.setup import compile_blocks, setup, start
from lab.sources import splits
from losses import bag_kl, sup_losses, text_loss
from model import GPT, GPTConfig


# ---------------------------------------------------------------------------------------- the loops

def train_explicit(name, llm, train, val, steps, args, env, **made_of):
    """SFT, saved as `name`. Returns (the model that was best on validation, its id)."""
    caps = train.caps(args.chunk_size)
    compile_blocks([llm], args)
    optimizer = Optimizer([llm], args.lr)
    made_of["data"] = train.fingerprint
    run = Run(name, args, env, {"llm": llm}, optimizer, steps, made_of)
    for step in run:
        batch = train.train_batch(step, args.batch_size, args.seed)
        seq = text_batch(batch).to(env.device)
        with env.autocast():
            loss = text_loss(llm, seq)
        loss.backward()
        norm = optimizer.step(schedule(step, steps))
        run.log(loss=loss, norm=norm)
        if run.due:
            run.save(evaluate(llm, val, env, caps)["accuracy"])
    return run.best_model("llm")


def train_superposition(encoder, llm, train, val, args, env, **made_of):
    """The bag loss alone trains the encoder first; then encoder and LLM learn together."""
    c, parts, steps = args.chunk_size, env.parts, args.steps
    caps = train.caps(c)
    compile_blocks([encoder, llm], args)
    optimizer = Optimizer([encoder, llm], args.lr)
    bag_steps = args.bag_steps if args.bag else 0
    made_of["data"] = train.fingerprint
    run = Run("sup", args, env, {"encoder": encoder, "llm": llm}, optimizer, steps, made_of)
    for step in run:
        # a token of the chain takes 1 + 1/c slots, its latent included
        batch = train.train_batch(step, args.batch_size, args.seed, chain_slots=1 + 1 / c)
        enc = encoder_batch(batch, c, env.tokenizer.sum).to(env.device)
        chunks = chunk_tokens([p.chain for p in batch.problems], c).to(env.device)
        with env.autocast():
            states = summary_states(encoder, enc, parts.encoder_mask)          # (B, N, C)
            alpha, z = parts.latent(encoder, states, llm.wte.weight, env.tokenizer.n_ordinary)
            bag = bag_kl(alpha, chunks, enc.n)
            if step < bag_steps:  # as long as z means nothing, the LLM has nothing to learn
                rate = schedule(step, bag_steps)
                sup = cont = torch.zeros_like(bag)
            else:
                rate = schedule(step - bag_steps, steps - bag_steps)  # a ramp and a cosine again
                continued, k = draw_continuations(batch, c, args.continuation, args.seed, step)
                sup, cont = sup_losses(llm, z, batch, c, continued, k, parts.llm_mask)
        bag_weight = args.bag * (1 - 0.5 * step / steps)  # not to 0: α would leave its chunk again
        loss = sup + cont + bag_weight * bag
        loss.backward()
        norm = optimizer.step(rate)
        run.log(loss=loss, sup=sup, cont=cont, bag=bag, norm=norm)
        if run.due:
            # α of (B, N, V) is large, so that fewer problems are read at once
            of = dict(llm=llm, encoder=encoder, env=env, c=c)
            gold, rest = (
                evaluate(llm, val, env, caps, partial(prompt, **of), batch_size=64)["accuracy"]
                for prompt in (gold_prompt, continuation_prompt))
            run.save((gold + rest) / 2, gold=gold, rest=rest)


def train_baselines(llm, train, val, args, env):
    """Explicit and no chain of thought, with as many updates as latent reasoning has in all."""
    sft = load(args.out / "sft.pt", settings_of("sft", args), data=train.fingerprint)
    steps = args.baseline_steps
    if steps is None:
        later = [load(args.out / file) for file in ("sup.pt", "latent.pt")]
        steps = sft["settings"]["updates"] + sum(phase["settings"]["updates"] for phase in later)
    explicit = build(sft, "llm", env.device)
    rest = max(0, steps - sft["settings"]["updates"])
    train_explicit("explicit", explicit, train, val, rest, args, env, sft=sft["id"])
    train, val = splits(args, env, no_cot=True)
    train_explicit("no_cot", llm, train, val, steps, args, env)


# --------------------------------------------------------------------------------------- the script

def initial_model(args, env):
    """--init: a new GPT, OpenAI's GPT-2, or the LLM of a checkpoint; its shape goes into args."""
    if args.init == "scratch":
        model = GPT(GPTConfig(env.tokenizer.n_vocab, args.block_size, args.n_layer, args.n_head,
                              args.n_embd))
    elif args.init in GPT2:
        model = from_gpt2(args.init, env.tokenizer.n_vocab)
    else:
        model = build(env.init, "llm", "cpu")
    for field in SHAPE:
        env.settings[field] = getattr(model.config, field)
        setattr(args, field, env.settings[field])
    return model.to(env.device)


def main(argv=None):
    args, env = setup(__doc__, "sup", argv)
    llm = initial_model(args, env)
    train, val = splits(args, env)
    if args.baselines:
        train_baselines(llm, train, val, args, env)
        print(f"next: python analyze.py --out {args.out}")
        return
    llm, sft_id = train_explicit("sft", llm, train, val, args.sft_steps, args, env)
    encoder = copy.deepcopy(llm)
    train_superposition(encoder, llm, train, val, args, env, sft=sft_id)
    print(f"next: python compress.py --out {args.out}")


if __name__ == "__main__":
    start(main)
