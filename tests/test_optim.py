"""Muon is torch's but for bfloat16; a step of both optimizers as one; the learning rate."""
import pytest
import torch

from conftest import tiny
from lab.optim import Optimizer, orthogonalize, schedule


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (12, 5)])
def test_only_singular_values_change(shape):
    matrix = torch.randn(shape, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s ** 3 + 2.0315 * s ** 5
    found, zero = orthogonalize(torch.stack([matrix, torch.zeros_like(matrix)]))
    torch.testing.assert_close(found, u @ s.diag() @ v)
    assert found.shape == shape and 0.6 < s.min() and s.max() < 1.3
    assert (zero == 0).all()


def test_a_step_is_torchs_muon_and_adamw(monkeypatch):
    """On clipped gradients, at a share of the peak rate; vectors are not decayed.

    A weight without a gradient stays as it is.
    """
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # torch's Muon would round
    mine, theirs = tiny(0).float(), tiny(0).float()
    start = [p.clone() for p in mine.parameters()]
    weights = dict(theirs.named_parameters())
    matrices = [p for name, p in weights.items() if name.startswith("h.") and p.dim() == 2]
    embeddings = [weights["wte.weight"], weights["wpe.weight"]]
    vectors = [p for p in weights.values() if p.dim() == 1]
    muon = torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([{"params": embeddings, "weight_decay": 0.1},
                               {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.95))
    optimizer = Optimizer([mine], peak_lr=0.1)
    idle = "h.1.attn.c_proj.weight"
    for rate, scale in (0.5, 3.0), (1.0, 1e-3), (0.25, 3.0):  # of gradients above 1 and below
        gradients = {name: scale * torch.randn(p.shape) for name, p in weights.items()}
        gradients[idle] = None if rate == 0.25 else gradients[idle]
        norm = torch.stack([g.norm() for g in gradients.values() if g is not None]).norm()
        for name, p in mine.named_parameters():
            p.grad = gradients[name]
            g = gradients[name]
            weights[name].grad = g if g is None else g / norm.clamp(min=1)
        before = weights[idle].clone()
        for one in muon, adamw:
            for group in one.param_groups:
                group["lr"] = 0.1 * rate
            one.step()
        torch.testing.assert_close(optimizer.step(rate), norm)
        assert all(p.grad is None for p in mine.parameters())
    assert weights[idle].equal(before)
    for ours, their, w in zip(mine.parameters(), theirs.parameters(), start):
        torch.testing.assert_close(ours, their, rtol=1e-4, atol=1e-5)
        assert (ours - w).abs().max() > 0.05


def test_the_rate_rises_and_falls():
    rates = [schedule(step, 100) for step in range(101)]
    assert rates[:3] == pytest.approx([0.2, 0.4, 0.6])
    assert rates[50] == pytest.approx(0.5) and rates[100] == 0
    assert rates[4:] == sorted(rates[4:], reverse=True) and rates[4] > 0.99
    assert schedule(0, 3) == 1  # too few steps for a ramp
