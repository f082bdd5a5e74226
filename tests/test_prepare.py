"""From text to tokens."""
import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest

import prepare
from config import SettingError, UserError
from lib import text as text_file
from lib.tokenizer import Tokenizer
from tests.helpers import CHINESE, MIXED, PAGES, ROOT, full_disk, posix, slow, words
from tests.test_tokenizer import HUB, bert, of_the_hub

def write_jsonl(path, texts) -> str:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    return str(path)


def prepared(folder, texts, **settings):
    """A data set of these documents, in folder/data/a."""
    source = folder / "a.jsonl"
    if not source.exists() or [json.loads(line)["text"] for line in source.open(encoding="utf-8")] != texts:
        write_jsonl(source, texts)
    return prepare.prepare(source=str(source), root=folder / "data", **settings)


def read_back(folder) -> dict[str, list[str]]:
    """The documents of each split, decoded from the .bin."""
    meta = prepare.read_meta(folder)
    tokenizer, found = Tokenizer.from_dict(meta["tokenizer"]), {}
    for split in prepare.SPLITS:
        ids = prepare.read_split(folder, split, meta)
        found[split] = []
        for one in np.split(ids, np.flatnonzero(ids == tokenizer.eot) + 1):
            if len(one):
                found[split].append(tokenizer.decode(i for i in one.tolist() if i != tokenizer.eot))
    return found


def all_of(folder) -> list[str]:
    return sorted(text for texts in read_back(folder).values() for text in texts)


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names_in(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("texts", [[MIXED * 10 + "y" * 3000 + CHINESE], [PAGES[0], "", PAGES[1], CHINESE]])
def test_too_few_documents_are_cut_each(tmp_path, texts):
    """Where a character begins."""
    source = write_jsonl(tmp_path / "my texts.jsonl", texts)
    folder = prepare.prepare(source=source, tokenizer="bytes", test_fraction=0.2, root=tmp_path / "data")
    assert folder.name == "my_texts"
    found = list(read_back(folder).values())
    assert ["".join(parts) for parts in zip(*found)] == list(filter(None, texts))
    for text, *parts in zip(filter(None, texts), *found):
        sizes = np.array([len(part.encode()) for part in parts])
        assert max(np.abs(sizes - np.array([0.7, 0.1, 0.2]) * len(text.encode()))) <= 4
    splits = prepare.read_meta(folder)["splits"].values()
    assert [its["bytes"] for its in splits] == [len("".join(part).encode()) for part in found]


def essays(n, copies=1, near=False) -> list[str]:
    """n texts of 120 words, each so many times, with one word changed if near."""
    rng, found = np.random.default_rng(0), []
    for _ in range(n):
        some = [rng.bytes(3).hex() for _ in range(120)]
        for i in range(copies):
            if near and i:
                some[int(rng.integers(120))] = f"{i}{i}{i}"
            found.append(" ".join(some))
    return found


def shares(folder) -> list[float]:
    sizes = [its["bytes"] for its in prepare.read_meta(folder)["splits"].values()]
    return [size / sum(sizes) for size in sizes]


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("n, copies", [(100, 40), (60, 12)])
def test_copies_leave_the_shares_as_they_were_asked_for(tmp_path, capsys, near, n, copies):
    """And none is in two splits. With near_duplicates one of each is left, without it all."""
    texts = essays(n, copies, near)
    folder = prepared(tmp_path, texts, tokenizer="bytes", near_duplicates=0.6 * near, overwrite=True)
    found, report = read_back(folder), prepare.read_meta(folder)["report"]
    assert sum(map(len, found.values())) == (n if near else n * copies)
    origins = [{text[-60:-10] if near else text for text in found[split]} for split in prepare.SPLITS]
    assert sum(map(len, origins)) == len(set.union(*origins)) == n
    got, said = shares(folder), capsys.readouterr().out
    assert max(np.abs(np.subtract(got, (0.8, 0.1, 0.1)))) < 0.02 or "shares of the text: " in said
    assert got[0] > 0.5
    if near:
        dropped = sum(entry["documents"] for what, entry in report.items() if "duplicates" in what)
        assert dropped == n * copies - n and f"{dropped:,} dropped: " in said
        assert f"{report['copies_in_train']['documents']} of the kept are in train" in said
    else:
        assert report["copies_kept"]["documents"] == n * copies - n
    assert ("copies of " in said and f"{copies} documents, 1.7% of" in said) == (n == 60)


def test_copies_that_differ_in_white_space_are_in_one_split(tmp_path):
    """And the hash that stands for all is the lowest: another copy moves none into training."""
    texts = essays(200)
    spaced = [f"\n {text}\n" if i % 2 else text.replace(" ", "\n") for i, text in enumerate(texts)]
    before = read_back(prepared(tmp_path, texts, tokenizer="bytes"))
    found = read_back(prepared(tmp_path, texts + spaced, tokenizer="bytes", overwrite=True))
    inks = {split: {"".join(text.split()) for text in some} for split, some in found.items()}
    assert sum(map(len, found.values())) == 400 and sum(map(len, inks.values())) == 200
    assert not set(found["train"]) & set(before["val"] + before["test"])


def test_a_novel_and_some_notes_are_mostly_for_training(tmp_path, capsys):
    for folder_of in range(10):
        notes = [" ".join(words(40, 1000 * folder_of + i)) for i in range(25)]
        novel = f"Novel {folder_of} " + " ".join(words(2000, folder_of))
        folder = prepared(tmp_path, [*notes, novel], tokenizer="bytes", overwrite=True)
        said = capsys.readouterr().out
        assert shares(folder)[0] > 0.78 and ("'Novel" in said or "too few to be split whole" in said)


def test_what_is_added_moves_nothing_that_was_held_out_into_training(tmp_path):
    """From few documents, which are cut, to many; small ones and large ones; each without a copy."""
    rng, texts, held_out = np.random.default_rng(1), [], set()
    sizes = rng.integers(30, 60, 150) * np.where(rng.random(150) < 0.1, 20, 1)
    for i, size in enumerate(sizes.tolist()):
        texts.insert(int(rng.integers(len(texts) + 1)), f"{i}: " + " ".join(words(size, i)))
        if i not in (2, 5, 12, 20, 25, 28, 29, 30, 31, 35, 40, 60, 100, 149):
            continue
        found = read_back(prepared(tmp_path, texts, tokenizer="bytes", overwrite=True))
        whole = set(texts)
        assert not held_out & set(found["train"])
        held_out |= whole & set(found["val"] + found["test"])
    assert len(held_out) > 20


def test_documents_are_split_whole_and_stay_where_they_are(tmp_path):
    def split_of(n):
        folder = prepared(tmp_path, PAGES[:n], vocab_size=300, overwrite=True)
        return {text: split for split, texts in read_back(folder).items() for text in texts}

    before, after = split_of(60), split_of(70)
    assert sorted(before) == sorted(PAGES[:60]) and set(before.values()) == set(prepare.SPLITS)
    assert len(after) == 70 and after.items() >= before.items()


def test_every_text_comes_back(tmp_path):
    texts = ["plain English.\n" * 40, CHINESE * 20, "🙂👩‍👩‍👧 e\u0301 \u202e\u0000 " * 30,
             "x" * 1_000_000, "千" * 999, (ROOT / "model.py").read_text("utf-8"),
             " \n\t" * 99, "<|endoftext|> is no end " * 5, "\r\n" * 9]
    for kind in ("bpe", "bytes"):
        folder = prepared(tmp_path, texts + PAGES, tokenizer=kind, vocab_size=400, overwrite=True)
        assert all_of(folder) == sorted(texts + PAGES)


def test_large_vocabularies_are_uint32_and_ids_are_checked(tmp_path):
    ranks = [bytes([i]) for i in range(256)] + [bytes([i, j]) for i in range(256) for j in range(256)]
    lines = [base64.b64encode(rank) + b" %d\n" % i for i, rank in enumerate(ranks)]
    (tmp_path / "big.tiktoken").write_bytes(b"".join(lines))
    folder = prepared(tmp_path, PAGES, tokenizer=str(tmp_path / "big.tiktoken"))
    meta = prepare.read_meta(folder)
    assert meta["dtype"] == "uint32" and meta["vocab_size"] == 65794
    assert all_of(folder) == sorted(PAGES) and prepare.read_split(folder, "train", meta).max() > 2**15
    for ids, vocab_size, data in (([1, 258], 300, b"\1\0\2\1"), ([65537], 65538, b"\1\0\1\0")):
        prepare.write_split(tmp_path / "x.bin", iter([np.array(ids)]), vocab_size)
        assert (tmp_path / "x.bin").read_bytes() == data
    with pytest.raises(UserError, match="id 300 is out of range"):
        prepare.write_split(tmp_path / "x.bin", iter([np.array([1, 300])]), 300)


def test_the_same_text_gives_the_same_bytes(tmp_path):
    seen = set()
    for threads in (1, 2, 2):
        folder = prepared(tmp_path, PAGES, vocab_size=300, threads=threads, near_duplicates=0.5,
                          overwrite=True)
        meta = prepare.read_meta(folder)
        seen.add(json.dumps([meta["splits"], meta["tokenizer"]]))
        for split, its in meta["splits"].items():
            assert hashlib.sha256((folder / f"{split}.bin").read_bytes()).hexdigest() == its["sha256"]
    assert len(seen) == 1


def test_a_data_set_is_replaced_only_on_demand(tmp_path, capsys):
    folder = prepared(tmp_path, PAGES, vocab_size=300)
    assert set(prepare.read_meta(folder)["settings"]) - set(prepare.NEW) == {  # those of older data sets
        "source", "tokenizer", "vocab_size", "val_fraction", "test_fraction", "encoding", "errors",
        "text_key", "nfc", "line_ends", "control_chars", "html", "repeated_lines", "scrub_pii", "min_chars",
        "min_text", "near_duplicates", "sample_mb"}
    stamp = (folder / "train.bin").stat().st_mtime_ns
    assert prepared(tmp_path, PAGES, vocab_size=300, threads=1, seed=5) == folder
    assert "same settings" in capsys.readouterr().out
    with pytest.raises(SettingError, match="--overwrite"):
        prepared(tmp_path, PAGES, vocab_size=280)
    assert (folder / "train.bin").stat().st_mtime_ns == stamp
    prepared(tmp_path, PAGES, vocab_size=280, overwrite=True)
    assert prepare.read_meta(folder)["vocab_size"] <= 280 and names_in(tmp_path / "data") == ["a"]


@pytest.mark.parametrize("settings, error, said", [
    (dict(vocabulary=300), TypeError, "'vocabulary'"),
    (dict(vocab_size=100), SettingError, "--vocab_size.*at least 258.*100"),
    (dict(val_fraction=0.0), SettingError, "--val_fraction.*above 0.*0"),
    (dict(test_fraction=0.9), SettingError, "--test_fraction=0.9.*val_fraction"),
    (dict(errors="never"), SettingError, "--errors.*strict"),
    (dict(encoding="latin-0"), SettingError, "--encoding=latin-0"),
    (dict(prefix=True, source="nowhere.txt"), SettingError, "--prefix=True.*not for a bpe"),
    (dict(dataset="b", source=""), SettingError, "--dataset=b.*built-in.*shakespeare.*--source"),
    (dict(source="nowhere.txt"), UserError, "nowhere.txt: no such file"),
    (dict(min_chars=10**6), UserError, "no document is left.*too_short"),
    (dict(source="short.txt"), UserError, "short.txt: only .* tokens for train.bin.*more text"),
])
def test_what_cannot_be_is_said_and_leaves_nothing(tmp_path, monkeypatch, settings, error, said):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", PAGES)
    (tmp_path / "short.txt").write_text("Two lines.\nNo more.\n")
    with pytest.raises(error, match=said) as found:
        prepare.prepare(**{"source": "a.jsonl", **settings})
    assert "\n" not in str(found.value) and not list(tmp_path.glob("data/*"))


@pytest.mark.parametrize("flags, said", [
    ("--tokenizer=gpt2 --vocab_size=300", "vocab_size=300: of no use with tokenizer=gpt2"),
    ("--dataset=shakespeare_char --sample_mb=3", "sample_mb=3: of no use with tokenizer=bytes"),
    ("--phones=library", "phones=library: of no use with scrub_pii=False"),
    ("--seed=3", "seed=3: of no use with show=0")])
def test_what_is_of_no_use_is_refused(tmp_path, flags, said):
    done = subprocess.run([sys.executable, ROOT / "prepare.py", *flags.split()], cwd=tmp_path, text=True,
                          capture_output=True)
    assert done.returncode == 2 and said in done.stderr and not list(tmp_path.iterdir())


def prepare_numbers(folder, **settings):
    return prepare.prepare(source=str(folder / "a.txt"), root=folder / "data", **settings)


def data_sets(folder) -> dict[str, dict]:
    return {path.name: contents(path) for path in (folder / "data").glob("[!.]*")}


@posix
def test_a_full_disk_leaves_the_old_data_set_and_what_is_not_ours_stays(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"{i} {i * i} words\n" for i in range(20_000)), encoding="utf-8")
    new, data = dict(vocab_size=300, overwrite=True), tmp_path / "data"
    prepare_numbers(tmp_path, tokenizer="bytes")
    before = data_sets(tmp_path)
    for name in (".a.preparing", ".a.b.preparing", ".a.notes", "a.old"):
        (data / name).mkdir()
    with full_disk(10**5), pytest.raises(UserError, match="File too large: nothing changed"):
        prepare_numbers(tmp_path, **new)
    assert contents(data / "a") == before["a"]
    assert names_in(data) == [".a.b.preparing", ".a.notes", "a", "a.old"]


def test_two_at_once_are_one_after_the_other_and_tell_what_is_there(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", PAGES)
    command = [sys.executable, str(ROOT / "prepare.py"), "--source=a.jsonl", "--vocab_size=300", "--report",
               "--show=2"]
    runs = [subprocess.Popen([*command, f"--seed={seed}"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
            for seed in (1, 2)]
    told = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0] and names_in(tmp_path / "data") == ["a"]
    assert ["same settings" in one for one in told].count(True) == 1
    for said in ("bytes a token", "80 documents read", "tokens are used"):
        assert all(said in one for one in told)
    first, second = (one[one.index("--- document"):] for one in told)
    assert first != second and first.count("\nPage ") == 2


@slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for a process's largest memory")
@pytest.mark.parametrize("kind, tokenizer, limit", [
    ("documents", "bytes", 200e3), ("letters", "bpe", 1000e3), ("one letter", "bpe", 1000e3)])
def test_memory_is_bounded(tmp_path, kind, tokenizer, limit):
    text = "".join(text for _, text in text_file.documents("builtin:python"))
    rng = np.random.default_rng(0)
    with open(tmp_path / "a.jsonl", "w", encoding="utf-8") as f:
        for i in range(200_000 if kind == "documents" else 0):
            at = int(rng.integers(len(text) - 1000))
            f.write(json.dumps({"text": f"{i} {text[at:at + 1000]}"}) + "\n")
        if kind != "documents":
            letters = rng.integers(97, 123, 20_000_000, np.uint8)
            letters = letters if kind == "letters" else np.full(3 * 10**7, 97, np.uint8)
            f.write(json.dumps({"text": letters.tobytes().decode()}))
    command = [sys.executable, str(ROOT / "prepare.py"), "--source=a.jsonl", f"--tokenizer={tokenizer}"]
    command += ["--vocab_size=300"] * (tokenizer == "bpe")
    most = 0
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) as run:
        while run.poll() is None:
            time.sleep(0.05)
            with open(f"/proc/{run.pid}/status") as f:
                peak = [line.split()[1] for line in f if line.startswith("VmHWM")]
            most = max(most, *map(int, peak), 0)
    assert run.returncode == 0 and 50e3 < most < limit  # kB, of 200, 20 and 30 MB of text


@posix
def test_only_a_data_set_of_ours_is_replaced_and_only_its_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make = partial(prepare.prepare, tokenizer="bytes")
    mine = tmp_path / "data" / "mine"
    mine.mkdir(parents=True)
    (mine / "input.txt").write_text("\n".join(PAGES), encoding="utf-8")
    (tmp_path / "a.txt").write_text("\n".join(PAGES[:40]), encoding="utf-8")
    for source in ("data/mine", "data/mine/input.txt", "data/mi*/*.txt", f"{mine}/", "a.txt,data/mine"):
        with pytest.raises(SettingError, match="--source=.*data/mine.*--dataset=NAME"):
            make("mine", source=source, overwrite=True)
    with pytest.raises(SettingError, match="no data set of prepare.py"):
        make("mine", source="a.txt", overwrite=True)
    (mine / "train.bin").write_bytes(b"nanoGPT's")
    (tmp_path / "data" / "file").write_text("not a folder")
    for name in ("mine", "file"):
        with pytest.raises(SettingError, match="no data set of prepare.py"):
            make(name, source="a.txt", overwrite=True)
    assert names_in(mine) == ["input.txt", "train.bin"]
    for name in (".", "..", "../a", "a/b", "/a", "downloads", "a" * 300, "a\0", "a.", ".a", "con trol"):
        with pytest.raises(SettingError, match="--dataset="):
            make(name, source="a.txt", overwrite=True)
    with pytest.raises(UserError, match="a.txt.*"):
        prepare.prepare("x", source="a.txt", root=tmp_path / "a.txt")

    ours = make("ours", source="a.txt")
    before = contents(ours)
    (ours / "notes").mkdir()
    (ours / "notes" / "of mine.txt").write_text("kept")
    (ours / "README").write_text("kept too")
    os.symlink(ours.resolve(), tmp_path / "data" / "link")
    (tmp_path / "data" / "empty").mkdir()
    make("link", source="data/mine/input.txt", overwrite=True)  # by another name
    os.symlink("round", tmp_path / "data" / "round")
    with pytest.raises(SettingError, match="round is a link to itself"):
        make("round", source="a.txt")
    assert names_in(ours) == ["README", "meta.json", "notes", "test.bin", "train.bin", "val.bin"]
    assert (ours / "notes" / "of mine.txt").read_text() == "kept"
    assert (ours / "train.bin").read_bytes() != before["train.bin"]
    assert sorted(contents(make("empty", source="a.txt"))) == sorted(before)
    ours.joinpath("meta.json").write_text("{damaged")
    with pytest.raises(UserError, match="damaged.*--overwrite"):
        make("ours", source="a.txt")
    assert {**contents(make("again", source="a.txt"))} == before
    make("ours", source="a.txt", overwrite=True)
    assert (ours / "README").read_text() == "kept too"


@posix
def test_what_a_folder_has_that_is_no_text_is_passed_over_and_said(tmp_path, capsys):
    notes = tmp_path / "notes"
    for i, page in enumerate(PAGES):
        (notes / str(i % 3)).mkdir(parents=True, exist_ok=True)
        (notes / str(i % 3) / f"{i}.txt").write_text(page, encoding="utf-8")
    os.mkfifo(notes / "pipe")
    os.symlink(notes, notes / "0" / "round")
    os.symlink("nowhere", notes / "dangling")
    (notes / ".git").mkdir()
    for name, content in (("empty.txt", b""), ("old.txt", "déjà".encode("latin-1")), ("z.pdf", b"%PDF-1.7\n"),
                          ("package.json", b'{"name": "x"}'), ("page.htm", b"<!DOCTYPE html>\n<p>a")):
        (notes / name).write_bytes(content)
    prepare.prepare("there", source=str(tmp_path / "notes" / "0"), root=notes, tokenizer="bytes")
    capsys.readouterr()
    folder = prepare.prepare("a", source=str(notes), root=tmp_path / "data", tokenizer="bytes")
    said = capsys.readouterr().out
    assert all_of(folder) == sorted([*PAGES, '{"name": "x"}', "<!DOCTYPE html>\n<p>a"])
    for line in ("2 passed over: links", "notes/pipe", ".git", "data sets made by prepare.py: ",
                 "2 passed over: empty, or not text: ", "empty.txt",
                 "1 passed over: in another encoding (--encoding=NAME", "old.txt",
                 "1 .json files read as plain text", "1 files of HTML (--html takes its tags out): "):
        assert line in said, said
    with pytest.raises(UserError, match="pipe: no plain file"):
        prepare.prepare("b", source=str(notes / "pipe"), root=tmp_path / "data")
    with pytest.raises(SettingError, match="--source=.*comma"):
        prepare.prepare("b", source=str(notes / "0" / "0.txt") + ",", root=tmp_path / "data")


def test_a_name_that_is_two_things_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "python").mkdir()
    (tmp_path / "python" / "a.txt").write_text("\n".join(PAGES), encoding="utf-8")
    with pytest.raises(SettingError, match=r"builtin:python or ./python"):
        prepare.prepare("a", source="python")
    folder = prepare.prepare("a", source="./python", tokenizer="bytes")
    assert all_of(folder) and "def " not in "".join(all_of(folder))
    assert [next(iter(text_file.documents(one)))[0] for one in ("builtin:python", "./python")] == [
        "__future__.py", "a.txt"]


@pytest.mark.parametrize("lossy", [False, True])
def test_a_tokenizer_that_loses_text_is_refused(lossy, tmp_path, capsys):
    pytest.importorskip("tokenizers")
    of_the_hub(tmp_path / "bert", **bert([chr(i) for i in range(33, 127)], True))
    texts = [*PAGES, CHINESE * 20]
    if lossy:
        prepared(tmp_path, texts, tokenizer=str(tmp_path / "bert"), lossy=True)
    else:
        with pytest.raises(UserError, match="loses .*--lossy=True"):
            prepared(tmp_path, texts, tokenizer=str(tmp_path / "bert"))
        assert not (tmp_path / "data" / "a").exists()
    said = capsys.readouterr().out
    assert "'A' -> 'a'" in said and re.search(r"no ids for [\d.]+% of the characters: '名' \d+ times", said)


def test_a_tokenizer_that_cannot_be_had_is_said_before_the_text_is_read(tmp_path, capsys):
    with pytest.raises(UserError, match="has no tokenizer.json"):
        prepared(tmp_path, PAGES, tokenizer=str(tmp_path))
    assert "reading" not in capsys.readouterr().out


def test_each_document_may_begin_as_its_model_reads_one(tmp_path):
    pytest.importorskip("tokenizers")
    of_the_hub(tmp_path / "llama", **HUB["llama"](), post_processor={
        "type": "TemplateProcessing", "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}]})
    folder = prepared(tmp_path, PAGES, tokenizer=str(tmp_path / "llama"), prefix=True)
    meta, found = prepare.read_meta(folder), []
    tokenizer = Tokenizer.from_dict(meta["tokenizer"])
    assert tokenizer.prompt("a") == [1, *tokenizer.encode("a")] and tokenizer.prompt("<s> a")[:2] != [1, 1]
    for split in prepare.SPLITS:
        ids = prepare.read_split(folder, split, meta)
        for one in np.split(ids, np.flatnonzero(ids == tokenizer.eot) + 1)[:-1]:
            assert (one[0], one[-1]) == (1, tokenizer.eot)
            found.append(tokenizer.decode(one[1:-1].tolist()))
        assert tokenizer.byte_lengths(ids, meta["splits"][split]["bytes"]) is not None
    assert sorted(found) == sorted(PAGES)
    with pytest.raises(SettingError, match="prefix"):
        prepared(tmp_path, PAGES, tokenizer="bytes", prefix=True, overwrite=True)


def test_what_divides_a_file_is_used_or_proposed(tmp_path, capsys):
    """Whatever the blocks are: lines of <|endoftext|>, blank lines, any text; nothing else is lost."""
    stories = [f"{page}\n\nThe end of {i}.\n" for i, page in enumerate(PAGES)]

    def made(text, **settings):
        (tmp_path / "a.txt").write_bytes(text.encode())
        folder = prepare.prepare("a", source=str(tmp_path / "a.txt"), root=tmp_path / "data",
                                 tokenizer="bytes", overwrite=True, **settings)
        return read_back(folder), capsys.readouterr().out

    found, said = made("<|endoftext|>\n".join(stories))
    assert sorted(sum(found.values(), [])) == sorted(stories) and "80 documents, divided by" in said
    assert "--split_on=None" in said
    found, said = made("<|endoftext|>\n".join(stories), split_on=None)
    assert "".join(sum(found.values(), [])) == "<|endoftext|>\n".join(stories)
    found, said = made("<|endoftext|>".join(PAGES))
    assert "79 times <|endoftext|> in a line" in said and '--split_on="<|endoftext|>"' in said
    for between, split_on in (("<|endoftext|>", "<|endoftext|>"), ("\n \n\n", r"\n\n"), ("\r\n\r\n", "\n\n"),
                              (" %% ", "%%"), ("\n----\n", r"\n----\n"), ("\r\n----\r\n", r"\n----\n"),
                              ("\n\n \n", r"\n\n\n"), ("\r\n\r\n", r"\r\n\r\n"), ("\f", r"\f")):
        found, _ = made(between.join(PAGES), split_on=split_on)
        assert sorted(sum(found.values(), [])) == sorted(PAGES), between
    found, said = made("\n\n".join(PAGES))
    assert sorted(sum(made("\n---\n    ".join(PAGES), split_on="---")[0].values(), [])) == sorted(
        [PAGES[0], *(f"    {page}" for page in PAGES[1:])])  # an indent stays
    assert "1 files without --split_on in them" in made("\n\n".join(PAGES), split_on=r"\n\n\n")[1]
    assert "1 documents read" in said and r'79 blank lines in one document (--split_on="\n\n"' in said


@pytest.mark.parametrize("size", [1, 7, 100, 1000, 10**6])
def test_a_file_is_divided_alike_in_any_blocks(size):
    text = "a b<|endoftext|>\nc\n<|endoftext|>\n \n  <|endoftext|>  \n\n d\n\n\n\ne" * 30
    for split_on in ("", "<|endoftext|>", "\n\n", None):
        whole = list(text_file.parts_of([text], "t", split_on, {}, True))
        blocks = [text[i:i + size] for i in range(0, len(text), size)]
        docs, found = [], text_file.parts_of(blocks, "t", split_on, {}, True)
        for name, part in found:
            if name:
                docs.append([name, ""])
            docs[-1][1] += part
        assert [tuple(one) for one in docs] == whole


@pytest.mark.parametrize("name, content, expected", [
    ("a.json", '[{"url": "u", "text": "one"}, {"text": "two"}]', ["one", "two"]),
    ("a.json", '{"url": "u", "text": "one"}\n{"text": "two"}\n', ["one", "two"]),  # C4's
    ("a.json", '{"version": "1", "data": [{"text": "one"}]}', ["one"]),
    ("a.json", '{"data": [{"text": "one"}]}', ["one"]),
    ("a.json", '{"of": [{"n": 1}], "text": "one"}\n{"text": "two"}', ["one", "two"]),
    ("a.ndjson", '{"text": "one"}\n', ["one"]),
    ("a.json", '[{"body": "one"}]', "--text_key=NAME"), ("a.json", '["one", "two"]', ["one", "two"]),
    ("a.json", '{"body": "one"}\n{"body": "two"}\n', "--text_key=NAME"),
    ("a.csv", "id,text\n7,Hello, world\n", "a.csv:2: .*--skip_bad_rows=True"),
    ("a.csv", 'id,text\n1,"a ""b"\n2,"it" is\n3,c\n', "a.csv:3: .*--skip_bad_rows=True"),
    ("a.jsonl", '{"text": "one"}\n' + "[" * 100_000 + "\n", "a.jsonl:2: "),
    ("a.jsonl", '{"text": "one"}\n{"text": 5}\n', "a.jsonl:2: .*--text_key"),
    ("a.pdf", b"%PDF-1.7\n\xe2\xe3\xcf\xd3", "a.pdf: a PDF"), ("a.txt", "x".encode("utf-16"), ["x"]),
    ("a.txt", "这是中文，不是别的。".encode("gbk"), ["这是中文，不是别的。"]),
    ("a.txt", b"caf\xe9", "a.txt:1: .*cp1252"),
    ("a.txt.zst", b"\x28\xb5\x2f\xfd1", "a zstd file"), ("a.txt", "x".encode("utf-32"), ["x"]),
    ("a.txt", "今日はいい天気です。".encode("shift_jis"), "shift_jis, big5"),
    ("a.txt", "é, à: café".encode() + b"\xc3", "but for some bytes: --errors=replace"),
])
def test_what_is_read_of_a_file_that_is_named(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if isinstance(expected, list):
        assert [text for _, text in text_file.documents(str(path))] == expected
    else:
        with pytest.raises(UserError, match=expected) as error:
            list(text_file.documents(str(path)))
        assert "\n" not in str(error.value)
        if "skip_bad_rows" in expected:
            found = {}
            assert len(list(text_file.documents(str(path), skip_bad_rows=True, found=found))) < 3
            assert found["bad_rows"]["documents"] == 1


def test_a_row_that_was_passed_over_is_scrubbed_too(tmp_path):
    rows = [json.dumps({"text": page}) for page in PAGES]
    (tmp_path / "a.jsonl").write_text("\n".join(['{"mail": "jo@example.org"}', *rows]), encoding="utf-8")
    folder = prepare.prepare(source=str(tmp_path / "a.jsonl"), root=tmp_path / "data", tokenizer="bytes",
                             skip_bad_rows=True, scrub_pii=True)
    report = prepare.read_meta(folder)["report"]
    assert "[EMAIL]" in report["bad_rows"]["example"] and "jo@example" not in json.dumps(report)


def test_what_a_file_is_taken_for_is_said(tmp_path):
    for name, content, what in (("a.txt", '{"text": "one"}\n{"text": "two"}\n', "records_as_text"),
                                ("b.csv", "id,text\n1,one\nid, text\n2,two\n", "headers_again"),
                                ("a.csv", "review,label\ngood,1\n", "no_header")):
        (tmp_path / name).write_text(content, encoding="utf-8")
        found = {}
        texts = [text for _, text in text_file.documents(str(tmp_path / name), found=found,
                                                         text_key="0" if name == "a.csv" else "text")]
        assert texts == {"a.txt": [content], "a.csv": ["review", "good"], "b.csv": ["one", "two"]}[name]
        assert what in found
        assert what in prepare.NOTES


def test_a_source_that_has_changed_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    for i, page in enumerate(PAGES):
        (tmp_path / "notes" / f"{i}.txt").write_text(page, encoding="utf-8")
    make = partial(prepare.prepare, source="notes", tokenizer="bytes")
    folder = make()
    assert make() == folder
    for change in ("times", "sizes", "names"):
        path = tmp_path / "notes" / "5.txt"
        if change == "times":
            os.utime(path, (1, 1))
        elif change == "sizes":
            path.write_text("shorter", encoding="utf-8")
        else:
            path.rename(path.with_name("new.txt"))
        with pytest.raises(SettingError, match="source has changed.*--overwrite"):
            make()
        make(overwrite=True)
    meta = prepare.read_meta(folder)
    meta.pop("files")  # as data sets were
    for name in prepare.NEW:
        meta["settings"].pop(name)
    (folder / "meta.json").write_text(json.dumps(meta))
    assert make() == folder
    make(overwrite=True)
    shutil.rmtree(tmp_path / "notes")
    assert make() == folder and "not compared" in capsys.readouterr().out


@slow
@pytest.mark.parametrize("text", [" " * 10**6, "a" * 10**6, "\t \r\n" * 10**5, "🙂" * 10**5])
def test_a_million_of_one_character(tmp_path, text):
    for kind in ("bpe", "bytes"):
        (tmp_path / "a.txt").write_bytes(text.encode())
        folder = prepare.prepare("a", source=str(tmp_path / "a.txt"), root=tmp_path / "data", tokenizer=kind,
                                 vocab_size=260, overwrite=True)
        assert "".join(sum(read_back(folder).values(), [])) == text


@pytest.mark.parametrize("content", ["", "[]", "5", "{}", '{"format": 1}', '{"format": 2}', "[" * 10**5, "\0",
                                     b"\xff"])
def test_a_damaged_meta_json_is_one_line(tmp_path, content):
    (tmp_path / "meta.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match="meta.json: (damaged|format).*--overwrite") as error:
        prepare.read_meta(tmp_path)
    assert "\n" not in str(error.value)


def test_what_is_shown_moves_no_cursor(tmp_path, capsys):
    texts = [f"\x1b]0;title\x07\x1b[2J{page}\x9b5n\r" for page in PAGES]
    folder = prepared(tmp_path, texts, tokenizer="bytes")
    prepare.show_documents(folder, 2, 0)
    prepare.print_report(folder)
    said = capsys.readouterr().out
    assert r"\x1b[2JPage" in said and not set("\x1b\x07\x9b\r") & set(said)
