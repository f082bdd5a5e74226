"""Lines with personal data in them and lines that only look like it, from a fixed seed."""
from __future__ import annotations

import numpy as np

# {} is where it stands. Six languages; those without spaces have none around it.
TEXTS = {
    "PHONE": ["Call {} before noon.", "My number is {}, thanks", "Rufen Sie {} an.", "Tel. {}",
     "Appelez le {}.",
              "Téléphone : {}", "请拨打{}联系我们", "电话：{}。", "お問い合わせは{}まで", "電話{}です",
              "कृपया {} पर कॉल करें",
              "मेरा नंबर {} है"],
    "EMAIL": ["Write to {}.", "<{}>", "Schreiben Sie an {}, bitte", "mailto:{}", "Écrivez à {} !",
              "联系{}谢谢", "邮箱：{}", "メールは{}までお願いします", "{} पर लिखें",
              "author = \"{}\"", "From: A <{}>", "a; {}; b"],
    "IP": ["from {} port 22", "服务器{}的地址", "Server {} antwortet nicht", "le serveur {}, par exemple",
           "サーバー{}です", "सर्वर {} बंद है", "http://{}/index.html", "[12/May/2024] {} - GET", "({})",
           "host={}"],
    "KEY": ["token = \"{}\"", "export KEY={}", "密钥{}不要外传", "Authorization: Bearer {}", "clé : {}.",
            "キー{}を"],
}
NAMES = ["jo.e", "anna_k", "m.schmidt", "li-wei", "r2d2", "o'neil", "first+tag", "info", "jürgen"]
HOSTS = ["x.org", "example.com", "mail.uni-bonn.de", "b-c.co.uk", "qq.com", "sub.corp.io", "free.fr",
         "müller.de"]
NOTHING = [
    "q@k.transpose(-2, -1)", "x = A @ B.T + a@b.T", "h = x@self.wq", "y = (att@v.to(device))[0]",
    "@pytest.mark.slow",
    "npm i lodash@4.17.21 @types/node@20.1.0", "git clone git@github.com:a/b", "see @someone on it",
    "a @ b.c",
    "from huggingface_hub import hf_hub_download_of_all_files", "sk-learn-contrib-style-names-are-no-keys",
    "AKIA is a prefix", "eyJ begins them", "-----BEGIN RSA PRIVATE KEY----- begins one",
    "version {a}.{b}.{a}.{b}", "v{a}.{c}.{b}.{a}", "Chrome/{c}.0.{c}.{c} Safari",
    "pip install x=={a}.{c}.{b}.{a}",
    "lib-{c}.{b}.{c}.{a}.so", "1.3.6.1.4.1.{m}", "std::vector<a::b> c::d", "12:34:56 and 1:2:3",
    "x[a:b, ::2]",
    "10 000 000 people, 1 234 567 of them", "100 200 300 and 999 888 777", "{m} {m} {m}",
    "{m}\t{m}\t{m}\t{m}",
    "2024-05-06 12:34:56,{c} INFO step {m} loss 0.{m}", "05/06/2024 10:30:00", "[{m}{m}] took {m} ms",
    "id {n}", "0x{m} 0b1010101010101010", "{m}.{m} -{m}.{m} +{m}.{m}", "| {m} | {m} | {m} |",
    "3.14159265358979",
    "1700000000{c} 1699999999.{m}", "ISBN 978-3-16-148410-0", "{c}-{c} and 5-7",
    "$1,234,567.89 or 1.234.567,89 €",
    "1990-2000, 2001/2002, 12/2023", "{c} {c} {c} {c} {c} {c}", "00 11 22 33 44 55 66 77 88 99 aa",
    "{m} bytes",
    "人口1 400 000 000，面积9 600 000平方公里", "第123456789号", "第{m}頁から{m}頁", "जनसंख्या 1 400 000 000 है",
    "Einwohner: 83 200 000 (2021)", "environ 68 000 000 d'habitants", "12 345 678,90 €", "f(10, 20)[30:40]"]


def phone(rng) -> str:
    patterns = ["+44 20 7### ####", "020 7### ####", "07### ######", "01632 96####", "+33 6 ## ## ## ##",
                "01 ## ## ## ##", "06.##.##.##.##", "+49 30 ########", "030 ########", "0171 #######",
                "089/#######",
                "+49 (0)40 ######", "+91 98### #####", "98### #####", "+91-98###-#####", "(555) 2##-####",
                "555-2##-####", "+1 212 5## ####", "+86 138 #### ####", "138########", "010-6#######",
                "03-3###-####", "090-####-####", "+81 90-####-####"]
    pattern = patterns[rng.integers(len(patterns))]
    return "".join(str(rng.integers(10)) if c == "#" else c for c in pattern)


def email(rng) -> str:
    return f"{NAMES[rng.integers(len(NAMES))]}@{HOSTS[rng.integers(len(HOSTS))]}"


def ip(rng) -> str:
    parts = rng.integers(10, 256, size=4)
    return ":".join(f"{part:x}" for part in rng.integers(4096, 65536, 8)) if rng.random() < 0.2 else ".".join(
        map(str, parts))


def key(rng) -> str:
    letters = list("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789")
    prefix, n = [("sk-", 48), ("ghp_", 36), ("hf_", 34), ("glpat-", 20), ("AIza", 35)][rng.integers(5)]
    return prefix + "".join(rng.choice(letters, n))


MAKERS = {"PHONE": phone, "EMAIL": email, "IP": ip, "KEY": key}


def lines(n: int, seed: int) -> list[tuple[str, list[tuple[str, str]]]]:
    """(line, [(kind, what is to be found), ...]) of each of n lines, half of which have something."""
    rng, found = np.random.default_rng(seed), []
    for i in range(n):
        if i % 2:
            kind = list(TEXTS)[rng.integers(len(TEXTS))]
            text = TEXTS[kind][rng.integers(len(TEXTS[kind]))]
            what = MAKERS[kind](rng)
            found.append((text.format(what), [(kind, what)]))
        else:
            line = NOTHING[rng.integers(len(NOTHING))]
            ranges = {"a": (0, 10), "b": (0, 10), "c": (10, 256), "m": (1000, 10**7), "n": (10**8, 10**9)}
            for name, (low, high) in ranges.items():
                while f"{{{name}}}" in line:
                    line = line.replace(f"{{{name}}}", str(rng.integers(low, high)), 1)
            found.append((line, []))
    return found
