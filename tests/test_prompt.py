"""What the model is asked and shown, and which of its answers are taken."""

import json
import re
from collections import Counter
from dataclasses import replace

import make_demo
import pytest
from conftest import annotate, run
from hypothesis import given, settings
from hypothesis import strategies as st

import annotate_pgen
from annotate_pgen import (
    EXAMPLES,
    RESPONSE_TYPES,
    SCENARIO_TYPES,
    check_dialogue,
    choose_examples,
    construct_prompt,
    one_line,
    parse_answer,
    suitable_responses,
)

PAIRS = [(x, response) for x in EXAMPLES for response in suitable_responses(x)]
POOL = [(scenario, x) for scenario, pool in EXAMPLES.items() for x in pool]
TYPES = (
    "specific_object negative_task situated_correction implicit_request confirmation "
    "constraint_based clarification acknowledgment constraint_acknowledgment"
)
# What the checks are about: a scene in two languages.
MOVE = "robot arm moves towards pink lego brick"
PICK = "robot arm picks up pink lego brick"
PLACE = "robot arm places pink lego brick into the transparent box"
TASK = "pink lego brick into the transparent box"
FAHREN = "zum roten Stein fahren"
GREIFEN = "den roten Stein greifen"
LEGEN = "den roten Stein in die Kiste legen"


def words(*texts):
    """The words of some texts that are longer than articles, in lower case."""
    return set(re.findall(r"\w{4,}", " ".join(texts).lower()))


def make_sample(scenario="", response="", index=0, skill="grasp the brick"):
    """A sample with as little as its prompt needs."""
    scene = (0, index, 0.0, skill, ("reach",), "tidy up")
    return annotate_pgen.Sample(*scene, scenario, response, index)


# ----------------------------------------------------------------------------- prompt


def test_three_arguments_are_enough_and_the_last_skills_are_told():
    history = [f"step {number}" for number in range(9)]
    prompt = construct_prompt("tidy up", history, "lift the brick")
    last = history[-annotate_pgen.HISTORY_LENGTH :]
    assert [name for name in history if name in prompt] == last
    for told in ("tidy up", "; ".join(last), "lift the brick"):
        assert told in prompt
    for rule in (*SCENARIO_TYPES.values(), *RESPONSE_TYPES.values()):
        assert rule not in prompt


def test_a_line_that_has_nothing_to_say_is_left_out():
    full = construct_prompt("tidy up", ["reach"], "grasp", *PAIRS[0], "a table")
    bare = construct_prompt("", [], "grasp")
    assert len(full.splitlines()) == len(annotate_pgen.PROMPT.splitlines())
    assert set(bare.splitlines()) < set(full.splitlines())


@settings(max_examples=50, deadline=None)
@given(task=st.text(), history=st.lists(st.text(), max_size=7), skill=st.text())
def test_prompt_takes_any_text(task, history, skill):
    prompt = construct_prompt(task, history, skill, *PAIRS[0])
    assert len(prompt.splitlines()) <= len(annotate_pgen.PROMPT.splitlines())
    for text in (task, skill, *history[-annotate_pgen.HISTORY_LENGTH :]):
        assert one_line(text) in prompt
    prompt.encode("utf-8")


@settings(deadline=None)
@given(st.text())
def test_one_line_keeps_the_words_and_nothing_else(text):
    line = one_line(text)
    assert line == one_line(line) == line.strip()
    assert len(line.splitlines()) <= 1
    assert not annotate_pgen.CONTROL_CHARACTER.search(line)
    assert re.findall(r"\w+", line) == re.findall(r"\w+", text)


# --------------------------------------------------------------------------- examples


def test_the_types_of_the_specification_are_dealt():
    assert {*SCENARIO_TYPES, *RESPONSE_TYPES} == set(TYPES.split())
    assert set(EXAMPLES) == set(SCENARIO_TYPES)
    assert {response for _, response in PAIRS} == set(RESPONSE_TYPES)
    annotate_pgen.check_prompt()


def find_fault(user_prompt, reply, *scene):
    """What check_dialogue finds wrong, in the English scene if none is given."""
    skill, skills, task, history = (*(scene or SCENES["English"]), "", ())[:4]
    told = (skill, history, task)
    sample = annotate_pgen.Sample(0, 0, 0.0, *told, episode_skills=skills)
    dialogue = {"user_prompt": user_prompt, "robot_utterance": reply}
    return check_dialogue(dialogue, sample)


@pytest.mark.parametrize(("scenario", "example"), POOL)
def test_an_example_replies_to_every_type_and_would_be_taken(scenario, example):
    assert list(example.replies) == suitable_responses(scenario)
    assert len(EXAMPLES[scenario]) >= 3
    scene = (example.skill, (*example.history, example.skill), example.task)
    for reply in example.replies.values():
        said = {"user_prompt": example.user_prompt, "robot_utterance": reply}
        assert parse_answer(json.dumps(said)) == said
        assert find_fault(*said.values(), *scene, example.history) == ""
    # A constraint that is acknowledged was said.
    repeated = example.replies.get("constraint_acknowledgment", example.user_prompt)
    assert words(repeated) & words(example.user_prompt)


@pytest.mark.parametrize(("scenario", "response"), PAIRS)
def test_the_turns_of_a_pair_are_solved_examples_of_it(scenario, response):
    turns = choose_examples(scenario, response)
    assert len(turns) == annotate_pgen.EXAMPLE_COUNT
    pool = {example.user_prompt: example for example in EXAMPLES[scenario]}
    for question, answer in turns:
        dialogue = parse_answer(answer)
        assert answer.startswith(annotate_pgen.PREFILL)
        example = pool.pop(dialogue["user_prompt"])
        assert dialogue["robot_utterance"] == example.replies[response]
        for told in (example.picture, example.task, example.skill, *example.history):
            assert told in question
        assert next(iter(json.loads(answer).values())) == example.skill
        assert SCENARIO_TYPES[scenario] in question
        assert RESPONSE_TYPES[response] in question


@pytest.mark.parametrize(("scenario", "response"), PAIRS)
def test_samples_and_tries_see_different_examples(scenario, response):
    samples = [make_sample(scenario, response, index) for index in range(40)]
    assert len({x.examples()[0] for x in samples}) == len(EXAMPLES[scenario])
    for sample in samples:
        for tries in range(annotate_pgen.MAX_TRIES - 1):
            assert sample.examples(tries) == sample.examples(tries)
            assert sample.examples(tries) != sample.examples(tries + 1)


@pytest.mark.parametrize(("scenario", "response"), PAIRS)
def test_a_chat_is_short_enough_for_a_small_model(scenario, response):
    """600 tokens, of which Qwen's tokenizer makes one of four or five characters."""
    skill = "robot arm places the pink lego brick into the transparent box"
    texts = [annotate_pgen.SYSTEM]
    texts.append(construct_prompt(skill, [skill] * 9, skill, scenario, response))
    for turn in choose_examples(scenario, response):
        texts += turn
    assert sum(len(text) for text in texts) / 4 < 600


# -------------------------------------------------------------------- an edited prompt

GERMAN = {
    "SYSTEM": "Du schreibst, was ein Mensch zu einem Roboter sagt. Antworte in JSON.",
    "PROMPT": "Bild: {picture}\nAufgabe: {task}\n{scenario}, {response}\nTu: {skill}",
    "SCENARIO_TYPES": {"bitte": "Eine Bitte", "statt": "Eine Wahl"},
    "RESPONSE_TYPES": {"zusage": "er sagt zu"},
    "NARRATION": ("der Mensch", "der Roboter"),
}
GERMAN["EXAMPLES"] = annotate_pgen.read_examples("""
scenario: bitte
picture: eine Lampe auf einem Tisch, der Greifer am Schalter
task: hell machen
steps: die Lampe einschalten
person: Schalte bitte die Lampe ein.
zusage: Gut, ich mache die Lampe an.

scenario: statt
picture: ein Buch und eine Vase, der Greifer am Buch
task: das Regal leeren
steps: ans Regal fahren; nach dem Buch greifen; das Buch nehmen
person: Lass die Vase stehen und nimm das Buch.
zusage: Ja, ich nehme das Buch.
""")


def forget_words():
    """Count the examples' words anew."""
    for words_of_examples in ("common_stems", "example_stems", "robot_words"):
        getattr(annotate_pgen, words_of_examples).cache_clear()


@pytest.fixture
def edit(monkeypatch):
    """Edit the tables of the prompt, as a user does in the file."""

    def edit(tables):
        for name, value in tables.items():
            monkeypatch.setattr(annotate_pgen, name, value)
        forget_words()

    yield edit
    monkeypatch.undo()
    forget_words()


def test_a_german_table_of_a_few_lines_is_enough(edit, own_dataset, model, tmp_path):
    edit(GERMAN)
    skills = [(FAHREN, 0.0, 1.2), (GREIFEN, 1.2, 2.6), (LEGEN, 2.6, 60.0)]
    german = make_demo.skills_of((45, 30, 38), [LEGEN], skills)
    make_demo.write_skills(own_dataset, german)
    code, shown, errors = run("--data-dir", own_dataset, "--dry-run", "--model", model)
    assert code == 0, errors
    for text in ("Eine Bitte, er", "Aufgabe: das Regal leeren\n", "nimm das Buch."):
        assert text in shown
    output = tmp_path / "output"
    code, _, errors = annotate(own_dataset, model, output, "--sample-interval", "2")
    assert code == 0, errors
    lines = (output / "meta" / "syn_annotations.jsonl").read_text().splitlines()
    assert {json.loads(x)["scenario_type"] for x in lines} == {"bitte", "statt"}


NEGATIVE = EXAMPLES["negative_task"]
SILENT = {"negative_task": [*NEGATIVE, replace(NEGATIVE[0], replies={})]}
TYPO = {"negative_task": [replace(NEGATIVE[0], replies={"confirmaton": "Yes."})]}


@pytest.mark.parametrize(
    ("name", "edited", "named"),
    [
        ("PROMPT", "Now: {skil}. Before: {history}", "skil"),
        ("PROMPT", "Now: {skill}. {}", "PROMPT"),
        ("PROMPT", 'Now: {skill}. JSON: {"user_prompt": "..."}', "user_prompt"),
        ("PROMPT", "Now: {skill", "}"),
        ("VERIFY_PROMPT", "{user_prompt} {options} {skill}", "skill"),
        ("SCENARIO_TYPES", {}, "SCENARIO_TYPES"),
        ("SCENARIO_TYPES", {**SCENARIO_TYPES, "joke": "It is fun."}, "joke"),
        ("EXAMPLES", {**EXAMPLES, "negative_task": ()}, "negative_task"),
        ("EXAMPLES", {**EXAMPLES, **SILENT}, "negative_task"),
        ("EXAMPLES", {**EXAMPLES, **TYPO}, "confirmaton"),
        ("RESPONSE_TYPES", {}, "acknowledgment"),
    ],
)
def test_a_slip_in_the_prompt_is_named_in_one_line(name, edited, named, edit, dataset):
    edit({name: edited})
    with pytest.raises(annotate_pgen.InputError) as raised:
        annotate_pgen.check_prompt()
    message = str(raised.value)
    assert named in message
    code, _, errors = run("--data-dir", dataset, "--dry-run", "--model", "m")
    assert code == 2
    assert errors.splitlines()[-1] == f"error: {message}"


@pytest.mark.parametrize("wrong", ["person Take it.", "persn: Take it.", "", " "])
def test_a_slip_in_the_table_of_examples_is_named(wrong, capsys):
    block = "scenario: x\npicture: p\ntask: t\nsteps: r; s\nperson: Up.\nyes: Ok"
    example, _ = annotate_pgen.read_examples(f"{block}\n\n \n\n{block}")["x"]
    assert example == annotate_pgen.Example("p", "t", "Up.", ("r",), "s", {"yes": "Ok"})
    with pytest.raises(SystemExit) as ended:
        annotate_pgen.read_examples(block.replace("person: Up.", wrong))
    assert ended.value.code == 2
    line = wrong if wrong.startswith("person ") else "scenario: x"
    assert f"error: EXAMPLES: {line!r}: " in capsys.readouterr().err


ASKED = (
    "SYSTEM PROMPT SCENARIO_TYPES RESPONSE_TYPES EXAMPLES HISTORY_LENGTH EXAMPLE_COUNT "
    "ANSWER_KEYS PREFILL TOP_P TOP_K VERIFY_PROMPT"
)


@pytest.mark.parametrize("name", ASKED.split())
def test_all_that_is_asked_is_among_the_settings(name, edit):
    """So that a run with another prompt does not go on from this one's dialogues."""
    before = json.dumps(annotate_pgen.prompt_settings())
    value = getattr(annotate_pgen, name)
    is_table = isinstance(value, dict)
    edited = dict(reversed(value.items())) if is_table else 2 * value
    edit({name: edited})
    assert json.dumps(annotate_pgen.prompt_settings()) != before


# ----------------------------------------------------------------------- parse_answer

PROMPT = "Can you grab the pink brick?"
REPLY = "Sure, I'll take it."
GOOD = {"user_prompt": PROMPT, "robot_utterance": REPLY}


def answer(user_prompt=PROMPT, robot_utterance=REPLY):
    """An answer as the model writes it."""
    return json.dumps({"user_prompt": user_prompt, "robot_utterance": robot_utterance})


@pytest.mark.parametrize(
    "text",
    [
        answer(f"  {PROMPT}\n", f"\t{REPLY} "),
        "Here is a dialogue:\n" + answer() + "\nI hope that helps {",
        f"```json\n{json.dumps(GOOD, indent=2)}\n```",
        f"<think>First: {answer('Open it.', 'Okay, opening it.')}</think>{answer()}",
        annotate_pgen.PREFILL + 'take it", ' + answer().removeprefix("{"),
        json.dumps({"robot_utterance": REPLY, "more": [1], "user_prompt": PROMPT}),
    ],
)
def test_the_dialogue_is_found(text):
    dialogue = parse_answer(text)
    assert dialogue == GOOD
    assert list(dialogue) == list(GOOD)


@pytest.mark.parametrize("side", list(GOOD))
@pytest.mark.parametrize(
    "said",
    [
        *["", "   ", "x", "...", "…", "123 456"],
        *[None, ["Take it."], {"text": "Take it."}, 5, True],
        *["two\nlines", "two\u2028lines", "a bell \x07", "escape \x1b[31m", "a\x9fb"],
        *["broken \ud83d half", "broken \N{REPLACEMENT CHARACTER}", "take it }"],
        *["<|im_end|> take it", "take it |>", "take the {object}"],
        *["user_prompt", "my robot_utterance", "x" * (annotate_pgen.MAX_LENGTH + 1)],
    ],
)
def test_what_nobody_would_say_is_refused(side, said):
    assert parse_answer(answer(**{side: said})) is None


@pytest.mark.parametrize(
    "text",
    [
        *["", "null", "[]", "{}", "5", "Sure, I'll take it.", '{"user_prompt": "'],
        *['{"user_prompt": "Take it."}', '{"robot_utterance": "Taking it."}'],
        *[f"[{answer()[1:]}", f"{answer()}</think>", "[" * 100_000, '{"a":' * 100_000],
        '{"user_prompt": ' + "1" * 5000 + "}",
        *[answer()[:length] for length in range(1, len(answer()), 7)],
        answer("Grab the pink brick.", "grab, the PINK brick..."),
    ],
)
def test_what_holds_no_dialogue_is_refused(text):
    assert parse_answer(text) is None


@pytest.mark.parametrize(
    "reply",
    [
        *["Do you mean the yellow one?", "Which one? The yellow one?", "Which one?  "],
        *["Should I take it?!?", "Do you mean this? ...", 'Do you mean "this one?"'],
        *["(Do you mean this one?)", "The yellow one? \N{SLIGHTLY SMILING FACE}"],
        *["¿Te refieres al amarillo?", "你是说黄色的吗\uff1f", "هل تقصد الأصفر؟"],
    ],
)
def test_a_robot_that_only_asks_is_refused(reply):
    assert parse_answer(answer(robot_utterance=reply)) is None
    # A person may ask for something.
    assert parse_answer(answer(user_prompt=reply))


@pytest.mark.parametrize(
    "reply",
    [
        *["You mean that one? Reaching for it now.", "Okay, that one. Is that right?"],
        *["Nimm bitte den Stein.", "好的。黄色的。对吗\uff1f", "ضع المكعب في الصندوق"],
        *['Take the one I call "Bob" \N{BRICK}', "No", "x" * annotate_pgen.MAX_LENGTH],
    ],
)
def test_whatever_may_be_said_is_taken(reply):
    assert parse_answer(answer(robot_utterance=reply))["robot_utterance"] == reply


@settings(deadline=None)
@given(st.text())
def test_any_answer_is_refused_or_sane(text):
    for said in (text, annotate_pgen.PREFILL + text, answer(text), answer("Up", text)):
        dialogue = parse_answer(said)
        if dialogue is None:
            continue
        assert list(dialogue) == list(GOOD)
        for said in dialogue.values():
            assert said == said.strip()
            assert one_line(said) == " ".join(said.split())
            assert any(character.isalpha() for character in said)
            assert len(said) <= annotate_pgen.MAX_LENGTH
        # What is taken is taken again when the journal is read.
        assert parse_answer(json.dumps(dialogue)) == dialogue


# --------------------------------------------------------------------- check_dialogue

SCENES = {
    "English": (PICK, (MOVE, PICK, PLACE), TASK, (MOVE,)),
    "Two steps": (PICK, (MOVE, PICK), TASK, (MOVE,)),
    "German": (GREIFEN, (FAHREN, GREIFEN, LEGEN), LEGEN, (FAHREN,)),
    "Two German steps": (GREIFEN, (FAHREN, GREIFEN), LEGEN, (FAHREN,)),
    "Numbers": ("grasp block 1", ("grasp block 1", "grasp block 11")),
    "Chinese": ("抓住积木", ("抓住积木", "放下积木"), "收拾积木"),
}
NOTHING = ""
CHECKED = [
    ("English", "Could you pick up the pink brick?", "Sure, I'll pick it up.", NOTHING),
    ("English", "Don't place it yet, pick it up.", "Okay, picking it up.", NOTHING),
    ("English", "I'd like that in your hand.", "Then I'll take the brick.", NOTHING),
    ("English", "Place it into the box.", "Okay, the brick.", "asks for another"),
    ("English", "Pick it up.", "I'm placing the brick.", "promises another"),
    ("English", "Pick it up.", "Okay.", "says nothing"),
    ("English", "Pick it up.", "Okay, pick it up.", "repeats the user prompt"),
    ("English", "Pick it up.", "Okay, I'll pick it up.", NOTHING),
    ("English", "I'll pick it up.", "The brick, okay.", "speaks as the robot"),
    ("English", "Look. I'll pick it up.", "The brick.", "speaks as the robot"),
    ("English", "It'll fall, pick it up.", "The brick, okay.", NOTHING),
    ("Numbers", "Grasp block 11.", "Block 1, okay.", "asks for another"),
    ("Two steps", f"{TASK}, please.", "The brick, okay.", "whole task"),
    ("Two steps", f"Pick it up: {TASK}.", "The brick, okay.", NOTHING),
    ("German", "Noch nicht legen, nur greifen.", "Ich greife den Stein.", NOTHING),
    ("German", "Nimm das rote Ding in die Hand.", "Den roten, gut.", NOTHING),
    ("German", "Nimm die Sache bitte hoch.", "Ich greife den Stein.", NOTHING),
    ("German", "Leg ihn in die Kiste.", "Der Stein, gut.", "asks for another"),
    ("German", "Greif ihn.", "Ich lege den Stein in die Kiste.", "promises another"),
    ("German", "Greif ihn.", "Na gut.", "says nothing"),
    ("Chinese", "请把积木拿起来。", "好的我来抓。", NOTHING),
    ("German", "Greif den Stein.", "Ja: Greif den Stein!", "repeats the user prompt"),
    ("German", "Greif nach den Lampen.", "Den Stein, gut.", "example"),
    ("Two German steps", "Den roten Stein in die Kiste legen!", "Stein.", "whole task"),
]


@pytest.mark.parametrize(("scene", "user_prompt", "reply", "fault"), CHECKED)
def test_a_dialogue_is_checked_in_its_scene(scene, user_prompt, reply, fault, edit):
    if "German" in scene:
        edit(GERMAN)
    found = find_fault(user_prompt, reply, *SCENES[scene])
    assert fault in found if fault else found == ""


@pytest.mark.parametrize("tables", [{}, GERMAN], ids=["English", "German"])
def test_narration_and_the_prompts_own_labels_are_refused(tables, edit):
    edit(tables)
    told = [phrase.capitalize() for phrase in annotate_pgen.NARRATION]
    told += re.findall(r"^\w[\w ]*:", annotate_pgen.PROMPT, re.MULTILINE)
    assert len(told) > 4
    scene = ("pick up brick", ("pick up brick",))
    for text in told:
        assert find_fault(f"{text} the brick.", "The brick.", *scene)
        assert find_fault("Pick it up.", f"{text} the brick.", *scene)
    assert find_fault("Pick it up.", "The brick.", *scene) == ""


def own_words(example):
    """Words that two lines of an example have, and no other example."""
    lines = [example.picture, example.task, example.skill, *example.history]
    counts = Counter(word for line in lines for word in words(line))
    others = set()
    for _, other in POOL:
        if other is not example:
            others |= words(other.picture, other.task, other.skill, *other.history)
    twice = [word for word, count in counts.items() if count > 1 and len(word) > 4]
    # "tree" is the "trees" of another.
    return [x for x in twice if not any(x in y or y in x for y in others)]


@pytest.mark.parametrize(("scenario", "example"), POOL)
def test_no_word_of_an_example_survives(scenario, example):
    for word in own_words(example):
        for said in (word, word.upper(), f"{word}s"):
            assert find_fault(f"Pick up the {said}.", "Okay, the brick.")
            assert find_fault("Pick it up.", f"Okay, the {said}.")
        # Where the scene has it, it is no word of the example alone.
        found = find_fault(f"The {word}.", f"The {word}, yes.", f"pick up {word}", ())
        assert "example" not in found
    for reply in example.replies.values():
        assert find_fault(example.user_prompt, reply)


SEEN = "yellow white silver small second left right middle top line water table hand"


@pytest.mark.parametrize("word", SEEN.split())
def test_what_is_seen_may_be_said(word):
    """A picture shows more than the skills' names, and pointing to it is wanted."""
    assert find_fault(f"Take the {word} one.", "The brick, yes.") == ""


@pytest.mark.parametrize(
    ("skill", "reply"),
    [
        *[("open the drawer", "Opening it."), ("bring the cup", "Bringing it.")],
        *[("put it down", "Putting it."), ("pick up the spoons", "The spoon, okay.")],
        *[("press the button", "Both buttons."), ("empty the pan", "The pans, okay.")],
        *[("insert_plug", "The plug."), ("pull_the_plug", "Pulling it.")],
        *[("die Kisten stapeln", "Erst die Kiste."), ("zur Wand fahren", "Ich fahre.")],
    ],
)
def test_a_word_is_known_in_its_other_forms(skill, reply):
    assert find_fault("Could I have your help?", reply, skill, (skill,)) == ""
