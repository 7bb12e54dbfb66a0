"""Tests of the scoring of the example data sets, and of the data sets themselves."""

import importlib.util
import json
import re
import sys
from collections import Counter
from difflib import SequenceMatcher
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
DATA = EXAMPLES / "data"
SETS = ("tagging", "tickets")
SIZES = {"train": 240, "heldout": 50}


def _load_scoring() -> ModuleType:
    # The examples are plain scripts, not a package, hence the loading by path.
    spec = importlib.util.spec_from_file_location("example_scoring", EXAMPLES / "scoring.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


scoring = _load_scoring()


def _score(name: str, answer: str, expected: str) -> Any:
    return {"tagging": scoring.score_tagging, "tickets": scoring.score_tickets}[name](
        answer, expected
    )


def _rows(name: str, part: str) -> list[dict[str, list[dict[str, str]]]]:
    rows: list[dict[str, list[dict[str, str]]]] = scoring.read_rows(DATA / f"{name}.{part}.jsonl")
    return rows


def _texts(name: str, part: str) -> list[str]:
    return [row["messages"][1]["content"] for row in _rows(name, part)]


def _answers(name: str, part: str) -> list[str]:
    return [row["messages"][2]["content"] for row in _rows(name, part)]


TAGS = "money=3 tech=1 sport=0 health=0 travel=0"
TICKET = '{"category":"billing","product":"kettle","urgent":false,"refund":true}'


@pytest.mark.parametrize(
    ("answer", "content"),
    [
        (TAGS, 1.0),
        (f"  {TAGS}\n", 1.0),
        # Only the top label counts, not how high it stands or what follows it.
        ("money=1 sport=0 health=0 tech=0 travel=0", 1.0),
        ("money=3 travel=2 health=1 sport=0 tech=0", 1.0),
        ("tech=3 money=2 sport=0 health=0 travel=0", 0.0),
        # Ties name no top label.
        ("sport=3 money=3 health=3 tech=3 travel=3", 0.0),
        ("money=3 tech=3 sport=0 health=0 travel=0", 0.0),
        ("sport=0 money=0 health=0 tech=0 travel=0", 0.0),
    ],
)
def test_well_formed_tagging(answer: str, content: float) -> None:
    assert scoring.score_tagging(answer, TAGS) == scoring.Score(True, content)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "money",
        f"Sure! {TAGS}",
        f"{TAGS}.",
        f"{TAGS}\n{TAGS}",
        TAGS.upper(),
        TAGS.replace(" ", "  "),
        TAGS.replace(" ", ", "),
        TAGS.replace("money=3", "money=4"),
        TAGS.replace("money=3", "money=-3"),
        TAGS.replace("money=3", "money=33"),
        TAGS.replace("money=3", "money = 3"),
        TAGS.replace("money", "finance"),
        # A label left out, and a label twice in place of another.
        "money=3 tech=1 sport=0 health=0",
        "money=3 tech=1 sport=0 health=0 health=0",
        "money=3 money=1 sport=0 health=0 travel=0",
        # The lower score before the higher, and equal scores in the wrong order.
        "tech=1 money=3 sport=0 health=0 travel=0",
        "money=3 tech=1 sport=0 travel=0 health=0",
    ],
)
def test_ill_formed_tagging(answer: str) -> None:
    assert scoring.score_tagging(answer, TAGS) == scoring.Score(False, 0.0)


@pytest.mark.parametrize(
    ("answer", "content"),
    [
        (TICKET, 1.0),
        (f"\n{TICKET} ", 1.0),
        (TICKET.replace("billing", "delivery"), 0.75),
        (TICKET.replace("kettle", "Kettle"), 0.75),
        (TICKET.replace("kettle", "red kettle"), 0.75),
        (TICKET.replace("billing", "defect").replace('"urgent":false', '"urgent":true'), 0.5),
        (
            TICKET.replace("billing", "account").replace("true", "false").replace("kettle", "k"),
            0.25,
        ),
        ('{"category":"account","product":"pan","urgent":true,"refund":false}', 0.0),
    ],
)
def test_well_formed_ticket(answer: str, content: float) -> None:
    assert scoring.score_tickets(answer, TICKET) == scoring.Score(True, content)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "{}",
        f"```json\n{TICKET}\n```",
        f"Here it is: {TICKET}",
        f"{TICKET} Anything else?",
        TICKET * 2,
        TICKET[:-1],
        TICKET.replace('"', "'"),
        # Valid JSON with the same meaning, but not the format.
        TICKET.replace(":", ": "),
        TICKET.replace(",", ", "),
        '{"product":"kettle","category":"billing","urgent":false,"refund":true}',
        # Keys and values that are not allowed.
        TICKET.replace("}", ',"note":"x"}'),
        TICKET.replace('"urgent":false,', ""),
        TICKET.replace("billing", "payment"),
        TICKET.replace("false", '"low"'),
        TICKET.replace("true", '"true"'),
        TICKET.replace("true", "True"),
        TICKET.replace("true", "null"),
        TICKET.replace("kettle", ""),
        TICKET.replace("kettle", " kettle"),
        TICKET.replace("kettle", "ket\ntle"),
        TICKET.replace("kettle", 'ket"tle'),
    ],
)
def test_ill_formed_ticket(answer: str) -> None:
    assert scoring.score_tickets(answer, TICKET) == scoring.Score(False, 0.0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tagging", "none"),
        ("tagging", "money=3 tech=3 sport=0 health=0 travel=0"),
        ("tickets", "{}"),
    ],
)
def test_unusable_expected_answer_is_an_error(name: str, expected: str) -> None:
    with pytest.raises(ValueError, match="not a"):
        _score(name, TAGS if name == "tagging" else TICKET, expected)


def test_summary_counts_ill_formed_answers_as_zero() -> None:
    scores = [
        scoring.Score(True, 1.0),
        scoring.Score(True, 0.5),
        scoring.Score(True, 0.5),
        scoring.Score(False, 0.0),
    ]
    assert scoring.summarise(scores) == scoring.Summary(count=4, well_formed=0.75, content=0.5)


def test_summary_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no scores"):
        scoring.summarise([])


def _as_rows(*answers: str) -> list[dict[str, list[dict[str, str]]]]:
    return [{"messages": [{"role": "assistant", "content": answer}]} for answer in answers]


def test_chance_level_of_tagging_is_the_commonest_top_label() -> None:
    other = "sport=3 money=0 health=0 tech=0 travel=0"
    assert scoring.chance_level(_as_rows(TAGS, TAGS, TAGS, other)) == 0.75


def test_chance_level_of_tickets_is_the_mean_of_the_commonest_values() -> None:
    rows = _as_rows(
        TICKET, TICKET.replace("kettle", "pan"), TICKET.replace("false", "true"), TICKET
    )
    # category 4/4, product 3/4, urgent 3/4, refund 4/4
    assert scoring.chance_level(rows) == pytest.approx(0.875)


@pytest.mark.parametrize(
    ("answers", "message"),
    [((), "no rows"), ((TAGS, TICKET), "neither"), ((TICKET, "x"), "neither"), (("",), "neither")],
)
def test_chance_level_of_unusable_rows_is_an_error(answers: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scoring.chance_level(_as_rows(*answers))


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("part", SIZES)
def test_rows_are_chatml_and_score_full_marks(name: str, part: str) -> None:
    rows = _rows(name, part)
    assert len(rows) == SIZES[part]
    for row in rows:
        assert list(row) == ["messages"]
        assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
        assert all(list(message) == ["role", "content"] for message in row["messages"])
        _, user, assistant = (message["content"] for message in row["messages"])
        assert user == user.strip()
        assert 7 <= len(user.split()) <= 35
        assert assistant == assistant.strip()
        assert _score(name, assistant, assistant) == scoring.Score(True, 1.0)


@pytest.mark.parametrize("name", SETS)
def test_one_short_system_prompt_for_all_rows(name: str) -> None:
    prompts = {row["messages"][0]["content"] for part in SIZES for row in _rows(name, part)}
    assert len(prompts) == 1
    assert len(prompts.pop().split()) <= 15


@pytest.mark.parametrize("name", SETS)
def test_no_two_texts_are_alike(name: str) -> None:
    texts = _texts(name, "train") + _texts(name, "heldout")
    words = [frozenset(re.findall(r"[\w']+", text.lower())) for text in texts]
    for i, j in combinations(range(len(texts)), 2):
        overlap = len(words[i] & words[j]) / len(words[i] | words[j])
        assert overlap < 0.5, (texts[i], texts[j])
        # The edit similarity is slow to get, so it is only taken where words are shared at all.
        if overlap >= 0.25:
            similarity = SequenceMatcher(None, texts[i].lower(), texts[j].lower()).ratio()
            assert similarity < 0.75, (texts[i], texts[j])


@pytest.mark.parametrize("part", SIZES)
def test_tagging_is_balanced(part: str) -> None:
    answers = _answers("tagging", part)
    tops = Counter(answer.split("=")[0] for answer in answers)
    assert tops == dict.fromkeys(scoring.LABELS, SIZES[part] // 5)
    # Every text has one main subject and at most one more, which half of the texts or more have.
    scores = Counter("".join(re.findall("[0-3]", answer)) for answer in answers)
    assert set(scores) == {"30000", "31000", "32000"}
    assert min(scores.values()) >= 0.25 * SIZES[part]


def test_tagging_second_subjects_are_balanced() -> None:
    seconds = Counter(
        answer.split()[1].split("=")[0]
        for answer in _answers("tagging", "train")
        if "=1" in answer or "=2" in answer
    )
    assert set(seconds) == set(scoring.LABELS)
    assert max(seconds.values()) <= 1.5 * min(seconds.values())


@pytest.mark.parametrize("part", SIZES)
def test_tickets_are_balanced(part: str) -> None:
    tickets = [json.loads(answer) for answer in _answers("tickets", part)]
    categories = Counter(ticket["category"] for ticket in tickets)
    assert set(categories) == {"billing", "delivery", "account", "defect"}
    assert max(categories.values()) - min(categories.values()) <= 1
    # Within each category as well, so that no field can be told from another.
    for category, count in categories.items():
        inside = [ticket for ticket in tickets if ticket["category"] == category]
        assert sum(ticket["refund"] for ticket in inside) / count == pytest.approx(1 / 2, abs=0.05)
        assert sum(ticket["urgent"] for ticket in inside) / count == pytest.approx(1 / 3, abs=0.05)
        both = sum(ticket["urgent"] and ticket["refund"] for ticket in inside)
        assert both / count == pytest.approx(1 / 6, abs=0.05)
    # No product is so common that naming it always would pay.
    products = Counter(t["product"] for t in tickets)
    assert max(products.values()) <= 4


@pytest.mark.parametrize("part", SIZES)
def test_ticket_products_stand_in_the_text(part: str) -> None:
    for text, answer in zip(_texts("tickets", part), _answers("tickets", part), strict=True):
        named = json.loads(answer)["product"]
        assert named == named.lower()
        assert re.search(rf"\b{re.escape(named)}\b", text.lower()), (text, named)


def test_some_heldout_products_are_new() -> None:
    known = {json.loads(answer)["product"] for answer in _answers("tickets", "train")}
    heldout = [json.loads(answer)["product"] for answer in _answers("tickets", "heldout")]
    # A model that picks from the products it has seen must not get far.
    assert sum(name not in known for name in heldout) >= len(heldout) / 2


@pytest.mark.parametrize(("name", "expected"), [("tagging", 0.2), ("tickets", 0.358)])
def test_chance_level_of_the_training_files(name: str, expected: float) -> None:
    assert scoring.chance_level(_rows(name, "train")) == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("part", SIZES)
def test_files_are_small(name: str, part: str) -> None:
    assert (DATA / f"{name}.{part}.jsonl").stat().st_size < 200_000
