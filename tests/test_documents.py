"""The documents name every command, setting and figure, and what they show runs; the script keeps its shape."""

import ast
import json
import re
import shlex
import sys
import tomllib
from importlib import metadata, util
from pathlib import Path

import pytest
from conftest import Run
from seams import ROOT, SCRIPT, Config, UserError, find_pairs, setting_defaults, settings_of

DOCUMENTS = ["README.md", "COLAB_QUICKSTART.md", "finetune.md", "CHANGELOG.md"]
OTHERS = ["benchmarks/RESULTS.md", "requirements-finetune.txt", "constraints.txt", ".ci/run"]
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS + OTHERS}
GUIDE, SOURCE = TEXTS["finetune.md"], SCRIPT.read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
DOCSTRING = ast.get_docstring(TREE) or ""
COMMANDS = {"train", *re.findall(r"python finetune_colab\.py ([a-z]+)", DOCSTRING)}
FLAGS = {name: "--" + name.lower().replace("_", "-") for name in setting_defaults()}
BANNER = re.compile(r"^# =+\n# (\d+)  (.+)\n# =+$", re.MULTILINE)
OF_HELP = "--help --help-all --version --config".split()
OF_LAUNCHERS = "--quiet --jinja --lora --logdir --project --multi --num --mixed --nproc-per-node --use --cpu".split()


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXTS[name], re.DOTALL)


def test_every_command_line_shown_is_understood_and_every_command_is_in_the_guide() -> None:
    code = "\n".join(block for name in DOCUMENTS for block in blocks(name, "(?:bash|text)"))
    shown = re.findall(r"^!?python finetune_colab\.py(.*)$", code, re.MULTILINE)
    assert len(shown) > 25
    for words in (shlex.split(line, comments=True) for line in shown):
        settings_of(*words)  # a UserError, or an exit for --help, if not
        assert not words or words[0].startswith("-") or words[0] in COMMANDS
    for command in COMMANDS:
        assert f"`python finetune_colab.py {command}`" in GUIDE


def test_every_setting_is_in_the_guide_with_its_default_and_range() -> None:
    for name, default in setting_defaults().items():
        row = re.search(rf"^\| `{name}` `{FLAGS[name]}` \| (.+?) \| (.+) \|$", GUIDE, re.MULTILINE)
        assert row, f"{name} has no row"
        shown = row[1].strip("`").removeprefix("empty")
        if isinstance(default, float):
            assert float(shown) == default
        else:
            text = ",".join(default) if isinstance(default, list) else str(default)
            assert shown.lower() in (text.lower(), "auto" if default is None else text.lower())
        assert len(row[2]) > 15
        if isinstance(default, (int, float)) and not isinstance(default, bool):
            low, high = row[2].partition(" |")[0].replace(",", "").split(" to ")
            for end in (low, high):
                settings_of("chat", FLAGS[name], end)
            for beyond in (f"-{low}1", f"{high}9"):
                with pytest.raises(UserError):
                    settings_of("chat", FLAGS[name], beyond)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_flag_and_link_leads_somewhere(name: str) -> None:
    for word in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", TEXTS[name]):
        assert word.replace("--no-", "--") in {*FLAGS.values(), *OF_HELP, *OF_LAUNCHERS}, word
    for target in re.findall(r"\]\(([^)]+)\)", TEXTS[name]):
        file, _, section = target.partition("#")
        if not target.startswith("http"):
            assert (ROOT / (file or name)).exists(), target
            titles = re.findall(r"^#+ (.+)$", TEXTS[file or name], re.MULTILINE) if section else []
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert not section or section in anchors, target


def test_the_figures_in_the_guide_are_those_that_are_written(tuned_run: Path) -> None:
    metrics = json.loads((tuned_run / "model/training_visuals/training_metrics.json").read_text())
    assert len(metrics) > 10
    assert [name for name in metrics if f"`{name}`" not in GUIDE] == []


def test_the_requirements_are_those_in_the_script_and_the_constraints_meet_them() -> None:
    head = re.search(r"# /// script\n(.*?)# ///", SOURCE, re.DOTALL)
    assert head
    script = tomllib.loads(re.sub(r"^# ?", "", head[1], flags=re.MULTILINE))["dependencies"]
    lines = TEXTS["requirements-finetune.txt"].splitlines()
    assert script == [line for line in lines if line and not line.startswith("#")]
    pins = dict(line.split("==") for line in TEXTS["constraints.txt"].lower().splitlines() if "==" in line)
    for name, floor in (line.split(">=") for line in script):
        assert [*map(int, pins[name].split("."))] >= [*map(int, floor.split("."))]


def test_what_is_imported_comes_with_the_ten_packages_or_is_optional() -> None:
    known, wanted = set[str](), re.findall(r"(?m)^[a-z].*", TEXTS["requirements-finetune.txt"])
    while wanted:
        name = re.split(r"[^\w.-]", wanted.pop())[0].lower().replace("_", "-")
        for found in metadata.Distribution.discover(name=name) if name not in known else ():
            wanted, known = wanted + [r for r in found.requires or [] if "extra ==" not in r], known | {name}
    imported = {*re.findall(r"(?m)^ +(?:import|from(?= [\w.]+ import)) (\w+)", SOURCE)} - sys.stdlib_module_names
    of = {name: {one.lower().replace("_", "-") for one in metadata.packages_distributions()[name]} for name in imported}
    assert {name for name in imported if not of[name] & known} == {"charset_normalizer", "cyllama", "gradio"}


def test_ci_runs_the_test_command_of_the_readme() -> None:
    commands = next(block for block in blocks("README.md", "bash") if "-m pytest" in block)
    ci = TEXTS[".ci/run"].replace('"$versions"', "constraints.txt").replace(" --quiet", "")
    assert [line for line in commands.splitlines() if line not in ci] == []


def test_the_map_at_the_top_names_the_sections_in_order() -> None:
    banners = BANNER.findall(SOURCE)
    assert [int(number) for number, _ in banners] == list(range(1, len(banners) + 1))
    assert [title for number, title in banners if f"{number} {title}".lower() not in DOCSTRING.lower()] == []


def test_every_section_calls_only_sections_above_it_and_no_function_is_endless() -> None:
    starts = [SOURCE[: match.start()].count("\n") + 1 for match in BANNER.finditer(SOURCE)]

    def section(line: int) -> int:
        return sum(start <= line for start in starts)

    def stored(node: ast.AST) -> set[str]:
        names = (n for n in ast.walk(node) if isinstance(n, ast.Name))
        return {n.id for n in names if isinstance(n.ctx, ast.Store)}

    home = {node.name: section(node.lineno) for node in TREE.body if hasattr(node, "name")}
    for node in TREE.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            home |= dict.fromkeys(stored(node), section(node.lineno))
    for function in (node for node in TREE.body if isinstance(node, ast.FunctionDef)):
        own = stored(function) | {arg.arg for arg in ast.walk(function) if isinstance(arg, ast.arg)}
        for name in ast.walk(ast.Module(body=function.body, type_ignores=[])):
            if isinstance(name, ast.Name) and name.id in home and name.id not in own:
                assert home[name.id] <= section(function.lineno), f"{function.name}: {name.id}"
        assert (function.end_lineno or 0) - function.lineno < 60, function.name


def test_a_later_colab_package_list_is_compared_rightly() -> None:
    spec = util.spec_from_file_location("dry_run", ROOT / ".ci" / "colab_dry_run.py")
    assert spec and spec.loader
    dry_run = util.module_from_spec(spec)
    spec.loader.exec_module(dry_run)
    wanted = {"Bits_and.Bytes": "1", "pandas": "3.0"}
    report = {"install": [{"metadata": {"name": n, "version": v}} for n, v in wanted.items()]}
    new, changed = dry_run.changes({"Pandas": "2.2.3", "numpy": "2.1.3"}, report)
    assert (new, changed) == ({"bits-and-bytes": "1"}, {"pandas": ("2.2.3", "3.0")})


def test_the_example_workbook_is_ready_to_run() -> None:
    pairs = find_pairs(Config(DATASET_PATH=str(ROOT / "dataset_example.xlsx")))
    assert len(pairs.kept) >= 20
    assert pairs.dropped == []
    assert all(one.question.endswith("?") and len(one.answer.split()) >= 15 for one in pairs.kept)


def test_the_python_in_the_documents_runs(
    small_phi: Path, workbook: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"MODEL_NAME": str(small_phi), "NUM_EPOCHS": 1, "MAX_TOKENS": 3}.items():
        monkeypatch.setattr(Config, name, value)
    assert run()[0] == 0
    code = blocks("COLAB_QUICKSTART.md", "python") + blocks("finetune.md", "python")
    assert code
    for block in code:
        exec(block, {})


def test_every_message_that_is_explained_is_said() -> None:
    said = []  # all that the script can say; what is filled in is …
    for node in ast.walk(TREE):
        if isinstance(node, ast.JoinedStr):
            said.append("".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            said.append(node.value)
    tables = re.findall(r"^\| it says \|.*\n(?:\|.*\n)+", TEXTS["COLAB_QUICKSTART.md"] + GUIDE, re.MULTILINE)
    cells = [line.split("|")[1] for table in tables for line in table.splitlines()[2:]]
    messages = [part.strip("` ") for cell in cells for part in cell.split("; ")]
    assert len(messages) > 20
    for message in messages:
        words = [re.escape(part.strip()) for part in re.split("…|\\d+|dataset.xlsx", message)]
        pattern = re.compile(".*".join(words), re.DOTALL | re.IGNORECASE)
        assert message.startswith(("anything else", "answers ")) or any(map(pattern.search, said)), message


UNITS = "s|ms|min|minutes|seconds|GB|MB|tokens (?:a|per) second|times the"
FIGURE = re.compile(rf"\b\d[\d.,]* (?:{UNITS})\b(?! a file)|\b0\.\d+ of the")
MEASURED = re.compile(r"measured|computed|arithmetic|counted|took|shortened", re.IGNORECASE)
# sections whose figures are limits and habits that were chosen, not found
CHOSEN = "GGUF; Space and Hub; Where your data can be; Formats"


@pytest.mark.parametrize("name", ["README.md", "COLAB_QUICKSTART.md", "finetune.md", "benchmarks/RESULTS.md"])
def test_every_figure_says_where_it_comes_from_with_machine_and_day(name: str) -> None:
    for part in re.split(r"^#+ ", TEXTS[name], flags=re.MULTILINE):
        title, _, body = part.partition("\n")
        if name in DOCUMENTS and title not in CHOSEN.split("; ") and (figures := FIGURE.findall(body)):
            assert MEASURED.search(body), f"{title}: {figures}"
    text = " ".join(TEXTS[name].split())
    for match in re.finditer(r"\b[Mm]easured (?:side by side|on (?:\d|a shared|the))", text):
        nearby = text[match.start() : match.start() + 400]
        assert re.search(r"20\d\d|the same", nearby), nearby[:150]
