"""Which dialogue each frame carries, and the tables and figures that say so."""

import json
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import plans
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import annotate_pgen
from annotate_pgen import RunError, assign_dialogues, build_results

EPISODES = st.lists(st.text("abc", min_size=1, max_size=9), min_size=1, max_size=5)
TEXTS = st.sampled_from(["Take it.", "Lift it.", "Put it down."])


def say(user_prompt="Take it.", robot_utterance="Okay.", **more):
    return {"user_prompt": user_prompt, "robot_utterance": robot_utterance, **more}


def carried_by(episodes, answered):
    """For each sample, by its index, that of the sample whose dialogue is carried."""
    plan = plans.make_plan(*episodes)
    dialogues = {index: say() for index in answered}
    sources = assign_dialogues(plan, dialogues)
    assert list(sources) == [sample.index for sample in plan.samples]
    return [source.index for source in sources.values()]


def test_each_sample_carries_its_own():
    assert carried_by(["aab", "b"], [0, 1, 2, 3]) == [0, 1, 2, 3]


def test_a_failed_sample_carries_the_nearest_earlier_of_its_skill():
    assert carried_by(["abbab"], [0, 1, 3]) == [0, 1, 1, 3, 1]
    assert carried_by(["aba"], [0, 1]) == [0, 1, 0]


def test_else_the_nearest_earlier_of_another_skill_else_the_nearest_later():
    assert carried_by(["abcc"], [0, 1]) == [0, 1, 1, 1]
    assert carried_by(["abbab"], [2, 3]) == [2, 2, 2, 3, 2]
    assert carried_by(["abbab"], [3, 4]) == [3, 3, 3, 3, 4]


def test_a_failed_episode_borrows_from_others():
    episodes = ["ab", "ab", "ab", "c"]
    assert carried_by(episodes, [0, 1, 4, 5, 6])[2:4] == [0, 5]
    # What cannot be borrowed is filled in as in any episode.
    assert carried_by(episodes, [0, 6])[2:4] == [0, 0]
    assert carried_by(episodes, [1, 6])[2:4] == [1, 1]


def test_what_is_borrowed_is_spread_over_what_there_is():
    carried = carried_by(["aaaa", "aaaaaaaa"], [0, 1, 2, 3])
    assert Counter(carried[4:]) == {0: 2, 1: 2, 2: 2, 3: 2}


def test_nothing_is_borrowed_from_another_task():
    plan = plans.make_plan("a", "a")
    samples = plan.episodes[1].samples
    samples[0] = replace(samples[0], task_description="another task")
    with pytest.raises(RunError, match=r"episode \[1\]"):
        assign_dialogues(plan, {0: say()})


def test_episodes_that_are_left_without_any_are_all_named():
    with pytest.raises(RunError, match=r"episode \[1, 3\]"):
        carried_by(["ab", "c", "ab", "d"], [0, 1])


def carries_as_the_design_says(plan, dialogues, sources):
    """Whether each sample carries what the five rules of the design give it."""
    by_skill = defaultdict(set)
    for sample in plan.samples:
        if sample.index in dialogues:
            by_skill[sample.skill_current].add(sample.index)
    for episode in plan.episodes:
        samples = episode.samples
        own = [sample.index in dialogues for sample in samples]
        # Where none succeeded, those stand in that other episodes can lend something.
        sound = (
            own
            if any(own)
            else [sample.skill_current in by_skill for sample in samples]
        )
        for number, sample in enumerate(samples):
            source = sources[sample.index]
            if own[number]:
                assert source is sample
                continue
            if sound[number]:
                assert source.index in by_skill[sample.skill_current]
                continue
            earlier = [place for place in range(number) if sound[place]]
            alike = [
                place
                for place in earlier
                if samples[place].skill_current == sample.skill_current
            ]
            if alike:
                nearest = alike[-1]
            elif earlier:
                nearest = earlier[-1]
            else:
                nearest = sound.index(True)
            assert source is sources[samples[nearest].index]


@given(episodes=EPISODES, data=st.data())
def test_assignment_follows_the_design(episodes, data):
    plan = plans.make_plan(*episodes)
    indices = [sample.index for sample in plan.samples]
    answered = data.draw(st.sets(st.sampled_from(indices)))
    dialogues = {index: say() for index in answered}
    known_skills = {
        sample.skill_current for sample in plan.samples if sample.index in answered
    }
    hopeless = []
    for episode in plan.episodes:
        if not known_skills & set(episode.skill_names):
            hopeless.append(episode.episode_index)
    if hopeless:
        with pytest.raises(RunError) as raised:
            assign_dialogues(plan, dialogues)
        assert f"episode {hopeless}" in str(raised.value)
        return
    carries_as_the_design_says(plan, dialogues, assign_dialogues(plan, dialogues))


@given(episodes=EPISODES, span=st.integers(1, 3), data=st.data())
@settings(deadline=None)
def test_every_frame_points_at_the_row_of_what_it_carries(episodes, span, data):
    plan = plans.make_plan(*episodes, span=span)
    dialogues = {}
    for sample in plan.samples:
        if data.draw(st.booleans()):
            dialogues[sample.index] = say(data.draw(TEXTS), data.draw(TEXTS))
    try:
        sources = assign_dialogues(plan, dialogues)
    except RunError:
        return
    results = build_results(plan, dialogues)
    tasks = results.tasks
    assert list(tasks.columns) == ["task_index", *annotate_pgen.TASK_COLUMNS]
    assert tasks["task_index"].tolist() == list(range(len(tasks)))
    assert list(tasks.index) == list(range(len(tasks)))
    assert not tasks.drop(columns="task_index").duplicated().any()
    assert results.task_indices.dtype == np.int64
    assert len(results.task_indices) == plan.frame_count
    # A line for each dialogue, in dataset order; rows are counted as they first occur.
    rows = [line["task_index_high_level"] for line in results.annotations]
    assert list(dict.fromkeys(rows)) == list(range(len(tasks)))
    answered = [sample for sample in plan.samples if sample.index in dialogues]
    for line, sample in zip(results.annotations, answered, strict=True):
        row = tasks.loc[line["task_index_high_level"]]
        assert line["episode_id"] == sample.episode_id
        assert row["skill"] == line["skill_current"] == sample.skill_current
        for key in ("user_prompt", "robot_utterance"):
            assert row[key] == line[key] == dialogues[sample.index][key]
    late = 0
    for sample in plan.samples:
        source = sources[sample.index]
        for frame in range(sample.index, sample.index + span):
            row = tasks.loc[results.task_indices[frame]]
            assert row["user_prompt"] == dialogues[source.index]["user_prompt"]
            assert row["robot_utterance"] == dialogues[source.index]["robot_utterance"]
            assert row["skill"] == source.skill_current
            late += source.skill_current != sample.skill_current
    assert results.late_share == pytest.approx(late / plan.frame_count)


def test_late_share_counts_the_frames_between_samples_too():
    skills = {0: plans.make_skills(0.0, 1.5)}
    frames = plans.make_frames([30], 10)
    episodes = annotate_pgen.plan_episodes(frames, skills, {}, 10, 1.0, 0)
    plan = annotate_pgen.Plan(episodes, [], [], None)
    dialogues = {sample.index: say() for sample in plan.samples}
    assert list(dialogues) == [0, 10, 20]
    assert build_results(plan, dialogues).late_share == pytest.approx(5 / 30)
    del dialogues[20]
    assert build_results(plan, dialogues).late_share == pytest.approx(15 / 30)


def test_a_dialogue_for_two_skills_has_two_rows():
    plan = plans.make_plan("aba")
    results = build_results(plan, dict.fromkeys(range(3), say()))
    assert results.task_indices.tolist() == [0, 1, 0]
    assert results.tasks["skill"].tolist() == ["a", "b"]


def test_an_annotation_has_the_keys_of_the_specification_in_order():
    plan = plans.make_plan("a")
    keys = [
        "episode_id",
        "frame_index",
        "timestamp",
        "skill_current",
        "skill_history",
        "task_description",
        "scenario_type",
        "response_type",
        "user_prompt",
        "robot_utterance",
    ]
    (line,) = build_results(plan, {0: say()}).annotations
    assert list(line) == [*keys, "task_index_high_level"]
    verified = {0: say(skill_recovered=False)}
    (line,) = build_results(plan, verified).annotations
    assert list(line) == [*keys, "skill_recovered", "task_index_high_level"]
    assert line["skill_recovered"] is False
    assert json.loads(annotate_pgen.json_line(line)) == line


def line_of(user_prompt, robot_utterance, scenario="specific_object", recovered=None):
    line = {"scenario_type": scenario, **say(user_prompt, robot_utterance)}
    if recovered is not None:
        line["skill_recovered"] = recovered
    return line


def test_figures_of_quality():
    lines = [
        line_of("Take it.", "Okay."),
        line_of("Take it.", "Okay."),
        line_of("Take it.", "Just to confirm, this one. Right?"),
        line_of("Lift it.", "好的。对吗\uff1f"),
    ]
    figures = dict(annotate_pgen.measure_quality(lines))
    assert figures == {
        "different pairs": "3 of 4",
        "different user prompts": "2 of 4",
        "most frequent user prompt": '"Take it.", 3 of 4',
        "replies that end in a question": "50.0%",
    }


def test_share_recovered_is_by_scenario_type_and_of_what_was_verified():
    lines = [
        line_of("Take it.", "Okay.", recovered=True),
        line_of("Take it.", "Okay.", recovered=True),
        line_of("Take it.", "Okay.", recovered=False),
        line_of("Take it.", "Okay.", "implicit_request", recovered=False),
        line_of("Take it.", "Okay.", "implicit_request"),
        line_of("Take it.", "Okay.", "negative_task"),
    ]
    figures = dict(annotate_pgen.measure_quality(lines))
    recovered = {name: value for name, value in figures.items() if "recovered" in name}
    assert recovered == {
        "skill recovered": "50.0% of 4",
        "skill recovered, specific_object": "66.7% of 3",
        "skill recovered, implicit_request": "0.0% of 1",
    }


def test_types_are_counted_by_name():
    lines = [line_of("Take it.", "Okay.", name) for name in ("b", "a", "b")]
    counts = annotate_pgen.count_types(lines, "scenario_type")
    assert counts == [("a", 1), ("b", 2)]


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"])),
        st.text() | st.integers() | st.lists(st.text(), max_size=2),
        max_size=3,
    )
)
def test_a_json_line_is_a_line_for_every_reader(entry):
    line = annotate_pgen.json_line(entry)
    assert line.endswith("\n")
    assert len(line.splitlines()) == 1
    assert json.loads(line) == entry
    line.encode("utf-8")


def test_a_json_line_keeps_letters_readable():
    line = annotate_pgen.json_line({"said": "Größe 积木 \u2028 \x85 \ud800"})
    assert "Größe 积木" in line
    assert "\\u2028" in line
    assert "\\u0085" in line
    assert "\\ud800" in line
