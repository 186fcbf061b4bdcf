"""The GPT: plain PyTorch, attention and KV cache by hand. Used twice, as encoder and as LLM.

    model = GPT(GPTConfig(vocab_size=512))            # new weights; GPT-2's: lab/gpt2.py
    hidden = model(model.wte(ids))                    # (B, T, C)
    logits = model.head(hidden)                       # (B, T, V)

Two things differ from an ordinary GPT, and both are for latent tokens. The input is a sequence of
vectors, so that a weighted mean of token embeddings can be fed as well as a token. And three things
are separate: where a vector is stored (its slot), which position embedding it gets (its position),
and which slots it attends to (its row of the mask). So one pass can hold a chunk of text and the
latent token that stands for it: in different slots, the latent at the position of the chunk's last
token, and neither seeing the other.

Shapes, here and in every file:
    B  batch           T  slots fed in this call         A  slots attended to: the cache's, then T
    C  channels        H  heads, of D = C / H channels   V  vocabulary
    N  latent tokens   K  entries of a top-k             P  slots whose hidden state is returned
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    vocab_size: int
    block_size: int = 128
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    gelu: str = "none"  # F.gelu's `approximate`: exact is faster on a CPU, GPT-2 has "tanh"


class KVCache:
    """Keys and values of the vectors already read, one slot each; the caller makes it.

    Slots are filled in the order of the calls, whatever the positions. All rows share `length`; a
    row that is shorter holds padding in some slots, and its mask hides them.
    """

    def __init__(self, config, batch, slots, device=None, dtype=None):
        shape = (config.n_layer, batch, config.n_head, slots, config.n_embd // config.n_head)
        # (layer, B, H, slots, D); left uninitialised, since no slot is read before it is filled
        self.k = torch.empty(shape, device=device, dtype=dtype)
        self.v = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0  # slots in use; only GPT.forward advances it

    def append(self, layer, k, v):
        """Store k, v (B, H, T, D) in the next T slots; return all so far, (B, H, A, D) each.

        Raises ValueError where fewer than T slots are free.
        """
        end = self.length + k.size(2)
        if end > self.k.size(3):
            raise ValueError(f"the cache has {self.k.size(3)} slots and {end} are needed")
        self.k[layer, :, :, self.length:end] = k
        self.v[layer, :, :, self.length:end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


def gather_slots(x, index):
    """The slots in `index`, int64 (B, P), of x (B, *, T, *): (B, *, P, *)."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.size(1), -1, x.size(3)))


class Attention(nn.Module):
    """Multi-head attention of the T slots, or of the P in `index`, to all that they may see.

    x (B, T, C); bias float, broadcast to (B, 1, T, A): 0 where a slot is visible, -inf elsewhere;
    index int64 (B, P) or None. Returns (B, T or P, C).
    """

    def __init__(self, config, layer):
        super().__init__()
        self.n_head, self.layer = config.n_head, layer
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, bias, cache, index):
        B, T, C = x.shape
        H, D = self.n_head, C // self.n_head
        q, k, v = self.c_attn(x).split(C, dim=2)                   # (B, T, C) each
        q = q.view(B, T, H, D).transpose(1, 2)                     # (B, H, T, D)
        k = k.view(B, T, H, D).transpose(1, 2)                     # (B, H, T, D)
        v = v.view(B, T, H, D).transpose(1, 2)                     # (B, H, T, D)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)                  # (B, H, A, D) each
        if index is not None:  # all slots are keys, but only those in `index` are queries
            q = gather_slots(q, index)                             # (B, H, P, D)
            bias = gather_slots(bias.expand(B, 1, T, -1), index)   # (B, 1, P, A)
        scores = (q * D ** -0.5) @ k.transpose(2, 3) + bias        # (B, H, T or P, A)
        weights = scores.softmax(dim=3).to(v.dtype)                # in float32 under autocast
        y = weights @ v                                            # (B, H, T or P, D)
        return self.c_proj(y.transpose(1, 2).reshape(B, -1, C))    # (B, T or P, C)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.gelu = config.gelu

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate=self.gelu))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, bias, cache, index=None):
        y = self.attn(self.ln_1(x), bias, cache, index)            # (B, T or P, C)
        if index is not None:
            x = gather_slots(x[:, None], index)[:, 0]              # (B, P, C)
        x = y + x
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2's architecture and parameter names: pre-norm, learned positions, tied output head."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # E in the paper
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.init_weights()

    def init_weights(self):
        std = 0.02 * math.sqrt(768 / self.config.n_embd)  # GPT-2's 0.02 at its width of 768
        for name, p in self.named_parameters():
            if "c_proj" in name and p.dim() == 2:  # adds to the residual stream, 2 · n_layer times
                nn.init.normal_(p, std=std / math.sqrt(2 * self.config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, x, pos=None, mask=None, cache=None, index=None):
        """Hidden states, ready for `head`: float (B, T, C), or (B, P, C) with an `index`.

        x      float (B, T, C): token embeddings `wte(ids)`, latent tokens z, or both mixed
        pos    int64 (B, T) or (T,): the positions; None: counted on from the cache
        mask   bool (B, T, A), (1, T, A) or (T, A): True = visible; None: causal. A slot that sees
               no slot at all gets NaN
        cache  KVCache to read and to extend; it must have room for T more slots
        index  int64 (B, P): return the hidden states of these slots alone. In the last block all T
               slots are still keys and values, but its attention scores and MLP, and then the
               head, are computed for P slots
        """
        T = x.size(1)
        seen = cache.length if cache is not None else 0
        if pos is None:
            pos = torch.arange(seen, seen + T, device=x.device)  # (T,)
        if mask is None:
            mask = torch.ones(T, seen + T, dtype=torch.bool, device=x.device).tril(seen)  # (T, A)
        if mask.dim() == 3:
            mask = mask[:, None]  # (B, 1, T, A): the same for every head
        # one bias, added to the scores of every layer: 0 where visible, -inf elsewhere
        bias = torch.zeros(mask.shape, device=x.device).masked_fill(~mask, -math.inf)
        x = x + self.wpe(pos)                                      # (B, T, C)
        for block in self.h[:-1]:
            x = block(x, bias, cache)
        x = self.h[-1](x, bias, cache, index)                      # (B, T or P, C)
        if cache is not None:
            cache.length += T
        return self.ln_f(x)

    def head(self, hidden):
        """Hidden states (..., C) to logits (..., V), in the weights' dtype even under autocast.

        GPT-2's logits are far below zero, where neighbouring bfloat16 numbers are 0.25 or more
        apart.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(self.wte.weight.dtype), self.wte.weight)
