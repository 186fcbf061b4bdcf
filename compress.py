"""Phase 2: turn every chain of thought of the training set into its α, once, and store them.

    python compress.py                    # each problem's own chain
    python compress.py --paths all        # the mean over all its chains
    python compress.py --paths parallel   # the same, and parallel steps share their place

The encoder of phase 1 reads the training set. Of each α_i the K largest entries are kept and scaled
to sum to 1. The store, latents.pt in --out, holds these tensors:

    values   float32 (latents, K)   the K largest entries of each α, in falling order
    ids      int32 (latents, K)     the token id of each entry
    n        int64 (problems,)      how many latents each problem has
    offsets  int64 (problems,)      where its rows begin; equal problems, as --renumber makes them,
                                    share theirs

Next: train_latent.py
"""
import numpy as np
import torch
from tqdm import tqdm

from encoder import (Batch, count_chunks, encoder_batch, ordinary_softmax, pad, summary_states,
                     top_k_renormalized)
from lab.ablations import hidden_entries
from lab.files import UserError, build, load, remove, require, save
from lab.paths import left_out, orders, with_same_places
from lab.setup import setup, start
from lab.sources import known_paths, splits


def choose_chains(train, args, tokenizer):
    """For each problem the chains that its α is the mean of, lists of ids, its own first.

    With --paths all those that are known and have their tokens and step ends in the same places.
    """
    own = [train.s[row] for row in range(len(train))]
    if args.paths == "own":
        return [[chain] for chain in own]
    known = known_paths(train.problems)
    chains = []
    for row, problem in enumerate(train.problems):
        texts = dict.fromkeys([*known[row], *orders(problem)])
        found = [own[row], *(tokenizer.encode(text) for text in texts if text != problem["chain"])]
        chains.append(with_same_places(found, tokenizer))
    print(f"{sum(map(len, chains)) / len(chains):.2f} chains a problem")
    return chains


def mean_alpha(encoder, batch, chains, c, env):
    """α of each problem, the mean over its chains: float32 (B, N, n_ordinary).

    chains: for each problem lists of ids, each as long as its own chain.
    """
    for m in range(max(map(len, chains))):
        rows = [row for row, known in enumerate(chains) if len(known) > m]
        problems = [batch.problems[row]._replace(chain=chains[row][m]) for row in rows]
        enc = encoder_batch(Batch(batch.rows[rows], problems), c, env.tokenizer.sum).to(env.device)
        hidden = summary_states(encoder, enc, env.parts.encoder_mask)          # (b, N, C)
        alpha = ordinary_softmax(encoder.head(hidden), env.tokenizer.n_ordinary)
        share = alpha.new_tensor([1 / len(chains[row]) for row in rows])       # (b,)
        if m == 0:  # every problem has a chain of its own: `rows` are all
            total = torch.zeros_like(alpha)
        total[rows, :alpha.size(1)] += share[:, None, None] * alpha
    return total


@torch.no_grad()
def compress(encoder, train, K, args, env):
    """Write α of every chunk of `train` to latents.pt; returns how many latents it has."""
    c = args.chunk_size
    chains = choose_chains(train, args, env.tokenizer)
    n = count_chunks(train.s.length, c)                                        # (R,)
    kept = [np.ones(k, dtype=bool) for k in n]  # the latents of each problem that have a place
    if args.paths == "parallel":
        kept = [~left_out(problem, train.s[row], env.tokenizer, c)
                for row, problem in enumerate(train.problems)]
        n = np.array([k.sum() for k in kept])
    first = train.first_equal()  # (R,) of equal problems the first, which alone has rows
    is_first = first == np.arange(len(train))                                  # (R,)
    before = (n * is_first).cumsum() - n * is_first  # (R,) rows of the problems before each
    offsets = before[first]                                                    # (R,)
    latents = int(n[is_first].sum())
    values = torch.zeros(max(1, latents), K)  # without any chain: a row for Store.read
    ids = torch.zeros(values.shape, dtype=torch.int32)
    rows = train.order[is_first[train.order]]  # the shortest first
    for i in tqdm(range(0, len(rows), args.batch_size), "compress"):
        batch = train.batch(rows[i:i + args.batch_size])
        with env.autocast():
            if args.latents == "hidden":
                enc = encoder_batch(batch, c, env.tokenizer.sum).to(env.device)
                entries = hidden_entries(summary_states(encoder, enc, env.parts.encoder_mask))
            else:
                alpha = mean_alpha(encoder, batch, [chains[row] for row in batch.rows], c, env)
                entries = top_k_renormalized(alpha, K)                         # (B, N, K)
        entries = [tensor.cpu() for tensor in entries]
        real = pad([kept[row] for row in batch.rows], entries[0].size(1), dtype=bool)  # (B, N)
        index = np.concatenate([offsets[row] + np.arange(n[row]) for row in batch.rows])
        values[index], ids[index] = entries[0][real], entries[1][real].int()
    made_of = {"data": train.fingerprint, "sup": env.parent["id"]}
    save(args.out / "latents.pt", env.settings, made_of, env.made_by, values=values, ids=ids,
         n=torch.from_numpy(n), offsets=torch.from_numpy(offsets))
    remove(args.out, "latent")  # that was made of the store before
    return latents


def main(argv=None):
    args, env = setup(__doc__, "compress", argv)
    train, = splits(args, env, ["train"])
    require(env.parent, data=train.fingerprint)
    encoder = build(env.parent, "encoder", env.device)
    V = env.tokenizer.n_ordinary
    K = args.n_embd if args.latents == "hidden" else min(args.top_k or V, V)
    env.settings["top_k"] = K
    path = args.out / "latents.pt"
    if path.exists() and args.resume:
        settings = {"top_k": K, "dtype": args.dtype, "paths": args.paths}
        load(path, settings, sup=env.parent["id"])
        print(f"{path} is finished")
        return
    if path.exists() and not args.overwrite:
        raise UserError(f"{path} already holds a store; start over with --overwrite")
    latents = compress(encoder, train, K, args, env)
    print(f"{path}: {latents} latents of {len(train)} problems")
    print(f"next: python train_latent.py --out {args.out}")


if __name__ == "__main__":
    start(main)
