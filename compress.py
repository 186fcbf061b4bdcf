"""Phase 2: turn every chain of thought of the training set into its α, once, and store them.

    python compress.py

The encoder of phase 1 reads the training set. Of each α_i the K largest entries are kept and scaled
to sum to 1. The folder latents in --out then holds arrays that phase 3 maps into memory:

    values.npy   float32 (latents, K)   the K largest entries of each α, in falling order
    ids.npy      int32 (latents, K)     the token id of each entry
    offsets.npy  int64 (problems,)      where the rows of each problem begin; equal problems, as
                                        --renumber makes them, share theirs
    meta.json    the data, tokenizer, encoder and chunk size that they come from; the mass that the
                 kept entries had; how many batches are done

At the end the effective compression rate (ECR) is printed: how many tokens of its chunk are among
the largest entries of an α. After an interruption, --resume does the rest.
Next: train_latent.py
"""
import numpy as np
import torch
from tqdm import tqdm

import common
from data import UserError, splits
from encoder import chunk_tokens, count_chunks, encoder_batch, ordinary_softmax, summary_states
from metrics import measure_ecr

SAVE_EVERY = 20  # batches between two saves
SAMPLE = 1000    # problems of which the ECR is measured


# ----------------------------------------------------------------------------------------- the idea

def top_entries(encoder, hidden, n_ordinary, K):
    """What the store holds of hidden states at L, (B, N, C): (values, ids, mass).

    values float32, ids int64 (B, N, K): α's K largest entries, scaled to sum to 1; mass (B, N):
    what they summed to before. Ablation hidden_latents: the hidden state itself, no ids.
    """
    if encoder.config.hidden_latents:
        no_ids = torch.zeros_like(hidden, dtype=torch.int64)
        return hidden.float(), no_ids, hidden.new_ones(hidden.shape[:2])
    values, ids = ordinary_softmax(encoder.head(hidden), n_ordinary).topk(K)   # (B, N, K)
    mass = values.sum(2)                                                       # (B, N)
    return values / mass[:, :, None], ids, mass


def choose_top_k(args, env):
    """K: --top-k, or that of phase 1, or 50; 0 is the whole ordinary vocabulary.

    Raises UserError where phase 1 made its z from a top-k and K is another one.
    """
    model = env.parent["config"]["model"]
    if model["hidden_latents"]:
        return model["n_embd"]  # a hidden state is kept whole, a channel an entry
    phase1 = env.parent["config"]["top_k"]
    K = args.top_k if args.top_k is not None else phase1 or 50
    if phase1 not in (0, K):
        raise UserError(f"--top-k {K} contradicts {args.out}/sup.pt, whose z were made with "
                        f"{phase1}")
    return common.count_entries(K, env.tokenizer)


# ---------------------------------------------------------------------------------------- the store

def open_store(folder, meta, offsets, args):
    """A new store, or that of an interrupted run: (values, ids, batches done, mass kept so far).

    meta is what the store must come from; offsets int64 (problems,). Raises UserError where
    the folder holds a store that the flags do not allow to go on or to replace.
    """
    if (folder / "meta.json").exists() and not args.overwrite:
        if not args.resume:
            raise UserError(f"{folder} already holds a store; finish it with --resume, or start "
                            "over with --overwrite")
        old = common.read_meta(folder, "done", "mass_sum")
        common.require_same(folder, old, **meta)
        values, ids = common.load_arrays(folder, "r+", "values", "ids")
        return values, ids, old["done"], old["mass_sum"]
    shape = max(1, meta["latents"]), meta["top_k"]  # without any chain: a row for Store.read
    values, ids = common.create_arrays(
        folder, values=(np.float32, shape), ids=(np.int32, shape))
    common.write(folder / "offsets.npy", lambda f: np.save(f, offsets, allow_pickle=False))
    return values, ids, 0, 0.0


def report_ecr(folder, train, c):
    """Print the ECR at K = c: how many of a chunk's tokens are among the top c of its α."""
    rows = np.arange(min(SAMPLE, len(train)))
    chunks = chunk_tokens(train.batch(rows, rows), c)                     # (R, N, c)
    n = torch.from_numpy(count_chunks(train.s.length[rows], c))           # (R,)
    _, ids = common.Store(folder).read(rows, chunks.size(1))              # (R, N, K)
    rate = measure_ecr(ids, n, chunks, [c])
    print(f"of a chunk's {c} tokens, {rate['own'][0]:.2f} are among the top {c} of its α; "
          f"{rate['chance'][0]:.2f} of another problem's; {rate['maximum'][0]:.2f} is the most "
          "there can be")


# ----------------------------------------------------------------------------------------- the loop

def compress(encoder, train, same_as, meta, args, env):
    """Write the store: α of every chunk of `train`. Returns the mass that the kept entries had.

    same_as int64 (R,): for each problem the first that is equal to it, itself as a rule. A copy is
    not read, has no rows of its own, and gets the offset of that one. meta: what the store is made
    from, as it stands in meta.json.
    """
    folder, c, tokenizer = args.out / "latents", args.chunk_size, env.tokenizer
    is_first = same_as == np.arange(len(train))                                # (R,)
    n = count_chunks(train.s.length, c) * is_first                             # (R,)
    offsets = (n.cumsum() - n)[same_as]                                        # (R,)
    values, ids, done, mass = open_store(folder, meta, offsets, args)
    made_by = {field: env.config[field] for field in ("commit", "torch", "python")}
    rows = train.order[is_first[train.order]]  # the shortest first
    batches = [rows[i:i + args.batch_size] for i in range(0, len(rows), args.batch_size)]
    progress = tqdm(batches[done:], "compress", len(batches), initial=done)
    with torch.no_grad(), common.Interrupt() as interrupt:
        for done, rows in enumerate(progress, done + 1):
            batch = train.batch(rows, rows)
            enc = encoder_batch(batch, c, tokenizer.sum).to(env.device)
            with env.autocast():
                top_values, top_ids, top_mass = top_entries(
                    encoder, summary_states(encoder, enc), tokenizer.n_ordinary, meta["top_k"])
            index = np.arange(enc.summary_index.size(1))                       # (N,)
            real = torch.from_numpy(index).to(env.device) < enc.n[:, None]     # (B, N)
            index = (offsets[rows][:, None] + index)[real.cpu().numpy()]
            values[index] = top_values[real].cpu().numpy()
            ids[index] = top_ids[real].cpu().numpy()
            if not np.isfinite(values[index]).all():
                raise UserError(f"{args.out / 'sup.pt'}: its encoder gives values that are not "
                                "finite; train it again, with --overwrite and a smaller --lr")
            mass += float(top_mass[real].sum())
            if done % SAVE_EVERY == 0 or done == len(batches) or interrupt.pressed:
                values.flush()
                ids.flush()
                progress_so_far = dict(done=done, mass_sum=mass, complete=done == len(batches))
                common.write_json(folder / "meta.json", {**meta, **made_by, **progress_so_far})
            if interrupt.pressed and done < len(batches):
                raise UserError(f"stopped after {done} of {len(batches)} batches and saved; go on "
                                "with the same command and --resume")
    return mass


# --------------------------------------------------------------------------------------- the script

def main(argv=None):
    p = common.parser(__doc__, "compress")
    args, env = common.setup(p, "compress", argv)
    train, = splits(args, env, ["train"])
    common.require_same(args.out / "sup.pt", env.parent["config"], fingerprint=train.fingerprint)
    encoder = common.build(env.parent, "encoder", env.device)
    K = choose_top_k(args, env)
    same_as = train.first_equal()
    different = np.unique(same_as)
    latents = int(count_chunks(train.s.length[different], args.chunk_size).sum())
    meta = {"version": 2, "data": args.data, "cot": args.cot, "fingerprint": train.fingerprint,
            "seed": args.seed, "chunk_size": args.chunk_size, "tokenizer": env.tokenizer.name,
            "encoder": common.identity(env.parent["models"]["encoder"]), "top_k": K,
            "dtype": args.dtype, "batch_size": args.batch_size, "problems": len(train),
            "latents": latents}
    env.held = common.lock(args.out)  # held as long as env lives; a Run of a training has one too
    mass = compress(encoder, train, same_as, meta, args, env)
    equal = f" ({len(different)} different ones)" if len(different) < len(train) else ""
    print(f"{args.out / 'latents'}: {latents} latents of {len(train)} problems{equal}")
    if latents and not encoder.config.hidden_latents:
        print(f"the top {K} hold {mass / latents:.4f} of α's mass")
        report_ecr(args.out / "latents", train, args.chunk_size)
    common.say_next("train_latent.py", args, env)


if __name__ == "__main__":
    common.start(main)
