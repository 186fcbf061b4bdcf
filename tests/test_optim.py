"""Muon: the same as torch's, but for the arithmetic in bfloat16; what it does to a matrix."""
import pytest
import torch

import optim

SHAPES = [(6, 6), (4, 9), (12, 5)]


@pytest.mark.parametrize("shape", SHAPES)
def test_only_singular_values_change(shape):
    matrix = torch.randn(shape, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s ** 3 + 2.0315 * s ** 5
    found, zero = optim.orthogonalize(torch.stack([matrix, torch.zeros_like(matrix)]))
    torch.testing.assert_close(found, u @ s.diag() @ v)
    assert found.shape == shape and 0.6 < s.min() and s.max() < 1.3
    assert (zero == 0).all()


def test_as_torchs_muon_but_for_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # torch's would round
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in SHAPES]
    gradients = [[torch.randn(shape) for shape in SHAPES] for _ in range(4)]
    ends = []
    for muon in (optim.Muon, torch.optim.Muon):
        weights = [torch.nn.Parameter(w.clone()) for w in start]
        kind = {} if muon is optim.Muon else {"adjust_lr_fn": "match_rms_adamw"}
        optimizer = muon([{"params": weights, "lr": 0.1}], weight_decay=0.1, **kind)
        for step in gradients:
            for w, gradient in zip(weights, step):
                w.grad = gradient.clone()
            optimizer.step()
        weights[0].grad = None  # without a gradient it stays as it is
        before = weights[0].clone()
        optimizer.step()
        assert weights[0].equal(before)
        ends.append(weights)
    for ours, theirs, w in zip(*ends, start):
        torch.testing.assert_close(ours, theirs)
        assert not torch.allclose(ours, w, atol=0.1)
