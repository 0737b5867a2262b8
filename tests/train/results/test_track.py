"""Trackers: what they are told, and that none of them costs a run anything. The real wandb and trackio have their tests
in tests/extras."""

import json
import sys
from threading import Event, Timer
from types import ModuleType, SimpleNamespace

import pytest

from prepare import InputError
from prepare.words import install_line
from tests.helpers.ranks import run_ranks
from tests.helpers.stopped_run import interrupt, main
from tests.helpers.tiny_run import rows, run_main
from train.config import TrainConfig, parse_given, to_args
from train.results import track
from train.results.ledger import Ledger
from train.results.track import tensorboard, wandb
from train.results.track.about import numbers, told_data


class Heard:
    """A tracker's module: what its writer is told it keeps. `fault`, by the name of a call: what is done then."""

    def __init__(self, **fault):
        self.fault, self.told, self.abandoned = fault, [], 0

    def load(self):
        self.act("load")

    def said(self, about):
        return "a test"

    def abandon(self):
        self.abandoned += 1

    def Writer(self, about):  # noqa: N802 -- a class, in the modules
        self.about = about
        self.act("init")
        return self

    def act(self, call, *told):
        self.told.append((call, *told))
        if fault := self.fault.get(call):
            fault()

    def step(self, row):
        self.act("step", row)

    def end(self, summary, sample):
        self.act("end", summary, sample)

    def close(self, finished):
        self.act("close", finished)

    def of(self, call):
        return [told for name, *told in self.told if name == call]


def fails():
    raise RuntimeError("no route\nto host")


def never_returns():
    Event().wait()


@pytest.fixture
def heard(monkeypatch):
    """In place of wandb and TensorBoard."""
    modules = {"wandb": Heard(), "tensorboard": Heard()}
    for name, module in modules.items():
        monkeypatch.setitem(track.MODULES, name, module)
    return SimpleNamespace(**modules)


@pytest.mark.parametrize(("given", "config"), [
    (["--track", "wandb"], "wandb"),
    (["--track", "tensorboard, wandb,wandb"], "tensorboard,wandb"),
    (["--track", "wandb", "--track=tensorboard"], "wandb,tensorboard"),
    (["--track", "none"], ""),
    (["--track="], ""),
    ([], None),
])  # fmt: skip
def test_how_trackers_are_named(given, config):
    parsed = TrainConfig(**parse_given(given))
    assert parsed.track == config
    assert TrainConfig(**parse_given(to_args(parsed))) == parsed


@pytest.mark.parametrize(("given", "line"), [
    (["--track", "wandbd"], "argument --track: 'wandbd' is none of tensorboard, wandb, trackio, none: did you"
                            " mean wandb?"),
    (["--track", "x"], "argument --track: 'x' is none of tensorboard, wandb, trackio, none"),
    (["--tensorboard"], "unknown argument --tensorboard: did you mean --track tensorboard?"),
])  # fmt: skip
def test_what_names_no_tracker(given, line, capsys):
    assert main(*given) == 2
    assert capsys.readouterr().err == f"error: {line}\n"


@pytest.mark.parametrize(("saved", "track"), [
    ({"tensorboard": True}, "tensorboard"), ({"tensorboard": False}, None), ({}, None),
    ({"tensorboard": True, "track": "wandb"}, "wandb"),
])  # fmt: skip
def test_a_configuration_of_before_there_were_trackers(saved, track):
    assert TrainConfig.from_json(saved).track == track


def test_a_run_of_before_goes_on(corpus, tmp_path, heard):
    folder = interrupt(corpus, tmp_path / "run", "--steps", "6", step=2)
    saved = json.loads((folder / "config.json").read_text())
    del saved["config"]["track"]
    saved["config"]["tensorboard"] = True
    (folder / "config.json").write_text(json.dumps(saved))
    assert main("--resume", str(folder)) == 0
    assert [row["step"] for (row,) in heard.tensorboard.of("step")] == [3, 4, 5]


def test_what_trackers_are_told(corpus, tmp_path, heard, capfd):
    """The same, each of them: configuration, rows, summary, sample."""
    run = tmp_path / "run"
    given = ["--steps", "3", "--track", "wandb,tensorboard", "--group", "g", "--description", "what it tries"]
    assert run_main(corpus, run, *given) == 0
    captured = capfd.readouterr()
    assert "\ntrack:  a test, a test\n" in captured.out
    assert captured.err == ""
    assert heard.wandb.told == heard.tensorboard.told
    assert heard.wandb.about == heard.tensorboard.about
    about, logged = heard.wandb.about, rows(run)
    assert (about.name, about.group, about.description, about.first_step) == ("run", "g", "what it tries", 0)
    assert about.config["depth"] == 2
    assert about.config["model"]["vocab_size"] == 512
    assert about.config["data"]["val_sha256"] == json.loads((run / "config.json").read_text())["data"]["val_sha256"]
    told = json.dumps(about.config)
    assert str(tmp_path) not in told
    assert str(corpus.parent) not in told
    assert heard.wandb.of("step") == [[numbers(row)] for row in logged]
    assert numbers(logged[0]).keys() >= {"step", "loss", "smooth_loss", "lr_multiplier", "tokens_per_second"}
    ((summary, sample),) = heard.wandb.of("end")
    written = json.loads((run / "summary.json").read_text())
    assert summary == {key: written[key] for key in summary}
    assert summary.keys() >= {"val_bpb", "verdict", "audit", "status", "recipe"}
    assert sample == (run / "sample.txt").read_text(errors="replace")
    assert heard.wandb.of("close") == [[True]]
    assert heard.wandb.abandoned == 0
    assert "--track" not in " ".join(Ledger(tmp_path).runs()[0]["flags"])


@pytest.mark.parametrize("source", ["/home/me/texts/mine", "/home/me/texts/mine/", "mine"])
def test_a_corpus_is_known_by_its_last_name(source):
    assert told_data({"source": source, "val_sha256": "v"}) == {"source": "mine", "val_sha256": "v"}


def test_numbers_alone_are_drawn():
    row = {"step": 1, "loss": 2.5, "mfu": None, "inf": float("inf"), "nan": float("nan"), "word": "x", "yes": True}
    assert numbers(row) == {"step": 1, "loss": 2.5}


@pytest.mark.parametrize("call", ["init", "step", "end", "close"])
@pytest.mark.parametrize("how", [fails, sys.exit, never_returns])
def test_a_broken_tracker_costs_the_run_nothing(corpus, tmp_path, heard, monkeypatch, capfd, call, how):
    monkeypatch.setattr(track, "PATIENCE", 0.05 if how is never_returns else 30.0)
    heard.wandb.fault[call] = how
    assert run_main(corpus, tmp_path / "run", "--steps", "3", "--track", "wandb,tensorboard") == 0
    captured = capfd.readouterr()
    word = {fails: "RuntimeError: no route to host", sys.exit: "SystemExit",
            never_returns: f"it does not {'start' if call == 'init' else 'end'} within 0 s"}[how]  # fmt: skip
    assert captured.err == f"note: --track wandb is dropped, and the run goes on: {word}\n"
    assert heard.wandb.abandoned == 1
    (row,) = Ledger(tmp_path).runs()
    assert (row["outcome"], row["audit"]) == ("finished", "ok")
    assert [name for name, *_ in heard.tensorboard.told] == ["load", "init", "step", "step", "step", "end", "close"]


def test_a_run_waits_until_its_trackers_have_started(tmp_path, heard, capfd):
    """They would slow down its first steps."""
    go = Event()
    heard.wandb.fault["init"] = go.wait
    timer = Timer(0.2, go.set)
    timer.start()
    tracking = track.Tracking("wandb", SimpleNamespace(folder=tmp_path))
    assert go.is_set()
    tracking.close()
    assert capfd.readouterr().err == ""


def test_a_tracker_that_does_not_keep_up_is_dropped(corpus, tmp_path, heard, monkeypatch, capfd):
    monkeypatch.setattr(track, "BACKLOG", 2)
    monkeypatch.setattr(track, "PATIENCE", 0.05)
    heard.wandb.fault["step"] = never_returns
    assert run_main(corpus, tmp_path / "run", "--steps", "9", "--track", "wandb") == 0
    assert capfd.readouterr().err == "note: --track wandb is dropped, and the run goes on: it is 2 rows behind\n"
    assert len(rows(tmp_path / "run")) == 9


@pytest.mark.parametrize(("error", "said"), [
    (ModuleNotFoundError("No module named 'wandb'", name="wandb"), "the package is not installed: "),
    (ModuleNotFoundError("No module named 'odd'", name="odd"), "its package odd is not installed: "),
    (AttributeError("no attribute\n'x'"), "the package cannot be imported (AttributeError: no attribute 'x'): "),
])  # fmt: skip
def test_a_tracker_that_is_not_there(corpus, tmp_path, heard, capsys, error, said):
    def raises():
        raise error

    heard.wandb.fault["load"] = raises
    assert run_main(corpus, tmp_path / "run", "--track", "tensorboard,wandb") == 2
    line = install_line("-e", ".[wandb]")
    assert capsys.readouterr().err == f"error: --track wandb: {said}{line}, or leave the flag out\n"
    assert not (tmp_path / "run").exists()


def test_tensorboard_that_is_not_installed(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert run_main(corpus, tmp_path / "run", "--track", "tensorboard") == 2
    assert install_line("-e", ".[tensorboard]") in capsys.readouterr().err


def test_a_run_that_was_interrupted_says_so_and_goes_on(corpus, tmp_path, heard):
    folder = interrupt(corpus, tmp_path / "run", "--steps", "6", "--track", "wandb", step=2)
    assert heard.wandb.of("close") == [[False]]
    assert heard.wandb.of("end") == []
    heard.wandb.told.clear()
    assert main("--resume", str(folder)) == 0
    assert heard.wandb.about.first_step == 3
    assert [row["step"] for (row,) in heard.wandb.of("step")] == [3, 4, 5]
    assert heard.wandb.of("close") == [[True]]


def test_a_resumed_run_may_have_other_trackers(corpus, tmp_path, heard):
    folder = interrupt(corpus, tmp_path / "run", "--steps", "6", "--track", "wandb", step=2)
    heard.wandb.told.clear()
    assert main("--resume", str(folder), "--track", "none") == 0
    assert heard.wandb.told == heard.tensorboard.told == []


def test_the_ids_of_a_run_stay(tmp_path):
    first = wandb.id_of(tmp_path, "wandb")
    assert first == wandb.id_of(tmp_path, "wandb") != wandb.id_of(tmp_path, "trackio")
    (tmp_path / "other").mkdir()
    assert wandb.id_of(tmp_path / "other", "wandb") != first


def saying_what_is_told(rank: int) -> None:
    module = Heard()
    module.act = lambda call, *told: print(f"{call} on rank {rank}", flush=True)
    track.MODULES["wandb"] = module


def test_rank_0_alone_tracks(corpus, tmp_path):
    given = ["--data", str(corpus), "--run-dir", str(tmp_path / "run"), "--steps", "2", "--track", "wandb"]
    ended = run_ranks(2, tmp_path / "streams", *given, before=saying_what_is_told)
    assert [each.code for each in ended] == [0, 0], ended
    assert [line for line in ended[0].out.splitlines() if "on rank" in line] == [
        f"{call} on rank 0" for call in ("load", "init", "step", "step", "end", "close")
    ]
    assert "on rank" not in ended[1].out


@pytest.mark.parametrize(("environment", "netrc", "mode"), [
    ({}, "", "offline"),
    ({"WANDB_API_KEY": "k" * 40}, "", "online"),
    ({}, "machine api.wandb.ai login user password k", "online"),
    ({}, "machine example.org login user password k", "offline"),
    ({"WANDB_BASE_URL": "https://wandb.example.org:8080"}, "machine wandb.example.org login user password k", "online"),
    ({}, "no netrc at all", "offline"),
    ({"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "", "offline"),
])  # fmt: skip
def test_wandb_sends_where_there_is_a_key(tmp_path, monkeypatch, environment, netrc, mode):
    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb"))
    keyless(monkeypatch, tmp_path, environment)
    (tmp_path / "netrc").write_text(netrc)
    assert wandb.mode() == mode
    wandb.load()


def test_wandb_never_asks_for_a_key(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb"))
    keyless(monkeypatch, tmp_path, {"WANDB_MODE": "online"})
    with pytest.raises(InputError, match="WANDB_MODE is online, and there is no key: wandb login"):
        wandb.load()


def keyless(monkeypatch, folder, environment):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    for name, value in (environment | {"NETRC": str(folder / "netrc")}).items():
        monkeypatch.setenv(name, value)


def events_of(folder):
    EventAccumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


def text_of(events, name):
    return events.Tensors(f"{name}/text_summary")[-1].tensor_proto.string_val[0].decode()


def test_event_files(corpus, tmp_path):
    run = tmp_path / "run"
    assert run_main(corpus, run, "--steps", "3", "--track", "tensorboard") == 0
    events, logged = events_of(run), rows(run)
    for name in ("loss", "smooth_loss", "lr_multiplier", "tokens_per_second"):
        scalars = events.Scalars(name)
        assert [scalar.step for scalar in scalars] == [0, 1, 2]
        assert [scalar.value for scalar in scalars] == pytest.approx([row[name] for row in logged], rel=1e-6)
    assert not {"mfu", "step"} & {*events.Tags()["scalars"]}  # there is no MFU on a CPU
    summary = json.loads((run / "summary.json").read_text())
    assert events.Scalars("summary/val_bpb")[0].value == pytest.approx(summary["val_bpb"], rel=1e-6)
    assert text_of(events, "verdict") == tensorboard.as_code(summary["verdict"])
    assert text_of(events, "sample") == tensorboard.as_code((run / "sample.txt").read_text(errors="replace"))
    assert '"depth": 2' in text_of(events, "config")
    assert '"verdict": "baseline"' in text_of(events, "summary")


def test_event_files_of_a_resumed_run_show_each_step_once(corpus, tmp_path):
    """Also those that were made after the last checkpoint, and are made again."""
    pytest.importorskip("tensorboard")
    about = SimpleNamespace(folder=tmp_path, name="n", group="g", description="", config={}, first_step=0)
    for first, steps, loss in ((0, range(5), 1.0), (3, range(3, 7), 2.0)):
        about.first_step = first
        writer = tensorboard.Writer(about)
        for step in steps:
            writer.step({"step": step, "loss": loss})
        writer.close(False)
    shown = [(scalar.step, scalar.value) for scalar in events_of(tmp_path).Scalars("loss")]
    assert shown == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0), (6, 2.0)]


def test_trackers_hear_of_evaluations_on_the_way(heard, corpus, tmp_path):
    """Beside the rows of the steps, each at the step that it came after."""
    assert run_main(corpus, tmp_path / "run", "--steps", "4", "--eval-every", "2", "--track", "wandb") == 0
    told = [row for (row,) in heard.wandb.of("step") if "eval_val_bpb" in row]
    kept = [json.loads(line) for line in (tmp_path / "run" / "evals.jsonl").read_text().splitlines()]
    assert told == [{"step": row["step"], "eval_val_bpb": row["val_bpb"]} for row in kept]
    assert len(told) == 2
