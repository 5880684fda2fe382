"""Which frames are sampled, and what is asked about each: by example and property."""

import math
from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np
import pandas as pd
import plans
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import annotate_pgen
from annotate_pgen import EpisodeFrames, EpisodeSkills, InputError, Skill

RATES = st.sampled_from([5, 10, 15, 24, 25, 29.97, 30, 50, 60])
# Of a frame. None is near the tenth of a frame by which a skill may be late.
PARTS_OF_A_FRAME = st.sampled_from([0.0, 0.05, 0.3, 0.5, 0.95])


@st.composite
def skills_of_any_shape(draw, fps, frames=60):
    """Skills with gaps, overlaps, equal starts, starts before 0 or late, none long.

    They start before `frames`.
    """
    skills = []
    for number in range(draw(st.integers(1, 6))):
        frame = draw(st.integers(-2, frames - 1)) + draw(PARTS_OF_A_FRAME)
        length = draw(st.floats(0, 40))
        name = draw(st.sampled_from(plans.NAMES))
        skills.append((frame, number, Skill(name, frame / fps, (frame + length) / fps)))
    return EpisodeSkills("tidy up", tuple(skill for _, _, skill in sorted(skills)))


def skill_numbers_of(skills, length, fps):
    """The last skill that has started at each frame, before any the first."""
    numbers = []
    for frame in range(length):
        number = 0
        for candidate, skill in enumerate(skills):
            if skill.start * fps <= frame + 0.1:
                number = candidate
        numbers.append(number)
    return numbers


def check_grid(taken, length, interval, fps):
    """Check that frames are those at or after each multiple of an interval.

    Where a multiple is a tenth of a frame after a frame, so that rounding decides, it
    may be this frame or the next.
    """
    assert taken == sorted(set(taken))
    allowed = set()
    multiple = Fraction(0)
    while multiple * Fraction(fps) < length:
        exact = multiple * Fraction(fps) - Fraction(1, 10)
        choices = {
            max(0, math.ceil(exact - Fraction(1, 1000))),
            max(0, math.ceil(exact + Fraction(1, 1000))),
        }
        inside = {frame for frame in choices if frame < length}
        assert len(inside) < len(choices) or inside & set(taken)
        allowed |= inside
        multiple += Fraction(interval)
    assert set(taken) <= allowed


@pytest.mark.parametrize(
    ("fps", "interval", "length", "expected"),
    [
        (30, 1.0, 91, [0, 30, 60, 90]),
        (30, 0.5, 46, [0, 15, 30, 45]),
        (25, 0.5, 60, [0, 13, 25, 38, 50]),
        (10, 100.0, 50, [0]),
        (10, 0.1, 5, [0, 1, 2, 3, 4]),
        (10, 1e-320, 5, [0, 1, 2, 3, 4]),
        (10, 1e300, 5, [0]),
        (10, 0.3, 10, [0, 3, 6, 9]),
        (10, 1.0, 1, [0]),
    ],
)
def test_regular_grid(fps, interval, length, expected):
    seconds = (np.arange(length) / fps).astype(np.float32).astype(np.float64)
    assert annotate_pgen.sample_regularly(seconds, interval, fps) == expected


@given(fps=RATES, interval=st.floats(0.01, 20), length=st.integers(1, 300))
@settings(deadline=None)
def test_regular_grid_is_the_first_frame_at_or_after_each_multiple(
    fps, interval, length
):
    seconds = np.arange(length) / fps
    taken = annotate_pgen.sample_regularly(seconds, interval, fps)
    assert taken[0] == 0
    check_grid(taken, length, interval, fps)


def test_regular_grid_after_a_pause_in_the_recording():
    """A multiple that no frame follows closely is answered by the next one there is."""
    seconds = np.array([0.0, 0.1, 0.2, 2.7, 2.8, 3.05, 3.1])
    assert annotate_pgen.sample_regularly(seconds, 1.0, 10) == [0, 3, 5]


@pytest.mark.parametrize(
    ("starts", "expected"),
    [
        # Two skills, the second off the regular grid.
        ([0.0, 1.5], [0, 10, 15, 25]),
        # Two skills shorter than the interval.
        ([0.0, 0.4, 0.7], [0, 4, 7, 17, 27]),
        # One starts late: before it, its own frames count from the first one.
        ([0.5], [0, 10, 20]),
        # Equal starts, of which only the last is ever shown.
        ([0.0, 2.0, 2.0], [0, 10, 20]),
        # Two starts within a frame: the same.
        ([0.0, 2.01, 2.05], [0, 10, 20, 21]),
    ],
)
def test_aligned_grid(starts, expected):
    seconds = np.arange(30) / 10
    numbers = annotate_pgen.find_skill_numbers(seconds, starts, 10)
    assert annotate_pgen.sample_each_skill(seconds, numbers, 1.0, 10) == expected


@given(data=st.data(), fps=RATES, interval=st.floats(0.02, 5))
@settings(deadline=None)
def test_aligned_grid_starts_anew_at_each_skill(data, fps, interval):
    skills = data.draw(skills_of_any_shape(fps)).skills
    length = data.draw(st.integers(1, 80))
    numbers = skill_numbers_of(skills, length, fps)
    seconds = np.arange(length) / fps
    taken = annotate_pgen.sample_each_skill(seconds, np.array(numbers), interval, fps)
    for number in set(numbers):
        frames = [frame for frame in range(length) if numbers[frame] == number]
        inside = [frame - frames[0] for frame in taken if frame in frames]
        assert inside[0] == 0
        check_grid(inside, len(frames), interval, fps)


def reckon_late_frames(names, taken, length):
    """Frames with another skill's dialogue: each carries that of the sample before.

    Args:
        names: of the skill that each frame shows.
        taken: the sampled frames.
        length: of the episode, in frames.
    """
    late = 0
    for frame in range(length):
        carried = max(sample for sample in taken if sample <= frame)
        late += names[carried] != names[frame]
    return late


@given(
    data=st.data(),
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    fps=RATES,
    interval=st.floats(0.05, 5),
    offset=st.sampled_from([0.0, 0.25, 17.0]),
    align=st.booleans(),
    seed=st.integers(0, 9),
)
@settings(deadline=None)
def test_plan(data, lengths, fps, interval, offset, align, seed):
    skills = {}
    for episode_index in range(len(lengths)):
        skills[episode_index] = data.draw(skills_of_any_shape(fps))
    frames = plans.make_frames(lengths, fps, offset)
    episodes = annotate_pgen.plan_episodes(
        frames, skills, {}, fps, interval, seed, align
    )
    assert [episode.episode_index for episode in episodes] == list(range(len(lengths)))
    for episode, length in zip(episodes, lengths, strict=True):
        known = skills[episode.episode_index].skills
        names = tuple(skill.name for skill in known)
        numbers = skill_numbers_of(known, length, fps)
        assert episode.skill_names == names
        assert episode.skill_numbers.tolist() == numbers
        taken = [sample.frame_index for sample in episode.samples]
        assert taken[0] == 0
        if align:
            changes = {numbers.index(number) for number in numbers}
            assert changes <= set(taken)
        else:
            check_grid(taken, length, interval, fps)
        shown = [names[number] for number in numbers]
        figures = episode.figures
        assert figures.samples == len(taken)
        assert figures.frames == length
        assert figures.late_frames == reckon_late_frames(shown, taken, length)
        assert figures.skills == len(set(numbers))
        sampled = {numbers[frame] for frame in taken}
        assert figures.skills_without == len(set(numbers) - sampled)
        if align:
            assert figures.late_frames == figures.skills_without == 0
        for sample in episode.samples:
            number = numbers[sample.frame_index]
            assert sample.episode_id == episode.episode_index
            assert sample.index == episode.first_index + sample.frame_index
            stored = frames[sample.episode_id].frames["timestamp"]
            assert np.float32(sample.timestamp) == stored[sample.frame_index]
            assert sample.skill_current == names[number]
            assert sample.skill_history == names[:number]
            later = [name for name in names[number + 1 :] if name != names[number]]
            assert sample.next_skill == [*later, ""][0]
            assert set(sample.episode_skills) == set(names)
            assert len(sample.episode_skills) == len(set(names))
            assert sample.moment in annotate_pgen.MOMENTS
            suitable = annotate_pgen.SUITABLE_RESPONSES[sample.scenario_type]
            assert sample.response_type in suitable
            if sample.frame_index == 0:
                assert sample.scenario_type != "situated_correction"


def test_figures_of_the_other_grid_are_those_it_has_when_in_use():
    frames = plans.make_frames([60, 45], 10)
    skills = {0: plans.make_skills(0.0, 1.3, 1.7, 4.4), 1: plans.make_skills(0.6, 2.2)}
    regular = annotate_pgen.plan_episodes(frames, skills, {}, 10, 2.0, 0)
    aligned = annotate_pgen.plan_episodes(frames, skills, {}, 10, 2.0, 0, True)
    for one, other in zip(regular, aligned, strict=True):
        assert one.figures == other.figures_of_other_grid
        assert one.figures_of_other_grid == other.figures
    # Samples at 0, 2 and 4 s: the skills of 1.3 and 4.4 s have none.
    assert regular[0].figures == annotate_pgen.GridFigures(
        samples=3, frames=60, late_frames=7 + 16, skills=4, skills_without=2
    )
    plan = annotate_pgen.Plan(regular, [], [], None)
    total = plan.sum_figures()
    assert (total.samples, total.frames) == (6, 105)
    assert total.late_share == pytest.approx((23 + 18) / 105)
    assert plan.sum_figures_of_other_grid().late_share == 0


def test_a_skill_that_follows_itself_is_not_late():
    """What is carried is a dialogue about a skill of this name."""
    frames = plans.make_frames([40], 10)
    skills = {0: plans.make_skills(0.0, 1.5, 2.5, names=["push", "push", "pull"])}
    (episode,) = annotate_pgen.plan_episodes(frames, skills, {}, 10, 2.0, 0)
    assert episode.figures.late_frames == 15


def test_skill_boundaries_in_float32():
    """At nearly half of all k / 30 the float32 timestamp is below the start meant."""
    starts = [number / 30 for number in range(300)]
    (episode,) = annotate_pgen.plan_episodes(
        plans.make_frames([300], 30), {0: plans.make_skills(*starts)}, {}, 30, 1.0, 0
    )
    assert episode.skill_numbers.tolist() == list(range(300))


@pytest.mark.parametrize(
    ("seconds", "start", "end", "expected"),
    [
        (0.0, 0.0, 3.0, "just starting"),
        (0.9, 0.0, 3.0, "just starting"),
        (1.1, 0.0, 3.0, "in the middle"),
        (1.9, 0.0, 3.0, "in the middle"),
        (2.1, 0.0, 3.0, "about to end"),
        (3.0, 0.0, 3.0, "about to end"),
        (4.9, 5.0, 6.0, "just starting"),
        (5.0, 5.0, 5.0, "just starting"),
    ],
)
def test_moment(seconds, start, end, expected):
    assert annotate_pgen.find_moment(seconds, start, end) == expected


@given(data=st.data(), fps=RATES, length=st.integers(1, 80))
@settings(deadline=None)
def test_moments_follow_each_other_within_a_skill(data, fps, length):
    # As in any dataset that is not refused, each skill starts within the episode.
    skills = {0: data.draw(skills_of_any_shape(fps, frames=length))}
    (episode,) = annotate_pgen.plan_episodes(
        plans.make_frames([length], fps), skills, {}, fps, 0.001, 0
    )
    assert len(episode.samples) == length
    moments = defaultdict(list)
    for sample, number in zip(episode.samples, episode.skill_numbers, strict=True):
        moments[int(number)].append(annotate_pgen.MOMENTS.index(sample.moment))
    for of_skill in moments.values():
        assert of_skill == sorted(of_skill)
        if len(of_skill) > 3:
            assert set(of_skill) == {0, 1, 2}


def plan_tasks(descriptions, tasks, task_indices, coarse="coarse description"):
    """The tasks told about an episode for each description."""
    skills = {}
    for episode_index, description in enumerate(descriptions):
        only = (Skill("grasp", 0.0, 1.0),)
        skills[episode_index] = EpisodeSkills(description, only, coarse)
    frames = plans.make_frames([2] * len(descriptions), 10, tasks=task_indices)
    episodes = annotate_pgen.plan_episodes(frames, skills, tasks, 10, 1.0, 0)
    return [episode.samples[0].task_description for episode in episodes]


def test_task_is_the_description_then_the_frames_own_then_the_coarse_one():
    tasks = {0: "even", 1: "odd"}
    assert plan_tasks(["one", "", ""], tasks, [0, 1]) == ["one", "odd", "even"]
    assert plan_tasks(["one", "", ""], {}, [0]) == ["one"] + 2 * ["coarse description"]
    assert plan_tasks(["", ""], {}, [0], coarse="") == ["", ""]


def test_equal_descriptions_of_several_tasks_are_not_believed():
    """annotate.py writes the dataset's first task into every episode."""
    tasks = {0: "even", 1: "odd"}
    assert plan_tasks(["even"] * 3, tasks, [0, 1]) == ["even", "odd", "even"]
    # A frame whose task is not in the table has none of its own.
    assert plan_tasks(["even"] * 3, tasks, [0, 7]) == ["even"] * 3
    assert plan_tasks(["my words"] * 2, {0: "even"}, [0]) == ["my words"] * 2
    assert plan_tasks(["even", "mine"], tasks, [0, 1]) == ["even", "mine"]


def test_a_task_that_changes_within_an_episode():
    columns = {
        "episode_index": 0,
        "frame_index": range(4),
        "timestamp": np.arange(4, dtype=np.float32),
        "task_index": [0, 0, 1, 1],
    }
    frames = [EpisodeFrames(0, 0, pd.DataFrame(columns))]
    skills = {0: plans.make_skills(0.0, description="")}
    tasks = {0: "first", 1: "second"}
    (episode,) = annotate_pgen.plan_episodes(frames, skills, tasks, 1, 1.0, 0)
    told = [sample.task_description for sample in episode.samples]
    assert told == ["first", "first", "second", "second"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_unusable_timestamps_are_an_error_that_names_the_episode(bad):
    frames = plans.make_frames([4, 4], 10)
    frames[1].frames.loc[2, "timestamp"] = bad
    skills = {0: plans.make_skills(0.0), 1: plans.make_skills(0.0)}
    with pytest.raises(InputError, match="episode 1: its timestamps"):
        annotate_pgen.plan_episodes(frames, skills, {}, 10, 1.0, 0)


def spread(counts, names):
    """How far the counts of names lie apart."""
    numbers = [counts[name] for name in names]
    return max(numbers) - min(numbers)


def test_types_are_dealt_evenly_over_thousands_of_samples():
    frames = plans.make_frames([90] * 100, 10)
    skills = {index: plans.make_skills(0.0, 2.0, 5.0) for index in range(100)}
    episodes = annotate_pgen.plan_episodes(frames, skills, {}, 10, 0.1, 0)
    scenarios = defaultdict(Counter)
    responses = defaultdict(Counter)
    first_scenarios = Counter()
    for episode in episodes:
        first, *others = episode.samples
        first_scenarios[first.scenario_type] += 1
        for sample in others:
            scenarios[sample.skill_current][sample.scenario_type] += 1
        for sample in episode.samples:
            dealt = (sample.skill_current, sample.scenario_type)
            responses[dealt][sample.response_type] += 1
    assert sum(first_scenarios.values()) == 100
    others = set(annotate_pgen.SCENARIO_TYPES) - {"situated_correction"}
    assert set(first_scenarios) == others
    assert spread(first_scenarios, others) <= 1
    total = Counter()
    for of_skill in scenarios.values():
        assert spread(of_skill, annotate_pgen.SCENARIO_TYPES) <= 1
        total += of_skill
    assert total.total() == 8900
    assert spread(total, annotate_pgen.SCENARIO_TYPES) <= len(scenarios)
    for (_, scenario), counts in responses.items():
        suitable = annotate_pgen.SUITABLE_RESPONSES[scenario]
        assert set(counts) == set(suitable)
        assert spread(counts, suitable) <= 1


def test_types_depend_on_the_seed_and_nothing_else():
    frames = plans.make_frames([60] * 5, 10)
    skills = {index: plans.make_skills(0.0, 2.0, 4.0) for index in range(5)}
    first = annotate_pgen.plan_episodes(frames, skills, {}, 10, 0.5, 0)
    again = annotate_pgen.plan_episodes(frames, skills, {}, 10, 0.5, 0)
    other = annotate_pgen.plan_episodes(frames, skills, {}, 10, 0.5, 1)
    for one, same in zip(first, again, strict=True):
        assert one.samples == same.samples
    assert [one.samples for one in first] != [one.samples for one in other]


def test_types_come_in_no_fixed_order():
    dealer = annotate_pgen.TypeDealer(0)
    dealt = [dealer.deal("grasp", False)[0] for _ in range(500)]
    blocks = {tuple(dealt[start : start + 5]) for start in range(0, 500, 5)}
    assert all(len(set(block)) == 5 for block in blocks)
    assert len(blocks) > 30


def test_a_scenario_without_responses_of_its_own_takes_any(monkeypatch):
    monkeypatch.setattr(annotate_pgen, "SCENARIO_TYPES", {"plain": "It asks."})
    dealer = annotate_pgen.TypeDealer(0)
    dealt = [dealer.deal("grasp", number == 0) for number in range(40)]
    counts = Counter(response for _, response in dealt)
    assert counts == dict.fromkeys(annotate_pgen.RESPONSE_TYPES, 10)
