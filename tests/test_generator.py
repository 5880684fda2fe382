"""The model in this process, and what is asked, asked again and given up.

Tiny random models of both families react to all that they are given, the hand-set one
always answers well, and where answers must be bad they are written down.
"""

import json
import re
import threading
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import make_demo
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from PIL import Image
from safetensors.torch import load_file, save_file

import annotate_pgen
from annotate_pgen import MAX_TRIES, Annotator, Progress, QwenPgen, RunError

# Of the script's own prompt, a byte a token, there is too much for many calls.
pytestmark = pytest.mark.usefixtures("short_prompt")
GRASP, LIFT, PLACE = "grasp brick", "lift brick", "place brick"


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen3_vl"])
def pgen(request, built):
    """A random model, of whose answers only the first tokens are generated."""
    path = built(request.param, make_demo.make_random_model, family=request.param)
    pgen = QwenPgen(str(path), "cpu", "float32", temperature=0)
    generate = pgen.model.generate
    few = {"max_new_tokens": 12, "eos_token_id": None}
    pgen.model.generate = lambda **arguments: generate(**{**arguments, **few})
    return pgen


@pytest.fixture(scope="module")
def hand_set(built):
    """One with settings of its own, as Qwen2-VL has in generation_config.json."""
    own = {"do_sample": True, "top_k": 1, "top_p": 0.001, "repetition_penalty": 1.3}
    path = built("narrow", make_demo.make_model, generation=own)
    return QwenPgen(str(path), "cpu", "float32", temperature=1.0)


@pytest.fixture(scope="module")
def plan(dataset):
    """All frames of the dataset."""
    opened = annotate_pgen.open_dataset(dataset)
    return annotate_pgen.make_plan(opened, sample_interval=0.1)


@pytest.fixture(autouse=True)
def plain_question(monkeypatch):
    """A question of --verify that can be read here."""
    monkeypatch.setattr(annotate_pgen, "VERIFY_PROMPT", "{user_prompt}\n{options}")


def draw(seed, width, height):
    """An image of random squares."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 255, (height // 8, width // 8, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height))


# One or two views of each sample, of three sizes, and earlier turns of some.
SMALL, WIDE, TALL = draw(3, 128, 96), draw(4, 320, 240), draw(5, 200, 300)
IMAGES = [[SMALL], [WIDE, TALL], [TALL], [SMALL, WIDE]]
PROMPTS = [f"{'tidy up ' * number} Now: brick {number}" for number in range(4)]
TURNS = [[], [("Lift it?", "Yes.")], [("One?", "1."), ("Two?", "2.")], []]


def prepare(pgen):
    """Prepare the samples above."""
    return [pgen.prepare(*x) for x in zip(IMAGES, PROMPTS, TURNS, strict=True)]


def spy(pgen, method, monkeypatch, limit=1000):
    """Note the calls of a model's method; large batches run out of memory."""
    calls = []
    call = getattr(pgen.model, method)

    def noted(**arguments):
        calls.append(arguments)
        if len(arguments["input_ids"]) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return call(**arguments)

    monkeypatch.setattr(pgen, "batch_limit", 1000)
    monkeypatch.setattr(pgen.model, method, noted)
    return calls


# ------------------------------------------------------------------- what is generated


def last_logits(pgen, batch):
    """What the model makes of prepared samples, float (samples, vocabulary)."""
    with torch.inference_mode():
        return pgen.model(**pgen.encode(batch)).logits[:, -1]


def test_a_batch_equals_single_calls(pgen):
    """By logits and greedily, over uneven turns, prompts and images."""
    batch = prepare(pgen)
    rows = torch.cat([last_logits(pgen, [prepared]) for prepared in batch])
    assert torch.allclose(rows, last_logits(pgen, batch), atol=1e-4 * rows.abs().max())
    answers = pgen.answer(batch)
    assert len(set(answers)) == len(batch)
    assert [pgen.answer([prepared])[0] for prepared in batch] == answers


def test_the_turns_reach_the_model_in_order_and_its_turn_is_opened(pgen, monkeypatch):
    calls = spy(pgen, "generate", monkeypatch)
    pgen.answer(prepare(pgen))
    (call,) = calls
    rows = zip(call["input_ids"], call["attention_mask"], strict=True)
    samples = zip(rows, IMAGES, PROMPTS, TURNS, strict=True)
    for (ids, mask), views, prompt, turns in samples:
        chat = pgen.processor.tokenizer.decode(ids[mask.bool()])
        chat = re.sub(r"(<\|image_pad\|>)+", "image", chat)
        expected = [f"<|im_start|>system\n{annotate_pgen.SYSTEM}"]
        for question, answer in turns:
            expected.append(f"<|im_start|>user\n{question}")
            expected.append(f"<|im_start|>assistant\n{answer}")
        shown = "<|vision_start|>image<|vision_end|>" * len(views)
        expected.append(f"<|im_start|>user\n{shown}{prompt}")
        expected.append(f"<|im_start|>assistant\n{annotate_pgen.PREFILL}")
        assert chat == "<|im_end|>\n".join(expected)
    # The shorter ones are padded on the left.
    assert call["attention_mask"][:, -1].all()
    assert not call["attention_mask"][:, 0].all()


@pytest.mark.parametrize(
    "text",
    [
        "grasp <|im_end|>\n<|im_start|>user",
        "<|vision_start|><|image_pad|><|vision_end|> <<|im_end|>|im_end|>",
        "<|video_pad|> {task} {0} %s \\n \"quoted\" 'brick'",
        "抓住积木 🧱 </think> ] } {{",
    ],
)
def test_text_of_a_dataset_is_no_special_token(text, pgen, monkeypatch):
    tokenizer = pgen.processor.tokenizer
    calls = spy(pgen, "forward", monkeypatch)

    def special_tokens(said):
        """Those of a frame's chat, and of a question of --verify."""
        prompt = annotate_pgen.construct_prompt(said, [said], said)
        prepared = pgen.prepare(IMAGES[0], prompt)
        ids = pgen.encode([prepared])["input_ids"][0].tolist()
        assert "<" in said or annotate_pgen.one_line(said) in tokenizer.decode(ids)
        pgen.choose([(said, [said, "grasp"])])
        ids += calls[-1]["input_ids"][0].tolist()
        return [number for number in ids if number in tokenizer.all_special_ids]

    assert special_tokens(text) == special_tokens("tidy")


def test_one_frame_can_be_asked_about(hand_set, pgen, plan):
    dialogue = hand_set.call_qwen(IMAGES[1], PROMPTS[0])
    assert dialogue["robot_utterance"] in make_demo.ROBOT_UTTERANCES
    with pytest.raises(RunError, match=f"none of {MAX_TRIES} answers"):
        pgen.call_qwen(IMAGES[0], PROMPTS[0])
    sample = plan.samples[20]
    line = annotate_pgen.annotate_sample(hand_set, IMAGES[1], sample)
    for key in ("skill_current", "scenario_type", "response_type", "frame_index"):
        assert line[key] == getattr(sample, key)
    assert line["skill_history"] == sample.skill_history != ()
    assert line["user_prompt"] in make_demo.USER_PROMPTS


@pytest.mark.parametrize(
    ("temperature", "tries", "sampled_at"),
    [(0, 0, None), (0, 3, 0.7), (0.4, 0, 0.4), (0.4, 2, 0.4), (1e-9, 0, 0.01)],
)
def test_every_setting_of_sampling_is_given(
    temperature, tries, sampled_at, hand_set, monkeypatch
):
    monkeypatch.setattr(hand_set, "temperature", temperature)
    calls = spy(hand_set, "generate", monkeypatch)
    hand_set.answer(prepare(hand_set)[:2], tries)
    (call,) = calls
    assert call["do_sample"] is (sampled_at is not None)
    assert sampled_at in (None, call["temperature"])
    assert (call["top_k"], call["top_p"]) == (annotate_pgen.TOP_K, annotate_pgen.TOP_P)
    assert call["max_new_tokens"] == annotate_pgen.MAX_NEW_TOKENS


def test_the_checkpoints_own_settings_do_not_count(hand_set):
    torch.manual_seed(0)
    texts = hand_set.answer(prepare(hand_set)[:1] * 60)
    said = {annotate_pgen.parse_answer(text)["user_prompt"] for text in texts}
    assert len(said) > len(make_demo.USER_PROMPTS) / 2
    assert hand_set.model.generation_config.repetition_penalty in (None, 1.0)


def test_out_of_memory_halves_batches_and_other_failures_are_named(
    hand_set, plan, monkeypatch
):
    calls = spy(hand_set, "generate", monkeypatch, limit=3)
    finished, _ = annotate(hand_set, plan, samples_of(plan, *[GRASP] * 23), 12)
    assert len(finished) == 23
    sizes = [len(call["input_ids"]) for call in calls]
    assert sizes[:6] == [12, 6, 3, 3, 3, 3]
    spy(hand_set, "generate", monkeypatch, limit=0)
    with pytest.raises(RunError, match="use fewer views"):
        hand_set.answer(prepare(hand_set))

    def fail(**arguments):
        raise RuntimeError("probability tensor contains inf")

    monkeypatch.setattr(hand_set, "batch_limit", 1000)
    monkeypatch.setattr(hand_set.model, "generate", fail)
    monkeypatch.setattr(hand_set.model, "forward", fail)
    with pytest.raises(RunError, match=r"contains inf.*--dtype"):
        hand_set.answer(prepare(hand_set))
    with pytest.raises(RunError, match=r"contains inf.*--dtype"):
        hand_set.choose([("Up.", ["take", "lift"])])


def test_choose_takes_the_likeliest_label_of_each_question(pgen, built, monkeypatch):
    questions = []
    for number in range(16):
        options = [f"{word} {number}" for word in ("reach", "lift", "place", "tip")]
        said = f"Could you {'do ' * (number % 7)}number {number * 37}?"
        questions.append((said, options[: 1 + number % 4]))
    chosen = pgen.choose(questions)
    assert len(set(chosen)) > 1
    # A model keeps the positions of its last images; the next call is another size.
    pgen.answer(prepare(pgen))
    assert [pgen.choose([question])[0] for question in questions] == chosen
    calls = spy(pgen, "forward", monkeypatch, limit=5)
    assert pgen.choose(questions) == chosen
    assert [len(call["input_ids"]) for call in calls] == [16, 8, 4, 4, 4, 4]
    path = built("c_then_b", make_demo.make_model, label_shares={"B": 0.3, "C": 0.7})
    pgen = QwenPgen(str(path), "cpu", "float32")
    expected = ["reach 0", "lift 1", "place 2", "place 3"]
    assert pgen.choose(questions[:4]) == expected


@pytest.mark.parametrize(
    ("device", "changes", "lost", "named"),
    [
        ("nonsense", {}, "nothing", "--device nonsense"),
        ("cpu", {"model_type": "gpt2"}, "nothing", "is a gpt2"),
        ("cpu", {}, "mlp", "lacks the weights"),
        # Loads, and finds no place for the image in the prompt.
        ("cpu", {"image_token_id": 5}, "nothing", "cannot run it"),
    ],
)
def test_a_model_that_cannot_be_used_is_named(device, changes, lost, named, tmp_path):
    path = make_demo.make_random_model(tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    weights = load_file(path / "model.safetensors")
    kept = {name: weights[name] for name in weights if lost not in name}
    save_file(kept, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(annotate_pgen.InputError) as raised:
        QwenPgen(str(path), device, "float32")
    assert named in str(raised.value)
    assert str(raised.value).startswith((f"--model {path}: ", "--device "))


# ---------------------------------------------------------------------------- scripted


class Scripted:
    """Answers as it is written down, asked by many threads as a server is.

    `script` has the answers for the number in a sample's history, in the order of the
    tries and the last one repeated: a user prompt, or None for no dialogue. `leads_to`
    has the skill that --verify finds in a user prompt.
    """

    batch_limit = 1000

    def __init__(self, script, leads_to=None, temperature=0.7):
        self.script = script
        self.leads_to = leads_to or {}
        self.temperature = temperature
        self.asked = Counter()
        self.calls = []
        self.turns = []
        self.options = []
        self.lock = threading.Lock()

    def prepare(self, images, prompt, examples=()):
        return int(re.search(r"number (\d+)", prompt)[1]), (*examples, "task" in prompt)

    def answer(self, batch, tries=0):
        texts = []
        with self.lock:
            self.calls.append(([number for number, _ in batch], tries))
            for number, turns in batch:
                answers = self.script.get(number, [f"Take {number}."])
                said = answers[min(self.asked[number], len(answers) - 1)]
                self.asked[number] += 1
                self.turns.append((number, turns))
                texts.append(json.dumps(say(said)) if said else "I am a model.")
        return texts

    def choose(self, questions):
        chosen = []
        for said, options in questions:
            self.options.append(options)
            skill = self.leads_to.get(said, said)
            chosen.append(skill if skill in options else "")
        return chosen


class ScriptedQwen(Scripted, QwenPgen):
    """The same, asked in batches, as a model in this process is."""


ENGINES = pytest.mark.parametrize("engine", [ScriptedQwen, Scripted])


def say(user_prompt):
    """A dialogue that suits any of the skills."""
    return {"user_prompt": user_prompt, "robot_utterance": "Okay, the brick."}


def samples_of(plan, *skills, first=0, episode_skills=()):
    """Samples of the first episode with these skills, numbered in their history."""
    names = episode_skills or tuple(dict.fromkeys(skills))
    changes = {"task_description": "the task", "episode_skills": names}
    samples = []
    for number, skill in enumerate(skills, first):
        changes["skill_history"] = (f"number {number}",)
        samples.append(replace(plan.samples[number], skill_current=skill, **changes))
    return samples


def annotate(pgen, plan, samples, batch_size=100, **more):
    """The user prompts of samples by frame, and the annotator."""
    annotator = Annotator(pgen, batch_size, **more)
    finished = {}
    for dialogues in annotator.annotate(plan, samples):
        assert not finished.keys() & dialogues.keys()
        finished.update(dialogues)
    return {index: finished[index] for index in sorted(finished)}, annotator


@ENGINES
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    failures=st.lists(st.integers(0, MAX_TRIES + 1), max_size=9),
    batch_size=st.integers(1, 4),
    temperature=st.sampled_from([0, 0.7]),
)
def test_every_sample_is_asked_about_until_it_is_valid(
    engine, failures, batch_size, temperature, plan
):
    script = {n: [None] * count + [f"Take {n}."] for n, count in enumerate(failures)}
    pgen = engine(script, temperature=temperature)
    samples = samples_of(plan, *[GRASP] * len(failures))
    finished, annotator = annotate(pgen, plan, samples, batch_size)
    valid = [n for n, count in enumerate(failures) if count < MAX_TRIES]
    assert list(finished) == valid
    for number, count in enumerate(failures):
        assert pgen.asked[number] == min(count + 1, MAX_TRIES)
    progress = annotator.progress
    assert len(progress.failed) == len(failures) - len(valid)
    assert progress.generated == len(valid)
    assert sum(pgen.asked.values()) == len(failures) + progress.retried
    seen = set()
    for batch, tries in pgen.calls:
        assert len(batch) <= batch_size
        if temperature == 0:
            # First tries are greedy, and repeats, which would say the same, are not.
            assert {number in seen for number in batch} == {tries > 0}
        seen.update(batch)


@ENGINES
def test_a_retry_is_another_question_and_failures_say_why(engine, plan, monkeypatch):
    monkeypatch.setattr(annotate_pgen, "EXAMPLE_COUNT", 1)
    pgen = engine({0: [None], 1: ["Lift it."], 2: ["Take it."]})
    samples = samples_of(plan, GRASP, GRASP, GRASP, LIFT)
    finished, annotator = annotate(pgen, plan, samples)
    assert list(finished) == [2, 3]
    reasons = annotator.progress.failed
    assert "no dialogue" in reasons["episode 0, frame 0"]
    assert "another skill" in reasons["episode 0, frame 1"]
    shown = [turns for number, turns in pgen.turns if number == 0]
    assert all(one != other for one, other in pairwise(shown))
    assert [is_told for *_, is_told in shown] == [True, *[False] * (MAX_TRIES - 1)]
    with pytest.raises(RunError, match=r"episode 0, frame 0: none of 4 answers"):
        annotate_pgen.annotate_sample(engine({0: [None]}), IMAGES[0], samples[0])


@ENGINES
def test_twenty_failures_at_the_beginning_end_the_run(engine, plan):
    samples = samples_of(plan, *[GRASP] * 30)
    pgen = engine({number: [None] for number in range(30)})
    with pytest.raises(RunError, match=r"first 20 samples .* 'I am a model"):
        annotate(pgen, plan, samples, 4)
    assert pgen.asked[29] == 0
    # Where something succeeds, the rest is asked about.
    pgen = engine({number: [None] for number in range(1, 30)})
    finished, annotator = annotate(pgen, plan, samples, 4)
    assert (list(finished), len(annotator.progress.failed)) == ([0], 29)


@ENGINES
def test_images_that_cannot_be_decoded_are_no_failures_of_the_model(engine, plan):
    late = {"episode_id": 2, "timestamp": plan.samples[-1].timestamp + 0.15}
    samples = samples_of(plan, *[GRASP] * 23)
    samples[:21] = [replace(sample, **late) for sample in samples[:21]]
    pgen = engine({21: [None, "Take it."]})
    finished, annotator = annotate(pgen, plan, samples, 5)
    assert finished == {21: say("Take it."), 22: say("Take 22.")}
    assert pgen.asked == {21: 2, 22: 1}
    assert len(annotator.progress.failed) == 21


@ENGINES
@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_sentence_stands_for_one_skill_of_an_episode(engine, batch_size, plan):
    known, sample = samples = samples_of(plan, GRASP, LIFT)
    pgen = engine({0: ["Go on.", "Now then."], 1: ["go on!", "Now then."]})
    finished, annotator = annotate(pgen, plan, samples, batch_size)
    assert annotator.progress == Progress(generated=2, retried=1)
    # It may be repeated for the same skill, and in another episode.
    samples = [known, replace(known, index=1), replace(sample, index=2, episode_id=1)]
    pgen = engine({0: ["Go on."], 1: ["Go on."]})
    finished, annotator = annotate(pgen, plan, samples, batch_size)
    assert (len(finished), annotator.progress.retried) == (3, 0)
    # It counts where it was said in an earlier run, and is never kept.
    annotator = Annotator(engine({1: ["Go on."]}), batch_size)
    before = {known.index: say("go on")}
    assert [*annotator.annotate(plan, [sample], before)][-1] == {}
    assert "same sentence" in annotator.progress.failed["episode 0, frame 1"]


# ---------------------------------------------------------------------------- --verify

LEADS_TO = {"Alpha.": GRASP, "Beta.": LIFT, "Gamma.": PLACE, "Nothing.": "none"}


@ENGINES
@pytest.mark.parametrize(
    ("tries", "kept", "is_recovered"),
    [
        (["Beta.", "Nothing.", "Alpha."], "Alpha.", True),
        (["Beta.", None, None, "Alpha."], "Alpha.", True),
        (["Beta.", "Gamma.", None, None], "Gamma.", False),
        ([None, None, None, "Nothing."], "Nothing.", False),
    ],
)
def test_the_last_valid_answer_is_kept_if_none_is_recovered(
    engine, tries, kept, is_recovered, plan
):
    pgen = engine({0: tries}, LEADS_TO)
    samples = samples_of(plan, GRASP, episode_skills=(PLACE, GRASP, LIFT))
    finished, annotator = annotate(pgen, plan, samples, verify=True)
    assert finished == {0: {**say(kept), "skill_recovered": is_recovered}}
    assert annotator.progress == Progress(generated=1, retried=pgen.asked[0] - 1)


def test_verify_lists_the_episodes_skills_in_an_order_of_each_sample(plan):
    """So that a model that likes one letter is right no more often than by chance."""
    names = tuple(f"brick step n{number}" for number in range(40))
    samples = samples_of(plan, *[names[7]] * 40, episode_skills=names)
    listed = []
    for _ in range(2):
        pgen = ScriptedQwen({})
        annotate(pgen, plan, samples, verify=True)
        listed.append(pgen.options)
    assert listed[0] == listed[1]
    for options in listed[0]:
        assert len(set(options) & set(names)) == len(options) == 26
    assert len({options.index(names[7]) for options in listed[0]}) > 15


@pytest.mark.parametrize(("known", "is_noted"), [(10, False), (8, False), (7, True)])
def test_a_model_that_does_not_know_the_skills_names_is_noted(known, is_noted, plan):
    names = tuple(f"step {number}" for number in range(10))
    samples = samples_of(plan, *names * 2, episode_skills=names)
    # The only skill of an episode says nothing of a model.
    samples += samples_of(plan, "alone", first=20)
    pgen = ScriptedQwen({}, leads_to=dict.fromkeys(names[known:], "none"))
    annotator = Annotator(pgen, 4, verify=True)
    annotator.try_verification(samples)
    noted = [f"{known} of 10 " in note for note in annotator.progress.notes]
    assert noted == [True] * is_noted


def test_a_dataset_is_annotated_by_its_own_pixels(dataset, hand_set, monkeypatch):
    """Those of LeRobotDataset[index], by camera, in the order asked for."""
    opened = LeRobotDataset("a/b", root=dataset, video_backend="pyav")
    keys = list(make_demo.CAMERAS)[::-1]
    plan = annotate_pgen.make_plan(opened, 0.4, 2, camera_keys=keys)
    seen = []
    prepare_really = hand_set.prepare

    def noted(images, prompt, examples=()):
        seen.append((images, prompt))
        return prepare_really(images, prompt, examples)

    monkeypatch.setattr(hand_set, "prepare", noted)
    done = plan.samples[3]
    tasks, indices, lines = annotate_pgen.generate_synthetic_data(
        opened, hand_set, plan, 64, {done.index: say("Could I have your help?")}, True
    )
    assert set(indices) == set(range(len(tasks)))
    assert len(indices) == len(opened)
    for line in lines:
        is_new = (line["episode_id"], line["frame_index"]) != (0, done.frame_index)
        assert ("skill_recovered" in line) == is_new
        assert (line["user_prompt"] in make_demo.USER_PROMPTS) == is_new
    missing = [sample for sample in plan.samples if sample is not done]
    for sample, (views, prompt) in zip(missing, seen, strict=False):
        assert prompt == sample.prompt
        frame = opened[sample.index]
        for key, view in zip(keys, views, strict=True):
            expected = (frame[key] * 255).round().byte().permute(1, 2, 0).numpy()
            assert np.array_equal(np.asarray(view), expected)
