"""README, --help, the inline dependencies and requirements.txt say the same."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import annotate_pgen

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SPECIFIED = {
    "--repo-id": None,
    "--data-dir": None,
    "--model": "Qwen/Qwen2-VL-7B-Instruct",
    "--device": "cuda",
    "--dtype": "bfloat16",
    "--temperature": 0.7,
    "--sample-interval": 1.0,
    "--num-image-views-per-sample": 1,
    "--output-dir": None,
    "--push-to-hub": False,
}


@pytest.fixture(scope="module")
def help_text():
    command = [sys.executable, str(ROOT / "annotate_pgen.py"), "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def defaults(help_text):
    """Flag -> default, as --help states them."""
    stated = {}
    for entry in re.split(r"\n  (?=--)", help_text)[1:]:
        flag = re.match(r"--[a-z-]+", entry)[0]
        stated[flag] = re.findall(r"\(default:\s+([^)]*)\)", entry)[0]
    return stated


def test_help_states_every_default(help_text):
    args = vars(annotate_pgen.parse_args(["--repo-id", "a/b"]))
    args["repo_id"] = None
    stated = defaults(help_text)
    assert stated == {
        "--" + name.replace("_", "-"): str(value) for name, value in args.items()
    }
    assert {
        flag: str(value) for flag, value in SPECIFIED.items()
    }.items() <= stated.items()
    for title in ("data:", "model:", "generation:", "output:", "examples:"):
        assert f"\n{title}\n" in help_text
    examples = help_text[help_text.index("examples:") :]
    assert examples.count("python annotate_pgen.py") == 3


def test_examples_parse(help_text):
    examples = help_text[help_text.index("examples:") :] + README
    commands = re.findall(
        r"(?:python|torchrun .*?) annotate_pgen\.py (.*)", examples.replace("\\\n", " ")
    )
    assert len(commands) > 5
    for command in commands:
        flags = re.split(r"[#`]|&&", command)[0]
        if not re.search("[<…]", flags):
            annotate_pgen.parse_args(flags.split())


def test_readme_table_agrees(help_text):
    section = README.split("## Parameters")[1].split("## ")[0]
    rows = re.findall(r"^\| `(--[a-z-]+)` \| ([^|]*) \|", section, re.MULTILINE)
    stated = {
        flag: "None" if value == "-" else value.strip("`") for flag, value in rows
    }
    assert stated == defaults(help_text)


def declared():
    """The dependencies in the script's header."""
    header = (ROOT / "annotate_pgen.py").read_text(encoding="utf-8").split("# ///")[1]
    return re.findall(r'"([^"]+)"', header.split("dependencies")[1])


def package_name(requirement):
    return re.match(r"[\w-]+", requirement)[0].lower().replace("-", "_")


def test_dependencies_agree():
    required = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert required == declared()


def test_what_is_imported_is_declared():
    tree = ast.parse((ROOT / "annotate_pgen.py").read_text(encoding="utf-8"))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    packages = imported - set(sys.stdlib_module_names)
    # Its package has another name.
    packages -= {"PIL"}
    packages |= {"pillow"}
    names = {package_name(requirement) for requirement in declared()}
    assert packages == names


def test_readme_names_the_vocabulary():
    for name in (*annotate_pgen.SCENARIO_TYPES, *annotate_pgen.RESPONSE_TYPES):
        assert f"`{name}`" in README
    assert "2502.19417" in README


@pytest.mark.parametrize(
    "flags, code", [(["--help"], 0), (["--no-such-flag"], 2), (["--seed", "hot"], 2)]
)
def test_help_and_mistyped_flags_import_nothing_heavy(flags, code):
    command = [sys.executable, "-X", "importtime", str(ROOT / "annotate_pgen.py")]
    result = subprocess.run([*command, *flags], capture_output=True, text=True)
    assert result.returncode == code
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "argparse" in imported
    names = {package_name(requirement) for requirement in declared()} | {"PIL"}
    assert not imported & names


def test_german_in_ten_lines(monkeypatch):
    """The README's lines make a prompt that can be used, and asks for German."""
    section = README.split("## Changing the prompt")[1].split("\n## ")[0]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    assert code.strip().count("\n") < 10
    names = {"PROMPT": annotate_pgen.PROMPT}
    exec(code, names)
    for name in ("SCENARIO_TYPES", "RESPONSE_TYPES", "SUITABLE_RESPONSES", "PROMPT"):
        monkeypatch.setattr(annotate_pgen, name, names[name])
    annotate_pgen.check_prompt()
    prompt = annotate_pgen.construct_prompt(
        "aufräumen", [], "greifen", "negative_task", "confirmation"
    )
    assert "German" in prompt
    assert names["SCENARIO_TYPES"]["negative_task"] in prompt
