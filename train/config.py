"""One flat configuration; the command line is made from its fields.

A field left at None takes its value from the recipe, or from the device (recipes.py).
"""

import argparse
import dataclasses
import difflib
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch

from model import GPTConfig
from model.config import SHORT_WINDOWS
from prepare import InputError
from prepare.arguments import Parser
from prepare.home import expanded
from prepare.words import printable

from .every import Every
from .recipes import BEFORE_RECIPES, DEVICE_DEFAULTS, RECIPES, recipe_defaults, why_no_recipe

ROOT = Path(__file__).parent.parent  # of the repository
MAX_SEED = 2**62  # PyTorch's generators take 64 bits; repeats and confirmations count on from here
GONE = ("confirms",)  # options of before, which no result depends on
MAX_SEEDS = 3  # of an experiment, until it is known whether it is better
TRACKERS = ("tensorboard", "wandb", "trackio")
MAX_DEPTH = 100_000  # a shape has an entry a layer: without a limit, one of 20 digits never ends


# What people who know other programs call an option of ours.
MEANT = {
    "--lr": ("--matrix-lr", "--embedding-lr"),
    "--learning-rate": ("--matrix-lr", "--embedding-lr"),
    "--unembedding-lr": ("--lm-head-lr",),
    "--wandb": ("--track wandb",),
    "--tensorboard": ("--track tensorboard",),
    "--report-to": ("--track",),
    "--finetune": ("--init-from",),
    "--micro-batch-size": ("--device-batch-size",),
    "--eval-batch-size": ("--device-batch-size",),
    "--gradient-accumulation-steps": ("--total-batch-size",),
    "--max-steps": ("--steps",),
    "--max-iters": ("--steps",),
    "--epochs": ("--steps", "--time-budget"),
    "--eval-steps": ("--eval-every", "--eval-tokens"),
    "--eval-interval": ("--eval-every",),
    "--layers": ("--depth",),
    "--block-size": ("--seq-len",),
    "--output-dir": ("--run-dir",),
    "--compile": ("--ops",),
}


def runs_folder() -> Path:
    """Where the folders of runs are by default, and the ledger beside them: `$TIMEBOX_RUNS`, by default `runs`. The
    worktrees of one repository that name the same folder there have one ledger."""
    return expanded(os.environ.get("TIMEBOX_RUNS") or "runs")


def _recipe(name: str) -> str:
    if reason := why_no_recipe(printable(name)):
        raise argparse.ArgumentTypeError(reason)
    return name


def _trackers(words: str) -> str:
    """Names of trackers, separated by commas, each once; empty for none."""
    names = [name for word in words.split(",") if (name := word.strip()) not in ("", "none")]
    for name in names:
        if name not in TRACKERS:
            near = difflib.get_close_matches(name, TRACKERS, n=1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise argparse.ArgumentTypeError(f"{printable(name)!r} is none of {', '.join(TRACKERS)}, none{hint}")
    return ",".join(dict.fromkeys(names))


class _Adding(argparse.Action):
    """Of an option that is given twice, both count."""

    def __call__(self, parser, namespace, value, option_string=None):
        setattr(namespace, self.dest, _trackers(f"{getattr(namespace, self.dest, '')},{value}"))


def option(default, text: str, **metadata):
    """A field of TrainConfig. Its metadata: `help`, `choices`, `kind` where a given word is not taken as it is,
    `action` of argparse, `begins` where a group of the help begins, and `free` where a resumed run may have another
    value: no result depends on it, or what it stands for is compared by itself, as the data's hashes are."""
    return field(default=default, metadata={"help": text, **metadata})


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a run depends on. `resolve` fills in what recipe and device decide, and checks the rest."""

    time_budget: float | None = option(None, "seconds of timed training", begins="run")
    steps: int | None = option(None, "train this many steps instead, and let them drive the schedules")
    untimed_steps: int = option(10, "first steps that do not count; 0: warm up on dummy data, then time every step")
    seed: int = option(42, "seed of the initial weights and of the order of the data")
    repeat: int = option(1, "runs on so many seeds, --seed and those after it: without, noise is unknown", free=True)
    confirm: bool = option(False, "run seed after seed until it is known whether this is better than what was kept;"
                           " what is better is run on a fresh seed too", free=True)  # fmt: skip
    max_seeds: int = option(MAX_SEEDS, "of --confirm, at most", free=True)
    resume: str | None = option(None, "go on with an interrupted run: its folder, or auto for the newest below runs/"
                                " (TIMEBOX_RUNS names another folder)", free=True)  # fmt: skip
    init_from: str | None = option(None, "begin with the weights of this finished run; its data and its options of the"
                                   " group `model` hold where no flag names others")  # fmt: skip
    checkpoint_every: float = option(60.0, "seconds between checkpoints; 0: as often as one can be written", free=True)
    hang_timeout: float = option(600.0, "seconds without a step after which the run is ended; 0: never", free=True)

    data: str | None = option(None, "prepared folder (default: the embedded corpus, prepared on first use)", free=True,
                              begins="data")  # fmt: skip
    packing: str = option("lossless", "how documents fill rows; published: tails are thrown away, and val_bpb is"
                          " comparable with no published one all the same (on one text 1.899 against 1.798)",
                          choices=("lossless", "published"))  # fmt: skip

    recipe: str | None = option(None, "what the model and its optimizer are where no other flag says so",
                                choices=tuple(RECIPES), kind=_recipe, begins="model")  # fmt: skip
    depth: int | None = option(None, "layers")
    d_model: int | None = option(None, "model width (default: 64 x depth, rounded up to a multiple of head_dim)")
    head_dim: int | None = option(None, "width of a head")
    num_kv_heads: int = option(0, "key-value heads; 0: as many as heads")
    seq_len: int | None = option(None, "tokens a row")
    window_pattern: str | None = option(None, "attention windows, repeated over the layers: S short, L all; the last is"
                                        " L")  # fmt: skip
    short_window: int | None = option(None, "S sees a row's tokens divided by this", choices=SHORT_WINDOWS)
    smear: bool | None = option(None, "a learned share of the embedding of the token before is added to each token's")
    bigram_rows: int | None = option(None, "of hashed tables of token pairs, in vocabularies, in the values of layers"
                                     " without a value embedding; 0: none")  # fmt: skip
    key_offset: bool | None = option(None, "on L layers the slow rotary half of each key is that of the token before")
    rope_base: float | None = option(None, "of rotary positions: the slowest turn takes some 2 pi x this, in tokens")
    init_scale: float | None = option(None, "of the value embeddings and the blocks' matrices that do not begin at 0")
    lambda_r_init: float | None = option(None, "what lambda_r, of the stream, begins at")
    lambda_0_init: float | None = option(None, "what lambda_0, of the embedding in each layer, begins at")

    total_batch_size: int | None = option(None, "tokens of a step, a multiple of device_batch_size x seq_len",
                                         begins="optimizer")  # fmt: skip
    lm_head_lr: float | None = option(None, "AdamW, scaled by (d_model/768)^-0.5")
    embedding_lr: float | None = option(None, "AdamW, wte and value embeddings, scaled by (d_model/768)^-0.5")
    scalar_lr: float | None = option(None, "AdamW, lambda_0; lambda_r takes a hundredth of it")
    matrix_lr: float | None = option(None, "Muon, scaled by sqrt(max(1, rows/cols))")
    weight_decay: float | None = option(None, "Muon, cautious, falling to 0 linearly")
    lm_head_decay: float | None = option(None, "AdamW, a step takes lr x this of a weight, at the lr of the step")
    wte_decay: float | None = option(None, "AdamW, as --lm-head-decay")
    value_embedding_decay: float | None = option(None, "AdamW, as --lm-head-decay")
    bigram_decay: float | None = option(None, "AdamW, as --lm-head-decay, of the tables of pairs")
    momentum_ramp: int | None = option(None, "steps in which Muon's momentum rises from 0.85 to 0.95")
    warmup_ratio: float | None = option(None, "share of the budget in which the learning rate rises")
    warmdown_ratio: float | None = option(None, "share of the budget in which it falls")
    final_lr_frac: float | None = option(None, "what it falls to, as a share of the full rate")

    eval_tokens: int | None = option(None, "validation tokens of the final evaluation; 0: all of them",
                                    begins="evaluation")  # fmt: skip
    eval_every: str = option("0", "val_bpb on a small part of validation while training, outside of the budget's clock:"
                             " every so many steps (100), or timed seconds (30s); 0: never", free=True)  # fmt: skip

    name: str = option("run", "name of the run, part of its folder's name", kind=printable, begins="record")
    description: str = option("", "what this run tries, for the ledger", free=True, kind=printable)
    run_dir: str | None = option(None, "the run's folder (default: runs/<time>-<name>, numbered where that is taken;"
                                 " TIMEBOX_RUNS is another runs/); the ledger is beside it")  # fmt: skip
    group: str | None = option(None, "runs of one group are repeats of one experiment (default: the run)", free=True,
                               kind=printable)  # fmt: skip
    track: str | None = option(None, f"who follows the run beside its own files: {', '.join(TRACKERS)}, or several,"
                               " separated by commas; none: nobody", free=True, kind=_trackers,
                               action=_Adding)  # fmt: skip
    keep_checkpoints: bool = option(False, "keep the last two, also after the evaluation", free=True)

    device: str | None = option(None, "cuda or cpu (default: cuda where there is one)", choices=("cuda", "cpu"),
                                begins="machine")  # fmt: skip
    gpu: str | None = option(None, "any: one that no other run with --gpu has, waited for where all are lent; or the"
                             " number of one in nvidia-smi, or its UUID", free=True)  # fmt: skip
    ops: str | None = option(None, "triton kernels, forms for a CPU, PyTorch reference, or the reference under"
                             " torch.compile (default: triton on a GPU, else cpu)",
                             choices=("triton", "cpu", "reference", "compile"))  # fmt: skip
    graphs: bool | None = option(None, "steps as CUDA graphs (default: with triton kernels on a GPU)")
    device_batch_size: int | None = option(None, "rows of a micro-step")
    autocast: bool | None = option(None, "bf16 matrix products on a CPU (default: where its instructions have them)")
    recompute: bool = option(False, "keep less for the backward and make it again there: the same gradients, in 15,949"
                                    " instead of 25,677 MiB at the GPU's defaults; not yet timed")  # fmt: skip
    sums: str = option("ordered", "of gradients over several GPUs: in the order of the micro-steps, so that how many"
                       " there are changes no bit; native: in the backend's, once a step, for slow links",
                       choices=("ordered", "native"))  # fmt: skip
    fused_norms: bool | None = option(None, "norms in the epilogues of the kernels' products (default: as the tuner"
                                      " found on this GPU, else not)")  # fmt: skip
    tune: str = option("auto", "tiles of the kernels: measured on this GPU where it has none yet; again: anew; off:"
                       " those in the source", choices=("auto", "again", "off"), free=True)  # fmt: skip

    @classmethod
    def from_json(cls, saved: dict) -> "TrainConfig":
        """What `asdict` made, read again: a field that it lacks is what it was before there was that field. Raises
        InputError where a key or the type of a value is not one of ours."""
        hints = get_type_hints(cls)
        saved = {key: value for key, value in saved.items() if key not in GONE}
        if saved.pop("tensorboard", False):  # which was an option of its own once
            saved.setdefault("track", "tensorboard")
        for key, value in saved.items():
            if key not in hints:
                near = difflib.get_close_matches(key, hints, n=1)
                hint = f": did it mean {near[0]}?" if near else ""
                raise InputError(f"the configuration has a key {key!r} that this program does not know{hint}")
            kinds = get_args(hints[key]) or (hints[key],)
            if type(value) not in kinds and not (float in kinds and type(value) is int):
                raise InputError(f"the configuration has {value!r} for {key}")
        return cls(**BEFORE_RECIPES | saved)

    def fixed(self) -> dict[str, Any]:
        """What a resumed run has to have the same."""
        free = {f.name for f in dataclasses.fields(self) if f.metadata.get("free")}
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in free}

    @property
    def micro_batch_tokens(self) -> int:
        return self.device_batch_size * self.seq_len

    @property
    def grad_accum_steps(self) -> int:
        return self.total_batch_size // self.micro_batch_tokens

    @property
    def forward_dtype(self) -> torch.dtype:
        """Of the parameters as the forward reads them. Where it is not fp32, the optimizer has fp32 masters beside."""
        bf16 = self.device == "cuda" or (self.ops == "cpu" and self.autocast)
        return torch.bfloat16 if bf16 else torch.float32

    @property
    def model_options(self) -> dict[str, bool]:
        """How a GPT of any shape computes: what it takes beside its GPTConfig."""
        return {"recompute": self.recompute, "fused_norms": bool(self.fused_norms)}

    def model_config(self, vocab_size: int) -> GPTConfig:
        try:
            return GPTConfig(
                vocab_size=vocab_size,
                seq_len=self.seq_len,
                depth=self.depth,
                d_model=self.d_model,
                head_dim=self.head_dim,
                num_kv_heads=self.num_kv_heads,
                window_pattern=self.window_pattern,
                smear=self.smear,
                bigram_rows=self.bigram_rows,
                key_offset=self.key_offset,
                short_window=self.short_window,
                rope_base=self.rope_base,
                init_scale=self.init_scale,
                lambda_r_init=self.lambda_r_init,
                lambda_0_init=self.lambda_0_init,
            )
        except ValueError as error:
            raise InputError(str(error)) from None


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware, so that bf16 is the faster way (bench/LOG.md)."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def resolve(config: TrainConfig, device: str, ranks: int = 1) -> TrainConfig:
    """Fills in what was left open: by the recipe, and for `device`, "cuda" or "cpu": this CPU. Of several `ranks` each
    has micro-batches of every step. Raises InputError."""
    of_device = DEVICE_DEFAULTS[device]
    recipe = recipe_defaults(of_device["recipe"] if config.recipe is None else config.recipe)
    rows = min(of_device["device_batch_size"], recipe["total_batch_size"] // recipe["seq_len"])
    if ranks > 1:
        total, seq_len = (getattr(config, key) or recipe[key] for key in ("total_batch_size", "seq_len"))
        rows = rows_of_a_rank(total, seq_len, ranks, rows) or rows
    defaults = of_device | recipe | {"device_batch_size": rows}
    filled = {key: value for key, value in defaults.items() if getattr(config, key) is None}
    if config.total_batch_size is None and (config.device_batch_size or config.seq_len):
        # Another micro-batch keeps the default total where it divides it, and is the total where it does not.
        both = defaults | {k: v for k, v in dataclasses.asdict(config).items() if v is not None}
        micro_batch = both["device_batch_size"] * both["seq_len"]
        if micro_batch > 0 and filled["total_batch_size"] % micro_batch:
            filled["total_batch_size"] = micro_batch
    # A GPU's products are bf16 without it.
    autocast = device == "cpu" and (cpu_has_bf16() if config.autocast is None else config.autocast)
    fused_norms = bool(config.fused_norms)
    config = dataclasses.replace(config, device=device, autocast=autocast, fused_norms=fused_norms, **filled)
    if config.d_model is None:
        width = -(-64 * config.depth // max(config.head_dim, 1)) * config.head_dim
        config = dataclasses.replace(config, d_model=width)
    _check(config)
    if config.grad_accum_steps % ranks:
        raise InputError(_uneven(config, ranks))
    return config


def rows_of_a_rank(total: int, seq_len: int, ranks: int, at_most: int) -> int:
    """Rows of the largest micro-batch of which a step of `total` tokens has as many on every rank; 0 where there is
    none."""
    if seq_len < 1 or total < 1 or total % (seq_len * ranks):
        return 0
    each = total // (seq_len * ranks)
    return next((rows for rows in range(min(at_most, each), 0, -1) if each % rows == 0), 0)


def _uneven(config: TrainConfig, ranks: int) -> str:
    rows = rows_of_a_rank(config.total_batch_size, config.seq_len, ranks, config.device_batch_size)
    step = config.micro_batch_tokens * ranks
    total = -(-config.total_batch_size // step) * step
    return (
        f"{ranks} ranks cannot share the {config.grad_accum_steps} micro-steps of a step evenly: use"
        + (f" --device-batch-size {rows}, or" if rows else "") + f" --total-batch-size {total}"
    )  # fmt: skip


def _check(config: TrainConfig) -> None:
    at_least = {
        "untimed_steps": 0, "eval_tokens": 0, "num_kv_heads": 0, "depth": 1, "head_dim": 2, "d_model": 32, "seq_len": 1,
        "device_batch_size": 1, "total_batch_size": 1, "lm_head_lr": 0, "embedding_lr": 0, "scalar_lr": 0,
        "matrix_lr": 0, "weight_decay": 0, "warmup_ratio": 0, "warmdown_ratio": 0, "final_lr_frac": 0,
        "checkpoint_every": 0, "hang_timeout": 0, "rope_base": 1, "init_scale": 0, "lm_head_decay": 0, "wte_decay": 0,
        "value_embedding_decay": 0, "bigram_decay": 0, "bigram_rows": 0,
        "momentum_ramp": 0, "lambda_r_init": -math.inf, "lambda_0_init": -math.inf,
    }  # fmt: skip
    for key, least in at_least.items():
        value = getattr(config, key)
        if not least <= value < math.inf or value == -math.inf:  # NaN fails too
            wanted = "finite" if value == math.inf or least == -math.inf else f"at least {least}"
            raise InputError(f"--{key.replace('_', '-')} {value} must be {wanted}")
    Every.of(config.eval_every)
    if config.depth > MAX_DEPTH:
        raise InputError(f"--depth {config.depth} must be at most {MAX_DEPTH}")
    if config.steps is not None and config.steps < 1:
        raise InputError(f"--steps {config.steps} must be at least 1")
    if not 0 <= config.seed <= MAX_SEED:
        raise InputError(f"--seed {config.seed} must be from 0 to {MAX_SEED}")
    if config.name != Path(config.name).name:
        raise InputError(f"--name {config.name!r} must be a part of one folder's name: --run-dir takes a path")
    if not 0 < config.time_budget < math.inf:
        raise InputError(f"--time-budget {config.time_budget:g} must be a positive number of seconds")
    if config.warmup_ratio + config.warmdown_ratio > 1:
        raise InputError("--warmup-ratio and --warmdown-ratio add up to more than 1: lower one of them")
    if config.total_batch_size % config.micro_batch_tokens:
        below = config.total_batch_size // config.micro_batch_tokens * config.micro_batch_tokens
        raise InputError(
            f"--total-batch-size {config.total_batch_size} is no multiple of the micro-batch,"
            f" {config.device_batch_size} rows x {config.seq_len} tokens = {config.micro_batch_tokens}:"
            f" use {below or config.micro_batch_tokens}, or another --device-batch-size"
        )


def to_args(config: TrainConfig) -> list[str]:
    """The command line that spells `config`, for `parse_given`."""
    args = []
    for f in dataclasses.fields(config):
        value, flag = getattr(config, f.name), f.name.replace("_", "-")
        if value == f.default:
            continue
        args += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}={value}"]
    return args


def spelled(value: Any) -> str:
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def default_shown(f: dataclasses.Field) -> str:
    """A field's default for the help: by recipe or device where they differ; empty where its text says it."""
    if f.default not in (None, ""):
        return str(f.default)
    defaults = [(device, by.get(f.name)) for device, by in DEVICE_DEFAULTS.items()]
    if defaults[0][1] is None:
        defaults = [(name, recipe_defaults(name).get(f.name)) for name in RECIPES]
    if len({value for _, value in defaults}) == 1:
        return "" if defaults[0][1] is None else spelled(defaults[0][1])
    return ", ".join(f"{name} {spelled(value)}" for name, value in defaults if value is not None)


def changed_from_recipe(config: TrainConfig) -> list[str]:
    """The flags by which a complete configuration is not what its recipe says."""
    of_recipe = recipe_defaults(config.recipe)
    return [
        f"--{key.replace('_', '-')} {spelled(getattr(config, key))}"
        for key, value in of_recipe.items() if getattr(config, key) != value
    ]  # fmt: skip


def parse_given(args: list[str] | None = None) -> dict[str, Any]:
    """The options that a command line spells, and none that it leaves out."""
    parser = Parser("train", "Trains a language model inside a time budget.", MEANT, usage="%(prog)s [options]")
    hints = get_type_hints(TrainConfig)
    group = None
    for f in dataclasses.fields(TrainConfig):
        if title := f.metadata.get("begins"):
            group = parser.add_argument_group(title)
        kind = next((t for t in get_args(hints[f.name]) if t is not type(None)), hints[f.name])
        text = f.metadata["help"]
        if default := default_shown(f):
            text += f" (default: {default})"
        flag = "--" + f.name.replace("_", "-")
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            choices = f.metadata.get("choices")
            group.add_argument(flag, type=f.metadata.get("kind", kind), action=f.metadata.get("action", "store"),
                               default=argparse.SUPPRESS, choices=choices, help=text,
                               metavar=None if choices else kind.__name__.upper())  # fmt: skip
    return vars(parser.parse_args(args))
