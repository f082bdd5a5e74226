"""What is done to a text before it is learned from."""
import json

import numpy as np
import pytest

from lib.clean import clean, collect, joined, near_groups
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
def test_near_copies_are_grouped(tmp_path, text_of):
    """However many there are, in capitals or not; what shares less is no copy."""
    originals = [words(150, seed) for seed in range(300)]
    near = []
    for i, one in enumerate(originals[:150] + originals[:10] * 30):
        one = list(one)
        for at in (10 + i % 7, 60, 110):  # three words changed, one taken out
            one[at] = f"new{i}"
        del one[130]
        near.append(one)
    half = [one[:75] + words(75, 1000 + i) for i, one in enumerate(originals[200:250])]
    texts = [text_of(one) for one in originals + near + half]
    texts += [text.upper().replace(" ", "\n ") for text in texts[:20]]
    _, index, _ = collected(tmp_path, texts)
    first = [*range(300), *range(150), *list(range(10)) * 30, *range(750, 800), *range(20)]
    assert near_groups(index["sketch"], 0.6).tolist() == first
    few = near_groups(index["sketch"][:3], 0.6)
    assert few.tolist() == [0, 1, 2]


@pytest.mark.parametrize("threshold", [0.2, 0.4, 0.6, 0.9])
def test_near_copies_are_found_at_any_threshold(tmp_path, threshold):
    """Of pairs that share a little more than is asked for, all but a few; of those with less, few."""
    rng, pairs = np.random.default_rng(0), {True: [], False: []}
    for more, found in pairs.items():
        share = min(threshold + (0.09 if more else -0.12), 0.99)
        common = round(400 * 2 * share / (1 + share))  # of 400 parts, so that this is the share of both
        for _ in range(100):
            start = rng.bytes(4 * common).hex()
            found += [start + rng.bytes(4 * (400 - common)).hex() for _ in range(2)]
    _, index, _ = collected(tmp_path, pairs[True] + pairs[False])
    group = near_groups(index["sketch"], threshold)
    joined = (group[1::2] == group[::2]).reshape(2, 100).sum(axis=1)
    assert joined[0] >= 90 and joined[1] <= 10, joined


def test_components_are_those_of_a_plain_search():
    rng = np.random.default_rng(0)
    a, b = rng.integers(500, size=(2, 400))
    expected = list(range(500))
    for _ in range(500):  # until nothing changes, in the plainest way
        for x, y in zip(a.tolist(), b.tolist()):
            expected[x] = expected[y] = min(expected[x], expected[y])
    assert joined(np.arange(500), a, b).tolist() == expected
