"""Pictures: what they show, and that they say what is missing."""
import builtins
import json

import numpy as np
import pytest

from lib import metrics, pictures

pytest.importorskip("matplotlib")


@pytest.fixture
def drawn(monkeypatch):
    """name of a file -> its axes."""
    found, save = {}, pictures.save

    def kept(axes, path):
        found[path.name] = axes
        return save(axes, path)

    monkeypatch.setattr(pictures, "save", kept)
    return found


def texts(axes) -> list[str]:
    return [one.get_text() for one in axes.get_legend().get_texts()]


def test_pictures_of_classes_have_chance_and_shares_and_no_lines_through_them(tmp_path, drawn):
    import matplotlib
    y, probs = np.repeat([0, 1, 2], 10), np.full((30, 3), 0.3)
    probs[np.arange(30), np.r_[y[:25], [0] * 5]] = 0.4
    with matplotlib.rc_context({"axes.grid": True}):  # as in a user's matplotlibrc
        metrics.report(tmp_path, y, probs, ["$a$", "_b", "c"])
    table = drawn["confusion.png"]
    assert not any(line.get_visible() for line in table.get_xgridlines())
    assert "5\n50%" in [one.get_text() for one in table.texts]
    assert texts(drawn["roc.png"])[-1] == "by chance" and texts(drawn["roc.png"])[1].startswith(" _b (AUC = ")
    lines = [line.get_ydata() for line in drawn["precision_recall.png"].lines]
    assert any(np.allclose(line, 1 / 3) for line in lines) and len(texts(drawn["precision_recall.png"])) == 4


def test_a_precision_is_drawn_from_where_something_is_found():
    first_is_wrong = {"true_positive_rate": [0, 0, 0.5, 1], "precision": [1, 0, 0.5, 2 / 3], "share": 0.5,
                      "average_precision": 0.58}
    line = pictures.precision_recall({"a": first_is_wrong}).lines[0]
    assert line.get_xdata().tolist() == [0, 0.5, 1] and line.get_ydata().tolist() == [0.5, 0.5, 2 / 3]


def test_curves_are_of_twenty_classes_and_a_thousand_points(tmp_path, drawn, capsys):
    rng = np.random.default_rng(0)
    y, probs = rng.integers(30, size=3000), rng.random((3000, 30))
    y[:2000] = 7
    metrics.report(tmp_path, y, probs, [str(k) for k in range(30)])
    curves = json.loads((tmp_path / "curves.json").read_text(encoding="utf-8"))["curves"]
    assert len(curves) == 20 and "7" in curves and len(curves["7"]["precision"]) == 1000
    assert curves["7"]["true_positive_rate"][-1] == 1.0 and curves["7"]["share"] > 0.6
    assert "(curves of the 20 most frequent of 30 classes)" in capsys.readouterr().out
    for name in ("roc.png", "precision_recall.png"):
        looks = {(line.get_color(), line.get_linestyle()) for line in drawn[name].lines}
        assert len([style for _, style in looks if style != "--"]) == 20  # no two classes' lines look alike


def test_of_a_sentence_for_a_label_the_beginning_is_drawn(tmp_path, drawn):
    labels = ["first " + "long " * 1000, "second " + "long " * 1000]
    metrics.report(tmp_path, np.arange(40) % 2, np.random.default_rng(0).random((40, 2)), labels)
    ticks = [one.get_text() for one in drawn["confusion.png"].get_xticklabels()]
    assert ticks[0].startswith("first long") and max(map(len, ticks + texts(drawn["roc.png"]))) < 60


def test_letters_that_no_font_has_are_named_with_a_font_to_install(capsys, monkeypatch):
    from matplotlib.font_manager import fontManager
    shipped = [font for font in fontManager.ttflist if "DejaVu" in font.name or "Last Resort" in font.name]
    monkeypatch.setattr(fontManager, "ttflist", shipped)
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", lambda: [])
    pictures.fonts_with.cache_clear()
    for _ in range(2):
        assert pictures.fonts_with("caf\u00e9") == pictures.fonts_with("\u597d\u8bc4 a") == ["DejaVu Sans"]
    pictures.fonts_with.cache_clear()
    said = capsys.readouterr().out
    assert said.count("no font here has \u597d\u8bc4: install one, such as Noto Sans CJK") == 1


def test_a_font_that_came_after_matplotlib_listed_them_is_found(monkeypatch, capsys):
    from matplotlib.font_manager import fontManager
    with_serifs = next(font.fname for font in fontManager.ttflist if "STIXGeneral.ttf" in font.fname)
    monkeypatch.setattr(fontManager, "ttflist", [one for one in fontManager.ttflist if "DejaVu" in one.name])
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", lambda: [with_serifs, "no-such.ttf"])
    pictures.fonts_with.cache_clear()
    assert pictures.fonts_with("a\u1d81") == ["DejaVu Sans", "STIXGeneral"]
    pictures.fonts_with.cache_clear()
    assert not capsys.readouterr().out


def test_losses_have_a_title_a_unit_and_a_smoothed_line(tmp_path, drawn):
    log = tmp_path / "log.jsonl"
    rows = [{"iter": i, "loss": 5 + (-1) ** i} for i in range(1, 5001)]
    rows += [{"iter": i, "val_loss": 16.0} for i in (2500, 5000)]
    log.write_text("\n".join(map(json.dumps, rows)) + '\n{"iter": 50', encoding="utf-8")
    pictures.plot_losses(log, tmp_path / "loss.png", "squares", 0.25)
    axes = drawn["loss.png"]
    assert axes.get_title() == f"Loss of {tmp_path.name}" and axes.get_ylabel() == "loss, squares"
    raw, smooth, val = axes.lines
    assert len(raw.get_xdata()) == 1000 and np.ptp(smooth.get_ydata()[20:]) < 0.1
    assert val.get_ydata().tolist() == [4.0, 4.0]  # in the unit of the training loss
    log.write_text("\n".join(map(json.dumps, rows[:1] + rows[-1:])), encoding="utf-8")
    pictures.plot_losses(log, tmp_path / "short.png")
    markers = [line.get_marker() for line in drawn["short.png"].lines[1:]]
    assert markers == ["o", "o"]  # a line of one point is none
    rows = [{"iter": i, "val_loss": 3.0} for i in (1, 2, 3)]
    log.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    pictures.plot_losses(log, tmp_path / "few.png")
    assert all(tick % 1 == 0 for tick in drawn["few.png"].get_xticks())  # no half step


def test_without_matplotlib_it_is_said_once(tmp_path, monkeypatch, capsys):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    pictures.can_draw.cache_clear()
    for _ in range(2):
        pictures.plot_losses(tmp_path / "log.jsonl", tmp_path / "loss.png")
    written = metrics.report(tmp_path, np.array([0, 1]), np.eye(2), ["a", "b"])
    pictures.can_draw.cache_clear()
    assert written == ["curves.json", "report.txt"]
    assert capsys.readouterr().out.count("matplotlib is not installed: pip install matplotlib") == 1


def test_a_picture_that_cannot_be_written_ends_no_run(tmp_path, capsys):
    (tmp_path / "loss.png").mkdir()
    (tmp_path / "log.jsonl").write_text('{"iter": 1, "loss": 2.0}\n')
    pictures.plot_losses(tmp_path / "log.jsonl", tmp_path / "loss.png")
    assert "loss.png: not drawn (" in capsys.readouterr().out
