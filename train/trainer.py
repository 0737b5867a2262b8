"""A run from its configuration to its summary: what surrounds the loop."""

import dataclasses
import shutil
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from kernels import Table, chosen
from model import GPT, GPTConfig
from model.gpt import count_parameters
from prepare import Dataset, InputError, Loader, default_folder, evaluate_bpb, prepare
from prepare.build import DEFAULT_VOCAB_SIZE
from prepare.scoring import Evaluation
from prepare.words import command_line, printable

from . import init_from
from .budget import Budget
from .clock import Stops, clock_of, seconds_since_start
from .config import TrainConfig
from .curves import draw_curves
from .device import complete, keep_freed_memory, keep_to_the_cores_allowed
from .evaluating import Evaluations, sampled
from .loop import train
from .memory import (
    check_fits,
    fit_default,
    halving,
    is_out_of_memory,
    out_of_memory_is_input_error,
    peak_rss_bytes,
)
from .optimizer import Optimizer
from .precompile import Precompiler, stamp
from .ranks import ALONE, LostRankError, Ranks
from .recipes import vocab_size
from .resilience.checkpoint import Checkpoint, Checkpointer, checkpoint_folders, newest_checkpoint, step_of
from .resilience.failure import explain
from .resilience.resume import check_same
from .resilience.signals import Interrupted, Signals
from .resilience.state import RunState
from .resilience.tensors import digest
from .resilience.watchdog import HangError, Watchdog
from .results.audit import Score, audit
from .results.load import Load
from .results.metrics import Value, utilisation
from .results.progress import Reporter, SilentReporter, announce, announce_resume, print_summary
from .results.record import Record
from .results.run_folder import RunFolder, environment
from .results.track import check_trackers, track
from .schedule import step_values
from .step import TrainingError, TrainStep
from .tune import Tiles, saved_tiles, tiles_for


def precompiler(config: TrainConfig, vocab_size: int, table: Table, ranks: Ranks = ALONE) -> Precompiler | None:
    """Has the kernels compiled beside the rest of the set-up; None where there are none to compile, or all are. Of the
    ranks of a machine one does it, and the others wait for it."""
    if config.device != "cuda" or config.ops != "triton" or ranks.place.local_rank != 0:
        return None
    major, minor = torch.cuda.get_device_capability()
    step = config, vocab_size, 10 * major + minor, table
    return None if stamp(*step).exists() else Precompiler(*step)


def embedded_folder(recipe: str) -> Path:
    """Of the corpus that is trained on where none is named. `stdlib` is what `python -m prepare` writes; another
    vocabulary is in a folder of its own."""
    size = vocab_size(recipe)
    return default_folder("stdlib" if size == DEFAULT_VOCAB_SIZE else f"stdlib-{size}")


def open_data(folder: str | None, recipe: str) -> Dataset:
    """The prepared corpus; the embedded one is prepared first where none is named and it is not there yet."""
    if folder is not None:
        return Dataset.open(folder)
    default, size = embedded_folder(recipe), vocab_size(recipe)
    if not (default / "manifest.json").exists():
        print(
            f"no --data: preparing the embedded corpus, vocabulary {size:,}, once, in {printable(default)}", flush=True
        )
        prepare("stdlib", out=default, vocab_size=size)
    return Dataset.open(default)


def how_to_go_on(folder: RunFolder) -> str:
    """The command that continues a run; nothing where there is no checkpoint to continue from."""
    checkpoints = checkpoint_folders(folder.checkpoints)
    if not checkpoints or folder.finished:
        return ""
    return f"to go on from step {step_of(checkpoints[0])}: {command_line('train', '--resume', folder.path)}"


@contextmanager
def saying_how_to_go_on(folder: RunFolder, ranks: Ranks) -> Iterator[None]:
    """Where a signal, a full disk, or the end of another rank ends the run."""
    try:
        yield
    except (Interrupted, OSError):
        if (line := how_to_go_on(folder)) and ranks.first:
            print(line, flush=True)
        raise
    except LostRankError as error:
        raise LostRankError("; ".join([str(error), *filter(None, [how_to_go_on(folder)])])) from None


@dataclass(frozen=True)
class Decided:
    """What is settled before anything is allocated."""

    config: TrainConfig  # complete
    shape: GPTConfig
    data: Dataset
    fingerprint: dict[str, str]  # of the data
    checkpoint: Checkpoint | None  # that the run goes on from
    folder: RunFolder | None  # of a run that goes on; a new one is made when there is something to write
    tiles: Tiles  # in force until the run ends
    ranks: Ranks
    weights: init_from.Weights | None = None  # of another run, that a new one begins with; on rank 0


@dataclass(frozen=True)
class Built:
    """What holds memory, and changes from step to step."""

    step: TrainStep
    state: RunState


def run(config: TrainConfig, signals: Signals, record: Record, ranks: Ranks = ALONE) -> dict[str, Value]:
    """Trains, evaluates, writes the run's folder and its row, and prints the summary. On a rank other than 0 it returns
    nothing.

    Raises InputError, TrainingError, LostRankError and, after a signal, Interrupted.
    """
    with ExitStack() as stack:
        decided = decide(config, record, stack, ranks)
        built = build(decided, record, stack)
        folder = begin(decided, record, stack)
        watchdog, ready = go(decided, built, folder, signals, record, stack)
        return conclude(decided, built, folder, record, watchdog, ready)


def decide(config: TrainConfig, record: Record, stack: ExitStack, ranks: Ranks) -> Decided:
    """From what was asked for to what will be trained, on which data; raises InputError where that cannot be.

    What a machine may have a say in is rank 0's to decide, and everybody's then: recipe and configuration, rows, tiles.
    """
    ranks.first_does(lambda: check_trackers(config.track, record.folder))
    folder = checkpoint = None
    if config.resume:
        folder = ranks.first_does(lambda: RunFolder.reopen(config.resume)) or RunFolder.of_another(config.resume)
        stack.enter_context(saying_how_to_go_on(stack.enter_context(closing(folder)), ranks))
        checkpoint = going_on_from(folder, config, ranks)
        if checkpoint:
            then = TrainConfig.from_json(checkpoint.values["config"]).fixed()  # older ones lack what was added since
            check_same(str(checkpoint.path), config.fixed(), then, "config.json was changed")
            record.goes_on_from(checkpoint.values)
    weights = None
    if begins := config.init_from is not None and checkpoint is None:
        weights, config = init_from.of_run(config, record, ranks)
    keep_to_the_cores_allowed()
    default_batch = config.device_batch_size is None
    open_options = [name for name in ("fused_norms", "graphs") if getattr(config, name) is None]
    config = alike(ranks.all_do(lambda: complete(config, ranks.size)), ranks)
    if config.device == "cpu":
        keep_freed_memory()
    data = ranks.in_turn(lambda: open_data(config.data, config.recipe))
    shape = config.model_config(data.vocab_size)
    fingerprint = {
        "source": data.source,
        "tokenizer_sha256": data.tokenizer.fingerprint,
        "train_sha256": data.split("train").sha256,
        "val_sha256": data.split("val").sha256,
    }
    first = ranks.of_first(fingerprint)
    if checkpoint:
        mend = "name the folder it was trained on with --data"
        check_same(f"the data in {data.folder}", fingerprint, checkpoint.values["data"], mend)
    ranks.all_do(lambda: check_same(
        f"the data in {data.folder} ({ranks.where()})", fingerprint, first, "give every machine what rank 0 has"
    ))  # fmt: skip
    if begins:
        ranks.first_does(lambda: weights.check(shape, data))
    if default_batch:
        config = dataclasses.replace(config, device_batch_size=ranks.of_first(
            ranks.first_does(lambda: fit_default(config, shape, ranks).device_batch_size)
        ))  # fmt: skip
    tiles = ranks.first_does(lambda: saved_tiles(checkpoint.values) if checkpoint else tiles_for(config, shape))
    tiles = Tiles(**ranks.of_first(tiles and dataclasses.asdict(tiles)))
    stack.enter_context(chosen(tiles.table))
    found = {name: value for name in open_options if (value := getattr(tiles, name)) is not None}
    config = dataclasses.replace(config, **found)
    ranks.all_do(lambda: check_fits(config, shape, ranks))
    return Decided(config, shape, data, fingerprint, checkpoint, folder, tiles, ranks, weights)


def going_on_from(folder: RunFolder, config: TrainConfig, ranks: Ranks) -> Checkpoint | None:
    """The newest checkpoint, which rank 0 reads: the others know what it says, and not its tensors. None where torchrun
    starts anew what had none yet: it begins again, in the same folder."""
    if ranks.of_first(ranks.place.attempt > 0 and not checkpoint_folders(folder.checkpoints)):
        return None
    found = ranks.first_does(lambda: newest_checkpoint(folder.checkpoints))
    path, values = ranks.of_first(found and [str(found.path), found.values])
    return found or Checkpoint(Path(path), values)


def alike(config: TrainConfig, ranks: Ranks) -> TrainConfig:
    """Rank 0's configuration, on every rank. Raises InputError where the ranks have different devices."""
    devices = ranks.each(torch.cuda.get_device_name() if config.device == "cuda" else "a CPU")
    other = next((rank for rank, device in enumerate(devices) if device != devices[0]), None)
    if other is not None:
        raise InputError(f"rank 0 has {devices[0]}, and rank {other} has {devices[other]}: take GPUs of one kind, and"
                         " no more processes a machine than it has, or --device cpu")  # fmt: skip
    saved = ranks.of_first(dataclasses.asdict(config))
    return config if ranks.size == 1 else TrainConfig(**saved)


def build(decided: Decided, record: Record, stack: ExitStack) -> Built:
    """Model, optimizer, loader, and the kernels that they launch."""
    config, data, ranks = decided.config, decided.data, decided.ranks
    if kernels_compile := precompiler(config, data.vocab_size, decided.tiles.table, ranks):
        stack.enter_context(closing(kernels_compile))
    torch.manual_seed(config.seed)
    model = GPT(decided.shape, device=config.device, **config.model_options)
    model.init_weights(config.seed)
    optimizer = Optimizer(model, config, config.forward_dtype, ranks)
    if config.init_from and not decided.checkpoint:
        init_from.begin_with(optimizer, ranks.first_does(lambda: decided.weights.tensors()))
    step = TrainStep(model, optimizer, config.autocast)
    with record.timed("compile"):
        if kernels_compile and (why := kernels_compile.wait()):
            print(f"note: kernels were not compiled ahead ({why}): each is when first launched", file=sys.stderr)
        ranks.all_do(lambda: None)  # the others find them in Triton's cache
    stack.enter_context(out_of_memory_is_input_error(config, step))
    loader = stack.enter_context(closing(Loader(
        data.split("train"), config.device_batch_size, config.seq_len,
        bos=data.tokenizer.bos, packing=config.packing, seed=config.seed, device=config.device,
        rank=ranks.rank, ranks=ranks.size,
    )))  # fmt: skip
    counted = decided.checkpoint.values["budget"] if decided.checkpoint else {}
    budget = Budget(config.time_budget, config.steps, config.untimed_steps, **counted)
    return Built(step, RunState(optimizer, loader, budget))


def begin(decided: Decided, record: Record, stack: ExitStack) -> RunFolder:
    """From here on there is a run: it has a folder, and will have a row."""
    config, shape, data, folder = decided.config, decided.shape, decided.data, decided.folder
    ranks = decided.ranks
    if folder is None:
        folder = ranks.first_does(lambda: RunFolder(record.folder, bool(config.run_dir)))
        path = ranks.of_first(folder and str(folder.path))
        folder = stack.enter_context(closing(folder or RunFolder.of_another(path)))
        record.folder = folder.path
        stack.enter_context(saying_how_to_go_on(folder, ranks))
        ranks.first_does(lambda: write_begin(decided, folder, record))
    record.begin(config, dataclasses.asdict(shape), decided.fingerprint, decided.tiles.digest)
    if not ranks.first:
        return folder
    announce(config, shape, data, folder, ranks.size)
    if record.init_from:
        print(f"init:   {init_from.said(record.init_from)}", flush=True)
    if config.track:
        folder.watchers.append(track(config.track, record.about(decided.checkpoint.step if decided.checkpoint else 0)))
    if decided.checkpoint:
        announce_resume(decided.checkpoint, environment(), record.doubts())
    return folder


def write_begin(decided: Decided, folder: RunFolder, record: Record) -> None:
    """What a run's folder has from the first."""
    data = decided.data
    folder.write_config(
        dataclasses.asdict(decided.config), dataclasses.asdict(decided.shape),
        {"folder": str(Path(data.folder).resolve()), **decided.fingerprint}, decided.tiles.as_json(),
        data.tokenizer_file, decided.ranks.place.launch, record.init_from,
    )  # fmt: skip
    folder.write_changes(record.changes)


def go(
    decided: Decided, built: Built, folder: RunFolder, signals: Signals, record: Record, stack: ExitStack
) -> tuple[Watchdog, float]:
    """Warms up, goes on from the checkpoint, and trains to the end. Returns the watchdog, which watches on, and the
    seconds from the process's start to the first step."""
    config, checkpoint, step, state = decided.config, decided.checkpoint, built.step, built.state
    ranks = decided.ranks

    def hangs(reason: HangError) -> str | None:
        if not ranks.speaks():
            return None
        if not ranks.place.starts_again:
            record.fail(reason)
        return how_to_go_on(folder)

    watchdog = stack.enter_context(Watchdog(config.hang_timeout, hangs))
    plan = (config.device_batch_size, config.seq_len + 1), config.grad_accum_steps, step_values(config, 0, 0.0)
    with record.timed("compile"):
        if config.graphs:
            step.capture(*plan)
        elif state.budget.next_step_counts:  # kernels compile, memory is touched for the first time
            step.rehearse(*plan)
    if checkpoint:
        state.restore(checkpoint.values, ranks.first_does(checkpoint.tensors))
    if decided.folder:
        ranks.first_does(lambda: folder.cut_logs(state.step, state.evaluated.step))
    origin = {
        "config": config.fixed(), "data": decided.fingerprint, "environment": environment(), "sources": record.sources,
        "tiles": decided.tiles.as_json(), "ranks": record.ranks, "init_from": record.init_from,
    }  # fmt: skip
    checkpoints = Checkpointer(folder.checkpoints, state, config.checkpoint_every, origin, ranks)
    stack.callback(checkpoints.wait)
    report = SilentReporter(watchdog.beat) if not ranks.first else Reporter(
        folder, decided.shape, step.device, config.total_batch_size, beat=watchdog.beat, unread=signals.unread,
        gpus=ranks.size,
    )  # fmt: skip
    evaluations = Evaluations(config, decided.data, step, state, report, watchdog, ranks)
    stops = stack.enter_context(Stops())
    ready, load = seconds_since_start(), Load(config.device)
    with signals.deferred():
        try:
            train(
                config, step, state, clock_of(config.device), report, checkpoints, signals.came, stops, ranks,
                evaluations,
            )  # fmt: skip
            record.load = load.end()
            watchdog.phase()
            checkpoints.save()
            checkpoints.wait()
            # Of the ranks one has got the signal, or has nobody who reads it; all end.
            signals.received = int(ranks.agree(signals.received or 0)[0]) or None
            ranks.together = signals.came()
        except LostRankError:
            ranks.speaks()  # asked here, and not when the checkpoint that is being written is on the disk
            raise
        except TrainingError as error:
            ranks.together = True
            watchdog.phase()
            masters = step.optimizer.whole_masters()
            if not ranks.first:
                raise
            raise TrainingError(explain(step, masters, error.sent, str(error), folder.path), error.sent) from None
        finally:
            report.end()
            if state.evaluated.seconds:
                record.seconds["evals"] = state.evaluated.seconds
    return watchdog, ready


def conclude(
    decided: Decided, built: Built, folder: RunFolder, record: Record, watchdog: Watchdog, ready: float
) -> dict[str, Value]:
    """What comes after the last step: evaluation, audit, the row, the summary, the run's files."""
    config, data, step, state, ranks = decided.config, decided.data, built.step, built.state, decided.ranks
    step.release()
    watchdog.phase()
    score = watchdog.watching(step.token_losses)
    with record.timed("evaluation"):
        def evaluated(rows: int) -> Evaluation:
            return evaluate_bpb(
                score, data, seq_len=config.seq_len, batch_size=rows, max_tokens=config.eval_tokens or None,
                packing=config.packing, device=config.device, rank=ranks.rank, ranks=ranks.size, add_up=ranks.add_up,
            )  # fmt: skip

        # One rank cannot take fewer rows by itself: the others would wait for batches that it no longer has.
        rows = config.device_batch_size
        evaluation = halving(evaluated, rows, config.device) if ranks.size == 1 else evaluated(rows)
    record.trained(state.budget, ready)
    summary = summarise(config, step.model.config, state, evaluation, ready, ranks)
    record.measured(summary, evaluation)
    masters = state.optimizer.whole_masters()
    checksums = ranks.each(digest({name: p.detach().cpu() for name, p in step.model.named_parameters()}))
    if not ranks.first:
        watchdog.retire()  # what rank 0 does from here on it does alone
        return {}
    watchdog.phase()
    with record.timed("audit"):  # after the peak of memory was read
        findings = audited(config, score, step.model, data) + check_checksums(checksums)
    watchdog.phase()
    if data.was_replaced():
        note = "holds other data by now: this run was trained and scored on what was there when it began"
        print(f"note: {printable(data.folder)} {note}", file=sys.stderr)
    summary |= {"tiles": decided.tiles.digest, "total_seconds": state.seconds, **record.beginning()}
    record.wait_for_turn(watchdog.phase)
    summary |= record.finish(findings)
    print_summary({**summary, "run": printable(folder.path)})  # before the files, for which a disk may have no room
    folder.write_model(masters)
    folder.write_summary({**summary, "fingerprint": evaluation.fingerprint, "seconds": record.seconds})
    sample = sampled(step.model, data, config.ops)
    folder.write_sample(sample)
    folder.tell(summary, sample)
    draw_curves(folder.path)
    if not config.keep_checkpoints:
        shutil.rmtree(folder.checkpoints, ignore_errors=True)
    return summary


def check_checksums(checksums: list[str]) -> list[str]:
    """Whether every rank has trained the same model."""
    other = [str(rank) for rank, checksum in enumerate(checksums) if checksum != checksums[0]]
    return [f"ranks: the parameters on rank {', '.join(other)} are not those on rank 0"] if other else []


def audited(config: TrainConfig, score: Score, model: GPT, data: Dataset) -> list[str]:
    """What the audit finds. One that cannot be carried through is a finding too: what was measured stays."""
    try:
        return halving(
            lambda rows: audit(score, model, data, config.ops, config.seq_len, config.packing, batch_size=rows),
            config.device_batch_size, config.device,
        )  # fmt: skip
    except Exception as error:
        if not is_out_of_memory(error):
            traceback.print_exc()
        return [f"not done: {type(error).__name__}: {' '.join(str(error).split())}"]


def summarise(
    config: TrainConfig, model: GPTConfig, state: RunState, evaluation: Evaluation, ready: float, ranks: Ranks
) -> dict[str, Value]:
    """What the summary says; the first nine keys keep their names and their order, and more may follow. Of a resumed
    run, what the result rests on: every process up to the checkpoint that the next went on from."""
    budget = state.budget
    device = torch.device(config.device)
    timed_tokens = budget.timed_steps * config.total_batch_size
    pace = timed_tokens / budget.timed_seconds if budget.timed_seconds else 0.0
    used = utilisation(model, device, pace, ranks.size)
    peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else 0.0
    peak, rss = ranks.agree(peak, peak_rss_bytes() / 2**20)
    return {
        "val_bpb": evaluation.bpb,
        "training_seconds": budget.timed_seconds,
        "total_seconds": state.seconds,
        "peak_vram_mb": peak,
        "mfu_percent": used.mfu,
        "total_tokens_M": budget.step * config.total_batch_size / 1e6,
        "num_steps": budget.step,
        "num_params_M": count_parameters(model)["total"] / 1e6,
        "depth": config.depth,
        "unigram_bpb": evaluation.unigram_bpb,
        "mfu_causal_percent": used.mfu_causal,
        "mfu_device_percent": used.mfu_device,
        "tokens_per_second": pace,
        "untimed_seconds": budget.untimed_seconds,
        "untimed_steps": budget.step - budget.timed_steps,
        "overshoot_seconds": budget.overshoot,
        "checkpoint_seconds": state.blocked_seconds,
        **({"eval_seconds": state.evaluated.seconds} if state.evaluated.seconds else {}),
        **({"ranks": ranks.size, "sums": config.sums} if ranks.size > 1 else {}),
        **({"stopped_seconds": budget.stopped_seconds} if budget.stopped_seconds else {}),
        "resumes": state.resumes,
        "seconds_to_first_step": ready,
        "peak_rss_mb": rss,
        "val_rows": evaluation.rows,
        "val_bytes": evaluation.bytes_scored,
        "val_cropped_percent": 100 * evaluation.cropped_share,
        "recipe": config.recipe,
        "packing": config.packing,
        "train_cropped_percent": 100 * state.loader.cropped_share,
        "val_sha256": evaluation.fingerprint["split_sha256"][:16],
        "tokenizer_sha256": evaluation.fingerprint["tokenizer_sha256"][:16],
        "seed": config.seed,
        # What `judge.differences` asks.
        "comparable": "with equal fingerprint, budget and machine"
                      + ", and from the same weights" * bool(config.init_from)
                      + "; with no published number (CPU defaults)" * (config.device == "cpu"),
    }
