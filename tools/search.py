"""
Search for good settings of a script. Each trial is a process of its own: a crash is one row of the table.

    python -m tools.search train.py config/small.py learning_rate=1e-4..1e-2 dropout=0,0.1,0.2
    python -m tools.search train.py config/small.py --max_iters=300 n_layer=2..8 --method=random --trials=30
    python -m tools.search finetune.py --data=reviews.csv learning_rate=1e-5..1e-3 --metric=accuracy

First comes the script, with the config files and --key=value that all trials share; then, without dashes,
what is searched: name=low..high, in factors if it spans ten times or more, and name=a,b,c. A trial is as good
as its best evaluation on the validation data, with --folds as these are on average: the test is shown once,
of the winner. The same command again goes on where it was stopped. In --out_dir: search.jsonl, a row a trial;
best.py, the winner as a config file that runs as it is; search.png, if matplotlib is installed; a folder for
each trial.

A script of your own can be searched if it has a setting out_dir, and writes its evaluations there as
log.jsonl: {"iter": 100, "val_loss": 1.5}.
"""
from __future__ import annotations

import itertools
import json
import math
import random
import runpy
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, Optional

import config
from config import Setting, SettingError, UserError, above, at_least, checked, parse
from lib.pictures import can_draw
from lib.run import locked, write_text
from lib.text import wait_for

# -----------------------------------------------------------------------------
# Settings
out_dir: str = "out/search"  # where everything goes; trial 3 into its subfolder 3
method: Literal["bayes", "random", "grid"] = "bayes"  # bayes learns from the trials before, by optuna
trials: at_least(1) = 20  # rows of the table, at most
minutes: Optional[above(0.0)] = None  # no trial starts after so many
trial_minutes: Optional[above(0.0)] = None  # a trial is stopped after so many, and counts as it then stands
metric: str = "loss"  # on the validation data, as log.jsonl has it; bpb if the tokenizers differ
goal: Literal["auto", "min", "max"] = "auto"  # is the metric better low or high? auto: as its name says
prune_after: at_least(0) = 4  # finished trials from which on one that falls behind them is stopped; 0: never
search_seed: int = 0  # of the draws; the script's own seed is a setting like others
# -----------------------------------------------------------------------------

GOALS = {  # words of a metric's name
    min: {"loss", "bpb", "perplexity", "error"},
    max: {"accuracy", "f1", "matthews", "auc", "precision", "recall", "pearson", "spearman", "match"}}
STATES = ("done", "pruned", "failed")  # how a trial ends, the best first
ROW = {"trial": int, "settings": dict, "state": str, "value": (int, float, type(None)), "note": str,
       "seconds": (int, float), "curve": list}  # of search.jsonl, a trial
GRID = 5  # points that a grid takes of a range


# -----------------------------------------------------------------------------
# What there is to try

class Space(NamedTuple):
    """What a setting may be: one of `choices`, or a number from low to high, of low's type."""
    choices: list
    low: Any = None
    high: Any = None
    log: bool = False  # by factors

    def at(self, share: float) -> Any:
        """The value at this share of the way: from 0 to 1, of choices below 1."""
        if self.choices:
            return self.choices[int(share * len(self.choices))]
        if self.log:
            value = min(self.low * (self.high / self.low) ** share, self.high)
        else:
            value = self.low + share * (self.high - self.low)
        return round(value) if isinstance(self.low, int) else value


def settings_of(script: str) -> tuple[dict[str, Setting], list[tuple]]:
    """What a script would start with, and what makes a setting of use (ONLY, see config.check_used).

    The script runs up to its config.launch, which only looks here. Raises UserError if it has no settings, or
    no out_dir among them.
    """
    found, only = {}, []

    def look(main, namespace, fields=None, stored=None):
        found.update(config.fields_of(fields) | config.settings_of(namespace))
        only.extend(namespace.get("ONLY", ()))

    start, config.launch = config.launch, look
    sys.path.insert(0, str(Path(script).parent))
    reason = "it has no setting out_dir"
    try:
        runpy.run_path(script, run_name="__main__")
    except (Exception, SystemExit) as error:  # whatever is wrong with the user's own code
        reason = f"{type(error).__name__}: {error}"
    finally:
        config.launch = start
        sys.path.pop(0)
    if "out_dir" not in found:
        raise UserError(f"{script}: cannot be searched: {reason}")
    return found, only


def read_space(word: str, kind: Any) -> Space:
    """name=low..high or name=a,b,c. Raises SettingError, also for a value that the setting cannot have."""
    text = word.partition("=")[2]
    separator = ".." if ".." in text else ","
    values = [checked(parse(part, kind), kind, word) for part in text.split(separator)]
    if separator == ",":
        return Space(values)
    if len(values) != 2 or not {type(value) for value in values} <= {int, float} or values[0] >= values[1]:
        raise SettingError(f"{word}: a range is low..high, in numbers; a choice is a,b,c")
    low, high = values
    return Space([], low, high, log=0 < 10 * low <= high)


def read_words(words: list[str], settings: dict[str, Setting]) -> tuple[dict, dict[str, Space]]:
    """What all trials share, left to right, and what is searched. Raises SettingError."""
    shared, spaces = {}, {}
    for word in words:
        name, equals, _ = word.partition("=")
        if word.startswith("-"):
            shared.update(config.from_flag(word, settings))
        elif not (equals and name.isidentifier()):
            shared.update(config.from_file(word, settings))
        elif name not in settings:
            raise config.unknown(word, name, settings)
        elif name == "out_dir":
            raise SettingError(f"{word}: each trial has its own")
        elif name in spaces:
            raise SettingError(f"{word}: is given twice")
        else:
            spaces[name] = read_space(word, settings[name].kind)
    if not spaces:
        raise SettingError("nothing to search: name settings and their values, learning_rate=1e-4..1e-2 or "
                           "dropout=0,0.1,0.2")
    return shared, spaces


def useful(settings: dict, searched, only: list[tuple]) -> dict:
    """Without those that a searched setting makes useless: no muon_lr in a trial whose optimizer is adamw."""
    kept = dict(settings)
    for name, other, values in only:
        if other in searched and not (kept.get(other) in values if values else kept.get(other)):
            kept.pop(name, None)
    return kept


def propose(method: str, spaces: dict[str, Space], rows: list[dict], best, seed: int,
            only: list[tuple] = ()) -> Optional[dict]:
    """The settings of the next trial, those of use; None if all have been tried.

    A function of the rows so far and the seed alone: a search resumes from its rows. best: min or max.
    """
    draw = random.Random(f"{seed} {len(rows)}")
    points = grid(spaces)
    if method != "grid":
        points = ({name: space.at(draw.random()) for name, space in spaces.items()} for _ in range(1000))
    if method == "bayes":
        points = itertools.chain([ask_optuna(spaces, rows, best, draw.getrandbits(31))], points)
    points = (useful(point, spaces, only) for point in points)
    tried = {json.dumps(row["settings"]) for row in rows}
    return next((point for point in points if json.dumps(point) not in tried), None)


def grid(spaces: dict[str, Space]) -> Iterator[dict]:
    return (dict(zip(spaces, values)) for values in itertools.product(*axes(spaces)))


def axes(spaces: dict[str, Space]) -> list[list]:
    return [space.choices or [space.at(i / (GRID - 1)) for i in range(GRID)] for space in spaces.values()]


def combinations(spaces: dict[str, Space], only: list[tuple]) -> str:
    """How many a grid has, as far as they are soon counted: of ten ranges there are ten million."""
    most = math.prod(map(len, axes(spaces)))
    if most > 100_000:
        return f"up to {most:,}"
    return f"{len({json.dumps(useful(point, spaces, only)) for point in grid(spaces)}):,}"


def ask_optuna(spaces: dict[str, Space], rows: list[dict], best, seed: int) -> dict:
    """The point of which a tree-structured Parzen estimator (Bergstra et al. 2011) expects most."""
    try:
        import optuna
    except ImportError:
        raise UserError("--method=bayes needs optuna: pip install optuna; or --method=random") from None
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
    from optuna.trial import TrialState
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    kinds = {}
    for name, (choices, low, high, log) in spaces.items():
        number = IntDistribution if isinstance(low, int) else FloatDistribution
        kinds[name] = CategoricalDistribution(choices) if choices else number(low, high, log=log)
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=4)
    study = optuna.create_study(direction="minimize" if best is min else "maximize", sampler=sampler)
    for row in rows:
        state, value = TrialState.COMPLETE, row["value"]
        if row["state"] != "done":
            state, value = TrialState.PRUNED, None  # optuna takes these for worse than all others
        study.add_trial(optuna.trial.create_trial(
            state=state, value=value, params=row["settings"], intermediate_values=dict(row["curve"]),
            distributions={name: kinds[name] for name in row["settings"]}))
    return study.ask(kinds).params


# -----------------------------------------------------------------------------
# One trial

def goal_of(name: str) -> Any:
    """min or max, whichever is better. Raises SettingError if the name does not say."""
    known = [best for best, words in GOALS.items() if words & set(name.split("_"))]
    if goal == "auto" and len(known) != 1:
        raise SettingError(f"--metric={metric}: is a low value better, or a high one? --goal=min, --goal=max")
    return known[0] if goal == "auto" else {"min": min, "max": max}[goal]


class Curve:
    """A metric as it goes by the log.jsonl of a trial that may still run. Each line is read once."""

    def __init__(self, log: Path, metric: str):
        self.log, self.metric, self.offset = log, metric, 0
        self.points = []  # [step, value] of each evaluation
        self.seen = {}  # what was evaluated, in the order of coming

    def grown(self) -> bool:
        """Read on. Is there something new?"""
        before = len(self.points)
        with suppress(FileNotFoundError), open(self.log, "rb") as f:
            f.seek(self.offset)
            for line in f:
                if not line.endswith(b"\n"):  # it is being written
                    break
                self.offset += len(line)
                with suppress(ValueError, AttributeError):  # no JSON, no object
                    self.add(json.loads(line))
        return len(self.points) > before

    def add(self, row: dict) -> None:
        self.seen.update(dict.fromkeys(name for name in row if name.startswith("val_")))
        value = row.get(self.metric)
        if isinstance(value, (int, float)) and math.isfinite(value):
            self.points.append([row.get("iter", len(self.points)), value])


def value_of(folder: Path, metric: str, best) -> float:
    """The best evaluation of a trial that has ended; on average, if it had folds. Raises UserError."""
    found = []
    for log in sorted(folder.glob("fold*/log.jsonl")) or [folder / "log.jsonl"]:
        curve = Curve(log, metric)
        curve.grown()
        if not curve.points:
            raise UserError(f"{metric} was never a finite number" if metric in curve.seen else
                            f"no {metric} in {log.name}, which has {', '.join(curve.seen) or 'no val_...'}")
        found.append(best(value for _, value in curve.points))
    return statistics.mean(found)


def hopeless(curve: list, others: list[list], best) -> bool:
    """Is its best worse than what half of the others had by this step? (The median rule of Vizier.)"""
    then = []
    for other in others:
        values = [value for step, value in other if step <= curve[-1][0]]
        if values:
            then.append(best(values))
    if not then or 2 * len(then) < len(others):
        return False  # few of them looked so early
    mine = best(value for _, value in curve)
    return best(mine, statistics.median(then)) != mine


# How a trial is run: as `python script ...`, but it ends, and saves, when the search that holds its standard
# input is gone, even by kill -9.
TRIAL = """
import os, runpy, signal, sys, threading
def wait():
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=wait, daemon=True).start()
del sys.argv[0]
sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def try_out(words: list[str], folder: Path, metric: str, best, others: list[list], seconds: float) -> dict:
    """Run one trial to its end, or as long as there is hope; its row of search.jsonl.

    words: the script, and its settings. best: min or max. others: the curves of finished trials to compare
    with, maybe none.
    """
    output = folder / "output.txt"
    if output.exists():  # of a trial that was interrupted, and may be about to end
        wait_for(folder / "run.lock").close()
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    started, state, note = time.time(), "done", ""
    curve = Curve(folder / "log.jsonl", metric)
    with open(output, "w", encoding="utf-8") as f:
        process = subprocess.Popen([sys.executable, "-c", TRIAL, *words], stdin=subprocess.PIPE, stdout=f,
                                   stderr=subprocess.STDOUT)
    try:
        while process.poll() is None and not note:
            if time.time() - started > seconds:
                note = "stopped: its time was over"
            elif curve.grown() and hopeless(curve.points, others, best):
                state, note = "pruned", "stopped: behind the others"
            else:
                time.sleep(0.2)
    finally:  # after Ctrl-C too
        process.terminate()
        process.wait()
        process.stdin.close()
    curve.grown()
    value = None
    if process.returncode and not note:
        text = output.read_text(encoding="utf-8", errors="replace").strip()
        state, note = "failed", (text or f"exit status {process.returncode}").splitlines()[-1]
    else:
        try:
            value = value_of(folder, metric, best)
        except UserError as error:
            state, note = "failed", str(error)
    return {"state": state, "value": value, "note": note, "seconds": round(time.time() - started, 1),
            "curve": curve.points}


# -----------------------------------------------------------------------------
# What was found

def ranked(rows: list[dict], best) -> list[dict]:
    """The best first; those that were stopped, and then those that failed, last."""
    sign = 1 if best is min else -1
    return sorted(rows, key=lambda row: (STATES.index(row["state"]), sign * (row["value"] or 0)))


def short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(rows: list[dict], metric: str) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["settings"]))
    lines = [["trial", metric, *names, "seconds", ""]]
    for row in rows:
        value = row["state"] if row["value"] is None else f"{row['value']:.4f}"
        settings = [short(row["settings"].get(name, "-")) for name in names]
        lines.append([str(row["trial"]), value, *settings, f"{row['seconds']:.0f}", row["note"]])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join([*map(str.rjust, line[:-1], widths), line[-1]]) for line in lines)


def plot(rows: list[dict], spaces: dict[str, Space], metric: str, picture: Path) -> None:
    """The metric against each setting, if matplotlib is installed."""
    if not can_draw():
        return
    from matplotlib.figure import Figure
    figure = Figure(figsize=(3 * len(spaces) + 1, 3.3), layout="constrained")
    rows = [row for row in rows if row["value"] is not None]
    figure.suptitle(f"{metric} of {len(rows)} trials")
    for n, (name, space) in enumerate(spaces.items(), start=1):
        shown = [row for row in rows if name in row["settings"]]
        places = [row["settings"][name] for row in shown]
        axes = figure.add_subplot(1, len(spaces), n, xlabel=name, ylabel=metric)
        if space.choices:
            axes.set_xticks(range(len(space.choices)), space.choices)
            places = list(map(space.choices.index, places))
        axes.plot(places, [row["value"] for row in shown], "o", alpha=0.6)
        if space.log:
            ticks = [space.low, (space.low * space.high) ** 0.5, space.high]
            axes.set_xscale("log")
            axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
            axes.minorticks_off()  # their labels would lie on each other
    figure.savefig(picture, dpi=100)


# -----------------------------------------------------------------------------

def read_rows(log: Path, search: dict) -> list[dict]:
    """The trials so far. Raises SettingError if they cannot be read, or are of another search."""
    try:
        known, *rows = map(json.loads, log.read_text(encoding="utf-8").splitlines())
        # a trial's number, for one, names the folder whose checkpoints are removed
        types = [isinstance(row[name], kind) for row in rows for name, kind in ROW.items()]
        ended = [row["state"] in STATES for row in rows]
        valued = [row["value"] is not None for row in rows if row["state"] == "done"]
        ours = known == search and all(types + ended + valued)
    except (KeyError, TypeError, ValueError):
        ours = False
    if not ours:
        raise SettingError(f"{log}: damaged, or of another search than this one: --out_dir=FOLDER writes "
                           "elsewhere")
    print(f"{log}: going on after {len(rows)} trials")
    return rows


def keep_best(rows: list[dict], best, folder: Path, search: dict, only: list[tuple] = ()) -> None:
    """The winner so far as best.py; the checkpoints of the others go."""
    if not rows:
        return
    first, *rest = ranked(rows, best)
    for row in rest:
        for file in (folder / str(row["trial"])).rglob("*.pt"):
            file.unlink()  # a disk fills quickly
    if first["state"] == "done":
        winner = folder / "best.py"
        settings = useful({**search["shared"], **first["settings"]}, search["spaces"], only)
        settings["out_dir"] = (folder / "best").as_posix()
        lines = [f"{key} = {value!r}\n" for key, value in settings.items()]
        write_text(winner, f"# python {search['script']} {winner.as_posix()}\n# {search['metric']} "
                           f"{first['value']:.6g}, trial {first['trial']} of {len(rows)}\n{''.join(lines)}")


def test_of(folder: Path, metric: str) -> str:
    """What a trial's metrics.json, if it has one, says of its test."""
    name = metric.removeprefix("val_")
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        return f"; on the test, which chose nothing, {name} {short(found[name])}"
    return ""


def main(words: list[str]):
    script = words[0] if words else ""
    if not Path(script).is_file():
        raise SettingError(f"{script!r}: no script to run; first comes one, then what is searched: "
                           "python -m tools.search train.py learning_rate=1e-4..1e-2")
    settings, only = settings_of(script)
    shared, spaces = read_words(words[1:], settings)
    name = "val_" + metric.removeprefix("val_")
    best = goal_of(name)
    print(f"metric    {name}, of the validation data: the {best.__name__}imum is best")
    folder = Path(out_dir)
    log, winner = folder / "search.jsonl", folder / "best.py"
    search = {"script": script, "shared": shared, "metric": name,
              "spaces": {name: space._asdict() for name, space in spaces.items()}}
    folder.mkdir(parents=True, exist_ok=True)
    lock = locked(folder / "run.lock")
    rows = read_rows(log, search) if log.exists() else []
    keep_best(rows, best, folder, search, only)  # which is another if --goal is

    if method == "grid":
        print(f"grid      {combinations(spaces, only)} combinations, of which --trials={trials} are tried at "
              "most")
    started = time.time()
    while len(rows) < trials and time.time() - started < 60 * (minutes or math.inf):
        point = propose(method, spaces, rows, best, search_seed, only)
        if point is None:
            print("every combination has been tried")
            break
        number = len(rows) + 1
        print(f"trial {number} of {trials}:", *(f"{k}={short(v)}" for k, v in point.items()), flush=True)
        place = folder / str(number)
        given = useful({**shared, **point}, spaces, only)
        flags = [f"--{k}={v}" for k, v in {**given, "out_dir": place}.items()]
        others = [row["curve"] for row in rows if row["state"] == "done"]
        if not 0 < prune_after <= len(others):
            others = []
        row = try_out([script, *flags], place, name, best, others, 60 * (trial_minutes or math.inf))
        rows.append({"trial": number, "settings": point, **row})
        write_text(log, "".join(json.dumps(line) + "\n" for line in (search, *rows)))
        print(f"  {row['state']}: {name} {short(row['value'])}  {row['note']}", flush=True)
        keep_best(rows, best, folder, search, only)
        plot(rows, spaces, name, folder / "search.png")
    print(table(ranked(rows, best), name))
    lock.close()
    if not winner.exists():
        raise UserError(f"{log}: no trial has finished; {folder / '1' / 'output.txt'} may say why")
    first = ranked(rows, best)[0]
    print(f"the best of {len(rows)} trials: python {script} {shlex.quote(winner.as_posix())}"
          + test_of(folder / str(first["trial"]), name))


if __name__ == "__main__":
    for one in ("SIGTERM", "SIGHUP"):  # they end the trial under way, as Ctrl-C does
        if getattr(signal, one, None) and signal.getsignal(getattr(signal, one)) != signal.SIG_IGN:
            signal.signal(getattr(signal, one), signal.default_int_handler)
    mine = ["-h", "--help", *(f"--{name}" for name in config.values_of(globals()))]
    others = [word for word in sys.argv[1:] if word.partition("=")[0] not in mine]
    sys.argv[1:] = [word for word in sys.argv[1:] if word not in others]
    config.launch(lambda: main(others), globals())
