"""The documents name every command and setting, and what they show runs."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

import finetune_colab as ft

DOCUMENTS = ["README.md", "COLAB_QUICKSTART.md", "finetune.md", "CHANGELOG.md"]
GUIDE = (ROOT / "finetune.md").read_text(encoding="utf-8")


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text_of(name), re.DOTALL)


def command_lines() -> Iterator[tuple[str, str]]:
    for name in DOCUMENTS:
        for block in blocks(name, "(?:bash|text)"):
            for line in block.splitlines():
                if "finetune_colab.py" in line.split("#")[0]:
                    yield name, line.lstrip("!").partition("  #")[0]


@pytest.mark.parametrize("command", ft.COMMANDS)
def test_every_command_is_in_the_guide(command: str) -> None:
    assert f"`python finetune_colab.py {command}`" in GUIDE


@pytest.mark.parametrize("name", ft.setting_types())
def test_every_setting_is_in_the_guide_with_its_default(name: str) -> None:
    row = re.search(rf"^\| `{name}` `{ft.flag(name)}` \| (.+?) \| (.+) \|$", GUIDE, re.MULTILINE)
    assert row, f"{name} has no row"
    shown = row[1].strip("`")
    expected = getattr(ft.Config, name)
    assert ft.parse_setting(name, "" if shown == "empty" else shown) == expected
    assert len(row[2]) > 15


@pytest.mark.parametrize("place, line", list(command_lines()))
def test_every_documented_command_line_is_understood(place: str, line: str) -> None:
    words = line.split()
    if words[:2] == ["pip", "install"] or "drag" in line:
        return
    assert words[:2] == ["python", "finetune_colab.py"], f"{place}: {line}"
    command, _ = ft.read_command_line(words[2:])
    assert command in ft.COMMANDS


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_flag_mentioned_exists(name: str) -> None:
    known = {ft.flag(setting) for setting in ft.setting_types()} | {"--help", "--config"}
    others = {"--quiet", "--jinja", "--lora"}  # of other programs
    others |= {
        "--logdir",
        "--project",
        "--multi",
        "--num",
        "--mixed",
        "--nproc-per-node",
        "--use",
        "--cpu",
    }  # of launchers
    for word in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text_of(name)):
        assert word.replace("--no-", "--") in known | others, word


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_to_a_file_leads_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", text_of(name)):
        if not target.startswith("http"):
            file, _, section = target.partition("#")
            file = file or name
            assert (ROOT / file).exists(), target
            titles = re.findall(r"^#+ (.+)$", text_of(file), re.MULTILINE) if section else []
            anchors = [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles]
            assert not section or section in anchors


def test_the_figures_in_the_guide_are_those_that_are_written() -> None:
    from types import SimpleNamespace

    trained: Any = SimpleNamespace(
        history=[{"step": 1, "loss": 1.0}],
        base_loss=1,
        final_loss=1,
        best_step=1,
        steps=1,
        epochs=1,
    )
    vars(trained).update(tokens=1, tally=ft.Tally(trainable=1, parameters=1, seconds=1.0))
    data: Any = SimpleNamespace(train_pairs=[], held_out_pairs=[])
    for name in ft.metrics_of(data, trained):
        assert f"`{name}`" in GUIDE


def test_the_requirements_are_those_in_the_script() -> None:
    head = re.search(r"# /// script\n(.*?)# ///", text_of("finetune_colab.py"), re.DOTALL)
    assert head
    script = tomllib.loads(re.sub(r"^# ?", "", head[1], flags=re.MULTILINE))["dependencies"]
    lines = text_of("requirements-finetune.txt").splitlines()
    assert script == [line for line in lines if line and not line.startswith("#")]


def test_the_constraints_meet_the_requirements() -> None:
    pins = dict(
        line.split("==") for line in text_of("constraints.txt").lower().splitlines() if "==" in line
    )
    for line in text_of("requirements-finetune.txt").splitlines():
        if match := re.fullmatch(r"([a-z0-9-]+)>=([\d.]+)", line):
            pinned = [int(part) for part in pins[match[1]].split(".")]
            assert pinned >= [int(part) for part in match[2].split(".")]


def test_ci_runs_the_test_command_of_the_readme() -> None:
    commands = next(block for block in blocks("README.md", "bash") if "pytest" in block)
    ci = text_of(".ci/run").replace('"$versions"', "constraints.txt").replace(" --quiet", "")
    for line in commands.splitlines():
        assert line in ci


def test_the_map_at_the_top_names_the_sections_in_order() -> None:
    source = text_of("finetune_colab.py")
    banners = re.findall(r"^# =+\n# (\d+)  (.+)\n# =+$", source, re.MULTILINE)
    assert [int(number) for number, _ in banners] == list(range(1, len(banners) + 1))
    for number, title in banners:
        assert f"{number} {title.lower()}" in str(ft.__doc__).lower()


def test_no_function_is_longer_than_a_screen() -> None:
    import ast

    for node in ast.walk(ast.parse(text_of("finetune_colab.py"))):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 50, f"{node.name} has {length} lines"


def test_every_section_calls_only_sections_above_it() -> None:
    import ast

    source = text_of("finetune_colab.py")
    starts = [
        source[: match.start()].count("\n") + 1
        for match in re.finditer(r"^# =+\n# \d+  .+\n# =+$", source, re.MULTILINE)
    ]

    def section(line: int) -> int:
        return sum(start <= line for start in starts)

    tree = ast.parse(source)
    home = {node.name: section(node.lineno) for node in tree.body if hasattr(node, "name")}
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in ast.walk(node):
                if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store):
                    home[target.id] = section(node.lineno)
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        own = {arg.arg for arg in ast.walk(function) if isinstance(arg, ast.arg)}
        own |= {
            n.id
            for n in ast.walk(function)
            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
        }
        for name in ast.walk(ast.Module(body=function.body, type_ignores=[])):
            if isinstance(name, ast.Name) and name.id in home and name.id not in own:
                assert home[name.id] <= section(function.lineno), f"{function.name}: {name.id}"


def test_a_later_colab_package_list_is_compared_rightly() -> None:
    spec = util.spec_from_file_location("dry_run", ROOT / ".ci" / "colab_dry_run.py")
    assert spec
    assert spec.loader
    dry_run = util.module_from_spec(spec)
    spec.loader.exec_module(dry_run)
    report = {
        "install": [
            {"metadata": {"name": "Bits_and.Bytes", "version": "1"}},
            {"metadata": {"name": "pandas", "version": "3.0"}},
        ]
    }
    new, changed = dry_run.changes({"Pandas": "2.2.3", "numpy": "2.1.3"}, report)
    assert new == {"bits-and-bytes": "1"}
    assert changed == {"pandas": ("2.2.3", "3.0")}


def test_the_example_workbook_is_ready_to_run() -> None:
    pairs = ft.find_pairs(ft.Config(DATASET_PATH=str(ROOT / ft.EXAMPLE_DATASET)))
    assert len(pairs.kept) >= 20
    assert pairs.dropped == []
    assert all(
        pair.question.endswith("?") and len(pair.answer.split()) >= 15 for pair in pairs.kept
    )


@pytest.mark.parametrize("name", ["COLAB_QUICKSTART.md", "finetune.md"])
def test_the_python_in_the_documents_runs(
    name: str, phi_folder: Path, workbook: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ft.Config, "MODEL_NAME", str(phi_folder))
    monkeypatch.setattr(ft.Config, "NUM_EPOCHS", 1)
    monkeypatch.setattr(ft.Config, "MAX_TOKENS", 3)
    assert run()[0] == 0
    for block in blocks(name, "python"):
        exec(block, {})


def said_texts() -> list[str]:
    """All that the script can say; what is filled in is …"""
    import ast

    tree = ast.parse(text_of("finetune_colab.py"))
    texts = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values]
            texts.append("".join(parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
    return texts


def messages_in(name: str) -> list[str]:
    """The first column of the tables that say what to do about a message."""
    tables = re.findall(r"^\| it says \|.*\n(?:\|.*\n)+", text_of(name), re.MULTILINE)
    return [
        part.strip("` ")
        for table in tables
        for line in table.splitlines()[2:]
        for part in line.split("|")[1].split("; ")
    ]


@pytest.mark.parametrize(
    "message",
    [m for name in ("COLAB_QUICKSTART.md", "finetune.md") for m in messages_in(name)],
)
def test_every_message_that_is_explained_is_said(message: str) -> None:
    if message.startswith(("anything else", "answers ")):
        return
    words = [re.escape(part.strip()) for part in re.split("…|\\d+|dataset.xlsx", message)]
    pattern = re.compile(".*".join(words), re.DOTALL | re.IGNORECASE)
    assert any(pattern.search(text) for text in said_texts()), message


FIGURE = re.compile(
    r"\b\d[\d.,]* (?:s|ms|min|minutes|seconds|GB|MB|tokens a second|times the)\b(?! a file)|\b0\.\d+ of the"
)
SOURCE = re.compile(r"measured|computed|arithmetic|counted|took|shortened", re.IGNORECASE)
CHOSEN = (  # sections whose figures are limits and habits that were chosen, not found
    "Merged weights",
    "GGUF",
    "A Space",
    "Where the data may lie",
    "What each layer",
    "Preset",
    "Data",
    "Files, and from Python",
)


@pytest.mark.parametrize("name", ["README.md", "COLAB_QUICKSTART.md", "finetune.md"])
def test_every_figure_says_where_it_comes_from(name: str) -> None:
    for part in re.split(r"^#+ ", text_of(name), flags=re.MULTILINE):
        title, _, body = part.partition("\n")
        if (figures := FIGURE.findall(body)) and title not in CHOSEN:
            assert SOURCE.search(body), f"{title}: {figures}"


def test_measured_figures_name_a_machine_and_a_day() -> None:
    for name in ("README.md", "finetune.md", "benchmarks/RESULTS.md"):
        text = " ".join(text_of(name).split())
        for match in re.finditer(r"\b[Mm]easured (?:side by side|on (?:\d|a shared|the))", text):
            nearby = text[match.start() : match.start() + 400]
            assert re.search(r"20\d\d|the same", nearby), f"{name}: {nearby[:150]}"
