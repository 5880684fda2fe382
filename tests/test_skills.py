"""Skills: how they are checked, counted and recorded, without a dataset."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

import annotate_pgen as ap

FPS = 10.0
SECONDS = st.floats(0, 100, allow_nan=False).map(lambda value: round(value, 3))


def found(*entries):
    return ap.FoundSkills("somewhere: episode 3", list(entries))


def episode(*times):
    skills = tuple(ap.Skill(f"skill {i}", *pair) for i, pair in enumerate(times))
    return ap.EpisodeSkills("", skills)


# ---------------------------------------------------------------- checks


@given(st.lists(st.tuples(SECONDS, SECONDS), min_size=1))
def test_skills_are_sorted_by_start_and_none_is_lost(times):
    entries = [(f"skill {i}", min(t), max(t)) for i, t in enumerate(times)]
    skills = ap.check_skills(found(*entries)).skills
    starts = [skill.start for skill in skills]
    assert starts == sorted(starts)
    assert sorted((s.name, s.start, s.end) for s in skills) == sorted(entries)


def test_skills_that_start_together_keep_their_order():
    entries = [("b", 1, 2), ("a", 1, 1), ("c", 0, 1)]
    skills = ap.check_skills(found(*entries)).skills
    assert [skill.name for skill in skills] == ["c", "b", "a"]


def test_texts_beside_the_skills_are_kept():
    entry = ap.FoundSkills("x", [("reach", 0, 1)], "stack the bricks", "tidy up")
    checked = ap.check_skills(entry)
    assert checked.description == "stack the bricks"
    assert checked.coarse_description == "tidy up"


@pytest.mark.parametrize(
    "name", ["", " \n", None, 7, b"reach", "lone \ud800", math.nan]
)
def test_a_skill_needs_a_name(name):
    with pytest.raises(ap.InputError, match=r"episode 3: skill 1 .*needs a name; "):
        ap.check_skills(found(("reach", 0, 1), (name, 1, 2)))


@pytest.mark.parametrize(
    "start, end",
    [
        (2.0, 1.0),
        (math.nan, 1.0),
        (0.0, math.inf),
        (-math.inf, 0.0),
        (0, 10**400),
        (None, 1.0),
        (0.0, None),
        ("0", 1.0),
        (False, True),
    ],
)
def test_a_skill_needs_finite_times_in_order(start, end):
    with pytest.raises(ap.InputError, match=r"skill 1 .*finite start <= end; "):
        ap.check_skills(found(("reach", 0, 1), ("lift", start, end)))


# ---------------------------------------------------------------- wrong units


@given(
    st.integers(20, 2000),
    st.sampled_from([10.0, 15.0, 30.0, 50.0]),
    st.lists(st.floats(0, 0.98), min_size=1, max_size=8),
    st.floats(0.3, 0.98),
)
def test_frames_are_recognized(length, fps, shares, last_share):
    starts = sorted(int(share * length) for share in [*shares, last_share])
    remedy = ap.guess_remedy(starts, length / fps, fps, seconds_before=0.0)
    assert remedy == f"they look like frames, not seconds; divide them by {fps:g} fps"


@given(
    st.integers(20, 2000),
    st.integers(1, 10**6),
    st.sampled_from([10.0, 15.0, 30.0, 50.0]),
    st.lists(st.floats(0, 0.98), min_size=1, max_size=8),
)
def test_seconds_from_the_datasets_start_are_recognized(length, before, fps, shares):
    starts = sorted((before + share * length) / fps for share in shares)
    remedy = ap.guess_remedy(starts, length / fps, fps, before / fps)
    assert remedy.startswith("they look like seconds from the dataset's start; ")
    assert f"subtract the {before / fps:g} s" in remedy


@pytest.mark.parametrize(
    "starts",
    [
        [0.0, 2.0, 6.0],  # seconds, the last a little too late
        [0.0, 12.5, 40.25],  # neither whole nor in range
        [0, 5000, 9000],  # milliseconds
    ],
)
def test_nothing_is_guessed_where_nothing_fits(starts):
    remedy = ap.guess_remedy(starts, 5.0, FPS, seconds_before=3.0)
    assert remedy == "correct them, in seconds from the episode's first frame"


# ---------------------------------------------------------------- forms


@given(st.lists(SECONDS, min_size=1), SECONDS)
def test_each_skill_ends_where_the_next_one_starts(starts, duration):
    names = [f"skill {i}" for i in range(len(starts))]
    entries = ap.entries_up_to_the_next(names, starts, duration)
    assert sorted(name for name, _, _ in entries) == sorted(names)
    for (_, _, end), (_, next_start, _) in pairwise(entries):
        assert end == next_start
    _, last_start, last_end = entries[-1]
    assert last_start == max(starts)
    assert last_end == max(duration, last_start)


@given(st.lists(st.integers(-1, 3), min_size=1, max_size=200))
def test_runs_cover_an_episode_without_gap(values):
    timestamps = [7.0 + row / FPS for row in range(len(values))]
    runs = ap.runs_of_equal_values(values, timestamps, FPS)
    assert runs[0][1] == 0.0
    assert runs[-1][2] == len(values) / FPS
    for (value, _, end), (next_value, start, _) in pairwise(runs):
        assert end == start
        assert value != next_value
    for row, value in enumerate(values):
        last_started = [run for run in runs if run[1] <= row / FPS + 0.01][-1]
        assert last_started[0] == value


def test_float32_timestamps_become_plain_seconds():
    assert ap.seconds_between(0.0, 1.2000000476837158) == 1.2
    assert ap.seconds_between(0.10000000149011612, 1.2000000476837158) == 1.1


# ---------------------------------------------------------------- irregularities


@pytest.mark.parametrize(
    "times, expected",
    [
        ([(0.0, 1.0), (1.0, 2.0)], (0, 0, 0)),
        ([(0.005, 1.0), (1.005, 2.0), (1.995, 3.0)], (0, 0, 0)),
        ([(0.5, 1.0)], (1, 0, 0)),
        ([(0.0, 1.0), (1.5, 2.0), (3.0, 4.0)], (0, 2, 0)),
        ([(0.0, 1.0), (0.5, 2.0)], (0, 0, 1)),
        # The long first skill covers what would be a gap between the others.
        ([(0.0, 9.0), (1.0, 2.0), (4.0, 5.0), (9.5, 10.0)], (0, 1, 2)),
    ],
)
def test_irregularities(times, expected):
    counted = ap.count_irregularities([episode(*times)], FPS)
    assert counted == ap.SkillIrregularities(*expected)


def test_irregularities_add_up_over_episodes():
    episodes = [episode((0.5, 1.0), (2.0, 3.0)), episode((0.3, 1.0), (0.8, 3.0))]
    assert ap.count_irregularities(episodes, FPS) == ap.SkillIrregularities(2, 1, 1)


@given(st.lists(SECONDS, min_size=2, max_size=9, unique=True))
def test_contiguous_skills_have_no_irregularities(times):
    times = [0.0, *sorted(times)]
    pairs = list(pairwise(times))
    counted = ap.count_irregularities([episode(*pairs)], FPS)
    assert counted == ap.SkillIrregularities()


# ---------------------------------------------------------------- fingerprint


def source(name="meta/skills.json", end=1.0, description="", others=()):
    skills = (ap.Skill("reach", 0.0, end),)
    episodes = {2: ap.EpisodeSkills(description, skills)}
    return ap.SkillSource(name, episodes, others)


def test_fingerprint_tells_what_was_loaded_and_from_where():
    fingerprint = ap.skills_fingerprint(source())
    assert len(fingerprint) == 64
    assert fingerprint == ap.skills_fingerprint(source())
    different = [source(name="other"), source(end=2.0), source(description="stack")]
    assert len({fingerprint, *map(ap.skills_fingerprint, different)}) == 4


def test_fingerprint_ignores_what_was_not_read_and_the_order_of_episodes():
    assert ap.skills_fingerprint(source()) == ap.skills_fingerprint(
        source(others=("subtask_index",))
    )
    one = episode((0.0, 1.0))
    two = episode((0.0, 2.0))
    forward = ap.SkillSource("x", {0: one, 1: two})
    backward = ap.SkillSource("x", {1: two, 0: one})
    assert ap.skills_fingerprint(forward) == ap.skills_fingerprint(backward)


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_fingerprint_takes_any_name(name):
    skills = (ap.Skill(name, 0.0, 1.0),)
    named = ap.SkillSource("x", {0: ap.EpisodeSkills("", skills)})
    assert int(ap.skills_fingerprint(named), 16) >= 0
