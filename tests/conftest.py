"""What the tests share: a vocabulary of a few ids, float64 models, batches of random tokens, and where real data may be.

Most tests compare one fast pass with a plain loop that feeds one row at a time to a plain causal model. In float64 the
two differ by rounding, about 1e-14, and any leak through a mask or a wrong position by many orders more.
"""
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT))
if (SHARED / "tiktoken").is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken"))
torch.set_num_threads(1)

from data import Batch, Tokenizer, UserError  # noqa: E402  (the path is set above)
from model import GPT, GPTConfig  # noqa: E402

VOCAB = SimpleNamespace(n_ordinary=12, eos=12, bot=13, eot=14, sum=15, n_vocab=20)  # ids 16 … 19 are padding


def tiny(seed, block_size=64, **shape):
    """A float64 GPT over VOCAB; large weights, so that everything a token sees moves its logits."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(VOCAB.n_vocab, block_size, **{"n_layer": 2, "n_head": 2, "n_embd": 16, **shape})).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.eval().requires_grad_(False)


def random_batch(ns, seed=0, nx=None):
    """A Batch over VOCAB with chains of these lengths. Past a row's end stands garbage, as in the real ones."""
    rng, ns = np.random.default_rng(seed), np.array(ns)
    nx = rng.integers(2, 8, len(ns)) if nx is None else np.array(nx)
    na = rng.integers(3, 6, len(ns))
    x, s, a = (rng.integers(0, VOCAB.n_ordinary, (len(ns), n.max())) for n in (nx, ns, na))
    b = np.arange(len(ns))
    x[b, nx - 1], a[:, 0], a[b, na - 1] = VOCAB.bot, VOCAB.eot, VOCAB.eos
    return Batch(b, x, s, a, nx, ns, na, (nx, ns, na))


def rows(batch, c):
    """A batch as plain lists, row by row: (X, [S₀, S₁, …], Ans)."""
    for x, s, a, nx, ns, na in zip(batch.x.tolist(), batch.s.tolist(), batch.a.tolist(), batch.nx, batch.ns, batch.na):
        yield x[:nx], [s[i:min(i + c, ns)] for i in range(0, ns, c)], a[:na]


def close(a, b, tol=1e-11):
    torch.testing.assert_close(a, b, rtol=0, atol=tol)


@pytest.fixture(scope="session")
def toy_tokenizer():
    return Tokenizer("toy")


@pytest.fixture(scope="session")
def gpt2_tokenizer():
    try:
        return Tokenizer("gpt2")
    except UserError:
        pytest.skip("GPT-2's vocabulary is neither in tiktoken's cache nor to be had from here")


@pytest.fixture(scope="session")
def gsm8k():
    """The folder with GSM8K's files."""
    for folder in (SHARED / "gsm8k", ROOT / "data" / "gsm8k"):
        if (folder / "train.jsonl").is_file() and (folder / "test.jsonl").is_file():
            return folder
    pytest.skip("GSM8K is neither in ../shared/data/gsm8k nor in data/gsm8k")
