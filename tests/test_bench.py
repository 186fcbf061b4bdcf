"""The bench: it compares equal attentions, what it times runs, and its problems fit the model."""
import json

import pytest
import torch

from lab import bench

TINY = ["--n-layer", "2", "--n-head", "2", "--n-embd", "16", "--batch-size", "3",
        "--dtype", "float32", "--device", "cpu"]


@pytest.fixture
def small(monkeypatch):
    """Short problems in a small vocabulary, in place of those of the toy task."""
    monkeypatch.setattr(bench, "PRESETS", {"toy": (40, (9, 3), (9, 3))})
    monkeypatch.setattr(bench, "PASSES", 2)


def test_both_kinds_of_attention_have_the_same_loss(small, tmp_path):
    """And gradients. The inputs are the same; so are the weights."""
    args, env = bench.setup(tmp_path, TINY)
    mine, fused = bench.Bench(args, env), bench.Bench(args, env, bench.FusedAttention)
    for model, other in (mine.llm, fused.llm), (mine.encoder, fused.encoder):
        other.load_state_dict(model.state_dict())
    for name in bench.TRAINING:
        batch = mine.batches[name][0]
        losses = mine.loss(name, batch), fused.loss(name, batch)
        torch.testing.assert_close(*losses)
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(mine.llm.h[0].attn.c_attn.weight.grad,
                                   fused.llm.h[0].attn.c_attn.weight.grad)


@pytest.mark.parametrize("c", [1, 2, 8])
def test_no_problem_is_too_long(tmp_path, c):
    args, _ = bench.setup(tmp_path, ["--chunk-size", str(c), "--device", "cpu"])
    p = bench.some_problems(bench.stand_in(100), 500, args, x=(56, 20), s=(56, 20))
    latents = bench.count_chunks(p.s.length, c)
    assert 0 < p.dropped and (p.x.length + c * latents + p.a.length).max() <= args.block_size


def test_sizes_are_those_of_the_preset_where_no_flag_says_more(tmp_path):
    args, _ = bench.setup(tmp_path, ["--preset", "gsm8k", "--n-layer", "2", "--device", "cpu"])
    assert (args.n_layer, args.n_embd, args.block_size, args.batch_size) == (2, 768, 384, 64)


def test_all_figures_are_there(small, tmp_path):
    bench.main(["--quick", "--json", str(tmp_path / "b.json"), *TINY])
    found = json.loads((tmp_path / "b.json").read_text("utf-8"))
    assert list(found["parts"]) == [*bench.TRAINING[:2], "compress", "phase 3", "latent decoding",
                                    "explicit decoding"]
    assert all(figure > 0 for row in [*found["parts"].values(), found["attention"]]
               for figure in row.values())
    assert all("data_share" in found["parts"][name] for name in bench.TRAINING)
