"""
The one rule for settings, the same for every script:

    python train.py config/small.py --batch_size=32 --compile

A script's settings are the annotated globals at its top: the annotation is the type and the range, the
comment behind it the help. Config files (plain Python, they may compute) and --key=value override them, left
to right. A script may take the fields of a dataclass as settings too, as train.py does those of the model's
Config. Whatever is wrong with a setting is one line on stderr, exit status 2.
"""
import ast
import builtins
import difflib
import errno
import inspect
import json
import math
import operator
import os
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints, Literal, NamedTuple, Union


class UserError(Exception):
    """Something the user can mend, in one line: what, where, the value, the remedy. Exit status 1."""
    status = 1


class SettingError(UserError):
    """The same, about a setting. Exit status 2."""
    status = 2


def say_no_interrupt(kind: type, error: BaseException, frames) -> None:
    """Ctrl-C while a script imports torch, which takes seconds, is no error to look into."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, frames)


MAIN = getattr(sys.modules["__main__"], "__file__", None)
if MAIN and Path(MAIN).resolve().is_relative_to(Path(__file__).resolve().parent.parent):
    sys.excepthook = say_no_interrupt  # only of our own scripts

# What was a setting or a recipe once, and what to type now.
GONE = {
    "profile": "python -m tools.bench takes the same config files and settings",
    "teacher_weight": "it is called teacher_share now",
    "config/bench.py": "python -m tools.bench times a training step",
}
OF_THE_COMMAND = ("init_from", "out_dir", "overwrite", "eval_only")  # said anew each time


# -----------------------------------------------------------------------------
# Types with a range, for the annotations: at_least(1) is an int, above(0.0, at_most=1.0) a float

def at_least(low, below=None, at_most=None):
    return Annotated[type(low), ("at least", low), ("below", below), ("at most", at_most)]


def above(low, below=None, at_most=None):
    return Annotated[type(low), ("above", low), ("below", below), ("at most", at_most)]


HOLDS = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}


def alternatives(kind: Any) -> list[tuple]:
    """The types that an annotation allows, each with its bounds: (int, [("at least", 1)])."""
    found = []
    for one in get_args(kind) if get_origin(kind) in (Union, types.UnionType) else [kind]:
        plain, *bounds = get_args(one) if get_origin(one) is Annotated else [one]
        found.append((plain, [bound for bound in bounds if bound[1] is not None]))
    return found


def is_a(value: Any, kind: Any, in_range: bool = True) -> bool:
    """Is it of one of these types, and in its range? A bool is no int, an int will do for a float."""
    for plain, bounds in alternatives(kind):
        if type(value) is float and not math.isfinite(value):
            return False
        literal = get_origin(plain) is Literal and value in get_args(plain)
        if literal or type(value) is plain or (plain is float and type(value) is int):
            if not in_range or all(HOLDS[words](value, bound) for words, bound in bounds):
                return True
    return False


def wanted(kind: Any) -> str:
    """An annotation in words: 'int at least 1', 'float or None', 'one of cosine, linear'."""
    found = []
    for plain, bounds in alternatives(kind):
        if get_origin(plain) is Literal:
            found.append("one of " + ", ".join(map(str, get_args(plain))))
        else:
            name = "None" if plain is type(None) else plain.__name__
            limits = " and ".join(f"{words} {bound:g}" for words, bound in bounds)
            found.append(f"{name} {limits}".rstrip())
    return " or ".join(found)


def parse(text: str, kind: Any) -> Any:
    """What a command line's text stands for: a Python literal where one fits, else the text as it is."""
    for literal in (text, text.capitalize()):  # true and none will do
        try:
            value = ast.literal_eval(literal)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if not isinstance(value, str) and is_a(value, kind, in_range=False):
            return value
    return text


def checked(value: Any, kind: Any, where: str) -> Any:
    """The value, a float if one is wanted, an int for 6e5. Raises SettingError if it is not of this kind."""
    if type(value) is float and value.is_integer() and not is_a(value, kind, in_range=False):
        value = int(value)
    if not is_a(value, kind):
        raise SettingError(f"{where}: wanted {wanted(kind)}, got {value!r}")
    takes_int = int in [plain for plain, _ in alternatives(kind)]
    return float(value) if type(value) is int and not takes_int else value


# -----------------------------------------------------------------------------
# From the command line into a script's globals

class Setting(NamedTuple):
    kind: Any  # int, str | None, Literal["a", "b"], at_least(1)...
    default: Any
    help: str


def launch(main: Callable, script: dict, fields: type | None = None, stored: Callable | None = None) -> None:
    """Be a script: read the command line, then call main(), or main(the fields that were given).

    script, fields, stored: see configure. What a user can mend becomes one line and an exit status: of each
    of torchrun's processes, but printed once if it is the same for all.
    """
    open_console()
    try:
        given = configure(script, fields, sys.argv[1:], stored)
        main() if fields is None else main(given)
    except KeyboardInterrupt:
        end(130)
    except SystemExit as done:
        end(done.code or 0)
    except Exception as error:
        known = in_one_line(error, script)
        if not known and alone():
            raise
        end(known.status if known else 1, known or error)
    else:
        end(0)


def alone() -> bool:
    """Is this not one of several processes, as torchrun starts them?"""
    return os.environ.get("WORLD_SIZE", "1") == "1"


def end(status: int, error: Exception | None = None) -> None:
    """Say what is wrong, and leave: of several processes, not without telling the others."""
    if alone():
        if error:
            print(f"error: {error}", file=sys.stderr)
        if status:
            sys.exit(status)
        return
    from lib import group  # it imports torch, which prepare.py does without
    if isinstance(error, UserError):
        group.say_once(str(error))
    elif error and group.is_lost(error):
        group.say_lost()
    elif error:
        traceback.print_exception(error)
    group.leave(status, failed=error is not None)


ELSEWHERE = "you may not: give another folder"
REMEDIES = {errno.ENOSPC: "make room", errno.EDQUOT: "make room", errno.EFBIG: "make room",
            errno.EACCES: ELSEWHERE, errno.EPERM: ELSEWHERE, errno.EROFS: "give another folder",
            errno.ENOTDIR: "a file is where a folder is wanted", errno.ENAMETOOLONG: "give a shorter one"}


def in_one_line(error: Exception, script: dict) -> UserError | None:
    """What the user can mend; None for any other error. script: its globals()."""
    if isinstance(error, UserError):
        return error
    if out_of_memory(error):
        return UserError(what_to_lower(script))
    if isinstance(error, OSError) and error.filename is not None:
        return UserError(f"{error.filename}: {why(error)}")
    return None


def out_of_memory(error: Exception) -> bool:
    told = re.search("out of memory|can't allocate|not enough memory", str(error).lower())
    return isinstance(error, MemoryError) or told is not None


def what_to_lower(script: dict) -> str:
    """Out of memory: in a training, first what leaves the run as it is."""
    found, told = [], "out of memory: "
    size, steps = script.get("batch_size", 1), script.get("gradient_accumulation_steps")
    half = max((n for n in range(1, size) if size % n == 0), default=None)
    if steps:
        told = f"batch_size={size}: {told}"
    if steps and half:
        more = steps * size // half
        found.append(f"--batch_size={half} --gradient_accumulation_steps={more} is the same run in less")
    if script.get("remat") is False:
        found.append("--remat computes activations again instead of keeping them")
    found.append("take a smaller model, a shorter context, a smaller batch_size, or --device=cpu if there "
                 "was a GPU")
    return told + "; ".join(found)


def why(error: Exception) -> str:
    """The reason of a file's error, and what to do: No space left on device: make room."""
    reason = getattr(error, "strerror", None) or str(error).strip().split("\n")[0]
    remedy = REMEDIES.get(getattr(error, "errno", None))
    return f"{reason}: {remedy}" if remedy else reason


# -----------------------------------------------------------------------------
# The console

class Console:
    """sys.stdout or sys.stderr, which a program may outlive: a closed pipe, a closed terminal, a full disk.

    needed: what is written is what the program is for. Then it ends: silently with status 1 if the reader has
    left, else with a line.
    """
    needed = False

    def __init__(self, stream):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # characters that it does not have

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        return self.safely(self.stream.write, text)

    def flush(self) -> None:
        self.safely(self.stream.flush)

    def safely(self, do: Callable, *args):
        try:
            return do(*args)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())  # for what its buffer still has
            if not self.needed or self is sys.stderr:
                return 0
            if isinstance(error, BrokenPipeError):
                raise SystemExit(1) from None
            raise UserError(f"the output cannot be written: {why(error)}") from None


def open_console() -> None:
    """From here on, output can be lost without harm."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed, and the next file to be opened would get its number
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None and name == "stdout" and Console.needed:
            sys.exit(1)
        setattr(sys, name, Console(stream or open(os.devnull, "w", encoding="utf-8")))


def needs_console() -> None:
    """Output that cannot be written ends this program."""
    Console.needed = True


def configure(script: dict, fields: type | None, argv: list[str], stored: Callable | None = None) -> dict:
    """Override the settings in `script`, a script's globals(), by the words of a command line.

    fields: a dataclass whose fields are settings too; those that were given, and only those, are returned.
    stored: folder -> (settings, defaults) of the run there. With --init_from=resume they come before all that
    is given: a run remembers its settings. See begins_from. Raises SettingError for whatever is wrong with
    one.
    """
    own, its = settings_of(script), fields_of(fields)
    script["DEFAULTS"] = {name: setting.default for name, setting in own.items()}
    script["FIELDS"] = {name: setting.default for name, setting in its.items()}
    settings, given, origins = {**its, **own}, {}, [script.get("init_from")]
    script["PLACES"] = places = {}
    script["ORIGINS"] = origins
    words = [arg for arg in argv if arg not in ("-h", "--help")]
    for number, arg in enumerate(words, start=1):
        flag = arg.startswith("-")
        new = from_flag(arg, settings) if flag else from_file(arg, settings, given)
        given.update(new)
        origins += [new["init_from"]] if "init_from" in new else []
        places.update(dict.fromkeys(new, len(words) if flag else number))
    if stored:
        folder = given.get("out_dir", script["out_dir"])
        if folder.endswith(".pt"):  # a checkpoint in it
            tell(f"out_dir {folder} -> {Path(folder).parent}")
            folder = given["out_dir"] = str(Path(folder).parent)
        given["init_from"] = begins_from(origins, folder, stored)
        if given["init_from"] == "resume":
            given = {**remembered(*stored(folder), settings), **given}
    if words != argv:
        print_help(script, own, fields, given)
        sys.exit(0)
    script.update({name: value for name, value in given.items() if name in own})
    return {name: value for name, value in given.items() if name not in own}


def begins_from(origins: list[str], folder: str, stored: Callable) -> str:
    """What init_from means. origins: what it is in the script, and what it was given as, one after the other.

    auto, or auto:ORIGIN, goes on with the run in the folder; if there is none, it begins from that ORIGIN, or
    from what another place, such as a config file, says. A run that torchrun starts again always goes on.
    """
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        from lib.run import goes_on
        if goes_on(folder) and stored(folder)[0]:
            return "resume"
    asked = [one for one in origins if one.partition(":")[0] == "auto"]
    if not asked:
        return origins[-1]
    others = [one for one in origins if one not in (*asked, "resume")]
    origin = "resume" if stored(folder)[0] else asked[-1].partition(":")[2] or others[-1]
    tell(f"init_from {asked[-1]} -> {origin}")
    return origin


def tell(choice: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(choice, flush=True)


def remembered(earlier: dict, defaults: dict, settings: dict[str, Setting]) -> dict:
    """What a run to be resumed was made with. A default that was edited since counts as given anew."""
    found = {}
    for name, (kind, default, _) in settings.items():
        if name not in earlier or name in OF_THE_COMMAND or defaults.get(name, default) != default:
            continue
        if is_a(earlier[name], kind):
            found[name] = earlier[name]
        else:
            print(f"warning: the run's {name}={earlier[name]!r} is not taken: wanted {wanted(kind)}",
                  file=sys.stderr)
    return found


def settings_of(script: dict) -> dict[str, Setting]:
    for name, value in list(script.items()):  # one that was written without a type has its value's
        if name.islower() and not name.startswith("_") and type(value) in (bool, int, float, str):
            script["__annotations__"].setdefault(name, type(value))
    return declared(script["__annotations__"], Path(script["__file__"]).read_text(encoding="utf-8"), script)


def fields_of(cls: type | None) -> dict[str, Setting]:
    """The fields of a dataclass, and of those that it extends."""
    found = {}
    for one in reversed(cls.__mro__[:-1]) if cls else ():
        module = sys.modules[one.__module__]
        source = inspect.getsource(module).partition(f"\nclass {one.__name__}")[2]  # parses nothing
        found.update(declared(one.__annotations__, source, {**vars(module), **vars(one)}))
    return found


def declared(annotations: dict, source: str, namespace: dict) -> dict[str, Setting]:
    """What is annotated, with the comments behind it in the source."""
    found = {}
    for name, kind in annotations.items():
        comment = re.search(rf"^ *{name}(?::| =).*?  # (.*)", source, re.MULTILINE)
        kind = eval(kind, namespace) if isinstance(kind, str) else kind
        found[name] = Setting(kind, namespace[name], comment[1] if comment else "")
    return found


def check(instance) -> None:
    """Raises ValueError, naming the field, if one of a dataclass is not of its type and range."""
    for name, kind in get_type_hints(type(instance), include_extras=True).items():
        value = getattr(instance, name)
        if not is_a(value, kind):
            raise ValueError(f"{name}={value!r}: must be {wanted(kind)}")


def values_of(script: dict) -> dict[str, Any]:
    """The settings of a script as they are now."""
    return {name: script[name] for name in script["__annotations__"]}


def defaults_of(script: dict) -> dict[str, Any]:
    """The settings of a script as they stand in it."""
    return script.get("DEFAULTS", values_of(script))


def place_of(script: dict, name: str) -> int:
    """Where a setting was given: 0 for nowhere, then the config files in their order, then all flags."""
    return script.get("PLACES", {}).get(name, 0)


def model_asked(script: dict) -> str:
    """Where the model to use is. Raises SettingError for both settings that can say it."""
    if script["init_from"] == "resume":
        return script["out_dir"]
    if place_of(script, "out_dir"):
        raise SettingError(f"init_from={script['init_from']}: the model is there, or in out_dir="
                           f"{script['out_dir']}: leave out one of the two")
    return script["init_from"]


def check_used(script: dict, given: dict | None = None, **deciding) -> list[str]:
    """Raises SettingError for a setting that was given, but that nothing will use.

    script["ONLY"]: (setting, the one that decides, its values with which the first is of use; (): all but
    off), as --help says too. If that other one was given later, the setting, of a recipe for instance, yields
    to it: it becomes the default, and the lines that are returned say so. given: what configure returned.
    deciding: values that the script's globals do not have; under the name "", of none of the settings.
    """
    given, defaults, told = given or {}, defaults_of(script), []
    usual = {**script.get("FIELDS", {}), **defaults}
    for name, other, values in script["ONLY"]:
        value = given.get(name, script.get(name))
        decides = deciding.get(other, script.get(other))
        unused = value is not None and value != usual.get(name)
        if not unused or (decides in values if values else decides):
            continue
        shown = f"{other}={decides}" if other else decides
        what = f"{name}={value}: of no use with {shown}, only with {with_what(other, values)}"
        if 0 < place_of(script, name) >= place_of(script, other):
            raise SettingError(f"{what}: leave it out")
        if "PLACES" in script and not place_of(script, name):
            continue  # a run that goes on has it
        if name in defaults:  # else it is a dataclass's
            script[name] = defaults[name]
        told.append(f"({what})")
    return told


def with_what(other: str, values: tuple) -> str:
    """What makes a setting be of use, see check_used."""
    known = ("|" if other else " or ").join(map(str, values))
    return f"{other}={known}" if other and known else known or other


def from_flag(arg: str, settings: dict[str, Setting]) -> dict:
    """--key=value, or --key for True."""
    key, equals, text = arg.partition("=")
    name = key.removeprefix("--")
    if not key.startswith("--") or name not in settings:
        raise unknown(key, name, settings)
    kind = settings[name].kind
    if not equals and not is_a(True, kind):
        raise SettingError(f"{key}: needs a value: {key}=..., {wanted(kind)}")
    return {name: checked(parse(text, kind) if equals else True, kind, key)}


def recipe(path: str | Path, script: dict, fields: type) -> dict:
    """The settings that a config file has for a script and a dataclass of its fields."""
    return from_file(str(path), {**fields_of(fields), **settings_of(script)})


def from_file(path: str, settings: dict[str, Setting], given: dict | None = None) -> dict:
    """The settings in a config file, or in a run's settings.json, for a run in another out_dir.

    given: before it. The file may compute with these, and with the defaults of the others.
    """
    if not Path(path).is_file():
        raise no_file(path)
    known = {name: setting.default for name, setting in settings.items()} | (given or {})
    found, line_of = from_json(path) if path.endswith(".json") else from_python(path, known)
    for name, value in found.items():
        where = path + line_of.get(name, "")  # one that came by `from config.small import *` has no line here
        reader = "init_from" in settings and "overwrite" not in settings  # such as sample.py
        if name not in settings and "out_dir" in found and reader:
            raise SettingError(f"{path}: a recipe is to train by: --out_dir={found['out_dir']} is its run")
        if name not in settings:
            raise unknown(where, name, settings)
        found[name] = checked(value, settings[name].kind, f"{where}: {name}")
    return found


def no_file(path: str) -> SettingError:
    stem = Path(path).stem
    if Path(path).is_dir():
        return SettingError(f"{path}: a folder, not a config file: did you mean --out_dir={path}?")
    if f"config/{stem}.py" in GONE:
        return SettingError(f"{path}: is gone: {GONE[f'config/{stem}.py']}")
    recipes = [recipe.stem for recipe in Path(__file__).parent.glob("[!_]*.py")]
    home = Path(__file__).parent
    if home.parent == Path.cwd():
        home = Path("config")
    like = "".join(f"{home.as_posix()}/{one}.py, or " for one in near(stem, recipes))
    return SettingError(f"{path}: no such config file; did you mean {like}--key=value?")


def from_python(path: str, known: dict) -> tuple[dict, dict]:
    """Run it: the plain values that it leaves behind, and where each is set, as :LINE.

    known: names with values that it may use. A value of its own that is no setting, but that it uses itself,
    is not left behind.
    """
    namespace = {"__file__": path, "__name__": Path(path).stem, "__builtins__": {**vars(builtins), **known}}
    try:
        tree = ast.parse(Path(path).read_bytes(), filename=path)
        exec(compile(tree, path, "exec"), namespace)
    except Exception as error:  # whatever is wrong with the user's own code
        frames = traceback.extract_tb(error.__traceback__)
        lines = [getattr(error, "lineno", 1), *(one.lineno for one in frames if one.filename == path)]
        reason = getattr(error, "msg", error)
        raise SettingError(f"{path}:{lines[-1]}: {type(error).__name__}: {reason}") from None
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    used = {node.id for node in names if isinstance(node.ctx, ast.Load)} - known.keys()
    found = {}
    for name, value in namespace.items():
        helper = isinstance(value, types.ModuleType) or callable(value)  # imported, or defined
        helper |= name in used and not near(name, known)
        if not name.startswith("_") and not helper:
            found[name] = value
    return found, {node.id: f":{node.lineno}" for node in names if isinstance(node.ctx, ast.Store)}


def from_json(path: str) -> tuple[dict, dict]:
    try:
        found = dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise SettingError(f"{path}: damaged ({error})") from None
    return {name: value for name, value in found.items() if name not in ("overwrite", "eval_only")}, {}


def near(name: str, names: Iterable[str]) -> list[str]:
    """The one that may have been meant, if any."""
    return difflib.get_close_matches(name, names, n=1, cutoff=0.7)


def unknown(where: str, name: str, settings: dict[str, Setting]) -> SettingError:
    if name in GONE:
        return SettingError(f"{where}: no setting any more: {GONE[name]}")
    meant = "".join(f", did you mean {like!r}?" for like in near(name, settings))
    own = "; a name of your own begins with _" if ".py" in where else ""
    return SettingError(f"{where}: unknown setting {name!r}{meant} (--help lists them all{own})")


def print_help(script: dict, own: dict[str, Setting], fields: type | None, given: dict) -> None:
    """given: what the config files and flags beside it say, which is shown in place of the defaults."""
    module = script.get("__spec__")
    command = f"-m {module.name}" if module else Path(script["__file__"]).name
    print(f"{script['__doc__'].strip()}\n\nusage: python {command} [config/FILE.py ...] [--key=value ...]")
    groups = {f"settings of {command.split()[-1]}": own}
    if fields:
        groups[f"{fields.__name__} in {Path(inspect.getsourcefile(fields)).name}"] = fields_of(fields)
    for title, settings in groups.items():
        print(f"\n{title}:")
        for name, setting in settings.items():
            only = [with_what(*rest) for one, *rest in script.get("ONLY", ()) if one == name]
            told = [wanted(setting.kind), setting.help, *(f"only with {what}" for what in only)]
            value = given.get(name, setting.default)
            if value != setting.default:
                told.append(f"default {setting.default!r}")
            print(f"  {f'--{name}={value!r}':<38} {'; '.join(told)}")
