"""GPT-2's published weights: downloaded once, and put into a GPT of model.py."""
from pathlib import Path

import torch

from lab.files import UserError
from model import GPT, GPTConfig

GPT2 = {  # layers, heads, channels; each has 1024 positions
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}
URL = "https://huggingface.co/openai-community/{}/resolve/main/pytorch_model.bin"
SHA256 = {"gpt2": "7c5d3f4b8b76583b422fcb9189ad6c89d5d97a094541ce8932dce3ecabde1421"}


def from_gpt2(name, vocab_size, state=None):
    """A GPT with GPT-2's weights, and new rows of E for the special tokens.

    state: a state dict to read in place of the published one. A new row is the mean of the old
    ones: GPT-2's logits are far below zero, so that a row near zero would have the largest logit
    everywhere. Raises UserError where the download fails.
    """
    n_layer, n_head, n_embd = GPT2[name]
    published = gpt2_weights(name) if state is None else state
    published = {key.removeprefix("transformer."): value for key, value in published.items()}
    model = GPT(GPTConfig(vocab_size, 1024, n_layer, n_head, n_embd, gelu="tanh"))
    for key, mine in model.state_dict().items():
        theirs = published[key]
        if key.endswith("weight") and "c_" in key:
            theirs = theirs.t()  # GPT-2 stores its linear maps as (in, out)
        if key == "wte.weight":
            mean = theirs.mean(0, keepdim=True)
            theirs = torch.cat([theirs, mean.expand(vocab_size - len(theirs), -1)])
        mine.copy_(theirs)
    return model


def gpt2_weights(name):
    """GPT-2's state dict as published: from torch's cache, or downloaded to it."""
    file = Path(torch.hub.get_dir(), "checkpoints", f"openai-{name}.bin")
    try:
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL.format(name), str(file), SHA256.get(name))
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # no network, a wrong checksum, a damaged file
        raise UserError(f"--init {name}: {file} could not be downloaded or read ({error}); remove "
                        "it if it is there, and try again")
