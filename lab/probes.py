"""What the analysis has the models do: record a split's latents, decode after given or forced ones.

    latents = record_latents(setting, llm)               # what the latent model thinks
    latents = record_summaries(setting, llm, encoder)    # what the encoder makes of S
    found = decode_after_latents(setting, llm, latents.z, latents.n)
    found = decode_along_path(setting, llm, tokens)      # each z holds one path's chunk

Shapes: R problems, N latents at most, K entries of α that are recorded; the rest as in model.py.
"""
from typing import NamedTuple

import numpy as np
import torch

from data import Problems
from decode import latents_prompt
from encoder import chunk_tokens, count_chunks
from lab.evaluate import evaluate, summaries
from lab.metrics import Latents

RECORDED = 300         # entries of each α that are recorded, the largest ones
FEW, POINTS = 128, 25  # a curve decodes anew at every point: its problems and points at most
FORCED = 1e-6          # mass that is added to each token of a forced chunk


class Setting(NamedTuple):
    """What all measurements share."""

    problems: Problems
    R: int              # the first R problems are measured
    c: int              # tokens of a chunk
    caps: tuple         # (latents, tokens) at which decoding stops
    top_k: int          # entries of q in a z of the latent model, 0 = all
    batch_size: int
    env: object         # device, tokenizer, autocast, parts and settings, from lab.setup


def decode_split(setting, llm, **options):
    """`lab.evaluate.evaluate` in this setting; `options` are further arguments of it."""
    options = {"limit": setting.R, "batch_size": setting.batch_size, **options}
    return evaluate(llm, setting.problems, setting.env, setting.caps, **options)


# ------------------------------------------------------------------------------ recording latents

def allocate(setting, llm, N):
    """Latents of zeros, with room for N of them in each chain (at least 1)."""
    K = min(RECORDED, setting.env.tokenizer.n_ordinary)
    R, N, C = setting.R, max(1, N), llm.config.n_embd
    return Latents(
        n=torch.zeros(R, dtype=torch.int64),
        values=torch.zeros(R, N, K),
        ids=torch.zeros(R, N, K, dtype=torch.int32),
        z=torch.zeros(R, N, C),
        answers={})


def record(latents, rows, t, alpha, z):
    """Record α (..., V) and z (..., C) as the latents t of the problems `rows`."""
    values, ids = alpha.topk(latents.values.size(2))
    latents.values[rows, t] = values.cpu()
    latents.ids[rows, t] = ids.int().cpu()
    latents.z[rows, t] = z.float().cpu()


def record_latents(setting, llm):
    """The chains that the latent model thinks, α = q being its predictions, and its answers."""
    latents = allocate(setting, llm, N=setting.caps[0])

    def on_latent(batch, step, q, z, active):
        rows = torch.from_numpy(batch.rows)[active.cpu()]
        record(latents, rows, step, q[active], z[active])
        latents.n[rows] = step + 1

    found = decode_split(setting, llm, c=setting.c, top_k=setting.top_k, on_latent=on_latent)
    N = max(1, int(latents.n.max()))
    n, *arrays, _ = latents
    return Latents(n, *(array[:, :N] for array in arrays), found["answers"])


@torch.no_grad()
def record_summaries(setting, llm, encoder):
    """What the encoder makes of the true chains, with z in the embeddings of `llm`."""
    problems, env = setting.problems, setting.env
    n = torch.from_numpy(count_chunks(problems.s.length[:setting.R], setting.c))
    latents = allocate(setting, llm, N=int(n.max()))._replace(n=n)
    batch_size = -(-setting.batch_size // 8)  # few, since α of (B, N, V) is large for GPT-2's V
    for batch in problems.eval_batches(batch_size, setting.R):
        with env.autocast():
            alpha, z, _ = summaries(llm, encoder, batch, env, setting.c)
        rows = torch.from_numpy(batch.rows)[:, None]  # (B, 1)
        record(latents, rows, torch.arange(alpha.size(1)), alpha, z)
    return latents


# ------------------------------------------------------------------------- decoding after latents

def decode_after_latents(setting, llm, z, n, end_of_thought=True):
    """The LLM reads X <bot> and these latents, with <eot> or without, and writes on as text.

    z float (R, N, C), n int64 (R,): the latents of the first R problems.
    Returns what `evaluate` does.
    """
    end = [setting.env.tokenizer.eot] if end_of_thought else []

    def prompt(batch):
        rows = torch.from_numpy(batch.rows)
        return latents_prompt(llm, batch, z[rows], n[rows], setting.c, end)

    return decode_split(setting, llm, limit=len(n), prompt=prompt)


def decode_after_prefixes(setting, llm, latents, end_of_thought=True):
    """What follows z_0 … z_{k-1}, for k = 0 … N, or POINTS of them, in the first FEW problems.

    Returns (ks, what `evaluate` does for each of them). A shorter chain is given as a whole.
    """
    n, z = latents.n[:FEW], latents.z[:FEW]
    N = int(n.max())
    ks = np.linspace(0, N, min(POINTS, N + 1)).round().astype(int).tolist()
    return ks, [decode_after_latents(setting, llm, z, n.clamp(max=k), end_of_thought) for k in ks]


def decode_along_path(setting, llm, tokens):
    """Latent decoding in which each q is restricted to the tokens of one path's chunk.

    FORCED is added to each of them, so that a q without mass there becomes equal shares, and the
    sum is scaled to 1. Past the path's last chunk q stays as it is, so that the model ends its
    chain itself.
    tokens: of each problem's path, a list of lists. Returns what `evaluate` does.
    """
    path = chunk_tokens(tokens, setting.c)                                      # (R, N, c)

    def on_latent(batch, step, q, z, active):
        if step >= path.size(1):
            return None
        chunk = path[torch.from_numpy(batch.rows), step].to(q.device)           # (B, c)
        allowed = torch.zeros(len(q), q.size(1) + 1, device=q.device)
        allowed.scatter_(1, chunk.where(chunk >= 0, q.size(1)), 1.0)
        allowed = allowed[:, :-1]                                               # (B, n_ordinary)
        restricted = (q + FORCED) * allowed                                     # (B, n_ordinary)
        total = restricted.sum(1, keepdim=True)                                 # (B, 1)
        return torch.where(total > 0, restricted / total.clamp(min=FORCED), q)

    return decode_split(setting, llm, c=setting.c, top_k=setting.top_k, on_latent=on_latent)
