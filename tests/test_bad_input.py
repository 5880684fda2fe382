"""Whatever a user can get wrong ends with exit code 2 and a line that says where and what to do."""

import json
import math
import os
import shutil
from pathlib import Path

import make_demo
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checks import content
from conftest import annotate, run

import annotate_pgen


@pytest.fixture
def refused(monkeypatch, tmp_path, model):
    """Run on bad input; check what every refusal has in common; return the line on stderr."""

    def refuse(dataset, *flags, output=tmp_path / "out", model=model, loads_model=False):
        def load(*args):
            raise AssertionError("the model was loaded")

        if not loads_model:
            monkeypatch.setattr(annotate_pgen, "QwenPgen", load)
        before = content(output) if Path(output).is_dir() else None
        code, out, err = annotate(dataset, model, output, *flags)
        lines = [line for line in err.splitlines() if not line.startswith(("0 of ", "loading "))]
        assert code == 2 and out == ""
        assert len(lines) == 1 and lines[0].startswith("error: "), err
        assert any(remedy in lines[0] for remedy in ("; ", " must be ", "choose from")), err
        assert (content(output) if Path(output).is_dir() else None) == before
        assert not Path(f"{output}.partial").exists()
        return lines[0]

    return refuse


# ---------------------------------------------------------------- skills.json


def skills_text(change):
    """skills.json of `dataset` after `change(content)`, as text."""
    skills = make_demo.skills_of((45, 30, 38))
    return json.dumps(change(skills) or skills)


def of_episode(index, **changes):
    return lambda s: s["episodes"][str(index)].update(changes)


def of_skill(**changes):
    def change(s):
        skill = s["episodes"]["1"]["skills"][2]
        skill.update(changes)
        for key in [key for key, value in changes.items() if value is ...]:
            del skill[key]

    return change


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda s: {"episodes": []}, "wrong form"),
        (lambda s: [s], "no JSON object"),
        (lambda s: {"skills": {}}, "wrong form"),
        (lambda s: s["episodes"].pop("1") and None, "no skills for episode [1]"),
        (lambda s: {"episodes": {}}, "no skills for episode [0, 1, 2]"),
        (of_episode(2, skills=[]), "no skills for episode [2]"),
        (of_episode(2, skills=None), "no skills for episode [2]"),
        (of_episode(2, skills="reach"), 'episode "2": skill 0'),
        (of_episode(2, skills=5), 'episode "2"'),
        (of_episode(2, description=5), 'episode "2"'),
        (of_skill(name=...), 'episode "1": skill 2 lacks name, start or end'),
        (of_skill(start=...), "skill 2 lacks"),
        (of_skill(end=...), "skill 2 lacks"),
        (of_skill(name=" "), "needs a name"),
        (of_skill(name=7), "skill 2"),
        (of_skill(name="broken \ud800"), "skill 2"),
        (of_skill(end=1.0), "finite start <= end"),
        (of_skill(start=math.nan), "finite start <= end"),
        (of_skill(end=math.inf), "finite start <= end"),
        (of_skill(end=10**400), "skill 2"),
        (of_skill(start="soon"), "skill 2"),
        (of_skill(start=None), "skill 2"),
    ],
)
def test_skills(change, expected, own_dataset, refused):
    (own_dataset / "meta" / "skills.json").write_text(skills_text(change))
    line = refused(own_dataset)
    assert "skills.json" in line and expected in line


@pytest.mark.parametrize("text", ["", "{", "skills", b"\xff\xfe\x00", "[" * 100000, "null"])
def test_skills_that_are_no_json(text, own_dataset, refused):
    path = own_dataset / "meta" / "skills.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert "skills.json" in refused(own_dataset)


def test_skills_cut_off(own_dataset, refused):
    path = own_dataset / "meta" / "skills.json"
    path.write_bytes(path.read_bytes()[:-40])
    assert "no valid JSON" in refused(own_dataset)


def test_no_skills(own_dataset, refused):
    (own_dataset / "meta" / "skills.json").unlink()
    assert "annotate.py" in refused(own_dataset)


# ---------------------------------------------------------------- dataset


def test_no_dataset(tmp_path, refused):
    assert "no such folder" in refused(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no LeRobot dataset" in refused(tmp_path / "empty")


def info(root, **changes):
    path = root / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("version", ["v2.1", "v2.0", "v1.6", None, 3])
def test_old_format(version, own_dataset, refused):
    info(own_dataset, codebase_version=version)
    assert "convert_dataset_v21_to_v30" in refused(own_dataset)


def test_annotated_already(dataset, model, tmp_path, refused):
    assert annotate(dataset, model, tmp_path / "once", "--sample-interval", "9")[0] == 0
    assert "has task_index_high_level already" in refused(tmp_path / "once")


@pytest.mark.parametrize(
    "changes", [{"fps": "fast"}, {"features": None}, {"fps": None}, {"fps": 0}]
)
def test_senseless_info(changes, own_dataset, refused):
    info(own_dataset, **changes)
    assert "info.json" in refused(own_dataset)


@pytest.mark.parametrize("template", ["/etc/{video_key}", "videos/../../{video_key}.mp4"])
def test_paths_that_lead_out(template, own_dataset, refused):
    info(own_dataset, video_path=template)
    assert "leads out of the folder" in refused(own_dataset)


FILES = (
    "meta/info.json",
    "meta/tasks.parquet",
    "meta/episodes/chunk-000/file-000.parquet",
    "data/chunk-000/file-000.parquet",
    "videos/observation.images.front/chunk-000/file-000.mp4",
    "videos/observation.images.wrist/chunk-000/file-000.mp4",
)


@pytest.mark.parametrize("name", FILES)
def test_missing_file(name, own_dataset, refused):
    (own_dataset / name).unlink()
    line = refused(own_dataset, "--num-image-views-per-sample", 2)
    assert str(own_dataset / name) in line or f"{own_dataset}/meta/episodes: " in line


@pytest.mark.parametrize("share", [0.0, 0.4, 0.9])
@pytest.mark.parametrize("name", FILES)
def test_cut_off_file(name, share, own_dataset, refused):
    path = own_dataset / name
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert str(path) in refused(own_dataset, "--num-image-views-per-sample", 2)


@pytest.mark.parametrize("size", [0, 300, 8000])
def test_damaged_video_of_a_camera_that_is_not_shown(size, own_dataset, refused):
    path = own_dataset / "videos/observation.images.wrist/chunk-000/file-000.mp4"
    path.write_bytes(path.read_bytes()[:size])
    assert str(path) in refused(own_dataset)


def test_links_to_nowhere_and_pipes(own_dataset, refused):
    for make in (lambda path: path.symlink_to("/nowhere"), os.mkfifo):
        path = own_dataset / "videos" / "odd"
        make(path)
        assert f"{path}: is no file to be read" in refused(own_dataset)
        path.unlink()
    (own_dataset / "loop").symlink_to(own_dataset)
    assert str(own_dataset) in refused(own_dataset)


def test_tables_in_the_wrong_form(own_dataset, refused):
    for name, change in (
        ("meta/tasks.parquet", lambda frame: frame.rename(columns={"task_index": "x"})),
        ("meta/episodes/chunk-000/file-000.parquet", lambda frame: frame.drop(columns="length")),
        ("data/chunk-000/file-000.parquet", lambda frame: frame.assign(frame_index=None)),
        ("data/chunk-000/file-000.parquet", lambda frame: frame.assign(timestamp="late")),
    ):
        whole = (own_dataset / name).read_bytes()
        change(pd.read_parquet(own_dataset / name)).to_parquet(own_dataset / name)
        assert str(own_dataset) in refused(own_dataset)
        (own_dataset / name).write_bytes(whole)


@pytest.mark.parametrize("output", ["/", "x" * 300])
def test_paths_that_cannot_be(output, dataset):
    code, _, err = annotate(dataset, "no-model", output)
    assert code == 2 and err.count("\n") == 1 and err.startswith("error: ")


def test_damaged_parquet(own_dataset, refused):
    path = own_dataset / "data/chunk-000/file-000.parquet"
    data = bytearray(path.read_bytes())
    data[200:600] = bytes(400)
    path.write_bytes(data)
    assert str(path) in refused(own_dataset)


def test_video_that_is_none(own_dataset, refused):
    path = own_dataset / "videos/observation.images.front/chunk-000/file-000.mp4"
    path.write_bytes(b"not a video" * 1000)
    assert str(path) in refused(own_dataset)


def test_image_that_is_none(built, tmp_path, refused):
    source = built("images_14", make_demo.make_dataset, (14, 9), cameras={"image": "image"})
    source = Path(shutil.copytree(source, tmp_path / "dataset"))
    (path,) = source.glob("data/*/*.parquet")
    table = pq.read_table(path)
    cells = table["image"].to_pylist()
    cells[22] = {"bytes": b"no picture", "path": None}
    column = pa.array(cells, table.schema.field("image").type)
    pq.write_table(table.set_column(table.schema.get_field_index("image"), "image", column), path)
    assert str(path) in refused(source, "--sample-interval", "0.1")


def test_frames_that_are_not_promised(own_dataset, refused):
    (path,) = own_dataset.glob("data/*/*.parquet")
    table = pq.read_table(path)
    pq.write_table(table.slice(0, 100), path)
    assert "episode [2]" in refused(own_dataset)
    pq.write_table(table.take(np.random.default_rng(0).permutation(113)), path)
    assert "episode [0, 1, 2]" in refused(own_dataset)
    pq.write_table(table.slice(0, 75), path)
    assert "episode [2]" in refused(own_dataset)


def test_timestamps_that_run_backwards(own_dataset, refused):
    (path,) = own_dataset.glob("data/*/*.parquet")
    frame = pd.read_parquet(path)
    frame.loc[50, "timestamp"] = np.float32(0.01)
    frame.to_parquet(path)
    assert "episode 1: its timestamps" in refused(own_dataset)


def test_timestamps_in_the_next_episode(own_dataset, refused):
    """LeRobot would show its pictures without a word."""
    (path,) = own_dataset.glob("data/*/*.parquet")
    frame = pd.read_parquet(path)
    late = frame["timestamp"].where(frame["episode_index"] != 1, frame["timestamp"] + 2)
    frame.assign(timestamp=late.astype("float32")).to_parquet(path)
    line = refused(own_dataset)
    assert "outside the episode's part of observation.images.front lie ['episode 1, frame" in line
    frame.to_parquet(path)
    (path,) = own_dataset.glob("meta/episodes/*/*.parquet")
    frame = pd.read_parquet(path)
    column = "videos/observation.images.wrist/from_timestamp"
    frame.assign(**{column: frame[column].where(frame.index != 2)}).to_parquet(path)
    line = refused(own_dataset)
    assert "outside the episode's part of observation.images.wrist lie ['episode 2, frame" in line


def test_a_column_that_lerobot_does_not_know(own_dataset, refused):
    (path,) = own_dataset.glob("data/*/*.parquet")
    pd.read_parquet(path).assign(mine=1).to_parquet(path)
    assert f"{path}: has ['mine'], which meta/info.json does not describe" in refused(own_dataset)


def test_no_network(refused):
    line = run_line("--repo-id", "somebody/nothing", "--device", "cpu")
    assert line.startswith("error: --repo-id somebody/nothing: no download")


# ---------------------------------------------------------------- flags


def run_line(*flags):
    code, out, err = run(*flags)
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("error: ")
    return err


def test_no_source():
    assert "--repo-id" in run_line() and "--data-dir" in run_line()


@pytest.mark.parametrize(
    "flags",
    [
        ("--sample-interval", "0"),
        ("--sample-interval", "-1"),
        ("--sample-interval", "nan"),
        ("--sample-interval", "inf"),
        ("--sample-interval", "often"),
        ("--temperature", "-0.1"),
        ("--temperature", "nan"),
        ("--batch-size", "0"),
        ("--batch-size", "1.5"),
        ("--num-image-views-per-sample", "0"),
        ("--num-image-views-per-sample", "3"),
        ("--camera-keys", "observation.images.top"),
        ("--camera-keys",),
        ("--dtype", "int8"),
        ("--seed", "x"),
        ("--repo-id", "../../etc"),
        ("--push-to-hub",),
        ("--batch", "4"),
        ("--unknown",),
        ("stray",),
    ],
)
def test_flags(flags, dataset, refused):
    line = refused(dataset, *flags)
    if len(flags) > 1:
        assert flags[0] in line


def test_cameras_there_are_get_listed(dataset, refused):
    for flags in (("--camera-keys", "top"), ("--num-image-views-per-sample", "3")):
        line = refused(dataset, *flags)
        assert "observation.images.front, observation.images.wrist" in line


def test_depth_is_no_picture(own_dataset, refused):
    features = json.loads((own_dataset / "meta" / "info.json").read_text())["features"]
    features["observation.images.front"]["info"]["video.is_depth_map"] = True
    features["observation.images.wrist"]["shape"] = [96, 128, 1]
    info(own_dataset, features=features)
    assert "there are none" in refused(own_dataset)


@pytest.mark.parametrize("device", ["cuda", "cuda:3", "tpu", "meta", "warp"])
def test_device(device, dataset, refused):
    line = refused(dataset, "--device", device, loads_model=True)
    assert f"--device {device}" in line and "--device cpu" in line


# ---------------------------------------------------------------- output


def test_output_that_is_not_empty(dataset, tmp_path, refused):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    assert "is not empty" in refused(dataset)
    assert "is not empty" in refused(dataset, "--overwrite")
    (tmp_path / "file").write_text("years of work")
    assert "is not empty" in refused(dataset, output=tmp_path / "file")
    assert (tmp_path / "file").read_text() == "years of work"


def test_output_in_the_source(own_dataset, refused):
    before = content(own_dataset)
    assert "overlaps the source" in refused(own_dataset, output=own_dataset)
    assert "overlaps the source" in refused(own_dataset, output=own_dataset / "meta" / "out")
    assert content(own_dataset) == before


def test_folders_that_would_be_lost(own_dataset, tmp_path, refused):
    """The source as the partial folder, or in the output; a folder of somebody's beside it."""
    named = tmp_path / "x.partial"
    shutil.copytree(own_dataset, named)
    for source, output in ((named, tmp_path / "x"), (own_dataset, tmp_path)):
        before = content(source)
        code, _, err = annotate(source, "no-model", output, "--overwrite")
        assert code == 2 and "overlaps the source" in err and content(source) == before
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.tex").write_text("years of work")
    for others in ({}, {"run.json": "{}"}, {"run.json": "5 km", "dialogues-1": ""}):
        for name, text in others.items():
            (tmp_path / "out.partial" / name).write_text(text)
        code, _, err = annotate(own_dataset, "no-model", tmp_path / "out")
        assert code == 2 and "is no journal; move it away" in err
        assert (tmp_path / "out.partial" / "thesis.tex").read_text() == "years of work"


def test_empty_output_folder_is_fine(dataset, model, tmp_path):
    (tmp_path / "out").mkdir()
    assert annotate(dataset, model, tmp_path / "out", "--sample-interval", "9")[0] == 0


# ---------------------------------------------------------------- model


def test_model_that_is_not_there(dataset, tmp_path, refused):
    for name in (tmp_path / "nowhere", "Qwen/no-such-model", tmp_path):
        assert f"--model {name}" in refused(dataset, model=name, loads_model=True)


def test_model_that_reads_no_pictures(dataset, tmp_path, refused):
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 300}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    Qwen2ForCausalLM(Qwen2Config(**size, **heads)).save_pretrained(tmp_path / "qwen2")
    LlamaForCausalLM(LlamaConfig(**size, **heads)).save_pretrained(tmp_path / "llama")
    for name in ("qwen2", "llama"):
        line = refused(dataset, model=tmp_path / name, loads_model=True)
        assert str(tmp_path / name) in line and name in line


def test_model_cut_off_or_without_weights(dataset, model, tmp_path, refused):
    broken = Path(shutil.copytree(model, tmp_path / "model"))
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert str(broken) in refused(dataset, model=broken, loads_model=True)
    weights.unlink()
    assert str(broken) in refused(dataset, model=broken, loads_model=True)


def test_model_that_lacks_weights(dataset, model, tmp_path, refused):
    from safetensors.torch import load_file, save_file

    broken = Path(shutil.copytree(model, tmp_path / "model"))
    weights = load_file(broken / "model.safetensors")
    dropped = next(name for name in weights if "layers.0" in name)
    weights.pop(dropped)
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    assert "lack the weights" in refused(dataset, model=broken, loads_model=True)


@pytest.mark.parametrize(
    "name, value",
    [
        ("PROMPT", annotate_pgen.PROMPT + '\nSuch as {"user_prompt": "Hi"}'),
        ("PROMPT", annotate_pgen.PROMPT + " {Scenario}"),
        ("RESPONSE_TYPES", {"yes": "It agrees."}),
        ("SCENARIO_TYPES", {}),
        ("SCENARIO_TYPES", {"situated_correction": "Corrects."}),
        ("SUITABLE_RESPONSES", {"implicit_request": ()}),
        ("SUITABLE_RESPONSES", {"implicit_reqest": ("confirmation",)}),
        ("SUITABLE_RESPONSES", {"situated_correction": ("confirmation", "comfort")}),
    ],
)
def test_a_prompt_that_cannot_be_filled_in(name, value, dataset, refused, monkeypatch):
    monkeypatch.setattr(annotate_pgen, name, value)
    assert "PROMPT or a table of types" in refused(dataset)


# ---------------------------------------------------------------- what is printed


def test_debug_shows_the_traceback(tmp_path):
    code, _, err = run("--data-dir", tmp_path / "nowhere", "--debug")
    assert code == 2 and "Traceback" in err and err.splitlines()[-1].startswith("error: ")


def test_names_cannot_act_on_the_terminal(own_dataset, refused, tmp_path):
    change = of_skill(name="\x1b[2Jred\nerror: no", end=-1)
    (own_dataset / "meta" / "skills.json").write_text(skills_text(change))
    assert "\x1b" not in refused(own_dataset)
    assert "\x1b" not in refused(tmp_path / "a\x1b[2J\nb")
