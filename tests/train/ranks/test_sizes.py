"""What knows how many ranks there are: the default rows, the memory of each, the bytes that they send, their GPUs."""

import os
import signal
import time

import pytest
import torch

import train.__main__
from model import GPTConfig
from prepare import InputError
from tests.helpers.ranks import run_ranks
from train import doctor
from train.config import TrainConfig, resolve
from train.memory import check_fits, count, largest_batch
from train.place import Place, place_of, take_one_gpu
from train.ranks import Ranks
from train.ranks.parts import Cut
from train.ranks.traffic import traffic_of
from train.resilience.signals import Interrupted, Signals


@pytest.mark.parametrize(("ranks", "rows"), [(1, 128), (2, 128), (4, 64), (8, 32), (16, 16)])
def test_the_total_stays_and_every_rank_has_a_micro_batch(ranks, rows):
    config = resolve(TrainConfig(), "cuda", ranks)
    assert (config.total_batch_size, config.device_batch_size) == (524_288, rows)
    assert config.grad_accum_steps % ranks == 0


@pytest.mark.parametrize(("ranks", "rows"), [(1, 4), (2, 2), (4, 1)])
def test_the_total_of_a_cpu_stays_too(ranks, rows):
    config = resolve(TrainConfig(), "cpu", ranks)
    assert (config.total_batch_size, config.device_batch_size) == (4096, rows)


def test_a_number_that_cannot_be_shared_names_one_that_can():
    with pytest.raises(InputError, match=r"^8 ranks cannot share the 1 micro-steps .*: use --total-batch-size 32768$"):
        resolve(TrainConfig(), "cpu", 8)
    with pytest.raises(InputError, match=r"^4 ranks .* 2 micro-steps .*: use --device-batch-size 64, or --total-batch-size 1048576$"):  # fmt: skip  # noqa: E501
        resolve(TrainConfig(device_batch_size=128), "cuda", 4)
    assert resolve(TrainConfig(device_batch_size=64), "cuda", 4).grad_accum_steps == 4


def test_the_state_of_a_rank_shrinks_as_predicted():
    """fp32 masters and moments are divided; gradients, and the copies in bf16 that the forward reads, are not."""
    config = resolve(TrainConfig(ops="triton"), "cuda", 8)
    shape = GPTConfig()
    alone, eight = (count(config, shape, 1, ranks=Ranks(Place(size=size))).state for size in (1, 8))
    P, adamw = 50.33e6, 25.17e6
    divided = 4 * (P + P + adamw)  # masters, a first moment of each, a second one of what AdamW has
    largest = 4 * 4 * 8192 * 512  # bytes: received of the value embeddings at once
    sums = 4 * P  # kept apart from the gradients; a rank's part of them alone
    assert alone == pytest.approx(divided + sums + (4 + 2) * P, rel=0.01)
    assert eight == pytest.approx((divided + sums) / 8 + (4 + 2) * P + largest, rel=0.01)


def test_ranks_on_a_cpu_share_its_memory(monkeypatch):
    config = resolve(TrainConfig(), "cpu", 2)
    shape, ranks = config.model_config(2048), Ranks(Place(0, 2, 0, 2))
    needed = count(config, shape, 2, ranks=ranks).on("cpu")
    monkeypatch.setattr("train.memory.available_bytes", lambda device: 2 * needed)
    check_fits(config, shape, ranks)
    monkeypatch.setattr("train.memory.available_bytes", lambda device: 2 * needed - 2)
    with pytest.raises(InputError, match=r"^2 rows of 1024 tokens need .*: use --device-batch-size 1$"):
        check_fits(config, shape, ranks)


def test_fewer_rows_leave_every_rank_its_share():
    config = resolve(TrainConfig(depth=2, d_model=64, head_dim=16, seq_len=32, total_batch_size=768), "cpu", 4)
    shape = config.model_config(300)
    assert largest_batch(config, shape, float("inf"), 5, Ranks(Place(size=4))) == 3  # 24 rows, 6 a rank


def test_bytes_of_a_step():
    """Of the published model on eight: each sends seven eighths of 50.33M gradients, and of the copies in bf16."""
    sent = traffic_of(resolve(TrainConfig(), "cuda", 8), GPTConfig(), 8)
    assert sent.exchange == pytest.approx(4 * 50.33e6 * 7 / 8, rel=1e-3)
    assert sent.gather == pytest.approx(2 * 50.33e6 * 7 / 8, rel=1e-3)
    assert (sent.exchanges, sent.calls) == (1, 10)
    native = traffic_of(resolve(TrainConfig(sums="native", device_batch_size=16), "cuda", 8), GPTConfig(), 8)
    ordered = traffic_of(resolve(TrainConfig(device_batch_size=16), "cuda", 8), GPTConfig(), 8)
    assert (native.exchanges, ordered.exchanges) == (1, 2)
    assert native.bytes < ordered.bytes == 2 * ordered.exchange + ordered.gather


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_a_cut_covers_everything_once(size):
    whole = torch.arange(3 * 5 * 7.0).view(3, 5, 7)
    for rows in (True, False):
        own = []
        for rank in range(size):
            cut = Cut.of(whole.shape, rows, Ranks(Place(rank, size)))
            flat = torch.full((cut.padded,), -1.0)
            cut.whole(flat).copy_(whole)
            own.append(cut.own(flat[cut.begin : cut.begin + cut.part]).flatten())
        assert torch.equal(torch.cat(own), whole.flatten())


def test_matrices_that_belong_together_stay_together():
    """Nine, three of each layer, on two ranks: six and three."""
    parts = [Cut.of((9, 4, 4), True, Ranks(Place(rank, 2)), unit=3) for rank in range(2)]
    assert [len(cut.own(torch.zeros(cut.part))) for cut in parts] == [6, 3]


@pytest.mark.parametrize(
    ("visible", "local_rank", "left"),
    [(None, 2, "2"), ("4,5,6,7", 1, "5"), ("GPU-aa, GPU-bb", 1, "GPU-bb"), ("", 1, "")],
)
def test_a_rank_sees_its_own_gpu_alone(visible, local_rank, left):
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    take_one_gpu(Place(local_rank, 4, local_rank, 4), environment)
    assert environment.get("CUDA_VISIBLE_DEVICES") == left


def test_more_ranks_than_gpus_is_one_line():
    with pytest.raises(InputError, match=r"^4 processes on this machine, and CUDA_VISIBLE_DEVICES names 2: .* 2, or"):
        take_one_gpu(Place(2, 4, 2, 4), {"CUDA_VISIBLE_DEVICES": "0,1"})


def test_a_process_by_itself_keeps_what_it_sees():
    environment = {"CUDA_VISIBLE_DEVICES": "3,4"}
    take_one_gpu(place_of({}), environment)
    assert environment == {"CUDA_VISIBLE_DEVICES": "3,4"}


def the_doctor_of_ranks(rank: int) -> None:
    doctor.examine = lambda data: []
    train.__main__.main = lambda args: doctor.main([])


def test_the_doctor_knows_the_ranks(tmp_path):
    """Once for all, with the traffic of a step."""
    ended = run_ranks(2, tmp_path, before=the_doctor_of_ranks)
    assert [each.code for each in ended] == [0, 0], ended
    assert ended[1].out == ended[1].err == ""
    lines = ended[0].out.splitlines()
    assert [line[:14].split() for line in lines] == [["ok", "ranks"], ["ok", "exchange"], ["ok", "gather"], ["all", "is", "well"]]  # fmt: skip  # noqa: E501
    assert "2 on a CPU, by gloo" in lines[0]
    assert "3.4 MB sent by a rank" in lines[1]


def test_a_signal_that_comes_twice_at_once_is_one(monkeypatch):
    """As torchrun sends it: the terminal to all, and torchrun once more. Without it a second one ends the process."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    killed = []
    monkeypatch.setattr(os, "kill", lambda pid, number, real=os.kill: killed.append(number))
    def three(signals: Signals) -> None:
        with signals.deferred():
            for seconds in (0.0, 0.5):
                now[0] = 100.0 + seconds
                signal.raise_signal(signal.SIGTERM)
            assert signals.came()
            assert not killed
            now[0] += 1.0
            signal.raise_signal(signal.SIGTERM)
            assert killed == [signal.SIGTERM]
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    with Signals(relayed=True) as signals, pytest.raises(Interrupted):
        three(signals)
