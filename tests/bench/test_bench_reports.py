"""What reads recorded measurements: regressions, profile, runs; and the scripts that run it all. On made-up records."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu_tests, profile, regressions, runs
from model import GPT, GPTConfig
from model.gpt import SCALARS
from prepare import InputError
from train.config import ROOT


def results(path: Path, times: dict[str, float], device="NVIDIA H200", date="2026-01-01T00:00:00", step=None) -> Path:
    """A file as pytest-benchmark writes it, with an op's nanoseconds a token by name."""
    benchmarks = [
        {"extra_info": {"op": op, "shape": "8x8", "direction": "forward", "provider": provider, "ns_per_token": ns}}
        for op, ns in times.items()
        for provider in ("triton", "eager")
    ]
    benchmarks[1::2] = [b | {"extra_info": b["extra_info"] | {"ns_per_token": 1e3}} for b in benchmarks[1::2]]
    benchmarks.append({"extra_info": {}})
    if step:
        sizes = {"config": {"device_batch_size": 2, "seq_len": 8}, "model": {"vocab_size": 8192}}
        benchmarks.append({"extra_info": {"step": {"tokens_per_second": step, **sizes}}})
        benchmarks.append({"extra_info": {"flags": "--recompute", "options": {"tokens_per_second": step**2}}})
    content = {"machine_info": {"device": device}, "datetime": date, "benchmarks": benchmarks}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def test_a_regression_of_more_than_five_percent_is_one(tmp_path, capsys):
    old = results(tmp_path / "old.json", {"norm": 1.0, "mlp": 10.0, "gone": 1.0}, step=1000.0)
    new = results(tmp_path / "new.json", {"norm": 1.06, "mlp": 10.4, "fresh": 1.0}, step=970.0)
    assert regressions.main([str(new), str(old)]) == 1
    out = capsys.readouterr().out
    marked = [line for line in out.splitlines() if "REGRESSION" in line]
    assert len(marked) == 2
    assert marked[0].startswith("step --recompute")
    assert "+6.3 %" in marked[0]  # 1 / 0.97²
    assert marked[1].startswith("norm 8x8 forward")
    assert "+6.0 %" in marked[1]
    assert "2 of 4 slower" in out
    assert "\x1b" not in out  # this is no terminal
    assert regressions.main([str(new), str(old), "--limit", "7"]) == 0
    assert regressions.main([str(old), str(new)]) == 0  # faster is no regression


def test_a_regression_is_red_on_a_terminal(capsys):
    assert regressions.report([("a", 1.0, 2.0, 100.0), ("b", 1.0, 1.0, 0.0)], 5.0, colours=True) == 1
    red, plain = capsys.readouterr().out.splitlines()[1:]
    assert red.startswith("\x1b[31m")
    assert red.endswith("\x1b[0m")
    assert "\x1b" not in plain


def test_the_latest_results_of_the_same_device_are_compared_with(tmp_path, capsys):
    folder = tmp_path / "results"
    results(folder / "z-older.json", {"norm": 1.0}, date="2026-01-01T00:00:00")
    latest = results(folder / "a-newer.json", {"norm": 2.0}, date="2026-02-01T00:00:00")
    results(folder / "other-device.json", {"norm": 0.1}, device="NVIDIA L4", date="2026-03-01T00:00:00")
    results(folder / "other-ops.json", {"mlp": 0.1}, date="2026-03-01T00:00:00")
    (folder / "ceilings.json").write_text("{}")
    new = results(folder / "new.json", {"norm": 2.0}, date="2026-04-01T00:00:00")
    assert regressions.main([str(new), "--results", str(folder)]) == 0
    assert f"against {latest}" in capsys.readouterr().out
    lonely = results(folder / "lonely.json", {"norm": 1.0}, device="NVIDIA H100")
    assert regressions.main([str(lonely), "--results", str(folder)]) == 0
    assert "nothing to compare with" in capsys.readouterr().out


def test_bad_results_are_one_line(tmp_path, capsys):
    good = results(tmp_path / "good.json", {"norm": 1.0})
    (tmp_path / "bad.json").write_text("[]")
    for arguments in (
        [str(tmp_path / "none.json")],
        [str(tmp_path / "bad.json")],
        [str(good), str(results(tmp_path / "l4.json", {"norm": 1.0}, device="NVIDIA L4"))],
        [str(good), str(results(tmp_path / "mlp.json", {"mlp": 1.0}))],
        [str(results(tmp_path / "empty.json", {}))],
    ):
        assert regressions.main(arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1


def event(name: str, ts: float, dur: float, cat: str = "kernel", tid: int = 7) -> dict:
    return {"ph": "X", "name": name, "ts": ts, "dur": dur, "cat": cat, "pid": 0, "tid": tid}


def test_kernels_by_share_of_the_step(tmp_path, capsys):
    trace = [
        event("timebox step", 0, 50, "user_annotation"),
        event("timebox step", 50, 50, "user_annotation"),
        event("aten::mm", 0, 500, "cpu_op"),
        event("_fc_fwd_kernel", 100, 30),
        event("_fc_fwd_kernel", 140, 30),
        event("nvjet_tst_128x256_64x4_1x2_h_bz_NNT", 160, 20),  # 10 of it beside the one before
        event("nvjet_tst_64x64_64x4_1x2_h_bz_NNT", 190, 5),
        event("Memset (Device)", 195, 5, "gpu_memset"),
        {"ph": "M", "name": "process_name"},
    ]
    found = profile.analyse([e for e in trace if e["ph"] == "X"])
    assert [(g.name, g.time, g.launches) for g in found.groups] == [
        ("_fc_fwd_kernel", 60, 2), ("nvjet_tst", 25, 2), ("Memset", 5, 1),
    ]  # fmt: skip
    assert (found.span, found.busy, found.steps, found.on_gpu) == (100, 80, 2, True)
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": trace}))
    assert profile.main(["--trace", str(path), "--rows", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "80.0% of it busy" in lines[0]
    assert lines[2].split() == ["60.0%", "0.030", "1", "_fc_fwd_kernel"]
    assert lines[3].split() == ["30.0%", "0.015", "2", "2", "others"]


def test_an_operator_is_charged_what_is_its_own():
    trace = [
        event("aten::linear", 0, 100, "cpu_op"),
        event("aten::mm", 10, 60, "cpu_op"),
        event("aten::empty", 20, 5, "cpu_op"),
        event("aten::mm", 80, 10, "cpu_op"),
        event("aten::mm", 15, 40, "cpu_op", tid=8),  # another thread's is no child
    ]
    found = profile.analyse(trace)
    assert {g.name: g.time for g in found.groups} == {"mm": 60 - 5 + 10 + 40, "linear": 30, "empty": 5}
    assert not found.on_gpu


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("_attention_dkv_kernel", "_attention_dkv_kernel"),
        ("triton_poi_fused_add_mul_pow_12", "triton_poi_fused_add_mul_pow"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_kernel__5x_cublas",
         "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_128x256_32x3_nn_align8>(Params)",
         "cutlass_80_tensorop_bf16_s16816gemm_bf16"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, std::array<char*, 1ul> >"
         "(int, at::native::FillFunctor<float>, std::array<char*, 1ul>)", "vectorized_elementwise_kernel FillFunctor"),
        ("void at::native::(anonymous namespace)::elementwise_kernel<128>(int)", "elementwise_kernel"),
        ("aten::mm", "mm"),
    ],
)  # fmt: skip
def test_names_without_what_varies(name, group):
    assert profile.group_name(name) == group


def test_bad_traces_are_one_line(tmp_path, capsys):
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "empty.json").write_text('{"traceEvents": []}')
    for name in ("none.json", "bad.json", "empty.json"):
        assert profile.main(["--trace", str(tmp_path / name)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_graphs_want_a_gpu(capsys):
    assert profile.main(["--graphs"]) == 2
    assert capsys.readouterr().err.startswith("error: --graphs needs a CUDA device")


def make_run(folder: Path, losses: list[float], **summary) -> str:
    folder.mkdir()
    rows = [{"step": i, "loss": loss, "tokens_per_second": 100.0 * i, "mfu": 10.0 * i} for i, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if summary:
        (folder / "summary.json").write_text(json.dumps(summary))
    return str(folder)


def test_runs_agree_step_by_step_or_do_not(tmp_path, capsys):
    first = make_run(tmp_path / "triton", [9.0, 8.0, 7.0], val_bpb=1.5, tokens_per_second=1000000.4, mfu_percent=None)
    near = make_run(tmp_path / "reference", [9.0, 8.01, 7.001, 99.0])
    far = make_run(tmp_path / "compile", [9.0, 8.5, 7.0])
    assert runs.main([first, near, "--agree"]) == 0
    out = capsys.readouterr().out
    assert "differ most at step 1: 0.010000 nats" in out
    assert out.splitlines()[1].split()[:3] == ["triton", "1000000", "n/a"]
    assert runs.main([first, near, far, "--agree"]) == 1
    assert "DISAGREE" in capsys.readouterr().out
    assert runs.main([first, far, "--agree", "0.6"]) == 0
    assert runs.main([first, far, "--agree", "--steps", "1"]) == 0
    broken = make_run(tmp_path / "broken", [9.0, float("nan"), 7.0])
    assert runs.main([first, broken, "--agree"]) == 1
    capsys.readouterr()
    assert runs.main([first, "--agree"]) == 2
    assert runs.main([str(tmp_path)]) == 2
    assert runs.main([first, make_run(tmp_path / "stillborn", []), "--agree"]) == 2
    assert capsys.readouterr().err.count("\n") == 3


def test_a_run_that_did_not_finish_shows_its_pace_and_hides_no_other(tmp_path, capsys):
    make_run(tmp_path / "cut", [9.0, 8.0, 7.0, 6.0, 5.0])
    make_run(tmp_path / "whole", [9.0], tokens_per_second="7")  # text: in summaries of before
    (tmp_path / "empty").mkdir()
    assert runs.main([str(tmp_path / name) for name in ("empty", "cut", "whole")]) == 0
    note, header, cut, whole = capsys.readouterr().out.splitlines()
    assert note.startswith("left out: ")
    assert dict(zip(header.split(), cut.split(), strict=False))["tok/s"] == "200"
    assert cut.split()[:3] == ["cut", "200", "20.00"]
    assert whole.split()[1] == "7"
    assert runs.main([str(tmp_path / name) for name in ("empty", "cut", "whole")] + ["--agree"]) == 0


def test_at_the_initial_weights_no_gradient_but_the_scalars_is_rounding():
    """What `--scalar-lr 0` rests on: every other gradient is exactly 0, or one that fp32 and fp64 agree on."""

    def gradients(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        model = GPT(GPTConfig(vocab_size=97, seq_len=32, depth=4, d_model=64, head_dim=32))
        model.init_weights(1)
        model.to(dtype)
        tokens = torch.randint(97, (4, 33), generator=torch.Generator().manual_seed(0))
        model(tokens[:, :-1], tokens[:, 1:].contiguous()).backward()
        return {name: parameter.grad.double() for name, parameter in model.named_parameters()}

    single, true = gradients(torch.float32), gradients(torch.float64)
    for name, grad in true.items():
        if name in SCALARS:
            assert grad.abs().max() < 1e-5 * true["wte"].abs().max()
        else:
            assert (single[name] - grad).abs().max() <= 1e-3 * grad.abs().max()


def test_a_disagreement_names_the_runs_that_rounding_alone_may_part(tmp_path, capsys):
    first, other = (make_run(tmp_path / name, losses) for name, losses in (("a", [9.0, 8.0]), ("b", [9.0, 8.5])))
    for scalar_lrs, noted in (((0.5, 0.5), "a, b"), ((0, 0.5), "b"), ((0.0, 0), "")):
        for folder, scalar_lr in zip((first, other), scalar_lrs, strict=True):
            (Path(folder) / "config.json").write_text(json.dumps({"config": {"scalar_lr": scalar_lr}}))
        assert runs.main([first, other, "--agree"]) == 1
        notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
        assert [note.split(": ")[1] for note in notes] == [noted] * bool(noted)
        assert runs.main([first, other, "--agree", "0.6"]) == 0
        assert "note" not in capsys.readouterr().out


def shell(script: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("script", ["parts.sh", "first_light.sh", "first_runs.sh"])
def test_scripts_parse(script):
    assert shell(f"bash -n bench/{script}").returncode == 0


def test_parts_go_on_after_one_that_fails(tmp_path):
    script = """
        source bench/parts.sh
        part good 300 echo fine
        part bad 300 bash -c 'echo broken; exit 3'
        part slow 1 sleep 600
        part last 300 echo done
        DEADLINE=0
        part late 9 echo never
        finish
    """
    done = shell(script, OUT=str(tmp_path), DEADLINE="600")
    assert done.returncode == 1
    *rows, last = done.stdout.splitlines()[-6:]
    assert [re.sub(r" +\d+ .*", "", row).split(maxsplit=1) for row in rows] == [  # the seconds are the machine's
        ["good", "ok"], ["bad", "FAILED (3)"], ["slow", "timed out"], ["last", "ok"], ["late", "no time left"],
    ]  # fmt: skip
    assert last.startswith("5 parts, 3 not well")
    assert (tmp_path / "bad.log").read_text() == "broken\n"


def test_files_of_gpu_tests_fail_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # it starts in half the time
    paths = []
    for name, body in {"good": "pass", "bad": "assert 1 == 2", "broken": "os._exit(9)"}.items():
        paths.append(tmp_path / f"test_{name}.py")
        paths[-1].write_text(f"import os, pytest\n@pytest.mark.gpu\ndef test_it():\n    {body}\n")
    assert gpu_tests.main([*map(str, paths)]) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    states = {name: rest[:12].strip() for name, rest in (line.split(maxsplit=1) for line in lines[-3:])}
    assert states == {"test_good.py": "ok", "test_bad.py": "FAILED (1)", "test_broken.py": "FAILED (9)"}
    assert last.startswith("3 files, 2 not well: ")
    assert any("assert 1 == 2" in line for line in lines)
    assert gpu_tests.run(paths[0], 0.1, set()).state == "timed out"


def test_interrupted_gpu_tests_name_what_they_did_not_come_to(tmp_path):
    """Within seconds, although one file hears no interrupt, as where a kernel never ends; and it does not live on."""
    pid = tmp_path / "pid"
    deaf = f"signal.signal(signal.SIGINT, signal.SIG_IGN); open({str(pid)!r}, 'w').write(str(os.getpid())); "
    for name, body in {"a": deaf + "time.sleep(600)", "b": "pass", "c": "time.sleep(60)"}.items():
        path = tmp_path / f"test_{name}.py"
        path.write_text(f"import os, pytest, signal, time\n@pytest.mark.gpu\ndef test_it():\n    {body}\n")
    command = [sys.executable, "-m", "bench.gpu_tests", *map(str, sorted(tmp_path.glob("test_*.py")))]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("== test_b.py: ok, ")
    while not (pid.exists() and pid.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 1
    assert out.splitlines()[-1] == "3 files, 2 not well: test_a.py test_c.py"
    assert out.count("cut off") == 2
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_what_needs_a_gpu_says_so_at_once(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as exit:
        gpu_tests.main([])
    assert exit.value.code == 2
    assert capsys.readouterr().err.startswith("error: PyTorch sees no CUDA device")
    with pytest.raises(SystemExit):
        gpu_tests.main(["nowhere.py"])
    assert "nowhere.py does not exist" in capsys.readouterr().err
    done = shell("bench/first_light.sh", PY=sys.executable, CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


@pytest.mark.parametrize(
    ("body", "code"), [("print('line\\n' * 100_000)", 141), ("raise KeyboardInterrupt", 130), ("return 2", 2)]
)
def test_a_command_ends_without_a_traceback(body, code):
    """141: nobody reads on after the first line."""
    source = f"from prepare.arguments import command\ndef main():\n    {body}\ncommand(main)"
    done = shell(f'{{ "{sys.executable}" -c "{source}"; echo $? >&2; }} | head -n 1')
    assert done.stderr == f"{code}\n"


def test_what_tests_time_comes_last_and_alone(monkeypatch):
    monkeypatch.setattr(gpu_tests, "run", lambda path, limit, running: gpu_tests.Result(path, "ok", 0.0, ""))
    paths = [Path(name) for name in (*gpu_tests.ALONE, "test_a.py")]
    assert [result.file.name for result in gpu_tests.run_all(paths, 1.0)] == ["test_a.py", *gpu_tests.ALONE]


def test_every_kernel_has_tests_for_a_gpu(gpu_test_files):
    """Where a file is in tests/, `bench.gpu_tests` finds it; what pytest marks is among what it finds."""
    names = [path.name for path in gpu_tests.files()]
    assert tuple(names[: len(gpu_tests.LONGEST)]) == gpu_tests.LONGEST
    assert sorted(names) == [
        "test_adamw_kernel.py", "test_attention_forms.py",
        "test_bench_suite.py", "test_compile_ops.py", "test_embedding_kernel.py",
        "test_fused_norms.py", "test_kernels_together.py", "test_key_offset.py", "test_linear_cross_entropy_kernel.py",
        "test_linear_kernel.py", "test_loader.py", "test_loop.py", "test_mlp_kernel.py", "test_muon_kernel.py",
        "test_persistent_products.py", "test_polar_express_kernel.py", "test_pretend_gpu.py", "test_product_kernel.py",
        "test_rms_norm_kernel.py", "test_rotary_attention_kernel.py", "test_weight_grad_kernel.py",
    ]  # fmt: skip
    assert gpu_test_files <= {*names}
    assert {*gpu_tests.ALONE} <= {*names}


def test_first_runs_wants_a_prepared_folder(tmp_path):
    for argument in ("", str(tmp_path)):
        done = shell(f"bench/first_runs.sh {argument}", TIMEBOX_DATA="")
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
    assert " -m prepare --source " in done.stderr


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_first_runs_compares_runs_that_leave_the_scalars_alone(tmp_path, device):
    """With a Python that writes down what it is asked for, and makes the folders."""
    python, commands, out = tmp_path / "python", tmp_path / "commands", tmp_path / "out"
    python.write_text(
        f"""#!/usr/bin/env bash
        echo "$@" >> {commands}
        while [ $# -gt 0 ]; do [ "$1" != --run-dir ] || mkdir -p "$2"; shift; done
        """
    )
    python.chmod(0o755)
    (tmp_path / "manifest.json").touch()
    done = shell(f"bench/first_runs.sh {tmp_path}", PY=str(python), OUT=str(out), DEVICE=device, DEADLINE="60")
    assert done.returncode == 0, done.stdout
    trained, compared = {}, []
    for command in map(str.split, commands.read_text().splitlines()):
        if "--run-dir" in command:
            options = dict(zip(command[2::2], command[3::2], strict=True))
            trained[options.pop("--run-dir")] = options
        if "--agree" in command:
            assert set(command[command.index("--") + 1 :]) <= trained.keys() | {f"{name}/" for name in trained}
            compared.append([trained[name.rstrip("/")] for name in command[command.index("--") + 1 :]])
    assert [len(group) for group in compared] == [2, 2]
    for group in compared:
        assert {options["--scalar-lr"] for options in group} == {"0"}
        assert all("--steps" in options for options in group)  # by time the schedules would differ
        first, other = ({key: value for key, value in options.items() if key != "--ops"} for options in group)
        assert first == other
    of_ops = [{options["--ops"] for options in group} for group in compared]
    assert of_ops == ([{"triton", "reference"}, {"triton", "compile"}] if device == "cuda" else [{"reference"}] * 2)
    timed = [options for options in trained.values() if "--time-budget" in options]
    assert len(timed) == 3
    assert not any("--scalar-lr" in options for options in timed)


def test_a_trace_without_kernels_or_operators():
    with pytest.raises(InputError):
        profile.analyse([event("timebox step", 0, 50, "user_annotation")])


@pytest.mark.parametrize(("given", "rows"), [([], 2), (["--device-batch-size", "4"], 4)])
def test_a_profile_takes_the_rows_that_fit_where_none_are_given(monkeypatch, given, rows):
    """As training does on a GPU with too little memory for the default ones."""
    taken = []
    monkeypatch.setattr(profile, "fit_default", lambda config, shape: dataclasses.replace(config, device_batch_size=2))
    monkeypatch.setattr(profile, "record", lambda config, *_: taken.append(config.device_batch_size))
    monkeypatch.setattr(profile, "read_trace", lambda path: [])
    monkeypatch.setattr(profile, "analyse", lambda events: None)
    monkeypatch.setattr(profile, "report", lambda *_: None)
    assert profile.main(given) == 0
    assert taken == [rows]
