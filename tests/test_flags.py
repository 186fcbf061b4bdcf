"""The table of flags: what follows from it, and that no run goes on with other settings."""
import functools
from types import SimpleNamespace

import pytest
import torch

from lab.files import UserError
from lab.flags import FLAGS, fill_in, flags_of, parser
from lab.run import LOOPS, Run

PHASES = ("sup", "compress", "latent", "analyze")
TABLE = [flag for group in FLAGS.values() for flag in group]


def field(flag):
    return flag.name.replace("-", "_")


def filled(phase, *flags, first=(), paths="own"):
    """The flags of a phase as `setup` fills them in. first, paths: what those before it had."""
    args = parser("", phase).parse_args([str(flag) for flag in flags])
    if phase == "sup":
        fill_in(args, phase)
    else:
        fill_in(args, phase, {"settings": vars(filled("sup", *first))},
                {"settings": {"paths": paths}})
    return args


# ----------------------------------------------------------------------------------------- defaults

@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("data, preset", [
    ([], "toy"),
    (["--data", "gsm8k", "--data-dir", "there"], "gsm8k"),
    (["--data", "easy"], "easy"),
    (["--data", "mine.jsonl", "--renumber", 2], "other"),
    (["--data", "gsm8k-aug"], "other"),
])
def test_what_is_not_given_follows_from_the_data(phase, data, preset):
    """In later phases from the data of phase 1, whose flags they do not have."""
    first = [*data, "--n-layer", 7, "--seed", 5, "--chunk-size", 4]
    args = filled("sup", *first) if phase == "sup" else filled(phase, first=first)
    for flag in flags_of(phase).values():
        default = flag.default[preset] if isinstance(flag.default, dict) else flag.default
        if (phase, flag.name) == ("latent", "steps"):
            default *= 4  # so many for each token of a chunk
        if flag.name == "split":
            default = "renumbered" if args.renumber else "test"
        if f"--{flag.name}" not in first:
            assert getattr(args, field(flag)) == default or flag.name == "data-dir", flag.name
    assert (args.n_layer, args.seed, args.chunk_size) == (7, 5, 4)
    assert args.data == (data[1] if data else "toy")
    assert str(args.data_dir) == ("there" if "there" in data else "None")


@pytest.mark.parametrize("flags, paths, steps, noise", [
    ([], "own", 1000, 0.1), ([], "all", 1500, 0.1), ([], "parallel", 1500, 0.1),
    (["--on-policy", 0.5], "own", 1500, 1), (["--steps", 7], "all", 7, 0.1),
    (["--on-policy", 0.5, "--noise", 0], "own", 1500, 0)])
def test_a_chain_of_several_paths_takes_longer(flags, paths, steps, noise):
    args = filled("latent", *flags, first=["--chunk-size", 4], paths=paths)
    assert (args.steps, args.paths, args.noise) == (steps, paths, noise)


def test_what_is_given_is_taken():
    args = filled("latent", "--steps", 9, "--noise", 2, "--data-dir", "here",
                  first=["--data", "gsm8k", "--data-dir", "there", "--chunk-size", 4])
    assert (args.steps, args.noise, str(args.data_dir)) == (9, 2.0, "here")


@pytest.mark.parametrize("flags, bag_steps", [
    ([], 60),
    (["--steps", 30], 4),  # 60 of 400, as by default
    (["--steps", 5], 0),
    (["--steps", 30, "--bag-steps", 10], 10),
    (["--data", "other", "--steps", 30], 6),
])
def test_the_encoder_keeps_its_share_of_the_updates(flags, bag_steps):
    assert filled("sup", *flags).bag_steps == bag_steps


# ------------------------------------------------------------------------------------------- ranges

@pytest.mark.parametrize("phase, flag", [
    (phase, flag) for phase in PHASES for flag in flags_of(phase).values()
], ids=lambda x: getattr(x, "name", x))
def test_what_is_out_of_range_is_refused(phase, flag, capsys):
    def says(value):
        """'' where it is taken, else the sentence, or what argparse prints."""
        try:
            filled(phase, f"--{flag.name}={value}")
        except SystemExit as stop:
            return capsys.readouterr().err if stop.code == 2 else str(stop.code)
        return ""

    if isinstance(flag.kind, tuple):
        assert not any(says(choice) for choice in flag.kind)
        assert "invalid choice" in says("something")
    elif isinstance(flag.kind, (int, float)):
        out_of_range = f"--{flag.name} {{}}: must be a number from {flag.kind} up"
        assert "must be a number" not in says(flag.kind)
        assert out_of_range.format(flag.kind - 1) in says(flag.kind - 1)
        for word in ("inf", "nan") if isinstance(flag.kind, float) else ():
            assert out_of_range.format(word) in says(word)
        assert f"invalid {type(flag.kind).__name__} value" in says("two")
    elif flag.kind is bool:
        assert "ignored explicit argument" in says("yes")


@pytest.mark.parametrize("flags, says", [
    (["--renumber", 3], "--renumber is for GSM8K"),
    (["--as-told", 1.5], "--as-told 1.5: must be a share, 0 to 1"),
    (["--seed", 2 ** 70], "--seed 1180591620717411303424: must be a number"),
    (["--init", "mine.pt", "--n-layer", 2], "--init mine.pt has a shape of its own"),
    (["--init", "gpt2"], "add --data gsm8k"),
    (["--n-embd", 16, "--n-head", 3], "--n-embd 16 must be a multiple of --n-head 3"),
    (["--resume", "--overwrite"], "--resume goes on and --overwrite starts over"),
    (["--steps", 3, "--bag-steps", 3], "--steps 3: the first --bag-steps 3 of them"),
])
def test_flags_that_contradict_each_other(flags, says):
    with pytest.raises(UserError) as stop:
        filled("sup", *flags)
    assert says in str(stop.value)


@pytest.mark.parametrize("phase", PHASES[1:])
def test_a_later_script_has_no_flag_that_phase_1_decides(phase, capsys):
    """Nor does it take the beginning of a flag for the flag."""
    for name in {*flags_of("sup")} - {*flags_of(phase)} | {"resum", "batch"}:
        with pytest.raises(SystemExit) as stop:
            parser("", phase).parse_args([f"--{name.replace('_', '-')}=1"])
        assert stop.value.code == 2 and "unrecognized arguments" in capsys.readouterr().err


# ------------------------------------------------------------------------------------ going on with

DECIDES = {loop: [field(flag) for flag in TABLE if loop in flag.loops.split()] for loop in LOOPS}


@functools.cache
def settings_of(path):
    return torch.load(path, weights_only=True)["settings"]


def go_on(out, loop, **changes):
    """Resume a loop of a finished run with its own settings, but for these."""
    settings = settings_of(out / f"{loop}.state.pt") | changes
    args = SimpleNamespace(**settings, out=out, resume=True, overwrite=False)
    env = SimpleNamespace(tokenizer=SimpleNamespace(name="toy"))
    Run(loop, args, env, models={}, optimizer=None, steps=settings["updates"], made_of={})


@pytest.mark.parametrize("loop, name", [
    (loop, name) for loop in LOOPS for name in [*DECIDES[loop], "updates"]])
def test_a_loop_does_not_go_on_with_another_setting(finished, loop, name):
    """For every flag that the table says it depends on."""
    old = settings_of(finished / f"{loop}.state.pt")[name]
    new = "another" if isinstance(old, str) else old + 1
    with pytest.raises(UserError, match=rf"{loop}\.state\.pt was made with {name} = {old}, here it "
                                        f"is {new}; choose another --out, or make it again"):
        go_on(finished, loop, **{name: new})


@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_goes_on_whatever_it_does_not_depend_on(finished, loop):
    others = settings_of(finished / f"{loop}.state.pt").keys() - {*DECIDES[loop], "updates"}
    with pytest.raises(UserError, match="started from other weights"):  # here they are none at all
        go_on(finished, loop, **dict.fromkeys(others, "another"))


def test_no_flag_of_training_is_forgotten():
    """A new one is in the table as what some loop depends on, or here."""
    assert {flag.name for flag in TABLE if {"sup", "latent"} & {*flag.scripts.split()}
            and not flag.loops} == {
        "data-dir", "sft-steps", "steps", "eval-every", "compile", "baselines", "baseline-steps",
        "out", "device", "resume", "overwrite"}
