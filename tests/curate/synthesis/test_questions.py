# ruff: noqa: RUF001 (texts in scripts whose letters look like Latin ones)
import pytest

from tercet.curate.filtering.scripts import same_scripts, script_shares
from tercet.curate.synthesis.questions import REASONS, ParsedQuestion, parse_question, question_form

EN = (
    "The ls command lists files. With the option -l it prints sizes and dates of the files in a "
    "long format. Use -a for hidden ones."
)
DE = "Der Befehl ls zeigt Dateien an. Mit der Option -l zeigt er Größe und Datum in langer Form."
KO = "ls 명령은 파일을 나열한다. 옵션 -l 은 크기와 날짜를 긴 형식으로 출력한다."
JA = "コマンド ls はファイルを一覧表示する。オプション -l は長い形式でサイズと日付を表示する。"
ZH = "命令 ls 列出文件。选项 -l 以长格式显示大小和日期。"
TH = "คำสั่ง ls แสดงรายการไฟล์ ตัวเลือก -l แสดงขนาดและวันที่"
AR = "يعرض الأمر ls الملفات. يطبع الخيار -l الأحجام والتواريخ."
EL = "Η εντολή ls εμφανίζει αρχεία. Η επιλογή -l εμφανίζει μέγεθος και ημερομηνία."

GOOD = "What does ls print with the option -l?"


@pytest.mark.parametrize(
    ("answer", "passage"),
    [
        (GOOD, EN),
        ("Why does ls -a show more files (e.g. hidden ones) than ls alone?", EN),
        ('What does ls do when "?" is part of a name?', EN),
        ("Does ls list a.php?x=1 as one file?", EN),
        ("Is it possible to see hidden files with ls?", EN),
        ("Was zeigt ls mit der Option -l an?", DE),
        ("ls 명령의 -l 옵션은 무엇을 출력합니까?", KO),
        ("ls 명령의 -l 옵션은 무엇을 출력합니까.", KO),
        ("이메일 파일을 나열하는 명령은 무엇인가요?", KO),
        ("ls の -l オプションは何を表示しますか。", JA),
        ("オプション -l は何を表示しますか？", JA),
        ("ls的选项-l显示什么？", ZH),
        ("ตัวเลือก -l ของ ls แสดงอะไร", TH),
        ("ماذا يطبع الخيار -l مع ls؟", AR),
        ("Τι εμφανίζει η επιλογή -l της ls;", EL),
    ],
)
def test_a_good_question_stays_as_it_is(answer, passage):
    assert parse_question(answer, passage) == ParsedQuestion(answer)


@pytest.mark.parametrize(
    "answer",
    [
        f"  {GOOD}\n",
        f"Question: {GOOD}",
        f"QUESTION : {GOOD}",
        f"Q: {GOOD}",
        f'"{GOOD}"',
        f"“{GOOD}”",
        f'Question: "{GOOD}"',
        f'"Question: {GOOD}"',
        f"**Question:** {GOOD}",
        f"1. **{GOOD}**",
        f"- {GOOD}",
        f"Here is a search question: {GOOD}",
        f'The question is: "Question: {GOOD}"',
        f"<think>Which one?\nThat one.</think>\n\n{GOOD}",
        "What does  ls print with\tthe option -l?",
    ],
)
def test_labels_numbers_quotes_and_thoughts_are_taken_off(answer):
    assert parse_question(answer, EN) == ParsedQuestion(GOOD)


REFUSED = [
    ("empty", "", EN),
    ("empty", ' "?" \n', EN),
    ("no question", "The ls command has an option -l.", EN),
    ("no question", "print sizes of files", EN),
    ("no question", "オプションは表示します。", JA),
    ("several questions", "What is ls? What does the option -l print?", EN),
    ("several questions", "オプション -l は何ですか。ls は何ですか。", JA),
    ("several questions", "什么是命令ls？ls为什么有用？", ZH),
    ("more than a question", f"Sure! {GOOD}", EN),
    ("more than a question", f"The ls command lists files. {GOOD}", EN),
    ("more than a question", f"{GOOD} It prints sizes.", EN),
    ("more than a question", f"{GOOD}\nAnswer: sizes", EN),
    ("more than a question", "lsは一覧を表示する。オプション -l は何ですか？", JA),
    ("too short", "Why ls?", EN),
    ("too short", "何？", JA),
    ("too long", f"Does {'ls ' * 60}print sizes?", EN),
    ("too long", f"ls{'的选项' * 60}显示什么？", ZH),
    ("pronoun", "This prints what with the option -l?", EN),
    ("pronoun", "What does it print with the option -l?", EN),
    ("pronoun", "What is the purpose of this option?", EN),
    ("pronoun", "Was macht dieser Befehl mit Dateien?", DE),
    ("pronoun", "Wie zeigt er das Datum an?", DE),
    ("pronoun", "이 명령은 무엇을 출력합니까?", KO),
    ("pronoun", "이것은 무엇을 출력합니까?", KO),
    ("pronoun", "この命令は何を表示しますか？", JA),
    ("pronoun", "それは何を表示しますか？", JA),
    ("pronoun", "这个命令显示什么大小？", ZH),
    ("speaks of its passage", "According to the text, what does ls print?", EN),
    ("speaks of its passage", "What is the main topic of the passage?", EN),
    ("speaks of its passage", "What does ls print by the part above?", EN),
    ("speaks of its passage", "How do ls and -l relate in the original sentence?", EN),
    ("speaks of its passage", "本文によると ls は何を表示しますか？", JA),
    ("another script", "ls 명령의 옵션은 무엇을 출력합니까?", EN),
    ("another script", GOOD, KO),
    ("another script", "ls的选项-l显示什么？", JA),
    ("another script", "ls の -l オプションは何を表示しますか？", ZH),
    ("copied", "With ls, it prints sizes and dates of the files in a long format?", EN),
    ("copied", "Prints sizes and dates of the files in a long format?", EN),
]


@pytest.mark.parametrize(("reason", "answer", "passage"), REFUSED)
def test_each_refusal_has_its_reason(reason, answer, passage):
    assert reason in REASONS
    assert parse_question(answer, passage).refusal == reason


def test_every_reason_is_tested():
    assert {reason for reason, _, _ in REFUSED} == set(REASONS)


def test_questions_are_one_when_only_case_spaces_and_marks_differ():
    forms = [
        question_form(text)
        for text in ("What is ls?", "what  is LS", "What is ls ? ", "\uff37hat is ls\uff1f")
    ]
    assert len(set(forms)) == 1
    assert question_form("What is la?") not in forms


def test_scripts_are_shares_of_letters():
    assert script_shares("12 + 3 !") == {}
    assert script_shares("ab가나다 9") == {"HANGUL": 0.6, "LATIN": 0.4}
    # Half-width kana and full-width Latin letters are forms of the usual ones.
    assert script_shares("\uff76あー\uff21") == {"KANA": 0.75, "LATIN": 0.25}


def test_a_question_may_share_only_names_with_a_text_in_several_scripts():
    assert same_scripts("옵션 출력", f"{KO} {EN}")
    assert not same_scripts("the option prints", f"{KO} {KO} {EN}")
    assert same_scripts("The letter μ of alpha", "The letter μ is a Greek letter")
    assert same_scripts("オプションは?", JA)  # no Han character is asked of Japanese
