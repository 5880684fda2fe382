"""The page with frames and dialogues: its parts, and the whole of it in Chromium."""

from __future__ import annotations

import io
import re
from collections import Counter
from dataclasses import replace

import browser
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import annotate_pgen as ap

SCENARIOS = ("specific_object", "negative_task", "implicit_request")
RESPONSES = ("confirmation", "clarification")
HOSTILE = (
    "<script>document.title = 'broken in'</script>",
    "</script></style></title><img src=x onerror=\"document.title='broken in'\">",
    "\"'><svg onload=document.title='broken_in'>",
    "<img src=https://example.com/pixel.png>",
    "<a href=\"javascript:document.title='broken in'\">press me</a>",
    "{{ 7 * 7 }} {% raw %} {# gone #} ${7 * 7}",
    "\u202eright to left\u2066 and never closed",
    "nul \x00 escape \x1b[31m bell \x07 line\nline\ttab \u2028 \ud800 half a pair",
    "<!-- not closed",
    "]]> &amp; &lt;b&gt; &#0; &notin",
    "👩🏽‍🚀🤖 ünïcödé 中文 العربية",
    "no spaces " + "x" * 10_000,
    "   ",
    "",
)


def make_line(number: int, **changes) -> dict:
    """A line of syn_annotations.jsonl: episodes of 12 samples and three skills."""
    episode, sample = divmod(number, 12)
    skills = [f"skill {i}" for i in range(3)]
    line = {
        "episode_id": episode,
        "frame_index": sample * 30,
        "timestamp": float(sample),
        "skill_current": skills[sample // 4],
        "skill_history": skills[: sample // 4],
        "task_description": "put the brick away",
        "scenario_type": SCENARIOS[number % 3],
        "response_type": RESPONSES[number % 2],
        "user_prompt": f"Could you do number {number}?",
        "robot_utterance": "Sure, on my way.",
        "task_index_high_level": number,
    }
    line.update(changes)
    return line


def picture(width: int = 64, height: int = 48, noise: bool = False) -> Image.Image:
    if not noise:
        return Image.new("RGB", (width, height), (200, 120, 60))
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def make_page(lines: list[dict], jpeg: bytes | None = None) -> ap.PageContent:
    jpeg = ap.thumbnail(picture()) if jpeg is None else jpeg
    views = [("observation.images.front", jpeg), ("observation.images.wrist", jpeg)]
    skills = [ap.Skill(f"skill {i}", 4.0 * i, 4.0 * i + 4) for i in range(3)]
    times = [float(i) for i in range(12)]
    episodes = ap.pick_timelines(sorted({line["episode_id"] for line in lines}))
    return ap.PageContent(
        dataset_name="someone/some_dataset",
        dialogues=[ap.PageDialogue(line, views) for line in lines],
        total=len(lines),
        settings=[("model", "Qwen/Qwen2-VL-7B-Instruct"), ("temperature", "0.7")],
        figures=ap.measure_quality(lines),
        scenario_bars=ap.count_bars(lines, "scenario_type"),
        response_bars=ap.count_bars(lines, "response_type"),
        timelines=[ap.make_timeline(e, skills, 12.0, times) for e in episodes],
    )


# ------------------------------------------------------------------- parts


def test_few_dialogues_are_all_on_the_page():
    lines = [make_line(i) for i in range(200)]
    assert ap.pick_for_page(lines) == list(range(200))
    assert ap.pick_for_page([]) == []


def test_a_rare_type_skill_and_episode_are_on_the_page():
    lines = [make_line(i % 36) for i in range(5000)]
    lines[4000] = make_line(0, scenario_type="rare")
    lines[4001] = make_line(0, response_type="rare")
    lines[4002] = make_line(0, skill_current="rare")
    lines[4003] = make_line(0, episode_id=99)
    assert {4000, 4001, 4002, 4003} <= set(ap.pick_for_page(lines))


picks = st.fixed_dictionaries(
    {
        "scenario_type": st.sampled_from(SCENARIOS),
        "response_type": st.sampled_from(RESPONSES),
        "skill_current": st.sampled_from("abcdef"),
        "episode_id": st.integers(0, 20),
    }
)


@given(st.lists(picks, max_size=120), st.integers(0, 60))
def test_dialogues_are_spread_in_order_and_the_same_each_time(lines, limit):
    picked = ap.pick_for_page(lines, limit=limit)
    assert len(picked) == min(limit, len(lines))
    assert picked == sorted(set(picked))
    assert picked == ap.pick_for_page(lines, limit=limit)
    # No value is left out while there is room for one of each.
    fields = ("scenario_type", "response_type", "skill_current", "episode_id")
    values = {field: {line[field] for line in lines} for field in fields}
    if sum(map(len, values.values())) <= limit:
        for field in fields:
            assert {lines[i][field] for i in picked} == values[field]


def test_equal_shares_where_there_is_enough_of_everything():
    lines = [make_line(i) for i in range(12 * 300)]
    picked = [lines[i] for i in ap.pick_for_page(lines)]
    assert max(Counter(line["episode_id"] for line in picked).values()) <= 2
    for field, kinds in (("scenario_type", 3), ("response_type", 2)):
        counts = Counter(line[field] for line in picked)
        assert min(counts.values()) > 0.6 * 200 / kinds


@pytest.mark.parametrize(
    ("size", "mode", "expected"),
    [
        ((640, 480), "RGB", (320, 240)),
        ((480, 640), "RGB", (240, 320)),
        ((96, 96), "RGB", (96, 96)),
        ((640, 480), "RGBA", (320, 240)),
        ((640, 480), "L", (320, 240)),
        ((4000, 2), "RGB", (320, 1)),
    ],
)
def test_thumbnail(size, mode, expected):
    jpeg = ap.thumbnail(Image.new(mode, size))
    with Image.open(io.BytesIO(jpeg)) as image:
        assert (image.format, image.size, image.mode) == ("JPEG", expected, "RGB")


def test_timeline_follows_the_rule_of_the_skill_of_a_frame():
    skills = [
        ap.Skill("late start", 1.0, 2.0),
        ap.Skill("gap before", 5.0, 6.0),
        ap.Skill("overlaps", 5.5, 9.0),
        ap.Skill("after the end", 11.0, 12.0),
    ]
    timeline = ap.make_timeline(3, skills, 10.0, [0.0, 5.0, 5.0001, 10.0])
    bars = [(bar.name, bar.start, bar.width) for bar in timeline.bars]
    assert bars == [
        ("late start", 0, 500),
        ("gap before", 500, 50),
        ("overlaps", 550, 450),
    ]
    assert timeline.ticks == [0, 500, 1000]
    assert timeline.sample_count == 4


@given(
    st.lists(st.floats(0, 100), min_size=1, max_size=50).map(sorted), st.floats(0, 60)
)
def test_the_bars_of_a_timeline_fill_it(starts, seconds):
    skills = [ap.Skill(str(i), start, 0) for i, start in enumerate(starts)]
    bars = ap.make_timeline(0, skills, seconds, starts).bars
    assert sum(bar.width for bar in bars) == 1000
    end = 0
    for bar in bars:
        assert bar.start == end
        end = bar.start + bar.width


def test_timelines_are_of_episodes_spread_over_the_dataset():
    assert ap.pick_timelines([4, 7]) == [4, 7]
    assert ap.pick_timelines(range(101), limit=5) == [0, 25, 50, 75, 100]


def test_bars_count_and_say_what_was_recovered():
    lines = [make_line(i, scenario_type="a", skill_recovered=i > 0) for i in range(4)]
    lines.append(make_line(4, scenario_type="b"))
    assert ap.count_bars(lines, "scenario_type") == [
        ap.CountBar("a", 4, 100, "3 recovered"),
        ap.CountBar("b", 1, 25),
    ]
    assert ap.count_bars([], "scenario_type") == []


@given(st.text(max_size=50), st.integers(1, 100))
def test_text_is_safe_to_write_and_not_too_long(text, times):
    clean = ap.page_text(text * times)
    clean.encode("utf-8")
    assert len(clean) <= ap.MAX_PAGE_TEXT + 1
    assert not re.search(r"[\x00-\x1f\x7f-\x9f]", clean)


def test_the_page_stays_below_its_size(tmp_path):
    # Noise is what JPEG compresses least.
    jpeg = ap.thumbnail(picture(640, 480, noise=True))
    page = make_page([make_line(i) for i in range(200)], jpeg)
    path = tmp_path / "page.html"
    ap.write_page(path, page)
    assert 1_000_000 < path.stat().st_size <= ap.MAX_PAGE_BYTES
    assert path.read_text(encoding="utf-8").count("<article ") == 200


@settings(max_examples=10, deadline=None)
@given(st.integers(20_000, 400_000), st.integers(1, 30))
def test_a_page_fits_any_size(tmp_path_factory, limit, count):
    jpeg = ap.thumbnail(picture(320, 240, noise=True))
    page = make_page([make_line(i) for i in range(count)], jpeg)
    path = tmp_path_factory.mktemp("page") / "page.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ap, "MAX_PAGE_BYTES", limit)
        ap.write_page(path, page)
    html = path.read_text(encoding="utf-8")
    shown = html.count("<article ")
    assert path.stat().st_size <= limit or shown == 0
    says = f"{shown} of {count} dialogues are on this"
    assert (says in html) == (shown < count)


def test_long_texts_alone_do_not_break_the_size(tmp_path):
    text = '"' * 10_000
    texts = {"user_prompt": text, "robot_utterance": text, "task_description": text}
    lines = [make_line(i, skill_current=text + str(i), **texts) for i in range(200)]
    ap.write_page(tmp_path / "page.html", make_page(lines))
    assert (tmp_path / "page.html").stat().st_size <= ap.MAX_PAGE_BYTES


def test_a_page_without_dialogues_views_and_types(tmp_path):
    bare = make_line(0, scenario_type="", response_type="")
    empty = ap.PageContent(dataset_name="empty", dialogues=[], total=0)
    assert "<article " not in ap.render_page(empty)
    page = replace(make_page([bare]), dialogues=[ap.PageDialogue(bare, [])])
    html = ap.render_page(page)
    assert "<img " not in html and "no type" in html


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb, as WCAG defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    light = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * light[0] + 0.7152 * light[1] + 0.0722 * light[2]


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_has_the_contrast_of_wcag_aa(scheme):
    blocks = re.findall(r":root \{(.*?)\}", ap.PAGE_STYLE, re.DOTALL)
    colour = dict(re.findall(r"--([\w-]+): (#\w{6});", blocks[scheme]))
    for text in ("ink", "quiet"):
        for background in ("page", "panel", "person", "robot"):
            assert contrast(colour[text], colour[background]) >= 4.5, (text, background)
    assert contrast(colour["accent"], colour["page"]) >= 4.5
    assert contrast(colour["good"], colour["good-back"]) >= 4.5
    assert contrast(colour["bad"], colour["bad-back"]) >= 4.5
    assert contrast(colour["control"], colour["panel"]) >= 3


def test_numbers_of_skills_have_contrast_on_every_colour():
    ink = re.search(r"\.number \{[^}]*color: (#\w{6})", ap.PAGE_STYLE)[1]
    backgrounds = re.findall(r"\.color\d \{ background: (#\w{6})", ap.PAGE_STYLE)
    assert len(backgrounds) == 10
    assert min(contrast(ink, background) for background in backgrounds) >= 4.5


# ------------------------------------------------------------- in a browser

needs_chromium = pytest.mark.skipif(
    not browser.CHROMIUM, reason="chromium is not installed (apt-get install chromium)"
)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    running = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield running
    running.close()


@pytest.fixture(scope="module")
def plain_page(tmp_path_factory):
    """36 dialogues in 3 episodes, the first half of them verified."""
    lines = [make_line(i) for i in range(36)]
    for i, line in enumerate(lines[:18]):
        line["skill_recovered"] = i % 3 > 0
    path = tmp_path_factory.mktemp("plain") / "dialogues.html"
    ap.write_page(path, make_page(lines))
    return path


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory):
    lines = []
    for i, text in enumerate(HOSTILE):
        fields = ("skill_current", "task_description", "scenario_type", "response_type")
        texts = dict.fromkeys((*fields, "user_prompt", "robot_utterance"), text)
        lines.append(make_line(i, skill_history=[text] * 5, **texts))
    page = make_page(lines)
    jpeg = page.dialogues[0].views[0][1]
    skills = [ap.Skill(text, float(i), 0) for i, text in enumerate(HOSTILE)]
    page = replace(
        page,
        dataset_name=HOSTILE[0] + " in the title",
        notice=" ".join(HOSTILE),
        settings=[(text, text) for text in HOSTILE],
        figures=[(text, text) for text in HOSTILE],
        timelines=[ap.make_timeline(0, skills, 20.0, [0.0])],
        dialogues=[
            ap.PageDialogue(line, [(line["task_description"], jpeg)]) for line in lines
        ],
    )
    path = tmp_path_factory.mktemp("hostile") / "dialogues.html"
    ap.write_page(path, page)
    return path


SHOWN = "[...document.querySelectorAll('article')].filter(a => a.offsetParent).length"
RESULT = "document.querySelector('output').textContent"
PICTURES = """
(async () => {
  const pictures = [...document.images];
  await Promise.all(pictures.map((picture) => picture.decode()));
  const shown = pictures.filter((picture) => picture.naturalWidth > 0);
  return [pictures.length, shown.length];
})()
"""


def choose(page, name: str, value: str) -> None:
    """Sets a field as a person does: the page learns of it by an event."""
    page.run(f"""
        document.getElementById({name!r}).value = {value!r};
        document.getElementById({name!r})
          .dispatchEvent(new Event("input", {{ bubbles: true }}));
    """)


@needs_chromium
def test_pictures_are_shown_and_nothing_else_is_asked_for(chromium, plain_page):
    chromium.open(plain_page)
    assert chromium.run(PICTURES) == [72, 72]
    assert chromium.run(SHOWN) == 36
    assert chromium.run(RESULT) == "36 of 36 dialogues"
    addresses = [a for a in chromium.requests if not a.startswith("data:image/jpeg;")]
    assert addresses == [plain_page.as_uri()]
    assert chromium.errors == []


@needs_chromium
@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("episode", "1", 12),
        ("skill", "2", 12),
        ("scenario", "negative_task", 12),
        ("response", "clarification", 18),
        ("verified", "recovered", 12),
        ("verified", "not recovered", 6),
        ("search", "NUMBER 35", 1),
        ("search", "  away   brick ", 36),
        ("search", "person", 0),
        ("search", "clarification", 18),
    ],
)
def test_filters_filter(chromium, plain_page, name, value, expected):
    chromium.open(plain_page)
    choose(chromium, name, value)
    assert chromium.run(SHOWN) == expected
    assert chromium.run(RESULT) == f"{expected} of 36 dialogues"
    assert chromium.run("location.hash").startswith(f"#{name}=")
    # The button shows all again.
    chromium.run("document.querySelector('button').click()")
    chromium.run("new Promise((done) => setTimeout(done, 10))")
    assert chromium.run(SHOWN) == 36
    assert chromium.errors == []


@needs_chromium
def test_filters_together(chromium, plain_page):
    chromium.open(plain_page, "#episode=1&skill=0&scenario=negative_task&other=1")
    assert chromium.run(RESULT) == "1 of 36 dialogues"
    choose(chromium, "search", "number 12")
    choose(chromium, "scenario", "specific_object")
    assert chromium.run(RESULT) == "1 of 36 dialogues"
    # The address brings the same back.
    fragment = chromium.run("location.hash")
    chromium.open(plain_page, fragment)
    assert chromium.run("document.getElementById('search').value") == "number 12"
    assert chromium.run(RESULT) == "1 of 36 dialogues"
    choose(chromium, "search", "nowhere")
    assert chromium.run(RESULT) == "0 of 36 dialogues"
    chromium.open(plain_page, "#episode=77")
    assert chromium.run(RESULT) == "36 of 36 dialogues"
    chromium.open(plain_page, "#episode-2-frame-30")
    assert chromium.run("document.querySelector(':target').dataset.episode") == "2"


@needs_chromium
def test_the_keyboard_is_enough(chromium, plain_page):
    chromium.open(plain_page)
    chromium.press("/", "/")
    assert chromium.run("document.activeElement.id") == "search"
    chromium.press("5", "5")
    chromium.press("/", "/")
    assert chromium.run("document.activeElement.value") == "5/"
    assert chromium.run("document.activeElement.matches(':focus-visible')")
    outline = "getComputedStyle(document.activeElement).outlineWidth"
    assert chromium.run(outline) == "3px"
    chromium.press("Tab")
    assert chromium.run("document.activeElement.textContent") == "Show all"
    chromium.press("Enter", "\r")
    chromium.run("new Promise((done) => setTimeout(done, 10))")
    assert chromium.run(RESULT) == "36 of 36 dialogues"


@needs_chromium
def test_every_field_and_picture_has_a_name(chromium, plain_page):
    chromium.open(plain_page)
    assert chromium.run("""
        [...document.querySelectorAll("select, input")]
          .every((field) => field.labels.length === 1)
    """)
    assert chromium.run("[...document.images].every((picture) => picture.alt)")
    assert chromium.run("""
        [...document.querySelectorAll("[aria-labelledby]")].every((element) =>
          document.getElementById(element.getAttribute("aria-labelledby")).textContent)
    """)
    ids = "[...document.querySelectorAll('[id]')].map((element) => element.id)"
    assert chromium.run(f"new Set({ids}).size === {ids}.length")


@needs_chromium
def test_hostile_text_is_text(chromium, hostile_page):
    chromium.open(hostile_page)
    assert chromium.run(PICTURES) == [len(HOSTILE), len(HOSTILE)]
    title = "Dialogues of " + ap.page_text(HOSTILE[0] + " in the title")
    assert chromium.run("document.title") == title
    count = "document.querySelectorAll({!r}).length"
    assert chromium.run(count.format("script")) == 1
    assert chromium.run(count.format("article")) == len(HOSTILE)
    assert chromium.run(count.format("article a:not([href^='#episode-'])")) == 0
    assert chromium.run(count.format("[onerror], [onload], iframe, object, embed")) == 0
    # What was written is what is read, but for control characters and length.
    prompts = chromium.run(
        "[...document.querySelectorAll('.person bdi')].map((text) => text.textContent)"
    )
    assert prompts == [ap.page_text(text) for text in HOSTILE]
    options = "document.getElementById('skill').options"
    for i in range(1, chromium.run(f"{options}.length")):
        number = chromium.run(f"{options}[{i}].value")
        choose(chromium, "skill", number)
        assert chromium.run(SHOWN) == 1
    addresses = [a for a in chromium.requests if not a.startswith("data:image/jpeg;")]
    assert addresses == [hostile_page.as_uri()]
    assert chromium.errors == []


@needs_chromium
def test_a_script_or_picture_that_came_in_all_the_same_would_do_nothing(
    chromium, plain_page, tmp_path
):
    html = plain_page.read_text(encoding="utf-8")
    bad = "<script>document.title = 1</script><img src=x onerror='document.title = 1'>"
    bad += "<img id=other src=other.jpg>"
    (tmp_path / "other.jpg").write_bytes(ap.thumbnail(picture()))
    path = tmp_path / "page.html"
    path.write_text(html.replace("<main>", f"<main>{bad}"), encoding="utf-8")
    chromium.open(path)
    assert chromium.run("document.getElementById('other').naturalWidth") == 0
    assert chromium.run("document.title") == "Dialogues of someone/some_dataset"
    assert chromium.run(RESULT) == "36 of 36 dialogues"
    assert any("Content Security Policy" in error for error in chromium.errors)


@needs_chromium
@pytest.mark.parametrize("width", [320, 390, 800, 1280])
def test_nothing_is_wider_than_the_window(chromium, plain_page, hostile_page, width):
    for path in (plain_page, hostile_page):
        chromium.show_as(width, 800)
        chromium.open(path)
        assert chromium.run("document.documentElement.scrollWidth") <= width
        assert chromium.run("""
            [...document.querySelectorAll("body *")]
              .map((element) => element.getBoundingClientRect().right)
              .every((right) => right <= innerWidth + 1)
        """)


@needs_chromium
def test_dark_is_dark(chromium, plain_page):
    backgrounds = []
    for scheme in ("light", "dark"):
        chromium.show_as(1280, 800, scheme)
        chromium.open(plain_page)
        colour = chromium.run("getComputedStyle(document.body).backgroundColor")
        backgrounds.append(sum(map(int, re.findall(r"\d+", colour))))
    assert backgrounds[0] > 600 and backgrounds[1] < 100


@needs_chromium
def test_without_javascript_everything_is_shown(chromium, plain_page):
    chromium.command("Emulation.setScriptExecutionDisabled", value=True)
    chromium.open(plain_page)
    shown = chromium.run(SHOWN)
    filters = chromium.run("document.getElementById('filters').offsetParent === null")
    chromium.command("Emulation.setScriptExecutionDisabled", value=False)
    assert (shown, filters) == (36, True)
