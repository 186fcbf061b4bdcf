"""Files: what a script writes, and how a later one reads it.

    save(path, settings, made_of, made_by, models)     # a checkpoint, with the id of its weights
    saved = load(path, settings, sup=parent["id"])     # or one sentence why it is not the right one
    llm = build(saved, "llm", device)

Every file says its version, the settings that it was made with, and what it was made of: the ids of
the weights, arrays or problems. So what does not belong together is refused when it is read. A file
is written beside its place and then moved there: it is the old one or the new one, never half.
"""
import contextlib
import hashlib
import json
import os
import shutil
from dataclasses import asdict

import numpy as np
import torch

from model import GPT, GPTConfig

VERSION = 3
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
        if name == "latents":
            shutil.rmtree(out / name, ignore_errors=True)


# ---------------------------------------------------------------------------------- checkpoints

def identity(arrays):
    """16 hex digits that name these tensors or arrays, {name: array}."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        array = array.cpu() if torch.is_tensor(array) else array
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(array).data)  # as it is mapped: no copy in memory
    return digest.hexdigest()[:16]


def weights_id(models):
    """The id of {name: GPT}."""
    return identity({f"{name}.{key}": tensor for name, model in models.items()
                     for key, tensor in model.state_dict().items()})


def save(path, settings, made_of, made_by, models, **content):
    """Write a checkpoint: {name: GPT} and whatever else is given, as `load` returns it."""
    content |= {"version": VERSION, "settings": settings, "made_of": made_of, "made_by": made_by,
                "id": weights_id(models), "shape": asdict(next(iter(models.values())).config),
                "models": {name: model.state_dict() for name, model in models.items()}}
    write(path, lambda file: torch.save(content, file))


def load(path, settings={}, **made_of):
    """What was saved at `path`, a .pt file or the folder of a store: a dict, on the CPU.

    settings, made_of  what it must have been made with, and made of; id: which file it must be
    No code in the file is run. Raises UserError where it is missing, damaged, of another version,
    or made with or of something else.
    """
    script = MAKES.get(path.name.split(".")[0])
    again = (f"make it again with: python {script} --overwrite --out {path.parent}" if script
             else "choose another file")
    source = path / "meta.json" if path.is_dir() else path
    if not source.is_file():
        hint = f"; run {script} first, with the same --out" if script else ""
        raise UserError(f"{path}: no such file{hint}")
    try:
        saved = (read_json(source) if path.is_dir() else
                 torch.load(path, map_location="cpu", weights_only=True))
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
    model = GPT(GPTConfig(**saved["shape"]))
    model.load_state_dict(saved["models"][name])
    return model.to(device)


# --------------------------------------------------------------- the store: phase 2 writes, 3 reads

class StoreWriter:
    """A new store of so many latents, of K entries each, in a folder beside its place.

    values float32, ids int32 (latents, K): arrays on disk, to be filled before `finish`.
    """

    def __init__(self, folder, latents, K):
        self.folder, self.part = folder, folder.with_name(folder.name + ".part")
        shutil.rmtree(self.part, ignore_errors=True)
        self.part.mkdir(parents=True)
        shape = max(1, latents), K  # without any chain: a row for Store.read
        self.values, self.ids = (
            np.lib.format.open_memmap(self.part / f"{name}.npy", "w+", dtype, shape)
            for name, dtype in (("values", np.float32), ("ids", np.int32)))

    def finish(self, n, offsets, settings, made_of, made_by):
        """Move it into its place.

        n, offsets int64 (problems,): each problem's latents, and where its rows begin.
        """
        self.values.flush()
        self.ids.flush()
        np.save(self.part / "n.npy", n)
        np.save(self.part / "offsets.npy", offsets)
        arrays = {"values": self.values, "ids": self.ids, "offsets": offsets, "n": n}
        write_json(self.part / "meta.json", {
            "version": VERSION, "settings": settings, "made_of": made_of, "made_by": made_by,
            "id": identity(arrays)})
        remove(self.folder.parent, "latents", "latent")
        os.replace(self.part, self.folder)


class Store:
    """The α of phase 2 (see compress.py for its files), mapped into memory."""

    def __init__(self, folder):
        self.values, self.ids, self.offsets, self.n = (
            np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in ("values", "ids", "offsets", "n"))

    def read(self, rows, N):
        """The α of these problems: values float32, ids int64, both (B, N, K).

        Past a problem's last latent stands what follows in the file; it has to be masked.
        """
        index = self.offsets[rows][:, None] + np.arange(N)  # (B, N)
        index = np.minimum(index, len(self.values) - 1)
        return (torch.from_numpy(self.values[index]),
                torch.from_numpy(self.ids[index].astype(np.int64)))
