"""What is advised from which paces, by machines that are made up; and real steps, whose pace no test looks at."""

import shlex
from types import SimpleNamespace

import pytest

import prepare.__main__
from model.gpt import matrix_parameters
from prepare import InputError
from train import advise, doctor
from train.advise import TOKENS_A_PARAMETER, Measured, said, search, seconds_of
from train.config import TrainConfig, parse_given, resolve

PLAIN = 54_500 * 655_488  # parameters times tokens a second, where the recipe was found
VOCABULARY = 2048


@pytest.fixture(autouse=True)
def room(monkeypatch):
    """Memory for whatever is asked for."""
    monkeypatch.setattr(advise, "largest_batch", lambda config, shape, available, at_most: at_most)


@pytest.fixture
def config():
    return resolve(TrainConfig(ops="cpu"), "cpu")


def machine(speed: float, by_rows=None):
    """A pace that goes with one over the parameters."""
    def pace(config, shape):
        return speed * PLAIN / matrix_parameters(shape) * (by_rows or {}).get(config.device_batch_size, 1.0)

    return pace


def looked(config, pace) -> tuple[list[tuple[int, int]], Measured]:
    """Which shapes were measured, depth and rows, and the advice."""
    found = [*search(config, VOCABULARY, pace)]
    return [(m.config.depth, m.config.device_batch_size) for m, _ in found], found[-1][1]


@pytest.mark.parametrize(("speed", "depths", "advised"), [
    (1.0, [2, 1], 2),  # the machine of the recipe: its own depth
    (1 / 30, [2, 1], 1),
    (30.0, [2, 3, 4], 4),
    (4.0, [2, 3], 3),
    (1e9, [2, 3, 4, 5, 6], 6),  # no longer than half a minute
])  # fmt: skip
def test_the_depth_goes_with_the_machine(config, speed, depths, advised):
    shapes, best = looked(config, machine(speed / 1.0001))
    assert [depth for depth, rows in shapes if rows == 4] == depths
    assert best.config.depth == advised
    assert best.shape.d_model == 64 * advised
    assert best.config.device_batch_size == 4


def test_a_longer_run_takes_a_deeper_model(config):
    longer = resolve(TrainConfig(ops="cpu", time_budget=3600.0), "cpu")
    assert looked(longer, machine(1.0))[1].config.depth > looked(config, machine(1.0))[1].config.depth


@pytest.mark.parametrize(("by_rows", "advised"), [({2: 1.1}, 2), ({2: 1.1, 1: 1.2}, 1), ({2: 1.2, 1: 1.1}, 2),
                                                  ({2: 1.02, 1: 1.029}, 4), ({2: 0.5}, 4)])  # fmt: skip
def test_fewer_rows_at_a_time_where_they_are_faster(config, by_rows, advised):
    shapes, best = looked(config, machine(1.0, by_rows))
    assert [rows for _, rows in shapes][-2:] == [2, 1]
    assert best.config.device_batch_size == advised
    assert best.config.total_batch_size == 4096


def test_what_does_not_fit_is_not_measured(config, monkeypatch):
    monkeypatch.setattr(advise, "largest_batch", lambda config, shape, available, at_most:
                        0 if config.depth > 2 else min(2, at_most))  # fmt: skip
    shapes, best = looked(config, machine(30.0))
    assert {depth for depth, _ in shapes} == {2}
    assert (best.config.depth, best.config.device_batch_size) == (2, 2)
    monkeypatch.setattr(advise, "largest_batch", lambda *_: 0)
    with pytest.raises(InputError, match="not one row"):
        looked(config, machine(30.0))


def measured(tokens_per_second=54_500.0, **options) -> Measured:
    config = resolve(TrainConfig(ops="cpu", **options), "cpu")
    return Measured(config, config.model_config(VOCABULARY), tokens_per_second)


def test_the_number_of_the_rule_is_that_of_the_run_it_comes_from():
    assert measured().tokens_a_parameter == pytest.approx(TOKENS_A_PARAMETER["cpu"], rel=0.01)
    shape = resolve(TrainConfig(ops="reference"), "cuda").model_config(8192)
    assert 499.6e6 / matrix_parameters(shape) == pytest.approx(TOKENS_A_PARAMETER["published"], rel=0.01)


def lines(best, corpus_tokens=10**7, folder=None) -> dict[str, str]:
    return {line[:9].strip(): line[9:] for line in said(best, corpus_tokens, folder)}


@pytest.mark.parametrize("options", [{}, {"depth": 3, "device_batch_size": 2}, {"time_budget": 90.0}])
def test_the_command_trains_what_was_measured(options):
    best = measured(**options)
    words = shlex.split(lines(best)["command:"])
    assert words[1:3] == ["-m", "train"]
    assert resolve(TrainConfig(ops="cpu", **parse_given(words[3:])), "cpu") == best.config
    assert ("--time-budget" in words) == ("time_budget" in options)


def test_a_prediction():
    assert lines(measured())["predict:"] == "3.27M tokens, 1.86e+13 FLOPs, 0.33 passes over the corpus, in 60 s"
    assert "passes" not in lines(measured(), None)["predict:"]


def test_more_text_is_asked_for_where_a_run_would_pass_over_it_often(monkeypatch, tmp_path):
    monkeypatch.setenv("TIMEBOX_HOME", str(tmp_path))
    best = measured(tokens_per_second=1e7)  # 600M tokens a minute
    assert "first:" not in lines(best, 150_000_001)
    found = lines(best, 149_999_999)
    words = shlex.split(found["first:"])
    assert words[1:3] == ["-m", "prepare"]
    given = prepare.__main__._parser().parse_args(words[3:])
    assert (given.source, given.shards, given.vocab_size) == ("fineweb-edu", 1, VOCABULARY)
    assert shlex.split(found["command:"])[-2:] == ["--data", str(tmp_path / "fineweb-edu")]
    assert "--shards 14 " in lines(measured(tokens_per_second=1e9), 1)["first:"]


def test_time_is_of_whole_calls(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(advise, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def one():
        now[0] += 1.5

    assert seconds_of(one, "cpu") == (4.5, 3)
    monkeypatch.setattr(advise, "SECONDS", 7.0)
    assert seconds_of(one, "cpu") == (7.5, 5)


def advice(capsys, *arguments) -> list[str]:
    assert doctor.main(["--advise", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(("again", "others"), [(1.0, 0.0), (0.8, 0.0), (1.0, 0.5)])
def test_what_makes_a_pace_uncertain_is_said(capsys, monkeypatch, small_data, again, others):
    paces = iter([20_000.0, 50_000.0, 1.0, 1.0, 20_000.0 * again])
    monkeypatch.setattr(advise, "timed", lambda *_: next(paces))
    monkeypatch.setattr(advise, "Load", lambda device: SimpleNamespace(end=lambda: {"other_cores": others}))
    monkeypatch.setattr(advise, "TOKENS_A_PARAMETER", {"cpu": 4.0})  # between the two
    printed = advice(capsys, "--data", str(small_data))
    notes = [line for line in printed if line.startswith("note:")]
    assert [("25%" in line, "0.5 cores" in line) for line in notes] == (
        [(True, False)] if again < 1 else [(False, True)] if others else []
    )
    mean = 2 / (1 / 20_000 + 1 / (20_000 * again))
    assert f"predict: {mean * 60 / 1e6:.2f}M tokens" in "\n".join(printed)
    last = next(line for line in printed if line.endswith("(again)"))
    assert last.split()[:4] == ["2", "128", "4", f"{20_000 * again:,.0f}"]


@pytest.mark.parametrize("corpus", [True, False])
def test_real_steps(capsys, monkeypatch, small_data, tmp_path, corpus):
    monkeypatch.setenv("TIMEBOX_HOME", str(tmp_path))
    for name, value in {"SECONDS": 0.0, "LEAST_STEPS": 1, "WARM_UP": 0, "MOST_DEPTHS": 1, "LESS_ROWS": (),
                        "MANY_PASSES": 1e9}.items():  # fmt: skip
        monkeypatch.setattr(advise, name, value)
    printed = advice(capsys, *(["--data", str(small_data)] if corpus else []))
    assert printed[1] == f"steps:   of {small_data if corpus else 'random tokens: no corpus is prepared yet'}"
    assert [line.split()[:3] for line in printed[3:5]] == [["2", "128", "4"]] * 2
    assert printed[-1].startswith("command: ")
    assert (str(small_data) in printed[-1]) == corpus
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(("arguments", "line"), [
    (["--advise", "--time-budget", "0"], "--time-budget 0 must be"),
    (["--advise", "--time-budget", "nan"], "--time-budget nan must be"),
    (["--advise", "--data", "/no/such/folder"], "/no/such/folder holds no prepared data"),
])  # fmt: skip
def test_what_is_refused(capsys, arguments, line):
    assert doctor.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {line}")
    assert error.count("\n") == 1


def test_a_budget_without_advice_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        doctor.main(["--time-budget", "3"])
