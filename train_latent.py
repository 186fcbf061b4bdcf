"""Phase 3: the LLM learns to produce the latent tokens itself, and to answer after them.

    python train_latent.py

The model starts as the LLM of phase 1, which can read latents. A problem is now the sequence
X <bot> z₀ … z_{n-1} <eot> Ans, made of the α that phase 2 stored, under the causal mask. The
model's next-token distribution must match α_i at the slot before z_i (L_lat), and predict <eot> and
the answer after the last z (L_exp). At every update the α are perturbed anew with Gumbel noise, in
the input and in the target, so that the model sees many chains around the stored one. It is scored
by latent decoding: it feeds itself latents until it predicts <eot>, then writes the answer.
Next: analyze.py
"""
import torch

import common
from data import splits
from decode import evaluate
from encoder import hidden_as_input, insert_latents, latent_batch, superpose_sparse
from losses import (eot_penalty, gumbel_noise, gumbel_perturb, latent_kl, latent_mse,
                    weighted_nll)
from model import GPTConfig
from optim import Optimizer, schedule


def add_flags(p):
    add = p.add_argument_group("ablations").add_argument
    add("--noise", type=float, help="scale of the Gumbel noise (default: 1, as in the paper; on "
        "the toy task and with --easy 0.1; 0 = off)")
    add("--start", choices=["sup", "sft"], default="sup", help="the LLM to start from: that of "
        "phase 1 (default), or the warm-up, which has never read a latent")


# ----------------------------------------------------------------------------------------- the idea

def read_chain(llm, seq, z):
    """One causal pass over the chain z (B, N, C): its hidden states (B, N + P, C).

    The first N predict the z, the others <eot> Ans.
    """
    x = insert_latents(llm.wte(seq.ids), z, seq.latent)                        # (B, T, C)
    index = torch.cat([seq.summary_index, seq.predict_index], 1)               # (B, N + P)
    return llm(x, seq.pos, index=index)


def latent_loss(llm, seq, values, ids, noise):
    """Phase 3: (L_exp, L_lat), one causal pass over X <bot> z₀ … z_{n-1} <eot> Ans.

    seq: the Layout of latent_batch; values float32, ids int64 (B, N, K): the stored α; noise
    float32 (B, N, K). The perturbed p̃ makes the input z, and is the target.
    """
    N = seq.summary_index.size(1)
    p = gumbel_perturb(values, noise)                                          # (B, N, K)
    z = superpose_sparse(p, ids, llm.wte.weight)                               # (B, N, C)
    logits = llm.head(read_chain(llm, seq, z))                                 # (B, N + P, V)
    exp = weighted_nll(logits[:, N:], seq.target, seq.loss_weight)
    return exp, latent_kl(p, ids, logits[:, :N], seq.n)


def hidden_loss(llm, seq, values, ids, noise):
    """Ablation, of train_sup.py --latents hidden: (L_exp, the regression loss of the latents).

    values float32 (B, N, C): the encoder's hidden states, input and target; ids and noise are not
    used. A state that is copied may have any q, also one whose argmax is <eot>, which would end the
    chain in decoding. So the loss of the latents also keeps q off <eot>.
    """
    N = seq.summary_index.size(1)
    hidden = read_chain(llm, seq, hidden_as_input(values, llm.wte.weight))     # (B, N + P, C)
    logits = llm.head(hidden)                                                  # (B, N + P, V)
    exp = weighted_nll(logits[:, N:], seq.target, seq.loss_weight)
    eot = seq.target[0, :1]  # every answer begins with it                     # (1,)
    lat = latent_mse(hidden[:, :N], values, seq.n) + eot_penalty(logits[:, :N], eot, seq.n)
    return exp, lat


# ----------------------------------------------------------------------------------------- the loop

def train_latent(llm, store, train, val, args, env):
    """Minimise L_auto = L_exp + L_lat; the score is the accuracy of latent decoding on `val`."""
    c = args.chunk_size
    caps = train.caps(c)
    train.make_buckets(chain_slots=1 / c)
    common.compile_blocks([llm], args)
    loss_of = hidden_loss if llm.config.hidden_latents else latent_loss
    optimizer = Optimizer({llm: args.lr}, env.device)
    run = common.Run("latent", args, env, {"llm": llm}, optimizer, train, args.steps,
                     depends=("chunk_size", "noise", "start", "encoder", "store_top_k"))
    for step in run:
        batch = train.train_batch(step, args.batch_size, args.seed, env.rank, env.world)
        seq = latent_batch(batch, c).to(env.device)
        values, ids = store.read(batch.rows, seq.summary_index.size(1))        # (B, N, K)
        # drawn for the whole batch, so that it is the same among however many processes
        shape = args.batch_size, *values.shape[1:]                             # (batch, N, K)
        noise = gumbel_noise(args.seed, step, shape, args.noise)[env.rank::env.world]
        values, ids, noise = values.to(env.device), ids.to(env.device), noise.to(env.device)
        with env.autocast():
            exp, lat = loss_of(llm, seq, values, ids, noise)
        loss = exp + lat
        loss.backward()
        common.average_gradients(optimizer.parameters, env.world)
        norm = torch.nn.utils.clip_grad_norm_(optimizer.parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * schedule(step, args.steps)
        optimizer.step()
        optimizer.zero_grad()
        run.log(loss=loss, exp=exp, lat=lat, norm=norm)
        if run.evaluates:
            result = evaluate(llm, val, env, "latent", caps, chunk_size=c, top_k=store.top_k)
            run.save(result["accuracy"], steps=result["steps"])


# --------------------------------------------------------------------------------------- the script

def main(argv=None):
    p = common.parser(__doc__, "latent")
    add_flags(p)
    args, env = common.setup(p, "latent", argv)
    train, val = splits(args, env)
    encoder = common.identity(env.parent["models"]["encoder"])
    expected = dict(fingerprint=train.fingerprint, chunk_size=args.chunk_size,
                    tokenizer=env.tokenizer.name, encoder=encoder)
    if args.top_k is not None:
        expected["top_k"] = common.count_entries(args.top_k, env.tokenizer)
    store = common.Store(args.out / "latents", **expected)
    caps = list(train.caps(args.chunk_size))
    env.config.update(encoder=encoder, store_top_k=store.top_k, caps=caps)
    start = env.parent
    if args.start == "sft":
        start = common.load_checkpoint(args.out / "sft.pt")
        common.require_one_warm_up(args.out, {"sft": start, "sup": env.parent})
    llm = common.build(start, "llm", env.device)
    llm.config = GPTConfig(**env.parent["config"]["model"])  # sft.pt has no ablations of phase 1
    train_latent(llm, store, train, val, args, env)
    common.say_next("analyze.py", args, env)


if __name__ == "__main__":
    common.start(main)
