"""Summaries: which columns hold them, what the prompt is, and how long documents are cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_tokenizers import tiny_tokenizer

from pocl_ray.config.sources import DataConfig
from pocl_ray.data.columns import Request, UnusableRowError, read_request, resolve_columns
from pocl_ray.data.documents import DocumentFitter
from pocl_ray.data.prompts import PromptTemplate
from pocl_ray.data.row_store import RowStore
from pocl_ray.data.rows import prepare_rows
from pocl_ray.errors import ConfigError, DataError, ModelError

TEMPLATE = "Summarize.\n{document}\nSummary: "
LONG = " ".join(f"word{number} ünd" for number in range(60))


def request_of(document: str, system: str = "") -> Request:
    return Request("Summarize the following text.", document, system, (), ("s",), None)


@pytest.mark.parametrize(
    ("found", "document", "summary"),
    [
        (["document", "summary", "id"], "document", "summary"),
        (["article", "highlights", "id"], "article", "highlights"),
        (["dialogue", "summary"], "dialogue", "summary"),
        (["text", "summary"], "text", "summary"),
    ],
)
def test_known_data_sets_need_no_mapping(found: list[str], document: str, summary: str) -> None:
    columns = resolve_columns(found, {}, "summarization")
    assert (columns["document"], columns["summary"]) == (document, summary)


def test_a_missing_summary_column_is_refused_with_the_columns_found() -> None:
    with pytest.raises(DataError, match=r"the document and its summary; found: article, id; .*summary: \.\.\.\}"):
        resolve_columns(["article", "id"], {}, "summarization")
    with pytest.raises(DataError, match=r"no column 'abstract', which `columns.summary` names; found: body, title"):
        resolve_columns(["body", "title"], {"document": "body", "summary": "abstract"}, "summarization")


def test_a_row_asks_for_a_summary_of_its_document() -> None:
    columns = resolve_columns(["body", "abstract"], {"document": "body", "summary": "abstract"}, "summarization")
    request = read_request({"body": "A long tale.", "abstract": ["Tale.", "A tale."]}, columns)
    assert (request.input, request.references) == ("A long tale.", ("Tale.", "A tale."))
    assert PromptTemplate("plain", None).render(request) == "Summarize the following text.\n\nA long tale."
    with pytest.raises(UnusableRowError, match="abstract is missing"):
        read_request({"body": "A long tale."}, columns)


def test_a_template_has_its_own_words_around_the_document() -> None:
    assert PromptTemplate(TEMPLATE, None).render(request_of("{input}")) == "Summarize.\n{input}\nSummary: "
    prompt = PromptTemplate("{instruction}\n\n{document}\n=>", None).render(request_of("x"))
    assert prompt == "Summarize the following text.\n\nx\n=>"
    assert PromptTemplate(TEMPLATE, None).render(request_of("x", "Be brief.")).startswith("Be brief.\n\nSummarize.")


def test_a_template_for_documents_is_refused_in_another_task() -> None:
    with pytest.raises(ValueError, match=r"prompt_template has \{document\}, which data.task instruction has not"):
        DataConfig.model_validate({"train": {"path": "x"}, "holdout_rows": 1, "prompt_template": TEMPLATE})
    with pytest.raises(ConfigError, match=r"for summaries \{document\}"):
        PromptTemplate("{instruction} {documents}", None)


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("limit", [40, 63, 64, 120])
def test_a_long_document_loses_its_end_and_the_template_stays_whole(limit: int, adds_bos: bool) -> None:
    tokenizer, template = tiny_tokenizer(adds_bos=adds_bos), PromptTemplate(TEMPLATE, None)
    fitted = DocumentFitter(tokenizer, template, limit).fit(request_of(LONG))
    num_tokens = len(tokenizer(template.render(fitted))["input_ids"])
    assert limit - 8 <= num_tokens <= limit
    assert LONG.startswith(fitted.input) and 0 < len(fitted.input) < len(LONG)


def test_a_document_that_fits_is_left_alone() -> None:
    request = request_of("A tale.")
    assert DocumentFitter(tiny_tokenizer(), PromptTemplate(TEMPLATE, None), 60).fit(request) is request


def test_the_chat_template_is_kept_whole_as_well() -> None:
    tokenizer = tiny_tokenizer(chat=True)
    template = PromptTemplate("chat", tokenizer)
    fitted = DocumentFitter(tokenizer, template, 60).fit(request_of(LONG))
    assert template.render(fitted).endswith("[assistant] ")
    assert len(tokenizer(template.render(fitted), add_special_tokens=False)["input_ids"]) <= 60


def test_a_template_that_leaves_no_room_makes_the_row_unusable() -> None:
    fitter = DocumentFitter(tiny_tokenizer(), PromptTemplate(TEMPLATE, None), 5)
    with pytest.raises(UnusableRowError, match=r"no room for the document: .*data.max_prompt_tokens 5"):
        fitter.fit(request_of(LONG))


def test_a_tokenizer_that_tells_no_places_is_refused() -> None:
    class Slow:
        is_fast, name_or_path = False, "slow"

    with pytest.raises(ModelError, match="tokenizer slow: tells no places of tokens"):
        DocumentFitter(Slow(), PromptTemplate(TEMPLATE, None), 64)


def test_summaries_are_prepared_with_prompts_that_keep_their_beginning(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"article": LONG, "highlights": "Words."}, {"article": "A tale.", "highlights": "Tale."}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig.model_validate(
        {
            "train": {"path": str(path)},
            "holdout_rows": 1,
            "task": "summarization",
            "prompt_template": TEMPLATE,
            "max_prompt_tokens": 64,
            "max_tokens": 96,
        }
    )
    tokenizer = tiny_tokenizer()
    prepare_rows("train", config.train, config, tokenizer, tmp_path / "train.arrow")
    store = RowStore.open(tmp_path / "train.arrow")
    prompts = [tokenizer.decode(ids) for ids in store.tokens([0, 1])[0]]
    assert prompts[0].startswith("Summarize.\nword0 ünd") and prompts[0].endswith("\nSummary: ")
    assert store.prompts([0, 1]) == prompts  # what is shown and generated from is what is trained on
    assert store.references([0, 1]) == [["Words."], ["Tale."]]


def test_a_chat_of_several_turns_is_prepared_as_its_last_answer(tmp_path: Path) -> None:
    turns = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Cat?"), ("assistant", "Yes")]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
    config = DataConfig.model_validate({"train": {"path": str(path)}, "holdout_rows": 1, "prompt_template": "chat"})
    tokenizer = tiny_tokenizer(chat=True)
    prepare_rows("train", config.train, config, tokenizer, tmp_path / "train.arrow")
    store = RowStore.open(tmp_path / "train.arrow")
    (prompt,), (response,) = store.tokens([0])
    assert tokenizer.decode(prompt) == "<s>[system] Be kind.\n[user] Hi\n[assistant] Hello\n[user] Cat?\n[assistant] "
    assert tokenizer.decode(response) == "Yes</s>"
