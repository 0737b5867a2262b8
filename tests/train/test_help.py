"""What `python -m train --help` lists, and what an unknown option is answered with."""

import argparse

import pytest

from prepare.arguments import Parser
from train.config import DEVICE_DEFAULTS, TrainConfig, parse_given

GROUPS = {
    "run": ("--time-budget", "--steps", "--seed", "--repeat", "--resume"),
    "data": ("--data", "--packing"),
    "model": ("--depth", "--d-model", "--seq-len"),
    "optimizer": ("--total-batch-size", "--matrix-lr", "--weight-decay", "--warmdown-ratio"),
    "evaluation": ("--eval-tokens",),
    "record": ("--description", "--run-dir", "--track", "--group"),
    "machine": ("--device", "--ops", "--device-batch-size", "--fused-norms"),
}


def test_help_is_grouped_by_what_a_person_wants(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_given(["--help"])
    assert ended.value.code == 0
    groups = {}
    for line in capsys.readouterr().out.splitlines():
        if line.endswith(":") and not line.startswith(" "):
            words = groups.setdefault(line[:-1], [])
        elif line.startswith("  --"):
            words.append(line.split()[0].rstrip(","))
    assert [name for name in groups if name != "options"] == list(GROUPS)
    for name, flags in GROUPS.items():
        assert set(flags) <= set(groups[name])
    listed = sorted(flag for flags in groups.values() for flag in flags)
    assert listed == sorted("--" + name.replace("_", "-") for name in TrainConfig.__dataclass_fields__)
    assert DEVICE_DEFAULTS["cuda"].keys() <= TrainConfig.__dataclass_fields__.keys()


@pytest.mark.parametrize(("typed", "meant"), [
    ("--lr", "--matrix-lr or --embedding-lr"),
    ("--wandb", "--track wandb"),
    ("--tensorboard", "--track tensorboard"),
    ("--unembedding-lr", "--lm-head-lr"),
    ("--batch-size=32", "--total-batch-size or --device-batch-size"),
    ("--max-steps", "--steps"),
    ("--budget", "--time-budget"),
    ("--time", "--time-budget"),
    ("--dpeth", "--depth"),
])  # fmt: skip
def test_a_near_miss_suggests_what_people_mean(typed, meant, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_given([typed, "3"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: unknown argument {typed.split('=')[0]}: did you mean {meant}?\n"


@pytest.mark.parametrize("typed", ["--dropout", "--fp8", "--foo", "-n", "word", ""])
def test_what_resembles_nothing_suggests_nothing(typed, capsys):
    with pytest.raises(SystemExit):
        parse_given([typed, "3"])
    assert capsys.readouterr().err == f"error: unknown argument {typed}: --help lists all\n"


def test_what_is_suggested_is_there(monkeypatch):
    """Of every name that a parser is told: it is none of its own options, and what it stands for is one."""
    parsers = []
    monkeypatch.setattr(Parser, "parse_args", lambda self, _: parsers.append(self) or argparse.Namespace())
    parse_given([])
    known = {option for action in parsers[0]._actions for option in action.option_strings}
    assert not known & parsers[0].meant.keys()
    assert {option.split()[0] for options in parsers[0].meant.values() for option in options} <= known
