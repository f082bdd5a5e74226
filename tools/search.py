"""
Search for good settings of a script. Each trial is a process of its own: a crash is one row of the table.

    python -m tools.search train.py config/small.py learning_rate=1e-4..1e-2 dropout=0,0.1,0.2
    python -m tools.search train.py config/small.py --max_iters=300 n_layer=2..8 --method=random --trials=30

First comes the script, with the config files and --key=value that all trials share; then, without dashes,
what is searched: name=low..high, in factors where it spans ten times or more, and name=a,b,c. The same
command again goes on where it was stopped. In --out_dir: search.jsonl, a row a trial; best.py, the winner as
a config file that runs as it is; search.png, where matplotlib is installed; a folder for each trial.
"""
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple, Optional, Union

from config import Setting, SettingError, UserError, checked, from_file, from_flag, launch, parse, unknown

# -----------------------------------------------------------------------------
# Settings
out_dir: str = "out/search"  # where everything goes; trial 3 into its subfolder 3
method: Literal["bayes", "random", "grid"] = "bayes"  # bayes learns from the trials before, by optuna
trials: int = 20  # rows of the table, at most
minutes: Optional[float] = None  # no trial starts after so many
trial_minutes: Optional[float] = None  # a trial is stopped after so many, and counts as it then stands
metric: str = "val_loss"  # any key of log.jsonl or metrics.json; val_bpb where the tokenizers differ
prune_after: int = 4  # finished trials from which on one that falls behind them is stopped; 0: never
search_seed: int = 0  # of the draws; the script's own seed is a setting like others
# -----------------------------------------------------------------------------

LOW_IS_BEST = {"loss", "bpb", "perplexity", "error", "mae", "mse", "rmse", "brier", "ece", "dt", "elapsed"}
GRID = 5  # points that a grid takes of a range


class Space(NamedTuple):
    """What a setting may be: one of `choices`, or a number from low to high, of low's type."""
    choices: list
    low: Any = None
    high: Any = None
    log: bool = False  # by factors

    def at(self, share: float) -> Any:
        """The value at this share, from 0 to 1, of the way."""
        if self.choices:
            return self.choices[min(int(share * len(self.choices)), len(self.choices) - 1)]
        low, high = self.low, self.high
        value = min(low * (high / low) ** share, high) if self.log else low + share * (high - low)
        return round(value) if isinstance(low, int) else value


def settings_of(script: str) -> dict[str, Setting]:
    """A script's settings with their types, as its --help has them. Raises UserError where it has none."""
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, encoding="utf-8")
    kinds = {"None": None, **{kind.__name__: kind for kind in (int, float, str, bool, list, dict)}}
    line, found = rf"^  --(\w+)=.*? +((?:one of|{'|'.join(kinds)})\b[^;]*);", {}
    for name, words in re.findall(line, done.stdout, re.MULTILINE):
        types = (kinds[word] if word in kinds else Literal[tuple(word.removeprefix("one of ").split(", "))]
                 for word in words.split(" or "))
        found[name] = Setting(Union[tuple(types)], None, "")
    if "out_dir" not in found:
        *_, reason = ["it has no setting out_dir", *done.stderr.strip().splitlines()]
        raise UserError(f"{script}: cannot be searched: {reason}")
    return found


def read_words(words: list[str], settings: dict[str, Setting]) -> tuple[dict, dict[str, Space]]:
    """What all trials share, left to right, and what is searched. Raises SettingError."""
    shared, spaces = {}, {}
    for word in words:
        name, equals, text = word.partition("=")
        if not (equals and name.isidentifier()):
            shared |= (from_flag if word.startswith("-") else from_file)(word, settings)
            continue
        if name not in settings:
            raise unknown(word, name, settings)
        kind, is_range = settings[name].kind, ".." in text
        values = [checked(parse(one, kind), kind, word) for one in text.split(".." if is_range else ",")]
        if is_range and not (len(values) == 2 and all(type(value) in (int, float) for value in values)
                             and values[0] < values[1]):
            raise SettingError(f"{word}: a range is low..high, in numbers; a choice is a,b,c")
        spaces[name] = Space([], *values, 0 < 10 * values[0] <= values[1]) if is_range else Space(values)
    if not spaces:
        raise SettingError("nothing to search: name settings and their values, learning_rate=1e-4..1e-2 or "
                           "dropout=0,0.1,0.2")
    return shared, spaces


def propose(method: str, spaces: dict[str, Space], rows: list[dict], low_is_best: bool,
            seed: int) -> Optional[dict]:
    """The settings of the next trial; None where all have been tried.

    A function of the rows so far and the seed alone: a search resumes from its rows.
    """
    tried = [row["settings"] for row in rows]
    if method == "grid":
        axes = [space.choices or [space.at(i / (GRID - 1)) for i in range(GRID)] for space in spaces.values()]
        points = (dict(zip(spaces, point)) for point in itertools.product(*axes))
        return next((point for point in points if point not in tried), None)
    draw = random.Random(f"{seed} {len(rows)}")
    point = ask_optuna(spaces, rows, low_is_best, draw.getrandbits(31)) if method == "bayes" else None
    for _ in range(1000):
        if point and point not in tried:
            return point
        point = {name: space.at(draw.random()) for name, space in spaces.items()}
    return None


def ask_optuna(spaces: dict[str, Space], rows: list[dict], low_is_best: bool, seed: int) -> dict:
    """The point of which a tree-structured Parzen estimator (Bergstra et al. 2011) expects most."""
    try:
        import optuna
    except ImportError:
        raise UserError("--method=bayes needs optuna: pip install optuna; or --method=random") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    of = optuna.distributions
    kinds = {name: of.CategoricalDistribution(choices) if choices else
             (of.IntDistribution if isinstance(low, int) else of.FloatDistribution)(low, high, log=log)
             for name, (choices, low, high, log) in spaces.items()}
    study = optuna.create_study(direction="minimize" if low_is_best else "maximize",
                                sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=4))
    for row in rows:
        done = row["state"] == "done"  # optuna takes "pruned" for worse than all that are
        study.add_trial(optuna.trial.create_trial(
            state=optuna.trial.TrialState.COMPLETE if done else optuna.trial.TrialState.PRUNED,
            value=row["value"] if done else None, params=row["settings"], distributions=kinds,
            intermediate_values=dict(row["curve"])))
    return study.ask(kinds).params


def read_curve(file: Path, metric: str) -> list:
    """The metric as it went by log.jsonl, or ended by metrics.json: [[step or None, value], ...]."""
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    rows = map(json.loads, text.split("\n")[:-1] if file.suffix == ".jsonl" else [text or "{}"])
    return [[row.get("iter"), row[metric]] for row in rows
            if isinstance(row.get(metric), (int, float)) and math.isfinite(row[metric])]


def hopeless(curve: list, others: list[list], best) -> bool:
    """Is its best worse than what half of the others had by this step? (The median rule of Vizier.)"""
    then = [[v for s, v in other if s <= curve[-1][0]] for other in others] if curve else []
    then = [best(values) for values in then if values]
    if not then or 2 * len(then) < len(others):
        return False  # few of them looked so early
    mine, median = best(value for _, value in curve), statistics.median(then)
    return mine != median and best(mine, median) == median


def try_out(command: list[str], folder: Path, metric: str, best, others: list[list], seconds: float) -> dict:
    """Run one trial to its end, or as long as there is hope; its row of search.jsonl.

    best: min or max. others: the curves of finished trials to compare with, maybe none.
    """
    if (folder / "output.txt").exists():  # of a trial that was interrupted
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    started, state, note = time.time(), "done", ""
    with open(folder / "output.txt", "w", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        while process.poll() is None and not note:
            if time.time() - started > seconds:
                note = "stopped: its time was over"
            elif hopeless(read_curve(folder / "log.jsonl", metric), others, best):
                state, note = "pruned", "stopped: behind the others"
            else:
                time.sleep(0.2)
    finally:  # after Ctrl-C too
        process.terminate()
        process.wait()
    curve = read_curve(folder / "log.jsonl", metric)
    values = [value for _, value in curve + read_curve(folder / "metrics.json", metric)]
    if process.returncode and not note:
        text = (folder / "output.txt").read_text(encoding="utf-8", errors="replace").strip()
        state, note = "failed", (text or f"exit status {process.returncode}").splitlines()[-1]
    elif not values:
        state, note = "failed", f"no {metric} in log.jsonl or metrics.json"
    return {"state": state, "value": None if state == "failed" else best(values), "note": note,
            "seconds": round(time.time() - started, 1), "curve": curve}


def ranked(rows: list[dict], best) -> list[dict]:
    """The best first; those that were stopped, and then those that failed, last."""
    sign = 1 if best is min else -1
    return sorted(rows, key=lambda row: (["done", "pruned", "failed"].index(row["state"]),
                                         sign * (row["value"] or 0)))


def short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(rows: list[dict], spaces: dict[str, Space], metric: str) -> str:
    cells = [["trial", metric, *spaces, "seconds", ""]]
    cells += [[str(row["trial"]), row["state"] if row["value"] is None else f"{row['value']:.4f}",
               *(short(row["settings"][name]) for name in spaces), f"{row['seconds']:.0f}", row["note"]]
              for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join([*map(str.rjust, line[:-1], widths), line[-1]]) for line in cells)


def write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def plot(rows: list[dict], spaces: dict[str, Space], metric: str, picture: Path) -> None:
    """The metric against each setting, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(3 * len(spaces) + 1, 3))
    grid = figure.subplots(1, len(spaces), sharey=True, squeeze=False)
    shown = [row for row in rows if row["value"] is not None]
    for axes, (name, space) in zip(grid[0], spaces.items()):
        places = [str(row["settings"][name]) if space.choices else row["settings"][name] for row in shown]
        (axes.semilogx if space.log else axes.plot)(places, [row["value"] for row in shown], "o", alpha=0.6)
        axes.set_xlabel(name)
    grid[0][0].set_ylabel(metric)
    figure.savefig(picture, dpi=100, bbox_inches="tight")


def main(words: list[str]):
    for name, value in (("trials", trials), ("minutes", minutes), ("trial_minutes", trial_minutes)):
        if value is not None and value <= 0:
            raise SettingError(f"--{name}={value}: must be above 0")
    script = words[0] if words else ""
    if not Path(script).is_file():
        raise SettingError(f"{script!r}: no script to run; first comes one, then what is searched: "
                           "python -m tools.search train.py learning_rate=1e-4..1e-2")
    shared, spaces = read_words(words[1:], settings_of(script))
    best = min if LOW_IS_BEST & set(metric.split("_")) else max
    folder, rows = Path(out_dir), []
    log, winner = folder / "search.jsonl", folder / "best.py"
    search = {"script": script, "shared": shared, "metric": metric,
              "spaces": {name: space._asdict() for name, space in spaces.items()}}
    if log.exists():
        known, *rows = map(json.loads, log.read_text(encoding="utf-8").splitlines())
        if known != search:
            raise SettingError(f"{log}: of another search than this one: --out_dir=FOLDER writes elsewhere")
        print(f"{log}: going on after {len(rows)} trials")
    folder.mkdir(parents=True, exist_ok=True)

    started = time.time()
    while len(rows) < trials and time.time() - started < 60 * (minutes or math.inf):
        point = propose(method, spaces, rows, best is min, search_seed)
        if point is None:
            print("every combination has been tried")
            break
        number = len(rows) + 1
        print(f"trial {number} of {trials}:", *(f"{k}={short(v)}" for k, v in point.items()), flush=True)
        flags = {**shared, **point, "out_dir": folder / str(number)}
        command = [sys.executable, script, *(f"--{k}={v}" for k, v in flags.items())]
        finished = [row["curve"] for row in rows if row["state"] == "done"]
        row = try_out(command, folder / str(number), metric, best,
                      finished if 0 < prune_after <= len(finished) else [], 60 * (trial_minutes or math.inf))
        rows.append({"trial": number, "settings": point, **row})
        write(log, "".join(json.dumps(line) + "\n" for line in (search, *rows)))
        print(f"  {row['state']}: {metric} {short(row['value'])}  {row['note']}", flush=True)
        first, *rest = ranked(rows, best)
        for file in (file for row in rest for file in (folder / str(row["trial"])).rglob("*.pt")):
            file.unlink()  # a disk fills quickly
        if first["state"] == "done":
            made = {**shared, **first["settings"], "out_dir": (folder / "best").as_posix()}
            write(winner, f"# python {script} {winner.as_posix()}\n# {metric} {first['value']:.6g}, trial "
                  f"{first['trial']} of {number}\n" + "".join(f"{k} = {v!r}\n" for k, v in made.items()))
        plot(rows, spaces, metric, folder / "search.png")
    print(table(ranked(rows, best), spaces, metric))
    if not winner.exists():
        raise UserError(f"{log}: no trial has finished; {folder / '1' / 'output.txt'} may say why")
    print(f"the best of {len(rows)} trials: python {script} {winner.as_posix()}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it ends the trial under way, as Ctrl-C does
    mine = ["-h", "--help", *(f"--{name}" for name in __annotations__)]
    others = [word for word in sys.argv[1:] if word.partition("=")[0] not in mine]
    sys.argv[1:] = [word for word in sys.argv[1:] if word not in others]
    launch(lambda: main(others), globals())
