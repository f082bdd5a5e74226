"""Which package of Python's library does this snippet come from? No download: it is on your disk."""
from json import dumps as _dumps
from pathlib import Path as _Path

from config.finetune_sentiment import *
from lib.text import standard_library as _library

out_dir = "out/python_packages"
data, data_val, data_test = (f"data/packages_{_split}.jsonl" for _split in ("train", "val", "test"))
label_column = "package"
vocab_size, dropout, token_dropout, epochs = 4096, 0.2, 0.2, 8

# snippets of 400 characters; a file of the library is in one split only
_packages = ("asyncio", "email", "importlib", "multiprocessing", "tkinter", "unittest", "urllib", "xml")
if not _Path(data_test).exists():
    _lines, _n = {data: [], data_val: [], data_test: []}, 0
    for _name, _text in _library():
        if _name.split("/")[0] in _packages:
            _split, _n = {8: data_val, 9: data_test}.get(_n % 10, data), _n + 1
            _lines[_split] += [_dumps({"text": _text[_i:_i + 400], "package": _name.split("/")[0]})
                               for _i in range(0, len(_text), 600)]
    _Path(data).parent.mkdir(exist_ok=True)
    for _file, _rows in _lines.items():
        _Path(_file).write_text("\n".join(_rows), encoding="utf-8")
