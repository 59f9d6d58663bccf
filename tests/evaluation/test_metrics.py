import csv
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertune.evaluation.metrics import FUNCTION_SLOT, METRICS, parse_meaning, shown_figures

VIGGO = Path(__file__).parents[1] / "files" / "viggo-test-sample.csv"
SLOT_F1, EXACT_MATCH = METRICS["slot-f1"], METRICS["exact-match"]
FIFA = "inform(name[FIFA 12], release_year[2011], genres[sports, simulation])"
FIFA_SLOTS = {
    (FUNCTION_SLOT, "inform"),
    ("name", "fifa 12"),
    ("release_year", "2011"),
    ("genres", "sports"),
    ("genres", "simulation"),
}

meanings = st.builds(
    lambda function, attributes: f"{function}({', '.join(f'{name}[{value}]' for name, value in attributes)})",
    st.sampled_from(["inform", "request", "confirm"]),
    st.lists(st.tuples(st.sampled_from(["name", "genres", "rating"]), st.text("ab ,():", max_size=6)), max_size=4),
)
# Answers of a model may be anything: whole, cut short, or astray.
answers = st.one_of(
    meanings,
    st.builds(lambda meaning, length: meaning[:length], meanings, st.integers(0, 40)),
    st.text("ab[](), \n", max_size=30),
    st.text(max_size=30),
)


@pytest.fixture(scope="module")
def viggo():
    with VIGGO.open(encoding="utf-8", newline="") as file:
        return [row["mr"] for row in csv.DictReader(file)]


def test_slots_are_the_function_and_each_value_of_each_attribute():
    assert parse_meaning(FIFA).slots == FIFA_SLOTS
    assert parse_meaning(FIFA).complete


def test_order_case_and_white_space_do_not_matter():
    other = "  Inform ( genres[Simulation,\n sports] ,name[fifa  12],release_year[ 2011 ] )\n"
    assert parse_meaning(other) == parse_meaning(FIFA)


def test_an_attribute_without_a_value_is_a_slot():
    assert parse_meaning("request_attribute(esrb[])").slots == {(FUNCTION_SLOT, "request_attribute"), ("esrb", "")}


@pytest.mark.parametrize(
    ("text", "slots"),
    [
        ("", set()),
        ("inform", set()),
        ("I like FIFA 12 (a lot)", set()),
        ("inform(", {(FUNCTION_SLOT, "inform")}),
        ("inform()", {(FUNCTION_SLOT, "inform")}),
        ("inform(name", {(FUNCTION_SLOT, "inform")}),
        ("inform(name[FIFA 12", {(FUNCTION_SLOT, "inform")}),
        ("inform(name[FIFA 12]", {(FUNCTION_SLOT, "inform"), ("name", "fifa 12")}),
        ("inform(name[FIFA 12], genres[sports, simul", {(FUNCTION_SLOT, "inform"), ("name", "fifa 12")}),
        ("inform(name[FIFA 12] rating[good])", {(FUNCTION_SLOT, "inform"), ("name", "fifa 12")}),
        ("inform(name[FIFA 12, rating[good])", {(FUNCTION_SLOT, "inform")}),
        (FIFA + " inform(name[Tetris])", FIFA_SLOTS),
    ],
)
def test_an_answer_counts_up_to_its_first_mistake(text, slots):
    assert parse_meaning(text).slots == slots


@pytest.mark.parametrize("text", ["", "inform(", "inform(name[FIFA 12]", "inform(name[x],)", FIFA + " and more"])
def test_an_answer_that_cannot_be_read_to_its_end_is_not_wholly_right(text):
    assert not parse_meaning(text).complete
    assert not SLOT_F1.is_right(text, text)


def test_counts_are_taken_over_all_rows_together():
    expected = ["inform(name[a], rating[good])", "request(specifier[worst])"]
    answered = ["inform(name[a], rating[poor], esrb[])", "no idea"]
    # 2 right (function, name) of 4 answered and 5 expected.
    assert SLOT_F1.score(expected, answered) == {
        "slot_f1": pytest.approx(4 / 9),
        "precision": 2 / 4,
        "recall": 2 / 5,
        "exact_match": 0.0,
    }


def test_perfect_answers_score_one_on_viggo(viggo):
    assert len(viggo) == 14
    assert not any(SLOT_F1.problem(meaning) for meaning in viggo)
    assert set(SLOT_F1.score(viggo, viggo).values()) == {1.0}


def test_swapped_attributes_are_as_right(viggo):
    shuffled = []
    for meaning in viggo:
        function, _, rest = meaning.partition("(")
        attributes = [attribute.strip("],") for attribute in rest.removesuffix("])").split("], ")]
        random.Random(0).shuffle(attributes)
        shuffled.append(f"{function}({', '.join(attribute + ']' for attribute in attributes)})")
    assert shuffled != viggo
    assert set(SLOT_F1.score(viggo, shuffled).values()) == {1.0}


def test_answers_of_other_rows_score_less(viggo):
    others = viggo[1:] + viggo[:1]
    assert 0 < SLOT_F1.score(viggo, others)["slot_f1"] < 1
    assert SLOT_F1.score(viggo, others)["exact_match"] == 0


@given(st.lists(st.tuples(answers, answers), max_size=5))
def test_f1_is_symmetric_and_every_figure_is_a_share(pairs):
    expected, answered = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    scores, swapped = SLOT_F1.score(expected, answered), SLOT_F1.score(answered, expected)
    assert scores["slot_f1"] == swapped["slot_f1"]
    assert scores["precision"] == swapped["recall"]
    assert all(0 <= share <= 1 for share in scores.values())


@given(st.lists(meanings, min_size=1, max_size=5))
def test_an_answer_equal_to_its_reference_is_right(references):
    assert set(SLOT_F1.score(references, references).values()) == {1.0}
    assert EXACT_MATCH.score(references, references) == {"exact_match": 1.0}


def test_exact_match_looks_at_the_text_only():
    assert EXACT_MATCH.problem("any text") is None
    assert EXACT_MATCH.is_right("Paris", " Paris\n")
    assert not EXACT_MATCH.is_right("Paris", "paris")
    assert EXACT_MATCH.score(["Paris", "Rome"], ["Paris", "Oslo"]) == {"exact_match": 0.5}


@pytest.mark.parametrize("metric", METRICS.values())
def test_each_row_needs_its_answer(metric):
    with pytest.raises(ValueError, match="zip"):
        metric.score(["inform(name[a])"], [])


def test_figures_of_a_metric_that_is_not_registered_here_are_shown_by_their_keys():
    score = {"metric": "of-another-installation", "rows": 2, "word_error": 0.5, "seconds": 1.0, "examples": []}
    assert [(figure.name, figure.label) for figure in shown_figures(score)] == [("word_error", "word error")]
