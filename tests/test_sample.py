"""Using a checkpoint. What finetune.py made is used in test_finetune.py too."""
import re
import shutil

import pytest
import torch

import sample
from config import SettingError, UserError
from lib.tasks import TASKS, Tag
from lib.tokenizer import make_tokenizer
from tests.helpers import run_here, says, script, tiny, write_rows


def test_int8_weights_are_a_quarter_of_the_size_and_nearly_as_good(home):
    model, tokenizer = sample.load(home / "out/whole")
    small = sample.to_int8(model)
    kinds = [layer.weight().dtype for layer in small.modules() if hasattr(layer, "set_weight_bias")
             and hasattr(layer, "scale")]
    assert kinds == [torch.qint8] * (6 * model.config.n_layer + 1)  # all but the embedding
    ids = torch.tensor([tokenizer.encode((home / "toy.txt").read_text(encoding="utf-8"))[:33]])
    loss, of_small = (one(ids[:, :-1], ids[:, 1:])[1].item() for one in (model, small))
    assert 0 < abs(of_small / loss - 1) < 0.01
    # a row's outputs are its own: alone or beside others, cached or read again
    rows = torch.cat((ids[:, :-1], ids[:, 1:].flip(1)))
    with torch.no_grad():
        torch.testing.assert_close(small.hidden(rows)[:1], small.hidden(rows[:1]), rtol=1e-5, atol=1e-5)
        x = torch.randn(3, model.config.n_embd) * torch.tensor([[1.0], [100.0], [0.0]])
        layer = small.blocks[0].mlp.up
        assert torch.equal(layer(x)[:1], layer(x[:1])) and torch.equal(layer(x)[2], layer(x[2]))
    cached = small.generate(ids[:, :5], 20, temperature=0)
    assert torch.equal(cached, small.generate(ids[:, :5], 20, temperature=0, use_cache=False))
    said = run_here(sample, "--out_dir=out/whole", "--quantize=int8", "--max_new_tokens=5", cwd=home)
    assert said.endswith("---------------\n")


def test_sampling_needs_no_data_folder(home, tmp_path):
    shutil.copytree(home / "out/whole", tmp_path / "out/whole")
    (tmp_path / "prompt.txt").write_text("class 漢", encoding="utf-8")
    done = script("sample.py", "--start=FILE:prompt.txt", "--max_new_tokens=40", cwd=tmp_path, PYTHONUTF8="1")
    assert done.returncode == 0 and done.stdout.startswith("class 漢"), done.stderr
    assert "whole: the newest run in out)" in done.stderr
    again = run_here(sample, "--out_dir=out/whole", "--start=class 漢", "--max_new_tokens=40", cwd=tmp_path)
    # the newest run, and the same seed; a carriage return is a line's end to a pipe
    assert again.split() == done.stdout.split()
    many = run_here(sample, "--stream=False", "--num_samples=3", "--max_new_tokens=5", cwd=tmp_path)
    assert many.count("---------------") == 3
    model, tokenizer = sample.load(tmp_path / "out/whole")
    assert not model.training and model.config.vocab_size == tokenizer.vocab_size


@pytest.mark.parametrize("error, given, words", [
    (UserError, ["--out_dir=nothing"], "nothing: no checkpoint"),
    (UserError, ["--out_dir=out/nothing"], "out/nothing: no such run; out has [a-z]"),
    (UserError, ["--out_dir=out/whol"], "out/whol: no such run; out has whole"),  # the near one first
    (UserError, ["--out_dir=out/whole/lora.pt"], "lora.pt: is not there; out.whole has best.pt, ckpt.pre"),
    (UserError, ["--start=FILE:nothing.txt"], "FILE:nothing.txt: cannot be read"),
    (SettingError, ["--stop=[1]"], r"stop=.1.: wanted texts"),
    (SettingError, ["--top_p=2"], "top_p: wanted"),
    (SettingError, ["--export=there", "--quantize=int8"], "quantize=int8: of no use with --export"),
    (SettingError, ["--export=there", "--start=x"], "start=x: of no use with --export"),
])
def test_what_cannot_be_is_one_line(home, error, given, words):
    with pytest.raises(error, match=words):
        run_here(sample, "--out_dir=out/whole", *given, cwd=home)


def test_what_narrows_a_choice_is_of_no_use_without_one(home, tmp_path):
    how = ["--out_dir=out/whole", "--device=cpu", "--max_new_tokens=3"]
    with pytest.raises(SettingError) as error:
        run_here(sample, *how, "--temperature=0", "--top_k=5", cwd=home)
    says(error, "top_k=5", "temperature=0")
    (tmp_path / "mine.py").write_text("top_k = 5\n", encoding="utf-8")  # a recipe yields
    said = run_here(sample, *how, tmp_path / "mine.py", "--temperature=0", cwd=home)
    assert "(top_k=5: of no use with temperature=0" in said


def test_an_export_to_where_no_folder_can_be_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--export=.*file/here: "):
        sample.write_pretrained(tiny("gpt2"), make_tokenizer("bytes", [], 258), str(tmp_path / "file/here"))


def test_a_line_break_is_a_stop_on_every_shell(home, monkeypatch):
    """Where "\\n" is no line break to the shell; a list is Python's."""
    seen = []
    monkeypatch.setattr(sample, "write", lambda *args: seen.append(args[6]))
    for given in ("\\n\\n", "\n", r"['a\n', r'\n']"):
        run_here(sample, "--out_dir=out/whole", f"--stop={given}", cwd=home)
    assert seen == [["\n\n"], ["\n"], ["a\n", r"\n"]]


def test_a_prompt_is_read_as_training_reads_a_file(tmp_path):
    (tmp_path / "prompt.txt").write_bytes("\ufeffa fine\r\nfilm\n".encode())
    assert sample.read_prompt(f"FILE:{tmp_path / 'prompt.txt'}") == "a fine\nfilm\n"


def test_a_prompt_may_be_in_any_encoding(home, tmp_path):
    (tmp_path / "prompt.txt").write_bytes("café".encode("latin-1"))
    how = ["--out_dir=out/whole", "--max_new_tokens=1"]
    start = f"--start=FILE:{tmp_path / 'prompt.txt'}"
    with pytest.raises(UserError, match="--encoding=cp1252 or latin-1"):
        run_here(sample, *how, start, cwd=home)
    assert run_here(sample, *how, start, "--encoding=latin-1", cwd=home).startswith("café")
    for given, word in (([start, "--encoding=foo"], "encoding=foo: no encoding"),
                        (["--start=é", "--encoding=latin-1"], "only with start=FILE:..."),
                        (["--export=there", "--encoding=latin-1"], "only with start=FILE:...")):
        with pytest.raises(SettingError) as error:
            run_here(sample, *how[:1], *given, cwd=home)
        says(error, word)


def test_what_a_classifier_has_no_use_for_is_refused_and_what_it_cuts_is_said(tuned):
    out = f"--out_dir={tuned / 'out'}"
    for given in ("--stream=False", "--top_k=5", "--num_samples=3", "--seed=1"):
        with pytest.raises(SettingError, match=f"{given[2:]}: of no use with a fine-tuned model's answers, "):
            run_here(sample, out, "--start=w3 fine", given)
    with pytest.raises(SettingError, match="text_column=review: of no use with .*, only with a file of rows"):
        run_here(sample, out, "--start=w3 fine", "--text_column=review")
    assert "(1 text longer than 64 tokens: cut there)" in run_here(sample, out, "--start=" + "w3 fine " * 60)
    assert "(1 text empty)" in run_here(sample, out, "--start= ")


def test_one_text_or_none_is_no_list_of_texts(tuned):
    model, _ = sample.load(tuned / "out")
    assert model.predict([]) == []
    assert model.predict(("w1 fine", ["w1 fine", None]))[1]["prediction"] == "good"
    for texts, *words in (("w1 fine", "predict([text])"), (["w1", None], "text 2", "got None"),
                          ([("a", "b", "c")], "text 1", "'c'"), ([5], "text 1", "got 5")):
        with pytest.raises(UserError) as error:
            model.predict(texts)
        says(error, *words)


def test_columns_are_asked_for_by_name_or_number_in_use_too(tuned, tmp_path):
    table = write_rows(tmp_path / "in.csv", ("kind", "body"), ["good", "bad"], ["fine w1", "w2 dull"])
    given = (f"--out_dir={tuned / 'out'}", f"--start=FILE:{table}")
    for text, label in (("body", "kind"), (1, 0)):
        said = run_here(sample, *given, f"--text_column={text}", f"--label_column={label}")
        assert said.endswith(": accuracy 1.0000\n")
    with pytest.raises(UserError, match="in.csv: has no column 'mood' for the label: it has kind, body"):
        run_here(sample, *given, "--text_column=body", "--label_column=mood")
    (tmp_path / "in.txt").write_text("fine w1\n")
    with pytest.raises(UserError, match="in.txt: has no column 'mood' for the label: it has each line"):
        run_here(sample, given[0], f"--start=FILE:{tmp_path / 'in.txt'}", "--label_column=mood")
    words = tmp_path / "in.conll"
    words.write_text("Rome NNP B-x\nis VB O\n")
    trained = {"text": "0", "label": "1", "header": False, "unused": []}  # of two columns
    for label, tags in (("2", ["B-x", "O"]), ("1", ["NNP", "VB"])):
        _, rows = Tag.open(str(words), {**trained, "label": label, "asked": ["label"]}, False)
        assert list(rows)[0].label == tags
    with pytest.raises(UserError, match="in.conll: has no column 'mood' for the label: it has 0, 1, 2"):
        Tag.open(str(words), {**trained, "label": "mood", "asked": ["label"]}, False)


def test_rows_that_cannot_be_read_are_passed_over_as_in_training(tuned, tmp_path):
    table = tmp_path / "in.csv"
    table.write_text("review,label\nw1 fine,good\nw2, dull,bad\nw3 dull,bad\n", encoding="utf-8")
    given = (f"--out_dir={tuned / 'out'}", f"--start=FILE:{table}")
    with pytest.raises(UserError, match="in.csv:3: 3 cells.*--skip_bad_rows=True"):
        run_here(sample, *given)
    said = run_here(sample, *given, "--skip_bad_rows=True")
    assert "in.csv: 1 rows left out that cannot be read" in said and "\n2 rows" in said


def test_a_file_is_one_of_rows_if_the_training_file_was_so(tuned, tmp_path):
    task = sample.load(tuned / "out")[0].task  # columns label, review, who
    tag = TASKS["tag"]({"labels": ["B-x", "O"], "columns": {"text": "0", "label": "1", "unused": []}}, None)
    words = "a O\nRome B-x\n\nb O\n"
    for one, name, content, expected in [
            (task, "a.csv", "", True), (task, "a.txt", "fine\n", True), (task, "a.md", "fine, dull\n", False),
            (task, "letter", "label, review\n", False), (task, "a.train", "__label__good fine\n", True),
            (task, "a.dat", '"label";"review";"who"\ngood;fine;x\n', True),
            (tag, "eng.testb", words, True), (tag, "a.bio", words, True),
            (tag, "a.md", "a O\nb c\nd\n", False)]:
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert one.holds_rows(str(tmp_path / name)) == expected, name
    columns = {**tag.head["columns"], "id": None}
    for text, rows, kind in ((words, 2, "spaces"), ("# 7\n" + words, 2, "spaces"), ("a O\n", 1, "spaces"),
                             ("-DOCSTART- O\n\n" + words, 2, "spaces"), ("Rome\n#a\n\n#b\n", 2, "spaces"),
                             ("Rome a b\nc d e\n", 2, "spaces"), ("Rome a\n\nc d e\n", 3, "spaces"),
                             ("王在北京\n\n他在\n", 3, "characters"), ("王\n在\n\n他\n", 2, "characters")):
        tag.head["words"] = kind
        (tmp_path / "a.txt").write_text(text, encoding="utf-8")  # a word a line, or a text
        assert len(list(tag.to_answer(str(tmp_path / "a.txt"), columns)[1])) == rows, text


def test_a_fine_tuned_model_answers(tuned, tmp_path, monkeypatch):
    out, table = f"--out_dir={tuned / 'out'}", tmp_path / "in.csv"
    assert re.search("^prediction +good$", run_here(sample, out, "--start=w3 fine"), re.MULTILINE)
    write_rows(table, ("review",), ["fine w1", "w2 dull"])
    said = run_here(sample, out, f"--start=FILE:{table}").splitlines()
    assert said[0] == "text,label,prediction,prob_bad,prob_good"
    assert said[1].startswith("fine w1,,good,") and said[2].startswith("w2 dull,,bad,")
    assert said[3].startswith("2 rows") and "accuracy" not in said[3]
    write_rows(table, ("review", "label"), ["fine w1", "w2 dull"], ["good", "good"])
    sizes = []
    for how in ("None", "int8"):
        last = run_here(sample, out, f"--start=FILE:{table}", f"--quantize={how}").splitlines()[-1]
        assert last.endswith(": accuracy 0.5000")
        sizes.append(float(re.search(r"([\d.]+) MB", last)[1]))
    assert sizes[1] < sizes[0]
    model, _ = sample.load(tuned / "out")
    assert model.body.head is None and model.task.labels == ["bad", "good"]


def test_text_comes_in_whole_characters_and_ends_at_a_stop():
    tokenizer = make_tokenizer("bytes", [], 258)
    ids = tokenizer.encode("é漢🙂 one. two. three") + [tokenizer.eot] + tokenizer.encode("next")
    pieces = list(sample.as_text(ids, tokenizer))
    assert "".join(pieces) == "é漢🙂 one. two. three" and pieces[:4] == ["", "é", "", ""]
    assert "".join(sample.as_text(ids, tokenizer, [". th", "two.", ""])) == "é漢🙂 one. "
    whole = make_tokenizer("bpe", [" great. three"] * 9, 280)
    for one in (tokenizer, whole):  # two stop strings in one token end a text where they do in several
        assert "".join(sample.as_text(one.encode(" great. three"), one, ["reat", "ea"])) == " gr"
    assert len(whole.encode(" great. three")) < 5
    for at in range(30):  # whatever has been printed never holds a part of the stop string
        shown = "".join(sample.as_text(ids[:at], tokenizer, [" two"]))
        assert "é漢🙂 one. two. three".startswith(shown.rstrip("\ufffd"))
    assert list(sample.as_text([0xFF, 0xE6], tokenizer))[0] == "\ufffd"


def test_a_stop_string_may_begin_in_the_prompt():
    tokenizer = make_tokenizer("bytes", [], 258)

    def written(text, prompt, *stops):
        return "".join(sample.as_text(tokenizer.encode(text), tokenizer, stops, prompt))

    assert written("\nb\n\nc", "a\n", "\n\n") == ""  # as transformers has it: it ends in what is new
    assert written("b\n\nc", "a\n\n", "\n\n") == "b"  # one that the prompt has is none
    assert written(" red", "The cat", "cat re") == ""
    assert written(" rude", "The cat", "cat re", "zz") == " rude"
