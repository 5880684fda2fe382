"""What is asked, of how many at once, and what is asked again.

The logic is shown with a small stand-in for a model, whose answers are written down
here, and with the hand-set checkpoint.
"""

import threading
from collections import defaultdict

import make_demo
import plans
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import annotate_pgen
from annotate_pgen import MAX_TRIES, Annotator, DaemonExecutor, QwenPgen, SameThread

pytestmark = pytest.mark.usefixtures("short_prompt")


def say(user_prompt, robot_utterance="Okay."):
    return {"user_prompt": user_prompt, "robot_utterance": robot_utterance}


class ScriptedModel:
    """A stand-in for a model: answers by what a sample was prepared to.

    Args:
        script: for each prepared value its answers, in the order of the tries; a user
            prompt, or None for one that is not valid. The last one is repeated.
        leads_to: for a user prompt, the skill that --verify finds in it.
        temperature: as of a model.
    """

    concurrent = False
    batch_limit = 1000

    def __init__(self, script, leads_to=None, temperature=0.7):
        self.script = script
        self.leads_to = leads_to or {}
        self.temperature = temperature
        self.asked = defaultdict(int)
        # Of each call, what was asked and the number of tries it was told.
        self.calls = []
        self.questions = []

    def executor(self, calls_at_once):
        return SameThread()

    def answer(self, batch, tries=0):
        self.calls.append((list(batch), tries))
        dialogues = []
        for prepared in batch:
            answers = self.script[prepared]
            text = answers[min(self.asked[prepared], len(answers) - 1)]
            self.asked[prepared] += 1
            dialogues.append(say(text) if text else None)
        return dialogues

    def choose(self, questions, option_counts):
        self.questions.append(list(questions))
        choices = []
        for question, option_count in zip(questions, option_counts, strict=True):
            lines = question.splitlines()
            options = [line[3:] for line in lines if line[1:3] == ". "]
            assert len(options) == option_count
            (skill,) = {
                skill
                for said, skill in self.leads_to.items()
                if f'"{said}"' in question
            }
            choices.append(options.index(skill) if skill in options else -1)
        return choices


def annotate(model, samples, batch_size=100, **settings):
    """The dialogues of samples, each prepared to its index, and the annotator."""
    annotator = Annotator(model, batch_size, **settings)
    inputs = [(sample, sample.index) for sample in samples]
    finished = {}
    for dialogues in annotator.annotate(inputs):
        assert not finished.keys() & dialogues.keys()
        finished.update(dialogues)
    return finished, annotator


def samples_of(*skills, episode=0):
    """A sample of one episode for each skill."""
    names = tuple(dict.fromkeys(skills))
    return [
        plans.make_sample(skill, episode, index, episode_skills=names)
        for index, skill in enumerate(skills)
    ]


def prompts_of(finished):
    return {index: dialogue["user_prompt"] for index, dialogue in finished.items()}


# ------------------------------------------------------------------- batches, retries


def test_samples_are_asked_about_in_batches_in_order():
    model = ScriptedModel({index: [f"Take {index}."] for index in range(7)})
    finished, annotator = annotate(model, samples_of(*"abcdefg"), batch_size=3)
    assert model.calls == [([0, 1, 2], 0), ([3, 4, 5], 0), ([6], 0)]
    assert prompts_of(finished) == {index: f"Take {index}." for index in range(7)}
    assert annotator.progress == annotate_pgen.Progress(generated=7)


def test_what_failed_is_asked_again_with_the_next_batch():
    script = {index: [f"Take {index}."] for index in range(5)}
    script[1] = [None, None, "Take 1."]
    model = ScriptedModel(script)
    finished, annotator = annotate(model, samples_of(*"abcde"), batch_size=2)
    assert [batch for batch, _ in model.calls] == [[0, 1], [1, 2], [1, 3], [4]]
    assert prompts_of(finished)[1] == "Take 1."
    assert annotator.progress == annotate_pgen.Progress(generated=5, retried=2)


def test_a_sample_is_given_up_after_some_tries():
    model = ScriptedModel({0: [None], 1: ["Take it."]})
    finished, annotator = annotate(model, samples_of("a", "b"))
    assert list(finished) == [1]
    assert model.asked == {0: MAX_TRIES, 1: 1}
    progress = annotator.progress
    assert (progress.generated, progress.retried) == (1, MAX_TRIES - 1)
    assert list(progress.failed) == ["episode 0, frame 0"]


def test_a_sample_whose_image_is_broken_is_not_asked_about():
    model = ScriptedModel({0: ["Take it."], 2: ["Lift it."]})
    annotator = Annotator(model, batch_size=2)
    samples = samples_of("a", "b", "c")
    inputs = [(samples[0], 0), (samples[1], None), (samples[2], 2)]
    finished = {}
    for dialogues in annotator.annotate(inputs):
        finished.update(dialogues)
    assert model.calls == [([0, 2], 0)]
    assert list(finished) == [0, 2]
    assert list(annotator.progress.failed) == ["episode 0, frame 1"]


def test_nothing_to_do():
    model = ScriptedModel({})
    finished, annotator = annotate(model, [])
    assert finished == {}
    assert model.calls == []
    assert annotator.progress == annotate_pgen.Progress()


def test_at_temperature_0_a_call_holds_first_tries_or_repeats():
    """First tries are greedy. A repeat is sampled, as it would only repeat itself."""
    script = {index: [f"Take {index}."] for index in range(5)}
    script[0] = [None, None, "Take 0."]
    script[3] = [None, "Take 3."]
    model = ScriptedModel(script, temperature=0)
    finished, _ = annotate(model, samples_of(*"abcde"), batch_size=2)
    assert len(finished) == 5
    seen = set()
    for batch, tries in model.calls:
        repeated = [prepared in seen for prepared in batch]
        assert len(set(repeated)) == 1
        assert (tries > 0) == repeated[0]
        seen.update(batch)


@given(
    failures=st.lists(st.integers(0, MAX_TRIES + 1), max_size=12),
    batch_size=st.integers(1, 5),
    temperature=st.sampled_from([0, 0.7]),
)
def test_every_sample_is_asked_about_until_it_is_valid(
    failures, batch_size, temperature
):
    script = {}
    for index, count in enumerate(failures):
        script[index] = [None] * count + [f"Take {index}."]
    model = ScriptedModel(script, temperature=temperature)
    samples = samples_of(*["a"] * len(failures))
    finished, annotator = annotate(model, samples, batch_size)
    valid = {index for index, count in enumerate(failures) if count < MAX_TRIES}
    assert set(finished) == valid
    for index, count in enumerate(failures):
        assert model.asked[index] == min(count + 1, MAX_TRIES)
    progress = annotator.progress
    assert progress.generated == len(valid)
    assert len(progress.failed) == len(failures) - len(valid)
    assert sum(model.asked.values()) == len(failures) + progress.retried
    assert all(len(batch) <= batch_size for batch, _ in model.calls)


# ------------------------------------------------- the same words for different skills


def test_the_same_user_prompt_for_another_skill_of_the_episode_is_asked_again():
    model = ScriptedModel({0: ["Go on."], 1: ["go on!", "Lift it."]})
    finished, annotator = annotate(model, samples_of("grasp", "lift"))
    assert prompts_of(finished) == {0: "Go on.", 1: "Lift it."}
    assert annotator.progress.retried == 1
    assert "skill_recovered" not in finished[1]


def test_the_last_of_them_is_kept_if_nothing_better_comes():
    tries = ["Go on.", "GO ON", None, "Go on!"]
    model = ScriptedModel({0: ["Go on."], 1: tries})
    finished, _ = annotate(model, samples_of("grasp", "lift"))
    assert finished[1]["user_prompt"] == "Go on!"
    model = ScriptedModel({0: ["Go on."], 1: ["Go on.", "Go on!", None, None]})
    finished, annotator = annotate(model, samples_of("grasp", "lift"))
    assert finished[1]["user_prompt"] == "Go on!"
    assert annotator.progress.failed == {}


def test_the_same_skill_and_other_episodes_may_repeat_a_user_prompt():
    model = ScriptedModel({index: ["Go on."] for index in range(3)})
    samples = [
        *samples_of("grasp", "grasp"),
        plans.make_sample("lift", episode=1, index=2),
    ]
    finished, annotator = annotate(model, samples)
    assert len(finished) == 3
    assert annotator.progress.retried == 0


def test_what_an_earlier_run_generated_is_remembered():
    known, sample = samples_of("grasp", "lift")
    model = ScriptedModel({1: ["Go on.", "Lift it."]})
    annotator = Annotator(model, 10)
    annotator.remember(known, say("go on"))
    (first, second) = annotator.annotate([(sample, 1)])
    assert first == {}
    assert prompts_of(second) == {1: "Lift it."}


# --------------------------------------------------------------------------- --verify


LEADS_TO = {"Take it.": "grasp", "Lift it.": "lift", "Go on.": "reach", "Er.": "none"}


def test_an_answer_that_leads_elsewhere_is_asked_for_again():
    model = ScriptedModel(
        {0: ["Lift it.", "Er.", "Take it."], 1: ["Lift it."]}, LEADS_TO
    )
    finished, annotator = annotate(model, samples_of("grasp", "lift"), verify=True)
    assert finished[0] == {**say("Take it."), "skill_recovered": True}
    assert finished[1] == {**say("Lift it."), "skill_recovered": True}
    assert annotator.progress == annotate_pgen.Progress(generated=2, retried=2)
    # All user prompts of a call are asked about in one.
    assert [len(questions) for questions in model.questions] == [2, 1, 1]


@pytest.mark.parametrize(
    ("tries", "kept"),
    [
        (["Lift it."], "Lift it."),
        (["Lift it.", "Er.", "Go on.", "Lift it."], "Lift it."),
        (["Lift it.", "Go on.", None, None], "Go on."),
        ([None, None, None, "Er."], "Er."),
    ],
)
def test_the_last_valid_answer_is_kept_and_says_that_it_leads_elsewhere(tries, kept):
    model = ScriptedModel({0: tries}, LEADS_TO)
    samples = [plans.make_sample("grasp", episode_skills=("reach", "grasp", "lift"))]
    finished, annotator = annotate(model, samples, verify=True)
    assert finished == {0: {**say(kept), "skill_recovered": False}}
    assert model.asked[0] == MAX_TRIES
    assert annotator.progress.failed == {}


def test_a_call_without_any_valid_answer_is_not_verified():
    model = ScriptedModel({0: [None, "Take it."]}, LEADS_TO)
    finished, _ = annotate(model, samples_of("grasp"), verify=True)
    assert finished[0]["skill_recovered"] is True
    assert [len(questions) for questions in model.questions] == [1]


def test_verify_asks_about_the_user_prompt_and_the_skills_alone():
    model = ScriptedModel({0: ["Take it."]}, LEADS_TO)
    annotate(model, samples_of("grasp", "lift")[:1], verify=True, seed=3)
    ((question,),) = model.questions
    sample = samples_of("grasp", "lift")[0]
    options = annotate_pgen.list_options(sample, 3)
    assert question == annotate_pgen.construct_verify_prompt("Take it.", options)


@given(wanted=st.lists(st.sampled_from("abc"), min_size=1, max_size=8), data=st.data())
def test_what_is_recovered_is_what_the_model_says(wanted, data):
    """Each sample ends with its first answer that leads to its skill, else the last."""
    leads_to = {
        f"Do {letter}{number}.": letter for letter in "abcd" for number in range(60)
    }
    script = {}
    for index in range(len(wanted)):
        tries = []
        for number in range(MAX_TRIES):
            letter = data.draw(st.sampled_from(["a", "b", "c", "d", None]))
            tries.append(letter and f"Do {letter}{index * MAX_TRIES + number}.")
        script[index] = tries
    model = ScriptedModel(script, leads_to)
    samples = [
        plans.make_sample(skill, index=index, episode_skills=("a", "b", "c"))
        for index, skill in enumerate(wanted)
    ]
    finished, _ = annotate(model, samples, 3, verify=True)
    for index, skill in enumerate(wanted):
        said = [text for text in script[index] if text]
        right = [text for text in said if leads_to[text] == skill]
        if right:
            assert finished[index] == {**say(right[0]), "skill_recovered": True}
        elif said:
            assert finished[index] == {**say(said[-1]), "skill_recovered": False}
        else:
            assert index not in finished


def verified_with(path, samples, batch_size=50):
    """Annotate samples with a real model and --verify."""
    pgen = QwenPgen(str(path), "cpu", "float32")
    prepared = pgen.prepare([Image.new("RGB", (64, 64))], "Grasp it.")
    annotator = Annotator(pgen, batch_size, verify=True, seed=5)
    finished = {}
    for dialogues in annotator.annotate([(sample, prepared) for sample in samples]):
        finished.update(dialogues)
    return finished, annotator


@pytest.mark.parametrize("label", ["A", "C"])
def test_a_model_that_likes_a_letter_recovers_what_stands_there(label, built):
    """A third, where an episode has three skills: what chance gives, and no more."""
    shares = {label: 1.0}
    path = built(f"likes_{label}", make_demo.make_model, label_shares=shares)
    torch.manual_seed(0)
    samples = [
        plans.make_sample(
            "lift", index, index, episode_skills=("grasp", "lift", "place")
        )
        for index in range(30)
    ]
    finished, annotator = verified_with(path, samples)
    assert len(finished) == 30
    recovered = 0
    for sample in samples:
        options = annotate_pgen.list_options(sample, 5)
        expected = options["ABC".index(label)] == "lift"
        assert finished[sample.index]["skill_recovered"] is expected
        recovered += expected
    assert 4 < recovered < 16
    assert annotator.progress.retried == (30 - recovered) * (MAX_TRIES - 1)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_chosen_share_is_recovered(share, model, built):
    """The only skill of an episode is always found; with 26 others it is never A."""
    samples = []
    for index in range(12):
        names = ("lift",)
        if index >= 12 * share:
            names = tuple(f"step {number}" for number in range(25)) + names
        sample = plans.make_sample("lift", index, index, episode_skills=names)
        if len(names) == 1 or annotate_pgen.list_options(sample, 5)[0] != "lift":
            samples.append(sample)
    finished, _ = verified_with(model, samples)
    recovered = [finished[sample.index]["skill_recovered"] for sample in samples]
    assert sum(recovered) == 12 * share


# ------------------------------------------------------------ many requests under way


class SlowModel(ScriptedModel):
    """A stand-in for a server: each call waits until it is released.

    Args:
        script: as of ScriptedModel.
        held: the prepared values whose calls wait for `release`.
    """

    concurrent = True
    batch_limit = 1

    def __init__(self, script, held=()):
        super().__init__(script)
        self.lock = threading.Lock()
        self.release = {prepared: threading.Event() for prepared in held}
        # Calls that have begun and not ended, and the most there ever were.
        self.under_way = set()
        self.most = 0
        self.changed = threading.Condition(self.lock)

    def executor(self, calls_at_once):
        return DaemonExecutor(calls_at_once)

    def answer(self, batch, tries=0):
        (prepared,) = batch
        with self.changed:
            self.under_way.add(prepared)
            self.most = max(self.most, len(self.under_way))
            self.changed.notify_all()
        if prepared in self.release:
            assert self.release[prepared].wait(60)
        with self.changed:
            self.under_way.discard(prepared)
            return super().answer(batch, tries)

    def wait_for(self, *prepared):
        """Wait until just these calls are under way."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.under_way == set(prepared), 60)


def test_a_server_gets_as_many_requests_at_once_as_asked_for():
    model = SlowModel({index: [f"Take {index}."] for index in range(9)}, held=range(9))
    annotator = Annotator(model, batch_size=3)
    samples = samples_of(*["a"] * 9)
    finished = {}
    yielded = annotator.annotate([(sample, sample.index) for sample in samples])

    def run():
        for dialogues in yielded:
            finished.update(dialogues)

    thread = threading.Thread(target=run)
    thread.start()
    model.wait_for(0, 1, 2)
    # Whichever ends first makes room for the next.
    model.release[1].set()
    model.wait_for(0, 2, 3)
    for index in range(9):
        model.release[index].set()
    thread.join(60)
    assert sorted(finished) == list(range(9))
    assert model.most == 3
    assert all(len(batch) == 1 for batch, _ in model.calls)


def test_a_slow_request_holds_up_nobody():
    model = SlowModel({index: [f"Take {index}."] for index in range(20)}, held=[0])
    annotator = Annotator(model, batch_size=2)
    samples = samples_of(*["a"] * 20)
    finished = []
    for dialogues in annotator.annotate([(sample, sample.index) for sample in samples]):
        finished += dialogues
        if len(finished) == 19:
            # All others are there, while the first one is still waited for.
            model.wait_for(0)
            model.release[0].set()
    assert finished == [*range(1, 20), 0]


def test_a_server_is_asked_again_too():
    script = {index: [None, f"Take {index}."] for index in range(6)}
    script[4] = [None]
    finished, annotator = annotate(SlowModel(script), samples_of(*["a"] * 6), 3)
    assert sorted(finished) == [0, 1, 2, 3, 5]
    assert list(annotator.progress.failed) == ["episode 0, frame 4"]
    assert annotator.progress.retried == 5 + MAX_TRIES - 1


def test_an_error_of_a_call_ends_the_run_and_waits_for_no_other():
    class FailingModel(SlowModel):
        def answer(self, batch, tries=0):
            if batch == [2]:
                raise annotate_pgen.RunError("the server is gone")
            return super().answer(batch, tries)

    script = {index: [f"Take {index}."] for index in range(9)}
    model = FailingModel(script, held=[0])
    with pytest.raises(annotate_pgen.RunError, match="the server is gone"):
        annotate(model, samples_of(*["a"] * 9), batch_size=2)
    assert 8 not in model.asked
    model.wait_for(0)
    model.release[0].set()


# -------------------------------------------------------------------- a whole dataset


def test_dialogues_that_are_there_already_are_not_generated_again(dataset, model):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    opened = LeRobotDataset("a/b", root=dataset, video_backend="pyav")
    plan = annotate_pgen.make_plan(opened, sample_interval=0.5)
    pgen = QwenPgen(str(model), "cpu", "float32")
    known = {}
    for sample in plan.samples[:10]:
        known[sample.index] = say("Could you help me with this?")
    _, indices, lines = annotate_pgen.generate_synthetic_data(
        opened, pgen, plan, dialogues=known, verify=True
    )
    assert len(indices) == len(opened)
    assert len(lines) == len(plan.samples)
    for line, sample in zip(lines, plan.samples, strict=True):
        if sample.index in known:
            assert line["user_prompt"] == "Could you help me with this?"
            assert "skill_recovered" not in line
        else:
            assert line["user_prompt"] in make_demo.USER_PROMPTS
            assert isinstance(line["skill_recovered"], bool)


def test_a_dialogue_that_is_there_already_is_not_given_to_another_skill(dataset):
    """The stand-in says the same of everything, which was said of another skill."""
    from lerobot.datasets.lerobot_dataset import LeRobotDatasetMetadata

    meta = LeRobotDatasetMetadata("a/b", root=dataset)
    plan = annotate_pgen.make_plan(meta)
    first, *others = plan.episodes[0].samples
    other = next(one for one in others if one.skill_current != first.skill_current)
    known = {sample.index: say("Well.") for sample in plan.samples}
    del known[other.index]
    known[first.index] = say("Go on.")
    model = ScriptedModel({0: ["Go on.", "Lift it."]})
    model.prepare = lambda views, prompt: 0
    _, _, lines = annotate_pgen.generate_synthetic_data(
        meta, model, plan, dialogues=known
    )
    (line,) = [line for line in lines if line["user_prompt"] == "Lift it."]
    assert line["skill_current"] == other.skill_current
