"""The two ceilings of a device, measured: bytes/s of a large copy, FLOP/s of a large matrix product.

`python -m bench.ceilings [--json FILE]`. What an op reaches is judged against these, and beside them against the
datasheet: no code of ours is to be blamed for what the vendor's own copy and product do not reach. A copy counts the
bytes read and the bytes written. The product is of random data: zeros need less power, and run faster than training.
"""

import json
import platform
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from model.flops import device_peak
from prepare.arguments import Parser, command
from prepare.words import printable
from train.device import keep_to_the_cores_allowed
from train.resilience.durable import replace_file
from train.tune.timing import time_call

# Bytes/s by whole words of the device's name, from the vendor's datasheets; the first match counts.
DATASHEET_BANDWIDTHS = {
    "H200": 4.8e12,
    "H100 PCIe": 2.0e12,
    "H100 NVL": 3.9e12,
    "H100": 3.35e12,
    "A100-SXM4-80GB": 2.039e12,
    "A100-SXM4-40GB": 1.555e12,
    "L40S": 864e9,
    "L4": 300e9,
}
COPY_BYTES = {"cuda": 2**31, "cpu": 2**27}  # past every cache: 128 MiB are four times this CPU's last level
PRODUCT_SIZE = {"cuda": 8192, "cpu": 1024}


@dataclass(frozen=True)
class Ceilings:
    """FLOP/s of a large product of random data (bf16 on a GPU, fp32 on a CPU), bytes/s of a copy on the device."""

    flops: float
    bandwidth: float

    def seconds(self, num_bytes: float, flops: float) -> float:
        """The longer of the two times: as if moving and multiplying overlapped wholly."""
        return max(num_bytes / self.bandwidth, flops / self.flops)


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"cpu ({platform.machine()})"


def datasheet(name: str) -> Ceilings | None:
    """What the vendor promises for a device by its name, None where the tables do not know it."""
    flops = device_peak(name)
    bandwidth = next((value for key, value in DATASHEET_BANDWIDTHS.items() if re.search(rf"\b{key}\b", name)), None)
    return Ceilings(flops, bandwidth) if flops and bandwidth else None


def _copy_bandwidth(device: str) -> float:
    source = torch.randn(COPY_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES[device] / time_call(lambda: target.copy_(source), device).median


def _product_rate(device: str) -> float:
    n, dtype = PRODUCT_SIZE[device], torch.bfloat16 if device == "cuda" else torch.float32
    a, b, out = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(3))
    return 2 * n**3 / time_call(lambda: torch.mm(a, b, out=out), device).median


def measure(device: str) -> Ceilings:
    """Medians of a copy and of a square product on `device`, "cuda" or "cpu"."""
    return Ceilings(flops=_product_rate(device), bandwidth=_copy_bandwidth(device))


def report(name: str, measured: Ceilings) -> None:
    promised = datasheet(name)
    rows = [("copy", measured.bandwidth, "GB/s", 1e9, promised and promised.bandwidth),
            ("product", measured.flops, "TFLOP/s", 1e12, promised and promised.flops)]  # fmt: skip
    print(name)
    for what, value, unit, scale, limit in rows:
        share = f", {value / limit:.0%} of the datasheet's {limit / scale:,.0f}" if limit else ""
        print(f"{what:<8} {value / scale:>9,.4g} {unit}{share}")


def main(args: list[str] | None = None) -> int:
    parser = Parser("bench.ceilings", __doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write them there too")
    options = parser.parse_args(args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    keep_to_the_cores_allowed()
    measured = measure(device)
    report(device_name(device), measured)
    if options.json:
        try:
            content = json.dumps({"device": device_name(device), **asdict(measured)}, indent=2) + "\n"
            replace_file(options.json, content.encode())
        except OSError as error:
            print(f"error: --json {printable(options.json)}: {error.strerror}: name another file", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    command(main)
