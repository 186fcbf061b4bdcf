"""Greedy decoding, as text and in latent tokens, batched on one KV cache.

A row thinks in latent tokens until it predicts <eot>; then it writes its answer as text. A batch
does so in two loops, one that thinks and one that writes. A row that is done with its part waits,
and what it is fed meanwhile is invisible to it.
"""
from typing import NamedTuple

import torch

from encoder import (Sequence, alpha_and_latent, chain_layout, insert_latents, latent_pos, pad,
                     superpose)
from model import KVCache


class Decoded(NamedTuple):
    tokens: list           # for each row the list of ids written, <eot> too, without <|endoftext|>
    latents: torch.Tensor  # int64 (B,) latent steps taken
    capped: torch.Tensor   # bool (B,) cut off at a cap: of latents, of tokens, or of positions


class Reader:
    """A batch of prompts that the LLM has read, and what each row has been fed since.

    hidden (B, C): the LLM's hidden state at each row's last vector; pos int64 (B,): its position.
    """

    def __init__(self, llm, x, pos, length, steps):
        """Read the prompts x (B, T, C) at pos (B, T), of `length` (B,); room for `steps` more."""
        B, T, _ = x.shape
        # under autocast keys and values have autocast's dtype
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else llm.wte.weight.dtype
        self.llm, self.block = llm, llm.config.block_size
        self.cache = KVCache(llm.config, B, T + steps, x.device, dtype)
        slot = torch.arange(T + steps, device=x.device)
        self.visible = slot < length[:, None]                              # (B, T + steps)
        last = (length - 1)[:, None]                                       # (B, 1)
        self.pos = pos.gather(1, last)[:, 0]
        self.hidden = llm(x, pos, cache=self.cache, index=last)[:, 0]

    def feed(self, x, pos, rows):
        """Feed the vectors x (B, C) at pos (B,) to `rows`, bool (B,); the others see nothing."""
        slot = self.cache.length
        self.visible[:, slot] = rows
        at = pos.clamp(max=self.block - 1)[:, None]  # only a row that waits is clamped
        hidden = self.llm(x[:, None], at, self.visible[:, None, :slot + 1], self.cache)[:, 0]
        self.hidden = torch.where(rows[:, None], hidden, self.hidden)
        self.pos = torch.where(rows, pos, self.pos)


def think(reader, tokenizer, c, max_latents, top_k, latent, on_latent=None):
    """Latent steps until the argmax over the whole vocabulary is <eot>: int64 (B,), how many.

    Each feeds z = Σ q[v]·E[v], q being the next-token distribution on the ordinary vocabulary, or
    its `top_k` renormalized. The prompts are questions, after which the first chunk's place begins.
    latent, on_latent: as in `decode`, below.
    """
    llm, nx = reader.llm, reader.pos + 1                                   # (B,)
    n = torch.zeros_like(nx)
    thinks = torch.ones_like(nx, dtype=torch.bool)
    for step in range(max_latents):
        pos = latent_pos(nx, n, c)
        ended = llm.head(reader.hidden).argmax(1) == tokenizer.eot
        thinks = thinks & ~ended & (pos < reader.block)
        if not thinks.any():
            break
        q, z = latent(llm, reader.hidden, llm.wte.weight, tokenizer.n_ordinary, top_k)
        if on_latent:
            replaced = on_latent(step, q, z, thinks)
            z = z if replaced is None else superpose(replaced, llm.wte.weight, top_k)
        reader.feed(z.to(llm.wte.weight.dtype), pos, thinks)
        n = n + thinks
    return n


@torch.no_grad()
def decode(llm, tokenizer, x, pos, length, c=0, top_k=0, max_latents=0, max_tokens=64,
           on_latent=None, latent=alpha_and_latent):
    """Continue a batch of prompts greedily, as text or in latents: a Decoded.

    x, pos     prompts float (B, T, C), padded on the right, and their positions int64 (B, T)
    length     int64 (B,) slots of each prompt. The last one holds <bot> or a z, or <eot> where only
               the answer is to be written
    c          the tokens of a chunk, to think in latent tokens first; 0: to write text at once
    max_*      caps on the latent steps and on the tokens of each row. A row that still thinks when
               it has no steps or positions left gets <eot>, and answers
    on_latent  called as on_latent(step, q, z, active) where rows think: q float32 (B, n_ordinary),
               z (B, C), active bool (B,) the rows that take a latent step; a q that it returns
               takes the place of q
    latent     makes (q, z) of the hidden states: encoder.Parts
    """
    room = llm.config.block_size - int(length.min())  # slots after the shortest prompt
    max_latents, max_tokens = min(max_latents if c else 0, room), min(max_tokens, room + 1)
    reader = Reader(llm, x, pos, length, max_latents + max_tokens)
    n = think(reader, tokenizer, c, max_latents, top_k, latent, on_latent)  # (B,)
    token = llm.head(reader.hidden).argmax(1)                              # (B,)
    capped = (token != tokenizer.eot) & (c > 0)  # still thinking: out of steps or positions
    token = token.masked_fill(capped, tokenizer.eot)
    writes, out = torch.ones_like(capped), []
    for step in range(max_tokens):
        out.append(token.masked_fill(~writes, tokenizer.eos))
        writes = writes & (token != tokenizer.eos)
        pos = reader.pos + 1
        full = (pos >= reader.block) | (step == max_tokens - 1)
        capped, writes = capped | (writes & full), writes & ~full
        if not writes.any():
            break
        reader.feed(llm.wte(token), pos, writes)
        token = llm.head(reader.hidden).argmax(1)
    tokens = [[i for i in row if i != tokenizer.eos] for row in torch.stack(out, 1).tolist()]
    return Decoded(tokens, n, capped)


# ------------------------------------------------------------------------------------------ prompts

def question_prompt(llm, batch):
    """X <bot>, for `decode`: (embeddings (B, T, C), positions int64 (B, T), lengths int64 (B,))."""
    return prompt_of([Sequence(p.question) for p in batch.problems], llm)


def latents_prompt(llm, batch, z, n, c, end):
    """X <bot> z₀ … z_{n-1}, then the tokens `end`: what question_prompt returns.

    z float (B, N, C); n int (B,): how many of its z each row gets, fewer where the model has no
    more positions; c: tokens of a chunk; end: a list of at most one id.
    """
    rows = []
    for p, k in zip(batch.problems, n):
        k = min(int(k), (llm.config.block_size - 1 - len(p.question)) // c)
        rows.append(chain_layout(p.question, [], end, c, k))
    return prompt_of(rows, llm, z)


def prompt_of(rows, llm, z=None):
    """Sequences as prompts, with z (B, N, C) in their latents' slots: as question_prompt's."""
    device = llm.wte.weight.device
    length = torch.tensor([len(row.ids) for row in rows])
    ids, pos, latent = (pad([getattr(row, name) for row in rows], int(length.max())).to(device)
                        for name in ("ids", "pos", "latent"))  # (B, T) each
    x = llm.wte(ids)  # (B, T, C)
    if z is not None:
        x = insert_latents(x, z.to(device), latent)
    return x, pos, length.to(device)
