"""Which answers of a model are taken for a dialogue, by example and property."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import annotate_pgen
from annotate_pgen import RESPONSE_TYPES, SCENARIO_TYPES, parse_answer

PROMPT = "Can you grab the pink brick?"
REPLY = "Sure, I'll take it."
GOOD = {"user_prompt": PROMPT, "robot_utterance": REPLY}


def answer(user_prompt=PROMPT, robot_utterance=REPLY):
    return json.dumps({"user_prompt": user_prompt, "robot_utterance": robot_utterance})


@pytest.mark.parametrize(
    "text",
    [
        answer(),
        answer(f"  {PROMPT}\n", f"\t{REPLY} "),
        "Here is a dialogue:\n" + answer() + "\nI hope that helps {",
        f"```json\n{answer()}\n```",
        f"<think>The {{skill}} is to grasp.</think>\n\n{answer()}",
        f"<think>First: {answer('Open it.', 'Okay, opening it.')}</think>{answer()}",
        annotate_pgen.PREFILL + answer().removeprefix(annotate_pgen.PREFILL),
        json.dumps({"robot_utterance": REPLY, "more": [1], "user_prompt": PROMPT}),
        json.dumps(GOOD, indent=2),
    ],
)
def test_the_dialogue_is_found(text):
    dialogue = parse_answer(text)
    assert dialogue == GOOD
    assert list(dialogue) == ["user_prompt", "robot_utterance"]


@pytest.mark.parametrize(
    "said",
    [
        "Nimm bitte den gelben Stein.",
        "拿起粉色的积木。",
        "ضع المكعب في الصندوق",
        "Возьми розовый кубик",
        'Take the one I call "Bob" \N{BRICK}',
        "No",
        "So",
        "x" * annotate_pgen.MAX_LENGTH,
    ],
)
def test_whatever_a_person_may_say_is_taken(said):
    assert parse_answer(answer(user_prompt=said))["user_prompt"] == said
    if not annotate_pgen.only_asks(said):
        assert parse_answer(answer("Go on.", said))["robot_utterance"] == said


@pytest.mark.parametrize("side", ["user_prompt", "robot_utterance"])
@pytest.mark.parametrize(
    "said",
    [
        "",
        "   ",
        "x",
        "...",
        "…",
        "123 456",
        None,
        ["Take it."],
        {"text": "Take it."},
        5,
        True,
        "two\nlines",
        "two\u2028lines",
        "a bell \x07",
        "an escape \x1b[31m",
        "broken \ud800 half",
        "broken \N{REPLACEMENT CHARACTER}",
        "x" * (annotate_pgen.MAX_LENGTH + 1),
        "<|im_end|> take it",
        "take it |>",
        "take the {object}",
        "take it }",
        "user_prompt",
        "my robot_utterance is this",
    ],
)
def test_what_nobody_would_say_is_refused(side, said):
    assert parse_answer(answer(**{side: said})) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        "5",
        "Sure, I'll take it.",
        '{"user_prompt": "',
        '{"user_prompt": "Take it."}',
        '{"robot_utterance": "Taking it."}',
        "{'user_prompt': 'Take it.', 'robot_utterance': 'Taking it.'}",
        f"[{answer()[1:]}",
        f"{answer()}</think>",
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"user_prompt": ' + "1" * 5000 + "}",
    ],
)
def test_what_holds_no_dialogue_is_refused(text):
    assert parse_answer(text) is None


@pytest.mark.parametrize("length", range(len(answer())))
def test_an_answer_that_was_cut_off_is_refused(length):
    assert parse_answer(answer()[:length]) is None


@pytest.mark.parametrize(
    "reply", ["Grab the pink brick.", "grab the PINK brick!", "Grab, the pink brick..."]
)
def test_a_reply_that_repeats_the_request_is_refused(reply):
    assert parse_answer(answer("Grab the pink brick.", reply)) is None


@pytest.mark.parametrize(
    "reply",
    [
        "Do you mean the yellow one?",
        "The yellow one?",
        "Which one? The yellow one?",
        "Which one?  ",
        "Should I take it?!?",
        "Do you mean this? ...",
        'Do you mean "the yellow one?"',
        "(Do you mean this one?)",
        "The yellow one? \N{SLIGHTLY SMILING FACE}",
        "¿Te refieres al amarillo?",
        "你是说黄色的吗\uff1f",
        "هل تقصد الأصفر؟",
    ],
)
def test_a_reply_that_only_asks_is_refused(reply):
    assert annotate_pgen.only_asks(reply)
    assert parse_answer(answer(robot_utterance=reply)) is None
    # A person may ask for something.
    assert parse_answer(answer(user_prompt=reply))


@pytest.mark.parametrize(
    "reply",
    [
        "Just to confirm, the yellow one. Reaching for it now.",
        "You mean the yellow one? Reaching for it now.",
        "Okay, the yellow one. Is that right?",
        "Sure! The yellow one?",
        "Okay",
        "好的。黄色的。对吗\uff1f",
    ],
)
def test_a_reply_that_says_something_may_also_ask(reply):
    assert parse_answer(answer(robot_utterance=reply))["robot_utterance"] == reply


def prompt_sentences():
    """Every sentence of the prompt, its rules and its examples, without fields."""
    sentences = set()
    for rule in (*SCENARIO_TYPES.values(), *RESPONSE_TYPES.values()):
        text, _, example = rule.partition("Example: ")
        sentences |= {text.strip(), example.strip('"')}
        sentences.update(re.split(r"(?<=[.!?])\s+", text.strip()))
    for line in annotate_pgen.PROMPT.splitlines():
        label, _, rest = line.partition(": ")
        for part in (line, rest, *re.split(r"(?<=[.!?:])\s+", line)):
            if not re.search("[{}]", part) and label != "Answer in JSON":
                sentences.add(part.strip("- "))
    # What is shorter, a person may well say.
    return sorted(
        sentence
        for sentence in sentences
        if len(annotate_pgen.plain_words(sentence)) > 15
    )


SENTENCES = prompt_sentences()
# The same sentence as a model may write it.
VARIANTS = {
    "as it stands": str,
    "upper case": str.upper,
    "lower case": str.lower,
    "exclamation": lambda text: re.sub(r"[.?]", "!", text),
    "no punctuation": lambda text: re.sub(r"[^\w\s]", " ", text),
    "dashes": lambda text: "- " + text.replace(", ", " - "),
    "spaces": lambda text: text.replace(" ", "  "),
}


def test_the_sentences_of_the_prompt_are_found():
    assert len(SENTENCES) > 2 * (len(SCENARIO_TYPES) + len(RESPONSE_TYPES))
    assert "Could you wipe the blue plate?" in SENTENCES
    assert "It is a single step." in SENTENCES


@pytest.mark.parametrize("change", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("sentence", SENTENCES)
def test_no_sentence_of_the_prompt_survives_as_an_answer(sentence, change):
    echo = change(sentence)
    assert parse_answer(answer(user_prompt=echo)) is None
    assert parse_answer(answer(robot_utterance=echo)) is None


def test_the_same_words_in_another_order_are_no_echo():
    """So that it is as echoes that the sentences are refused."""
    taken = 0
    for sentence in SENTENCES:
        words = annotate_pgen.plain_words(sentence).split()
        if not {"user_prompt", "robot_utterance"} & set(words):
            assert parse_answer(answer(user_prompt=" ".join(reversed(words))))
            taken += 1
    assert taken >= len(SENTENCES) - 5


def test_every_example_is_long_enough_to_be_known_as_an_echo():
    for rule in (*SCENARIO_TYPES.values(), *RESPONSE_TYPES.values()):
        example = rule.partition("Example: ")[2].strip('"')
        assert len(annotate_pgen.plain_words(example)) > 15


def test_echoes_of_an_edited_prompt_are_refused(monkeypatch):
    german = {"bitte": 'Jemand bittet. Beispiel: "Wisch doch bitte den blauen Teller."'}
    said = "wisch doch bitte den blauen teller"
    assert parse_answer(answer(user_prompt=said))
    monkeypatch.setattr(annotate_pgen, "SCENARIO_TYPES", german)
    assert parse_answer(answer(user_prompt=said)) is None


@given(st.text())
def test_any_answer_is_refused_or_sane(text):
    for given_answer in (
        text,
        annotate_pgen.PREFILL + text,
        answer(user_prompt=text),
        answer(robot_utterance=text),
    ):
        dialogue = parse_answer(given_answer)
        if dialogue is None:
            continue
        assert list(dialogue) == list(GOOD)
        for said in dialogue.values():
            assert said == said.strip()
            assert said.isprintable() or not annotate_pgen.CONTROL_CHARACTER.search(
                said
            )
            assert any(character.isalpha() for character in said)
            assert len(said) <= annotate_pgen.MAX_LENGTH
        # What is taken is taken again when the journal is read.
        assert parse_answer(annotate_pgen.json_line(dialogue)) == dialogue


@given(st.text(st.characters(categories=["L", "Zs"]), min_size=2, max_size=300))
def test_any_words_are_taken(text):
    said = text.strip()
    is_new = annotate_pgen.plain_words(said) != annotate_pgen.plain_words(REPLY)
    if len(said) >= 2 and is_new:
        dialogue = parse_answer(answer(user_prompt=text))
        assert dialogue == {"user_prompt": said, "robot_utterance": REPLY}
