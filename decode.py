"""Greedy decoding, as text and in latent tokens, batched on one KV cache.

A row produces its chain of thought, as latent tokens or as text, until it predicts <eot>; then it
writes its answer as text. Rows of different length are decoded together: each changes from latents
to text at its own step, and no vector is fed twice.
"""
from typing import NamedTuple

import torch

from encoder import Sequence, alpha_and_latent, insert_latents, latent_pos, pad, superpose
from model import KVCache


class Decoded(NamedTuple):
    tokens: list           # for each row the list of ids written, <eot> too, without <|endoftext|>
    latents: torch.Tensor  # int64 (B,) latent steps taken
    capped: torch.Tensor   # bool (B,) cut off at a cap: of latents, of tokens, or of positions


class RowState:
    """The state of each row: thinking in latents, writing text, or done. Tensors (B,).

    thinking, done, capped: bool; latents, written: int64, the latent steps and the tokens so far;
    pos: int64, the position of the last vector.
    """

    def __init__(self, pos, c, tokenizer, max_latents, max_tokens, block_size):
        B, device = len(pos), pos.device
        self.pos, self.c, self.tokenizer = pos, c, tokenizer
        self.max_latents, self.max_tokens = max_latents, max_tokens
        self.block_size = block_size
        self.nx = pos + 1  # who thinks in latents begins behind X <bot>, of so many positions
        self.thinking = torch.full((B,), c > 0, device=device)
        self.done = torch.zeros(B, dtype=torch.bool, device=device)
        self.capped = torch.zeros(B, dtype=torch.bool, device=device)
        self.latents = torch.zeros(B, dtype=torch.int64, device=device)
        self.written = torch.zeros(B, dtype=torch.int64, device=device)

    def advance(self, token):
        """Update the state by the argmax tokens, int64 (B,): (token, written), both int64 (B,).

        token is what the next step feeds to a row that writes text, and written what a row adds to
        its text, -1 where nothing. Afterwards `thinking` are the rows that take a latent step, and
        `latents` counts it. A row that has taken max_latents steps gets <eot> in place of its
        token, and then answers. A row that would need more than block_size positions is cut off.
        """
        eot, eos = self.tokenizer.eot, self.tokenizer.eos
        overlong = self.thinking & (token != eot) & (self.latents >= self.max_latents)
        token = token.masked_fill(overlong, eot)
        self.thinking &= token != eot
        silent = self.thinking | self.done
        written = token.masked_fill(silent, -1)
        self.written += ~silent
        self.done |= ~self.thinking & (token == eos)
        # of z_i with i = latents, those taken so far: the next one is counted below
        next_latent = latent_pos(self.nx, self.latents, self.c)
        self.pos = torch.where(self.thinking, next_latent, self.pos + 1)
        full = (self.pos >= self.block_size) | (self.written >= self.max_tokens)
        stopped = ~self.done & full
        self.done |= stopped
        self.thinking &= ~self.done
        self.latents += self.thinking
        self.capped |= overlong | stopped
        return token, written


def prefill(llm, x, pos, length, extra):
    """One pass over the prompts x (B, T, C) at pos (B, T): (hidden, cache, visible).

    hidden (B, C) at each prompt's last vector; a KVCache with `extra` free slots; visible bool
    (B, T + extra), False at the padding, past each prompt's `length` (B,).
    """
    B, T, _ = x.shape
    device = x.device
    # under autocast keys and values have autocast's dtype
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else llm.wte.weight.dtype
    cache = KVCache(llm.config, B, T + extra, device, dtype)
    slot = torch.arange(T + extra, device=device)
    visible = (slot < length[:, None]) | (slot >= T)  # the prompt's own slots, and those to come
    hidden = llm(x, pos, cache=cache, index=(length - 1)[:, None])[:, 0]  # (B, C)
    return hidden, cache, visible


@torch.no_grad()
def decode(llm, tokenizer, x, pos, length, c=0, top_k=0, max_latents=0, max_tokens=64,
           on_latent=None, latent=alpha_and_latent):
    """Continue a batch of prompts greedily, as text or in latents: a Decoded.

    x, pos     prompts float (B, T, C), padded on the right, and their positions int64 (B, T)
    length     int64 (B,) slots of each prompt. The last one holds <bot> or a z, or <eot> where only
               the answer is to be written
    c          the tokens of a chunk, to think in latent tokens: until the argmax over the whole
               vocabulary is <eot>, a step feeds z = Σ q[v]·E[v], q being the next-token
               distribution on the ordinary vocabulary (or its `top_k` renormalized); then the row
               writes text. 0: it writes text at once
    max_*      caps on the latent steps and on the tokens of each row
    on_latent  called as on_latent(step, q, z, active) where rows think: q float32 (B, n_ordinary),
               z (B, C), active bool (B,) the rows that take a latent step; a q that it returns
               takes the place of q
    latent     makes (q, z) of the hidden states: encoder.Parts

    Each step feeds one vector a row. Step t fills slot T + t in all rows, but each row has its own
    position; the padding between is never visible.
    """
    B, T, _ = x.shape
    block = llm.config.block_size
    steps = (max_latents if c else 0) + max_tokens
    last = pos.gather(1, (length - 1)[:, None])[:, 0]  # (B,)
    steps = max(0, min(steps, block - 1 - int(last.min())))
    hidden, cache, visible = prefill(llm, x, pos, length, steps)
    state = RowState(last, c, tokenizer, max_latents, max_tokens, block)
    out = []
    for step in range(steps + 1):
        token, written = state.advance(llm.head(hidden).argmax(1))
        out.append(written)
        if state.done.all():
            break
        x = llm.wte(token)  # (B, C)
        if state.thinking.any():
            q, z = latent(llm, hidden, llm.wte.weight, tokenizer.n_ordinary, top_k)
            if on_latent:
                replaced = on_latent(step, q, z, state.thinking)
                z = z if replaced is None else superpose(replaced, llm.wte.weight, top_k)
            z = z.to(x.dtype)
            x = torch.where(state.thinking[:, None], z, x)
        pos = state.pos.clamp(max=block - 1)[:, None]  # (B, 1); only a done row is clamped
        hidden = llm(x[:, None], pos, visible[:, None, :T + step + 1], cache)[:, 0]  # (B, C)
    rows = torch.stack(out, 1).tolist()
    tokens = [[i for i in row if i >= 0 and i != tokenizer.eos] for row in rows]
    return Decoded(tokens, state.latents, state.capped)


# ------------------------------------------------------------------------------------------ prompts

def question_prompt(llm, batch, device):
    """X <bot>, for `decode`: (embeddings (B, T, C), positions int64 (B, T), lengths int64 (B,))."""
    return prompt_of([Sequence(p.question) for p in batch.problems], llm, None, device)


def latents_prompt(llm, batch, z, n, c, end, device):
    """X <bot> z₀ … z_{n-1}, then the tokens `end`: what question_prompt returns.

    z float (B, N, C); n int (B,): how many of its z each row gets, fewer where the model has no
    more positions; c: tokens of a chunk; end: a list of at most one id.
    """
    rows = []
    for problem, k in zip(batch.problems, n):
        row, nx = Sequence(problem.question), len(problem.question)
        k = min(int(k), (llm.config.block_size - 1 - nx) // c)
        for i in range(k):
            row.add_latent(i, latent_pos(nx, i, c))
        row.add_text(end, latent_pos(nx, k - 1, c) + 1)
        rows.append(row)
    return prompt_of(rows, llm, z, device)


def prompt_of(rows, llm, z, device):
    """Sequences as prompts, with z in the slots of their latents."""
    length = torch.tensor([len(row.ids) for row in rows])
    ids, pos, latent = (pad([getattr(row, name) for row in rows], int(length.max())).to(device)
                        for name in ("ids", "pos", "latent"))  # (B, T) each
    x = llm.wte(ids)  # (B, T, C)
    if z is not None:
        x = insert_latents(x, z.to(device), latent)
    return x, pos, length.to(device)
