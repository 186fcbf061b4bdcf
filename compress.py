"""Phase 2: turn every chain of thought of the training set into its α, once, and store them.

    python compress.py

The encoder of phase 1 reads the training set. Of each α_i the K largest entries are kept and scaled
to sum to 1. The folder latents in --out then holds arrays that phase 3 maps into memory:

    values.npy   float32 (latents, K)   the K largest entries of each α, in falling order
    ids.npy      int32 (latents, K)     the token id of each entry
    offsets.npy  int64 (problems,)      where the rows of each problem begin; equal problems, as
                                        --renumber makes them, share theirs
    meta.json    what they were made with and made of

They are written in a folder beside it, which is moved there when it is whole. At the end the
effective compression rate (ECR) is printed: how many tokens of its chunk are among the largest
entries of an α. Next: train_latent.py
"""
import numpy as np
import torch
from tqdm import tqdm

from encoder import (chunk_tokens, count_chunks, encoder_batch, ordinary_softmax, summary_states,
                     top_k_renormalized)
from lab.ablations import hidden_entries
from lab.files import Store, StoreWriter, UserError, build, load
from lab.metrics import measure_ecr
from lab.setup import setup, start
from lab.sources import splits

SAMPLE = 1000  # problems of which the ECR is measured


def choose_top_k(args, env):
    """K: --top-k, or that of phase 1, or 50; 0 is the whole ordinary vocabulary.

    Raises UserError where phase 1 made its z from a top-k and K is another one.
    """
    phase1 = env.parent["settings"]["top_k"]
    K = args.top_k if args.top_k is not None else phase1 or 50
    if args.latents == "hidden":
        if args.top_k is not None:
            raise UserError(f"--top-k {K}: a hidden state has no entries to choose from; leave it "
                            "out")
        return args.n_embd  # it is kept whole, a channel an entry
    if phase1 not in (0, K):
        raise UserError(f"--top-k {K} contradicts {args.out}/sup.pt, whose z were made with "
                        f"{phase1}")
    return min(K or env.tokenizer.n_ordinary, env.tokenizer.n_ordinary)


@torch.no_grad()
def compress(encoder, train, K, args, env):
    """Write α of every chunk of `train` to a new store; returns (its latents, their mass kept)."""
    c, tokenizer, mass = args.chunk_size, env.tokenizer, 0.0
    first = train.first_equal()                                                # (R,)
    is_first = first == np.arange(len(train))                                  # (R,)
    n = count_chunks(train.s.length, c) * is_first                             # (R,)
    offsets = (n.cumsum() - n)[first]                                          # (R,)
    store = StoreWriter(args.out / "latents", int(n.sum()), K)
    rows = train.order[is_first[train.order]]  # the shortest first
    batches = [rows[i:i + args.batch_size] for i in range(0, len(rows), args.batch_size)]
    for rows in tqdm(batches, "compress"):
        enc = encoder_batch(train.batch(rows, rows), c, tokenizer.sum).to(env.device)
        with env.autocast():
            hidden = summary_states(encoder, enc, env.parts.encoder_mask)      # (B, N, C)
            if args.latents == "hidden":
                values, ids, kept = hidden_entries(hidden)
            else:
                alpha = ordinary_softmax(encoder.head(hidden), tokenizer.n_ordinary)
                values, ids, kept = top_k_renormalized(alpha, K)               # (B, N, K)
        index = np.arange(values.size(1))                                      # (N,)
        real = index < enc.n.cpu().numpy()[:, None]                            # (B, N)
        index = (offsets[rows][:, None] + index)[real]
        store.values[index] = values.cpu().numpy()[real]
        store.ids[index] = ids.cpu().numpy()[real]
        mass += float(kept.cpu()[torch.from_numpy(real)].sum())
    made_of = {"data": train.fingerprint, "sup": env.parent["id"]}
    store.finish(offsets, env.settings, made_of, env.made_by)
    return int(n.sum()), mass


def report_ecr(train, folder, c):
    """Print the ECR at K = c: how many of a chunk's tokens are among the top c of its α."""
    rows = np.arange(min(SAMPLE, len(train)))
    chunks = chunk_tokens(train.batch(rows, rows), c)                     # (R, N, c)
    n = torch.from_numpy(count_chunks(train.s.length[rows], c))           # (R,)
    _, ids = Store(folder).read(rows, chunks.size(1))                     # (R, N, K)
    rate = measure_ecr(ids, n, chunks, [c])
    print(f"of a chunk's {c} tokens, {rate['own'][0]:.2f} are among the top {c} of its α; "
          f"{rate['chance'][0]:.2f} of another problem's; {rate['maximum'][0]:.2f} is the most "
          "there can be")


def main(argv=None):
    args, env = setup(__doc__, "compress", argv)
    train, = splits(args, env, ["train"])
    load(args.out / "sup.pt", data=train.fingerprint)
    encoder = build(env.parent, "encoder", env.device)
    env.settings["top_k"] = K = choose_top_k(args, env)
    folder = args.out / "latents"
    if folder.exists() and args.resume:
        load(folder, {"top_k": K, "dtype": args.dtype}, sup=env.parent["id"])
        print(f"{folder} is finished")
        return
    if folder.exists() and not args.overwrite:
        raise UserError(f"{folder} already holds a store; start over with --overwrite")
    latents, mass = compress(encoder, train, K, args, env)
    print(f"{folder}: {latents} latents of {len(train)} problems")
    if latents and args.latents != "hidden":
        print(f"the top {K} hold {mass / latents:.4f} of α's mass")
        report_ecr(train, folder, args.chunk_size)
    print(f"next: python train_latent.py --out {args.out}")


if __name__ == "__main__":
    start(main)
