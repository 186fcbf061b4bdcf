"""Phase 2: translate every chain of thought once, and keep its α.

    python compress.py

The encoder of phase 1 runs over the training set; of each α_i the top K entries are kept, scaled to sum to 1. What is
written to --out/latents are flat arrays that phase 3 maps into memory:

    values.npy   float32 (latents, K)   α's largest entries, in falling order
    ids.npy      int32 (latents, K)     whose they are
    offsets.npy  int64 (problems + 1,)  problem r's latents are rows offsets[r] … offsets[r+1] - 1
    meta.json    whose data, chunk size, tokenizer and encoder these are; the mass kept; how far the work has come

At the end it says how much of its chunk a summary holds (ECR). Interrupted and run again with --resume it does the rest.
Next: python train_latent.py
"""
import hashlib
import json
import os

import numpy as np
import torch
from tqdm import tqdm

import common
from data import UserError, splits
from encoder import chunks, encoder_layout, summarize
from train_sup import bags

SAVE_EVERY = 20  # batches between two notes of how far the work has come
SAMPLE = 1000    # problems whose ECR is measured


# -------------------------------------------------------------------------------------------- what a summary holds

def ecr(ids, bag, real, ks):
    """ECR@K, the effective compression rate: tokens of S_i among the top K of α_i, mean over latents, a list over ks.

    ids int (R, N, K): α's largest entries in falling order; bag int (R, N, c): the chunks, padded with -1; real (R, N).
    """
    match = ((ids[:, :, None, :] == bag[..., None]) & (bag >= 0)[..., None])[real]  # (latents, c, K)
    return [match[..., :k].any(2).sum(1).double().mean().item() for k in ks]


def measure_ecr(ids, n, bag, ks):
    """ECR of R chains with their own chunks, bag (R, N, c); with another problem's: chance; with α put on the chunk's most
    frequent tokens: the maximum. n (R,): latents in a chain (DESIGN 7)."""
    N, count = min(ids.size(1), bag.size(1)), (bag[:, :, 0] >= 0).sum(1)
    real = torch.arange(N) < n.minimum(count)[:, None]
    at = torch.arange(N) % count.roll(1).clamp(min=1)[:, None]  # (R, N): from the start again where its chain is shorter
    other, bag = bag.roll(1, 0).gather(1, at[:, :, None].expand(-1, -1, bag.size(2))), bag[:, :N]
    same = bag[..., :, None] == bag[..., None, :]  # (R, N, c, c)
    often = (same.sum(3) * ~same.tril(-1).any(3)).where(bag >= 0, -1)  # padding comes last
    best = bag.gather(2, often.argsort(2, descending=True))
    return {name: ecr(ids, tokens, real, ks) for name, ids, tokens in (
        ("own", ids[:, :N], bag), ("chance", ids[:, :N], other), ("maximum", best, bag))}


# ------------------------------------------------------------------------------------------------------- the store


def identity(weights):
    """16 hex digits that name these weights (a state dict)."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def create(path, dtype, shape):
    """A new array on disk, mapped into memory. Raises UserError where there is no room for it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        array = np.lib.format.open_memmap(path, "w+", dtype, shape)
        if hasattr(os, "posix_fallocate"):  # take the room now: a full disk later would kill the process
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
        return array
    except OSError as error:
        raise UserError(f"could not write {path} ({error})")


def read_json(path):
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error})")


def load_arrays(folder, mode, *names):
    """The arrays of a store, mapped into memory. Raises UserError where one is damaged."""
    try:
        return [np.load(folder / f"{name}.npy", mmap_mode=mode, allow_pickle=False) for name in names]
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{folder} cannot be read ({error}); make it again with: python compress.py --overwrite")


class Store:
    """What phase 2 wrote, mapped into memory: store(rows, N) gives those problems' α.

    Raises UserError where the store is missing, unfinished, or was made from other data or another encoder.
    """

    def __init__(self, folder, **expected):
        meta = read_json(folder / "meta.json")
        if not meta.get("complete"):
            raise UserError(f"{folder} is unfinished; finish it with: python compress.py --resume")
        common.require_same(folder, meta, **expected)
        self.values, self.ids, self.offsets = load_arrays(folder, "r", "values", "ids", "offsets")
        self.top_k = meta["top_k"]

    def __call__(self, rows, N):
        """values float32, ids int64 (B, N, K); past a row's last latent stands whatever follows, to be masked."""
        at = np.minimum(self.offsets[rows][:, None] + np.arange(N), len(self.values) - 1)  # (B, N)
        return torch.from_numpy(self.values[at]), torch.from_numpy(self.ids[at].astype(np.int64))


def main(argv=None):
    p = common.parser(__doc__, "compress")
    args, env = common.setup(p, "compress", argv)
    tokenizer, c, phase1 = env.tokenizer, args.chunk_size, env.parent["config"]
    K = args.top_k if args.top_k is not None else phase1["top_k"] or 50
    if phase1["top_k"] not in (0, K):
        raise UserError(f"--top-k {K} contradicts {args.out}/sup.pt, whose z were made with {phase1['top_k']}")
    K = min(K or tokenizer.n_ordinary, tokenizer.n_ordinary)

    # data and model
    train, = splits(args, env, ["train"])
    common.require_same(args.out / "sup.pt", phase1, fingerprint=train.fingerprint)
    encoder = common.build(env.parent, "encoder", env.device)

    # the store: new, or as an interrupted run left it
    folder = args.out / "latents"
    offsets = np.concatenate([[0], chunks(train.s.length, c).cumsum()])
    meta = {"version": 1, "data": args.data, "cot": args.cot, "fingerprint": train.fingerprint, "seed": args.seed,
            "chunk_size": c, "tokenizer": tokenizer.name, "encoder": identity(env.parent["models"]["encoder"]),
            "top_k": K, "batch_size": args.batch_size, "problems": len(train), "latents": int(offsets[-1])}
    made = {field: env.config[field] for field in ("commit", "torch", "python", "dtype")}
    done, mass = 0, 0.0
    if (folder / "meta.json").exists() and not args.overwrite:
        old = read_json(folder / "meta.json")
        if not args.resume:
            raise UserError(f"{folder} already holds a store; finish it with --resume, or start over with --overwrite")
        common.require_same(folder, old, **meta)
        done, mass = old["done"], old["mass_sum"]
        values, ids = load_arrays(folder, "r+", "values", "ids")
    else:
        (folder / "meta.json").unlink(missing_ok=True)  # no meta, no store: it comes last
        size = (max(1, int(offsets[-1])), K)  # without any chain of thought: one row, read as padding
        values, ids = create(folder / "values.npy", np.float32, size), create(folder / "ids.npy", np.int32, size)
        common.write(folder / "offsets.npy", lambda f: np.save(f, offsets, allow_pickle=False))

    # one pass over the data
    batches = list(train.eval_batches(args.batch_size))
    stop = common.Interrupt()
    with torch.no_grad(), stop:
        for at, batch in enumerate(tqdm(batches[done:], "compress", len(batches), initial=done), done + 1):
            enc = encoder_layout(batch, c, tokenizer.sum)
            with env.autocast():
                alpha = summarize(encoder, enc.to(env.device), tokenizer.n_ordinary)  # (B, N, n_ordinary)
            top, where = (t.cpu().numpy() for t in alpha.topk(K))  # (B, N, K)
            real = np.arange(top.shape[1]) < enc.n.numpy()[:, None]  # (B, N)
            rows = (offsets[batch.rows][:, None] + np.arange(top.shape[1]))[real]
            mass += float(top[real].sum())
            values[rows], ids[rows] = top[real] / top[real].sum(1, keepdims=True), where[real]
            if at % SAVE_EVERY == 0 or at == len(batches) or stop.pressed:
                values.flush(), ids.flush()
                note = dict(meta, **made, done=at, mass_sum=mass, complete=at == len(batches))
                common.write(folder / "meta.json", lambda f: f.write(json.dumps(note, indent=1).encode()))
            if stop.pressed and at < len(batches):
                raise UserError(f"stopped after {at} of {len(batches)} batches and saved; go on with --resume")
    print(f"{folder}: {offsets[-1]} latents of {len(train)} problems; the top {K} hold "
          f"{mass / max(1, offsets[-1]):.4f} of α's mass")
    if offsets[-1]:
        rows = np.arange(min(SAMPLE, len(train)))
        bag, n = bags(train.batch(rows, rows), c), torch.from_numpy(chunks(train.s.length[rows], c))  # (R, N, c), (R,)
        rate = measure_ecr(Store(folder)(rows, bag.size(1))[1], n, bag, [c])
        print("of a chunk's {} tokens, {:.2f} are among the top {} of its α; {:.2f} of another problem's; {:.2f} is the most "
              "there can be".format(c, rate["own"][0], c, rate["chance"][0], rate["maximum"][0]))


if __name__ == "__main__":
    common.start(main)
