"""Score a split: decode its problems, read the number in each answer, compare.

    evaluate(llm, val, env, caps)                                          # the chain as text
    evaluate(llm, val, env, caps, c=2, top_k=50)                           # the chain in latents
    evaluate(llm, val, env, caps, partial(gold_prompt, …), batch_size=64)  # given the encoder's
"""
import time
from functools import partial

import torch

from decode import decode, latents_prompt, question_prompt
from encoder import encoder_batch, summary_states
from lab.numbers import to_number


@torch.no_grad()
def evaluate(llm, problems, env, caps, prompt=None, c=0, top_k=0, limit=None, batch_size=256,
             on_latent=None):
    """Decode a split (or its first `limit` problems) and score the answers.

    caps       (max_latents, max_tokens) of `decode`
    prompt     a function prompt(batch) -> (x, pos, length); left out: X <bot>
    c, top_k   of `decode`: c > 0 thinks in latent tokens, c = 0 writes text at once
    on_latent  as in `decode`, but called with the batch as first argument
    Returns a dict: accuracy; steps, the mean number of latents, or of tokens before <eot> where
    c = 0; capped and unparseable, numbers of problems; seconds; answers, {problem: (text, whether
    it is right, its ids)}.
    """
    max_latents, max_tokens = caps
    prompt = prompt or partial(question_prompt, llm)
    eot = env.tokenizer.eot
    start, answers, steps, capped, unparseable = time.time(), {}, 0, 0, 0
    for batch in problems.eval_batches(batch_size, limit):
        # a block that is compiled for training has no graphs of what decoding feeds it
        with env.autocast(), torch.compiler.set_stance("force_eager"):
            out = decode(llm, env.tokenizer, *prompt(batch), c=c, top_k=top_k,
                         max_latents=max_latents, max_tokens=max_tokens,
                         on_latent=on_latent and partial(on_latent, batch),
                         latent=env.parts.latent)
        capped += int(out.capped.sum())
        for row, tokens, latents in zip(batch.rows.tolist(), out.tokens, out.latents.tolist()):
            text = env.tokenizer.decode(tokens)
            number = to_number(text)
            unparseable += number is None
            right = number is not None and number == to_number(problems.problems[row]["answer"])
            answers[row] = text, right, tokens
            written = tokens.index(eot) if eot in tokens else len(tokens)
            steps += latents if c else written
    n = len(answers)
    accuracy = sum(right for _, right, _ in answers.values()) / n
    return dict(accuracy=accuracy, steps=steps / n, capped=capped, unparseable=unparseable,
                seconds=time.time() - start, answers=answers)


# ---------------------------------------------------------------- prompts of the encoder's latents

def summaries(llm, encoder, batch, env, c):
    """The encoder's summaries of the true chains: (α, z, n).

    α float32 (B, N, n_ordinary), z float (B, N, C) in the embeddings of `llm`, n int64 array (B,).
    """
    layout = encoder_batch(batch, c, env.tokenizer.sum).to(env.device)
    hidden = summary_states(encoder, layout, env.parts.encoder_mask)  # (B, N, C)
    alpha, z = env.parts.latent(encoder, hidden, llm.wte.weight, env.tokenizer.n_ordinary)
    return alpha, z, layout.n.cpu().numpy()


def gold_prompt(batch, llm, encoder, env, c):
    """X <bot> z₀ … z_{n-1} <eot>, the summaries of all chunks: only the answer is to write."""
    _, z, n = summaries(llm, encoder, batch, env, c)
    return latents_prompt(llm, batch, z, n, c, [env.tokenizer.eot])


def continuation_prompt(batch, llm, encoder, env, c):
    """X <bot> z₀ … z_{k-1}, the first k summaries: the rest and the answer are to write.

    k is the problem's number modulo n + 1, so that all of 0 … n occur in a split.
    """
    _, z, n = summaries(llm, encoder, batch, env, c)
    return latents_prompt(llm, batch, z, batch.rows % (n + 1), c, [])
