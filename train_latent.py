"""Phase 3: the LLM learns to produce the latent tokens itself, and to answer after them.

    python train_latent.py

The model starts as the LLM of phase 1, which can read latents. A problem is now the sequence
X <bot> z₀ … z_{n-1} <eot> Ans, made of the α that phase 2 stored, under the causal mask. The
model's next-token distribution must match α_i at the slot before z_i (L_lat), and predict <eot> and
the answer after the last z (L_exp). At every update the α are perturbed anew with Gumbel noise, in
the input and in the target, so that the model sees many chains around the stored one. With
--on-policy the input of some problems is what the model thinks itself; the target stays. The score
is that of latent decoding: it feeds itself latents until it predicts <eot>, then writes the answer.
Next: analyze.py
"""
import torch

from encoder import draw_rows, generator, latent_batch, superpose_sparse
from lab.ablations import hidden_loss
from lab.evaluate import evaluate
from lab.files import Store, build, require
from lab.optim import Optimizer, schedule
from lab.run import Run
from lab.setup import compile_blocks, setup, start
from lab.sources import splits
from losses import gumbel_noise, gumbel_perturb, latent_loss, own_latents

PASSES = 4  # in which an on-policy chain is thought again: so many of its latents are then its own


def train_latent(llm, store, caps, train, val, args, env, **made_of):
    """Minimise L_auto = L_exp + L_lat; the score is the accuracy of latent decoding on `val`."""
    c, K = args.chunk_size, store.values.size(1)
    compile_blocks([llm], args)
    optimizer = Optimizer([llm], args.lr)
    run = Run("latent", args, env, {"llm": llm}, optimizer, args.steps, made_of)
    for step in run:
        batch = train.train_batch(step, args.batch_size, args.seed, chain_slots=1 / c)
        seq = latent_batch(batch, c, store.n[batch.rows].tolist()).to(env.device)
        values, ids = store.read(batch.rows, seq.alpha_index.size(1))          # (B, N, K)
        values, ids = values.to(env.device), ids.to(env.device)
        with env.autocast():
            if args.latents == "hidden":
                exp, lat = hidden_loss(llm, seq, values)
            else:
                noise = gumbel_noise(args.seed, step, values.shape, args.noise)
                p = gumbel_perturb(values, noise.to(env.device))               # (B, N, K)
                z = superpose_sparse(p, ids, llm.wte.weight)                   # (B, N, C)
                rows = draw_rows(generator(args.seed, step, "on-policy"), len(z), args.on_policy)
                if len(rows):
                    own = own_latents(llm, seq.some(rows), z[rows], env.tokenizer.n_ordinary, K,
                                      PASSES)
                    z = z.index_copy(0, torch.from_numpy(rows).to(env.device), own)
                exp, lat = latent_loss(llm, seq, z, p, ids)
        loss = exp + lat
        loss.backward()
        norm = optimizer.step(schedule(step, args.steps))
        run.log(loss=loss, exp=exp, lat=lat, norm=norm)
        if run.due:
            result = evaluate(llm, val, env, caps, c=c, top_k=K)
            run.save(result["accuracy"], steps=result["steps"])


def main(argv=None):
    args, env = setup(__doc__, "latent", argv)
    train, val = splits(args, env)
    made_of = {"data": train.fingerprint, "sup": env.parent["id"]}
    require(env.store, **made_of)
    store = Store(*(env.store[name] for name in Store._fields))
    caps = int(store.n.max()), train.caps(args.chunk_size)[1]
    env.settings.update(store_top_k=store.values.size(1), caps=list(caps))
    llm = build(env.parent, "llm", env.device)
    train_latent(llm, store, caps, train, val, args, env, latents=env.store["id"], **made_of)
    print(f"next: python analyze.py --out {args.out}")


if __name__ == "__main__":
    start(main)
