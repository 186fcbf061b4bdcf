"""The GPT: what it sees, its cache, and GPT-2's weights read in."""
import hashlib
import io
import math
from types import SimpleNamespace

import pytest
import torch

import model
import train_sup
from conftest import VOCAB, close, tiny
from data import UserError
from model import GPT, GPTConfig, KVCache


def ids(B, T, seed=0):
    return torch.randint(VOCAB.n_vocab, (B, T), generator=torch.Generator().manual_seed(seed))


def test_nothing_sees_the_future():
    gpt = tiny(0)
    a = ids(2, 9)
    b = a.clone()
    b[:, 5] += 1 - 2 * (b[:, 5] > 0).long()
    before = gpt(gpt.wte(a))
    after = gpt(gpt.wte(b))
    assert torch.equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(2).all()


@pytest.mark.parametrize("pieces", [[1] * 12, [5, 1, 4, 2], [12]])
def test_cached_equals_uncached(pieces):
    gpt = tiny(0)
    x = gpt.wte(ids(3, 12))
    cache = KVCache(gpt.config, 3, 12, dtype=torch.float64)
    close(torch.cat([gpt(piece, cache=cache) for piece in x.split(pieces, 1)], 1), gpt(x))
    assert cache.length == 12


def test_a_full_cache_says_so():
    gpt = tiny(0)
    with pytest.raises(ValueError, match="3 slots and 4 are needed"):
        gpt(gpt.wte(ids(1, 4)), cache=KVCache(gpt.config, 1, 3, dtype=torch.float64))


@pytest.mark.parametrize("shape", [None, (9, 9), (1, 9, 9), (2, 9, 9)])
@pytest.mark.parametrize("n_layer", [1, 3])
def test_hidden_states_only_where_asked_for(shape, n_layer):
    gpt = tiny(0, n_layer=n_layer)
    index = torch.tensor([[7, 0, 3], [2, 2, 8]])
    row = torch.arange(2)[:, None]
    x = gpt.wte(ids(2, 9))
    mask = None
    if shape:
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
        mask |= torch.eye(9, dtype=torch.bool)
    close(gpt(x, mask=mask, index=index), gpt(x, mask=mask)[row, index])
    found = []
    for where in {}, {"index": index}:
        cache = KVCache(gpt.config, 2, 11, dtype=torch.float64)
        gpt(x[:, :2], cache=cache)
        found.append(gpt(x, cache=cache, **where))
    close(found[1], found[0][row, index])


def test_slot_position_and_mask_are_independent():
    """Tokens stored in another order, with their own positions and sights, come out the same."""
    gpt = tiny(0)
    T = 8
    x = gpt.wte(ids(2, T))
    order = torch.randperm(T, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(T, T, dtype=torch.bool).tril()
    out = gpt(x[:, order], order, mask[order][:, order])
    close(out, gpt(x)[:, order])


def test_heads_must_divide_channels():
    with pytest.raises(ValueError, match="multiple of --n-head 3"):
        GPTConfig(20, n_embd=16, n_head=3)


# -------------------------------------------------------------------------------------------- GPT-2

def gpt2_state(prefix, n_layer=2, C=8, V=11, T=1024):
    """Random weights under the names, and in the shapes, of OpenAI's file.

    Its linear maps are (in, out), and the causal masks (attn.bias) are in it.
    """
    shapes = {"wte.weight": (V, C), "wpe.weight": (T, C), "ln_f.weight": (C,), "ln_f.bias": (C,)}
    block = {
        "ln_1.weight": (C,), "ln_1.bias": (C,), "ln_2.weight": (C,), "ln_2.bias": (C,),
        "attn.bias": (1, 1, 6, 6),
        "attn.c_attn.weight": (C, 3 * C), "attn.c_attn.bias": (3 * C,),
        "attn.c_proj.weight": (C, C), "attn.c_proj.bias": (C,),
        "mlp.c_fc.weight": (C, 4 * C), "mlp.c_fc.bias": (4 * C,),
        "mlp.c_proj.weight": (4 * C, C), "mlp.c_proj.bias": (C,),
    }
    for i in range(n_layer):
        shapes.update({f"h.{i}.{name}": shape for name, shape in block.items()})
    g = torch.Generator().manual_seed(0)
    return {prefix + name: torch.randn(shape, generator=g, dtype=torch.float64)
            for name, shape in shapes.items()}


def gpt2_by_hand(w, ids, n_head=2):
    """GPT-2's logits for one row of ids, from its own weights, a head and a position at a time."""
    def norm(x, name):
        x = x - x.mean(1, keepdim=True)
        x = x / (x.pow(2).mean(1, keepdim=True) + 1e-5).sqrt()
        return x * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return x @ w[name + ".weight"] + w[name + ".bias"]

    def gelu(x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))

    x = w["wte.weight"][ids] + w["wpe.weight"][:len(ids)]
    C = x.size(1)
    D = C // n_head
    for i in range(2):
        qkv = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn")  # (T, 3 * C)
        y = torch.zeros_like(x)                                    # (T, C)
        for head in range(n_head):
            q, k, v = (qkv[:, part * C + head * D:][:, :D] for part in range(3))
            for t in range(len(ids)):
                weights = (k[:t + 1] @ q[t] / math.sqrt(D)).softmax(0)  # (t + 1,)
                y[t, head * D:(head + 1) * D] = weights @ v[:t + 1]
        x = x + linear(y, f"h.{i}.attn.c_proj")
        x = x + linear(gelu(linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")), f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].t()


@pytest.fixture
def small_gpt2(monkeypatch):
    monkeypatch.setitem(model.GPT2, "gpt2", (2, 2, 8))


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_gpt2_weights_give_gpt2_logits(small_gpt2, prefix):
    # as a model of float32 holds them
    w = {name: value.float().double() for name, value in gpt2_state("").items()}
    gpt = GPT.from_gpt2("gpt2", vocab_size=16, state=gpt2_state(prefix)).double()
    row = [3, 10, 0, 7, 7, 1]
    logits = gpt.head(gpt(gpt.wte(torch.tensor([row]))))[0]
    close(logits[:, :11], gpt2_by_hand(w, row))
    close(gpt.wte.weight[11:], w["wte.weight"].mean(0).expand(5, -1), 1e-6)


@pytest.mark.parametrize("change, complaint", [
    (lambda w: w.pop("h.1.mlp.c_fc.bias"), "no tensor 'h.1.mlp.c_fc.bias'"),
    (lambda w: w.update({"h.0.attn.c_attn.weight": torch.zeros(8, 23)}),
     r"'h.0.attn.c_attn.weight' as \(23, 8\)"),
    (lambda w: w.update({"wte.weight": torch.zeros(11, 7)}), "'wte.weight'"),
    (lambda w: w.pop("wpe.weight"), "no tensor 'wpe.weight'"),
    (lambda w: w.update({"wpe.weight": torch.zeros(512, 8)}), r"'wpe.weight' as \(512, 8\)"),
])
def test_gpt2_weights_that_do_not_fit(small_gpt2, change, complaint):
    state = gpt2_state("")
    change(state)
    with pytest.raises(ValueError, match=complaint):
        GPT.from_gpt2("gpt2", vocab_size=16, state=state)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """hub("gpt2-xl", content, note) publishes a small file; hub.cache is where torch keeps it."""
    monkeypatch.setattr(model, "GPT2_URL", tmp_path.as_uri() + "/resolve/{}.bin")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    for name in "resolve", "raw":
        (tmp_path / name).mkdir()

    def publish(name, content, note=b""):
        (tmp_path / "resolve" / f"{name}.bin").write_bytes(content)
        (tmp_path / "raw" / f"{name}.bin").write_bytes(note)
    publish.cache = tmp_path / "cache" / "checkpoints"
    return publish


def init(name):
    env = SimpleNamespace(tokenizer=SimpleNamespace(name="gpt2", n_vocab=16))
    return train_sup.initial_model(SimpleNamespace(init=name), env)


@pytest.mark.parametrize("name, content, note, says", [
    ("gpt2", b"another file", b"", "invalid hash value"),
    ("gpt2-xl", b"another file", b"oid sha256:" + b"0" * 64, "invalid hash value"),
    ("gpt2-xl", b"a file", b"<html>Not today</html>", "does not say the checksum"),
    ("gpt2-large", None, None, "gpt2-large.bin"),
])
def test_gpt2_weights_that_do_not_come(hub, name, content, note, says):
    """Through torch's downloader: another file than the published one is refused, and not kept."""
    if content:
        hub(name, content, note)
    with pytest.raises(UserError, match=f"--init {name}: .*{says}"):
        init(name)
    assert not hub.cache.exists() or list(hub.cache.iterdir()) == []


def test_gpt2_weights_come_once(hub, monkeypatch):
    """Downloaded, checked against what the hub says of them, and then read from torch's cache."""
    file = io.BytesIO()
    torch.save({name: value.float() for name, value in gpt2_state("").items()}, file)
    sha256 = hashlib.sha256(file.getvalue()).hexdigest()
    note = f"version 1\noid sha256:{sha256}\nsize 7\n"
    hub("gpt2-medium", file.getvalue(), note.encode())
    monkeypatch.setitem(model.GPT2, "gpt2-medium", (2, 2, 8))
    first = model.gpt2_weights("gpt2-medium")
    hub("gpt2-medium", b"gone", b"gone")
    again = model.gpt2_weights("gpt2-medium")
    assert all(torch.equal(first[name], value) for name, value in again.items())
    assert [f.name for f in hub.cache.iterdir()] == ["openai-gpt2-medium.bin"]
    assert GPT.from_gpt2("gpt2-medium", 16).config.gelu == "tanh"
    (hub.cache / "openai-gpt2-medium.bin").write_bytes(b"half")
    with pytest.raises(ValueError, match="openai-gpt2-medium.bin is damaged; remove it"):
        model.gpt2_weights("gpt2-medium")
