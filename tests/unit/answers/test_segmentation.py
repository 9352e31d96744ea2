"""Words in any script; those of ASCII text are `rouge_score`'s own."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from nltk.stem.porter import PorterStemmer
from rouge_score import tokenize

from pocl_ray.answers.rouge import rouge_l
from pocl_ray.answers.segmentation import words

# Sentences of scripts that issue reports named, and of others.
SENTENCES = {
    "Russian": "Столица Франции — Париж",
    "Ukrainian": "Столиця Франції — Париж",
    "Greek": "Πρωτεύουσα της Γαλλίας είναι το Παρίσι",
    "Hebrew": "בירת צרפת היא פריז",
    "Arabic": "عاصمة فرنسا هي باريس",
    "Persian": "می‌خواهم به خانه بروم",
    "Hindi": "फ्रांस की राजधानी पेरिस है",
    "Tamil": "பிரான்சின் தலைநகரம் பாரிஸ்",
    "Bengali": "ফ্রান্সের রাজধানী প্যারিস",
    "Georgian": "საფრანგეთის დედაქალაქია პარიზი",
    "Armenian": "Ֆրանսիայի մայրաքաղաքը Փարիզն է",
    "Amharic": "የፈረንሳይ ዋና ከተማ ፓሪስ ነው",
    "Korean": "프랑스의 수도는 파리입니다",
    "Chinese": "法国的首都是巴黎。",
    "Japanese": "フランスの首都はパリです。",
    "Thai": "เมืองหลวงของฝรั่งเศสคือปารีส",
    "Lao": "ນະຄອນຫຼວງຂອງຝຣັ່ງແມ່ນປາຣີ",
    "Khmer": "រដ្ឋធានីរបស់ប្រទេសបារាំងគឺប៉ារីស",
    "Burmese": "ပြင်သစ်နိုင်ငံ၏မြို့တော်မှာပါရီဖြစ်သည်",
    "Tibetan": "ཧྥ་རན་སིའི་རྒྱལ་ས་ནི་པེ་རིས་ཡིན།",
    "Vietnamese": "Thủ đô của nước Pháp là Paris",
    "Turkish": "Fransa'nın başkenti İstanbul değildir",
    "German": "Die Hauptstadt ist über Köln hinaus schön",
    "rare Han": "𠮷野家",
    "mathematics": "∀x ∈ ℝ: x² ≥ 0",
    "emoji": "👍",
    "flags": "🇫🇷 🇩🇪",
}


@pytest.mark.parametrize("language", SENTENCES)
def test_a_sentence_agrees_with_itself_and_not_with_another_one(language: str) -> None:
    sentence = SENTENCES[language]
    assert rouge_l(sentence, [sentence]) == pytest.approx(100.0)
    other = SENTENCES["Greek" if language != "Greek" else "Russian"]
    assert rouge_l(sentence, [other]) == 0.0


@pytest.mark.parametrize("name", ["de", "emoji", "en", "ru", "zh"])
def test_the_inputs_that_failed_agree_with_themselves(shared: Path, name: str) -> None:
    path = shared / "cases" / "text" / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path}")
    row = json.loads(path.read_text(encoding="utf-8"))
    assert rouge_l(row["text"], [row["output"]]) == pytest.approx(100.0)


@pytest.mark.parametrize(
    ("prediction", "reference", "figure"),
    [
        ("Столица Париж", "Столица Франции Париж", 80.0),  # 2 of 2 and 2 of 3 words
        ("我们去公园", "我们去公园散步", 100 * 2 * 5 / 12),  # 5 of 5 and 5 of 7 characters
        ("パリ", "パリです", 100 * 2 * 2 / 6),
        ("2024年", "2024年度", 80.0),  # a number is one word
        ("👍 👎", "👍", 100 * 2 / 3),
    ],
)
def test_words_count_where_there_are_spaces_and_characters_where_there_are_none(
    prediction: str, reference: str, figure: float
) -> None:
    assert rouge_l(prediction, [reference]) == pytest.approx(figure)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Köln", "Ko\u0308ln"),  # composed or not
        ("ΟΔΟΣ", "οδος"),  # final sigma
        ("ＡＢＣ　１２３", "abc 123"),  # full width
        ("ﾊﾛｰ", "ハロー"),  # half width
        ("می\u200cخواهم", "میخواهم"),  # a joiner within a word
        ("Straße", "STRASSE"),
        ("❤\ufe0f", "❤"),
    ],
)
def test_text_that_unicode_calls_the_same_is_the_same(one: str, other: str) -> None:
    assert words(one) == words(other) != []


def test_what_belongs_to_one_sign_stays_together() -> None:
    assert words("वि ดี မြ") == ["वि", "ดี", "မြ"]
    assert words("£5 ©") == ["5"]
    assert words("👩\u200d👩\u200d👧 👍🏽 🇩🇪🇫🇷") == ["👩\u200d👩\u200d👧", "👍🏽", "🇩🇪", "🇫🇷"]


def test_words_of_ascii_text_are_the_packages_own() -> None:
    stemmer, draw = PorterStemmer(), random.Random(0)
    texts = ["".join(chr(draw.randrange(128)) for _ in range(60)) for _ in range(300)]
    texts += ["The Runner's running_fast, 3rd try: don't-stop!", "", "...", "a1b2 C3PO x" * 3]
    for text in texts:
        assert words(text) == tokenize.tokenize(text, stemmer)
