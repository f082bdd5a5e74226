"""Using a checkpoint."""
import shutil

import torch

import sample
from lib.tokenizer import make_tokenizer
from tests.helpers import script


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
