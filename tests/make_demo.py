"""Write a small LeRobot dataset with skills, and a Qwen2-VL that runs on a laptop.

    python tests/make_demo.py outputs/demo

writes

    outputs/demo/dataset   3 drawn episodes with two video cameras, by LeRobot's writer
    outputs/demo/model     a real Qwen2-VL by architecture, its weights set by hand

so that `annotate_pgen.py` can be tried, and tested, without a download or a GPU. The
model is blind: it answers any prompt with one of a few fixed dialogues. Its answers
show the format of the result, not its quality. The tests build their datasets and
models with the functions below.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

CAMERAS = {"observation.images.front": "video", "observation.images.wrist": "video"}
PICK_AND_PLACE = (
    ("robot arm moves towards pink lego brick", 0.0, 1.2),
    ("robot arm picks up pink lego brick", 1.2, 2.6),
    ("robot arm places pink lego brick into the transparent box", 2.6, 60.0),
)
TASK = "pink lego brick into the transparent box"

# What suits any step. There are many: one stands for one skill of an episode only.
USER_PROMPTS = tuple(
    f"{start} {rest}"
    for start in (
        "Could you see to the pink brick",
        "Let's go on with the pink brick",
        "I'd like you to take care of the pink brick",
        "Leave the rest and deal with the pink brick",
        "It would help if you went on with the pink brick",
        "Please do the next step with the pink brick",
    )
    for rest in ("now.", "next.", "for me.", "today.", "as before.", "like that.")
)
ROBOT_UTTERANCES = (
    "Sure, I'll take care of the pink brick.",
    "The pink one, you mean. I'm going on with the brick.",
    "Got it, the pink brick it is.",
    "Okay, I'll see to the brick.",
    "Alright, on to the pink brick.",
)


def draw_frame(episode: int, frame: int, camera: int, size: tuple[int, int]):
    """uint8 array (height, width, 3): a brick on a table, coloured by episode."""
    import numpy as np

    height, width = size
    image = np.empty((height, width, 3), np.uint8)
    image[:] = (170 - 60 * camera, 150, 90 + 60 * camera)
    image[:: max(1, height // 6)] //= 2
    x = (frame * 4) % max(1, width - 20)
    y = height // 3 + 4 * (episode % 5)
    image[y : y + 14, x : x + 20] = (240, 60 + 37 * (episode % 5), 160)
    image[-8:, : 4 + 4 * (frame % max(1, width // 4))] = (20, 20, 20)
    return image


def make_dataset(
    root: Path,
    lengths: Sequence[int] = (45, 30, 38),
    fps: int = 10,
    cameras: dict[str, str] | None = None,
    size: tuple[int, int] = (96, 128),
    tasks: Sequence[str] = (TASK,),
    file_per_episode: bool = False,
    skills: dict | None = None,
    repo_id: str = "demo/pick_and_place",
) -> Path:
    """Record drawn episodes of these lengths with LeRobot, and add meta/skills.json.

    `cameras` maps camera keys to "video" or "image"; episode i has the task
    `tasks[i % len(tasks)]`.
    """
    import numpy as np
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    cameras = CAMERAS if cameras is None else cameras
    vector = {"dtype": "float32", "shape": (2,), "names": ["x", "y"]}
    features = {"observation.state": vector, "action": vector} | {
        key: {
            "dtype": kind,
            "shape": (*size, 3),
            "names": ["height", "width", "channels"],
        }
        for key, kind in cameras.items()
    }
    dataset = LeRobotDataset.create(repo_id, fps, features, root=root)
    if file_per_episode:
        dataset.meta.update_chunk_settings(
            data_files_size_in_mb=1e-6, video_files_size_in_mb=1e-6, chunks_size=2
        )
    for episode, length in enumerate(lengths):
        for frame in range(length):
            position = np.array([frame / fps, episode], np.float32)
            images = {
                key: draw_frame(episode, frame, i, size)
                for i, key in enumerate(cameras)
            }
            task = tasks[episode % len(tasks)]
            dataset.add_frame(
                {"observation.state": position, "action": position, "task": task}
                | images
            )
        # in forks, now and then one hangs
        dataset.save_episode(parallel_encoding=False)
    dataset.finalize()
    if skills is None:
        skills = skills_of(lengths, tasks, fps=fps)
    write_skills(root, skills)
    return root


def skills_of(
    lengths: Sequence[int],
    tasks: Sequence[str] = (TASK,),
    skills=PICK_AND_PLACE,
    fps: float = 10,
) -> dict:
    """The content of skills.json as annotate.py writes it.

    Every episode has the same skills, but for those that would start after its end.
    """
    return {
        "coarse_description": "tidy up the table",
        "skill_to_task_index": {name: i for i, (name, _, _) in enumerate(skills)},
        "episodes": {
            str(episode): {
                "episode_index": episode,
                "description": tasks[episode % len(tasks)],
                "skills": [
                    {
                        "name": name,
                        "start": start,
                        "end": min(end, lengths[episode] / fps),
                    }
                    for name, start, end in skills
                    if start < lengths[episode] / fps
                ],
            }
            for episode in range(len(lengths))
        },
    }


def write_skills(root: Path, skills: dict) -> None:
    """Write `skills` to meta/skills.json of the dataset at `root`."""
    (root / "meta" / "skills.json").write_text(
        json.dumps(skills, indent=2), encoding="utf-8"
    )


# ---------------------------------------------------------------- checkpoints

# Qwen's turn format; each content is a list of parts, as in Qwen2-VL's own template
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def make_tokenizer(phrases: Sequence[str] = ()):
    """Qwen's byte-level tokenizer: 256 bytes, its special tokens, and `phrases`."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import Qwen2TokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(p, normalized=False) for p in phrases])
    return Qwen2TokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
    )


def make_processor(tokenizer, family: str = "qwen2_vl"):
    """The real processor of the family, "qwen2_vl" or "qwen3_vl"."""
    import transformers as tf

    size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
    patch = 14 if family == "qwen2_vl" else 16
    fast = (
        "Qwen2VLImageProcessorFast" if tf.__version__ < "5" else "Qwen2VLImageProcessor"
    )
    images = getattr(tf, fast)(size=size, patch_size=patch)
    name = "Qwen2VL" if family == "qwen2_vl" else "Qwen3VL"
    videos = getattr(tf, f"{name}VideoProcessor")(size=size, patch_size=patch)
    return getattr(tf, f"{name}Processor")(
        image_processor=images,
        tokenizer=tokenizer,
        video_processor=videos,
        chat_template=CHAT_TEMPLATE,
    )


def make_config(tokenizer, family: str, hidden: int, vocab: int, layers: int):
    """A tiny configuration of the family, with token ids that belong to `tokenizer`."""
    import transformers as tf

    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
        for name, token in {
            "image": "<|image_pad|>",
            "video": "<|video_pad|>",
            "vision_start": "<|vision_start|>",
            "vision_end": "<|vision_end|>",
        }.items()
    }
    # of 32 numbers: vLLM's attention on a CPU knows no smaller ones
    heads = hidden // 32
    text = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "max_position_embeddings": 32768,
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if family == "qwen2_vl":
        text["rope_scaling"] = {
            "type": "mrope",
            "rope_type": "default",
            "mrope_section": [4, 6, 6],
        }
        vision = {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": hidden}
        return tf.Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
    text["head_dim"] = 32
    text["rope_scaling"] = {"rope_type": "default", "mrope_section": [4, 6, 6]}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": hidden,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    return tf.Qwen3VLConfig(text_config=text, vision_config=vision, **ids)


def save_model(path: Path, model, tokenizer, family: str, generation: dict) -> Path:
    from transformers import GenerationConfig

    ids = {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model.generation_config = GenerationConfig(**(ids | generation))
    model.save_pretrained(path)
    make_processor(tokenizer, family).save_pretrained(path)
    return path


def make_random_model(path: Path, family: str = "qwen2_vl", seed: int = 0) -> Path:
    """A tiny random model (float32) whose output depends on every word and pixel."""
    import torch
    import transformers as tf

    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    config = make_config(tokenizer, family, hidden=64, vocab=len(tokenizer), layers=2)
    name = "Qwen2VL" if family == "qwen2_vl" else "Qwen3VL"
    model = getattr(tf, f"{name}ForConditionalGeneration")(config).float()
    # the usual 0.02 leaves the picture's share of the logits too small to see
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return save_model(path, model, tokenizer, family, {})


def make_model(
    path: Path,
    failure_rate: float = 0.0,
    generation: dict | None = None,
    label_shares: dict[str, float] | None = None,
) -> Path:
    """A Qwen2-VL whose next token depends on the last one alone, by a table.

    Every embedding is one-hot and every block adds nothing, so that `lm_head` is the
    table. After `assistant` and a new line, where a turn of its own begins, comes
    `{"action": "`, with which QwenPgen opens the turn; then a request, then the
    key of the answer, then an answer, then `"}` and the end. With `failure_rate` the
    request is as often a broken answer. `generation` goes into the checkpoint's
    generation_config.json.

    Where QwenPgen asks a question of --verify, it compares the letters alone, and
    `label_shares` has their probabilities: by default A is the likeliest. The likeliest
    letter that an option has counts, so that just the user prompts are recovered whose
    skill it stands for. A server, which writes the likeliest token of all, answers with
    no letter.
    """
    import torch
    from transformers import Qwen2VLForConditionalGeneration

    opening = '{"action": "'
    asked = 'as told", "user_prompt": "'
    middle = '", "robot_utterance": "'
    closing = '"}'
    broken = "I am only a language model"
    phrases = [*USER_PROMPTS, *ROBOT_UTTERANCES]
    phrases += [opening, asked, middle, closing, broken]
    tokenizer = make_tokenizer(phrases)
    token = tokenizer.convert_tokens_to_ids
    vocab = -(-len(tokenizer) // 64) * 64
    torch.manual_seed(0)
    config = make_config(tokenizer, "qwen2_vl", hidden=vocab, vocab=vocab, layers=1)
    model = Qwen2VLForConditionalGeneration(config).float()

    # [last token, next token] -> log probability
    table = torch.full((vocab, vocab), float("-inf"))
    table[:, tokenizer.eos_token_id] = 0.0
    new_turn = tokenizer("\n")["input_ids"][-1]

    def follow(last: int, following: Sequence[str], share: float = 1.0) -> None:
        if share > 0:
            table[last, tokenizer.eos_token_id] = float("-inf")
            each = torch.tensor(share / len(following))
            table[last, token(list(following))] = each.log()

    follow(new_turn, [opening])
    follow(token(opening), [asked])
    follow(token(asked), USER_PROMPTS, 1 - failure_rate)
    follow(token(asked), [broken], failure_rate)
    for prompt in USER_PROMPTS:
        follow(token(prompt), [middle])
    follow(token(middle), ROBOT_UTTERANCES)
    for utterance in ROBOT_UTTERANCES:
        follow(token(utterance), [closing])
    for label, share in (label_shares or {"A": 1.0}).items():
        follow(new_turn, [label], share * 1e-9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
            elif name.endswith("embed_tokens.weight"):
                parameter.copy_(torch.eye(vocab))
            elif name.endswith(("layernorm.weight", "language_model.norm.weight")):
                parameter.fill_(1.0)
        # the last norm turns a one-hot vector into sqrt(vocab) times itself
        model.lm_head.weight.copy_(table.clamp(min=-100).T / vocab**0.5)
    return save_model(path, model, tokenizer, "qwen2_vl", generation or {})


def quiet_libraries() -> None:
    """Keep encoders' greetings and progress bars of episodes off the terminal."""
    os.environ["SVT_LOG"] = "1"
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    import av
    import datasets
    import transformers as tf

    datasets.disable_progress_bars()
    tf.utils.logging.disable_progress_bar()
    # LeRobot resets PyAV's log level to print FFmpeg's own chatter
    av.logging.restore_default_callback = lambda: None
    av.logging.set_level(av.logging.PANIC)


@contextlib.contextmanager
def announced(step: str) -> Iterator[None]:
    """Name the step on stderr, with a dot for every second that it takes."""
    print(step, end="", file=sys.stderr, flush=True)
    done = threading.Event()

    def show_dots() -> None:
        while not done.wait(1):
            print(".", end="", file=sys.stderr, flush=True)

    dots = threading.Thread(target=show_dots, daemon=True)
    dots.start()
    try:
        yield
    finally:
        done.set()
        dots.join()
        print(file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "out", type=Path, help="folder to write dataset/ and model/ into"
    )
    out = parser.parse_args().out
    if out.exists() and any(out.iterdir()):
        sys.exit(f"error: {out} is not empty; name another folder or delete it")
    with announced("importing LeRobot and transformers"):
        quiet_libraries()
        import lerobot.datasets.lerobot_dataset  # noqa: F401 (make_dataset uses it)
    with announced("recording 3 episodes"):
        make_dataset(out / "dataset")
    with announced("making the model"):
        make_model(out / "model")
    print(f"wrote {out}/dataset (3 episodes, 113 frames, 2 cameras) and {out}/model")
    print("now try\n")
    print(
        f"python annotate_pgen.py --data-dir {out}/dataset --model {out}/model "
        f"--device cpu --dtype float32 --output-dir {out}/annotated"
    )
    print(f"\nand then open {out}/annotated/meta/dialogues.html in a browser")


if __name__ == "__main__":
    main()
