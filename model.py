"""The GPT: plain PyTorch, attention and KV cache written by hand. Used twice, as encoder and as LLM.

    model = GPT(GPTConfig(vocab_size=512))            # from scratch
    model = GPT.from_gpt2("gpt2")                     # OpenAI's weights, downloaded once
    hidden = model(model.wte(ids))                    # (B, T, C)
    logits = model.head(hidden)                       # (B, T, V)

Two things differ from an everyday GPT, and both are for latent tokens. The input is a row of vectors, so
that a point between token embeddings is as good an input as a token. And where a vector is stored (its
slot), where it stands in the sentence (its position) and what it sees (the mask) are three separate
things, so that one pass can stand for many.

Shapes, here and in every file:
    B  batch           T  positions fed in this call      S  positions seen: the cache, then T
    C  channels        H  heads, D = C / H channels each   V  vocabulary
    N  chunks = latent tokens    K  kept by top-k          P  positions asked for
"""
import math
import re
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

GPT2 = {  # layers, heads, channels; all have 1024 positions
    "gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600),
}
GPT2_URL = "https://huggingface.co/openai-community/{}/resolve/main/pytorch_model.bin"
GPT2_SHA256 = {"gpt2": "7c5d3f4b8b76583b422fcb9189ad6c89d5d97a094541ce8932dce3ecabde1421"}  # others: see gpt2_weights


@dataclass
class GPTConfig:
    vocab_size: int
    block_size: int = 128
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    gelu: str = "none"  # torch's `approximate`: exact, which a CPU is faster at; GPT-2 has "tanh"

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f"--n-embd {self.n_embd} must be a multiple of --n-head {self.n_head}")


class KVCache:
    """Keys and values of the positions already computed, one slot each. The caller makes it and passes it in.

    Slots are filled in the order of the calls, whatever the positions. All rows share `length`; a row that
    is shorter leaves slots unused, and its mask never shows them.
    """

    def __init__(self, config, batch, slots, device=None, dtype=None):
        shape = (config.n_layer, batch, config.n_head, slots, config.n_embd // config.n_head)
        self.k = torch.empty(shape, device=device, dtype=dtype)  # (layer, B, H, slots, D); none is read before it is filled
        self.v = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0  # slots in use; GPT.forward moves it on, nothing else does

    def append(self, layer, k, v):
        """Store k, v (B, H, T, D) behind what is there; return all of them, (B, H, S, D)."""
        end = self.length + k.size(2)
        if end > self.k.size(3):
            raise ValueError(f"the cache has {self.k.size(3)} slots and {end} are needed")
        self.k[layer, :, :, self.length:end] = k
        self.v[layer, :, :, self.length:end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


def pick(x, at):
    """The rows asked for: x (B, H, T, D), at int64 (B, P) -> (B, H, P, D)."""
    return x.gather(2, at[:, None, :, None].expand(-1, x.size(1), -1, x.size(3)))


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.n_head, self.layer = config.n_head, layer
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, bias, cache, at):
        B, T, C = x.shape
        heads = (B, T, self.n_head, C // self.n_head)
        q, k, v = (y.view(heads).transpose(1, 2) for y in self.c_attn(x).split(C, dim=2))  # (B, H, T, D) each
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, H, S, D)
        if at is not None:  # everyone is seen, but only those asked for look
            q, bias = pick(q, at), pick(bias.expand(B, 1, T, -1), at)  # (B, H, P, D), (B, 1, P, S)
        scores = (q * heads[3] ** -0.5) @ k.transpose(2, 3) + bias  # (B, H, T, S)
        y = scores.softmax(dim=3).to(v.dtype) @ v  # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(B, -1, C))  # (B, T, C), or (B, P, C)


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
        self.ln_1, self.attn = nn.LayerNorm(config.n_embd), Attention(config, layer)
        self.ln_2, self.mlp = nn.LayerNorm(config.n_embd), MLP(config)

    def forward(self, x, bias, cache, at=None):
        y = self.attn(self.ln_1(x), bias, cache, at)
        x = y + (x if at is None else pick(x[:, None], at)[:, 0])
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2's shapes and parameter names: pre-norm, learned positions, output head tied to the embeddings."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # E in the paper
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        std = 0.02 * math.sqrt(768 / config.n_embd)  # GPT-2's at its width, more where there are fewer channels
        for name, p in self.named_parameters():
            if p.dim() == 2:  # and less where a block adds to the residual stream
                nn.init.normal_(p, std=std / math.sqrt(2 * config.n_layer) if "c_proj" in name else std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, x, pos=None, mask=None, cache=None, at=None):
        """Hidden states, ready for `head`.

        x      float (B, T, C): token embeddings `wte(ids)`, latent tokens z, or both mixed
        pos    int64 (B, T) or (T,): each one's position; None: counted on from the cache
        mask   bool (B, T, S), (1, T, S) or (T, S): True = visible; None: causal. A row with nothing visible is NaN
        cache  KVCache to read and to extend
        at     int64 (B, P): only these positions come back; the last block and the V-way head cost P and not T
        returns float (B, T, C), or (B, P, C)
        """
        T, seen = x.size(1), cache.length if cache is not None else 0
        if pos is None:
            pos = torch.arange(seen, seen + T, device=x.device)  # (T,)
        if mask is None:
            mask = torch.ones(T, seen + T, dtype=torch.bool, device=x.device).tril(seen)  # (T, S)
        if mask.dim() == 3:
            mask = mask[:, None]  # (B, 1, T, S): the same for every head
        bias = torch.zeros(mask.shape, device=x.device).masked_fill(~mask, -math.inf)  # added to the scores of every layer
        x = x + self.wpe(pos)
        for block in self.h[:-1]:
            x = block(x, bias, cache)
        x = self.h[-1](x, bias, cache, at)
        if cache is not None:
            cache.length += T
        return self.ln_f(x)

    def head(self, hidden):
        """Hidden states (..., C) to logits (..., V), under autocast too in float32: GPT-2's lie far below zero, where
        bfloat16 is 0.25 or more apart."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(self.wte.weight.dtype), self.wte.weight)

    @classmethod
    def from_gpt2(cls, name, vocab_size=50304, state=None):
        """GPT-2's published weights, with rows added to the vocabulary for the special tokens.

        `state` is a state dict to read instead of the published one (see gpt2_weights, and what that raises).
        A new row is the mean of the old ones: GPT-2's logits are far below zero, so that a row near zero
        would win every softmax. Raises ValueError where a tensor is missing or has another shape.
        """
        n_layer, n_head, n_embd = GPT2[name]
        state = {k.removeprefix("transformer."): v for k, v in (state or gpt2_weights(name)).items()}
        model = cls(GPTConfig(vocab_size, 1024, n_layer, n_head, n_embd, gelu="tanh"))
        with torch.no_grad():
            for key, mine in model.state_dict().items():
                theirs = state.get(key)
                if theirs is None:
                    raise ValueError(f"the GPT-2 weights have no tensor {key!r}")
                if key.endswith("weight") and "c_" in key:
                    theirs = theirs.t()  # stored the other way round (Conv1D): (in, out)
                if key == "wte.weight":
                    theirs = torch.cat([theirs, theirs.mean(0, keepdim=True).expand(vocab_size - len(theirs), -1)])
                if theirs.shape != mine.shape:
                    raise ValueError(f"the GPT-2 weights have {key!r} as {tuple(theirs.shape)}, not {tuple(mine.shape)}")
                mine.copy_(theirs)
        return model


def gpt2_weights(name):
    """GPT-2's state dict as published: from torch's cache, or downloaded there by torch and checked against its SHA-256.

    Raises OSError, RuntimeError or ValueError where the download fails, or is not the published file.
    """
    file, url = Path(torch.hub.get_dir(), "checkpoints", f"openai-{name}.bin"), GPT2_URL.format(name)
    if not file.is_file():
        sha256 = GPT2_SHA256.get(name)
        if sha256 is None:  # in the hub's git, where a large file stands, is a note that names it by its checksum
            with urllib.request.urlopen(url.replace("/resolve/", "/raw/"), timeout=60) as note:
                found = re.search(rb"sha256:([0-9a-f]{64})", note.read(1000))
            if not found:
                raise ValueError(f"the hub does not say the checksum of {url}; try again later")
            sha256 = found[1].decode()
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file), sha256)  # beside, checked, then moved
    return torch.load(file, map_location="cpu", weights_only=True)
