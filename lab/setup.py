"""The set-up of a script: flags, device, precision, tokenizer; and how it starts and ends."""
import contextlib
import ctypes
import platform
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch

from data import Tokenizer, tokens_in_use
from lab.ablations import parts_of
from lab.files import UserError, load, lock
from lab.flags import fill_in, flags_of, parser
from lab.gpt2 import GPT2
from lab.sources import load_problems


def setup(doc, phase, argv=None):
    """Parse the flags of a phase (sup, compress, latent, analyze) and fill them in: (args, env).

    env  device, tokenizer, autocast (a context manager for a forward pass), parts (encoder.Parts),
         parent (phase 1's checkpoint, None in phase 1), store (that of phase 2, in phase 3), init
         (the checkpoint of --init, or None), lock, and what goes into every file: settings and
         made_by
    Raises UserError for a value that makes no sense, or an earlier phase that is missing.
    """
    args = parser(doc, phase).parse_args(argv)
    data = Path(getattr(args, "data", None) or "toy").absolute().name.removesuffix(".jsonl")
    args.out = args.out or Path("out", data)
    name = getattr(args, "init", None) or "scratch"
    init = None if name in ("scratch", *GPT2) else load(Path(name))
    parent = None if phase == "sup" else load(args.out / "sup.pt")
    store = load(args.out / "latents.pt", sup=parent["id"]) if phase == "latent" else None
    device = choose_device(args)
    if phase == "sup":
        require_gpu(args, device)
    fill_in(args, phase, parent, store)
    choose_precision(args, device)
    keep_freed_memory()
    torch.manual_seed(args.seed)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()
                if k not in ("out", "resume", "overwrite")}
    own = {k: getattr(args, k) for k in flags_of(phase)}
    print(phase, *(f"{k}={v}" for k, v in own.items() if v not in (None, False)))
    bfloat16 = args.dtype == "bfloat16"
    env = SimpleNamespace(
        device=device, tokenizer=choose_tokenizer(args, parent or init), parts=parts_of(args),
        autocast=lambda: torch.autocast(device.type, torch.bfloat16, bfloat16),
        parent=parent, store=store, init=init, settings=settings, made_by=made_by(),
        lock=None if phase == "analyze" else lock(args.out))
    return args, env


def keep_freed_memory():
    """Let Linux's malloc reuse the memory of large tensors, as it does for those below 32 MB.

    It would give each of them back to the system when it is freed, and have new pages filled with
    zeros when the next one is made: 4 % of the time of phase 1 (docs/lab.md). Other systems' malloc
    has no such setting.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        malloc = ctypes.CDLL(None)
        malloc.mallopt(-3, 2 ** 30)  # M_MMAP_THRESHOLD
        malloc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD


def choose_device(args):
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}")
    return device


def require_gpu(args, device):
    """Raises UserError for --data gsm8k on a CPU, where no model of one's own size is given."""
    if args.data == "gsm8k" and device.type == "cpu" and not (
            args.n_layer or args.n_embd or args.init):
        raise UserError(
            "--data gsm8k trains 96 million parameters, minutes on a GPU and days on a CPU; take "
            "--data easy, or a size of your own, such as --n-layer 2 --n-head 2 --n-embd 64")


def choose_precision(args, device):
    """bfloat16 and torch.compile on a GPU that has them; neither on a CPU."""
    gpu = device.type == "cuda"
    if args.dtype is None:
        has_bfloat16 = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        args.dtype = "bfloat16" if has_bfloat16 else "float32"
    if "compile" in args and args.compile is None:
        args.compile = gpu and find_spec("triton") is not None
    torch.set_float32_matmul_precision("high")


def choose_tokenizer(args, earlier):
    """That of the checkpoint `earlier`; else the toy task's, or GPT-2's, cut to what is in use.

    GPT-2's own weights have all of it. Raises UserError where the checkpoint reads another task.
    """
    if earlier:
        tokenizer = Tokenizer(**earlier["vocabulary"])
        if (args.data == "toy") != (earlier["vocabulary"]["name"] == "toy"):
            raise UserError(f"{earlier['path']} reads other tokens than --data {args.data} has")
        return tokenizer
    if args.data == "toy":
        return Tokenizer("toy")
    if args.init in GPT2:
        return Tokenizer("gpt2")
    train = load_problems(args.data, "train", args.data_dir, args.cot, args.seed)
    return Tokenizer("gpt2", tokens_in_use(train))


def made_by():
    """{commit, torch, python}: '-dirty' where files differ from the git commit, or 'unknown'."""
    command = "git describe --always --dirty --abbrev=40 --exclude=*"
    try:
        done = subprocess.run(command.split(), cwd=Path(__file__).parent, check=True,
                              capture_output=True, text=True)
        commit = done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {"commit": commit, "torch": str(torch.__version__), "python": platform.python_version()}


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


def start(main):
    """Run a script's main; what the system refuses (a folder, a disk, memory) is one sentence."""
    sys.stdout.reconfigure(errors="replace")  # a terminal without α is no reason to stop
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("stopped; what was saved is untouched, and where a script has --resume "
                         "the same command with it, in place of --overwrite, goes on from there")
    except OSError as error:
        raise UserError(f"{error.filename or 'the system'}: {error.strerror or error}")
    except (MemoryError, RuntimeError) as error:
        too_little = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not too_little and "allocate memory" not in str(error):  # as torch says it on a CPU
            raise
        raise UserError("there is not enough memory; choose a smaller --batch-size or model")
