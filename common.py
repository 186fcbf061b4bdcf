"""Bookkeeping that the scripts share: flags, device, files, the store, resuming, log, processes.

Nothing here teaches latent reasoning, and of what decides how a model learns only the presets are
here. In reading order: defaults and flags, the set-up of a script, several processes, files,
the store of phase 2, a training run.
"""
import argparse
import contextlib
import ctypes
import functools
import hashlib
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import toy
from data import (EASY_LENGTH, EASY_NUMBER, EASY_STEPS, Tokenizer, UserError, load,
                  vocabulary_texts)
from model import GPT, GPT2, GPTConfig

# ------------------------------------------------------------------------------- defaults and flags

# The defaults that depend on --data; "gsm8k" serves everything but the toy task. The steps of
# "latent" are for each token of a chunk: the more a latent token holds, the longer it takes.
PRESETS = {
    "toy": dict(
        n_layer=3, n_head=8, n_embd=128, block_size=128,
        batch_size=32, chunk_size=2, eval_every=200, noise=0.1,
        sft_steps=500, lr={"sup": 4e-3, "latent": 4e-3},
        bag_steps=60, steps={"sup": 400, "latent": 250},
    ),
    "gsm8k": dict(
        n_layer=4, n_head=4, n_embd=256, block_size=384,
        batch_size=16, chunk_size=2, eval_every=500, noise=1.0,
        sft_steps=2000, lr={"sup": 1e-3, "latent": 1e-3},
        bag_steps=200, steps={"sup": 1000, "latent": 1000},
    ),
    "easy": dict(  # of GSM8K's problems, with new numbers, on a laptop: --easy 600 --renumber 200
        n_layer=3, n_head=8, n_embd=192, block_size=128,
        batch_size=32, chunk_size=2, eval_every=400, noise=0.1,
        sft_steps=3200, lr={"sup": 4e-3, "latent": 4e-3},
        bag_steps=100, steps={"sup": 900, "latent": 1000},
    ),
}
SHAPE = ("n_layer", "n_head", "n_embd", "block_size")
PROBLEMS = ("data", "cot", "easy", "renumber", "as_told", "seed")  # they decide what these are
# what a later phase takes over from phase 1, and may not contradict
INHERITED = (*PROBLEMS, "data_dir", "chunk_size", *SHAPE)


def parser(doc, phase):
    """The flags of every script, and those of this phase: sup, compress, latent or analyze."""
    p = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_flags(p.add_argument_group("data"), phase)
    add_model_flags(p.add_argument_group("model"), phase)
    if phase in ("sup", "latent"):
        add_training_flags(p.add_argument_group("training"), phase)
    add_run_flags(p.add_argument_group("run"), phase)
    return p


def add_data_flags(group, phase):
    add = group.add_argument
    add("--data", help="toy, gsm8k, gsm8k-aug, a .jsonl file in GSM8K's form, or a folder with "
        "train.jsonl and test.jsonl (default: toy; later phases: that of phase 1)")
    add("--data-dir", help="folder with the files of gsm8k or gsm8k-aug "
        "(default: data/<name>; gsm8k is downloaded)")
    if phase == "sup":
        add("--cot", choices=["steps", "text"], help="chain of thought: the calculator steps "
            "(default) or the whole solution")
        add("--easy", type=int, metavar="COUNT", help="GSM8K: train on so many easy problems "
            f"alone, of at most {EASY_STEPS} steps, {EASY_LENGTH} characters and whole numbers up "
            f"to {EASY_NUMBER} (default: 0 = all problems)")
        add("--renumber", type=int, metavar="COPIES", help="GSM8K: so many copies of each training "
            "problem with other numbers (default: 0)")
        add("--as-told", type=float, help="toy task: share of the chains that take the free steps "
            "in the order of the question (default: 0.9; 0.167 = all six orders alike)")
    add("--batch-size", type=int, help="problems in a batch")


def add_model_flags(group, phase):
    add = group.add_argument
    add("--chunk-size", type=int, help="c, tokens of the chain in one latent token (default: 2)")
    add("--top-k", type=int, help={
        "sup": "entries of α in z, 0 = all (default: 0)",
        "compress": "entries of α in the store, 0 = all (default: phase 1's, or 50)",
        "latent": "entries of α that the store must have",
        "analyze": "entries of q in z when decoding, 0 = all (default: as in the store)"}[phase])
    if phase == "sup":
        add("--init", default="scratch", help="scratch (default), " + ", ".join(GPT2)
            + ", or a checkpoint such as sft.pt")
    for flag, meaning in zip(SHAPE, ("layers", "attention heads", "channels", "positions")):
        add("--" + flag.replace("_", "-"), type=int,
            help=meaning if phase == "sup" else argparse.SUPPRESS)


def add_training_flags(group, phase):
    add = group.add_argument
    add("--lr", type=float, help="peak learning rate")
    add("--steps", type=int, help="updates of this phase")
    if phase == "sup":
        add("--sft-steps", type=int, help="updates of the explicit warm-up")
    add("--eval-every", type=int, help="updates between two evaluations, which also save")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="torch.compile the models' blocks in training (default: on cuda)")


def add_run_flags(group, phase):
    add = group.add_argument
    add("--out", type=Path, help="folder to write to, and to find the earlier phases in "
        "(default: out/<data>)")
    add("--seed", type=int,
        help="of weights, toy problems, order of the data and noise (default: 0)")
    add("--device", help="cpu, cuda, cuda:1, mps, … (default: cuda where there is one)")
    add("--dtype", choices=["float32", "bfloat16"],
        help="of the models' matrix products (default: bfloat16 on cuda, else float32; that is "
        "TF32 on cuda)")
    if phase != "analyze":
        again = group.add_mutually_exclusive_group()
        again.add_argument("--resume", action="store_true",
                           help="go on where an interrupted run stopped")
        again.add_argument("--overwrite", action="store_true",
                           help="start over, replacing what --out holds of this phase")


def flag_of(field):
    return "--" + field.replace("_", "-")


# ------------------------------------------------------------------------------- set-up of a script

def setup(p, phase, argv=None):
    """Parse the flags, fill in the defaults, choose the device: (args, env).

    env holds device, autocast (a context manager for a forward pass), tokenizer, rank, world,
    config (what goes into every file written) and parent (phase 1's checkpoint, or None). Raises
    UserError on a value that makes no sense or contradicts phase 1.
    """
    args = p.parse_args(argv)
    default_folder = os.path.basename(os.path.abspath(args.data or "toy")).removesuffix(".jsonl")
    args.out = args.out or Path("out") / default_folder
    parent = None if phase == "sup" else load_checkpoint(args.out / "sup.pt")
    fill_in_defaults(args, phase, parent)
    check_ranges(args)
    rank, world = process_rank(args, phase)
    device = choose_device(args, world)
    if world > 1:
        join_process_group(device)
    choose_precision(args, device)
    keep_freed_memory()
    torch.manual_seed(args.seed)
    tokenizer = choose_tokenizer(args, parent)
    if rank == 0:
        given = {k: v for k, v in vars(args).items() if v is not None and v is not False}
        print(phase, *(f"{k}={v}" for k, v in given.items()))
    config = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    config.update(phase=phase, tokenizer=tokenizer.name, commit=commit(),
                  torch=str(torch.__version__), python=platform.python_version())
    bfloat16 = args.dtype == "bfloat16"
    env = SimpleNamespace(
        device=device, tokenizer=tokenizer, rank=rank, world=world, config=config, parent=parent,
        autocast=lambda: torch.autocast(device.type, torch.bfloat16, bfloat16))
    return args, env


def keep_freed_memory():
    """Let Linux's malloc reuse the memory of large tensors, as it does for those below 32 MB.

    It would give each of them back to the system when it is freed, and have new pages filled with
    zeros when the next one is made. With the attention scores of phase 1, (32, 8, 200, 200), an
    update took 1.2 to 1.4 times as long (LAB.md). Other systems' malloc has no such setting.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        malloc = ctypes.CDLL(None)
        malloc.mallopt(-3, 2 ** 30)  # M_MMAP_THRESHOLD
        malloc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD


def fill_in_defaults(args, phase, parent):
    """A flag that was not given is inherited from phase 1, or else the preset has it."""
    inherited = {}
    if parent:
        for field in (*INHERITED, "top_k", "ltim", "model"):
            if field not in parent["config"]:
                raise UserError(f"{args.out / 'sup.pt'} does not say its {field}: another version "
                                "wrote it; run train_sup.py again, with --overwrite")
        if "encoder" not in parent["models"]:
            raise UserError(f"{args.out / 'sup.pt'} holds no encoder, so it is not of phase 1; run "
                            "train_sup.py again, with --overwrite")
        inherited = {field: parent["config"][field] for field in INHERITED}
    if args.top_k is not None and (parent["config"]["model"]["hidden_latents"] if parent
                                   else args.latents == "hidden"):
        raise UserError(f"--top-k {args.top_k}: a hidden state has no entries to choose from; "
                        "leave it out")
    for field in set(inherited) - {"data_dir"}:
        given = getattr(args, field, None)
        if given not in (None, inherited[field]):
            raise UserError(f"{flag_of(field)} {given} contradicts {args.out / 'sup.pt'}, "
                            f"which has {inherited[field]}")
    if getattr(args, "init", "scratch") != "scratch" and any(getattr(args, f) for f in SHAPE):
        raise UserError(f"--init {args.init} has a shape of its own; leave out --n-layer, "
                        "--n-head, --n-embd and --block-size")
    data = args.data or inherited.get("data", "toy")
    defaults = {"data": data, "data_dir": None, "cot": "steps", "easy": 0, "renumber": 0,
                "as_told": toy.AS_TOLD, "seed": 0}
    easy = getattr(args, "easy", None) or inherited.get("easy")
    preset = PRESETS["toy" if data == "toy" else "easy" if easy else "gsm8k"]
    for field, value in preset.items():
        defaults[field] = value.get(phase) if isinstance(value, dict) else value
    defaults.update(inherited)
    if phase == "sup":
        defaults["top_k"] = 0
    if phase == "latent":
        defaults["steps"] *= args.chunk_size or defaults["chunk_size"]
    for field, value in defaults.items():
        if field in INHERITED or hasattr(args, field):
            if getattr(args, field, None) is None:
                setattr(args, field, value)


def check_ranges(args):
    may_be_zero = ("steps", "sft_steps", "bag_steps", "encoder_first", "baseline_steps", "top_k",
                   "easy", "renumber", "seed")
    if args.easy and args.data == "toy":
        raise UserError("--easy: the toy task has no problems that are easier; leave it out")
    if args.renumber and args.data == "toy":
        raise UserError("--renumber: the toy task draws new problems already; leave it out")
    if getattr(args, "split", None) == "renumbered" and args.data == "toy":
        raise UserError("--split renumbered: the toy task's test problems are new already")
    if getattr(args, "as_told", 0) > 1:
        raise UserError(f"--as-told {args.as_told}: must be a share, 0 to 1")
    if getattr(args, "bag", 0) and 0 < args.steps <= args.bag_steps:
        raise UserError(f"--steps {args.steps}: the first --bag-steps {args.bag_steps} of them are "
                        "for the encoder alone, so that nothing is left for the LLM; choose more "
                        "of the former, or fewer of the latter")
    for field, value in vars(args).items():
        least = 0 if type(value) is float or field in may_be_zero else 1
        if type(value) in (int, float) and not least <= value < 2 ** 63:
            raise UserError(f"{flag_of(field)} {value}: must be a number from {least} up"
                            + (", below 2 to the 63" if value > 0 else ""))


def process_rank(args, phase):
    """(rank, world): which of how many processes this is, as torchrun says in the environment."""
    try:
        rank = int(os.environ.get("RANK", 0))
        world = int(os.environ.get("WORLD_SIZE", 1))
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
    except ValueError as error:
        raise UserError(f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers ({error}); unset "
                        "them, or start several processes with torchrun")
    if not 0 <= rank < world or local_rank < 0:
        raise UserError(f"RANK {rank} of WORLD_SIZE {world} cannot be; unset both, or start "
                        "several processes with torchrun")
    missing = [v for v in ("RANK", "MASTER_ADDR", "MASTER_PORT") if v not in os.environ]
    if world > 1 and missing:
        raise UserError(f"WORLD_SIZE is {world}, but {missing[0]} is not set; start several "
                        "processes with torchrun, or unset WORLD_SIZE")
    if world > 1 and phase not in ("sup", "latent"):
        raise UserError(f"{phase} runs in one process; start it without torchrun")
    if args.batch_size % world:
        raise UserError(f"--batch-size {args.batch_size} cannot be shared out to {world} "
                        "processes; choose a multiple")
    return rank, world


def choose_device(args, world):
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and world > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}")
    return device


def choose_precision(args, device):
    """bfloat16 and torch.compile on a GPU that has them; neither on a CPU."""
    gpu = device.type == "cuda"
    if args.dtype is None:
        has_bfloat16 = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        args.dtype = "bfloat16" if has_bfloat16 else "float32"
    if "compile" in args and args.compile is None:
        args.compile = gpu and find_spec("triton") is not None
    torch.set_float32_matmul_precision("high")


def choose_tokenizer(args, parent):
    """The toy task's; GPT-2's whole vocabulary for its weights, else what the training text needs.

    A later phase has that of phase 1. Raises UserError where the training text is another one now.
    """
    if args.data == "toy":
        return Tokenizer("toy")
    used = parent["config"]["tokenizer"] if parent else None
    if used is None and args.init not in ("scratch", *GPT2):
        used = load_checkpoint(Path(args.init))["config"].get("tokenizer", "unknown")
    if used == "gpt2" or used is None and args.init in GPT2:
        return Tokenizer("gpt2")
    train = load(args.data, "train", args.data_dir, args.cot, args.seed, easy=args.easy)
    tokenizer = Tokenizer("gpt2", vocabulary_texts(train))
    if used is not None:
        require_same(args.out / "sup.pt" if parent else args.init, {"tokenizer": used},
                     tokenizer=tokenizer.name)
    return tokenizer


@functools.cache
def commit():
    """The git commit of this code, '-dirty' where files differ from it, or 'unknown'."""
    command = "git describe --always --dirty --abbrev=40 --exclude=*"
    try:
        done = subprocess.run(command.split(), cwd=Path(__file__).parent, check=True,
                              capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def compile_blocks(models, args):
    """torch.compile where --compile says so: of the blocks, which take most of a step's time.

    A graph of a block serves all layers and all widths of the batches; one of the whole loss would
    be made anew for each width.
    """
    if args.compile:
        torch._dynamo.config.recompile_limit = 32  # of all models and loops of a process
        for model in models:
            for block in model.h:
                block.compile(dynamic=True)


def say_next(script, args, env):
    """The command of the next phase, with the folder that this one has written to."""
    if env.rank == 0:
        print(f"next: python {script} --out {args.out}")


def start(main):
    """Run a script's main; what the system refuses (a folder, a disk, memory) is one sentence."""
    if sys.stdout:  # which may be closed
        sys.stdout.reconfigure(errors="replace")  # a terminal without α is no reason to stop
    try:
        main()
        if sys.stdout:
            sys.stdout.flush()
        if dist.is_initialized():
            dist.barrier()  # nobody leaves while another process still communicates
    except KeyboardInterrupt:
        raise SystemExit("stopped; what was saved before is untouched")
    except OSError as error:
        if not error.filename and sys.stdout:  # perhaps nobody reads the output any more: then what
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # is left of it would fail at the exit
        raise UserError(f"{error.filename or 'the output, or the system'}: "
                        f"{error.strerror or error}")
    except (MemoryError, RuntimeError) as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            why = next(line for line in str(error).splitlines() + ["no reason given"] if line)
            raise UserError(f"torch.compile failed ({why}); go without it: --no-compile")
        too_little = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not too_little and "allocate memory" not in str(error):  # as torch says it on a CPU
            raise
        raise UserError("there is not enough memory; choose a smaller --batch-size or model")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
            leave(sys.exc_info()[1])


def leave(error):
    """End one of several processes at once, unless `error`, which ends it, is a fault of ours.

    Python's own way out now and then aborts in a thread of PyTorch's, and a run that went well
    would end in status 134.
    """
    if error is None or isinstance(error, SystemExit):
        if error:
            print(error, file=sys.stderr)
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        os._exit(1 if error else 0)


# -------------------------------------------------------------------------------- several processes

def join_process_group(device):
    if dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where NCCL works
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    except (RuntimeError, ValueError) as error:  # no such host, no such port, one in use
        raise UserError("the processes do not find each other by MASTER_ADDR and MASTER_PORT "
                        f"({str(error).splitlines()[0]}); start them with torchrun")


def average_gradients(parameters, world):
    """Data parallelism by hand: every process gets the mean of all gradients (in place)."""
    if world == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients])):
        gradient.copy_(mean.view_as(gradient))


# -------------------------------------------------------------------------------------------- files

def lock(out):
    """The file `lock` of a folder, which as long as it is open says that this process writes there.

    Raises UserError where another one does, or the folder can't be written to. A system without
    such locks refuses nothing. (A lock of this kind the same process may take again.)
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / "lock", "w")
    except OSError as error:
        raise UserError(f"could not write {out} ({error.strerror})")
    try:
        import fcntl  # not on Windows
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"another process writes to {out}; wait for its end, or choose another "
                        "--out")
    except (ImportError, OSError):
        pass
    return file


def write(path, content):
    """Write beside, sync, rename: `path` is the old file or the new one, never half of it.

    content: a function that takes the open file. Raises UserError where the disk is full or the
    folder read-only.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        why = getattr(error, "strerror", None) or "is the disk full?"
        raise UserError(f"could not write {path} ({why}); what was there before is untouched")


def write_json(path, content):
    write(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


def read_json(path):
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error})")


def save_checkpoint(path, **content):
    write(path, lambda file: torch.save(content, file))


def load_checkpoint(path):
    """The dict saved there, on the CPU; never runs code from the file. Raises UserError."""
    script = {"sup": "train_sup.py", "sft": "train_sup.py", "latent": "train_latent.py"}
    if not path.is_file():
        hint = ""
        if path.stem in script:
            hint = f"; run {script[path.stem]} first, with the same --out"
        raise UserError(f"{path}: no such file{hint}")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return {**saved, "path": path, "models": dict(saved.get("models", {})),
                "config": dict(saved["config"])}
    except PermissionError:
        raise  # for `start` to say
    except Exception as error:  # a truncated or foreign file fails in many ways
        raise UserError(f"{path}: not a checkpoint of this project ({type(error).__name__})")


def require_same(path, saved, **expected):
    """Refuse what was made of something else: UserError naming the field and both values."""
    for field, value in expected.items():
        if saved.get(field) != value:
            raise UserError(f"{path} was made with {field} = {saved.get(field)}, here it is "
                            f"{value}")


def build(checkpoint, name, device):
    """The GPT called `name` in a checkpoint. Raises UserError where it has none that fits."""
    try:
        model = GPT(GPTConfig(**checkpoint["config"]["model"]))
        model.load_state_dict(checkpoint["models"][name])
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{checkpoint['path']}: its {name} cannot be read ({type(error).__name__}) "
                        "and is perhaps of another version; make it again")
    return model.to(device)


def identity(weights):
    """16 hex digits that name these weights, a state dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def require_one_warm_up(out, checkpoints):
    """sup.pt and explicit.pt go on from sft.pt, no_cot.pt from where that began, or UserError."""
    sft = checkpoints["sft"]
    begin, end = sft["config"].get("initial_weights"), identity(sft["models"]["llm"])
    starts = {"sup": end, "explicit": end, "no_cot": begin}
    for file, start in starts.items():
        if file in checkpoints and checkpoints[file]["config"].get("initial_weights") != start:
            flag = "" if file == "sup" else " --baselines"
            raise UserError(f"{out / file}.pt belongs to another sft.pt than the one beside it; "
                            f"make it again with: python train_sup.py{flag} --overwrite")


# --------------------------------------------------------------- the store: phase 2 writes, 3 reads

def create_arrays(folder, **arrays):
    """New arrays of a store on disk, name=(dtype, shape), mapped into memory: a list.

    They replace a store that was there. Raises UserError where there is no room for all of them;
    then what was there before is untouched.
    """
    parts = {name: folder / f"{name}.npy.part" for name in arrays}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "meta.json").exists():  # then the old ones are nothing, and take up room
            for name in arrays:
                (folder / f"{name}.npy").unlink(missing_ok=True)
        for name, (dtype, shape) in arrays.items():
            np.lib.format.open_memmap(parts[name], "w+", dtype, shape)
            if hasattr(os, "posix_fallocate"):  # take the room now: a full disk would later kill us
                with open(parts[name], "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, os.path.getsize(parts[name]))
        (folder / "meta.json").unlink(missing_ok=True)  # written last: without it there is no store
        for name, part in parts.items():
            os.replace(part, folder / f"{name}.npy")  # who has a link to the old one keeps it
    except OSError as error:
        for part in parts.values():
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
        raise UserError(f"could not write {folder} ({error}); what was there before is untouched")
    return load_arrays(folder, "r+", *arrays)


def make_again(folder):
    return f"make the store again with: python compress.py --overwrite --out {folder.parent}"


def read_meta(folder, *fields):
    """meta.json of a store. Raises UserError where it lacks one of the fields."""
    meta = read_json(folder / "meta.json")
    missing = [field for field in fields if field not in meta]
    if missing:
        raise UserError(f"{folder / 'meta.json'} does not say {missing[0]}; {make_again(folder)}")
    return meta


def load_arrays(folder, mode, *names):
    """Arrays of a store, mapped into memory. Raises UserError where one is damaged."""
    arrays = []
    for name in names:
        try:
            # a file that is too short is refused when it is opened to read; "r+" would fill it up
            for opened in dict.fromkeys(("r", mode)):
                array = np.load(folder / f"{name}.npy", mmap_mode=opened, allow_pickle=False)
            if not isinstance(array, np.ndarray):
                raise ValueError(f"{name}.npy holds several arrays")
            arrays.append(array)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{folder} cannot be read ({error}); {make_again(folder)}")
    return arrays


def count_entries(top_k, tokenizer):
    """K of a --top-k: 0, or more than there are, means all of the ordinary vocabulary."""
    return min(top_k or tokenizer.n_ordinary, tokenizer.n_ordinary)


class Store:
    """The α that phase 2 wrote (see compress.py for the files), mapped into memory.

    Raises UserError where the store is missing, unfinished, or made from something else than
    `expected`, fields of its meta.json.
    """

    def __init__(self, folder, **expected):
        if not (folder / "meta.json").exists():
            raise UserError(f"{folder}: no such store; run compress.py first, with the same --out")
        meta = read_meta(folder, "complete", "top_k", "latents", "problems")
        if not meta["complete"]:
            raise UserError(f"{folder} is unfinished; finish it with: python compress.py --resume "
                            f"--out {folder.parent}")
        require_same(folder, meta, **expected)
        self.values, self.ids, self.offsets = load_arrays(folder, "r", "values", "ids", "offsets")
        self.top_k = meta["top_k"]
        arrays = self.values, self.ids, self.offsets
        kinds = [array.dtype.kind for array in arrays]
        if kinds != ["f", "i", "i"] or self.offsets.shape != (meta["problems"],) or not (
                self.values.shape == self.ids.shape == (max(1, meta["latents"]), self.top_k)
                and (0 <= self.offsets).all() and (self.offsets <= meta["latents"]).all()):
            raise UserError(f"{folder}: its arrays do not fit each other; {make_again(folder)}")

    def read(self, rows, N):
        """The α of these problems: values float32, ids int64, both (B, N, K).

        Past a problem's last latent stands what follows in the file; it has to be masked.
        """
        index = self.offsets[rows][:, None] + np.arange(N)  # (B, N)
        index = np.minimum(index, len(self.values) - 1)
        values = torch.from_numpy(self.values[index])
        return values, torch.from_numpy(self.ids[index].astype(np.int64))


# ----------------------------------------------------------------------------------- a training run

class Interrupt:
    """While open, a first Ctrl-C sets `pressed`, so that the loop can save; a second ends it."""

    def __enter__(self):
        self.pressed = False
        self.before = signal.signal(signal.SIGINT, self.press)
        return self

    def press(self, *_):
        self.pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.before)


class Run:
    """A loop's files and its place in them: resuming, log, progress bar, Ctrl-C, checkpoints.

        run = Run("sft", args, env, {"llm": llm}, optimizer, train, steps)
        for step in run:
            …                            # batch, forward, backward, clip, rate, optimizer.step()
            run.log(loss=loss, norm=norm)
            if run.evaluates:
                run.save(score)

    models     {name: GPT} to save; all of them start with the same weights
    depends    fields of the configuration, besides DEPENDS, that make this run another one
    Writes     <name>.pt the best models so far; <name>.state.pt all it takes to resume; the log
               <name>.jsonl
    """

    DEPENDS = (*PROBLEMS, "tokenizer", "batch_size", "lr", "dtype", "updates", "model",
               "fingerprint", "initial_weights")
    NEXT = {"sft": ("sup",), "explicit": ("no_cot",)}  # the loop after it, in the same script

    def __init__(self, name, args, env, models, optimizer, problems, steps, depends=()):
        self.name, self.args, self.env, self.steps = name, args, env, steps
        self.depends = (*self.DEPENDS, *depends)
        self.models, self.optimizer = models, optimizer
        if env.rank == 0 and not hasattr(env, "held"):
            env.held = lock(args.out)
        self.path = args.out / f"{name}.pt"
        self.state = args.out / f"{name}.state.pt"
        self.step, self.best = 0, -1.0
        self.figures, self.unread = {}, []  # of the last update that was read; of those to be read
        first = next(iter(models.values()))
        self.config = dict(env.config, fingerprint=problems.fingerprint, model=asdict(first.config),
                           updates=steps, initial_weights=identity(first.state_dict()))
        if args.resume and self.state.exists():
            self.restore()
        elif args.resume and self.path.exists():
            self.require_little_is_lost()
        elif args.overwrite and env.rank == 0:  # the old model stays until there is a new one
            self.state.unlink(missing_ok=True)
        elif not (args.resume or args.overwrite) and (self.path.exists() or self.state.exists()):
            raise UserError(f"{self.path.parent} already holds a run ({self.path.name}); go on "
                            "with --resume, start over with --overwrite, or choose another --out")
        self.file, self.rows = None, []  # the log; its rows as long as it is not open
        if env.rank == 0 and not args.overwrite:
            self.open_log()
        if env.world > 1:
            dist.barrier()  # all have seen what was there before the first one writes

    def load_own(self, path):
        """A checkpoint of this run. Raises UserError where it is of another one."""
        saved = load_checkpoint(path)
        expected = {field: self.config[field] for field in self.depends}
        require_same(path, saved["config"], **expected)
        return saved

    def restore(self):
        saved = self.load_own(self.state)
        try:
            for name, model in self.models.items():
                model.load_state_dict(saved["models"][name])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.step, self.best = saved["step"], saved["best"]
        except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            raise UserError(f"{self.state} lacks what it takes to go on ({type(error).__name__}); "
                            "start over with --overwrite")

    def require_little_is_lost(self):
        """A model without its state: start over only if it is that of the first evaluation.

        Then the run was killed between writing the two. Raises UserError otherwise.
        """
        saved = self.load_own(self.path)
        if saved["step"] > min(self.args.eval_every, self.steps):
            raise UserError(f"{self.state}: no such file, and without it {self.path.name} cannot "
                            "be trained on; start over with --overwrite")

    def open_log(self):
        """Rows after the last save are dropped: those updates happen again.

        With --overwrite the old log stays as long as the old model does.
        """
        path = self.args.out / f"{self.name}.jsonl"
        going_on = self.step and not self.args.overwrite
        rows = path.read_bytes().splitlines(True) if going_on and path.exists() else []
        kept = []
        for row in rows:
            found = re.match(rb'{"step": (\d{1,18}),.*}\n$', row)
            if found and int(found[1]) <= self.step:
                kept.append(row)
        write(path, lambda file: file.writelines(kept))
        self.file = open(path, "a", buffering=1)
        self.file.writelines(self.rows)

    def __iter__(self):
        """Yield the number of each update. What it does is a function of (seed, step) alone."""
        done = self.args.resume and self.path.exists()
        if self.steps == 0 and self.env.rank == 0 and not done:
            # no update is asked for: the model that it starts from is the result
            self.write(self.path, step=0, score=0.0)
        self.bar = tqdm(total=self.steps, initial=self.step, desc=self.name, mininterval=1,
                        disable=self.env.rank > 0)
        self.started, self.stopping = time.time(), False
        with Interrupt() as self.interrupt, self.bar:
            while True:
                if self.stopping or self.interrupt.pressed and self.env.world == 1:
                    self.read_figures()
                    self.save_state()
                    if self.env.world > 1:
                        dist.barrier()  # all leave together, when the first one has saved
                    instead = " in place of --overwrite" if self.args.overwrite else ""
                    raise UserError(f"stopped after {self.step} of {self.steps} updates of "
                                    f"{self.name} and saved; go on with the same command and "
                                    f"--resume{instead}")
                if self.step >= self.steps:
                    return
                yield self.step

    def log(self, **figures):
        """Log the figures of an update (tensors), and refuse to go on from one that is no number.

        They are read together, and one update late: so a GPU calculates an update while the host
        lays out the next batch. Before an evaluation nothing is left to be read.
        """
        self.step += 1
        values = torch.stack([figure.detach().float() for figure in figures.values()])
        if self.env.world > 1:
            pressed = values.new_tensor([self.interrupt.pressed])
            values = torch.cat([values, pressed])
            dist.all_reduce(values)
            values /= self.env.world
        self.unread.append((self.step, tuple(figures), values))
        self.read_figures(leave=0 if self.due else 1)

    def read_figures(self, leave=0):
        while len(self.unread) > leave:
            step, names, values = self.unread.pop(0)
            values = values.tolist()
            if self.env.world > 1:
                self.stopping = values.pop() > 0  # all stop after the same update
            self.figures = dict(zip(names, values))
            if not all(map(math.isfinite, values)):
                found = ", ".join(f"{name} = {value}" for name, value in self.figures.items())
                self.refuse_to_go_on(f"a figure ({found})", step)
            self.record(step=step, **self.figures)
            self.bar.update()
            shown = {name: f"{value:.3f}" for name, value in self.figures.items()}
            self.bar.set_postfix(shown, refresh=False)

    def refuse_to_go_on(self, what, step):
        raise UserError(f"{what} of {self.name} is no number after {step} updates; what was saved "
                        f"before stays as it is; try a smaller --lr than {self.args.lr}")

    def record(self, **row):
        if self.env.rank == 0:
            row = {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}
            write_row = self.file.write if self.file else self.rows.append
            write_row(json.dumps(row) + "\n")

    @property
    def due(self):
        """True every --eval-every steps and after the last one."""
        return self.step % self.args.eval_every == 0 or self.step == self.steps

    @property
    def evaluates(self):
        """Whether an evaluation is due, on the process that writes."""
        return self.due and self.env.rank == 0

    def save(self, score, **figures):
        """Log a validation score; save the models if none was better, and the state in any case."""
        seconds = round(time.time() - self.started, 1)
        self.record(step=self.step, score=score, seconds=seconds, **figures)
        if score >= self.best:
            self.best = score
            self.write(self.path, step=self.step, score=score)
        self.save_state()
        # last, since nobody may read the output any more
        shown = "  ".join(f"{k} {v:.3g}" for k, v in {**self.figures, **figures}.items())
        tqdm.write(f"{self.name} {self.step:5d}  validation {score:.3f}  {shown}")

    def save_state(self):
        if self.env.rank == 0:
            self.write(self.state, step=self.step, best=self.best,
                       optimizer=self.optimizer.state_dict())

    def write(self, path, **content):
        models = {name: model.state_dict() for name, model in self.models.items()}
        if not all(w.isfinite().all() for weights in models.values() for w in weights.values()):
            self.refuse_to_go_on("a weight", self.step)
        save_checkpoint(path, config=self.config, models=models, **content)
        if not self.file:
            self.open_log()
        if path == self.path:  # what was made of the model before is void
            for loop in self.NEXT.get(self.name, ()):
                for file in (f"{loop}.state.pt", f"{loop}.pt"):
                    (self.args.out / file).unlink(missing_ok=True)

    def best_model(self, name):
        """The GPT that this run kept. Raises UserError where its file is of another run by now."""
        if self.env.world > 1:
            dist.barrier()  # until rank 0 has written it
        return build(self.load_own(self.path), name, self.env.device)


def read_curve(path):
    """{step, score, loss} of a loop's log: lists, one entry an evaluation; None without any.

    score: the validation score; loss: the mean over the updates since the evaluation before.
    """
    curve, losses = {"step": [], "score": [], "loss": []}, []
    for line in path.read_text("utf-8", "replace").splitlines():
        row = json.loads(line)
        if "loss" in row:
            losses.append(float(row["loss"]))
        elif "score" in row:
            curve["step"].append(int(row["step"]))
            curve["score"].append(float(row["score"]))
            curve["loss"].append(sum(losses) / max(1, len(losses)))
            losses = []
    return curve if curve["step"] else None


def read_curves(out):
    """{loop: its curve} of the loops whose log is in the folder `out`."""
    curves = {}
    for name in ("sft", "sup", "latent", "explicit", "no_cot"):
        path = out / f"{name}.jsonl"
        try:
            curves[name] = read_curve(path) if path.is_file() else None
        except (ValueError, KeyError, TypeError, RecursionError):
            print(f"no learning curve of {name}: {path} is damaged")
            curves[name] = None
    return {name: curve for name, curve in curves.items() if curve}
