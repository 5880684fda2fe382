"""What people look at: the page in Chromium, the card, README and --help."""

import ast
import html
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import benchmark
import make_demo
import pytest
from conftest import annotate
from huggingface_hub import DatasetCard
from hypothesis import given
from hypothesis import strategies as st

import annotate_pgen as ap

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPT = (ROOT / "annotate_pgen.py").read_text(encoding="utf-8")

# What a model can say, as parse_answer lets it pass.
SAID = (
    "<script>document.title = 'broken in'",
    "<img src=x onerror=\"document.title='broken in'\">",
    "\"'><svg onload=document.title='broken_in'>",
    "<img src=https://example.com/pixel.png>",
    "<!-- not closed <iframe src=https://example.com>",
    "]]> &amp; &lt;b&gt; &#0; &notin",
    "\u202eright to left\u2066 and never closed",
    "![picture](https://example.com/pixel.png) [link](https://example.com)",
    "a | b `code` *bold* _em_ ~~no~~ \\| www.example.com https://example.com",
)
# What can stand in a dataset.
WRITTEN = (
    *SAID,
    "</script></style></title><a href=\"javascript:document.title='broken in'\">a</a>",
    "{{ 7 * 7 }} {% raw %} {# gone #} ${7 * 7}",
    "nul \x00 escape \x1b[31m bell \x07 line\nline\ttab \u2028 end",
    "👩🏽‍🚀🤖 ünïcödé 中文 العربية " + "x" * 200,
)
CARD = """\
---
license: cc-by-nc-4.0
pretty_name: Bricks
tags: [LeRobot, so101]
train-eval-index: [{config: default}]
dataset_info: {features: [{name: index, dtype: int64}]}
---
# Bricks

Recorded in our kitchen.
"""


@pytest.fixture(scope="module")
def finished(short_prompt, dataset, model, tmp_path_factory):
    """An annotated dataset with a card of its own, two views and --verify."""
    folder = tmp_path_factory.mktemp("page")
    source = Path(shutil.copytree(dataset, folder / "source"))
    (source / "README.md").write_text(CARD)
    flags = ("--repo-id", "lab/bricks", "--num-image-views-per-sample", 2, "--verify")
    code, _, err = annotate(source, model, folder / "out", *flags)
    assert code == 0, err
    return folder / "out"


@pytest.fixture(scope="module")
def hostile(short_prompt, model, tmp_path_factory):
    """A dataset in which everything that others wrote wants to break out."""
    folder = tmp_path_factory.mktemp("hostile")
    source = folder / "<img src=x onerror=document.title=1>"
    output = folder / "out"
    named = [(name, i / 5, 60.0) for i, name in enumerate(WRITTEN)]
    skills = make_demo.skills_of([2 * len(WRITTEN)], WRITTEN, named)
    given = {"cameras": {"<b>camera": "image"}, "tasks": WRITTEN, "skills": skills}
    make_demo.make_dataset(source, [2 * len(WRITTEN)], **given)
    flags = (source, model, output, "--sample-interval", 0.2)
    code, _, err = annotate(*flags, "--preview", 1)
    assert code == 0, err
    # What the model has said is put into the journal, from which the job goes on.
    (journal,) = Path(f"{output}.partial").glob("dialogues-*.jsonl")
    lines = ""
    for number in range(len(WRITTEN)):
        text = SAID[number % len(SAID)]
        words = {"user_prompt": text, "robot_utterance": f"Sure: {text} ok"}
        lines += json.dumps({**words, "index": 2 * number}) + "\n"
    journal.write_text(lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ap, "QwenPgen", None)
        code, _, err = annotate(*flags)
    assert code == 0, err
    return output


def annotations(output):
    """The lines of syn_annotations.jsonl."""
    text = (output / "meta/syn_annotations.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n")[:-1]]


# ------------------------------------------------------------------ what is on the page

SAMPLE = ap.Sample(0, 0, 0.0, "pick", (), "tidy up")


@given(st.integers(0, 80), st.integers(1, 60))
def test_samples_are_drawn_in_order_and_the_same_each_time(count, limit):
    samples = [replace(SAMPLE, index=i) for i in range(count)]
    drawn = ap.draw_samples(samples, limit)
    assert len(drawn) == min(limit, count)
    assert len({sample.index for sample in drawn}) == len(drawn)
    assert drawn == sorted(drawn, key=lambda sample: sample.index)
    assert drawn == ap.draw_samples(samples, limit)


# -------------------------------------------------------------------------- in Chromium


@pytest.fixture(scope="module")
def chromium():
    """The system's Chromium; as root it has no sandbox."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if not path:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])


@pytest.fixture
def tab(chromium):
    """A new tab, which notes what it asks for and what its console reports."""
    page = chromium.new_page()
    page.asked = []
    page.errors = []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("console", lambda message: page.errors.append(message.text))
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    yield page
    page.close()


def open_page(tab, path):
    """Open a file, and wait until all pictures are decoded."""
    tab.goto(path.resolve().as_uri())
    tab.evaluate("Promise.all([...document.images].map((x) => x.decode()))")


def asked_elsewhere(tab):
    """What the tab has asked for beside its file and the pictures in it."""
    return [url for url in tab.asked[1:] if not url.startswith("data:image/jpeg;")]


def shown(tab):
    """How many dialogues are to be seen, as the page itself says too."""
    count = tab.locator("article:visible").count()
    says = f"{count} of {tab.locator('article').count()} dialogues"
    assert tab.locator("output").text_content() == says
    return count


def test_all_pictures_are_shown_and_nothing_else_is_asked_for(tab, finished):
    open_page(tab, finished / "meta/dialogues.html")
    lines = annotations(finished)
    widths = tab.evaluate("[...document.images].map((x) => x.naturalWidth)")
    assert widths == [128] * 2 * shown(tab)
    texts = tab.locator("article").all_text_contents()
    for line, text in zip(lines, texts, strict=True):
        for key in ("user_prompt", "robot_utterance", "skill_current"):
            assert line[key] in text
    figures = tab.locator("body").text_content()
    for name, value in json.loads((finished / ap.RECORD).read_text())["summary"]:
        assert name in figures and value in figures
    assert asked_elsewhere(tab) == tab.errors == []


def test_filters_filter(tab, finished):
    open_page(tab, finished / "meta/dialogues.html")
    lines = annotations(finished)
    for name, key in (
        ("episode", lambda line: str(line["episode_id"])),
        ("skill", lambda line: line["skill_current"]),
        ("scenario", lambda line: line["scenario_type"]),
        ("response", lambda line: line["response_type"]),
        ("verified", lambda line: "not " * (not line["skill_recovered"]) + "recovered"),
    ):
        field = tab.locator(f"select[name={name}]")
        labels = field.locator("option").all_text_contents()[1:]
        # Skills are numbered.
        options = {re.sub(r"^\d+\. ", "", label): label for label in labels}
        counts = Counter(key(line) for line in lines)
        assert options.keys() == counts.keys()
        for option, label in options.items():
            field.select_option(label=label)
            assert shown(tab) == counts[option]
        # Together with words, in any case, anywhere in what others wrote.
        tab.fill("[name=search]", "  BRICK sure ")
        found = [x for x in lines if key(x) == option and "Sure" in str(x.values())]
        assert shown(tab) == len(found)
        tab.click("button[type=reset]")
        # The fields are empty a moment later.
        tab.wait_for_selector("article[hidden]", state="detached")
        assert shown(tab) == len(lines)
    tab.fill("[name=search]", "person")
    assert shown(tab) == 0
    assert tab.errors == []


def test_hostile_text_is_text(tab, hostile):
    open_page(tab, hostile / "meta/dialogues.html")
    lines = annotations(hostile)
    assert tab.title().startswith("Dialogues of local/<img src=x onerror=document")
    assert shown(tab) == len(lines) == len(WRITTEN)
    assert tab.locator("script").count() == 1
    foreign = "[onerror], [onload], iframe, svg, b:not(.number), a:not([href^='#'])"
    assert tab.locator(foreign).count() == 0
    texts = tab.locator(".person bdi").all_text_contents()
    assert texts == [line["user_prompt"] for line in lines]
    for value in range(len(WRITTEN)):
        tab.select_option("[name=skill]", value=str(value))
        assert shown(tab) == 1
    assert asked_elsewhere(tab) == tab.errors == []


# ----------------------------------------------------------------------------- the card


def table_rows(text):
    """The cells of all tables in a card, as they stand there."""
    return [row.split(" | ") for row in re.findall(r"(?m)^\| (.*) \|$", text)]


def test_the_card_keeps_what_the_source_says_of_itself(finished, model):
    card = DatasetCard.load(finished / "README.md")
    data = card.data.to_dict()
    assert (data["license"], data["pretty_name"]) == ("cc-by-nc-4.0", "Bricks")
    assert data["train-eval-index"] == [{"config": "default"}]
    assert data["tags"] == ["LeRobot", "synthetic", "so101"]
    assert data["source_datasets"] == ["lab/bricks"]
    assert "dataset_info" not in data, "it describes the columns that were"
    assert 'LeRobotDataset("lab/bricks_with_high_level_tasks", ' in card.text
    assert "# Bricks\n\nRecorded in our kitchen." in card.text
    assert str(model.parent) not in card.text, "a path of this machine"
    values = dict(row for row in table_rows(card.text) if len(row) == 2)
    assert values["dialogues"] == str(len(annotations(finished)))
    assert values["model"].startswith(f"{model.name} (")
    said = [[x["user_prompt"], x["robot_utterance"]] for x in annotations(finished)]
    examples = re.findall('^- .*: "(.*)"\n  "(.*)"$', card.text, re.MULTILINE)
    assert sum(list(example) in said for example in examples) >= 2


def test_markdown_of_others_stays_text(hostile, tmp_path):
    """Whatever dialogues are the examples, they show as they are."""
    output = Path(shutil.copytree(hostile, tmp_path / "out"))
    file = output / "meta/syn_annotations.jsonl"
    for line in annotations(hostile):
        file.write_text(json.dumps(line) + "\n")
        ap.write_card(output, "somebody/hostile")
        card = (output / "README.md").read_text(encoding="utf-8")
        row = re.search('^- (.*): "(.*)"\n  "(.*)"$', card, re.MULTILINE).groups()
        keys = ("skill_current", "user_prompt", "robot_utterance")
        for cell, key in zip(row, keys, strict=True):
            # Every other part is a character that was escaped.
            parts = re.split(r"\\([!-/:-@\[-`{-~])", cell)
            plain = parts[::2]
            assert not re.search(r"[`*\[\]!|<~]|://|www\.", "".join(plain)), cell
            # An underscore within a word is no markup.
            assert not re.search(r"\b_|_\b", " ".join(plain)), cell
            parts[::2] = map(html.unescape, plain)
            assert "".join(parts) == line[key]


# ------------------------------------------------------------------------ the documents


def test_the_readme_has_a_row_for_each_flag():
    rows = dict(re.findall(r"(?m)^\| `(--[a-z-]+)` \| ([^|]*?) \|", README))
    defaults = vars(ap.parse_args(["--data-dir", "x"]))
    defaults["data_dir"] = None
    flags = {"--" + name.replace("_", "-"): name for name in defaults}
    assert rows.keys() == flags.keys()
    for flag, name in flags.items():
        value = defaults[name]
        assert rows[flag] == ("-" if value is None else f"`{value}`"), flag


def test_the_commands_of_readme_and_help_parse():
    texts = (README + ap.__doc__).replace("\\\n", " ")
    commands = re.findall(r"annotate_pgen\.py (--[^#`&\n]*)", texts)
    assert len(commands) > 5
    for command in commands:
        if not re.search("[<…]", command):
            ap.parse_args(command.split())


def test_the_first_commands_go_together():
    """The demo is annotated where it was made, with the requirements installed."""
    before, _, after = README.partition("tests/make_demo.py ")
    assert "-r requirements.txt" in before
    folder = after.split()[0]
    flags = after[after.index("--data-dir") :].splitlines()[0]
    args = ap.parse_args(flags.split())
    assert args.data_dir == Path(folder, "dataset")
    assert args.model == f"{folder}/model"
    assert f"{args.output_dir}/meta/dialogues.html" in README
    assert "<!-- tests -->\n```bash\npython -m venv" in README, "CI runs that block"


def test_links_lead_somewhere():
    headings = re.findall(r"(?m)^#+ (.*)$", README)
    anchors = {re.sub(r"[^\w -]", "", x).lower().replace(" ", "-") for x in headings}
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in anchors
        elif "://" not in target:
            assert (ROOT / target).exists(), target


def test_the_table_of_contents_is_that_of_the_banners():
    listed = re.findall(r"(?m)^  (\w+(?: \w+)?)  +\w", ap.__doc__)
    assert listed == re.findall(r"(?m)^# -+ ([\w ]+)$", SCRIPT)


def test_what_is_imported_is_declared():
    required = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    imported = set()
    for node in ast.walk(ast.parse(SCRIPT)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    packages = {re.match(r"[\w-]+", x)[0].replace("-", "_") for x in required}
    assert imported - set(sys.stdlib_module_names) == packages - {"pillow"} | {"PIL"}


@pytest.mark.parametrize(("flag", "code"), [("--help", 0), ("--no-such-flag", 2)])
def test_help_and_mistyped_flags_answer_at_once(flag, code):
    command = [sys.executable, "-X", "importtime", ROOT / "annotate_pgen.py", flag]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == code
    assert "argparse" in result.stderr
    assert not re.search(r"\b(torch|transformers|lerobot|pandas)\b", result.stderr)


def test_the_benchmark_runs_through(tmp_path):
    rows = benchmark.verify(tmp_path, benchmark.SMALL)
    assert all(row["samples/s"] > 0 for row in rows)
