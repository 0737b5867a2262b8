"""What README, program.md and docs/ say to type: every command goes through its own parser, and runs where it is quick.

Where a page names a file, a section or an option, it is there.
"""

import importlib
import importlib.util
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from torch.distributed import run as torchrun

from prepare.arguments import Parser
from tests.helpers.ledger_entries import a_night
from tests.helpers.prepare_corpus import write_corpus
from train.config import ROOT, TrainConfig, resolve

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
# Programs whose arguments are not ours to parse.
OTHERS = {"cd", "docker", "echo", "export", "git", "grep", "lm_eval", "source", "tail", "uv"}
# Regular expressions of the commands that take less than 5 s, and of those that take more, need a GPU, or a network.
# What neither matches, or both, fails.
RUN = (
    "prepare --source (my_folder|stories)", "train --help", "train.sample ", "train.evaluate ", "train.export ",
    "train.curves ", "train.replay ", "train.report(?! --watch)", "train.compare ", "bench.roofline",
    "bench.regressions ", "bench.runs ",
)  # fmt: skip
NOT_RUN = {
    "prepare( --vocab-size 32768 --out .*)?$": "reads the whole standard library",
    "prepare --source (climbmix|fineweb-edu|tinystories)": "needs a network",
    "train( --(?!help)|$)": "trains",
    "train.doctor": "tries a kernel",
    "train.report --watch": "goes on until Ctrl-C",
    "bench.gpu_tests": "needs a GPU",
    "bench.offline": "compiles every kernel",
    "train.tune": "compiles kernels, or needs a GPU",
    "bench.collectives": "takes several processes",
    "bench.nights": "simulates thousands of nights",
    "bench.profile": "runs steps of the default size",
    "pytest ": "runs other tests",
    "make ": "installs, trains or tests",
    "bench/": "measures for minutes",
}


class Line(NamedTuple):
    """A line of a shell in a page, without its comment."""

    page: str
    text: str


def blocks(page: Path) -> list[tuple[str, list[str]]]:
    """Language and lines of each fenced block, which a list may have indented."""
    found, block = [], None
    for line in page.read_text(encoding="utf-8").splitlines():
        fence = re.match(r"\s*```(\w*)", line)
        if fence and block is None:
            block = (fence[1], [])
        elif fence:
            found.append(block)
            block = None
        elif block:
            block[1].append(line.strip())
    return found


def prose(page: Path) -> str:
    """Without the fenced blocks."""
    return re.sub(r"(?ms)^\s*```.*?^\s*```", "", page.read_text(encoding="utf-8"))


def lines() -> list[Line]:
    """Those of the blocks, and the commands that stand inside a sentence."""
    found = []
    for page in PAGES:
        given = [line for language, block in blocks(page) if language == "sh" for line in block]
        spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]
        given += [span for span in spans if re.match(r"(python -m|make|git|bench/\w+\.sh)\b", span)]
        given = [re.sub(r"(^|\s+)# .*", "", line) for line in given]
        found += [Line(page.name, line) for line in given if line]
    return list(dict.fromkeys(found))


LINES = lines()


def commands(text: str) -> list[list[str]]:
    """The commands of a shell's line: without comments, redirections, variables set for them, and `timeout`."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
    lexer.commenters, lexer.whitespace_split = "#", True
    found, words = [], iter(lexer)
    command: list[str] = []
    for word in words:
        if set(word) <= set("<>&") and word not in ("&&", "&"):
            next(words)  # where it goes; a 2 before it is left over
            if command and command[-1] == "2":
                command.pop()
        elif word in ("&&", "||", ";", "|"):
            found.append(command)
            command = []
        else:
            command.append(word)
    found.append(command)
    for command in found:
        while command and re.match(r"\w+=", command[0]):
            del command[0]
        if command[:2] == ["timeout", "--foreground"]:
            del command[:3]
    return [command for command in found if command]


class Stopped(BaseException):
    """Raised in place of what comes after the arguments were parsed."""


def check_arguments(module: str, arguments: list[str], monkeypatch) -> None:
    """Raises SystemExit where the module's own parser refuses them."""
    parse = Parser.parse_args

    def stop(self, args=None, namespace=None):
        raise Stopped(parse(self, args, namespace))

    with monkeypatch.context() as patch:
        patch.setattr(Parser, "parse_args", stop)
        is_folder = importlib.util.find_spec(module).submodule_search_locations
        name = f"{module}.__main__" if is_folder else module
        with pytest.raises(SystemExit if "--help" in arguments else Stopped) as stopped:
            importlib.import_module(name).main(arguments)
    if "--help" in arguments:
        assert stopped.value.code == 0
    elif module == "train":
        given = vars(stopped.value.args[0])
        for device in ("cpu", "cuda"):
            resolve(TrainConfig(**given), device)


def check(command: list[str], monkeypatch) -> None:
    """That there is such a program here, and that it takes these arguments."""
    program, *arguments = command
    if program == "python":
        assert arguments[0] == "-m", command
        if arguments[1] == "pytest":
            named = [word for word in arguments[2:] if word.split("/")[0] in ("tests", "bench")]
            assert all((ROOT / word).exists() or word.startswith("bench/results/") for word in named)
        else:
            check_arguments(arguments[1], arguments[2:], monkeypatch)
    elif program == "torchrun":
        given = torchrun.parse_args(arguments)
        check(["python", *["-m"] * given.module, given.training_script, *given.training_script_args], monkeypatch)
    elif program == "make":
        done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        made = commands(done.stdout.splitlines()[-1])
        if arguments[:1] == ["train"]:
            check(["python", *made[-1][1:]], monkeypatch)
    elif program.endswith(".sh"):
        assert os.access(ROOT / program, os.X_OK), program
    else:
        assert program in OTHERS, command


def lists(text: str) -> list[str]:
    """Which of the expressions above match: one for every command of ours."""
    found = []
    for command in commands(text):
        if command[0] == "torchrun":
            command = ["python", *command[command.index("-m") :]]
        if command[0] in ("python", "make") or command[0].startswith("bench/"):
            joined = " ".join(command).removeprefix("python -m ")
            matching = [begin for begin in (*RUN, *NOT_RUN) if re.match(begin, joined)]
            assert len(matching) == 1, f"{text!r} is to be in one of the lists above, and is in {matching}"
            found += matching
    return found


QUICK = [text for text in dict.fromkeys(line.text for line in LINES) if {*lists(text)} & {*RUN}]


def test_every_block_says_what_it_is():
    assert {page.name for page in PAGES} >= {"README.md", "program.md", "data.md", "runs.md", "numbers.md"}
    for page in PAGES:
        assert {language for language, _ in blocks(page)} <= {"sh", "text", "python"}, page


@pytest.mark.parametrize("line", LINES, ids=lambda line: f"{line.page}: {line.text}")
def test_a_command_is_one_that_its_program_takes(line, monkeypatch):
    checked = subprocess.run(["bash", "-n"], input=line.text, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    for command in commands(line.text):
        check(command, monkeypatch)


@pytest.mark.parametrize("text", [
    "python -m train --no-such-flag 3", "python -m train --matrix-lr high", "python -m train --total-batch-size 7",
    "python -m train.compare A", "python -m bench.offline --arch 12", "python -m no.such.module", "make no-such-target",
    'make train ARGS="--no-such-flag"', "bench/no_such.sh", "python -m pytest tests/no_such.py", "no-such-program",
    "OMP_NUM_THREADS=1 timeout --foreground 9 python -m train --no-such-flag > run.log 2>&1", "cd . && python x.py",
])  # fmt: skip
def test_a_command_that_is_none_is_found(text, monkeypatch):
    def check_all():
        for command in commands(text):
            check(command, monkeypatch)

    with pytest.raises((SystemExit, Exception)):
        check_all()


def test_what_is_not_run_is_still_there():
    found = {begin for line in LINES for begin in lists(line.text)}
    assert found == {*RUN, *NOT_RUN}, "a page has no such command any more"


def pytest_lines() -> list[list[str]]:
    """What pytest is given, by itself or by make. `-k` with a part of a file's name: those files in place of all, which
    take long to import."""
    found = []
    for command in (command for line in LINES for command in commands(line.text)):
        if command[:2] in (["make", "bench"], ["make", "test"]):
            dry = subprocess.run(["make", "-n", *command[1:]], cwd=ROOT, capture_output=True, text=True, check=True)
            command = ["python", *commands(dry.stdout.splitlines()[-1])[-1][1:]]
        if command[1:3] != ["-m", "pytest"] or "-k" not in command:
            continue
        folder, words = command[3], command[3:]
        part = words[words.index("-k") + 1]
        files = [str(path) for path in (ROOT / folder).rglob("test_*.py") if part in path.name]
        files = files or [str(ROOT / folder)]  # it names cases
        found.append([*files, *words[1:]])
    return found


def test_pytest_takes_what_is_given_to_it(tmp_path):
    """All its lines in one process, which collects tests and runs none."""
    given = sorted(pytest_lines(), reverse=True)  # tests before bench: they want the interpreter
    assert len(given) > 3
    program = f"""if True:
        import pytest
        common = ["--collect-only", "-qq", "-c", {str(ROOT / "pyproject.toml")!r}]
        codes = [pytest.main([*words, *common]) for words in {given!r}]
        assert not any(codes), codes"""
    # Not as one of several processes of this session: with those pytest-benchmark measures nothing.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment | {"PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def desk(tmp_path_factory, small_run):
    """A folder in which the commands find what they name: RUN, my_folder, stories.txt.gz, results, ledgers."""
    import gzip

    folder = tmp_path_factory.mktemp("desk")
    shutil.copytree(small_run, folder / "RUN")
    shutil.copy(small_run.parent / "results.jsonl", folder)
    for name in ("runs", "gpu0", "gpu1"):
        a_night(folder / name, 3)
    write_corpus(folder / "my_folder", 60)
    texts = [f"story {i}, which is not the one before it" * 20 for i in range(60)]
    (folder / "stories.txt.gz").write_bytes(gzip.compress("<|endoftext|>".join(texts).encode()))
    return folder


@pytest.mark.parametrize("text", QUICK)
def test_a_quick_command_runs(text, desk, monkeypatch, capsys):
    """In this process. The exit code is that of a success; where there is nothing of that kind to read, that of bad
    input."""
    monkeypatch.chdir(desk)
    monkeypatch.setenv("TIMEBOX_HOME", str(desk / "home"))
    monkeypatch.setattr("sys.stdin", io.StringIO("what is asked for\n"))
    for program, _, module, *arguments in commands(text):
        assert program == "python"
        shutil.rmtree(desk.parent / "folder", ignore_errors=True)
        if module == "prepare":
            arguments += ["--vocab-size", "270"]  # of sixty sentences no more can be learned
        if module == "train.compare":
            arguments = [{"A": "r000", "B": "r001"}.get(a, a) for a in arguments]
        main = importlib.import_module(module if "." in module else f"{module}.__main__").main
        if "--help" in arguments:
            with pytest.raises(SystemExit, match="0"):
                main(arguments)
            continue
        nothing = {
            "train.replay": "has no failure", "bench.regressions": "ops.json", "bench.roofline": "step.json",
        }.get(module)  # fmt: skip
        code = main(arguments)
        printed = capsys.readouterr()
        if nothing and (module != "bench.roofline" or "--measured" in arguments):
            assert (code, printed.err.count("\n")) == (2, 1), printed
        else:
            assert code == 0, printed.err


def heading_ids(page: Path) -> set[str]:
    """As GitHub makes them."""
    headings = re.findall(r"(?m)^#+ (.+)$", prose(page))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", prose(page)):
        if "://" in target:
            continue
        name, _, section = target.partition("#")
        path = (page.parent / name) if name else page
        assert path.exists(), target
        assert not section or section in heading_ids(path), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_options_that_a_page_names_are_there(page):
    spans = re.findall(r"`([^`]+)`", prose(page))
    rooms = "kernels|model|prepare|train|bench|tests|docs"
    for span in spans:
        if re.fullmatch(rf"({rooms})/[\w/]*(\.\w+|/)", span) and "NAME" not in span:
            assert (ROOT / span).exists(), span
    ours = known_options()
    for option in re.findall(r"(?<![\w-])--[a-z][\w-]+", " ".join(spans)):
        assert option in ours, option


def test_the_rooms_of_the_tree_are_there():
    tree = next(block for _, block in blocks(ROOT / "README.md") if block[0].startswith("kernels/"))
    assert len(tree) >= 7
    room = ROOT
    for line in tree:
        name = line.split()[0]
        room = ROOT / name if (ROOT / name).is_dir() else room
        assert name == room.name + "/" or (room / name).is_dir(), line


def known_options() -> set[str]:
    """Of all our commands, and those of other programs that the pages name."""
    parsers = []

    class Gathered(Parser):
        def parse_known_args(self, args=None, namespace=None):
            parsers.append(self)
            raise Stopped

    found = {"--benchmark-only", "--foreground", "--hard", "--providers"}
    for path in sorted(path for room in ("prepare", "train", "bench") for path in (ROOT / room).rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        if "Parser(" not in source or path.name == "arguments.py":
            continue
        module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        if not hasattr(module, "main") and path.name != "config.py":
            continue
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "Parser", Gathered)
            with pytest.raises(Stopped):
                module.parse_given([]) if path.name == "config.py" else module.main([])
    for parser in [*parsers, torchrun.get_args_parser()]:
        found |= {option for action in parser._actions for option in action.option_strings}
    return found


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_a_night_is_reset_to_a_named_commit_and_its_log_is_no_change():
    text = (ROOT / "program.md").read_text(encoding="utf-8")
    assert re.findall(r"git reset --hard (\S+?)`?\n", text) == ["night-best"]
    ignored = subprocess.run(["git", "check-ignore", "run.log", "runs/x"], cwd=ROOT, capture_output=True, text=True)
    assert ignored.stdout.split() == ["run.log", "runs/x"]


def test_a_parser_of_argparse_itself_would_be_missed():
    """Commands are found by `prepare.arguments.Parser`: none uses another."""
    for path in (path for room in ("prepare", "train", "bench") for path in (ROOT / room).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert "ArgumentParser(" not in text.replace("class Parser(argparse.ArgumentParser)", ""), path
