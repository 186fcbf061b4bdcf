"""The GPT: slots, positions and masks, its cache, its head."""
import pytest
import torch

from conftest import VOCAB, close, tiny
from model import KVCache


def ids(B, T, seed=0):
    return torch.randint(VOCAB.n_vocab, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pieces", [[1] * 12, [5, 1, 4, 2], [12]])
def test_cached_equals_uncached(pieces):
    """So nothing sees the future: a slot that is fed alone finds in the cache those before it."""
    gpt = tiny(0)
    x = gpt.wte(ids(3, 12))
    cache = KVCache(gpt.config, 3, 12, dtype=torch.float64)
    close(torch.cat([gpt(piece, cache=cache) for piece in x.split(pieces, 1)], 1), gpt(x))
    assert cache.length == 12
    with pytest.raises(ValueError, match="12 slots and 13 are needed"):
        gpt(x[:, :1], torch.tensor([0]), cache=cache)


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


def test_logits_are_exact_under_autocast():
    gpt = tiny(0).float()
    hidden = torch.randn(2, 3, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        logits = gpt.head(hidden)
    close(logits, hidden.float() @ gpt.wte.weight.t(), 1e-5)
