"""Event files for TensorBoard, where it is installed: `--tensorboard`."""

from importlib.util import find_spec
from pathlib import Path

from prepare import InputError
from prepare.words import install_line, is_utf8

SHOWN = ("loss", "smooth_loss", "lr_multiplier", "tokens_per_second", "mfu")


def check_tensorboard(folder: Path) -> None:
    """Raises InputError where the package is missing, or cannot write below a path as that of `folder`."""
    if find_spec("tensorboard") is None:
        raise InputError(
            f"--tensorboard: the package is not installed: {install_line('-e', '.[tensorboard]')},"
            " or leave the flag out"
        )
    if not is_utf8(folder):
        what = f"the package takes no path that is not UTF-8, as {folder}"
        raise InputError(f"--tensorboard: {what}: choose another --run-dir, or leave the flag out")


class EventWriter:
    """Writes the scalars of each row of metrics.jsonl below `folder`, in a thread of TensorBoard's own."""

    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter  # seconds of import, for who asks for it

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, row: dict) -> None:
        for name in SHOWN:
            if row[name] is not None:
                self._writer.add_scalar(name, row[name], row["step"])

    def close(self) -> None:
        self._writer.close()
