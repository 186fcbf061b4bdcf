"""Files: what a script writes, and how a later one reads it.

    save(path, settings, made_of, made_by, models)     # a checkpoint, with the id of its weights
    saved = load(path, settings, sup=parent["id"])     # or one sentence why it is not the right one
    llm = build(saved, "llm", device)

Every file says its version, the settings that it was made with, and what it was made of: the ids of
weights, of a store or of problems. So what does not belong together is refused when it is read. A
file is written beside its place and then moved there: it is the old one or the new one, never half.
"""
import contextlib
import hashlib
import json
import os
from dataclasses import asdict
from typing import NamedTuple

import numpy as np
import torch

from model import GPT, GPTConfig

VERSION = 4
MAKES = {"sft": "train_sup.py", "sup": "train_sup.py", "explicit": "train_sup.py --baselines",
         "no_cot": "train_sup.py --baselines", "latents": "compress.py",
         "latent": "train_latent.py"}
OTHER = {"data": "was made of other problems than there are now",
         "tokenizer": "reads other tokens than there are now",
         "start": "started from other weights",
         "id": "is not the one that the files beside it were made of"}


class UserError(SystemExit):
    """What the user can mend: one sentence on stderr, exit status 1, no traceback."""


# ------------------------------------------------------------------------------------- any file

def lock(out):
    """Hold the folder `out` for this process, as long as the file returned is open.

    Raises UserError where another process does. A system without such locks refuses nothing.
    """
    out.mkdir(parents=True, exist_ok=True)
    file = open(out / "lock", "w")
    with contextlib.suppress(ImportError):  # Windows
        import fcntl
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process writes to {out}; wait for its end, or choose another "
                            "--out")
    return file


def write(path, content):
    """Write beside, sync, rename. content: a function that takes the open file."""
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(part, "wb") as file:
        content(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def write_json(path, content):
    write(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


def read_json(path):
    return json.loads(path.read_text("utf-8"))


def remove(out, *names):
    """Remove what loops or phases of these names have left in the folder `out`."""
    for name in names:
        for file in (f"{name}.state.pt", f"{name}.pt", f"{name}.jsonl"):
            (out / file).unlink(missing_ok=True)


# ---------------------------------------------------------------------------------- checkpoints

def weights_id(models, **tensors):
    """16 hex digits that name these weights, {name: GPT}, and tensors."""
    for name, model in models.items():
        tensors |= {f"{name}.{key}": tensor for key, tensor in model.state_dict().items()}
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensor.cpu()).data)
    return digest.hexdigest()[:16]


def save(path, settings, made_of, made_by, models={}, **content):
    """Write a checkpoint: {name: GPT} and whatever else is given, as `load` returns it."""
    tensors = {name: x for name, x in content.items() if torch.is_tensor(x)}
    content |= {"version": VERSION, "settings": settings, "made_of": made_of, "made_by": made_by,
                "id": weights_id(models, **tensors),
                "shapes": {name: asdict(model.config) for name, model in models.items()},
                "models": {name: model.state_dict() for name, model in models.items()}}
    write(path, lambda file: torch.save(content, file))


def load(path, settings={}, **made_of):
    """What was saved at `path`: a dict, on the CPU.

    settings, made_of  what it must have been made with, and made of; id: which file it must be
    No code in the file is run. Raises UserError where it is missing, damaged, of another version,
    or made with or of something else.
    """
    script = MAKES.get(path.name.split(".")[0])
    again = (f"make it again with: python {script} --overwrite --out {path.parent}" if script
             else "choose another file")
    if not path.is_file():
        hint = f"; run {script} first, with the same --out" if script else ""
        raise UserError(f"{path}: no such file{hint}")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        version = saved["version"]
    except Exception as error:  # a truncated, old or foreign file fails in many ways
        raise UserError(f"{path}: not a file of this project ({type(error).__name__}); {again}")
    if version != VERSION:
        raise UserError(f"{path}: of version {version} of this project, not {VERSION}; {again}")
    saved["path"], saved["again"] = path, again
    require(saved, settings, **made_of)
    return saved


def require(saved, settings={}, **made_of):
    """Raises UserError where a file, as `load` returns it, was made with or of something else."""
    path, again = saved["path"], saved["again"]
    for field, value in settings.items():
        if saved["settings"].get(field) != value:
            raise UserError(f"{path} was made with {field} = {saved['settings'].get(field)}, here "
                            f"it is {value}; choose another --out, or {again}")
    for field, value in made_of.items():
        if (saved["made_of"] | {"id": saved["id"]}).get(field) != value:
            why = OTHER.get(field, f"belongs to another {field} than the one beside it")
            raise UserError(f"{path} {why}; {again}")


def build(saved, name, device):
    """The GPT called `name` in a checkpoint."""
    model = GPT(GPTConfig(**saved["shapes"][name]))
    model.load_state_dict(saved["models"][name])
    return model.to(device)


# --------------------------------------------------------------- the store: phase 2 writes, 3 reads

class Store(NamedTuple):
    """The α of phase 2, as compress.py describes them."""

    values: torch.Tensor   # float32 (latents, K)
    ids: torch.Tensor      # int32 (latents, K)
    n: torch.Tensor        # int64 (problems,)
    offsets: torch.Tensor  # int64 (problems,)

    def read(self, rows, N):
        """The α of these problems: values float32, ids int64, both (B, N, K).

        Past a problem's last latent stands what follows in the store; it has to be masked.
        """
        index = self.offsets[rows][:, None] + torch.arange(N)  # (B, N)
        index = index.clamp(max=len(self.values) - 1)
        return self.values[index], self.ids[index].long()
