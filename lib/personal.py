"""
What looks like personal data in a text: keys, mail addresses, IP addresses, telephone numbers.

Each is found by a character or two that are rare, and then looked at closely. Edges of words are those of
ASCII, since beside Chinese, Japanese or Korean there is no space. Much else is personal, and stays.
"""
from __future__ import annotations

import contextlib
import ipaddress
import re
from collections import Counter
from collections.abc import Iterator

REACH_OF_KEY = 2**15  # characters of a private key, at most

BEGIN_KEY = re.compile(r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----")
END_KEY = re.compile(r"-----(?:END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----|(BEGIN))")
KEY_LINES = re.compile(r"(?:\s{0,4}[A-Za-z0-9+/=]{32,})+")
KEY = re.compile(
    r"(?<!\w)(?:sk-[\w-]{20,}|hf_[A-Za-z0-9]{30,}|gh[opsur]_[A-Za-z0-9]{16,}|github_pat_\w{16,}"
    r"|glpat-[\w-]{16,}|xox[abeprs]-[\w-]{16,}|A[KS]IA[A-Z0-9]{16}|AIza[\w-]{30,}|[rs]k_live_[A-Za-z0-9]{16,}"
    r"|npm_[A-Za-z0-9]{30,}|eyJ(?<![\w-]eyJ)[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,})", re.ASCII)

LETTER = r"A-Za-z0-9\u00c0-\u024f"  # of an address: those of Western languages
DOMAIN = re.compile(rf"[@\uff20](?:[{LETTER}][{LETTER}-]{{0,62}}\.){{1,6}}"
                    r"([A-Za-z]{2,24})(?![A-Za-z0-9_-])")
LOCAL = re.compile(rf"[{LETTER}_][{LETTER}_.%+'-]{{0,255}}$")
TOP = frozenset("com org net edu gov mil int info biz dev app xyz online site shop tech store cloud email "
                "club live pro social blog news media agency digital studio solutions systems services "
                "academy company museum travel gmbh io co ai uk de fr eu ch nl cn jp in ru it es br us "
                "kr".split())  # or any two letters, as of a country, behind what is longer than in q@k.mT

IP4 = re.compile(r"(?<![\w.-])[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?!\w|[.-]\w)", re.ASCII)
IP6 = re.compile(r"(?<![\w:])(?:[0-9a-fA-F]{0,4}:){2,7}[0-9a-fA-F]{0,4}(?![\w:]|\.[0-9])", re.ASCII)
VERSION = re.compile(r"(?:\b(?:v|ver|version|release|build|rev|section|chapter)|版本|バージョン|버전"
                     r"|[A-Za-z]/|[<>=~^!]=|[~^])[\s:`\"'(]*$", re.IGNORECASE)

RUN = re.compile(r"[0-9 ()./+-]{7,}")
CUE = re.compile(  # a word, alone or with "number", "(home)" or the like, directly before
    r"(?:(?<![A-Za-z])(?:tel|telephone|ph|phone|fax|mobile?|whatsapp|téléphone|telefono?|teléfono|тел"
    r"|телефон)(?![^\W\d_])|电话|手机|電話|携帯|전화|फ़ोन|फोन|मोबाइल)[^\w\n]{0,4}"
    r"(?:no|nr|number|is|home|work|office|portable|号码?|番号|번호|नंबर)?[は는]?[^\w\n]{0,6}$", re.IGNORECASE)
NUMBERED = re.compile(  # before the number of something else
    r"(?<![A-Za-z])(?:ISBN(?:-1[03])?|ISSN|EAN|UPC|SKU|S/?N|ID|order|invoice|case|订单号?|编号)[^\w\n]{0,4}$",
    re.IGNORECASE)
YEAR = "(?:1[89]|20)[0-9]{2}"
OTHER = re.compile("|".join((  # what looks like a telephone number, and is none
    r"[+-]?[0-9]+\.[0-9]+",
    r"0[0-9]{4}-[0-9]{4}",  # an American ZIP code
    r"[01 -]+",
    r"\(?[0-9]{1,3}(?: 000)+",
    rf"\(?{YEAR}(?:[ ./-]+(?:{YEAR}|[0-9]{{1,2}}))+",  # 2019-2020, 2024-01-15
    rf"(?:0[1-9]|1[0-2])[ ./-]{YEAR}(?![0-9]).*",
)))
CODE = (r"(?:[17]|2[07]|3[0-469]|4[013-9]|5[1-8]|6[0-6]|8[1246]|9[0-58]"  # of a country
        r"|(?:2[1-689]|3[578]|42|5[09]|6[789]|8[58]|9[679])[0-9])")
PHONE = re.compile("|".join((
    # +44 20 7946 0958, +49 (0)30 123456-0
    rf"(?:\(?\+|\b00){CODE}\)?[ ./-]?(?:\(0?[0-9]{{1,5}}\)[ .-]?)?[0-9]{{1,5}}(?:[ ./-]?[0-9]{{2,8}}){{1,5}}"
    r"(?:-[0-9](?![0-9]))?",
    # (555) 123-4567, (03) 9123 4567, but not (2004) 1234-1250
    r"\((?:0[1-9][0-9]{0,4}|[1-9][0-9]{1,2})\) ?[0-9]{3,5}[ -]?[0-9]{3,5}(?:[ -][0-9]{2,4})?",
    r"(?:1[-.])?[2-9][0-9]{2}([ .-])[0-9]{3}\1[0-9]{4}",  # 555-123-4567
    r"0[1-9]([ .-])[0-9]{2}(?:\2[0-9]{2}){3}",  # French: 01 42 68 53 00
    # 020 7946 0958, 030/1234567, 03-1234-5678
    r"0[1-9][0-9]{0,4}(?: ?[/-] ?| )[0-9]{3,8}(?:[ -][0-9]{2,8}){0,3}",
    r"07[0-9]{9}|0[67][0-9]{8}|01[5-7][0-9]{8,9}|0[6-9][0-9]{9}",  # mobile ones without spaces
    r"1[3-9][0-9](?:[0-9]{8}|([ -])[0-9]{4}\3[0-9]{4})",  # Chinese: 13912345678
    r"0?[6-9][0-9]{4}[ -][0-9]{5}",  # Indian: 98765 43210
    r"[78][ -]?\(?[3-9][0-9]{2}\)?[ -][0-9]{3}-[0-9]{2}-[0-9]{2}",  # Russian: 8 (495) 123-45-67
)))


class Scrub:
    """The rule that puts [KEY], [EMAIL], [IP] and [PHONE] for what looks like one.

    It counts each kind and keeps three examples, to be printed and not to be stored.
    """

    def __init__(self, phones: str):
        numbers = library_numbers if phones == "library" else likely_numbers
        self.finders = [("KEY", private_keys), ("KEY", keys), ("EMAIL", emails), ("IP", addresses),
                        ("PHONE", numbers)]
        self.examples, self.counts = {}, Counter()

    def __call__(self, text: str, stop: int) -> tuple[str, str, int]:
        total = 0
        for kind, find in self.finders:
            parts, at, n = [], 0, 0
            for start, end in find(text):
                if at <= start < stop:
                    parts += text[at:start], f"[{kind}]"
                    self.keep(kind, text[start:end])
                    at, n = end, n + 1
            done = "".join(parts)
            text, stop = done + text[at:], len(done) + max(stop - at, 0)
            self.counts[kind] += n
            total += n
        return text[:stop], text[stop:], total

    def keep(self, kind: str, found: str) -> None:
        """As it may be shown: without its digits; of a key the beginning."""
        shown = found[:8] + "..." if kind == "KEY" else found[:40]
        examples = self.examples.setdefault(kind, [])
        if len(examples) < 3:
            examples.append(re.sub(r"\d", "#", shown))


def private_keys(text: str) -> Iterator[tuple[int, int]]:
    """From BEGIN to END, or without an END the lines that follow and look like a key."""
    for begin in BEGIN_KEY.finditer(text):
        end = END_KEY.search(text, begin.end(), begin.start() + REACH_OF_KEY)
        lines = KEY_LINES.match(text, begin.end(), begin.start() + REACH_OF_KEY)
        if end and not end[1]:
            yield begin.start(), end.end()
        elif lines:
            yield begin.start(), lines.end()


def keys(text: str) -> Iterator[tuple[int, int]]:
    """Tokens of services. What is made of words is a name: hf_hub_download_of_all_files, sk-learn-..."""
    for place in KEY.finditer(text):
        if max(map(len, re.split("[-_.]", place[0]))) >= 16:
            yield place.span()


def emails(text: str) -> Iterator[tuple[int, int]]:
    """Not q@k.transpose(0, 1), x@self.wq or q@kv.to(device)."""
    for place in DOMAIN.finditer(text):
        at, end = place.span()
        local = LOCAL.search(text, max(at - 256, 0), at)
        top, host = place[1], place[0].split(".")[0]
        if not local or local[0] == "git":
            continue
        country = len(top) == 2 and len(host) > 2 and len(local[0]) > 1 and (top.islower() or top.isupper())
        if top.lower() in TOP or (country and text[end:end + 1] not in ("(", "[")):
            yield local.start(), end


def addresses(text: str) -> Iterator[tuple[int, int]]:
    """IPv4, unless it looks like a version; IPv6 if the standard library says so."""
    found = []
    for place in IP4.finditer(text):
        parts = [int(part) for part in place[0].split(".")]
        small = max(parts[:3]) < 32 and parts[0] != 10  # OpenSSL 1.0.2.15; of addresses one in 500
        version = small or VERSION.search(text, max(place.start() - 16, 0), place.start())
        if max(parts) < 256 and not version:
            found.append(place.span())
    for place in IP6.finditer(text):
        groups = [group for group in place[0].split(":") if group]
        letters = not "".join(groups).isdigit()  # not x[1::2], nor b64::dec
        long = len(groups) > 3 or (letters and len(groups) > 1 and (len(groups) > 2 or len(groups[0]) == 4))
        with contextlib.suppress(ValueError):
            if long and digits_in(place[0]) and ipaddress.IPv6Address(place[0]):
                found.append(place.span())
    return iter(sorted(found))


def runs(text: str) -> Iterator[tuple[str, int, int]]:
    """What numbers may be in: from a +, ( or digit to the last digit, and where that is."""
    for place in RUN.finditer(text):
        run = place[0].rstrip(" ()./+-")
        last = place.start() + len(run)
        run = run.lstrip(" )./-")
        if len(run) >= 7:
            yield run, last - len(run), last


def likely_numbers(text: str) -> Iterator[tuple[int, int]]:
    """Telephone numbers as many countries write them. 10 000 000 is none, nor is a row of a table."""
    for run, at, last in runs(text):
        other = OTHER.fullmatch(run) and run[0] != "+"
        if 7 <= digits_in(run) <= 15 and not other and CUE.search(text, max(at - 32, 0), at):
            yield at, last
            continue
        while place := PHONE.search(text, at, last):
            start, at = place.span()
            other = OTHER.fullmatch(place[0]) or NUMBERED.search(text, max(start - 16, 0), start)
            alone = 9 <= digits_in(place[0]) <= 15 and stands_alone(text, start, at)
            if alone and not other and not counts(place[0]):
                yield start, at
            else:
                at = start + 1


def library_numbers(text: str) -> Iterator[tuple[int, int]]:
    """Those that the library phonenumbers takes for valid somewhere."""
    import phonenumbers  # prepare.py has looked whether it is there
    for run, at, _ in runs(text):
        for region in ("US", "GB", "FR", "DE", "IN", "CN", "JP", "KR", "ES", "IT", "BR", "RU"):
            found = next(iter(phonenumbers.PhoneNumberMatcher(run, region)), None)
            start, end = (at + found.start, at + found.end) if found else (0, 0)
            if found and digits_in(text[start:end]) >= 9 and stands_alone(text, start, end):
                yield start, end
                break


def counts(text: str) -> bool:
    """Three numbers or more with the same step: 0041 0042 0043."""
    numbers = [int(one) for one in re.findall("[0-9]+", text)]
    steps = {b - a for a, b in zip(numbers, numbers[1:])}
    return len(numbers) > 2 and len(steps) == 1


def digits_in(text: str) -> int:
    return sum(map(str.isdigit, text))


BEHIND = re.compile(r"[\w.\-/=+,#]\Z|[0-9][ \t:]\Z", re.ASCII)
AHEAD = re.compile(r"\w|[ \t.,\-/:][0-9]", re.ASCII)


def stands_alone(text: str, start: int, end: int) -> bool:
    """Is it no part of a longer number, a word, a date or a row of numbers?"""
    return not (BEHIND.search(text[max(start - 2, 0):start]) or AHEAD.match(text, end))
