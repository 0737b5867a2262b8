"""What a recipe decides, what a flag and the device do, and how configurations from before there were recipes are read.

The values are written out here once more: a recipe that changes by accident would make every later number another's.
"""

import dataclasses
from types import SimpleNamespace

import pytest

import train.__main__
import train.trainer
from model import GPTConfig
from prepare import Dataset, InputError
from train.config import TrainConfig, changed_from_recipe, parse_given, resolve, to_args
from train.recipes import BEFORE_RECIPES, DEVICE_DEFAULTS, RECIPES, recipe_defaults, vocab_size
from train.results.progress import announce
from train.trainer import embedded_folder

PUBLISHED = {
    "depth": 8, "d_model": 512, "head_dim": 128, "num_kv_heads": 0, "seq_len": 2048, "window_pattern": "SSSL",
    "short_window": 2, "rope_base": 10_000.0, "init_scale": 1.0, "lambda_r_init": 1.0, "lambda_0_init": 0.1,
    "total_batch_size": 524_288, "lm_head_lr": 0.004, "embedding_lr": 0.6, "scalar_lr": 0.5, "matrix_lr": 0.04,
    "weight_decay": 0.2, "lm_head_decay": 0.0, "wte_decay": 0.0, "value_embedding_decay": 0.0, "momentum_ramp": 300,
    "warmup_ratio": 0.0, "warmdown_ratio": 0.5, "final_lr_frac": 0.0,
}  # fmt: skip
TUNED = PUBLISHED | {
    "depth": 9, "d_model": 640, "window_pattern": "SSSSL", "short_window": 8, "rope_base": 200_000.0,
    "init_scale": 0.68, "lambda_0_init": 0.05, "total_batch_size": 262_144, "lm_head_lr": 0.005, "embedding_lr": 0.9,
    "lm_head_decay": 0.01, "wte_decay": 0.001, "value_embedding_decay": 0.003, "momentum_ramp": 200,
    "warmdown_ratio": 0.75, "final_lr_frac": 0.05,
}  # fmt: skip
OF_THE_MACHINE = {
    "cuda": {"time_budget": 300.0, "eval_tokens": 20_971_520},
    "cpu": {"time_budget": 60.0, "eval_tokens": 150_000},
}
# A complete configuration as it was saved before there were recipes: a CPU's, with what no default was.
OLD = {
    "time_budget": 60.0, "steps": None, "untimed_steps": 10, "seed": 42, "repeat": 1, "confirm": False, "max_seeds": 3,
    "resume": None, "checkpoint_every": 60.0, "hang_timeout": 600.0, "data": "d", "packing": "lossless", "depth": 2,
    "d_model": 128, "head_dim": 64, "num_kv_heads": 0, "seq_len": 256, "window_pattern": "SL",
    "total_batch_size": 2048, "lm_head_lr": 0.003, "embedding_lr": 0.1, "scalar_lr": 0.1, "matrix_lr": 0.02,
    "weight_decay": 0.1, "warmup_ratio": 0.1, "warmdown_ratio": 0.4, "final_lr_frac": 0.2, "eval_tokens": 150000,
    "name": "run", "description": "", "run_dir": None, "group": None, "tensorboard": False, "keep_checkpoints": False,
    "device": "cpu", "ops": "reference", "graphs": False, "device_batch_size": 8, "autocast": False,
    "recompute": False, "fused_norms": False, "tune": "auto",
}  # fmt: skip


@pytest.mark.parametrize("device", DEVICE_DEFAULTS)
@pytest.mark.parametrize(("recipe", "expected"), [("published", PUBLISHED), ("tuned", TUNED)])
def test_a_recipe_whole(device, recipe, expected):
    config = dataclasses.asdict(resolve(TrainConfig(recipe=recipe), device))
    for key, value in (expected | OF_THE_MACHINE[device] | {"recipe": recipe}).items():
        assert config[key] == value, key


def test_a_device_has_a_recipe_of_its_own():
    assert [resolve(TrainConfig(), device).recipe for device in ("cuda", "cpu")] == ["published", "cpu"]
    assert resolve(TrainConfig(), "cuda") == resolve(TrainConfig(recipe="published"), "cuda")
    cpu = resolve(TrainConfig(), "cpu")
    expected = PUBLISHED | {
        "depth": 2, "d_model": 128, "head_dim": 64, "seq_len": 1024, "total_batch_size": 4096, "short_window": 8,
        "smear": True, "key_offset": True, "bigram_rows": 2, "bigram_decay": 0.1,
    }  # fmt: skip
    for key, value in (expected | {"embedding_lr": 0.1, "scalar_lr": 0.1, "matrix_lr": 0.02}).items():
        assert getattr(cpu, key) == value, key


@pytest.mark.parametrize("device", DEVICE_DEFAULTS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_any_recipe_is_a_step_on_any_device(recipe, device):
    """In whole micro-steps of at most the rows that the machine takes, and never of more than a step has."""
    config = resolve(TrainConfig(recipe=recipe), device)
    assert changed_from_recipe(config) == []
    assert config.device_batch_size <= DEVICE_DEFAULTS[device]["device_batch_size"]
    assert config.grad_accum_steps >= 1
    assert config.model_config(vocab_size(recipe)).windows[-1] == config.seq_len


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_entry_names_fields_that_are_open_by_default(recipe):
    fields = {f.name: f.default for f in dataclasses.fields(TrainConfig)}
    assert {key: fields[key] for key in recipe_defaults(recipe)} == dict.fromkeys(recipe_defaults(recipe))
    assert RECIPES["published"].keys() >= RECIPES[recipe].keys() - {"d_model"}


def test_a_flag_overrides_its_recipe():
    given = parse_given(["--recipe", "tuned", "--depth", "4", "--wte-decay", "0", "--lambda-0-init", "-0.5"])
    config = resolve(TrainConfig(**given), "cuda")
    assert (config.depth, config.d_model, config.wte_decay, config.lambda_0_init) == (4, 256, 0.0, -0.5)
    assert (config.short_window, config.lm_head_decay) == (8, 0.01)
    assert changed_from_recipe(config) == ["--depth 4", "--lambda-0-init -0.5", "--wte-decay 0"]
    assert parse_given(to_args(TrainConfig(**given))) == given


def test_what_the_model_is_made_of_reaches_it():
    shape = resolve(TrainConfig(recipe="tuned"), "cuda").model_config(8192)
    assert shape.windows == [256, 256, 256, 256, 2048, 256, 256, 256, 2048]
    assert (shape.rope_base, shape.init_scale, shape.lambda_r_init, shape.lambda_0_init) == (200_000.0, 0.68, 1.0, 0.05)
    assert resolve(TrainConfig(), "cuda").model_config(8192) == GPTConfig()  # what an old shape is read as


def test_the_vocabulary_is_the_recipes():
    assert {name: vocab_size(name) for name in RECIPES} == {"published": 8192, "tuned": 8192, "cpu": 2048}
    assert [embedded_folder(name).name for name in RECIPES] == ["stdlib", "stdlib", "stdlib-2048"]


def test_a_recipe_that_is_none_names_the_nearest():
    with pytest.raises(InputError, match=r"^--recipe 'pubished' is none of published, tuned, cpu: did you mean publis"):
        resolve(TrainConfig(recipe="pubished"), "cpu")
    with pytest.raises(InputError, match=r"^--recipe '' is none of published, tuned, cpu$"):
        resolve(TrainConfig(recipe=""), "cpu")


def test_an_old_configuration_is_what_it_was(monkeypatch):
    """Whatever the recipes have become since."""
    for recipe in RECIPES.values():
        for key in BEFORE_RECIPES.keys() & recipe.keys():
            monkeypatch.setitem(recipe, key, 4)
    expected = OLD | {
        "recipe": "published", "smear": False, "key_offset": False, "short_window": 2, "rope_base": 10_000.0,
        "init_scale": 1.0, "lambda_r_init": 1.0, "lambda_0_init": 0.1, "lm_head_decay": 0.0, "wte_decay": 0.0,
        "value_embedding_decay": 0.0, "bigram_decay": 0.0, "bigram_rows": 0, "momentum_ramp": 300,
        "sums": "ordered", "eval_every": "0", "track": None, "init_from": None, "gpu": None,
    }  # fmt: skip
    del expected["tensorboard"]  # whose place `track` took
    read = TrainConfig.from_json(OLD)
    assert dataclasses.asdict(read) == expected
    assert all(getattr(read, key) is not None for key in recipe_defaults("published")), "a field without its value then"
    assert resolve(read, "cpu") == read


def test_what_was_saved_since_is_read_as_it_is():
    config = resolve(TrainConfig(recipe="tuned", ops="reference"), "cuda")
    assert TrainConfig.from_json(dataclasses.asdict(config)) == config


def test_the_header_names_recipe_and_changes(corpus, tmp_path, capsys):
    for given, line in (
        ({"recipe": "tuned"}, "recipe: tuned"),
        ({"matrix_lr": 0.03, "window_pattern": "L"}, "recipe: cpu, but --window-pattern L --matrix-lr 0.03"),
    ):
        config = resolve(TrainConfig(**given, steps=1, ops="reference"), "cpu")
        announce(config, config.model_config(512), Dataset.open(corpus), SimpleNamespace(path=tmp_path))
        assert line in capsys.readouterr().out.splitlines()


def test_the_help_shows_the_defaults_of_each_recipe(capsys):
    with pytest.raises(SystemExit):
        parse_given(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for text in (
        "--depth INT layers (default: published 8, tuned 9, cpu 2)", "(default: cuda 300, cpu 60)",
        "--recipe {published,tuned,cpu}", "(default: cuda published, cpu cpu)",
        "begins at (default: 1)", "published SSSL, tuned SSSSL, cpu SSSL", "published 0, tuned 0.003, cpu 0",
    ):  # fmt: skip
        assert text in said, text


def test_a_run_without_data_takes_the_vocabulary_of_its_recipe(monkeypatch, tmp_path):
    """Wherever it runs: the published recipe on a CPU prepares 8,192 tokens."""
    asked = []

    def prepare(source, out, vocab_size):
        asked.append((source, out.name, vocab_size))
        raise InputError("enough")

    monkeypatch.setenv("TIMEBOX_HOME", str(tmp_path))
    monkeypatch.setattr(train.trainer, "prepare", prepare)
    for recipe in ("published", "cpu"):
        assert train.__main__.main(["--device", "cpu", "--recipe", recipe, "--run-dir", str(tmp_path / "run")]) == 2
    assert asked == [("stdlib", "stdlib", 8192), ("stdlib", "stdlib-2048", 2048)]
