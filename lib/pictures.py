"""
The pictures that runs leave: losses, and for classes ROC, precision and recall, calibration, confusion.

matplotlib is optional: without it that is said once. Text in pictures is text: a `$` begins no formula.
"""
import contextlib
import functools
import json
import re
import warnings
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

POINTS = 1000  # of a line, at most
SERIFS = re.compile("Serif|Song|Ming|Mincho|Kai")


@functools.cache
def can_draw() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("(no pictures are drawn: matplotlib is not installed: pip install matplotlib)", flush=True)
        return False
    except Exception as error:  # such as a notebook's MPLBACKEND, which this matplotlib does not know
        print(f"(no pictures are drawn: matplotlib does not start: {str(error)[:200]})", flush=True)
        return False
    return True


@contextlib.contextmanager
def style(text: str) -> Iterator[None]:
    """What a user's matplotlibrc cannot change, and fonts that have the letters of the text."""
    import matplotlib
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"text.parse_math": False, "font.family": fonts_with(text)})
        warnings.simplefilter("ignore")  # letters that no font here has: `fonts_with` has said so
        yield


@functools.cache
def fonts_with(text: str) -> list[str]:
    """Names of fonts here that together have the text's letters; which are missing is printed.

    Also of fonts that matplotlib's list, which it makes once and keeps, is too old to have.
    """
    from matplotlib.font_manager import findSystemFonts, fontManager, get_font
    found, missing = ["DejaVu Sans"], {ord(letter) for letter in text if letter.isprintable()}
    missing -= {*get_font(fontManager.findfont("DejaVu Sans")).get_charmap()}
    letters = {}  # name of a font -> those that it has of the missing
    listed = {font.fname for font in fontManager.ttflist}
    for file in sorted({*findSystemFonts()} - listed) if missing else ():
        with contextlib.suppress(Exception):  # a damaged file
            fontManager.addfont(file)
    for font in fontManager.ttflist if missing else ():
        if "Last Resort" in font.name:  # it has all letters, as boxes
            continue
        with contextlib.suppress(OSError, RuntimeError):  # a damaged file
            letters.setdefault(font.name, set()).update(missing & {*get_font(font.fname).get_charmap()})
    while missing:
        # of those that have as many, one in the manner of DejaVu Sans
        best = max(letters, default="",
                   key=lambda name: (len(letters[name] & missing), not SERIFS.search(name)))
        if not letters.get(best, set()) & missing:
            letters_lost = "".join(map(chr, sorted(missing)[:10]))
            print(f"(pictures: no font here has {letters_lost}: install one, such as Noto Sans CJK (apt "
                  "install fonts-noto-cjk))", flush=True)
            break
        found.append(best)
        missing -= letters[best]
    return found


def new_axes(**labels):
    from matplotlib import rcParams
    from matplotlib.figure import Figure  # not pyplot: no window, no state
    axes = Figure(figsize=(5.5, 5)).add_subplot()
    axes.set(**labels)
    colors = rcParams["axes.prop_cycle"].by_key()["color"]
    axes.set_prop_cycle(linestyle=["-"] * len(colors) + [":"] * len(colors), color=colors * 2)
    return axes


def save(axes, path: Path) -> str:
    try:
        axes.figure.savefig(path, dpi=110, bbox_inches="tight")
    except OSError as error:  # the numbers are safe, so it ends no run
        print(f"({path}: not drawn ({error.strerror or error}))", flush=True)
    return path.name


# -----------------------------------------------------------------------------
# Losses

LINES = {"loss": ("C0", "training, smoothed"), "train_loss": ("C2", "training, a fixed part, evaluated"),
         "val_loss": ("C1", "validation")}


def plot_losses(log: Path, picture: Path, unit: str = "nats a token", scale: float = 1.0) -> None:
    """The losses in log.jsonl. scale: what makes an evaluation's loss one of the training steps' unit."""
    if not can_draw():
        return
    steps, losses = read_losses(log)
    with style(str(log.parent)):
        axes = new_axes(title=f"Loss of {log.parent.name}", xlabel="step", ylabel=f"loss, {unit}")
        axes.figure.set_size_inches(7, 4)
        for key, (color, label) in LINES.items():
            x, y = np.array(steps[key]), np.array(losses[key])
            if not len(x):
                continue
            at = thinned(len(x))
            if key == "loss":
                axes.plot(x[at], y[at], color=color, alpha=0.25, lw=0.8)
                y = smoothed(y)
            else:
                y = y * scale
            marked = key != "loss" or len(x) < 3
            axes.plot(x[at], y[at], "o-" if marked else "-", ms=3, lw=1.3, color=color, label=label)
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if axes.lines:
            axes.legend(loc="upper right")  # where a loss, which falls, rarely is
        save(axes, picture)


def read_losses(log: Path) -> tuple[dict, dict]:
    """Steps and values of each line, read a row at a time."""
    steps, losses = ({key: array("d") for key in LINES} for _ in range(2))
    with open(log, encoding="utf-8", errors="replace") as f:
        for line in f:
            with contextlib.suppress(ValueError, TypeError, KeyError):  # a row that was not finished
                row = json.loads(line)
                for key in LINES.keys() & row.keys():
                    value = float(row[key])
                    steps[key].append(row["iter"])
                    losses[key].append(value)
    return steps, losses


def smoothed(y: np.ndarray) -> np.ndarray:
    """The mean of the last fiftieth of the points, at each."""
    size = max(1, len(y) // 50)
    sums = np.cumsum(np.append(0.0, np.nan_to_num(y)))
    first = np.maximum(0, np.arange(len(y)) + 1 - size)
    return (sums[1:] - sums[first]) / (np.arange(len(y)) + 1 - first)


def thinned(n: int) -> np.ndarray:
    """Which of n points are kept: the first, the last, and evenly between."""
    return np.unique(np.linspace(0, n - 1, min(POINTS, n)).round().astype(int))


# -----------------------------------------------------------------------------
# Classes

def draw_classes(folder: Path, labels: list, curves: dict, calibration: list,
                 confusion: list | None) -> list[str]:
    """The pictures of what is in curves.json. Returns the names of the files."""
    labels = list(map(short, labels))
    with style("".join(labels)):
        found = [save(roc(curves), folder / "roc.png"),
                 save(precision_recall(curves), folder / "precision_recall.png"),
                 save(trust(calibration), folder / "calibration.png")]
        if confusion:
            found.append(save(confused(np.array(confusion), labels), folder / "confusion.png"))
    return found


def short(label) -> str:
    """A sentence for a label leaves no room for the picture, and takes minutes to be drawn."""
    return str(label) if len(str(label)) <= 40 else f"{str(label)[:40]}..."


def roc(curves: dict):
    axes = new_axes(title="ROC, and the area below", xlabel="False positive rate",
                    ylabel="True positive rate")
    for name, one in curves.items():
        # the space in front: a label that begins with _ is left out
        label = f" {short(name)} (AUC = {one['roc_auc']:.2f})"
        axes.plot(one["false_positive_rate"], one["true_positive_rate"], label=label)
    axes.plot([0, 1], [0, 1], color="grey", ls="--", lw=1, label="by chance")
    legend(axes)
    return axes


def precision_recall(curves: dict):
    axes = new_axes(title="Precision and recall, and average precision", xlabel="Recall", ylabel="Precision")
    for name, one in curves.items():
        label = f" {short(name)} (AP = {one['average_precision']:.2f})"
        recall, precision = np.array(one["true_positive_rate"]), np.array(one["precision"])
        first = np.argmax(recall > 0)  # before it nothing is found, whose precision says nothing
        line, = axes.step(np.append(0, recall[first:]), precision[[first, *range(first, len(recall))]],
                          label=label)
        axes.axhline(one["share"], color=line.get_color(), ls="--", lw=1)
    axes.plot([], [], color="grey", ls="--", lw=1, label="by chance: the share of the class")
    axes.set_ylim(-0.01, 1.01)
    legend(axes)
    return axes


def trust(calibration: list):
    axes = new_axes(title="Calibration", xlabel="Probability of the answer, mean of each tenth",
                    ylabel="Share of the answers that are right")
    confidence, right, _ = zip(*calibration)
    axes.plot([0, 1], [0, 1], color="grey", ls="--", lw=1, label="perfect; below: too sure")
    axes.plot(confidence, right, "o-", label="this model")
    legend(axes)
    return axes


def confused(table: np.ndarray, labels: list):
    """Numbers, and of each true class's row the shares, which are the colours."""
    n = len(labels)
    axes = new_axes(title="Confusion: rows, and shares of each true class", xlabel="Predicted", ylabel="True")
    axes.figure.set_size_inches(2 * (max(5.0, min(2 + 0.7 * n, 16.0)),))
    shares = table / np.maximum(table.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(n), labels, rotation="vertical" if n > 4 else "horizontal")
    axes.set_yticks(range(n), labels)
    for i, j in np.ndindex(n, n) if n <= 20 else ():
        if table[i, j]:
            axes.text(j, i, f"{table[i, j]:,}\n{shares[i, j]:.0%}", ha="center", va="center", fontsize=8,
                      color="white" if shares[i, j] > 0.5 else "black")
    return axes


def legend(axes) -> None:
    if len(axes.get_legend_handles_labels()[0]) > 8:
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    else:
        axes.legend(fontsize=9)
