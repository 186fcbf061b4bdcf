"""A training loop's files and its place in them: resuming, log, progress bar, checkpoints.

    run = Run("sft", args, env, {"llm": llm}, optimizer, steps, {"data": train.fingerprint})
    for step in run:
        …                            # batch, forward, loss, backward, optimizer.step(rate)
        run.log(loss=loss, norm=norm)
        if run.due:
            run.save(score)

Writes <name>.pt, the best models so far, <name>.state.pt, all it takes to go on, and the log
<name>.jsonl. An update is a function of (seed, step) and of the weights alone. So a run that was
killed goes on from its last state, and repeats what came after it.
"""
import json
import math
import os
import time

import torch
from tqdm import tqdm

from lab.files import UserError, build, load, remove, save, weights_id
from lab.flags import LEARN, settings_of

LOOPS = LEARN.split()
MADE_OF = {  # what goes when a new model takes the place of the old one: made of it, or after it
    "sft": ("sup", "explicit", "no_cot", "latents", "latent"),
    "sup": ("latents", "latent"),
    "explicit": ("no_cot",),
}


class Run:
    """One loop of `steps` updates, iterated over.

    models   {name: GPT} to save
    made_of  what they are made of, and a resumed run must be, too: {field: id}
    Raises UserError where the folder holds a run already, or --resume finds another one.
    """

    def __init__(self, name, args, env, models, optimizer, steps, made_of):
        self.name, self.args, self.env, self.steps = name, args, env, steps
        self.models, self.optimizer = models, optimizer
        self.path, self.state, self.log_path = (
            args.out / f"{name}{suffix}" for suffix in (".pt", ".state.pt", ".jsonl"))
        self.made_of = {"tokenizer": env.tokenizer.name, "start": weights_id(models), **made_of}
        self.step, self.best, self.figures, self.unread = 0, -1.0, {}, []
        if args.resume and self.state.exists():
            length = self.restore()
        else:
            self.require_no_other()
            length = 0
            self.save_state(length)
        if steps == 0 and self.best < 0:  # the models that it starts from are the result
            self.best = 0.0
            self.save_models(score=0.0)
            self.save_state(length)
        self.file = open(self.log_path, "a", buffering=1)
        # what was logged after the state was saved happens again
        self.file.truncate(min(length, os.path.getsize(self.log_path)))

    def require_no_other(self):
        """Raises UserError where there is a model that the flags do not allow to replace."""
        if not self.path.exists() or self.args.overwrite:
            return
        if self.args.resume:
            raise UserError(f"{self.state}: no such file, and without it {self.path.name} cannot "
                            "be trained on; start over with --overwrite")
        raise UserError(f"{self.args.out} already holds a run ({self.path.name}); go on with "
                        "--resume, start over with --overwrite, or choose another --out")

    def load_own(self, path):
        """A checkpoint of this run. Raises UserError where it is of another one."""
        settings = settings_of(self.name, self.args) | {"updates": self.steps}
        return load(path, settings, **self.made_of)

    def restore(self):
        """Go back to the state last saved; returns how long the log was then."""
        saved = self.load_own(self.state)
        for name, model in self.models.items():
            model.load_state_dict(saved["models"][name])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.best = saved["step"], saved["best"]
        return saved["log_length"]

    def __iter__(self):
        """Yield the number of each update."""
        self.started = time.time()
        with tqdm(total=self.steps, initial=self.step, desc=self.name, mininterval=1) as self.bar:
            while self.step < self.steps:
                yield self.step

    @property
    def due(self):
        """True every --eval-every updates and after the last one: then `save` is to be called."""
        return self.step % self.args.eval_every == 0 or self.step == self.steps

    def log(self, **figures):
        """Log the figures of an update (tensors). Raises UserError where one is no number.

        They are read together, and one update late: so a GPU calculates an update while the host
        lays out the next batch. Before an evaluation nothing is left to be read.
        """
        self.step += 1
        values = torch.stack([figure.detach().float() for figure in figures.values()])
        self.unread.append((self.step, tuple(figures), values))
        while len(self.unread) > (0 if self.due else 1):
            step, names, values = self.unread.pop(0)
            self.figures = dict(zip(names, values.tolist()))
            if not all(map(math.isfinite, self.figures.values())):
                found = ", ".join(f"{name} = {value}" for name, value in self.figures.items())
                raise UserError(f"{self.name} went astray after {step} updates ({found}); what was "
                                "saved before stays as it is; start over with --overwrite and a "
                                f"smaller --lr than {self.args.lr}")
            self.record(step=step, **self.figures)
            self.bar.update()
            shown = {name: f"{value:.3f}" for name, value in self.figures.items()}
            self.bar.set_postfix(shown, refresh=False)

    def record(self, **row):
        row = {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}
        self.file.write(json.dumps(row) + "\n")

    def save(self, score, **figures):
        """Log a validation score; save the models if none was better, and the state in any case."""
        seconds = round(time.time() - self.started, 1)
        self.record(step=self.step, score=score, seconds=seconds, **figures)
        if score >= self.best:
            self.best = score
            self.save_models(score)
        self.save_state(os.path.getsize(self.log_path))
        shown = "  ".join(f"{k} {v:.3g}" for k, v in {**self.figures, **figures}.items())
        tqdm.write(f"{self.name} {self.step:5d}  validation {score:.3f}  {shown}")

    def save_models(self, score):
        self.write(self.path, score=score)
        remove(self.args.out, *MADE_OF.get(self.name, ()))

    def save_state(self, log_length):
        self.write(self.state, best=self.best, log_length=log_length,
                   optimizer=self.optimizer.state_dict())

    def write(self, path, **content):
        settings = self.env.settings | {"updates": self.steps}
        save(path, settings, self.made_of, self.env.made_by, self.models, step=self.step,
             vocabulary=self.env.tokenizer.vocabulary, **content)

    def best_model(self, name):
        """(the GPT that this run kept, the id of its file)."""
        saved = self.load_own(self.path)
        return build(saved, name, self.env.device), saved["id"]


# ------------------------------------------------------------------------------- what a log says

def read_curve(path):
    """{step, score, loss} of a loop's log: lists, one entry an evaluation; None without any.

    score: the validation score; loss: the mean over the updates since the evaluation before.
    """
    curve, losses = {"step": [], "score": [], "loss": []}, []
    for line in path.read_text("utf-8").splitlines():
        row = json.loads(line)
        if "score" in row:
            curve["step"].append(row["step"])
            curve["score"].append(row["score"])
            curve["loss"].append(sum(losses) / max(1, len(losses)))
            losses = []
        else:
            losses.append(row["loss"])
    return curve if curve["step"] else None


def read_curves(out):
    """{loop: its curve} of the loops whose log is in the folder `out`."""
    found = {name: out / f"{name}.jsonl" for name in LOOPS}
    curves = {name: read_curve(path) for name, path in found.items() if path.is_file()}
    return {name: curve for name, curve in curves.items() if curve}
