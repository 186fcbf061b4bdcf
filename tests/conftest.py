"""What the tests share: a vocabulary of a few ids, float64 models, random batches, a finished run.

Most tests compare one fast pass with a plain loop that feeds one row at a time to a plain causal
model. In float64 the two differ by rounding, about 1e-14, and any leak through a mask or a wrong
position by many orders more.
"""
import importlib
import itertools
import json
import os
import shutil
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

from data import Tokenizer  # noqa: E402  (the path is set above)
from encoder import Batch, Tokens  # noqa: E402
from lab import sources  # noqa: E402
from lab.files import Store, UserError, load  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

# ids 16 … 19 are padding
VOCAB = SimpleNamespace(n_ordinary=12, eos=12, bot=13, eot=14, sum=15, n_vocab=20)
# the smallest run: two evaluations in each loop; drawing all toy problems would take longer
FEW = {"train": 64, "val": 8, "test": 8}
sources.TOY_SIZE.update(FEW)
TINY = ["--n-layer", "1", "--n-embd", "16", "--n-head", "1", "--batch-size", "8",
        "--sft-steps", "4", "--steps", "4", "--bag-steps", "1", "--eval-every", "2"]
LATENT = ["--batch-size", "8", "--steps", "4", "--eval-every", "2"]


def tiny(seed, block_size=64, **shape):
    """A float64 GPT over VOCAB; large weights, so that everything a token sees moves its logits."""
    torch.manual_seed(seed)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, **shape}
    model = GPT(GPTConfig(VOCAB.n_vocab, block_size, **shape)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.eval().requires_grad_(False)


def random_batch(lengths, seed=0, question_lengths=None):
    """A Batch over VOCAB whose chains have these lengths."""
    rng = np.random.default_rng(seed)
    B = len(lengths)
    x = rng.integers(2, 8, B) if question_lengths is None else np.array(question_lengths)  # (B,)
    s = np.array(lengths)                                                                  # (B,)
    a = rng.integers(3, 6, B)                                                              # (B,)

    def words(count):
        return rng.integers(0, VOCAB.n_ordinary, count).tolist()

    problems = []
    for b in range(B):
        question = words(x[b] - 1) + [VOCAB.bot]
        answer = [VOCAB.eot] + words(a[b] - 2) + [VOCAB.eos]
        problems.append(Tokens(question, words(s[b]), answer))
    return Batch(np.arange(B), problems)


def rows(batch, c):
    """A batch row by row as plain lists: (X, [S₀, S₁, …], Ans), the chunks of c tokens."""
    for question, chain, answer in batch.problems:
        yield question, [chain[i:min(i + c, len(chain))] for i in range(0, len(chain), c)], answer


def close(a, b, tol=1e-11):
    torch.testing.assert_close(a, b, rtol=0, atol=tol)


def same(a, b):
    """Whether two values are the same: tensors bit for bit, so that nan is nan, and -0 is not 0."""
    if torch.is_tensor(a) and torch.is_tensor(b):
        alike = (a.dtype, a.shape) == (b.dtype, b.shape)
        return alike and a.numpy().tobytes() == b.numpy().tobytes()
    return type(a) is type(b) and not torch.is_tensor(a) and a == b


@pytest.fixture
def easy_folder(tmp_path, monkeypatch):
    """A folder that passes for GSM8K, of which --data easy takes 12: 320 problems of one step."""
    monkeypatch.setattr(sources, "fetch", lambda file: None)
    monkeypatch.setattr(sources, "EASY", 12)
    rows = []
    for a, b in itertools.product(range(20), range(16)):
        a = 1000 + a if a % 4 == 0 else a + 20  # a fourth of them is not easy
        answer = f"<<{a}+{b + 5}={a + b + 5}>> #### {a + b + 5}"
        rows.append(json.dumps({"question": f"{a} pens, and {b + 5} more?", "answer": answer}))
    (tmp_path / "train.jsonl").write_text("\n".join(rows[20:]))
    (tmp_path / "test.jsonl").write_text("\n".join(rows[:20]))
    return str(tmp_path)


def run_script(script, *flags):
    """A script's main, in this process: faster than one of its own."""
    importlib.import_module(script).main([str(flag) for flag in flags])


def pipeline(out, *flags, sup=(), latent=()):
    """The three phases in a row, all with `flags`."""
    run_script("train_sup", *TINY, "--out", out, *sup, *flags)
    run_script("compress", "--out", out, *flags)
    run_script("train_latent", *LATENT, "--out", out, *latent, *flags)


def load_store(out):
    """The Store in the folder of a run."""
    saved = load(out / "latents.pt")
    return Store(*(saved[name] for name in Store._fields))


@pytest.fixture
def call(monkeypatch, tmp_path):
    """call("train_sup", flag, …): a script's main, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return run_script


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A folder in which all phases and the baselines are done. Not to be changed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    pipeline(out)
    run_script("train_sup", *TINY, "--baselines", "--baseline-steps", 6, "--out", out)
    return out


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of `finished`."""
    return shutil.copytree(finished, tmp_path / "copy")


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
