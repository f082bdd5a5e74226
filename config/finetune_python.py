"""Which package of Python's library does this snippet come from? No download: it is on your disk."""
from json import dumps as _dumps
from pathlib import Path as _Path

from config.finetune_sentiment import *
from prepare import standard_library as _library

out_dir = "out/python_packages"
data = "data/python_packages.jsonl"
vocab_size = 4096
text_column, label_column, group_column = "text", "package", ""

_packages = ("asyncio", "email", "encodings", "idlelib", "json", "logging", "multiprocessing", "tkinter",
             "unittest", "xml")
if not _Path(data).exists():
    _lines = [_dumps({"text": _text[_i:_i + 400], "package": _name.split("/")[0]})
              for _name, _text in _library() if _name.split("/")[0] in _packages
              for _i in range(0, len(_text) - 400, 2000)]
    _Path(data).parent.mkdir(exist_ok=True)
    _Path(data).write_text("\n".join(_lines), encoding="utf-8")
