"""Decoding in a batch, on a cache, against a plain loop that reads one row over again for every step."""
from types import SimpleNamespace

import pytest
import torch

import common
from conftest import VOCAB, random_batch, rows, tiny
from encoder import decode, gold_prompt, ordinary_softmax, superpose
from test_encoder import summaries


def decode_one(llm, x, latent=False, top_k=0, max_latents=0, max_tokens=64):
    """One prompt x (T, C), no cache: (ids written, latent steps, was a cap met)."""
    written, latents, capped = [], 0, False
    while True:
        logits = llm.head(llm(x[None]))[0, -1]
        token = int(logits.argmax())
        if latent and token != VOCAB.eot and latents == max_latents:
            token, capped = VOCAB.eot, True
        latent = latent and token != VOCAB.eot
        if not latent:
            written.append(token)
            if token == VOCAB.eos:
                return written[:-1], latents, capped
        if len(written) == max_tokens or len(x) == llm.config.block_size:
            return written, latents, True
        if latent:
            latents += 1
            fed = superpose(ordinary_softmax(logits, VOCAB.n_ordinary), llm.wte.weight, top_k)
        else:
            fed = llm.wte.weight[token]
        x = torch.cat([x, fed[None].to(x.dtype)])


def speaker(seed, B=8):
    """A model whose rows stop early, late or never, and prompts for it: (B, T, C), lengths, garbage past a row's end."""
    llm, batch = tiny(seed, block_size=40), random_batch([0] * B, seed)
    llm.wpe.weight.mul_(4)  # so that it does not say one thing for ever
    return llm, llm.wte(torch.from_numpy(batch.x)), torch.from_numpy(batch.nx)


@pytest.mark.parametrize("how", [
    dict(), dict(max_tokens=3), dict(latent=True, max_latents=30), dict(latent=True, max_latents=30, top_k=3),
    dict(latent=True, max_latents=4, max_tokens=4), dict(latent=True, max_latents=0), dict(latent=True, max_latents=200),
], ids=str)
def test_batched_and_cached_equals_one_by_one(how):
    """Rows of different length, which stop by themselves, meet a cap, or run out of positions, each at its own step."""
    caps = set()
    for seed in (0, 2, 3, 7):
        llm, x, length = speaker(seed)
        out = decode(llm, VOCAB, x, length, **how)
        for b, n in enumerate(length):
            expected = decode_one(llm, x[b, :n], **how)
            assert (out.tokens[b], int(out.latents[b]), bool(out.capped[b])) == expected
            caps.add(expected[2])
    assert caps == {False, True}  # both kinds of ending were there to compare


@pytest.mark.parametrize("c", [1, 2, 4])
@pytest.mark.parametrize("top_k", [0, 3])
@pytest.mark.parametrize("block_size", [22, 40])  # at 22 the batch is padded beyond the last position
def test_gold_prompts_are_the_summaries_of_the_chain(c, top_k, block_size):
    encoder, llm, batch = tiny(0, block_size), tiny(1, block_size), random_batch([5, 0, 8, 1], nx=[3, 5, 7, 2])
    env = SimpleNamespace(tokenizer=VOCAB, device="cpu")
    x, length = gold_prompt(llm, encoder, batch, env, c, top_k)
    out = decode(llm, VOCAB, x, length, max_tokens=10)
    for b, (X, S, _) in enumerate(rows(batch, c)):
        z = [superpose(alpha.float(), llm.wte.weight, top_k)[None] for alpha in summaries(encoder, X, S)]
        prompt = torch.cat([llm.wte(torch.tensor(X)), *z, llm.wte(torch.tensor([VOCAB.eot]))])
        torch.testing.assert_close(x[b, :length[b]], prompt, rtol=0, atol=1e-6)  # α is float32
        assert (out.tokens[b], 0, bool(out.capped[b])) == decode_one(llm, prompt, max_tokens=10)


def test_latent_steps_can_be_watched():
    llm, x, length = speaker(3)
    seen, caught = torch.zeros(8, dtype=torch.int64), []

    def watch(step, q, rows):
        assert step == len(caught) and q.shape == (8, VOCAB.n_ordinary)
        torch.testing.assert_close(q.sum(1), torch.ones(8))
        caught.append(step)
        seen.add_(rows)

    out = decode(llm, VOCAB, x, length, latent=True, max_latents=30, watch=watch)
    assert torch.equal(seen, out.latents) and len(set(seen.tolist())) > 1


def test_decoding_encodes_nothing_again():
    """The prompt once, then one vector a row and step."""
    llm, x, length = speaker(0)
    fed = []
    llm.register_forward_pre_hook(lambda module, args: fed.append(args[0].size(1)))
    decode(llm, VOCAB, x, length, latent=True, max_latents=5, max_tokens=9)
    assert fed == [x.size(1)] + [1] * (5 + 9 - 1)
