"""`python -m train.sample RUN --prompt TEXT`: text from a finished run."""

import sys

import torch
from torch import Tensor

from kernels import choose
from model import GPT
from prepare import InputError
from prepare.arguments import Parser, command
from prepare.errors import one_line
from prepare.words import printable

from .config import MAX_SEED, TrainConfig
from .device import keep_to_the_cores_allowed, ops_of_run, pick_device
from .results.run_folder import load_run
from .tune import saved_tiles


def next_token(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """One draw from logits [V]; the likeliest where temperature is 0. Raises InputError where no logit is a number."""
    logits = logits.float().cpu()
    if not logits.max().isfinite():
        raise InputError("the model's logits are not finite: it has learned nothing; name another RUN")
    if temperature == 0:
        return int(logits.argmax())
    if top_k:
        least = logits.topk(min(top_k, logits.numel())).values[-1]
        logits = logits.masked_fill(logits < least, float("-inf"))
    # Of differences from the largest, and in fp64: no temperature above 0 makes a NaN of them, however large or small.
    probabilities = torch.softmax((logits - logits.max()).double() / temperature, dim=-1).float()
    return int(torch.multinomial(probabilities, 1, generator=generator))


@torch.no_grad()
def generate(
    model: GPT, tokens: list[int], count: int, *, banned: list[int], temperature: float, top_k: int, seed: int
) -> list[int]:
    """`count` tokens after `tokens`, none of them from `banned`. The context is the last seq_len tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens, device = list(tokens), model.wte.device
    start = len(tokens)
    for _ in range(count):
        context = torch.tensor([tokens[-model.config.seq_len :]], device=device)
        logits = model(context)[0]
        logits[banned] = float("-inf")
        tokens.append(next_token(logits, temperature, top_k, generator))
    return tokens[start:]


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
        ops_of_run(TrainConfig.from_json(saved["config"]), model.config, device, compiles=False)
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
