"""
Search for good settings of a script. Each trial is a process of its own: a crash is one row of the table.

    python -m tools.search train.py config/small.py learning_rate=1e-4..1e-2 dropout=0,0.1,0.2
    python -m tools.search train.py config/small.py --max_iters=300 n_layer=2..8 --method=random --trials=30

First comes the script, with the config files and --key=value that all trials share; then, without dashes,
what is searched: name=low..high, in factors if it spans ten times or more, and name=a,b,c. The same command
again goes on where it was stopped. In --out_dir: search.jsonl, a row a trial; best.py, the winner as a config
file that runs as it is; search.png, if matplotlib is installed; a folder for each trial.
"""
from __future__ import annotations

import itertools
import json
import math
import random
import runpy
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Optional

import config
from config import Setting, SettingError, UserError, above, at_least, checked, parse
from lib.run import write_text

# -----------------------------------------------------------------------------
# Settings
out_dir: str = "out/search"  # where everything goes; trial 3 into its subfolder 3
method: Literal["bayes", "random", "grid"] = "bayes"  # bayes learns from the trials before, by optuna
trials: at_least(1) = 20  # rows of the table, at most
minutes: Optional[above(0.0)] = None  # no trial starts after so many
trial_minutes: Optional[above(0.0)] = None  # a trial is stopped after so many, and counts as it then stands
metric: str = "val_loss"  # any key of log.jsonl or metrics.json; val_bpb if the tokenizers differ
prune_after: at_least(0) = 4  # finished trials from which on one that falls behind them is stopped; 0: never
search_seed: int = 0  # of the draws; the script's own seed is a setting like others
# -----------------------------------------------------------------------------

LOW_IS_BEST = {"loss", "bpb", "perplexity", "error", "mae", "mse", "rmse", "brier", "ece", "dt", "elapsed"}
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


def settings_of(script: str) -> dict[str, Setting]:
    """What a script would start with: it runs up to its config.launch, which only looks here.

    Raises UserError if it has no settings, or no out_dir among them.
    """
    found = {}

    def look(main, namespace, fields=None, stored=None):
        found.update(config.fields_of(fields) | config.settings_of(namespace))

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
    return found


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
        else:
            spaces[name] = read_space(word, settings[name].kind)
    if not spaces:
        raise SettingError("nothing to search: name settings and their values, learning_rate=1e-4..1e-2 or "
                           "dropout=0,0.1,0.2")
    return shared, spaces


def propose(method: str, spaces: dict[str, Space], rows: list[dict], best, seed: int) -> Optional[dict]:
    """The settings of the next trial; None if all have been tried.

    A function of the rows so far and the seed alone: a search resumes from its rows. best: min or max.
    """
    tried = [row["settings"] for row in rows]
    for point in candidates(method, spaces, rows, best, seed):
        if point not in tried:
            return point
    return None


def candidates(method: str, spaces: dict[str, Space], rows: list[dict], best, seed: int) -> Iterator[dict]:
    if method == "grid":
        axes = []
        for space in spaces.values():
            axes.append(space.choices or [space.at(i / (GRID - 1)) for i in range(GRID)])
        for values in itertools.product(*axes):
            yield dict(zip(spaces, values))
        return
    draw = random.Random(f"{seed} {len(rows)}")
    if method == "bayes":
        yield ask_optuna(spaces, rows, best, draw.getrandbits(31))
    for _ in range(1000):
        yield {name: space.at(draw.random()) for name, space in spaces.items()}


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
            state=state, value=value, params=row["settings"], distributions=kinds,
            intermediate_values=dict(row["curve"])))
    return study.ask(kinds).params


# -----------------------------------------------------------------------------
# One trial

def read_curve(file: Path, metric: str) -> list:
    """The metric as it went by log.jsonl, or ended by metrics.json: [[step or None, value], ...]."""
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    lines = text.split("\n")[:-1] if file.suffix == ".jsonl" else [text or "{}"]
    found = []
    for row in map(json.loads, lines):
        value = row.get(metric)
        if isinstance(value, (int, float)) and math.isfinite(value):
            found.append([row.get("iter"), value])
    return found


def hopeless(curve: list, others: list[list], best) -> bool:
    """Is its best worse than what half of the others had by this step? (The median rule of Vizier.)"""
    then = []
    for other in others if curve else []:
        values = [value for step, value in other if step <= curve[-1][0]]
        if values:
            then.append(best(values))
    if not then or 2 * len(then) < len(others):
        return False  # few of them looked so early
    mine = best(value for _, value in curve)
    return best(mine, statistics.median(then)) != mine


def try_out(command: list[str], folder: Path, metric: str, best, others: list[list], seconds: float) -> dict:
    """Run one trial to its end, or as long as there is hope; its row of search.jsonl.

    best: min or max. others: the curves of finished trials to compare with, maybe none.
    """
    log, output = folder / "log.jsonl", folder / "output.txt"
    if output.exists():  # of a trial that was interrupted
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    started, state, note = time.time(), "done", ""
    with open(output, "w", encoding="utf-8") as f:
        process = subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT)
    try:
        while process.poll() is None and not note:
            if time.time() - started > seconds:
                note = "stopped: its time was over"
            elif hopeless(read_curve(log, metric), others, best):
                state, note = "pruned", "stopped: behind the others"
            else:
                time.sleep(0.2)
    finally:  # after Ctrl-C too
        process.terminate()
        process.wait()
    curve = read_curve(log, metric)
    values = [value for _, value in curve + read_curve(folder / "metrics.json", metric)]
    if process.returncode and not note:
        text = output.read_text(encoding="utf-8", errors="replace").strip()
        state, note = "failed", (text or f"exit status {process.returncode}").splitlines()[-1]
    elif not values:
        state, note = "failed", f"no {metric} in log.jsonl or metrics.json"
    return {"state": state, "value": None if state == "failed" else best(values), "note": note,
            "seconds": round(time.time() - started, 1), "curve": curve}


# -----------------------------------------------------------------------------
# What was found

def ranked(rows: list[dict], best) -> list[dict]:
    """The best first; those that were stopped, and then those that failed, last."""
    sign = 1 if best is min else -1
    states = ["done", "pruned", "failed"]
    return sorted(rows, key=lambda row: (states.index(row["state"]), sign * (row["value"] or 0)))


def short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(rows: list[dict], metric: str) -> str:
    lines = [["trial", metric, *rows[0]["settings"], "seconds", ""]]
    for row in rows:
        value = row["state"] if row["value"] is None else f"{row['value']:.4f}"
        settings = map(short, row["settings"].values())
        lines.append([str(row["trial"]), value, *settings, f"{row['seconds']:.0f}", row["note"]])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join([*map(str.rjust, line[:-1], widths), line[-1]]) for line in lines)


def plot(rows: list[dict], spaces: dict[str, Space], metric: str, picture: Path) -> None:
    """The metric against each setting, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(3 * len(spaces) + 1, 3), layout="constrained")
    rows = [row for row in rows if row["value"] is not None]
    for n, (name, space) in enumerate(spaces.items(), start=1):
        places = [row["settings"][name] for row in rows]
        axes = figure.add_subplot(1, len(spaces), n, xlabel=name, ylabel=metric)
        axes.plot(list(map(str, places)) if space.choices else places, [row["value"] for row in rows], "o",
                  alpha=0.6)
        if space.log:
            axes.set_xscale("log")
    figure.savefig(picture, dpi=100)


# -----------------------------------------------------------------------------

def main(words: list[str]):
    script = words[0] if words else ""
    if not Path(script).is_file():
        raise SettingError(f"{script!r}: no script to run; first comes one, then what is searched: "
                           "python -m tools.search train.py learning_rate=1e-4..1e-2")
    shared, spaces = read_words(words[1:], settings_of(script))
    best = min if LOW_IS_BEST & set(metric.split("_")) else max
    folder = Path(out_dir)
    log, winner = folder / "search.jsonl", folder / "best.py"
    search = {"script": script, "shared": shared, "metric": metric,
              "spaces": {name: space._asdict() for name, space in spaces.items()}}
    rows = []
    if log.exists():
        known, *rows = map(json.loads, log.read_text(encoding="utf-8").splitlines())
        if known != search:
            raise SettingError(f"{log}: of another search than this one: --out_dir=FOLDER writes elsewhere")
        print(f"{log}: going on after {len(rows)} trials")
    folder.mkdir(parents=True, exist_ok=True)

    started = time.time()
    while len(rows) < trials and time.time() - started < 60 * (minutes or math.inf):
        point = propose(method, spaces, rows, best, search_seed)
        if point is None:
            print("every combination has been tried")
            break
        number = len(rows) + 1
        print(f"trial {number} of {trials}:", *(f"{k}={short(v)}" for k, v in point.items()), flush=True)
        place = folder / str(number)
        flags = [f"--{k}={v}" for k, v in {**shared, **point, "out_dir": place}.items()]
        others = [row["curve"] for row in rows if row["state"] == "done"]
        if not 0 < prune_after <= len(others):
            others = []
        row = try_out([sys.executable, script, *flags], place, metric, best, others,
                      60 * (trial_minutes or math.inf))
        rows.append({"trial": number, "settings": point, **row})
        write_text(log, "".join(json.dumps(line) + "\n" for line in (search, *rows)))
        print(f"  {row['state']}: {metric} {short(row['value'])}  {row['note']}", flush=True)
        first, *rest = ranked(rows, best)
        for row in rest:
            for file in (folder / str(row["trial"])).rglob("*.pt"):
                file.unlink()  # a disk fills quickly
        if first["state"] == "done":
            settings = {**shared, **first["settings"], "out_dir": (folder / "best").as_posix()}
            lines = [f"{name} = {value!r}\n" for name, value in settings.items()]
            write_text(winner, f"# python {script} {winner.as_posix()}\n# {metric} {first['value']:.6g}, "
                               f"trial {first['trial']} of {number}\n{''.join(lines)}")
        plot(rows, spaces, metric, folder / "search.png")
    print(table(ranked(rows, best), metric))
    if not winner.exists():
        raise UserError(f"{log}: no trial has finished; {folder / '1' / 'output.txt'} may say why")
    print(f"the best of {len(rows)} trials: python {script} {winner.as_posix()}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it ends the trial under way, as Ctrl-C does
    mine = ["-h", "--help", *(f"--{name}" for name in config.values_of(globals()))]
    others = [word for word in sys.argv[1:] if word.partition("=")[0] not in mine]
    sys.argv[1:] = [word for word in sys.argv[1:] if word not in others]
    config.launch(lambda: main(others), globals())
