"""What the model is asked, and the errors about a prompt that somebody has edited."""

import re

import plans
import pytest
from hypothesis import given
from hypothesis import strategies as st

import annotate_pgen
from annotate_pgen import (
    MOMENTS,
    RESPONSE_TYPES,
    SCENARIO_TYPES,
    SUITABLE_RESPONSES,
    InputError,
    construct_prompt,
)

PAIRS = [
    (scenario, response)
    for scenario, responses in SUITABLE_RESPONSES.items()
    for response in responses
]
EXAMPLE = re.compile(r'Example: "(.+)"$')
GERMAN = """\
Du schreibst, was ein Mensch zu dem Roboter auf dem Bild sagt.
Aufgabe: {task}. Jetzt: {skill}. {scenario} {response}
Antworte als JSON: {{"user_prompt": "...", "robot_utterance": "..."}}"""


def examples_of(types):
    """The example in the rule of each type."""
    return {name: EXAMPLE.search(rule)[1] for name, rule in types.items()}


def test_three_arguments_are_enough():
    prompt = construct_prompt("tidy up", ["reach", "grasp"], "lift the brick")
    assert "tidy up" in prompt
    assert "reach; grasp" in prompt
    assert "lift the brick" in prompt
    assert '{"user_prompt": "...", "robot_utterance": "..."}' in prompt
    for rule in (*SCENARIO_TYPES.values(), *RESPONSE_TYPES.values()):
        assert rule not in prompt


def test_only_the_last_skills_are_told():
    history = [f"step {number}" for number in range(9)]
    prompt = construct_prompt("tidy up", history, "grasp")
    told = [name for name in history if name in prompt]
    assert told == history[-annotate_pgen.HISTORY_LENGTH :]


def test_what_is_not_known_is_said_in_words():
    bare = construct_prompt("", [], "grasp")
    full = construct_prompt("tidy up", ["reach"], "grasp", next_skill="lift")
    assert len(bare.splitlines()) == len(full.splitlines())
    for line, template in zip(
        bare.splitlines(), annotate_pgen.PROMPT.splitlines(), strict=True
    ):
        assert line == template or not line.rstrip().endswith(":")


@pytest.mark.parametrize(("scenario", "response"), PAIRS)
def test_prompt_has_the_rules_of_the_dealt_types_and_no_others(scenario, response):
    prompt = construct_prompt("tidy up", ["reach"], "grasp", scenario, response)
    rules = [*SCENARIO_TYPES.values(), *RESPONSE_TYPES.values()]
    shown = [rule for rule in rules if rule in prompt]
    assert shown == [SCENARIO_TYPES[scenario], RESPONSE_TYPES[response]]


@pytest.mark.parametrize("moment", MOMENTS)
def test_prompt_of_a_sample_has_all_that_is_known_of_it(moment):
    sample = plans.make_sample(
        "grasp the brick",
        scenario_type="negative_task",
        response_type="acknowledgment",
        next_skill="lift the brick",
        moment=moment,
    )
    assert "grasp the brick" in sample.prompt
    assert "lift the brick" in sample.prompt
    assert moment in sample.prompt
    assert SCENARIO_TYPES["negative_task"] in sample.prompt
    assert RESPONSE_TYPES["acknowledgment"] in sample.prompt


def test_an_unknown_type_is_an_error():
    with pytest.raises(KeyError, match="specfic_object"):
        construct_prompt("tidy up", [], "grasp", "specfic_object")


@given(
    task=st.text(),
    history=st.lists(st.text(), max_size=7),
    skill=st.text(),
    next_skill=st.text(),
)
def test_prompt_takes_any_text(task, history, skill, next_skill):
    prompt = construct_prompt(
        task, history, skill, "specific_object", "confirmation", next_skill
    )
    assert len(prompt.splitlines()) == len(annotate_pgen.PROMPT.splitlines())
    assert prompt.endswith('{"user_prompt": "...", "robot_utterance": "..."}')
    assert annotate_pgen.one_line(skill) in prompt
    prompt.encode("utf-8")


@pytest.mark.parametrize(("scenario", "response"), PAIRS)
def test_a_filled_prompt_is_short_enough_for_a_small_model(scenario, response):
    skill = "robot arm places the pink lego brick into the transparent box"
    prompt = construct_prompt(
        task="put all of the lego bricks on the table into the transparent box",
        history=[skill] * 9,
        skill=skill,
        scenario_type=scenario,
        response_type=response,
        next_skill=skill,
        moment="about to end",
    )
    assert len(prompt.split()) <= 350


def test_the_types_of_the_specification_are_there():
    assert set(SCENARIO_TYPES) == {
        "specific_object",
        "negative_task",
        "situated_correction",
        "implicit_request",
        "constraint_based",
    }
    assert set(RESPONSE_TYPES) == {
        "confirmation",
        "clarification",
        "acknowledgment",
        "constraint_acknowledgment",
    }
    assert {response for _, response in PAIRS} == set(RESPONSE_TYPES)
    assert set(SUITABLE_RESPONSES) == set(SCENARIO_TYPES)


def test_a_clarification_is_dealt_only_where_words_leave_something_open():
    with_clarification = {
        scenario for scenario, response in PAIRS if response == "clarification"
    }
    assert with_clarification == {"situated_correction", "implicit_request"}


def test_each_type_has_one_example_that_would_be_a_valid_dialogue():
    asked = examples_of(SCENARIO_TYPES)
    replied = examples_of(RESPONSE_TYPES)
    examples = [*asked.values(), *replied.values()]
    assert len(set(examples)) == len(SCENARIO_TYPES) + len(RESPONSE_TYPES)
    for rule in (*SCENARIO_TYPES.values(), *RESPONSE_TYPES.values()):
        assert rule.count("Example:") == 1
    for example in examples:
        assert len(example) < annotate_pgen.MAX_LENGTH / 3
    for reply in replied.values():
        assert not annotate_pgen.only_asks(reply)


def test_an_edited_prompt_is_what_is_asked(monkeypatch):
    monkeypatch.setattr(annotate_pgen, "PROMPT", GERMAN)
    annotate_pgen.check_prompt()
    prompt = plans.make_sample("den Stein greifen").prompt
    assert "Jetzt: den Stein greifen." in prompt
    assert prompt.endswith('{"user_prompt": "...", "robot_utterance": "..."}')


@pytest.mark.parametrize(
    "name",
    [
        "PROMPT",
        "PREFILL",
        "HISTORY_LENGTH",
        "SCENARIO_TYPES",
        "RESPONSE_TYPES",
        "SUITABLE_RESPONSES",
        "VERIFY_PROMPT",
    ],
)
def test_all_that_is_asked_is_among_the_settings(name, monkeypatch):
    """So that a run with another prompt does not go on from this one's dialogues."""
    before = annotate_pgen.prompt_settings()
    assert before == annotate_pgen.prompt_settings()
    value = getattr(annotate_pgen, name)
    if isinstance(value, str):
        edited = value + " "
    elif isinstance(value, int):
        edited = value + 1
    else:
        edited = dict(list(value.items())[1:])
    monkeypatch.setattr(annotate_pgen, name, edited)
    after = annotate_pgen.prompt_settings()
    changed = [key for key in before if before[key] != after[key]]
    assert changed == [name]
    assert annotate_pgen.first_difference(before, after).startswith(name)


def without(table, *names):
    return {name: value for name, value in table.items() if name not in names}


def test_the_prompt_as_it_stands_is_valid():
    annotate_pgen.check_prompt()


@pytest.mark.parametrize(
    ("name", "edited", "named"),
    [
        ("PROMPT", "Now: {skil}. Before: {history}", "{skil}"),
        ("PROMPT", "Now: {skill}. {}", "{}"),
        ("PROMPT", "Now: {skill}. {0}", "{0}"),
        ("PROMPT", "Now: {skill.name}", "{skill.name}"),
        ("PROMPT", 'Now: {skill}. JSON: {"user_prompt": "..."}', '{"user_prompt"}'),
        ("PROMPT", "Now: {history}", "{skill}"),
        ("PROMPT", "Now: {{skill}}", "{skill}"),
        ("PROMPT", "Now: {skill", "'}'"),
        ("PROMPT", "Now: {skill}}", "'}'"),
        ("PROMPT", "Now: {skill: it}", "{skill}"),
        ("PROMPT", "Now: {skill!x}", "{skill}"),
        ("PROMPT", "", "{skill}"),
        ("VERIFY_PROMPT", "Which of {options}?", "{user_prompt}"),
        ("VERIFY_PROMPT", "Which is {user_prompt}?", "{options}"),
        ("VERIFY_PROMPT", "{user_prompt} {options} {skill}", "{skill}"),
        ("VERIFY_PROMPT", "{user_prompt} {options} {", "'{'"),
        ("SCENARIO_TYPES", {}, "first sample"),
        ("SCENARIO_TYPES", {"situated_correction": "..."}, "first sample"),
        ("RESPONSE_TYPES", {}, "empty"),
        ("SUITABLE_RESPONSES", {"specfic_object": ("confirmation",)}, "specfic_object"),
        ("SUITABLE_RESPONSES", {"specific_object": ()}, "specific_object"),
        ("SUITABLE_RESPONSES", {"specific_object": ("confirm",)}, "confirm"),
    ],
)
def test_an_error_names_just_what_is_wrong(name, edited, named, monkeypatch):
    monkeypatch.setattr(annotate_pgen, name, edited)
    with pytest.raises(InputError) as raised:
        annotate_pgen.check_prompt()
    place, _, rest = str(raised.value).partition(": ")
    problem, _, remedy = rest.partition("; ")
    assert place == name
    assert named in problem
    assert remedy
    mentioned = re.findall(r"{[^}]*}", problem)
    assert mentioned == ([named] if named.startswith("{") else [])


def test_a_removed_type_is_named_where_it_is_still_dealt(monkeypatch):
    fewer = without(RESPONSE_TYPES, "clarification")
    monkeypatch.setattr(annotate_pgen, "RESPONSE_TYPES", fewer)
    with pytest.raises(InputError, match="SUITABLE_RESPONSES: 'clarification'"):
        annotate_pgen.check_prompt()
    monkeypatch.setattr(annotate_pgen, "RESPONSE_TYPES", RESPONSE_TYPES)
    fewer = without(SCENARIO_TYPES, "constraint_based")
    monkeypatch.setattr(annotate_pgen, "SCENARIO_TYPES", fewer)
    with pytest.raises(InputError, match="SUITABLE_RESPONSES: 'constraint_based'"):
        annotate_pgen.check_prompt()


def test_verify_prompt_lists_the_options_under_letters():
    question = annotate_pgen.construct_verify_prompt(
        "Take the {brick}.", ["reach", "lift\nit", "{place}"]
    )
    assert "\nA. reach\nB. lift it\nC. {place}\n" in question
    assert '"Take the {brick}."' in question


@given(
    others=st.sets(st.text("abcdefg ", min_size=1), max_size=40),
    index=st.integers(0, 5),
    seed=st.integers(0, 5),
)
def test_options_are_the_episodes_skills(others, index, seed):
    episode_skills = ("the one", *sorted(others))
    sample = plans.make_sample("the one", index=index, episode_skills=episode_skills)
    options = annotate_pgen.list_options(sample, seed)
    assert "the one" in options
    assert set(options) <= set(episode_skills)
    assert len(options) == len(set(options)) == min(len(episode_skills), 26)
    assert options == annotate_pgen.list_options(sample, seed)


def test_options_are_shuffled_for_each_sample():
    """So that a model that likes one letter is right no more often than by chance."""
    places = []
    for index in range(900):
        sample = plans.make_sample("b", index=index, episode_skills=("a", "b", "c"))
        places.append(annotate_pgen.list_options(sample, 0).index("b"))
    for place in range(3):
        assert 250 < places.count(place) < 350
    other = plans.make_sample("b", index=0, episode_skills=tuple("abcdefgh"))
    orders = {tuple(annotate_pgen.list_options(other, seed)) for seed in range(9)}
    assert len(orders) > 1
