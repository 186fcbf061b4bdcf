"""What the phases share: flags and presets, device, checkpoints, the bookkeeping of a training loop.

Nothing about latents is decided here. A phase is

    args, env = setup(parser, "sup")
    run = Run("sup", args, env, Module(...), models, problems, steps)
    for batch in run:
        run.update(*run.forward(...))            # losses; forward and backward, clip, step, log
        if run.evaluates:
            run.keep(accuracy)                   # log, save: the best so far, and the state to resume from
"""
import argparse
import contextlib
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

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import Tokenizer, UserError
from model import GPT, GPT2, GPTConfig

PRESETS = {  # the defaults that depend on --data; "gsm8k" is that of everything but the toy task
    "toy": dict(n_layer=3, n_head=8, n_embd=128, block_size=96, batch_size=32, chunk_size=2, sft_steps=500, eval_every=250,
                noise=0.25, lr={"sup": 4e-3, "latent": 2e-3}, steps={"sup": 350, "latent": 1500}),
    "gsm8k": dict(n_layer=4, n_head=4, n_embd=256, block_size=384, batch_size=16, chunk_size=2, sft_steps=2000, eval_every=500,
                  noise=1.0, lr={"sup": 1e-3, "latent": 1e-3}, steps={"sup": 1000, "latent": 2000}),
}
SHAPE = ("n_layer", "n_head", "n_embd", "block_size")
INHERITED = ("data", "data_dir", "cot", "seed", "chunk_size", *SHAPE)  # what a later phase takes over from phase 1


# ------------------------------------------------------------------------------------------------- set-up

def parser(doc, phase):
    """The flags every script takes, and those of this phase ('sup', 'compress', 'latent', 'analyze')."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--data", help="toy, gsm8k, gsm8k-aug, or a path: a .jsonl file of question and answer in GSM8K's form, or a "
        "folder with train.jsonl and test.jsonl (default: toy; a later phase: what --out was trained on)")
    add("--data-dir", help="folder with the files of gsm8k or gsm8k-aug (default: data/<name>; gsm8k is downloaded)")
    add("--out", type=Path, help="folder to write to, and to find the earlier phases in (default: out/<data>)")
    add("--seed", type=int, help="of weights, toy problems, order of the data and noise (default: 0)")
    add("--device", help="cpu, cuda, cuda:1, mps, … (default: cuda where there is one)")
    add("--dtype", choices=["float32", "bfloat16"], help="of the matmuls (default: bfloat16 on cuda, else float32; on cuda that is TF32)")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the training step (default: on cuda)")
    add("--chunk-size", type=int, help="c, tokens of the chain in one latent token")
    add("--top-k", type=int, help="entries of α kept, 0 = all: in z (phase 1; default 0), in the store (phase 2; default "
        "phase 1's or 50), of q in latent decoding (analysis; default the store's)")
    add("--batch-size", type=int, help="problems in a batch")
    for flag in SHAPE:
        add("--" + flag.replace("_", "-"), type=int, help="of the model" if phase == "sup" else argparse.SUPPRESS)
    if phase != "analyze":
        again = p.add_mutually_exclusive_group()
        again.add_argument("--resume", action="store_true", help="go on where an interrupted run stopped")
        again.add_argument("--overwrite", action="store_true", help="start over, replacing what --out holds of this phase")
    if phase in ("sup", "latent"):
        add("--lr", type=float, help="peak learning rate")
        add("--steps", type=int, help="updates of this phase")
        add("--eval-every", type=int, help="updates between two evaluations, which also save")
    if phase == "sup":
        add("--cot", choices=["steps", "text"], help="chain of thought: calculator steps (default) or the whole solution")
        add("--init", default="scratch", help="scratch (default), " + ", ".join(GPT2) + ", or a checkpoint such as sft.pt")
        add("--sft-steps", type=int, help="updates of the explicit warm-up")
    return p


def setup(p, phase, argv=None):
    """Parse the flags, fill in what was not given, choose the device: (args, env).

    A flag that was not given is inherited from phase 1, else it comes from the preset of --data. env has device,
    autocast, tokenizer, rank, world, config (goes into every file written) and parent (phase 1's checkpoint, or
    None). Raises UserError on a value that makes no sense or contradicts phase 1.
    """
    args = p.parse_args(argv)
    args.out = args.out or Path("out") / (Path(args.data).stem if args.data else "toy")
    parent = None if phase == "sup" else load_checkpoint(args.out / "sup.pt")
    inherited = {field: parent["config"][field] for field in INHERITED} if parent else {}
    for field in set(inherited) - {"data_dir"}:
        given = getattr(args, field, None)
        if given not in (None, inherited[field]):
            raise UserError(f"--{field.replace('_', '-')} {given} contradicts {args.out / 'sup.pt'}, which has {inherited[field]}")
    data = args.data or inherited.get("data") or "toy"
    preset = PRESETS["toy" if data == "toy" else "gsm8k"]
    if getattr(args, "init", "scratch") != "scratch" and any(getattr(args, field) for field in SHAPE):
        raise UserError(f"--init {args.init} has a shape of its own; leave out --n-layer, --n-head, --n-embd and --block-size")
    preset = {field: value.get(phase) if isinstance(value, dict) else value for field, value in preset.items()}
    defaults = {"data": data, "data_dir": None, "cot": "steps", "seed": 0, **preset, **inherited,
                "top_k": 0 if phase == "sup" else None}
    for field, value in defaults.items():
        if hasattr(args, field) and getattr(args, field) is None or field in INHERITED and not hasattr(args, field):
            setattr(args, field, value)
    for field, value in vars(args).items():
        least = 0 if type(value) is float or field in ("steps", "sft_steps", "top_k", "seed") else 1
        if type(value) in (int, float) and not least <= value < 2 ** 63:
            raise UserError(f"--{field.replace('_', '-')} {value}: must be a number from {least} up")

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # as torchrun sets them
    if world > 1 and phase not in ("sup", "latent"):
        raise UserError(f"{phase} runs in one process; start it without torchrun")
    if args.batch_size % world:
        raise UserError(f"--batch-size {args.batch_size} cannot be shared out to {world} processes; choose a multiple")
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and world > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}")
    gpu = device.type == "cuda"
    if world > 1 and not dist.is_initialized():
        if gpu:
            torch.cuda.set_device(device)  # where NCCL works
        dist.init_process_group("nccl" if gpu else "gloo")
    # bfloat16 and torch.compile on a GPU that has them; on a CPU neither is faster (README)
    args.dtype = args.dtype or ("bfloat16" if gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "float32")
    args.compile = gpu and find_spec("triton") is not None if args.compile is None else args.compile
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)
    tokenizer = Tokenizer("toy" if args.data == "toy" else "gpt2")
    if rank == 0:
        print(phase, *(f"{k}={v}" for k, v in vars(args).items() if v is not None and v is not False))
    config = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    config.update(phase=phase, tokenizer=tokenizer.name, commit=commit(), torch=str(torch.__version__),
                  python=platform.python_version())
    env = SimpleNamespace(device=device, tokenizer=tokenizer, rank=rank, world=world, config=config, parent=parent,
                          autocast=lambda: torch.autocast(device.type, torch.bfloat16, args.dtype == "bfloat16"))
    return args, env


def start(main):
    """Run a script's main; what the system refuses (a folder, a disk) is said in one sentence."""
    sys.stdout.reconfigure(errors="replace")  # a terminal without α is no reason to stop
    try:
        main()
        if dist.is_initialized():
            dist.barrier()  # nobody leaves while another one still speaks
    except KeyboardInterrupt:
        raise SystemExit("stopped; what was saved before is untouched")
    except OSError as error:
        raise UserError(f"{error.filename or 'the system'}: {error.strerror or error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def commit():
    """The git commit of this code, '-dirty' where files differ from it, or 'unknown'."""
    try:
        return subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], cwd=Path(__file__).parent,
                              capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# --------------------------------------------------------------------------------------------- checkpoints

def write(path, content):
    """Write beside, sync, rename: `path` is the old file or the new one, never half of it.

    content: a function that takes the open file. Raises UserError where the disk is full or the folder read-only.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save wraps what the disk says in a RuntimeError
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        why = getattr(error, "strerror", None) or "is the disk full?"
        raise UserError(f"could not write {path} ({why}); what was there before is untouched")


def save_checkpoint(path, **content):
    write(path, lambda file: torch.save(content, file))


def load_checkpoint(path):
    """The dict saved there, on the CPU; never runs code from the file. Raises UserError."""
    script = {"sup": "train_sup.py", "sft": "train_sup.py", "latent": "train_latent.py"}.get(path.stem)
    if not path.is_file():
        raise UserError(f"{path}: no such file" + (f"; run {script} first, with the same --out" if script else ""))
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return {"config": saved["config"], **saved}
    except Exception as error:  # a truncated or foreign file fails in many ways
        raise UserError(f"{path}: not a checkpoint of this project ({type(error).__name__})")


def require_same(path, saved, **mine):
    """Refuse what an earlier phase made of something else: UserError naming the field and both values."""
    for field, value in mine.items():
        if saved.get(field) != value:
            raise UserError(f"{path} was made with {field} = {saved.get(field)}, here it is {value}")


def build(checkpoint, name, device):
    """The GPT called `name` in a checkpoint, in evaluation."""
    model = GPT(GPTConfig(**{"gelu": "tanh", **checkpoint["config"]["model"]})).to(device)  # all had tanh before it was said
    model.load_state_dict(checkpoint["models"][name])
    return model.eval()


# ------------------------------------------------------------------------------------------- training loop

class Interrupt:
    """While open, a first Ctrl-C only sets `pressed`, so that the loop can save; a second one ends the program."""

    def __enter__(self):
        self.pressed, self.before = False, signal.signal(signal.SIGINT, self.press)
        return self

    def press(self, *_):
        self.pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.before)


class Run:
    """The bookkeeping around a loop: batches, optimizer, schedule, log, bar, checkpoints, resume.

    module   its forward returns (loss to minimise, {name: figure}); compiled and made parallel here
    models   {name: GPT} to save
    Writes   <name>.pt the best models so far; <name>.state.pt all it takes to resume; <name>.jsonl the log
    """

    def __init__(self, name, args, env, module, models, problems, steps):
        self.name, self.args, self.env, self.models, self.problems, self.steps = name, args, env, models, problems, steps
        self.path, self.state = args.out / f"{name}.pt", args.out / f"{name}.state.pt"
        self.step, self.best, self.last = 0, -1.0, {}
        self.config = dict(env.config, fingerprint=problems.fingerprint, model=asdict(next(iter(models.values())).config))
        module.train()
        decay = [p for p in module.parameters() if p.dim() >= 2]
        rest = [p for p in module.parameters() if p.dim() < 2]
        self.parameters = decay + rest
        self.optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
                                           lr=args.lr, betas=(0.9, 0.95), fused=env.device.type in ("cpu", "cuda"))
        if args.resume and self.state.exists():
            self.restore()
        elif args.overwrite:
            for old in (self.state, self.path) if env.rank == 0 else ():
                old.unlink(missing_ok=True)
        elif not args.resume and (self.path.exists() or self.state.exists()):
            raise UserError(f"{self.path.parent} already holds a run ({self.path.name}); go on with --resume, start over "
                            "with --overwrite, or choose another --out")
        self.net = torch.compile(module, dynamic=False) if args.compile else module  # a graph for each of the few widths
        if env.world > 1:
            self.net = DistributedDataParallel(self.net)
        if env.rank == 0:
            log = args.out / f"{name}.jsonl"
            rows = log.read_bytes().splitlines(True) if self.step and log.exists() else []
            kept = [row for row in rows if (m := re.match(rb'{"step": (\d+),.*}\n$', row)) and int(m[1]) <= self.step]
            write(log, lambda file: file.writelines(kept))  # what was logged after the last save happens again
            self.log = open(log, "a", buffering=1)

    def restore(self):
        saved = load_checkpoint(self.state)
        require_same(self.state, saved["config"], **{field: self.config[field] for field in (
            "data", "fingerprint", "tokenizer", "cot", "seed", "chunk_size", "top_k", "batch_size", "lr", "model", "bag",
            "bag_until", "rest", "local", "noise", "encoder", "store_top_k") if field in self.config})
        for name, model in self.models.items():
            model.load_state_dict(saved["models"][name])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.best = saved["step"], saved["best"]

    def __iter__(self):
        """Yield the batches; what makes batch t depends on (seed, t) alone, so resuming is counting on."""
        if self.step == self.steps == 0 and self.env.rank == 0:  # no update asked for: what it starts from is the model
            save_checkpoint(self.path, config=self.config, step=0, score=0.0, models=self.weights())
        bar = tqdm(total=self.steps, initial=self.step, desc=self.name, disable=self.env.rank > 0, mininterval=1)
        self.start, self.stopping = time.time(), False
        with Interrupt() as self.stop, bar:
            while True:
                if self.stopping or self.stop.pressed and self.env.world == 1:
                    self.save_state()
                    raise UserError(f"stopped after {self.step} of {self.steps} updates of {self.name} and saved; go on "
                                    "with the same command and --resume")
                if self.step >= self.steps:
                    return
                yield self.problems.train_batch(self.step, self.args.batch_size, self.args.seed, self.env.rank, self.env.world)
                bar.update()
                bar.set_postfix({k: f"{v:.3f}" for k, v in self.last.items()}, refresh=False)

    def forward(self, *layouts):
        device = self.env.device
        layouts = [x.to(device) if hasattr(x, "to") else x for x in layouts]
        with self.env.autocast():
            return self.net(*layouts)

    def update(self, loss, figures):
        """One AdamW update: a cosine to zero, under a ramp over the first 5 % of the steps."""
        loss.backward()  # before anything is read, which waits for the device
        figures = {"loss": loss.detach(), **{k: v.detach() for k, v in figures.items()}}
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        values = torch.stack([v.float() for v in figures.values()] + [norm])
        if self.env.world > 1:
            values = torch.cat([values, values.new_tensor([self.stop.pressed])])
            dist.all_reduce(values)
            values /= self.env.world
            self.stopping = bool(values[-1] > 0)  # all stop after the same update
        *values, norm = values[:len(figures) + 1].tolist()  # read once: on a GPU that is where the step is waited for
        self.last = dict(zip(figures, values))
        if not math.isfinite(self.last["loss"] + norm):
            raise UserError(f"the loss of {self.name} is {self.last['loss']} at step {self.step}, its gradient's norm {norm}: "
                            f"nothing was saved since the last checkpoint; try a smaller --lr than {self.args.lr}")
        warm = max(1, self.steps // 20)
        scale = min((self.step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * self.step / self.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.lr * scale
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.record(step=self.step, **self.last)

    def record(self, **row):
        if self.env.rank == 0:
            self.log.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}) + "\n")

    @property
    def evaluates(self):
        """True every --eval-every steps and after the last one, on the process that writes."""
        return self.env.rank == 0 and (self.step % self.args.eval_every == 0 or self.step == self.steps)

    def keep(self, score, **figures):
        """Log a validation score; save the models if none was better, and the state in any case."""
        self.record(step=self.step, score=score, seconds=round(time.time() - self.start, 1), **figures)
        tqdm.write(f"{self.name} {self.step:5d}  validation {score:.3f}  " +
                   "  ".join(f"{k} {v:.3g}" for k, v in {**self.last, **figures}.items()))
        if score >= self.best:
            self.best = score
            save_checkpoint(self.path, config=self.config, step=self.step, score=score, models=self.weights())
        self.save_state()

    def best_model(self, name):
        """The model this run kept."""
        if self.env.world > 1:
            dist.barrier()  # until rank 0 has written it
        return build(load_checkpoint(self.path), name, self.env.device)

    def weights(self):
        return {name: model.state_dict() for name, model in self.models.items()}

    def save_state(self):
        if self.env.rank == 0:
            save_checkpoint(self.state, config=self.config, step=self.step, best=self.best, models=self.weights(),
                            optimizer=self.optimizer.state_dict())
