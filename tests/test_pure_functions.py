"""Skills, sampling, prompts, answers and the assignment of dialogues: by example and property."""

import json
import math
from collections import Counter, defaultdict

import make_demo
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import annotate_pgen as ap
from annotate_pgen import EpisodeSkills, InputError, RunError, Sample, Skill

NAMES = ("reach", "grasp", "lift", "place")
FPS = st.sampled_from([5, 10, 15, 24, 25, 29.97, 30, 50, 60])


def table(lengths, fps, offset=0.0, dtype=np.float32):
    """The frames of a dataset with the given episode lengths."""
    parts = []
    for episode, length in enumerate(lengths):
        frame = np.arange(length)
        stamps = (frame / fps + offset).astype(dtype)
        columns = {"episode_index": episode, "frame_index": frame, "timestamp": stamps}
        parts.append(pd.DataFrame(columns | {"task_index": episode % 2}))
    return pd.concat(parts, ignore_index=True)


def by_episode(frames):
    return frames.groupby("episode_index", sort=False)


def episode_skills(*starts, description="do it"):
    skills = [Skill(NAMES[i % 4], start, start + 1) for i, start in enumerate(starts)]
    return EpisodeSkills(description, tuple(skills), "all of it")


# ---------------------------------------------------------------- skills


def write(root, content):
    (root / "meta").mkdir(exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (root / "meta" / "skills.json").write_text(text, encoding="utf-8")
    return root


def test_skills_unsorted_gaps_overlaps_late_start(tmp_path):
    skills = [("c", 5, 6), ("a", 0.5, 3), ("b", 2, 4), ("b", 2, 2)]
    content = make_demo.skills_of([10, 10], skills=skills)
    loaded = ap.load_skills(write(tmp_path, content), [0, 1])
    assert [s.name for s in loaded[1].skills] == ["a", "b", "b", "c"]
    assert loaded[0].skills[0] == Skill("a", 0.5, 3.0)
    assert loaded[0].coarse_description == "tidy up the table"


def test_skills_byte_order_mark_and_other_episodes(tmp_path):
    content = make_demo.skills_of([1] * 5)
    write(tmp_path, "\ufeff" + json.dumps(content))
    assert list(ap.load_skills(tmp_path, [3])) == [3]


@given(name=st.text(min_size=1).filter(lambda s: s.strip()))
def test_any_skill_name_survives(tmp_path_factory, name):
    root = tmp_path_factory.mktemp("skills")
    content = make_demo.skills_of([1], tasks=[name], skills=[(name, 0, 1)])
    try:
        loaded = ap.load_skills(write(root, content), [0])
    except InputError as error:
        assert any("\ud800" <= c <= "\udfff" for c in name), error
    else:
        assert loaded[0].skills[0].name == name == loaded[0].description


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    "fps, interval, length, expected",
    [
        (30, 1.0, 91, [0, 30, 60, 90]),
        (30, 0.5, 46, [0, 15, 30, 45]),
        (25, 0.5, 60, [0, 13, 25, 38, 50]),
        (10, 100.0, 50, [0]),
        (10, 0.1, 5, [0, 1, 2, 3, 4]),
        (10, 1e-300, 5, [0, 1, 2, 3, 4]),
        (10, 1e300, 5, [0]),
        (10, 0.3, 10, [0, 3, 6, 9]),
    ],
)
def test_grid(fps, interval, length, expected):
    seconds = (np.arange(length) / fps).astype(np.float32).astype(np.float64)
    assert ap.sampled_frames(seconds, interval, fps) == expected


@given(fps=FPS, interval=st.floats(0.01, 20), length=st.integers(1, 400), offset=st.floats(0, 50))
def test_grid_is_the_first_frame_at_or_after_each_multiple(fps, interval, length, offset):
    frames = table([length], fps, offset, np.float64)
    seconds = frames["timestamp"].to_numpy() - frames["timestamp"][0]
    taken = ap.sampled_frames(seconds, interval, fps)
    assert taken[0] == 0 and taken == sorted(set(taken))
    tolerance = 0.1 / fps
    multiples = np.arange(math.floor((seconds[-1] + tolerance) / interval) + 1) * interval
    edge = np.abs((seconds[:, None] + tolerance) - multiples[None]).min() < 1e-9
    late = seconds[:, None] >= multiples[None] - tolerance
    expected = sorted({int(np.flatnonzero(column)[0]) for column in late.T if column.any()})
    assert edge or taken == expected


@given(
    lengths=st.lists(st.integers(1, 80), min_size=1, max_size=6),
    fps=FPS,
    interval=st.floats(0.05, 5),
    offset=st.sampled_from([0.0, 0.25, 17.0]),
    starts=st.lists(st.floats(0, 6), min_size=1, max_size=5),
    seed=st.integers(0, 9),
)
@settings(deadline=None)
def test_plan(lengths, fps, interval, offset, starts, seed):
    skills = {e: episode_skills(*sorted(starts)) for e in range(len(lengths))}
    frames = table(lengths, fps, offset)
    samples, ranks = ap.plan_samples(by_episode(frames), skills, {}, fps, interval, seed)
    assert len(ranks) == len(frames)
    assert [s.index for s in samples] == sorted({s.index for s in samples})
    first = np.cumsum([0, *lengths])
    assert {s.episode_id for s in samples} == set(range(len(lengths)))
    assert set(first[:-1]) <= {s.index for s in samples}, "first frames"
    for sample in samples:
        assert sample.index == first[sample.episode_id] + sample.frame_index
        known = skills[sample.episode_id].skills
        elapsed = sample.frame_index / fps
        started = [s for s in known if s.start <= elapsed + 0.1 / fps - 1e-6]
        surely = [s for s in known if s.start <= elapsed + 0.1 / fps + 1e-6]
        assert len(started) - 1 <= sample.skill_rank <= max(len(surely) - 1, 0)
        assert sample.skill_current == known[sample.skill_rank].name
        assert sample.skill_history == tuple(s.name for s in known[: sample.skill_rank])
        assert ranks[sample.index] == sample.skill_rank
        assert sample.response_type in ap.SUITABLE_RESPONSES[sample.scenario_type]
        if sample.frame_index == 0:
            assert sample.scenario_type != "situated_correction"


def test_skill_boundaries_in_float32():
    """At nearly half of all k / 30 the float32 timestamp lies below the start meant."""
    seconds = (np.arange(300) / 30).astype(np.float32).astype(np.float64)
    skills = [Skill("a", 0, 1)] + [Skill("b", k / 30, 9) for k in range(1, 300)]
    frames = pd.DataFrame({"episode_index": 0, "frame_index": range(300), "timestamp": seconds})
    known = {0: EpisodeSkills("", tuple(skills))}
    _, ranks = ap.plan_samples(by_episode(frames.assign(task_index=0)), known, {}, 30, 1.0, 0)
    assert ranks.tolist() == list(range(300))


def test_task_of_a_sample():
    frames, tasks = table([3, 3, 3], 10), {0: "even", 1: "odd"}
    skills = {0: episode_skills(0.0), 1: episode_skills(0.0, description="")}
    skills[2] = episode_skills(0.0, description="")
    samples, _ = ap.plan_samples(by_episode(frames), skills, tasks, 10, 1.0, 0)
    assert [s.task_description for s in samples] == ["do it", "odd", "even"]
    samples, _ = ap.plan_samples(by_episode(frames), skills, {}, 10, 1.0, 0)
    assert [s.task_description for s in samples] == ["do it", "all of it", "all of it"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_unusable_timestamps(bad):
    frames = table([4, 4], 10)
    frames.loc[6, "timestamp"] = bad
    skills = {0: episode_skills(0.0), 1: episode_skills(0.0)}
    with pytest.raises(InputError, match="episode 1: its timestamps"):
        ap.plan_samples(by_episode(frames), skills, {}, 10, 1.0, 0)


def test_types_are_dealt_evenly():
    skills = {e: episode_skills(0.0, 2.0, 4.0) for e in range(40)}
    samples, _ = ap.plan_samples(by_episode(table([60] * 40, 10)), skills, {}, 10, 0.5, 0)
    by_skill = defaultdict(Counter)
    for sample in samples:
        if sample.frame_index:
            by_skill[sample.skill_current][sample.scenario_type] += 1
    for counted in by_skill.values():
        assert set(counted) == set(ap.SCENARIO_TYPES)
        assert max(counted.values()) - min(counted.values()) <= 1
    again, _ = ap.plan_samples(by_episode(table([60] * 40, 10)), skills, {}, 10, 0.5, 0)
    other, _ = ap.plan_samples(by_episode(table([60] * 40, 10)), skills, {}, 10, 0.5, seed=1)
    assert again == samples != other


# ---------------------------------------------------------------- prompt


def test_prompt_asks_for_the_assigned_types():
    for scenario, responses in ap.SUITABLE_RESPONSES.items():
        for response in responses:
            prompt = ap.construct_prompt("tidy", ["reach"], "grasp it", scenario, response)
            assert ap.SCENARIO_TYPES[scenario] in prompt
            assert ap.RESPONSE_TYPES[response] in prompt
    assert set(ap.RESPONSE_TYPES) == {r for rs in ap.SUITABLE_RESPONSES.values() for r in rs}


def test_prompt_with_three_arguments():
    prompt = ap.construct_prompt("tidy up", [f"step {i}" for i in range(9)], "grasp")
    assert "tidy up" in prompt and "grasp" in prompt
    assert "step 8" in prompt and "step 3" not in prompt, "only the last few"
    assert "nothing yet" in ap.construct_prompt("", [], "grasp")


@given(st.text(), st.lists(st.text(), max_size=7), st.text())
def test_prompt_takes_any_text(task, history, skill):
    prompt = ap.construct_prompt(task, history, skill, "specific_object", "confirmation")
    assert len(prompt.splitlines()) == len(ap.PROMPT.splitlines())
    assert prompt.endswith('{"user_prompt": "...", "robot_utterance": "..."}')
    prompt.encode("utf-8")


# ---------------------------------------------------------------- answers

GOOD = {"user_prompt": "Can you grab the pink brick?", "robot_utterance": "Sure, I'll take it."}


@pytest.mark.parametrize("said", ["Sure", "No", "Now", "Done", "So"])
def test_short_answers_are_no_echo(said):
    assert ap.parse_answer(json.dumps({"user_prompt": "Take it.", "robot_utterance": said}))


def test_good_answers():
    assert ap.parse_answer(json.dumps(GOOD)) == GOOD
    assert ap.parse_answer(json.dumps(GOOD) + "\nI hope that helps {") == GOOD
    padded = {"user_prompt": "  Nimm den Stein, bitte. ", "robot_utterance": "好的,马上。"}
    assert ap.parse_answer(json.dumps(padded))["user_prompt"] == "Nimm den Stein, bitte."
    assert ap.parse_answer(json.dumps(GOOD | {"more": [1]})) == GOOD


@pytest.mark.parametrize(
    "change",
    [
        {"user_prompt": ""},
        {"user_prompt": "   "},
        {"user_prompt": "..."},
        {"user_prompt": "…"},
        {"user_prompt": None},
        {"user_prompt": ["Take it."]},
        {"user_prompt": 5},
        {"user_prompt": "two\nlines"},
        {"user_prompt": "two\u2028lines"},
        {"user_prompt": "a bell \x07"},
        {"user_prompt": "x" * 301},
        {"user_prompt": "broken \ud800 half"},
        {"user_prompt": "broken \N{REPLACEMENT CHARACTER}"},
        {"user_prompt": "sure, I'LL take it."},
        {"user_prompt": "<|im_end|>take it"},
        {"user_prompt": '{"user_prompt": "Take it."}'},
        {"user_prompt": "The person names the object or the action plainly."},
        {"user_prompt": "what a person says that makes this skill the right thing to do now."},
        {"robot_utterance": ""},
        {"robot_utterance": "robot_utterance"},
    ],
)
def test_bad_values(change):
    assert ap.parse_answer(json.dumps(GOOD | change)) is None


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "Sure!", '{"user_prompt": "', '{"user_prompt": "Take it."}', "[" * 100000],
)
def test_broken_answers(text):
    assert ap.parse_answer(text) is None


@given(st.integers(0, 90))
def test_cut_off_answers(length):
    text = json.dumps(GOOD)
    assert ap.parse_answer(text[: min(length, len(text) - 1)]) is None


@given(st.text())
def test_any_answer_is_dropped_or_sane(text):
    for answer in (text, ap.PREFILL + text, json.dumps(GOOD | {"user_prompt": text})):
        dialogue = ap.parse_answer(answer)
        if dialogue is not None:
            assert list(dialogue) == list(GOOD)
            line = ap.json_line(dialogue)
            assert len(line.splitlines()) == 1 and json.loads(line) == dialogue
            line.encode("utf-8")


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.text(), max_size=3))
def test_json_lines_stay_lines(entry):
    line = ap.json_line(entry)
    assert len(line.splitlines()) == 1 and json.loads(line) == entry


# ---------------------------------------------------------------- assignment


def samples_of(*episodes):
    """Samples of episodes given as skill letters: samples_of("aab", "b")."""
    flat = [(e, i, letter) for e, word in enumerate(episodes) for i, letter in enumerate(word)]
    return [
        Sample(e, i, float(i), letter, (), "task", index=n) for n, (e, i, letter) in enumerate(flat)
    ]


def test_each_carries_its_own():
    samples = samples_of("aab", "b")
    assert ap.assign_dialogues(samples, [0, 1, 2, 3]) == [0, 1, 2, 3]


def test_failed_samples_carry_the_nearest():
    samples = samples_of("abbab")
    assert ap.assign_dialogues(samples, [0, 1, 3]) == [0, 1, 1, 3, 1], "same skill before nearer"
    assert ap.assign_dialogues(samples, [2, 3]) == [2, 2, 2, 3, 2]
    assert ap.assign_dialogues(samples, [3, 4]) == [3, 3, 3, 3, 4]


def test_a_failed_episode_borrows():
    samples = samples_of("ab", "ab", "ab", "c")
    assert ap.assign_dialogues(samples, [0, 1, 4, 5, 6])[2:4] == [0, 5]
    assert ap.assign_dialogues(samples, [0, 6])[2:4] == [0, 0], "the rest of it as in any episode"
    with pytest.raises(RunError, match=r"episode \[3\]"):
        ap.assign_dialogues(samples, [0, 1, 2, 3])


@given(st.lists(st.text("abc", min_size=1, max_size=9), min_size=1, max_size=5), st.data())
def test_assignment(words, data):
    samples = samples_of(*words)
    answered = sorted(data.draw(st.sets(st.sampled_from(range(len(samples))))))
    try:
        carried = ap.assign_dialogues(samples, answered)
    except RunError:
        return
    assert len(carried) == len(samples) and set(carried) <= set(answered)
    assert all(carried[i] == i for i in answered)
    for i, c in enumerate(carried):
        episode = [j for j in answered if samples[j].episode_id == samples[i].episode_id]
        if episode:
            assert c in episode
            assert c <= i or min(episode) > i, "an earlier one before any later"


@given(st.lists(st.text("abc", min_size=1, max_size=9), min_size=1, max_size=4), st.data())
@settings(deadline=None)
def test_table_and_indices(words, data):
    samples = samples_of(*words)
    texts = st.sampled_from(["yes", "no", "maybe"])
    progress = ap.Progress(
        {s.index: {"user_prompt": data.draw(texts), "robot_utterance": "ok"} for s in samples}
    )
    plan = ap.Plan(samples, np.zeros(len(samples) + 3, int), [])
    tasks, indices, lines = ap.tabulate(plan, progress)
    assert tasks["task_index"].tolist() == list(range(len(tasks)))
    assert indices.dtype == np.int64 and len(indices) == len(samples) + 3
    assert not tasks.drop(columns="task_index").duplicated().any()
    seen = list(dict.fromkeys(indices.tolist()))
    assert seen == list(range(len(tasks))), "counted in dataset order"
    for line, index in zip(lines, indices.tolist(), strict=False):
        assert line["task_index_high_level"] == index
        assert tasks.loc[index, "user_prompt"] == line["user_prompt"]
        assert tasks.loc[index, "skill"] == line["skill_current"]


@given(st.lists(st.integers(), max_size=40), st.integers(1, 9))
@settings(deadline=None)
def test_read_ahead_keeps_order_and_bound(items, size):
    made = []

    def source():
        for item in items:
            made.append(item)
            yield item

    for count, item in enumerate(ap.read_ahead(source(), size)):
        assert item == items[count] and len(made) <= count + size + 1
    assert made == items


def test_read_ahead_passes_errors_on():
    def source():
        yield 1
        raise OSError("gone")

    reader = ap.read_ahead(source(), 4)
    assert next(reader) == 1
    with pytest.raises(OSError, match="gone"):
        next(reader)
