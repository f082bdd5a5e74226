"""Labelled files: what is read, by which columns, and what is refused."""
import gzip
import json
from types import SimpleNamespace

import numpy as np
import pytest

import finetune
import sample
from config import SettingError, UserError
from lib import splits
from lib.rows import Row, described, split_rows
from lib.tasks import TASKS, Tag
from lib.text import blocks, records
from tests.helpers import run_here, says, write_rows

# -----------------------------------------------------------------------------
# Records

MANY = "".join(f"{i},text {i}\n" for i in range(200))


def read(path, names=("text",), bad=None):
    return list(records(path, blocks(path, labelled=True), names, bad=bad))


@pytest.mark.parametrize("name, content, line, words", [
    ("a.csv", "id,text\n7,Hello, world\n" + MANY, 2, ["3 cells", "id, text", "quotes", "--skip_bad_rows"]),
    ("a.csv", "id,text\n1,a\n2,\"stray\n" + MANY, 3, ["quot"]),  # to the end of the file
    ("a.csv", "id,text\n1,a\n2,\"stray\n" + MANY + '3,said "hi"\n', 3, ["quot"]),  # another closes it
    ("a.csv", "id,text\n1,a\n2,\"stray\n" + MANY + '3,a 24"\n', 3, ["200 rows between"]),  # legally so
    ("a.tsv", "id\ttext\n1\ta\tb\n", 2, ["3 cells", r"'\t'"]),
    ("a.jsonl", '{"text": "a"}\n{"text": \n{"text": "b"}\n', 2, ["not JSON"]),
    ("a.jsonl", '{"text": "a"}\n["text"]\n{"text": "b"}\n', 2, ["wanted an object"]),
])
def test_a_row_that_is_none_is_refused_or_counted(tmp_path, name, content, line, words):
    path, errors = tmp_path / name, []
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as error:
        read(path)
    says(error, f"{name}:{line}: ", *words)
    found = read(path, bad=errors.append)
    assert str(errors[0]) == str(error.value)
    if name == "a.csv":  # all other rows are there, each by itself
        kept = [record["text"] for _, record in found]
        assert set(kept) >= {f"text {i}" for i in range(200)} and not any("\n" in text for text in kept)


OBJECTS = [{"text": f"t{i}", "url": "u"} for i in range(3)]
JSON_LINES = "\n".join(map(json.dumps, OBJECTS))


@pytest.mark.parametrize("name, content", [
    ("a.json", json.dumps(OBJECTS)), ("a.json", json.dumps(OBJECTS, indent=1)), ("a.json", JSON_LINES),
    ("a.json.gz", JSON_LINES), ("a.jsonl", JSON_LINES), ("a.jsonl", json.dumps(OBJECTS)),
    ("a.json", json.dumps({"version": 1, "data": OBJECTS}) + "\n"), ("a.csv", "text;url\nt0;u\nt1;u\nt2;u\n"),
    ("a.csv", "sep=;\ntext;url\nt0;u\nt1;u\nt2;u\n"),
    ("a.csv", '"sep=|"\r\ntext|url\r\nt0|u\r\nt1|u\r\nt2|u\r\n'),
    ("a.csv", "text\turl\nt0\tu\nt1\tu\nt2\tu\n"), ("a.csv", "text,url\nt0,u\nt1,u\nt2,u"),
])
def test_records_are_found_however_they_are_kept(tmp_path, name, content):
    data = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert [record for _, record in read(tmp_path / name)] == OBJECTS


def test_quotes_of_tabs_tables_are_read_if_a_column_has_them_throughout(tmp_path):
    for rows, texts in (('"a ""b"""\t1\n"c"\t2\n', ['a "b"', "c"]), ('"a" b\t1\n"c"\t2\n', ['"a" b', '"c"'])):
        (tmp_path / "a.tsv").write_text(f"text\tlabel\n{rows}", encoding="utf-8")
        assert [record["text"] for _, record in read(tmp_path / "a.tsv")] == texts


def test_texts_with_lines_and_other_delimiters_stay_whole(tmp_path):
    rows = "".join(f'"a, {i}\nb\nc";x\n' for i in range(40))  # the first lines end within a row
    (tmp_path / "c.csv").write_text(f"text;label\n{rows}", encoding="utf-8")
    assert [record["text"] for _, record in read(tmp_path / "c.csv")] == [f"a, {i}\nb\nc" for i in range(40)]
    (tmp_path / "a.csv").write_text('text\n"a; b\nc, d\n\ne"\nno; yes\nplain\n', encoding="utf-8")
    assert [(line, record["text"]) for line, record in read(tmp_path / "a.csv")] == [
        (2, "a; b\nc, d\n\ne"), (6, "no; yes"), (7, "plain")]
    (tmp_path / "b.csv").write_text(",text,text\n0,a,b\n", encoding="utf-8")
    assert read(tmp_path / "b.csv") == [(2, {"column 0": "0", "text": "a", "text.2": "b"})]


# -----------------------------------------------------------------------------
# Columns

ASKED = {"text": "", "pair": "", "label": "", "group": "", "split": "", "header": None}


def opened(task, path, **columns):
    columns, rows = TASKS[task].open(str(path), {**ASKED, **columns})
    return columns, list(rows)


def lines_of(*rows: dict) -> str:
    return "\n".join(map(json.dumps, rows))


NEWS = ('"3","Wall St. Claws","Reuters - Short"\n"4","Carlyle","Reuters"\n'
        '"3","Oil","Soaring"\n"4","Iraq","Halts it"\n')
LCQMC = "喜欢打篮球\t爱打篮球\t1\n手机丢了\t我想换手机\t1\n大家觉得\t大家说\t0\n求秋色\t求秋天\t0\n"
STSB = "index\tgenre\tyear\tsource1\tsource2\tsentence1\tsentence2\tscore\n0\tm\t2012\tn\tn\tA\tB\t5.0\n"
SNLI = [{"annotator_labels": ["neutral"], "gold_label": label, "pairID": "p", "sentence1": "A",
         "sentence2": "B"}
        for label in ("neutral", "-")]
SICK = "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\n1\tA\tB\t4.5\tNEUTRAL\n"
ALPACA = {"instruction": "a", "input": "i", "output": "b"}
TURN = {"role": "user", "content": "x"}
CONLL = "-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n\nPeter NNP B-NP B-PER\n"
EWT = ("# sent_id = 1\n# text = The don't\n1\tThe\tthe\tDET\tDT\t_\t2\tdet\t_\t_\n"
       "2-3\tdon't\t_\t_\t_\t_\t_\t_\t_\t_\n2\tdo\tdo\tAUX\tVBP\t_\t0\troot\t_\t_\n"
       "3\tn't\tnot\tPART\tRB\t_\t2\tadvmod\t_\t_\n3.1\tx\t_\t_\t_\t_\t_\t_\t_\t_\n")
CLUENER = {"text": "浙商银行叶老桂", "label": {"name": {"叶老桂": [[4, 6]]},
                                      "company": {"浙商银行": [[0, 3]]}}}
ORG, PER = ["B-company", *["I-company"] * 3], ["B-name", "I-name", "I-name"]
SQUAD = {"id": "1", "question": "q", "answers": [{"text": "b", "answer_start": 2}]}
TOXIC = "id,comment_text,toxic,threat\n1,Explain,0,0\n2,bad,1,1\n"
HF_SQUAD = {"id": "1", "title": "t", "context": "a b b", "question": "q",
            "answers": {"text": ["b"], "answer_start": [4]}}


def squad(asked: dict) -> str:
    return json.dumps({"data": [{"title": "t", "paragraphs": [{"context": "a b b", "qas": [asked]}]}]})


@pytest.mark.parametrize("task, name, content, columns, labels", [
    # sentiment
    ("classify", "sst2.tsv", 'sentence\tlabel\nhide "new \t0\ngood\t1\n', "text: sentence, label: label",
     ["0", "1"]),
    ("classify", "imdb.csv", 'review,sentiment\n"One, <br /> ""best""",positive\nBad,negative\n',
     "text: review, label: sentiment", ["positive", "negative"]),
    ("classify", "yelp.csv", '"1","Unfortunately, the"\n"2","Been going"\n"1","I don\'t"\n"2","great"\n',
     "no header: text is column 1, label is column 0", ["1", "2", "1", "2"]),
    ("classify", "yelp.json", lines_of(*[{"review_id": "a", "stars": 4.0, "text": "ok", "date": "2016"}] * 2),
     "text: text, label: stars; not used: review_id, date", ["4.0", "4.0"]),
    ("classify", "Reviews.csv", "Id,UserId,Score,Time,Summary,Text\n1,A3,5,130,Good,I have\n",
     "text: Text, label: Score; not used: Id, UserId, Time, Summary", ["5"]),
    ("classify", "amazon.jsonl", lines_of({"asin": "B", "reviewText": "nice", "overall": 5.0,
                                           "summary": "s"}),
     "text: reviewText, label: overall; not used: asin, summary", ["5.0"]),
    ("classify", "train.ft.txt", "__label__2 Stuning even: for\n__label__1 Beware\n",
     "text: text, label: __label__",
     ["2", "1"]),
    ("classify", "chn.tsv", "label\ttext_a\n1\t选择珠江花园\n0\t笔记本\n",
     "text: text_a, label: label", ["1", "0"]),
    ("classify", "waimai_10k.csv", "label,review\n1,很快，好吃\n", "text: review, label: label", ["1"]),
    ("classify", "tweet_eval.jsonl", lines_of({"text": "QT", "label": 2}), "text: text, label: label", ["2"]),
    ("classify", "emotions.txt", "i didnt feel;sadness\ni can go;sadness\nim grabbing;anger\nok;anger\n",
     "no header: text is column 0, label is column 1", ["sadness", "sadness", "anger", "anger"]),
    ("classify", "de.csv", "text;label\nGut, sehr gut;pos\nSchlecht;neg\n", "text: text, label: label",
     ["pos", "neg"]),
    ("classify", "setfit.jsonl", lines_of({"text": "a", "label": 1, "label_text": "positive"}),
     "text: text, label: label; not used: label_text", ["1"]),
    ("classify", "spam.csv", 'v1,v2,,\nham,"Go until, jurong",,\n',
     "text: v2, label: v1; not used: column 2, column 3", ["ham"]),
    ("classify", "toxic.csv", TOXIC, ["toxic, threat", "--label_column=A,B,C --multi_label=True"], None),
    ("classify", "stance.csv", "Tweet,Target,Stance\na,Atheism,FAVOR\n",
     "text: Tweet, pair: Target, label: Stance", ["FAVOR"]),
    ("classify", "semeval.csv", "id,text,aspect,polarity\n1,good food,food,positive\n",
     "text: text, pair: aspect, label: polarity; not used: id", ["positive"]),
    ("classify", "sst5.txt", "4 The Rock is\n3 Effective\n", ["one column, 4 The Rock is", "a tab"], None),
    ("regress", "asap.tsv", "essay_id\tessay_set\tessay\trater1\tdomain1_score\n1\t1\tDear local\t4\t8\n",
     "text: essay, label: domain1_score; not used: essay_id, essay_set, rater1", ["8"]),
    # topics
    ("classify", "ag_news.csv", NEWS, ["ag_news.csv:1", "--text_column=2 --label_column=0",
                                       "--text_column=1 --pair_column=2 --label_column=0"], None),
    ("classify", "ag_news.csv", "Class Index,Title,Description\n3,Fears,Unions\n",
     "text: Description, label: Class Index; not used: Title", ["3"]),
    ("classify", "dbpedia.csv", "label,title,content\n1,E. D. Abbott,Abbott of\n",
     "text: content, label: label; not used: title", ["1"]),
    ("classify", "trec.jsonl", lines_of({"text": "How", "coarse_label": 2, "fine_label": 26}),
     "text: text, label: coarse_label; not used: fine_label", ["2"]),
    ("classify", "thucnews.txt", "体验2D巅峰\t8\n60年铁树\t5\n同步首秀\t8\n兔子舞\t5\n",
     "no header: text is column 0, label is column 1", ["8", "5", "8", "5"]),
    ("classify", "cnews.txt", "体育\t马晓旭受伤\n财经\t股市大涨\n体育\t朱婷夺冠\n财经\t基金发行\n",
     "no header: text is column 1, label is column 0", ["体育", "财经", "体育", "财经"]),
    ("classify", "tnews.json", lines_of({"label": "108", "label_desc": "news_edu", "sentence": "上课",
                                         "keywords": ""}),
     "text: sentence, label: label; not used: label_desc, keywords", ["108"]),
    ("classify", "massive.jsonl", lines_of({"id": "0", "locale": "en-US", "scenario": "alarm",
                                            "intent": "alarm_set", "utt": "wake me"}),
     "text: utt, label: intent; not used: id, locale, scenario", ["alarm_set"]),
    ("classify", "reuters.jsonl", lines_of({"text": "a", "topics": ["x", "y"]}, {"text": "b", "topics": []}),
     "text: text, label: topics", [["x", "y"], []]),
    ("classify", "export.json", json.dumps([{"id": 1, "data": {"text": "a"}, "annotations": []}]),
     ["Label Studio", "JSON-MIN"], None),
    # pairs
    ("classify", "qnli.tsv", "index\tquestion\tsentence\tlabel\n0\tWhen\tUnlike\tentailment\n",
     "text: question, pair: sentence, label: label; not used: index", ["entailment"]),
    ("classify", "mrpc.tsv", "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t70\t71\tAm\ty\n",
     "text: #1 String, pair: #2 String, label: Quality; not used: #1 ID, #2 ID", ["1"]),
    ("classify", "qqp.tsv", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t1\t2\tHow\tWhy\t0\n",
     "text: question1, pair: question2, label: is_duplicate; not used: id, qid1, qid2", ["0"]),
    ("regress", "stsb.tsv", STSB,
     "text: sentence1, pair: sentence2, label: score; not used: index, genre, year, source1, source2",
     ["5.0"]),
    ("regress", "stsb.csv", "A plane,An air plane,5.0\nA man,A man is,3.8\n",
     ["--text_column=0 --pair_column=1 --label_column=2"], None),
    ("classify", "snli.jsonl", lines_of(*SNLI),
     "text: sentence1, pair: sentence2, label: gold_label; not used: annotator_labels, pairID",
     ["neutral", None]),
    ("classify", "snli.jsonl", lines_of(*({"premise": "a", "hypothesis": "b", "label": n} for n in (1, -1))),
     "text: premise, pair: hypothesis, label: label", ["1", None]),
    ("classify", "lcqmc.tsv", LCQMC, ["--text_column=0 --pair_column=1 --label_column=2"], None),
    ("classify", "sick.txt", SICK, "text: sentence_A, pair: sentence_B, label: entailment_judgment; "
     "not used: pair_ID, relatedness_score", ["NEUTRAL"]),
    ("regress", "sick.txt", SICK, "text: sentence_A, pair: sentence_B, label: relatedness_score; "
     "not used: pair_ID, entailment_judgment", ["4.5"]),
    ("classify", "boolq.jsonl", lines_of({"question": "do", "passage": "All", "answer": True}),
     "text: question, pair: passage, label: answer", ["true"]),
    ("classify", "copa.jsonl", lines_of({"premise": "a", "choice1": "b", "choice2": "c", "question": "cause",
                                         "label": 0}), ["'choice1'", "answers to choose from"], None),
    # instructions
    ("lm", "alpaca.json", json.dumps([ALPACA]), "text: instruction, pair: input, label: output", ["b"]),
    ("lm", "alpaca.json", json.dumps([{**ALPACA, "text": "Below is b"}]),
     "text: instruction, pair: input, label: output; not used: text", ["b"]),
    ("lm", "late.jsonl", lines_of({"instruction": "a", "output": "b"}, ALPACA),
     "text: instruction, pair: input, label: output", ["b", "b"]),
    ("lm", "dolly.jsonl", lines_of({"instruction": "a", "context": "", "response": "b", "category": "c"}),
     "text: instruction, pair: context, label: response; not used: category", ["b"]),
    ("lm", "gsm8k.jsonl", lines_of({"question": "a", "answer": "b"}), "text: question, label: answer", ["b"]),
    ("lm", "scored.csv", "prompt,completion,score\na,b,5\n",
     "text: prompt, label: completion; not used: score", ["b"]),
    ("lm", "firefly.jsonl", lines_of({"kind": "NLI", "input": "a", "target": "b"}),
     "text: input, label: target; not used: kind", ["b"]),
    ("lm", "zh.jsonl", lines_of({"指令": "a", "输入": "b", "输出": "c"}),
     "text: 指令, pair: 输入, label: 输出", ["c"]),
    ("regress", "zh.csv", "用户编号,评论,星级\n7,很好,4.5\n",
     "text: 评论, label: 星级; not used: 用户编号", ["4.5"]),
    ("classify", "zh.csv", "評論,標籤\n服務不錯,好\n", "text: 評論, label: 標籤", ["好"]),
    ("classify", "zh.csv", "编号,评价,星级\n7,很好,4\n", "text: 评价, label: 星级; not used: 编号", ["4"]),
    ("lm", "wiki.jsonl", lines_of({"url": "u", "title": "t", "text": "long"}),
     "text: text; not used: url, title",
     [None]),
    ("lm", "oasst.jsonl", lines_of({"message_id": "6", "parent_id": None, "text": "hi", "role": "prompter"}),
     ["'parent_id'", "several turns"], None),
    ("lm", "sharegpt.json", json.dumps([{"id": "x", "conversations": [{"from": "human", "value": "hi"}]}]),
     ["'conversations'", "--text_column"], None),
    ("lm", "ultra.jsonl", lines_of({"prompt": "p", "messages": [TURN]}), ["'messages'", "several turns"],
     None),
    ("lm", "dpo.jsonl", lines_of({"prompt": "p", "chosen": "a", "rejected": "b"}), ["'chosen'", "choose"],
     None),
    ("lm", "orca.jsonl", lines_of({"id": "1", "system_prompt": "s", "question": "q", "response": "r"}),
     "text: system_prompt, pair: question, label: response; not used: id", ["r"]),
    ("lm", "humaneval.jsonl", lines_of({"prompt": "def f():\n", "canonical_solution": "    return 1\n"}),
     "text: prompt, label: canonical_solution", ["    return 1\n"]),
    # tags
    ("tag", "conll2003.txt", CONLL, "no header: text is column 0, label is column 3; not used: 1, 2",
     [["B-ORG", "O"], ["B-PER"]]),
    ("tag", "wnut.conll", "# x\n@paul\tO\n#nba\tO\nEmpire\tB-location\n\t\nFrom\tO\n",
     "no header: text is column 0, label is column 1", [["O", "O", "B-location"], ["O"]]),
    ("tag", "msra.txt", "当 O\n\u3000 O\n10\u00a0000 O\n国 I-LOC\n",
     "no header: text is column 0, label is column 1",
     [["O", "O", "O", "I-LOC"]]),
    ("tag", "multiconer.conll", "# id 5239 domain=en\nit _ _ O\nzeeland _ _ B-LOC\n",
     "no header: text is column 0, label is column 3; not used: 1, 2", [["O", "B-LOC"]]),
    ("tag", "germeval.tsv", "# http [2009]\n1\tSchartau\tB-PER\tO\n2\tsagte\tO\tO\n\n1\tFirmen\tO\tO\n",
     "no header: text is column 1, label is column 3; not used: 0, 2", [["O", "O"], ["O"]]),
    ("tag", "ontonotes.conll", "#begin document (x)\n" + "".join(
        f"nw/wsj 0 {i} {word} NN {tag}\n" for i, word, tag in zip(range(3), ("In", "New", "York"), "OBI")),
     "no header: text is column 3, label is column 5; not used: 0, 1, 2, 4", [["O", "B", "I"]]),
    ("tag", "ewt.conllu", EWT, "text: form, label: upos; "
     "not used: id, lemma, xpos, feats, head, deprel, deps, misc",
     [["DET", "AUX", "PART"]]),
    ("tag", "cluener.json", lines_of(CLUENER), "text: text, label: label", [[*ORG, *PER]]),
    ("tag", "hf.jsonl", lines_of({"tokens": ["EU", "rejects"], "pos_tags": [22, 42], "ner_tags": [3, 0]}),
     "text: tokens, label: ner_tags; not used: pos_tags", [["3", "0"]]),
    ("tag", "doccano.jsonl", lines_of({"text": "In Rome, nice", "label": [[3, 7, "LOC"]]}),
     "text: text, label: label",
     [["O", "B-LOC", "O", "O"]]),
    ("tag", "doccano.jsonl", lines_of({"id": 1, "text": "In Rome", "entities": []}, {
        "id": 2, "text": "In Rome", "entities": [{"start_offset": 3, "end_offset": 7, "label": "LOC"}]}),
     "text: text, label: entities; not used: id", [["O", "O"], ["O", "B-LOC"]]),
    ("tag", "prodigy.jsonl", lines_of({"text": "In Rome", "tokens": [{"text": "In", "start": 0, "end": 2}],
                                       "spans": [{"start": 3, "end": 7, "label": "LOC"}]}),
     "text: text, label: spans; not used: tokens", [["O", "B-LOC"]]),
    ("tag", "spacy.jsonl", lines_of({"text": "In Rome", "ents": [{"start": 3, "end": 7, "label": "LOC"}]}),
     "text: text, label: ents", [["O", "B-LOC"]]),
    ("tag", "spacy.json", json.dumps([["In Rome", {"entities": [[3, 7, "LOC"]]}],
                                      ["Uber", {"entities": [[0, 4, "ORG"]]}]]),
     "text: text, label: entities", [["O", "B-LOC"], ["B-ORG"]]),
    ("tag", "min.json", lines_of({"text": "In Rome", "label": [{"start": 3, "end": 7, "labels": ["LOC"]}]},
                                 {"text": "I", "label": []}),
     "text: text, label: label", [["O", "B-LOC"], ["O"]]),
    ("tag", "kaggle.csv", "Sentence #,Sentence,POS,Tag\n1,In Rome,\"['IN', 'NNP']\",\"['O', 'B-geo']\"\n",
     "text: Sentence, label: Tag; not used: Sentence #, POS", [["O", "B-geo"]]),
    ("tag", "pandas.csv", "tokens,tags\n\"['In', 'Rome']\",\"['O', 'B-LOC']\"\n",
     "text: tokens, label: tags", [["O", "B-LOC"]]),
    ("tag", "numpy.csv", "tokens,tags\n['In' 'Rome'],[0 3]\n", ["numpy.csv:2: 'tokens' is", "['In' 'Rome']",
                                                                  "JSON lines"],
     None),
    ("tag", "kaggle.csv", "Sentence #,Word,POS,Tag\nSentence: 1,Thousands,NNS,O\n", ["Word", "CoNLL"], None),
    ("lm", "sql.json", lines_of({"answer": "b", "question": "a", "context": "c"}),
     "text: question, pair: context, label: answer", ["b"]),
    ("lm", "story.md", "one, a\nb\n\ntwo, c\n", "text: each paragraph", [None, None]),
    ("lm", "chat.json", lines_of({**ALPACA, "history": [["a", "b"]]}), ["'history'", "several turns"], None),
    ("lm", "songs.txt", "one\n\ntwo\n", "text: each paragraph", [None, None]),
    # questions
    ("qa", "squad.json", squad(SQUAD),
     "text: question, pair: context, label: answers, split: title; not used: id", [[("b", 2)]]),
    ("qa", "squad.json", squad({**SQUAD, "is_impossible": True, "answers": []}),
     "text: question, pair: context, label: answers, split: title; not used: id, is_impossible", [[]]),
    ("qa", "squad.json", squad({"id": "7", "question": "q"}), ["question 7", "answers"], None),
    ("qa", "hf.jsonl", lines_of(HF_SQUAD),
     "text: question, pair: context, label: answers, split: title; not used: id",
     [[("b", 4)]]),
    ("qa", "run_qa.json", json.dumps({"version": "1", "data": [HF_SQUAD]}),
     "text: question, pair: context, label: answers, split: title; not used: id", [[("b", 4)]]),
    ("qa", "mrqa.jsonl", lines_of({"header": {"dataset": "SQuAD"}}, {"context": "a b", "qas": [
        {"qid": "x", "question": "q", "answers": ["b"]}]}),
     "text: question, pair: context, label: answers, split: title; not used: qid", [[("b", 2)]]),
    ("qa", "cmrc_trial.json", json.dumps([{"context_text": "a b", "title": "x", "qas": [
        {"query_text": "q", "query_id": "T_0", "answers": ["b"]}]}]),
     "text: query_text, pair: context_text, label: answers, split: title; not used: query_id", [[("b", 2)]]),
    ("qa", "race.jsonl", lines_of({"article": "a", "question": "q", "options": ["a", "b"], "answer": "A"}),
     ["'options'", "answers to choose from"], None),
    ("qa", "qa.csv", "context,question,answer_text,answer_start\na b b,q,b,4\n",
     "text: question, pair: context, label: answer_text, start: answer_start", [[("b", 4)]]),
    ("qa", "a.jsonl", lines_of({"question": "q", "answer": "b"}), ["no column for the pair", "--pair_column"],
     None),
    ("qa", "a.jsonl", lines_of({"question": "q", "context": "c", "answers": [{"txt": "c"}]}),
     ["a.jsonl:1: not answers"], None),
    ("tag", "a.jsonl", lines_of({"text": "a", "label": [["x", "y"]]}), ["a.jsonl:1: not the places"], None),
    ("qa", "json.csv", 'context,question,answers\na b b,q,"{""text"": [""b""], ""answer_start"": [4]}"\n',
     "text: question, pair: context, label: answers", [[("b", 4)]]),
    ("qa", "python.csv", "context,question,answers\na b b,q,\"{'text': ['b'], 'answer_start': [4]}\"\n",
     "text: question, pair: context, label: answers", [[("b", 4)]]),
    ("qa", "squad.json", squad({**SQUAD, "is_impossible": True}),
     "text: question, pair: context, label: answers, split: title; not used: id, is_impossible", [[]]),
    ("qa", "part.jsonl", lines_of({"context": "his is", "question": "q", "answer": "is"},
                                  {"context": "他是他", "question": "q", "answer": "是"}),
     "text: question, pair: context, label: answer", [[("is", 4)], [("是", 1)]]),
    ("qa", "pandas.csv", "context,question,answers\na b,q,{'text': array(['b'])}\n", ["JSON lines"], None),
    # headers
    ("classify", "a.csv", "comment,type\ngood,pos\nbad,neg\nok,pos\n",
     ["comment, type", "--header=True --text_column=comment --label_column=type",
      "--header=False --text_column=0 --label_column=1"], None),
    ("classify", "R.tsv", '"text"\t"label"\n"a ""b"""\t"x"\n"c"\t"y"\n', "text: text, label: label",
     ["x", "y"]),
    ("classify", "plain.tsv", 'text\tlabel\n"a" b\tx\n"c"\ty\n', "text: text, label: label", ["x", "y"]),
    ("classify", "cooking.train", "__label__x a, b\n__label__y c\n", "text: text, label: __label__",
     ["x", "y"]),
    ("classify", "a.csv", "".join(f"{i},one {i},{'xy'[i % 2]}\n" for i in range(9)),
     ["--text_column=1 --label_column=2,"], None),
    ("classify", "joined.csv", "text,label\na,x\ntext,label\nb,y\ntext,label\nc,x\n",
     "text: text, label: label", ["x", "y", "x"]),
    ("classify", "a.csv", "good film,pos\nbad film,neg\nok,pos\n",
     "no header: text is column 0, label is column 1",
     ["pos", "neg", "pos"]),
    ("classify", "a.csv", "Who?,question\nGo!,order\nWhy?,question\n",
     "no header: text is column 0, label is column 1",
     ["question", "order", "question"]),
    ("classify", "a.xlsx", "PK\3\4...", ["a.xlsx", "Excel", ".csv"], None),
    ("lm", "a.jsonl", lines_of(*[{"instruction": "a", "output": "b"}] * 1001, ALPACA),
     ["a.jsonl:1002", "'input'", "--pair_column=input"], None),
    ("classify", "a.csv", "Text,text,label\na,b,c\n", ["Text, text", "--text_column=0", "--text_column=1"],
     None),
    ("classify", "a.csv", "0,1\ngood,pos\nbad,neg\n", ["0, 1", "--text_column"], None),
])
def test_columns_are_those_that_a_person_would_choose(tmp_path, task, name, content, columns, labels):
    (tmp_path / name).write_text(content, encoding="utf-8")
    if labels is None:
        with pytest.raises(UserError) as error:
            opened(task, tmp_path / name)
        says(error, *columns)
        return
    found, rows = opened(task, tmp_path / name)
    assert described(found) == columns and [row.label for row in rows] == labels
    again = TASKS[task].read(str(tmp_path / name), found, False)  # in use, by the names that were found
    assert [(row.text, row.pair, row.label) for row in again] == [(row.text, row.pair,
                                                                   row.label) for row in rows]


def test_later_files_are_read_by_the_columns_of_the_training_file(tmp_path):
    write_rows(tmp_path / "a.csv", ("comment", "kind", "id"), ["good", "bad"], ["x", "y"], [8, 9])
    columns, rows = opened("classify", tmp_path / "a.csv", text="comment", label=1)
    assert described(columns) == "text: comment, label: kind; not used: id" and rows[1].id == "9"
    write_rows(tmp_path / "b.csv", ("id", "text", "label", "Comment"), [1], ["no"], ["z"], ["yes"])
    row, = TASKS["classify"].read(str(tmp_path / "b.csv"), columns, False)
    with pytest.raises(UserError, match="'kind' for the label.*; one without labels is for sample.py"):
        TASKS["classify"].open(str(tmp_path / "b.csv"), columns)
    for name in ("编号", "订单编号", "PhraseId", "order_id"):  # which row it is goes with its answer
        write_rows(tmp_path / "c.csv", ("covid", name, "comment"), ["no"], ["r7"], ["yes"])
        assert [one.id for one in TASKS["classify"].read(str(tmp_path / "c.csv"), columns, False)] == ["r7"]
    assert (row.text, row.label, row.id) == ("yes", None, "1")
    for header in (("text", "label"), None):
        write_rows(tmp_path / "c.csv", header, ["no"], ["z"])
        with pytest.raises(UserError) as error:
            TASKS["classify"].read(str(tmp_path / "c.csv"), columns, False)
        says(error, "c.csv", "'comment'", "--text_column")
    columns, _ = opened("classify", write_rows(tmp_path / "d.csv", None, ["good one", "bad", "ok"], "xyx"))
    write_rows(tmp_path / "c.csv", ("text", "label"), ["no"], ["z"])
    with pytest.raises(UserError) as error:
        TASKS["classify"].read(str(tmp_path / "c.csv"), columns, False)
    says(error, "c.csv:1", "header", "take it out")
    # checkpoints that keep none, or only what was asked for, find them as they did
    old, = TASKS["classify"].read(str(tmp_path / "b.csv"), {"text": "", "pair": "", "label": ""})
    assert (old.text, old.label) == ("no", "z")


@pytest.mark.parametrize("encoding, text, said", [
    ("gb18030", "这家酒店的服务很好，我们下次还会来。" * 3, "GBK"), ("utf-16", "naïve, 这", "UTF-16"),
    ("utf-16-le", "plain", "UTF-16"), ("utf-8-sig", "这", ""), ("latin-1", "été à la plage", None)])
def test_encodings_are_recognised_and_said(tmp_path, capsys, encoding, text, said):
    path = tmp_path / "a.tsv"
    path.write_bytes(f"text\tlabel\n{text}\tx\n".encode(encoding))
    if said is None:
        with pytest.raises(UserError) as error:
            opened("classify", path)
        says(error, "a.tsv:2: not UTF-8")
        row, = TASKS["classify"].open(str(path), ASKED, True, encoding)[1]
    else:
        _, (row,) = opened("classify", path)
        assert said in capsys.readouterr().err
    assert (row.text, row.label) == (text, "x")


def test_a_label_may_be_several_columns_of_0_and_1(tmp_path):
    (tmp_path / "a.csv").write_text(TOXIC)
    rows = {"text": "a", "x y": True, "z": 1.0}, {"text": "b", "x y": 0, "z": 1}
    (tmp_path / "a.jsonl").write_text(lines_of(*rows))
    columns, rows = opened("classify", tmp_path / "a.csv", label="toxic,Threat")
    assert described(columns) == "text: comment_text, label: toxic,threat; not used: id"
    assert [row.label for row in rows] == [[], ["toxic", "threat"]]
    assert [row.label for row in TASKS["classify"].read(str(tmp_path / "a.csv"), columns, False)] == [
        [], ["toxic", "threat"]]
    (tmp_path / "b.csv").write_text(TOXIC + "3,c,-1,-1\n")
    with pytest.raises(UserError, match="b.csv:4: 'toxic,threat' has other cells than 0 and 1: -1"):
        opened("classify", tmp_path / "b.csv", label="toxic,threat")
    _, rows = opened("classify", tmp_path / "a.jsonl", label="z,1")
    assert [row.label for row in rows] == [["z", "x y"], ["z"]]


def test_the_mark_of_the_language_is_no_part_of_a_word(tmp_path, capsys):
    (tmp_path / "a.tsv").write_text("en:R.H.\tB-ORG\nen::\tO\n\nen:x\tO\n")
    assert [row.words for row in opened("tag", tmp_path / "a.tsv")[1]] == [["R.H.", ":"], ["x"]]
    assert "the mark of the language" in capsys.readouterr().err


def test_words_are_cut_as_the_training_words_were():
    def tag(*sentences):
        rows = [Row("", " ".join(words), label=["O"] * len(words), words=words) for words in sentences]
        head = Tag.learn(rows, SimpleNamespace(words=None))
        return Tag({**head, "max_length": 64, "paired": False, "apart": False}, None)

    assert tag(list("他在上海。")).row("", "王在北京工作。").words == list("王在北京工作。")
    assert tag(list("他用Google工作")).row("", "王用Bing。").words == list("王用Bing。")
    apart = tag(["EU", "rejects", "German", "call", "."], ["It", "'s", "U.S.", "3,000", "x-ray", "!"])
    assert apart.row("", "Peter's call (U.S.), 1,000 well-known!").words == [
        "Peter", "'s", "call", "(", "U.S.", ")", ",", "1,000", "well-known", "!"]
    # the vowels of Hindi, the points of Hebrew, an accent of its own, Persian's joiner: all in their words
    whole = "नमस्ते शָׁלוֹם e\u0301te\u0301 می\u200cخواهم x² ❤\ufe0f".split()
    assert apart.row("", f"{' '.join(whole)}।").words == [*whole, "।"]
    row = tag(["Rome,", "is", "nice."]).row("", "Rome,  I say.")
    assert row.words == ["Rome,", "I", "say."] and row.text == "Rome, I say."


# -----------------------------------------------------------------------------
# Labels and splits

def splits_of(path, **changes):
    """What finetune.py would train on, validate and test, and what it says of it."""
    said, s = [], SimpleNamespace(**{**finetune.values_of(vars(finetune)), "data": str(path), **changes})
    s.columns = splits.known_columns(s, {})
    return splits.read_splits(s, said.append), "\n".join(said)


def test_labels_that_are_one_are_said_to_be_and_missing_ones_left_out(tmp_path):
    labels = [1, "1.0", 1, True, "true", "true", "pos", "Pos ", "po s", 2**60, str(2**60 + 1),
              None, "", "NaN", float("nan"), "null"]
    rows = [{"text": f"{i} {label}", "label": label} for i in range(20) for label in labels]
    (tmp_path / "a.jsonl").write_text(lines_of(*rows), encoding="utf-8")
    splits, said = splits_of(tmp_path / "a.jsonl")
    (train, val, test), = splits.values()
    one_as_floats = {str(2**60), str(2**60 + 1)}
    assert {row.label for row in train + val + test} == {"1", "true", "pos", "Pos", "po s", *one_as_floats}
    assert len(train + val + test) == 20 * 11
    assert "labels    1, 1.0: one class, 1" in said and "100 rows left out without a label" in said
    assert "warning: labels 'pos', 'Pos', 'po s' differ" in said
    # the same value in another file
    write_rows(tmp_path / "b.csv", ("text", "label"), ["new"], ["1.00"])
    splits, _ = splits_of(tmp_path / "a.jsonl", data_test=str(tmp_path / "b.csv"))
    (_, _, test), = splits.values()
    assert [row.label for row in test] == ["1"]


def test_ratings_as_classes_are_said_to_be_amounts(tmp_path):
    cases = ("Stars", "classify", True), ("Stars", "regress", False), ("topic", "classify", False)
    for name, task, told in cases:
        texts = [f"w{i}" for i in range(60)]
        path = write_rows(tmp_path / "a.csv", ("text", name), texts, [*range(1, 6)] * 12)
        assert ("--task=regress" in splits_of(path, task=task)[1]) is told
    for shape, told in ("{} stars", True), ("{}/5", False):  # is no number to it
        labels = [*map(shape.format, range(1, 6))] * 12
        path = write_rows(tmp_path / "b.csv", ("text", "Stars"), texts, labels)
        assert ("--task=regress" in splits_of(path)[1]) is told


@pytest.mark.parametrize("task, rows, said", [
    ("classify", [{"label": "a,b"}, {"label": "b"}], ["'a,b'", "write |"]),
    ("classify", [{"label": [0, 1, 0]}, {"label": [1, 0, 0]}], ["0 or 1 for each label", "names"]),
    ("tag", [{"ner_tags": ["O"]}], ["each row is one word", "empty line"]),
])
def test_labels_that_would_be_mistaken_are_refused(tmp_path, task, rows, said):
    rows = [{"text": f"text {i}", "tokens": [f"w{i}"], **rows[i % len(rows)]} for i in range(40)]
    (tmp_path / "a.jsonl").write_text(lines_of(*rows), encoding="utf-8")
    with pytest.raises(UserError) as error:
        splits_of(tmp_path / "a.jsonl", task=task, multi_label=task == "classify")
    says(error, "a.jsonl", *said)


def test_places_of_tags_that_words_do_not_fit_are_counted(tmp_path, capsys):
    places = [[0, 8, "LOC"], [0, 14, "ORG"], [16, 17, "X"], [30, 40, "LOC"], [15, 20, "O.K."]]
    row = {"text": "New York Times here ", "label": places}
    (tmp_path / "a.jsonl").write_text(lines_of(row), encoding="utf-8")
    _, (row,) = opened("tag", tmp_path / "a.jsonl")
    assert row.label == ["B-ORG", "I-ORG", "I-ORG", "B-O.K."]
    assert "3 places of tags overlap a longer one, or do not" in capsys.readouterr().err


def test_answers_that_stand_in_several_places_are_counted(tmp_path, capsys):
    rows = [{"context": "a b a", "question": "q", "answer": answer} for answer in "ab"]
    (tmp_path / "a.jsonl").write_text(lines_of(*rows), encoding="utf-8")
    opened("qa", tmp_path / "a.jsonl")
    assert "1 answers stand in several places" in capsys.readouterr().err
    (tmp_path / "b.jsonl").write_text(lines_of({**rows[0], "answer_start": 4}), encoding="utf-8")
    _, (row,) = opened("qa", tmp_path / "b.jsonl")
    assert row.label == [("a", 4)] and not capsys.readouterr().err


def test_joined_labels_are_warned_of(tmp_path):
    labels = ["x", "y", "x|y"] * 20
    path = write_rows(tmp_path / "a.csv", ("text", "label"), [f"t {i}" for i in range(60)], labels)
    assert "'x|y' is a class of its own: --multi_label" in splits_of(path)[1]
    for name, label, said in (("b", "x、y", "'x、y' is a class of its own"),
                              ("c", "ｘ", "'x', 'ｘ' differ by case, width"),
                              ("d", "n/a", "'n/a' is a class of its own: leave it empty")):
        path = write_rows(tmp_path / f"{name}.csv", ("text", "label"), [f"t {i}" for i in range(60)],
                          ["x", "y", label] * 20)
        assert said in splits_of(path)[1]
    texts = [f"t {i}" for i in range(60)]
    path = write_rows(tmp_path / "d.csv", ("text", "label"), texts, ["x", "x，y"] * 30)
    with pytest.raises(UserError, match="as 'x，y' may be meant to be: write . between them"):
        splits_of(path, multi_label=True)


def test_of_many_columns_an_error_names_some(tmp_path):
    names = [f"{i} {'word ' * 100}" for i in range(300)]
    (tmp_path / "a.json").write_text(json.dumps([dict.fromkeys(names, "x")] * 30), encoding="utf-8")
    with pytest.raises(UserError, match="no column for the text among .* and 260 more: name it") as error:
        splits_of(tmp_path / "a.json")
    assert len(str(error.value)) < 3000


@pytest.mark.parametrize("labels, warned", [(["0.5", "1", "4.25"], True), (["1", "2.0", "5"], False)])
def test_amounts_that_are_taken_for_classes_are_warned_of(tmp_path, labels, warned):
    path = write_rows(tmp_path / "a.csv", ("text", "label"), [f"t {i}" for i in range(60)], labels * 20)
    assert ("is a class of its own: --task=regress" in splits_of(path)[1]) == warned


def test_rows_without_a_text_are_left_out_and_a_text_that_is_everywhere_is_trained_on(tmp_path):
    rows = [{"text": " " if i % 3 == 0 else "again" if i % 3 == 1 else f"text {i}", "label": "xy"[i % 2]}
            for i in range(90)]
    (tmp_path / "a.jsonl").write_text(lines_of(*rows), encoding="utf-8")
    splits, said = splits_of(tmp_path / "a.jsonl")
    (train, val, test), = splits.values()
    assert "30 rows left out without a text" in said
    assert [sum(row.text == "again" for row in rows) for rows in (train, val, test)] == [30, 0, 0]
    assert val and test


def test_texts_that_are_alike_are_on_one_side():
    texts = [(f"Is it {i}?", f"yes {i}") for i in range(200)]
    alike = [(b.upper(), f" {a.replace(' ', '  ')}") for a, b in texts]
    rows = [Row("", a, b, "xy"[i % 2]) for i, (a, b) in enumerate(texts + alike)]
    part = TASKS["classify"].split(rows, 10, 0)
    assert (part[:200] == part[200:]).all() and np.bincount(part).tolist() == [40] * 10
    sizes = [1 + 7 * (i % 10 == 0) for i in range(100)]  # some users have many rows
    keys = np.repeat(np.arange(100), sizes)
    part = split_rows(keys.tolist(), None, 10, 0)
    assert all(len(set(part[keys == key])) == 1 for key in range(100)) and np.ptp(np.bincount(part)) <= 1


def test_rows_of_a_user_stay_on_one_side_of_splits_and_folds(tmp_path):
    users = np.arange(300) % 30
    path = write_rows(tmp_path / "a.csv", ("text", "label", "user"), [f"text {i % 290}" for i in range(300)],
                      ["xy"[i % 2] for i in range(300)], users)
    for changes in ({}, {"folds": 5}):
        splits, said = splits_of(path, split_column="user", **changes)
        assert "split: user" in said
        for split in splits.values():
            sides = [{row.unit for row in rows} for rows in split]
            assert sum(map(len, sides)) == 30 and all(sides)


@pytest.mark.parametrize("folds", [None, 4])
@pytest.mark.parametrize("rare", [1, 2, 3])
def test_rare_labels_are_trained_on_before_they_are_held_out(rare, folds, tmp_path):
    """With all rows of their users; but not if nothing would be left to validate or test on."""
    labels = ["xy"[i % 2] for i in range(60)] + [f"rare {k}" for k in range(9) for _ in range(rare)]
    n = len(labels)
    path = write_rows(tmp_path / "a.csv", ("text", "label", "user"), [f"text {i}" for i in range(n)], labels,
                      [i % (n - 3) for i in range(n)])
    for column in ("", "user"):
        found, said = splits_of(path, split_column=column, folds=folds)
        assert column or ("so rare that" in said) == (rare < 3)
        tested = sum(len(split.test) for split in found.values())
        assert not folds or column or (tested == n) == (rare > 1)
        for train, val, test in found.values():
            assert {row.label for row in train} == {*labels} and val and test
            units = [{row.unit or row.text for row in rows} for rows in (train, val, test)]
            assert len(set.union(*units)) == sum(map(len, units))
            assert len(train + val + test) == n
    if folds:
        return
    path = write_rows(tmp_path / "b.csv", ("text", "label", "user"), [f"text {i}" for i in range(90)],
                      ["xyy"[i % 3] for i in range(90)], [i % 3 for i in range(90)])
    with pytest.raises(UserError, match="nothing to tell apart"):
        splits_of(path, split_column="user")


def test_groups_of_0_and_false_have_names(tmp_path):
    names = (0, False, "", None, 1.5, "nan", " F ", "F")  # a CSV's NaN is text
    rows = [{"text": "a", "label": "x", "g": group} for group in names]
    (tmp_path / "a.jsonl").write_text(lines_of(*rows), encoding="utf-8")
    _, rows = opened("classify", tmp_path / "a.jsonl", group="g")
    assert [row.group for row in rows] == ["0", "false", "", "", "1.5", "", "F", "F"]
    _, rows = opened("classify", tmp_path / "a.jsonl", split="g")
    assert [row.unit for row in rows] == ["0", "false", "", "", "1.5", "", "F", "F"]


def test_bad_rows_are_counted_and_windows_line_ends_divide_texts(tmp_path):
    rows = "".join(f"a{i},x\nb{i},y\n" for i in range(30))
    (tmp_path / "a.csv").write_text(f"text,label\n{rows}a, b,x\n",
                                    encoding="utf-8")
    splits, said = splits_of(tmp_path / "a.csv", skip_bad_rows=True)
    assert "1 rows left out that cannot be read, " in said and "a.csv:62: 3 cells" in said
    (tmp_path / "a.txt").write_bytes(b"\r\n\r\none\r\nmore\r\n\r\n\r\ntwo\r\n")
    assert [row.text for row in TASKS["lm"].read(str(tmp_path / "a.txt"), {})] == ["one\nmore", "two"]


# -----------------------------------------------------------------------------
# In use

@pytest.mark.parametrize("name, content, args, out, told", [
    ("a.csv", "id,review,label\n7,w1 fine,good\n9,w2 dull,fair\n8,w3 fine,Good\n", [],
     ["id,text,label,prediction", "7,w1 fine,good,good", "9,w2 dull,fair,bad", "8,w3 fine,Good,good"],
     "accuracy 1.0000, of the 1 rows with a label that training knew; 2 have labels"),
    ("a.csv", "id,body,kind\n7,w1 fine,good\n", ["--text_column=body", "--label_column=kind"],
     ["id,text,label,prediction", "7,w1 fine,good,good"], "accuracy 1.0000"),
    ("a.jsonl", '{"review": "w1 fine", "label": null}', [], ["text,label,prediction", "w1 fine,,good"],
     "MB of weights"),
    ("a.txt", "w1 fine\nw2 dull\n", [], ["text,label,prediction", "w1 fine,,good", "w2 dull,,bad"], "2 rows"),
    ("a.txt", "这家酒店的服务很好，下次还来。 fine\n".encode("gbk"), [], ["text,label,prediction",
     "这家酒店的服务很好，下次还来。 fine,,good"], "read as GBK"),
    ("a.txt", "été fine\n".encode("latin-1"), ["--encoding=latin-1"],
     ["text,label,prediction", "été fine,,good"], ""),
])
def test_a_file_is_answered_by_the_columns_of_training(tuned, tmp_path, name, content, args, out, told):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    said = run_here(sample, f"--out_dir={tuned / 'out'}", f"--start=FILE:{path}", *args)
    lines = [line for line in said.splitlines() if "," in line]
    for line, start in zip([line for line in lines if not line.startswith("(")], out):
        assert line.startswith(start + ",")
    assert told in said and said.count("read as GBK") == told.count("read as GBK")


def test_a_header_that_the_training_file_had_not_is_followed_if_its_names_are_given(tmp_path):
    path = write_rows(tmp_path / "a.csv", ("label", "text"), ["good"], ["w1 fine"])
    settled = {"text": "1", "pair": None, "label": "0", "header": False, "unused": []}
    for asked in (["text"], ["text", "label"]):
        columns = {**settled, **{role: role for role in asked}, "asked": asked}
        _, (row,) = TASKS["classify"].open(path, columns, False)
        assert (row.text, row.label) == ("w1 fine", "good")
    with pytest.raises(UserError, match="a header, it seems, .* or name its columns, --text_column"):
        TASKS["classify"].open(path, settled, False)


def test_a_table_of_texts_is_not_read_as_words_with_tags(tmp_path):
    """By a model that was trained on CoNLL, whose columns are numbers."""
    path = tmp_path / "a.tsv"
    path.write_text("id\treview\nr1\tgood old Paris\n", encoding="utf-8")
    settled = {"text": "0", "pair": None, "label": "1", "header": False, "unused": []}
    with pytest.raises(UserError, match="a header, it seems, .* or name its columns, --text_column"):
        TASKS["tag"].open(str(path), settled, False)
    _, (row,) = TASKS["tag"].open(str(path), {**settled, "text": "review", "asked": ["text"]}, False)
    assert (row.text, row.id) == ("good old Paris", "r1")
    path.write_text("good\tB\nold\tI\n\nParis\tB\n", encoding="utf-8")
    assert [row.words for row in TASKS["tag"].open(str(path), settled)[1]] == [["good", "old"], ["Paris"]]


def test_a_file_without_the_column_is_refused_by_name(tuned, tmp_path):
    path = write_rows(tmp_path / "a.csv", ("text", "label"), ["w1 fine"], ["good"])
    with pytest.raises(UserError, match="no column 'review' for the text: it has text, label"):
        run_here(sample, f"--out_dir={tuned / 'out'}", f"--start=FILE:{path}")


def test_answers_of_every_task_are_scored(tmp_path):
    """As far as their labels are known: several labels, numbers, tags, questions; from text lines too."""
    head = {"max_length": 64, "paired": False, "apart": False, "labels": ["a", "b"], "columns": {}}
    (tmp_path / "a.conll").write_text("x B\ny a\n\nz q\n", encoding="utf-8")
    (tmp_path / "words.conll").write_text("x\ny\n\nz\n", encoding="utf-8")
    (tmp_path / "lines.txt").write_text("x y\nz y x\n", encoding="utf-8")
    columns = {"text": "0", "label": "1", "header": False, "unused": []}
    tag = Tag({**head, "labels": ["B", "a"]}, None)
    rows = list(tag.to_answer(str(tmp_path / "a.conll"), columns)[1])
    assert [tag.knows_label(row) for row in rows] == [True, False]
    named = Tag({**head, "labels": ["B", "a"]}, None)  # trained on a table
    for name, labels in (("a.conll", [["B", "a"], ["q"]]), ("even.txt", [None, None])):
        (tmp_path / "even.txt").write_text("x y\nz y\n", encoding="utf-8")
        settled = {"text": "tokens", "label": "tags", "header": True, "unused": []}
        assert [row.label for row in named.to_answer(str(tmp_path / name), settled)[1]] == labels
    for name in ("words.conll", "lines.txt"):
        rows = list(tag.to_answer(str(tmp_path / name), columns)[1])
        assert [row.label for row in rows] == [None, None] and rows[0].words == ["x", "y"]
    (tmp_path / "pairs.txt").write_text("one\ttwo\nthree\tfour\n", encoding="utf-8")
    pairs = TASKS["classify"]({**head, "paired": True}, None)
    settled = {"text": "sentence1", "pair": "sentence2", "label": "label", "header": True, "unused": []}
    rows = list(pairs.to_answer(str(tmp_path / "pairs.txt"), settled)[1])
    assert [(row.text, row.pair) for row in rows] == [("one", "two"), ("three", "four")]
    several = TASKS["classify"]({**head, "labels": ["1", "true"], "several": True}, None)
    (tmp_path / "b.jsonl").write_text(lines_of({"text": "x", "label": [1.0, True]}), encoding="utf-8")
    row, = several.to_answer(str(tmp_path / "b.jsonl"), {**settled, "text": "text", "pair": None})[1]
    assert row.label == ["1", "true"] and several.knows_label(row)
    (tmp_path / "c.json").write_text(squad(SQUAD), encoding="utf-8")
    (tmp_path / "d.json").write_text(squad({"id": "7", "question": "q"}), encoding="utf-8")
    answer = TASKS["qa"]({**head, "paired": True}, None)
    for name, known in (("c.json", True), ("d.json", False)):
        row, = answer.to_answer(str(tmp_path / name), {})[1]
        assert answer.knows_label(row) == known


@pytest.mark.parametrize("task, name, content, asked, said", [
    ("qa", "a.json", squad(SQUAD), {"label": "ner"}, "has no column 'ner' for the label: it has context, id"),
    ("tag", "a.conll", CONLL, {"group": "who"}, "has no column 'who' for the group: it has 0, 1, 2, 3: "),
    ("lm", "a.txt", "one\n\ntwo\n", {"text": "body"}, "no column 'body' for the text: it has each paragraph"),
    ("lm", "a.jsonl", lines_of(ALPACA), {"header": True}, "header=True: .* is no table: leave it out")])
def test_a_column_that_a_file_cannot_have_is_refused(tmp_path, task, name, content, asked, said):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises((UserError, SettingError), match=said):
        opened(task, tmp_path / name, **asked)
