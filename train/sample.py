"""`python -m train.sample RUN --prompt TEXT`: text from a finished run."""

import sys

from kernels import choose
from prepare import InputError
from prepare.arguments import Parser, command
from prepare.errors import one_line
from prepare.words import printable

from .config import MAX_SEED, TrainConfig
from .device import keep_to_the_cores_allowed, on_device, pick_device
from .generate import generate
from .results.run_folder import load_run
from .tune import saved_tiles


def main(args: list[str] | None = None) -> int:
    parser = Parser("train.sample", __doc__)
    parser.add_argument("run", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--prompt", default="", help="text to go on from")
    parser.add_argument("--tokens", type=int, default=200, help="how many to generate (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest (default: 0.8)")
    parser.add_argument("--top-k", type=int, default=50, help="draw from the k likeliest; 0: from all (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="(default: cuda where there is one)")
    options = parser.parse_args(args)
    try:
        if options.tokens < 0 or options.top_k < 0:
            raise InputError(f"--tokens {options.tokens}, --top-k {options.top_k}: neither may be negative")
        if not 0 <= options.temperature < float("inf"):
            raise InputError(f"--temperature {options.temperature} must be a number, 0 or larger")
        if not 0 <= options.seed <= MAX_SEED:
            raise InputError(f"--seed {options.seed} must be from 0 to {MAX_SEED}")
        if any("\ud800" <= character <= "\udfff" for character in options.prompt):  # how Python has other bytes
            raise InputError("--prompt is not UTF-8: give it as text")
        keep_to_the_cores_allowed()
        device = pick_device(options.device)
        model, tokenizer, saved = load_run(options.run, device)
        choose(saved_tiles(saved).table)
        config = on_device(TrainConfig.from_json(saved["config"]), model.config, device, compiles=False)
        model.to_forward_dtype(config.forward_dtype)
        special = list(range(tokenizer.bos, tokenizer.vocab_size))
        given = options.prompt.encode(errors="surrogateescape").decode(errors="replace")  # what is no UTF-8 is U+FFFD
        prompt = [tokenizer.bos, *tokenizer.encode(given)]
        text = generate(
            model, prompt, options.tokens,
            banned=special, temperature=options.temperature, top_k=options.top_k, seed=options.seed,
        )  # fmt: skip
    except (InputError, OSError) as error:
        print(f"error: {one_line(error, 'name another RUN')}", file=sys.stderr)
        return 2
    said = given + tokenizer.decode(text)
    if sys.stdout.isatty():  # what a model makes up is no command to a terminal
        said = "\n".join(printable(line.expandtabs()) for line in said.split("\n"))
    print(said)
    return 0


if __name__ == "__main__":
    command(main)
