"""The README's lines that train a policy, run as they stand on annotated datasets."""

import contextlib
import io
import re
from collections import Counter
from pathlib import Path

import make_demo
import numpy as np
import pytest
import small_datasets
import torch
import transformers
from conftest import annotate
from PIL import Image

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("\n## Training\n")[2].partition("\n##")[0]
TRAINING, ASKING = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
FAMILIES = ("qwen2_vl", "qwen3_vl")
ONE_SKILL = {0: [("lift it", 0.0)]}


def replace(pattern, text, code):
    """Replace what is there exactly once."""
    code, count = re.subn(pattern, text, code)
    assert count == 1
    return code


def run(code, names, place):
    """Run lines of the README in the folder `place`, and return what they print."""
    out = io.StringIO()
    torch.manual_seed(0)
    np.random.seed(0)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.chdir(place)
        exec(code, names)
    return out.getvalue()


def train(folder, base, steps, place):
    """Run the lines with these settings in `place`: the names that they define."""
    code = TRAINING
    settings = {"folder": str(folder), "base": str(base), "steps": steps}
    for name, value in settings.items():
        code = replace(rf"(?m)^{name} = .*$", f"{name} = {value!r}", code)
    # So small a model, whose weights are random, needs larger steps.
    code = replace("lr=1e-5", "lr=3e-3", code)
    # Workers that are forked from a process with threads, as this one is, may hang.
    code = replace("num_workers=4", "num_workers=0", code)
    names = {}
    printed = run(code, names, place)
    assert len(printed.splitlines()) == steps
    return names


def load(folder):
    """A model from its folder, in float32."""
    model = transformers.AutoModelForImageTextToText
    return model.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def models(built):
    """A folder with a tiny random model of each family."""
    return {
        family: built(f"random_{family}", make_demo.make_random_model, family)
        for family in FAMILIES
    }


@pytest.fixture(scope="module")
def names(short_prompt, dataset, model, models, tmp_path_factory):
    """What the lines define once they have run on the demo, with its two cameras."""
    place = tmp_path_factory.mktemp("trained")
    code, _, err = annotate(dataset, model, place / "out", "--sample-interval", "0.5")
    assert code == 0, err
    return train(place / "out", models["qwen2_vl"], 20, place)


@pytest.fixture(params=FAMILIES)
def fresh(request, names, models, monkeypatch):
    """An untrained model of each family; the README's functions have its processor."""
    folder = models[request.param]
    processor = transformers.AutoProcessor.from_pretrained(folder)
    monkeypatch.setitem(names, "processor", processor)
    return load(folder)


def uneven_frames(names):
    """Some frames, whose user prompts differ in length."""
    frames = [names["dataset"][i] for i in range(0, 113, 16)]
    prompts = {row_of(names, frame)["user_prompt"] for frame in frames}
    assert len({len(prompt) for prompt in prompts}) > 2
    return frames


def row_of(names, frame):
    """The row of a frame's dialogue."""
    return names["tasks"].iloc[frame["task_index_high_level"].item()]


def test_the_lines_are_few():
    assert TRAINING.count("\n") <= 50 and ASKING.count("\n") == 5


def test_loss_on_the_answers_falls_to_under_half(names, monkeypatch):
    """What is written has learned; measured on a frame of each dialogue."""
    policy = Path(names["folder"]).parent / "outputs" / "policy"
    saved = transformers.AutoProcessor.from_pretrained(policy)
    monkeypatch.setitem(names, "processor", saved)
    frames = {row_of(names, frame).name: frame for frame in names["dataset"]}
    assert len(frames) == len(names["tasks"])
    batch = names["collate"](list(frames.values()))
    with torch.no_grad():
        before = load(names["base"])(**batch).loss
        after = load(policy)(**batch).loss
    assert after < before / 2


def test_only_the_answer_carries_loss(names, fresh):
    """Neither the padding, nor the pictures, nor what the person says."""
    decode = names["processor"].tokenizer.decode
    frames = uneven_frames(names)
    batch = names["collate"](frames)
    assert len({int(mask.sum()) for mask in batch["attention_mask"]}) > 2
    columns = batch["input_ids"], batch["labels"], batch["attention_mask"].bool()
    for frame, ids, labels, real in zip(frames, *columns, strict=True):
        row = row_of(names, frame)
        learned = labels != -100
        assert torch.equal(ids[learned], labels[learned])
        answer = f"{row['skill']}\n{row['robot_utterance']}<|im_end|>"
        assert decode(labels[learned]) == answer
        rest = decode(ids[real & ~learned])
        assert rest.endswith(f"{row['user_prompt']}<|im_end|>\n<|im_start|>assistant\n")
        assert not learned[~real].any() and learned[real][-1]


def gradients(model, batch):
    """The gradient of each weight."""
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


def test_a_batch_has_the_gradients_of_its_parts(names, fresh):
    """Each part counts by its answer's tokens, whatever else is in the batch."""
    frames = uneven_frames(names)
    batch = names["collate"](frames)
    counts = (batch["labels"] != -100).sum(1).tolist()
    expected = Counter()
    for frame, count in zip(frames, counts, strict=True):
        for name, part in gradients(fresh, names["collate"]([frame])).items():
            expected[name] += part * count / sum(counts)
    whole = gradients(fresh, batch)
    assert whole.keys() == expected.keys()
    for name, gradient in whole.items():
        error = (gradient - expected[name]).norm()
        assert error <= 1e-3 * gradient.norm() + 1e-6, name
    assert sum(gradient.norm() > 1e-3 for gradient in whole.values()) > 20


def test_two_views(names, fresh):
    """The pictures of both cameras are there, in their order, and both count."""
    frame = names["dataset"][20]
    batch = names["collate"]([frame])
    assert len(batch["image_grid_thw"]) == len(names["cameras"]) == 2
    half = len(batch["pixel_values"]) // 2
    halves = slice(half), slice(half, None)
    for key, own in zip(names["cameras"], halves, strict=True):
        dark = names["collate"]([frame | {key: torch.zeros_like(frame[key])}])
        changed = (dark["pixel_values"] != batch["pixel_values"]).any(1)
        assert changed[own].all() and changed.sum() == half
        assert abs(fresh(**dark).loss - fresh(**batch).loss) > 1e-4


def test_every_dialogue_has_its_turn(names):
    """However many frames it has; and each time it is another of them."""
    passes, dialogues = 100, len(names["tasks"])
    np.random.seed(0)
    frames = [next(names["turns"]) for _ in range(passes * dialogues)]
    rows = names["rows"]["task_index_high_level"]
    counts = Counter(rows[frame] for frame in frames)
    assert len(counts) == dialogues > 10
    assert all(abs(count - passes) <= 1 for count in counts.values())
    longest = set(rows.index[rows == rows.value_counts().idxmax()])
    assert len(longest) >= 5 and longest <= set(frames)


@pytest.mark.parametrize("language", [False, True])
def test_ask(short_prompt, language, model, models, tmp_path):
    """A policy that has learned one dialogue answers with it, and sees the picture.

    The dataset has one camera, and language columns where LeRobot can open them.
    """
    if language and not small_datasets.HAS_PIPELINE:
        pytest.skip("LeRobot 0.4.4 cannot open a dataset with language columns")
    # The README asks about the frame with the index 100.
    source = small_datasets.make(tmp_path / "source", (101,))
    if language:
        small_datasets.write_language(source, ONE_SKILL)
    else:
        small_datasets.write_skills_file(source, ONE_SKILL)
    code, _, err = annotate(source, model, tmp_path / "out", "--sample-interval", "60")
    assert code == 0, err
    names = train(tmp_path / "out", models["qwen2_vl"], 50, tmp_path)
    assert language == ("language_persistent" in names["dataset"][0])
    # The README's sentence is about another scene.
    code = replace('"Could you.*?"', "tasks['user_prompt'][0]", ASKING)
    reply = names["tasks"]["robot_utterance"][0]
    assert run(code, names, tmp_path) == f"Skill: lift it\nRobot: {reply}\n"
    # PNG loses nothing, so the pixels are those of the picture that was recorded.
    picture = Image.fromarray(small_datasets.draw(small_datasets.colour(0, 100)))
    shown = names["processor"].image_processor([picture], return_tensors="pt")
    asked = names["question"]
    torch.testing.assert_close(asked["pixel_values"], shown["pixel_values"])
