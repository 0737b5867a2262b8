"""What the host does with a GPU: on a real one, and on one that is pretended, where mistakes of timing show."""

import json

import pytest
import torch
from safetensors.torch import load_file

import kernels
import train.device
from prepare import Batch
from tests.helpers.kernel_checks import exact_bfloat16
from tests.helpers.small_step import SHAPE, make_step
from tests.helpers.tiny_run import assert_same, losses, run_main
from train.config import TrainConfig, resolve
from train.resilience.checkpoint import checkpoint_folders, read_checkpoint
from train.results.evals import read_evals
from train.schedule import StepValues

pretended = pytest.mark.parametrize("gpu", ["pretended"], indirect=True)


@pretended
def test_a_result_is_there_when_it_was_waited_for(gpu):
    x = torch.full((4,), 3.0, device="cuda")
    result = (x * 2).to("cpu", non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    (x * 3).add_(1)
    assert result.isnan().all()
    done.synchronize()
    assert result.tolist() == [6.0] * 4
    assert len(gpu.default.queue) == 2  # what came after the event
    assert (x * 3).tolist() == [9.0] * 4
    assert gpu.waited == {"a copy": 1}


@pretended
@pytest.mark.parametrize("waits", [True, False])
def test_streams_go_their_own_ways(gpu, waits):
    """As the loader's batches: filled and copied on a stream of their own."""
    side = torch.cuda.Stream()
    host = torch.empty(3, pin_memory=True).fill_(7.0)
    with torch.cuda.stream(side):
        x = host.to("cuda", non_blocking=True)
    if waits:
        torch.cuda.current_stream().wait_stream(side)
    y = (x + 1).cpu()
    assert y.tolist() == [8.0] * 3 if waits else y.isnan().all()


@pretended
@pytest.mark.parametrize("pinned", [True, False])
def test_a_buffer_written_again_spoils_the_copy_under_way(gpu, pinned):
    host = torch.zeros(3, pin_memory=pinned)
    x = torch.empty(3, device="cuda")
    x.copy_(host, non_blocking=True)
    host.fill_(5.0)
    assert x.tolist() == [5.0 if pinned else 0.0] * 3


@pretended
def test_a_graph_knows_what_is_on_the_device_and_not_what_the_host_thinks(gpu):
    rate, on_device = 2.0, torch.full((), 2.0, device="cuda")
    x, y = torch.ones(2, device="cuda"), torch.ones(2, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.mul_(rate)
        y.mul_(on_device)
    assert (x.tolist(), y.tolist()) == ([1.0] * 2, [1.0] * 2)  # captured is not done
    rate = 5.0
    on_device.fill_(5.0)
    graph.replay()
    assert (x.tolist(), y.tolist()) == ([2.0] * 2, [5.0] * 2)


@pretended
@pytest.mark.parametrize("mistake", ["item", "bool", "a copy", "an index", "synchronize"])
def test_nothing_waits_in_a_capture(gpu, mistake):
    x = torch.ones(2, device="cuda")
    wait = {
        "item": lambda: x.sum().item(),
        "bool": lambda: bool((x > 0).all()),
        "a copy": lambda: torch.zeros(2).to("cuda", non_blocking=True),
        "an index": lambda: x[x > 0],
        "synchronize": torch.cuda.synchronize,
    }[mistake]
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):  # noqa: SIM117
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            wait()
    wait()


@pretended
def test_host_and_device_do_not_mix(gpu):
    with pytest.raises(RuntimeError, match="should be on cuda:0"):
        torch.ones(2, device="cuda") + torch.ones(2)
    with pytest.raises(TypeError, match="cuda:0"):
        torch.ones(2, device="cuda").numpy()


def test_a_run_as_graphs_is_the_run_without(gpu, small_data, tmp_path, monkeypatch, capsys):
    """From the command line to the summary: batches by the loader's stream, checkpoints, evaluation, audit."""
    options = ["--device", "cuda", "--depth", "1", "--steps", "5", "--eval-tokens", "512", "--checkpoint-every", "0"]
    options += ["--keep-checkpoints", "--device-batch-size", "16", "--total-batch-size", "1024"]  # the audit likes rows
    if gpu:
        options += ["--ops", "reference"]
        monkeypatch.setattr(train.device, "pick_graphs", lambda wanted, *_: wanted is None)
    runs = {"replayed": [], "eager": ["--no-graphs"], "evaluated": ["--eval-every", "2"]}
    for name, more in runs.items():
        assert run_main(small_data, tmp_path / name, *options, *more) == 0, capsys.readouterr().err
        assert json.loads((tmp_path / name / "config.json").read_text())["config"]["graphs"] == (name != "eager")
    assert_same(tmp_path / "replayed", tmp_path / "eager")
    assert_same(tmp_path / "replayed", tmp_path / "evaluated")  # between replays, in memory of its own
    assert [row["step"] for row in read_evals(tmp_path / "evaluated")] == [2, 4]
    assert len(set(losses(tmp_path / "eager"))) == 5
    end = read_checkpoint(checkpoint_folders(tmp_path / "replayed" / "checkpoints")[0]).tensors()
    for name, weight in load_file(tmp_path / "replayed" / "model.safetensors").items():
        assert torch.equal(weight, end[f"master.{name}"]), name
    summary = json.loads((tmp_path / "replayed" / "summary.json").read_text())
    assert summary["audit"] == "ok"


@pretended
def test_the_kernels_too_are_replayed(gpu, monkeypatch):
    """One step: the launches that a capture notes down are those of the eager step."""
    exact_bfloat16(monkeypatch)
    kernels.set_ops("triton")
    config = resolve(
        TrainConfig(depth=1, d_model=32, head_dim=16, seq_len=32, device_batch_size=4, total_batch_size=128), "cuda"
    )
    eager, replayed = (make_step("cuda", torch.bfloat16, config, vocab_size=64) for _ in range(2))
    values = [StepValues(0, lr_multiplier=1.0, momentum=0.85, weight_decay=0.2), StepValues(1, 0.5, 0.9, 0.1)]
    tokens = torch.randint(64, SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    batch = Batch(tokens=tokens.to("cuda"), epoch=1, index=0, state={})
    monkeypatch.setattr(replayed, "rehearse", lambda *args: type(replayed).rehearse(replayed, *args, times=1))
    replayed.capture(SHAPE, 1, values[0])
    (loss, good), (loss_replayed, good_replayed) = eager([batch], values[1]), replayed([batch], values[1])
    assert good
    assert good_replayed
    assert torch.equal(loss, loss_replayed)
    for (name, a), b in zip(eager.optimizer.masters.items(), replayed.optimizer.masters.values(), strict=True):
        assert torch.equal(a, b), name
