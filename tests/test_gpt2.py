"""GPT-2's weights: what a GPT makes of them, and how they come."""
import hashlib
import io
import math

import pytest
import torch

import lab.gpt2
from conftest import close
from lab.files import UserError
from lab.gpt2 import from_gpt2, gpt2_weights


def gpt2_state(prefix="", n_layer=2, C=8, V=11, T=1024):
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
    return {prefix + name: torch.randn(shape, generator=g) for name, shape in shapes.items()}


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


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_gpt2_weights_give_gpt2_logits(prefix, monkeypatch):
    monkeypatch.setitem(lab.gpt2.GPT2, "gpt2", (2, 2, 8))
    w = {name: value.double() for name, value in gpt2_state().items()}
    gpt = from_gpt2("gpt2", vocab_size=16, state=gpt2_state(prefix)).double()
    row = [3, 10, 0, 7, 7, 1]
    logits = gpt.head(gpt(gpt.wte(torch.tensor([row]))))[0]
    close(logits[:, :11], gpt2_by_hand(w, row))
    close(gpt.wte.weight[11:], w["wte.weight"].mean(0).expand(5, -1), 1e-6)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """hub("gpt2", content) publishes a small file; hub.cache is where torch keeps it."""
    monkeypatch.setattr(lab.gpt2, "URL", tmp_path.as_uri() + "/{}.bin")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))

    def publish(name, content):
        (tmp_path / f"{name}.bin").write_bytes(content)
    publish.cache = tmp_path / "cache" / "checkpoints"
    return publish


@pytest.mark.parametrize("name, says", [("gpt2", "invalid hash value"), ("gpt2-xl", "gpt2-xl.bin")])
def test_gpt2_weights_that_do_not_come(hub, name, says):
    """Another file than the published one is refused, as is none; nothing is kept."""
    hub("gpt2", b"another file")
    with pytest.raises(UserError, match=f"--init {name}: .*{says}"):
        from_gpt2(name, 16)
    assert list(hub.cache.iterdir()) == []


def test_gpt2_weights_come_once(hub, monkeypatch):
    """Downloaded, checked, and then read from torch's cache."""
    file = io.BytesIO()
    torch.save(gpt2_state(), file)
    digest = hashlib.sha256(file.getvalue()).hexdigest()
    monkeypatch.setitem(lab.gpt2.SHA256, "gpt2", digest)
    hub("gpt2", file.getvalue())
    first = gpt2_weights("gpt2")
    hub("gpt2", b"gone")
    again = gpt2_weights("gpt2")
    assert all(torch.equal(first[name], value) for name, value in again.items())
    assert [f.name for f in hub.cache.iterdir()] == ["openai-gpt2.bin"]
    (hub.cache / "openai-gpt2.bin").write_bytes(b"half")
    with pytest.raises(UserError, match="openai-gpt2.bin could not .* remove it"):
        gpt2_weights("gpt2")
