"""How the pictures look. Matplotlib is imported when a picture is drawn: no step waits for it.

Colours are Okabe and Ito's, told apart by the colour-blind too; what matters differs in shape as well.
"""

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from ..resilience.durable import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GREY, PALE = "#222222", "#8a8a8a", "#dddddd"
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
DPI = 100


def new_figure(width: float, height: float) -> "Figure":
    """Inches at 100 dots each. Drawn without a display, and without pyplot's global state. Text is text: what people
    call a run is no formula, whatever stands between two dollar signs."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    warnings.filterwarnings("ignore", "Glyph .* missing")  # of a script that the font lacks there are boxes
    matplotlib.rcParams.update({"text.parse_math": False, "text.usetex": False})
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: "Figure", path: Path) -> None:
    """As PNG; the file that was there stays until this one is whole."""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    replace_file(path, content.getbuffer())


def tidy(axes: "Axes") -> None:
    """A quiet frame: two spines, a pale grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK, labelsize=9, length=3)
    axes.grid(color=PALE, linewidth=0.6)
    axes.set_axisbelow(True)
