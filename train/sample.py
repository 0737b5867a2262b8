"""`python -m train.sample RUN --prompt TEXT`: text from a finished run, as it is written."""

import argparse
import sys
from collections.abc import Callable, Iterator

from kernels import choose
from prepare import InputError, Tokenizer
from prepare.arguments import Parser, command
from prepare.errors import one_line
from prepare.words import printable

from .config import MAX_SEED, TrainConfig
from .device import keep_to_the_cores_allowed, on_device, pick_device
from .generate import generate, reader_of, text_of, until
from .results.run_folder import load_run
from .tune import saved_tiles

TAB = 8  # columns


def main(args: list[str] | None = None) -> int:
    parser = Parser("train.sample", __doc__)
    parser.add_argument("run", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--prompt", default="", help="text to go on from")
    parser.add_argument("--interactive", action="store_true", help="ask for one prompt after another, each a new text")
    parser.add_argument("--tokens", type=int, default=200, help="how many to generate (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest (default: 0.8)")
    parser.add_argument("--top-k", type=int, default=50, help="draw from the k likeliest; 0: from all (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws; each further text has the next (default: 0)")
    parser.add_argument("--num-samples", type=int, default=1, help="texts from each prompt (default: 1)")
    parser.add_argument("--stop", metavar="TEXT", action="append", default=[],
                        help="end before this text, where the model writes it; may be given several times")  # fmt: skip
    parser.add_argument("--device", choices=("cuda", "cpu"), help="(default: cuda where there is one)")
    options = parser.parse_args(args)
    try:
        check(options)
        say = writer(options)
        for prompt in asked() if options.interactive else [options.prompt]:
            try:
                say(prompt)
            except KeyboardInterrupt:
                if not options.interactive:
                    raise
                print(flush=True)  # this text ends, and the next prompt comes
    except (InputError, OSError) as error:
        print(f"error: {one_line(error, 'name another RUN')}", file=sys.stderr)
        return 2
    return 0


def check(options: argparse.Namespace) -> None:
    """Raises InputError for what argparse lets pass."""
    if options.tokens < 0 or options.top_k < 0:
        raise InputError(f"--tokens {options.tokens}, --top-k {options.top_k}: neither may be negative")
    if options.num_samples < 1:
        raise InputError(f"--num-samples {options.num_samples} must be at least 1")
    if not 0 <= options.temperature < float("inf"):
        raise InputError(f"--temperature {options.temperature} must be a number, 0 or larger")
    if not 0 <= options.seed <= MAX_SEED:
        raise InputError(f"--seed {options.seed} must be from 0 to {MAX_SEED}")
    if options.prompt and options.interactive:
        raise InputError("--interactive asks for prompts: leave --prompt out, or --interactive")
    if "" in options.stop:
        raise InputError("--stop is empty: give the text to stop at, or leave it out")
    for name, text in (("--prompt", options.prompt), *(("--stop", stop) for stop in options.stop)):
        if not is_text(text):
            raise InputError(f"{name} is not UTF-8: give it as text")


def is_text(words: str) -> bool:
    """Whether there is no half of a surrogate pair in it, as which Python has bytes that are no UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in words)


def asked() -> Iterator[str]:
    """A line of standard input after another, until its end; on a terminal behind a `> `."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    while True:
        if on_terminal:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            if on_terminal:
                print()
            return
        if is_text(line):
            yield line.removesuffix("\n").removesuffix("\r")
        else:
            print("error: this prompt is not UTF-8: give it as text", file=sys.stderr, flush=True)


def writer(options: argparse.Namespace) -> Callable[[str], None]:
    """Loads the run. What is returned prints the texts from a prompt."""
    keep_to_the_cores_allowed()
    device = pick_device(options.device)
    model, tokenizer, saved = load_run(options.run, device)
    choose(saved_tiles(saved).table)
    config = on_device(TrainConfig.from_json(saved["config"]), model.config, device, compiles=False)
    model.to_forward_dtype(config.forward_dtype)
    reader = reader_of(model, lambda reason: print(f"note: without a cache, slowly: {reason}", file=sys.stderr))
    special = list(range(tokenizer.bos, tokenizer.vocab_size))
    seed = options.seed

    def say(prompt: str) -> None:
        nonlocal seed
        for _ in range(options.num_samples):
            if options.num_samples > 1:
                print(f"--- seed {seed}")
            tokens = generate(
                model, [tokenizer.bos, *tokenizer.encode(prompt)], options.tokens, banned=special,
                temperature=options.temperature, top_k=options.top_k, seed=seed, reader=reader,
            )  # fmt: skip
            seed = (seed + 1) % (MAX_SEED + 1)
            show(prompt, tokenizer, tokens, options.stop)

    return say


def show(prompt: str, tokenizer: Tokenizer, tokens: Iterator[int], stops: list[str]) -> None:
    """Prints the prompt and what follows it, piece by piece. What a model makes up is no command to a terminal."""
    shown = Terminal() if sys.stdout.isatty() else str
    print(shown(prompt), end="", flush=True)
    for piece in filter(None, until(stops, text_of(tokenizer, tokens))):
        print(shown(piece), end="", flush=True)
    print(flush=True)


class Terminal:
    """Text for a terminal, in pieces: a tab is as many spaces as lead to its stop, and what the terminal would obey is
    spelled out."""

    def __init__(self):
        self.column = 0

    def __call__(self, piece: str) -> str:
        return "".join(map(self._character, piece))

    def _character(self, character: str) -> str:
        if character == "\n":
            self.column = 0
            return character
        shown = " " * (TAB - self.column % TAB) if character == "\t" else printable(character)
        self.column += len(shown)
        return shown


if __name__ == "__main__":
    command(main)
