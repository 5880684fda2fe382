"""Small LeRobot v3 datasets, and skills in each form that LeRobot's tools write.

`make` writes a dataset by hand, as converters do; the colour of a frame says which it
is (`colour`, `read_colour`). The others add skills by the writer that people use:

    write_skills_file    meta/skills.json, which is written by hand here, too
    write_language       `language_persistent`, by the writer of LeRobot 0.6; as LeRobot
                         0.4.4 has none, pyarrow writes the same form there
    write_subtask_index  `subtask_index`, by LeRobot's tool that adds features, and
                         meta/subtasks.parquet
    write_sarm           columns of meta/episodes, by the saving function of SARM
"""

import importlib.util
import io
import json
import shutil

import av
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

FPS = 10
LENGTHS = (50, 30, 40)
FRONT = "observation.images.front"
# Each episode's skills, one repeated, and starts in whole seconds, as SARM's are.
SKILLS = {
    0: [("reach the brick", 0.0), ("lift it", 2.0), ("put it down", 4.0)],
    1: [("reach the brick", 0.0), ("lift it", 1.0)],
    2: [
        ("reach the brick", 0.0),
        ("lift it", 1.0),
        ("reach the brick", 2.0),
        ("put it down", 3.0),
    ],
}
HAS_PIPELINE = importlib.util.find_spec("lerobot.annotations") is not None
INDEX_FEATURE = {"dtype": "int64", "shape": [1], "names": None}


# ---------------------------------------------------------------- datasets


def colour(episode, frame, camera=0):
    """The colour of a frame: 5 episodes, 256 frames and 2 cameras have their own."""
    return 48 * episode + 24 * camera + 8, frame % 16 * 16 + 8, frame // 16 * 16 + 8


def read_colour(image):
    """Which episode, frame and camera an RGB image shows."""
    red, green, blue = map(int, np.asarray(image).reshape(-1, 3).mean(0))
    return red // 48, green // 16 + 16 * (blue // 16), red % 48 // 24


def draw(rgb):
    """An image of one colour, uint8 (64, 64, 3)."""
    return np.full((64, 64, 3), rgb, np.uint8)


def png(rgb, mode="RGB"):
    """A PNG file of one colour in any mode of Pillow."""
    file = io.BytesIO()
    Image.fromarray(draw(rgb)).convert(mode).save(file, "PNG")
    return file.getvalue()


def write_video(path, clips, fps, codec, options):
    """Encode the frames of one episode after another; each begins with a key frame."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream(codec, rate=fps, options=dict(options))
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for clip in clips:
            for number, rgb in enumerate(clip):
                frame = av.VideoFrame.from_ndarray(draw(rgb), "rgb24")
                if number == 0:
                    frame.pict_type = av.video.frame.PictureType.I
                container.mux(stream.encode(frame))
        container.mux(stream.encode())


def make(
    root,
    lengths=LENGTHS,
    fps=FPS,
    cameras=None,
    tasks=("tidy the brick away",),
    files=None,
    codec="libx264",
    options=None,
):
    """Write a dataset without skills.

    `cameras` maps camera keys to "image" or "video"; `files` has the number of each
    episode's data and video file; episode i has the task `tasks[i % len(tasks)]`.
    """
    cameras = cameras or {FRONT: "image"}
    files = files or [0] * len(lengths)
    for folder in ("meta/episodes/chunk-000", "data/chunk-000"):
        (root / folder).mkdir(parents=True)
    write_info(root, lengths, fps, cameras)
    names = pd.DataFrame({"task_index": range(len(tasks))}, index=pd.Index(tasks))
    names.rename_axis("task").to_parquet(root / "meta" / "tasks.parquet")
    rows = []
    first_index = 0
    parts = {}
    clips = {}
    for episode, (length, file) in enumerate(zip(lengths, files, strict=True)):
        task = episode % len(tasks)
        frames = make_frames(episode, length, fps, task, first_index)
        begin = sum(len(part) for part in parts.get(file, [])) / fps
        row = {"episode_index": episode, "tasks": [tasks[task]]}
        row |= {"length": length, "dataset_from_index": first_index}
        row["dataset_to_index"] = first_index + length
        row |= {"data/chunk_index": 0, "data/file_index": file}
        row |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        for number, (key, kind) in enumerate(cameras.items()):
            colours = [colour(episode, frame, number) for frame in range(length)]
            if kind == "image":
                frames[key] = [{"bytes": png(rgb), "path": None} for rgb in colours]
                continue
            clips.setdefault((key, file), []).append(colours)
            place = {"chunk_index": 0, "file_index": file, "from_timestamp": begin}
            place["to_timestamp"] = begin + length / fps
            row |= {f"videos/{key}/{name}": value for name, value in place.items()}
        parts.setdefault(file, []).append(frames)
        rows.append(row)
        first_index += length
    for file, frames_of_file in parts.items():
        path = root / f"data/chunk-000/file-{file:03}.parquet"
        pd.concat(frames_of_file).to_parquet(path, index=False)
    for (key, file), of_file in clips.items():
        path = root / f"videos/{key}/chunk-000/file-{file:03}.mp4"
        write_video(path, of_file, fps, codec, options or {"g": "2", "crf": "10"})
    pd.DataFrame(rows).to_parquet(episode_table(root), index=False)
    return root


def write_info(root, lengths, fps, cameras):
    """Write meta/info.json, and statistics that say nothing."""
    features = {}
    names = ["height", "width", "channels"]
    for key, kind in cameras.items():
        features[key] = {"dtype": kind, "shape": [64, 64, 3], "names": names}
    features["action"] = {"dtype": "float32", "shape": [2], "names": ["x", "y"]}
    features["timestamp"] = {"dtype": "float32", "shape": [1], "names": None}
    for name in ("frame_index", "episode_index", "index", "task_index"):
        features[name] = INDEX_FEATURE
    file = "chunk-{chunk_index:03d}/file-{file_index:03d}"
    info = {
        "codebase_version": "v3.0",
        "robot_type": "so101",
        "total_episodes": len(lengths),
        "total_frames": sum(lengths),
        "total_tasks": 1,
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": fps,
        "data_path": f"data/{file}.parquet",
        "video_path": f"videos/{{video_key}}/{file}.mp4",
        "features": features,
    }
    (root / "meta" / "info.json").write_text(json.dumps(info), encoding="utf-8")
    (root / "meta" / "stats.json").write_text("{}", encoding="utf-8")


def make_frames(episode, length, fps, task=0, first_index=0):
    """The rows of an episode, without cameras."""
    frame = np.arange(length)
    columns = {"timestamp": (frame / fps).astype(np.float32), "frame_index": frame}
    columns |= {"episode_index": episode, "index": first_index + frame}
    columns |= {"task_index": task, "action": [np.zeros(2, np.float32)] * length}
    return pd.DataFrame(columns)


def data_files(root):
    """The data files of a dataset."""
    return sorted(root.glob("data/*/*.parquet"))


def episode_table(root):
    """The only file of meta/episodes."""
    return root / "meta/episodes/chunk-000/file-000.parquet"


def edit_json(path, change):
    """Rewrite a JSON file after `change(content)`."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def edit_table(path, change):
    """Rewrite a parquet file after `change(table)`, which may return another one."""
    table = pd.read_parquet(path)
    changed = change(table)
    (table if changed is None else changed).to_parquet(path, index=False)


def declare(root, **features):
    """Add features to meta/info.json."""
    edit_json(root / "meta/info.json", lambda info: info["features"].update(features))


def add_column(path, name, values):
    """Add a column to a parquet file, or replace it; anything that arrow can hold."""
    table = pq.read_table(path)
    if name in table.column_names:
        table = table.drop_columns([name])
    pq.write_table(table.append_column(name, pa.array(values)), path)


# ---------------------------------------------------------------- skills


def write_skills_file(root, skills=SKILLS):
    """Write meta/skills.json; a skill ends where the next one starts."""
    lengths = pd.read_parquet(episode_table(root))["length"].to_dict()
    episodes = {}
    for episode, entries in skills.items():
        ends = [start for _, start in entries[1:]] + [lengths.get(episode, 0) / FPS]
        described = [
            {"name": name, "start": start, "end": end}
            for (name, start), end in zip(entries, ends, strict=True)
        ]
        episodes[str(episode)] = {"episode_index": episode, "skills": described}
    content = {"episodes": episodes}
    (root / "meta" / "skills.json").write_text(json.dumps(content), encoding="utf-8")
    return root


def write_language(root, skills=SKILLS, only_episodes=None):
    """Write the language columns with the reader and writer of `lerobot-annotate`.

    Where LeRobot has none, pyarrow writes the same.
    """
    feature = {"dtype": "language", "shape": [1], "names": None}
    declare(root, language_persistent=feature, language_events=feature)
    if not HAS_PIPELINE:
        return write_language_columns(root, skills, only_episodes)
    from lerobot.annotations.steerable_pipeline.reader import iter_episodes
    from lerobot.annotations.steerable_pipeline.staging import EpisodeStaging
    from lerobot.annotations.steerable_pipeline.writer import LanguageColumnsWriter

    folder = root.with_name(f"{root.name}_staging")
    records = list(iter_episodes(root, only_episodes=only_episodes))
    for record in records:
        rows = language_rows(skills[record.episode_index])
        EpisodeStaging(folder, record.episode_index).write("plan", rows)
    LanguageColumnsWriter().write_all(records, folder, root)
    return root


def write_language_columns(root, skills=SKILLS, only_episodes=None):
    """Write both columns with pyarrow; other files than the episodes' lack them."""
    for path in data_files(root):
        episodes = pq.read_table(path)["episode_index"].to_pylist()
        wanted = set(episodes if only_episodes is None else only_episodes)
        if wanted & set(episodes):
            rows = {x: language_rows(skills[x]) if x in wanted else [] for x in skills}
            add_column(path, "language_persistent", [rows[x] for x in episodes])
            add_column(path, "language_events", [[]] * len(episodes))
    return root


def language_rows(skills):
    """The rows of an episode in the pipeline's order, with some that are no skills."""
    entries = [("user", "task_aug", "clear the table", 0.0)]
    for name, start in skills:
        entries.append(("assistant", "plan", f"1. {name}", start))
        entries.append(("assistant", "subtask", name, start))
    rest = {"camera": None, "tool_calls": None}
    keys = ("role", "style", "content", "timestamp")
    return [dict(zip(keys, entry, strict=True)) | rest for entry in entries]


def write_subtask_index(root, skills=SKILLS):
    """Add `subtask_index` by LeRobot's own tool for adding features, and its names.

    Frames without a skill, or with one of the name "", get -1.
    """
    from lerobot.datasets.dataset_tools import add_features
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    names = sorted({"", *(name for entries in skills.values() for name, _ in entries)})
    labels = []
    for path in data_files(root):
        frames = pd.read_parquet(path, columns=["episode_index", "frame_index"])
        for episode, frame in frames.itertuples(index=False):
            shown = ""
            for name, start in skills.get(episode, ()):
                shown = name if start <= frame / FPS + 1e-6 else shown
            labels.append(names.index(shown) - 1)
    plain = root.rename(root.with_name(f"{root.name}_plain"))
    add_features(
        LeRobotDataset("demo/plain", root=plain),
        {"subtask_index": (np.array(labels), INDEX_FEATURE | {"shape": (1,)})},
        output_dir=root,
        repo_id="demo/subtasks",
    )
    shutil.rmtree(plain)
    write_subtask_names(root, names[1:])
    return root


def write_subtask_names(root, names):
    """Write meta/subtasks.parquet as LeRobot reads it, not in the labels' order."""
    table = pd.DataFrame({"subtask_index": range(len(names))}, index=pd.Index(names))
    table[::-1].rename_axis("subtask").to_parquet(root / "meta" / "subtasks.parquet")


def write_sarm(root, skills=SKILLS, kind="dense"):
    """Save the skills with LeRobot's own function for SARM's annotations."""
    from lerobot.data_processing.sarm_annotations import subtask_annotation as sarm

    annotations = {}
    for episode, entries in skills.items():
        subtasks = []
        for name, start in entries:
            times = sarm.Timestamp(start=f"00:{start:02.0f}", end="00:09")
            subtasks.append(sarm.Subtask(name=name, timestamps=times))
        annotations[episode] = sarm.SubtaskAnnotation(subtasks=subtasks)
    sarm.save_annotations_to_dataset(root, annotations, FPS, prefix=kind)
    return root
