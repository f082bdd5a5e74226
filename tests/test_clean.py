"""What is done to a text before it is learned from."""
import json

import numpy as np
import pytest

from lib.clean import clean, collect, near_copies
from tests.helpers import PAGES, words

DIRTY = ("\r\nCafe\u0301 <b>bold</b><br>x\x07\x1b\nsame\nsame\nsame\nend: jo.e@x.org, 10.1.2.3, "
         "+1 555-123-4567 sk-aaaaaaaaaaaaaaaaaaaa")

CLEANED = {
    "nfc": ("Cafe\u0301", "Caf\u00e9"), "line_ends": ("\r\n", "\n"), "control_chars": ("\x07\x1b", ""),
    "html": ("<b>bold</b><br>", "bold\n"), "repeated_lines": ("same\nsame\nsame", "same"),
    "scrub_pii": (DIRTY[DIRTY.index("jo.e"):], "[EMAIL], [IP], [PHONE] [KEY]"),
}


def collected(tmp_path, texts, rules=(), min_chars=1, min_text=0.0):
    """The documents that are kept, their index, and what was counted. A list is a text in blocks."""
    docs, found = [], {}
    for i, text in enumerate(texts):
        for n, block in enumerate(text if isinstance(text, list) else [text]):
            docs.append(("" if n else f"text {i}", block))
    index = collect(iter(docs), tmp_path / "spool", list(rules), min_chars, min_text, True, found)
    data = (tmp_path / "spool").read_bytes()
    kept = [data[start:start + size].decode() for start, size in zip(index["start"], index["size"])]
    assert [len(text) for text in kept] == index["chars"].tolist()
    return kept, index, found


@pytest.mark.parametrize("rule", [None, *CLEANED])
def test_each_rule_cleans_its_own_and_is_counted(tmp_path, rule):
    """A text is what it was, but for what was asked for."""
    texts = [f"{page}{DIRTY}" for page in PAGES]
    kept, _, found = collected(tmp_path, texts, [rule] if rule else [])
    assert kept == [text.replace(*CLEANED[rule]) if rule else text for text in texts]
    assert found["read"]["documents"] == len(PAGES) and set(found) == {"read", *([rule] if rule else [])}
    if rule:
        assert found[rule]["documents"] == len(PAGES) and "text 0" in found[rule]["example"]
    assert rule != "scrub_pii" or "x.org" not in json.dumps(found)


def test_what_looks_like_personal_data_and_what_does_not():
    def scrubbed(text):
        return clean(text, ["scrub_pii"], "", {})[0]

    for text in ("version 3.11.7, 1.2.3.4.5", "2024-05-06 12:34:56", "std::vector foo::bar", "3.14159265",
                 "12345678901234567890", "@decorator\ndef f(self)", "5-7 and 10-12", "x = a[1:2] 0:1"):
        assert scrubbed(text) == text
    for text, kind in (("+49 170 123-4567", "PHONE"), ("(030) 1234-5678", "PHONE"), ("13912345678", "PHONE"),
                       ("fe80::1:2", "IP"), ("2001:db8:0:0:0:0:0:1", "IP"), ("255.1.0.9", "IP"),
                       ("a+b@c-d.co.uk", "EMAIL"), ("ghp_" + "x1" * 18, "KEY"), ("AKIA" + "A1" * 8, "KEY")):
        assert scrubbed(f"it is {text} here") == f"it is [{kind}] here"


def test_short_and_unreadable_documents_are_dropped(tmp_path):
    texts = [*PAGES, "abc", "ab", "%&$#@!^*" * 30, "", ["", "blocks, ", "of one text"]]
    kept, _, found = collected(tmp_path, texts, min_chars=3, min_text=0.5)
    assert kept == [*PAGES, "abc", "blocks, of one text"]
    counts = {what: entry["documents"] for what, entry in found.items()}
    assert counts == {"read": len(texts), "too_short": 2, "mostly_not_text": 1}
    assert "%&$" in found["mostly_not_text"]["example"]


def in_chinese(some: list[str]) -> str:
    return "".join(chr(0x4E00 + sum(map(ord, word)) * 31 % 997) for word in some)


@pytest.mark.parametrize("text_of", [" ".join, in_chinese])
def test_near_copies_never_straddle_a_split(tmp_path, text_of):
    """The train copy goes, what differs more stays, and what is added moves nothing."""
    originals = [words(150, seed) for seed in range(300)]
    near = [list(one) for one in originals[:150]]
    for i, one in enumerate(near):  # three words changed, one taken out
        for at in (10 + i % 7, 60, 110):
            one[at] = f"new{i}"
        del one[130]
    half = [one[:75] + words(75, 1000 + i) for i, one in enumerate(originals[200:250])]
    more = [words(150, seed) for seed in range(5000, 5050)]
    texts = [text_of(one) for one in originals + near + half + more]
    split = np.random.default_rng(0).integers(3, size=len(texts))
    _, index, _ = collected(tmp_path, texts)
    drop = near_copies(index["sketch"], split, 0.6)
    first, second = drop[:150], drop[300:450]
    assert (first ^ second).all() and drop.sum() == 150
    assert (first == (split[:150] < split[300:450])).all()  # of two in one split the later one goes
    assert (drop[:-50] == near_copies(index["sketch"][:-50], split[:-50], 0.6)).all()
