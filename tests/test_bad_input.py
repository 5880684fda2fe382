"""Whatever a user can get wrong ends with exit code 2 and a line that says it.

The line says what is wrong, where, and what to do.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
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
    """Run on bad input, and check what every refusal has in common.

    refused(dataset, *flags) returns the last line on stderr.
    """

    def refuse(
        dataset, *flags, output=tmp_path / "out", model=model, loads_model=False
    ):
        def load(*args):
            raise AssertionError("the model was loaded")

        if not loads_model:
            monkeypatch.setattr(annotate_pgen, "QwenPgen", load)
        before = content(output) if Path(output).is_dir() else None
        code, out, err = annotate(dataset, model, output, *flags)
        lines = err.splitlines()
        assert (code, out) == (2, ""), err
        assert lines[-1].startswith("error: ")
        remedies = ("; ", "choose from")
        assert any(remedy in lines[-1] for remedy in remedies), "what to do"
        assert not any(line.startswith("error") for line in lines[:-1])
        assert "Traceback" not in err
        assert (content(output) if Path(output).is_dir() else None) == before
        assert not Path(f"{output}.partial").exists()
        return lines[-1]

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
        (lambda s: {"episodes": []}, "is not an object"),
        (lambda s: [s], "no JSON object"),
        (lambda s: {"skills": {}}, "is not an object"),
        (lambda s: s["episodes"].pop("1") and None, "no skills for episode [1]"),
        (lambda s: {"episodes": {}}, "no skills for episode [0, 1, 2]"),
        (of_episode(2, skills=[]), "no skills for episode [2]"),
        (of_episode(2, skills=None), "no skills for episode [2]"),
        (of_episode(2, skills="reach"), 'episode "2"'),
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


@pytest.mark.parametrize(
    "text", ["", "{", "skills", b"\xff\xfe\x00", "[" * 100000, "null"]
)
def test_skills_that_are_no_json(text, own_dataset, refused):
    path = own_dataset / "meta" / "skills.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert "skills.json" in refused(own_dataset)


def test_skills_cut_off(own_dataset, refused):
    path = own_dataset / "meta" / "skills.json"
    path.write_bytes(path.read_bytes()[:-40])
    assert "is not valid JSON" in refused(own_dataset)


def test_no_skills(own_dataset, refused):
    (own_dataset / "meta" / "skills.json").unlink()
    assert "lerobot-annotate" in refused(own_dataset)


# ---------------------------------------------------------------- dataset


def test_no_dataset(tmp_path, refused):
    assert "no such folder" in refused(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no LeRobot dataset" in refused(tmp_path / "empty")


WRIST = "observation.images.wrist"


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


@pytest.mark.parametrize(
    "template", ["/etc/{video_key}", "videos/../../{video_key}.mp4"]
)
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


def test_links_to_nowhere_and_pipes(own_dataset, tmp_path, refused):
    for make in (lambda path: path.symlink_to(tmp_path / "nowhere"), os.mkfifo):
        path = own_dataset / "videos" / "odd"
        make(path)
        assert f"{path}: cannot be read as a file" in refused(own_dataset)
        path.unlink()


def test_half_a_surrogate_pair_in_info_json(own_dataset, refused):
    path = own_dataset / "meta" / "info.json"
    info = json.loads(path.read_text())
    info["notes"] = "\ud800"
    path.write_text(json.dumps(info))
    assert f"{path}: holds half of a surrogate pair" in refused(own_dataset)


def test_links_in_a_circle(own_dataset, tmp_path, refused):
    for target in (own_dataset, own_dataset / "meta"):
        link = own_dataset / "meta" / "loop"
        link.symlink_to(target)
        assert f"{link}: leads back" in refused(own_dataset)
        link.unlink()
    for name, other in (("a", "b"), ("b", "a")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "link").symlink_to(tmp_path / other)
    (own_dataset / "extra").symlink_to(tmp_path / "a")
    assert "link: leads back" in refused(own_dataset)


TASKS = "meta/tasks.parquet"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"
DATA = "data/chunk-000/file-000.parquet"


@pytest.mark.parametrize(
    "name, change",
    [
        (TASKS, lambda frame: frame.rename(columns={"task_index": "x"})),
        (EPISODES, lambda frame: frame.drop(columns="length")),
        (EPISODES, lambda frame: frame.assign(length="five")),
        (EPISODES, lambda frame: frame.drop(columns="data/chunk_index")),
        (EPISODES, lambda frame: frame.drop(columns=f"videos/{WRIST}/to_timestamp")),
        (DATA, lambda frame: frame.drop(columns="task_index")),
        (DATA, lambda frame: frame.assign(frame_index=None)),
        (DATA, lambda frame: frame.assign(timestamp="late")),
        (DATA, lambda frame: frame.assign(episode_index="first")),
    ],
)
def test_tables_in_the_wrong_form(name, change, own_dataset, refused):
    path = own_dataset / name
    change(pd.read_parquet(path)).to_parquet(path)
    assert str(own_dataset) in refused(own_dataset)


@pytest.mark.parametrize("output", ["/", "x" * 300])
def test_paths_that_cannot_be(output, dataset):
    code, out, err = annotate(dataset, "no-model", output)
    assert (code, out) == (2, "")
    assert "--output-dir" in err.splitlines()[-1]


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
    source = built(
        "images_14", make_demo.make_dataset, (14, 9), cameras={"image": "image"}
    )
    source = Path(shutil.copytree(source, tmp_path / "dataset"))
    (path,) = source.glob("data/*/*.parquet")
    table = pq.read_table(path)
    cells = table["image"].to_pylist()
    cells[22] = {"bytes": b"no picture", "path": None}
    column = pa.array(cells, table.schema.field("image").type)
    pq.write_table(
        table.set_column(table.schema.get_field_index("image"), "image", column), path
    )
    assert str(path) in refused(source, "--sample-interval", "0.1")


def test_frames_that_are_not_promised(own_dataset, refused):
    (path,) = own_dataset.glob("data/*/*.parquet")
    table = pq.read_table(path)
    damaged = {
        "cut off in the last episode": table.slice(0, 100),
        "without the last episode": table.slice(0, 75),
        "in disorder": table.take(np.random.default_rng(0).permutation(113)),
    }
    for broken in damaged.values():
        pq.write_table(broken, path)
        line = refused(own_dataset)
        assert f"{own_dataset}/data" in line
        assert re.search(r"episodes?\W+\d", line)


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
    assert "episode 1, frame" in line
    assert "observation.images.front" in line
    frame.to_parquet(path)
    path = own_dataset / EPISODES
    frame = pd.read_parquet(path)
    column = f"videos/{WRIST}/to_timestamp"
    early = frame[column].where(frame.index != 2, frame[column] - 3)
    frame.assign(**{column: early}).to_parquet(path)
    line = refused(own_dataset)
    assert "episode 2, frame" in line
    assert WRIST in line


def test_a_column_that_lerobot_does_not_know(own_dataset, refused):
    (path,) = own_dataset.glob("data/*/*.parquet")
    pd.read_parquet(path).assign(mine=1).to_parquet(path)
    line = refused(own_dataset)
    assert str(path) in line
    assert "['mine']" in line


def test_a_repository_that_is_not_there():
    code, out, err = run("--repo-id", "somebody/nothing", "--device", "cpu")
    assert (code, out) == (2, "")
    assert "--repo-id somebody/nothing" in err.splitlines()[-1]


# ---------------------------------------------------------------- flags


def test_no_source():
    code, out, err = run()
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert "--repo-id" in err
    assert "--data-dir" in err


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
        ("--new-repo-id", "no-user"),
        ("--push-to-hub",),
        ("--batch", "4"),
        ("--unknown",),
        ("stray",),
    ],
)
def test_flags(flags, dataset, refused):
    # Where it is no flag of the script, it stands in the line all the same.
    assert flags[0] in refused(dataset, *flags)


def test_cameras_there_are_get_listed(dataset, refused):
    for flags in (("--camera-keys", "top"), ("--num-image-views-per-sample", "3")):
        line = refused(dataset, *flags)
        assert "observation.images.front, observation.images.wrist" in line


def test_depth_is_no_picture(own_dataset, refused):
    features = json.loads((own_dataset / "meta" / "info.json").read_text())["features"]
    features["observation.images.front"]["info"]["video.is_depth_map"] = True
    features["observation.images.wrist"]["shape"] = [96, 128, 1]
    info(own_dataset, features=features)
    assert str(own_dataset) in refused(own_dataset)


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
    assert "overlaps the source" in refused(
        own_dataset, output=own_dataset / "meta" / "out"
    )
    assert content(own_dataset) == before


def test_the_source_would_be_lost(own_dataset, tmp_path, refused):
    """It is the work folder of the output, or lies within the output."""
    named = Path(shutil.copytree(own_dataset, tmp_path / "x.partial"))
    for source, output in ((named, tmp_path / "x"), (own_dataset, tmp_path)):
        before = content(source)
        code, out, err = annotate(source, "no-model", output, "--overwrite")
        assert (code, out) == (2, "")
        assert str(output) in err.splitlines()[-1]
        assert content(source) == before


def test_empty_output_folder_is_fine(dataset, model, tmp_path):
    (tmp_path / "out").mkdir()
    assert annotate(dataset, model, tmp_path / "out", "--sample-interval", "9")[0] == 0


# ---------------------------------------------------------------- model


def test_model_that_is_not_there(dataset, tmp_path, refused):
    for name in (tmp_path / "nowhere", "Qwen/no-such-model", tmp_path):
        assert f"--model {name}" in refused(dataset, model=name, loads_model=True)


def test_model_that_reads_no_pictures(dataset, tmp_path, refused):
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    size = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "vocab_size": 300,
    }
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
    "name, value, wrong",
    [
        ("PROMPT", '{skill}\nSuch as {"user_prompt": "Hi"}', "{"),
        ("PROMPT", "{skill} {Scenario}", "{Scenario}"),
        ("PROMPT", "{skill", "PROMPT"),
        ("PROMPT", "{task}", "{skill}"),
        ("RESPONSE_TYPES", {"yes": "It agrees."}, "confirmation"),
        ("RESPONSE_TYPES", {}, "RESPONSE_TYPES"),
        ("SCENARIO_TYPES", {}, "SCENARIO_TYPES"),
        ("SCENARIO_TYPES", {"situated_correction": "Corrects."}, "SCENARIO_TYPES"),
        ("SUITABLE_RESPONSES", {"implicit_request": ()}, "implicit_request"),
        ("SUITABLE_RESPONSES", {"implicit": ("confirmation",)}, "'implicit'"),
        ("SUITABLE_RESPONSES", {"negative_task": ("comfort",)}, "'comfort'"),
    ],
)
def test_a_prompt_that_cannot_be_filled_in(
    name, value, wrong, dataset, refused, monkeypatch
):
    monkeypatch.setattr(annotate_pgen, name, value)
    assert wrong in refused(dataset)


# ---------------------------------------------------------------- what is printed


def test_debug_shows_the_traceback(tmp_path):
    flags = ("--data-dir", tmp_path / "nowhere")
    code, _, err = run(*flags, "--debug")
    assert code == 2
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in run(*flags)[2]


def test_our_own_bugs_show_where_they_are(dataset, monkeypatch):
    def fail(job):
        raise IndexError("list index out of range")

    monkeypatch.setattr(annotate_pgen, "print_plan", fail)
    code, out, err = run("--data-dir", dataset, "--dry-run")
    assert (code, out) == (1, "")
    assert "Traceback" in err
    assert "IndexError" in err.splitlines()[-1]


BLOCKED = """
import sys
sys.path[:0] = [{root!r}]

class Missing:
    def find_spec(name, path, target=None):
        if name == {package!r}:
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Missing)
import annotate_pgen
sys.exit(annotate_pgen.main(["--data-dir", {dataset!r}, "--dry-run"]))
"""


@pytest.mark.parametrize("package", ["lerobot", "tqdm"])
def test_a_missing_package_is_named(package, dataset):
    code = BLOCKED.format(
        root=str(Path(annotate_pgen.__file__).parent),
        package=package,
        dataset=str(dataset),
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    )
    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"error: the package {package} ")
    assert "requirements.txt" in last
    assert "Traceback" not in result.stderr


def test_output_in_a_folder_that_the_source_links_to(own_dataset, tmp_path, refused):
    elsewhere = tmp_path / "elsewhere"
    shutil.move(own_dataset / "videos", elsewhere)
    (own_dataset / "videos").symlink_to(elsewhere)
    before = content(own_dataset)
    assert "overlaps the source" in refused(own_dataset, output=elsewhere / "out")
    assert content(own_dataset) == before
