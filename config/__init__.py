"""
The one rule for settings, the same for every script:

    python train.py config/small.py --batch_size=32 --compile

A script's settings are the annotated globals at its top: the annotation is the type, the trailing comment the
help. Config files (plain Python, they may compute) and --key=value override them, left to right. A script
that builds a model takes the fields of its Config too. Whatever is wrong is one line on stderr, exit status
2.
"""
import ast
import difflib
import inspect
import io
import os
import sys
import tokenize
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin


class UserError(Exception):
    """Something the user can mend, in one line: what, where, the value, the remedy. Exit status 1."""
    status = 1


class SettingError(UserError):
    """The same, about a setting. Exit status 2."""
    status = 2


class Setting(NamedTuple):
    kind: Any  # int, str | None, Literal["a", "b"]...
    default: Any
    help: str


def launch(main: Callable, script: dict, model_config: type | None = None) -> None:
    """Be a script: read the command line, then call main(), or main(the model's settings that were given).

    script: the script's globals(), whose settings are overridden. model_config: the dataclass of the model's.
    A user's error becomes one line and an exit status, without a traceback.
    """
    try:
        given = configure(script, model_config, sys.argv[1:])
        main() if model_config is None else main(given)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # under torchrun all processes fail alike, and one says so
            print(f"error: {error}", file=sys.stderr)
        sys.exit(error.status)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has left: python sample.py | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def configure(script: dict, model_config: type | None, argv: list[str]) -> dict:
    """Override the settings in `script` by the words of a command line.

    Returns the fields of `model_config` that were given, and only those: the script decides on the others.
    Raises SettingError for whatever is wrong with a setting.
    """
    path = Path(script["__file__"])
    own, fields = declared(path.read_text(encoding="utf-8"), script), {}
    if model_config is not None:
        its_module = vars(sys.modules[model_config.__module__])
        fields = declared(inspect.getsource(model_config), {**its_module, **vars(model_config)})
    settings, given = {**fields, **own}, {}
    for arg in argv:
        if arg in ("-h", "--help"):
            print_help(script["__doc__"], command_of(script), own, fields)
            sys.exit(0)
        given.update(from_flag(arg, settings) if arg.startswith("-") else from_file(arg, settings))
    script.update({name: value for name, value in given.items() if name in own})
    return {name: value for name, value in given.items() if name not in own}


def declared(source: str, namespace: dict) -> dict[str, Setting]:
    """The annotated assignments at the top level of a module, or of a class, with their comments."""
    body = ast.parse(source).body
    if isinstance(body[0], ast.ClassDef):
        body = body[0].body
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    return {node.target.id: Setting(kind=eval(ast.unparse(node.annotation), namespace),
                                    default=namespace[node.target.id],
                                    help=comments.get(node.end_lineno, ""))
            for node in body if isinstance(node, ast.AnnAssign)}


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


def from_file(path: str, settings: dict[str, Setting]) -> dict:
    """Run a config file: the plain values it leaves behind are settings."""
    if not Path(path).is_file():
        recipes = {p.stem: f"config/{p.name}" for p in Path(__file__).parent.glob("[!_]*.py")}
        like = recipes[nearest(Path(path).stem, recipes)]
        raise SettingError(f"{path}: no such config file; did you mean {like}, or --key=value?")
    namespace = {"__file__": path, "__name__": Path(path).stem}
    try:
        tree = ast.parse(Path(path).read_bytes(), filename=path)
        exec(compile(tree, path, "exec"), namespace)
    except Exception as error:  # whatever is wrong with the user's own code
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        line = lines[-1] if lines else getattr(error, "lineno", 1)
        raise SettingError(f"{path}:{line}: {type(error).__name__}: {getattr(error, 'msg', error)}") from None
    line_of = {node.id: f":{node.lineno}" for node in ast.walk(tree)
               if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    found = {}
    for name, value in namespace.items():
        if name.startswith("_") or isinstance(value, types.ModuleType) or callable(value):
            continue  # not a setting: a private name, or a helper imported or defined
        where = path + line_of.get(name, "")  # one that came by `from config.small import *` has no line here
        if name not in settings:
            raise unknown(where, name, settings)
        found[name] = checked(value, settings[name].kind, f"{where}: {name}")
    return found


def unknown(where: str, name: str, settings: dict[str, Setting]) -> SettingError:
    return SettingError(f"{where}: unknown setting {name!r}, did you mean {nearest(name, settings)!r}? "
                        "(--help lists them all)")


def nearest(name: str, names) -> str:
    return difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]


def alternatives(kind: Any) -> tuple:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def is_a(value: Any, kind: Any) -> bool:
    """Is the value of this type? A bool is no int, an int will do for a float."""
    for one in alternatives(kind):
        if get_origin(one) is Literal:
            if value in get_args(one):
                return True
        elif type(value) is one or (one is float and type(value) is int):
            return True
    return False


def parse(text: str, kind: Any) -> Any:
    """What a command line's text stands for: a Python literal where one fits, else the text as it is."""
    for literal in (text, text.capitalize()):  # true and none will do
        try:
            value = ast.literal_eval(literal)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if not isinstance(value, str) and is_a(value, kind):
            return value
    return text


def checked(value: Any, kind: Any, where: str) -> Any:
    if not is_a(value, kind):
        raise SettingError(f"{where}: wanted {wanted(kind)}, got {value!r}")
    return float(value) if type(value) is int and int not in alternatives(kind) else value


def wanted(kind: Any) -> str:
    """A type in words: 'int', 'float or None', 'one of cosine, linear'."""
    return " or ".join("one of " + ", ".join(get_args(one)) if get_origin(one) is Literal
                       else "None" if one is type(None) else one.__name__ for one in alternatives(kind))


def command_of(script: dict) -> str:
    """How one starts it: python train.py, python -m tools.search."""
    module = script.get("__spec__")
    return f"python -m {module.name}" if module else f"python {Path(script['__file__']).name}"


def print_help(doc: str, command: str, own: dict[str, Setting], fields: dict[str, Setting]) -> None:
    print(f"{doc.strip()}\n\nusage: {command} [config/FILE.py ...] [--key=value ...]")
    for title, settings in ((f"settings of {command.split()[-1]}", own), ("the model's (Config in model.py)", fields)):
        if settings:
            print(f"\n{title}:")
        for name, setting in settings.items():
            print(f"  {f'--{name}={setting.default!r}':<38} {wanted(setting.kind)}; {setting.help}")
