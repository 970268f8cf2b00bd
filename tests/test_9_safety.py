"""Section 9 and what it leans on: nothing that is read runs, nothing private leaves, nothing is half."""

from __future__ import annotations

import ast
import csv
import errno
import importlib
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from conftest import PAIRS, ROOT, in_words, write_workbook

import finetune_colab as ft

CPU = ft.Device("cpu", "float32", False, "")
SECRETS = {
    "HF_TOKEN": "hf_aTokenThatNobodyMaySee",
    "AWS_ACCESS_KEY_ID": "AKIANOBODYMAYSEE",
    "AWS_SECRET_ACCESS_KEY": "aKeyThatNobodyMaySee",
}
LINK = "https://data.example.org/s/whoHasThisHasTheFile/qa.xlsx?token=inTheLink"
COMMIT, LATER = "a" * 40, "b" * 40

# A run of one step in a process of its own, which counts every call to the internet after the load
RUNNER = """
import os, pathlib, socket, sys
import huggingface_hub
import finetune_colab as ft

calls = []

def refuse(*address, **_):
    calls.append(address)
    raise OSError(101, "Network is unreachable")

def load(*args):
    model = real(*args)
    huggingface_hub.constants.HF_HUB_OFFLINE = False
    calls.clear()
    return model

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
real, ft.load_base = ft.load_base, load
ft.fetch_link = lambda link: pathlib.Path(os.environ["DATA"])
code = ft.main(sys.argv[1:])
sys.exit(code or len(calls))
"""


class Run(NamedTuple):
    home: Path
    model: Path  # OUTPUT_DIR

    @property
    def archive(self) -> Path:
        return self.model.with_name("fine_tuned_model.zip")


def start(home: Path, model_name: object, **environment: object) -> Run:
    data = write_workbook(home / "qa.xlsx", [("question", "answer"), *PAIRS])
    flags = ["--model-name", model_name, "--max-steps", 1, "--output-dir", home / "model"]
    flags += ["--checkpoint-dir", home / "states", "--dataset-path", LINK]
    flags += ["--log-dir", home / "notes", "--checkpoint-mirror", home / "her-drive"]
    changes = {**SECRETS, "DATA": data, "PYTHONPATH": ROOT, **environment}
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, *map(str, flags)],
        cwd=home,
        env=os.environ | {name: str(value) for name, value in changes.items()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return Run(home, home / "model")


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory, phi_folder: Path) -> Run:
    """A run with a base model, data and results in folders whose names are nobody's business."""
    home = tmp_path_factory.mktemp("home-of-ada")
    shutil.copytree(phi_folder, home / "her-models" / "tiny-phi")
    return start(home, home / "her-models" / "tiny-phi")


@pytest.fixture
def model(private: Run, tmp_path: Path) -> Path:
    """The folder of a finished run, to be tampered with."""
    return Path(shutil.copytree(private.model, tmp_path / "model"))


# -- Nothing that is read can run


class Bomb:
    """What it is pickled into writes a file when it is read."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return Path.touch, (self.canary,)


@pytest.mark.parametrize("name", "adapter_model.bin rng.pth a.pkl A.PT training_args.bin".split())
@pytest.mark.parametrize("instead", [False, True])
def test_a_file_that_can_run_programs_is_refused(name: str, instead: bool, model: Path) -> None:
    canary = model.with_name("canary")
    (model / name).write_bytes(pickle.dumps(Bomb(canary)))
    if instead:
        (model / "adapter_model.safetensors").unlink()
    with pytest.raises(ft.UserError, match=f"{name}.* can run programs"):
        ft.load_tuned(model)
    assert not canary.exists()


def test_a_bomb_is_one(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


def test_the_configuration_of_an_adapter_names_no_code(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """peft imports whatever module stands in adapter_config.json as megatron_core."""
    (model.parent / "planted.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(str(model.parent))
    path = model / "adapter_config.json"
    changes = {"megatron_config": {"a": 1}, "megatron_core": "planted"}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    importlib.invalidate_caches()
    ft.load_tuned(model)
    assert "planted" not in sys.modules


CODE = (
    "from pathlib import Path\n"
    "from transformers import PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast\n"
    "Path({!r}).touch()\n"
)
MAP = {
    "AutoConfig": "own.PhiConfig",
    "AutoModelForCausalLM": "own.PhiForCausalLM",
    "AutoTokenizer": ["own.PreTrainedTokenizerFast", None],
}
KERNEL = "nobody/kernel"
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "code of a known kind": ("config.json", {"auto_map": MAP}),
    "code of a new kind": ("config.json", {"model_type": "new", "auto_map": MAP}),
    "code of a tokenizer": (
        "tokenizer_config.json",
        {"auto_map": MAP, "tokenizer_class": "PreTrainedTokenizerFastOfMine"},
    ),
    "a kernel for attention": (
        "config.json",
        {"_attn_implementation_internal": KERNEL, "_attn_implementation": KERNEL},
    ),
    "a kernel for experts": (
        "config.json",
        {"_experts_implementation_internal": KERNEL, "experts_implementation": KERNEL},
    ),
}


@pytest.mark.parametrize("name, changes", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_a_model_brings_no_code(
    name: str,
    changes: dict[str, Any],
    phi_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """transformers would ask whether to run it, and who wants to go on says yes."""
    base = Path(shutil.copytree(phi_folder, tmp_path / "base"))
    (base / "own.py").write_text(CODE.format(str(tmp_path / "canary")))
    (base / name).write_text(json.dumps(json.loads((base / name).read_text()) | changes))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    cfg = ft.Config(MODEL_NAME=str(base))
    for load in (ft.load_tokenizer, lambda cfg: ft.load_base(cfg, CPU)):
        with suppress(ft.UserError):
            load(cfg)
    assert sys.stdin.read() == "y\n" * 9
    assert not (tmp_path / "canary").exists()


def test_weights_that_can_run_programs_are_no_base(phi_folder: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(phi_folder, tmp_path / "base"))
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "canary")))
    with pytest.raises(ft.UserError, match="safetensors"):
        ft.load_base(ft.Config(MODEL_NAME=str(base)), CPU)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 3}, {"hidden_size": 160}])
def test_a_base_that_does_not_fit_its_weights_is_refused(
    changes: dict[str, int], phi_folder: Path, tmp_path: Path
) -> None:
    """transformers fills a layer that is missing with chance, and only warns."""
    base = Path(shutil.copytree(phi_folder, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ft.UserError, match="could not be loaded"):
        ft.load_base(ft.Config(MODEL_NAME=str(base)), CPU)


def test_a_device_without_memory_is_no_damaged_model(phi_folder: Path) -> None:
    cfg = ft.Config(MODEL_NAME=str(phi_folder))
    for message in ("CUDA out of memory.", "CUDA driver error: out of memory", "CUBLAS_STATUS"):
        with pytest.raises(RuntimeError, match=message), ft.explained_model_errors(cfg):
            raise RuntimeError(message)


@pytest.mark.parametrize(
    "name", "optimizer.pt scheduler.pt rng_state.pth training_args.bin adapter_model.bin".split()
)
def test_a_checkpoint_runs_nothing(name: str, private: Run, tmp_path: Path) -> None:
    """The Trainer reads its files as weights only, in every version the requirements admit."""
    import torch
    from transformers import Trainer, TrainingArguments

    folder = Path(shutil.copytree(next(private.home.glob("states/*/checkpoint-1")), tmp_path / "c"))
    if name == "adapter_model.bin":
        (folder / "adapter_model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "canary")))
    cfg = ft.Config(MODEL_NAME=str(private.home / "her-models" / "tiny-phi"))
    arguments = TrainingArguments(str(tmp_path / "out"), max_steps=2, use_cpu=True)
    rows = [{"input_ids": torch.tensor([1, 2]), "labels": torch.tensor([1, 2])}] * 8
    model = ft.add_lora(cfg, ft.load_base(cfg, CPU))
    with suppress(Exception):
        Trainer(model, arguments, train_dataset=rows).train(resume_from_checkpoint=str(folder))
    assert not (tmp_path / "canary").exists()


def test_the_script_itself_opens_no_door() -> None:
    """No pickle, no code from texts, no shell, no YAML that builds objects; few places unpack and run."""
    source = (ROOT / "finetune_colab.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    forbidden = "eval exec compile os.system os.popen torch.load torch.save yaml.load __import__"
    assert not calls & set(forbidden.split())
    # zipfile's own keeps inside the folder and makes no links, see the test of a hostile zip
    # the converters' archive is opened once its checksum is the known one, see the test of that
    extracting = {call for call in calls if ".extract" in call}
    assert extracting == {"archive.extractall", "packed.extractfile"}
    assert source.count(".extractall(") == 1
    assert [call for call in calls if call.startswith("subprocess.")] == ["subprocess.run"]
    assert source.count("subprocess.run(") == 1, "the converters, in a process of their own"
    assert "shell=" not in source
    imported = {name.name for n in ast.walk(tree) if isinstance(n, ast.Import) for name in n.names}
    assert not imported & {"pickle", "marshal", "shelve"}
    trusted = re.findall(r"trust_remote_code\W+(\w+)", source)
    assert set(trusted) == {"False"}
    # two of a tokenizer, two of a shape, one of a model with its weights, one of a model without
    assert len(trusted) == 6


def test_a_hostile_zip_of_a_model_stays_in_its_place(
    private: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "zips"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    shutil.copy(private.archive, tmp_path / "hostile.zip")
    with zipfile.ZipFile(tmp_path / "hostile.zip", "a") as archive:
        for name in ("../outside", "../../outside", f"{tmp_path}/absolute", "a/../../outside"):
            archive.writestr(name, "x")
        archive.writestr(link, "/etc/passwd")
    before = set(tmp_path.rglob("*"))
    with ft.opened_model(tmp_path / "hostile.zip") as folder:
        inside = set(folder.rglob("*"))
        assert (folder / "run.json").is_file()
        assert not any(path.is_symlink() for path in inside)
        assert set(tmp_path.rglob("*")) - before <= inside | {folder}
    assert set(tmp_path.rglob("*")) == before
    with (
        pytest.raises(ft.UserError, match="no room for its"),
        monkeypatch.context() as patch,
    ):
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
        ft.opened_model(tmp_path / "hostile.zip").__enter__()


# -- The run that is loaded is the run that was made


def broken_adapter(model: Path) -> None:
    path = model / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-500])


def other_layers(model: Path) -> None:
    path = model / "run.json"
    path.write_text(path.read_text().replace('"all-linear"', '"attention"'))


@pytest.mark.parametrize(
    "harm, told",
    [
        (broken_adapter, "adapter .* could not be loaded"),
        (other_layers, "adapter .* could not be loaded"),
        (lambda model: (model / "adapter_model.safetensors").unlink(), "could not be loaded"),
        (lambda model: (model / "tokenizer.json").write_text("{"), "could not be loaded"),
        (lambda model: (model / "run.json").unlink(), "holds no finished run"),
        (lambda model: (model / "run.json").write_text('{"settings": {'), "holds no finished run"),
        (lambda model: (model / "run.json").write_text("[]"), "holds no finished run"),
        (shutil.rmtree, "There is no model in"),
    ],
)
def test_a_damaged_run_is_one_message(harm: Callable[[Path], None], told: str, model: Path) -> None:
    harm(model)
    with pytest.raises(ft.UserError, match=told):
        ft.load_tuned(model)


def test_a_run_finds_its_base_in_place(private: Run) -> None:
    ft.load_tuned(private.model)


def test_a_run_that_was_moved_says_what_it_needs(private: Run, tmp_path: Path) -> None:
    with zipfile.ZipFile(private.archive) as archive:
        archive.extractall(tmp_path / "moved")
    with pytest.raises(ft.UserError, match=f"tiny-phi.*\nCopy that folder into {tmp_path}/moved"):
        ft.load_tuned(tmp_path / "moved")
    shutil.copytree(private.home / "her-models" / "tiny-phi", tmp_path / "moved" / "tiny-phi")
    (tmp_path / "moved" / "tiny-phi" / "pytorch_model.bin").write_bytes(b"of many a base model")
    ft.load_tuned(tmp_path / "moved")


def test_a_base_under_the_home_folder_may_be_named_from_there(
    phi_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(phi_folder.parent))
    monkeypatch.setenv("USERPROFILE", str(phi_folder.parent))
    cfg = ft.Config(MODEL_NAME="~/tiny-phi")
    assert ft.load_tokenizer(cfg)("Why?")["input_ids"]
    assert ft.load_base(cfg, CPU).config.num_hidden_layers == 2
    assert ft.base_name(cfg) == "./tiny-phi"


@pytest.fixture(scope="module")
def from_hub(tmp_path_factory: pytest.TempPathFactory, phi_folder: Path) -> Run:
    """A run with a model of the Hub, which lies in the Hub's cache; nothing can be reached."""
    home = tmp_path_factory.mktemp("hub")
    kept = home / "cache" / "hub" / "models--someone--tiny"
    shutil.copytree(phi_folder, kept / "snapshots" / COMMIT)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text(COMMIT)
    return start(home, "someone/tiny", HF_HOME=home / "cache")


def test_nothing_is_sent_after_the_load(private: Run, from_hub: Run) -> None:
    """Both runs end well although every connection is refused, and they tried none: see RUNNER."""
    assert all((run.model / "adapter_model.safetensors").is_file() for run in (private, from_hub))


def test_the_commit_of_a_base_is_kept(from_hub: Run) -> None:
    record = json.loads((from_hub.model / "run.json").read_text())
    assert record["base_model"] == "someone/tiny"
    assert record["base_revision"] == record["settings"]["MODEL_REVISION"] == COMMIT
    assert json.loads((from_hub.model / "adapter_config.json").read_text())["revision"] == COMMIT
    card = (from_hub.model / "README.md").read_text()
    assert f'from_pretrained("someone/tiny", dtype=dtype, revision="{COMMIT}")' in card
    assert "base_model: someone/tiny\n" in card
    assert "Copy " not in card


def test_a_base_that_is_replaced_on_the_hub_changes_no_finished_run(from_hub: Run) -> None:
    kept = from_hub.home / "cache" / "hub" / "models--someone--tiny"
    shutil.copytree(kept / "snapshots" / COMMIT, kept / "snapshots" / LATER, dirs_exist_ok=True)
    (kept / "snapshots" / LATER / "model.safetensors").write_bytes(b"")
    (kept / "refs" / "main").write_text(LATER)
    code = "import finetune_colab as ft, pathlib; ft.load_tuned(pathlib.Path('model'))"
    changes = {"HF_HOME": str(from_hub.home / "cache"), "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, "-c", code], cwd=from_hub.home, env=os.environ | changes, check=True
    )


# -- Nothing private leaves


def everything(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix != ".zip":
            yield str(path.relative_to(folder)), path.read_bytes()


def test_no_file_holds_a_secret(private: Run) -> None:
    secrets = [*SECRETS.values(), "inTheLink"]
    for place in (private.model, private.home / "states"):
        for name, content in everything(place):
            assert not [one for one in secrets if one.encode() in content], name


def test_nothing_that_is_passed_on_tells_where_it_was_made(private: Run, tmp_path: Path) -> None:
    with zipfile.ZipFile(private.archive) as archive:
        archive.extractall(tmp_path)
    found = dict(everything(tmp_path))
    assert "run.json" in found
    for name, content in found.items():
        for told in (private.home.name, "her-models", "whoHasThis", str(Path.home()), str(ROOT)):
            assert told == "/" or told.encode() not in content, name
    settings = json.loads(found["run.json"])["settings"]
    assert settings["MODEL_NAME"] == "./tiny-phi"
    assert settings["DATASET_PATH"] == "https://data.example.org/…"
    places = [settings[name] for name in ("OUTPUT_DIR", "CHECKPOINT_DIR", "LOG_DIR")]
    assert places == ["model", "states", "notes"]
    assert settings["CHECKPOINT_MIRROR"] == "her-drive"
    named = json.loads(found["adapter_config.json"])["base_model_name_or_path"]
    assert named == "./tiny-phi"
    assert "Copy `tiny-phi`, the base model, into this folder" in found["README.md"].decode()


@pytest.mark.parametrize(
    "place, public",
    [
        ("dataset.xlsx", "dataset.xlsx"),
        ("./model", "./model"),
        ("/home/ada/qa.csv", "qa.csv"),
        ("~/clients/qa.csv", "qa.csv"),
        ("/home/ada/*.csv (3 files)", "*.csv (3 files)"),
        ("s3://bucket/qa.csv?key=1", "s3://bucket/qa.csv"),
        ("hf:owner/name:train", "hf:owner/name:train"),
        ("https://ada:key@example.org/d/1aSecret/edit?key=1#gid=0", "https://example.org/…"),
    ],
)
def test_a_place_is_told_without_what_is_private(place: str, public: str) -> None:
    assert ft.public_place(place) == public


@pytest.mark.parametrize("name", ['x"); import os; os.abort(); ("', "a`b", "<img src=x>", "a\nb#"])
def test_the_name_of_a_folder_is_only_a_name_in_the_card(name: str, folder: Path) -> None:
    (folder / name).mkdir()
    data: Any = SimpleNamespace(
        train_pairs=[1], held_out_pairs=[], tokenizer=None, form=ft.PROMPT_FORMAT
    )
    history = [{"step": 1, "epoch": 1.0, "loss": 2.0}]
    trained: Any = SimpleNamespace(
        steps=1, epochs=1.0, base_loss=None, final_loss=None, history=history
    )
    trained.tally, trained.adapter = ft.Tally(trainable=1), folder / "adapter.safetensors"
    from safetensors.torch import save_file

    learnt = {"model.layers.0.mlp.fc1.lora_A.weight": torch.zeros(1)}
    save_file(learnt, trained.adapter)
    card = ft.model_card(ft.Config(MODEL_NAME=str(folder / name)), data, trained)
    snippet = ast.parse(card.partition("```python\n")[2].partition("```")[0])
    texts = {node.value for node in ast.walk(snippet) if isinstance(node, ast.Constant)}
    assert f"./{name}" in texts
    assert "<img" not in card.partition("## Ask it")[0]
    assert card.count("\n# ") == 1


def test_only_own_files_get_into_the_zip(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "deep").mkdir(parents=True)
    (outside / "deep" / "secret.txt").write_text("secret")
    folder = tmp_path / "model"
    (folder / "training_visuals").mkdir(parents=True)
    for name in ("run.json", "training_visuals/a.csv", ft.BASE_PLACE):
        (folder / name).write_text("1")
    for name in ("optimizer.pt", "training_args.bin", "rng_state.pth", "training_visuals/X.PKL"):
        (folder / name).write_bytes(b"1")
    (folder / "linked").symlink_to(outside, target_is_directory=True)
    (folder / "training_visuals" / "up").symlink_to(tmp_path, target_is_directory=True)
    (folder / "passwd").symlink_to("/etc/passwd")
    os.utime(folder / "run.json", (0, 0))  # before 1980, which no zip can say
    with zipfile.ZipFile(ft.write_zip(folder)) as archive:
        assert archive.namelist() == ["run.json", "training_visuals/a.csv"]


def test_a_run_leaves_no_file_that_can_run_programs(private: Run) -> None:
    with zipfile.ZipFile(private.archive) as archive:
        names = [*archive.namelist(), *(name for name, _ in everything(private.model))]
    assert not [name for name in names if Path(name).suffix in ft.PICKLES]
    assert not [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]


def test_the_table_of_figures_holds_numbers_only(private: Run) -> None:
    with (private.model / "training_visuals" / "training_metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows
    for cell in (cell for row in rows for cell in row.values() if cell):
        assert float(cell) >= 0  # not even the minus of a number, which opens a formula


def test_names_cannot_steer_the_terminal(folder: Path, run: Any) -> None:
    """A terminal takes ESC [ 2 J for an order, wherever it is printed: also in a file's name."""
    steer = "\x1b[2J\x07\u202e"
    name = f"a{steer}b.csv"
    columns = [f"question{steer}", f"answer{steer}", f"remark{steer}"]
    rows = [columns, *((q + steer, a + steer, steer) for q, a in PAIRS), ("Why?", "", "")]
    with (folder / name).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    for argv in (
        ("check", "--model-name", "demo", "--dataset-path", name),
        ("check", "--model-name", "demo", "--dataset-path", name, "--question-column", steer),
        ("check", "--model-name", f"no{steer}ne", "--dataset-path", name),
        ("check", "--dataset-path", f"none{steer}"),
        ("--output-dir", f"/proc/{steer}"),
        (f"--{steer}",),
    ):
        printed = run(*argv)[1]
        assert printed.replace("\n", "").isprintable(), argv


# -- Nothing is half


def test_what_gets_its_name_is_on_the_disk_before(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut, a file that was renamed but never synchronised is there and empty."""
    done: list[tuple[str, str]] = []
    monkeypatch.setattr(ft, "settle", lambda path: done.append(("settled", path.name)))
    for name in ("rename", "replace"):
        real = getattr(Path, name)

        def renamed(path: Path, target: Path, real: Any = real) -> Any:
            done.append(("named", target.name))
            return real(path, target)

        monkeypatch.setattr(Path, name, renamed)
    with ft.staged_file(folder / "file") as staged:
        staged.write_text("whole")
    assert done == [("settled", staged.name), ("named", "file"), ("settled", folder.name)]
    done.clear()
    with ft.staged_folder(folder / "model") as staged:
        (staged / "deep").mkdir()
        (staged / "deep" / "a").write_text("whole")
    assert {name for kind, name in done[:-2] if kind == "settled"} == {"a", "deep", staged.name}
    assert done[-2:] == [("named", "model"), ("settled", folder.name)]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EINVAL, errno.ENOSYS])
def test_a_disk_that_fails_is_heard_and_one_that_cannot_wait_is_not(
    number: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: int) -> None:
        raise OSError(number, "")

    monkeypatch.setattr(os, "fsync", fails)
    try:
        with ft.staged_file(folder / "file") as staged:
            staged.write_text("whole")
    except OSError:
        assert number in (errno.EIO, errno.ENOSPC)
        assert list(folder.iterdir()) == []
    else:
        assert [path.name for path in folder.iterdir()] == ["file"]


@pytest.mark.parametrize("kind", ["file", "folder", "link", "link to nowhere"])
@pytest.mark.parametrize("end", [".model.partial", "model.previous"])
def test_what_stands_in_the_way_of_a_model_is_moved_aside(
    kind: str, end: str, folder: Path
) -> None:
    kept = folder / "kept"
    kept.mkdir()
    (kept / "precious").write_text("1")
    way = folder / end
    if kind == "file":
        way.write_text("")
    elif kind == "folder":
        (way / "deep").mkdir(parents=True)
    else:
        way.symlink_to(kept if kind == "link" else folder / "none")
    for _ in range(2):
        with ft.staged_folder(folder / "model", folder / "model.previous") as staged:
            (staged / "run.json").write_text("{}")
    assert (kept / "precious").exists()
    assert sorted(path.name for path in folder.iterdir()) == ["kept", "model", "model.previous"]


@pytest.fixture(scope="module")
def saving(private: Run, phi_folder: Path) -> tuple[Any, ...]:
    """What save_run needs but the settings: a device, the data, and the last checkpoint."""
    cfg = ft.Config(MODEL_NAME=str(phi_folder), DATASET_PATH=str(private.home / "qa.xlsx"))
    cfg.CHECKPOINT_DIR, cfg.MAX_STEPS = str(private.home / "saving"), 1
    data = ft.prepare(cfg)
    keeper = ft.Keeper(cfg, ft.identity_of(cfg, data, CPU))
    assert keeper.starting_point() is None
    model = ft.add_lora(cfg, ft.load_base(cfg, CPU))
    plan = ft.plan_run(cfg, data.train, CPU)
    return CPU, data, ft.train_adapter(cfg, model, data, CPU, plan, keeper)


class Killed(BaseException):
    """Stands for the end of the process: nothing that catches errors may catch it."""


@pytest.fixture
def stop_at() -> Iterator[Callable[[Path, int], list[str]]]:
    """Raise at the n-th change below a folder: a file opened to write, made, renamed or deleted."""
    state: dict[str, Any] = {"folder": None, "left": 0, "renamed": []}
    changes = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")

    def watch(event: str, args: tuple[Any, ...]) -> None:
        inside = state["folder"] and event in changes and str(args[0]).startswith(state["folder"])
        if not inside or (event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if event == "os.rename":
            state["renamed"].append((args[0], args[1]))
        state["left"] -= 1
        if state["left"] < 0:
            raise Killed

    sys.addaudithook(watch)

    def begin(folder: Path, changes: int) -> list[Any]:
        state.update(folder=str(folder), left=changes, renamed=[])
        renamed: list[Any] = state["renamed"]
        return renamed

    yield begin
    state["folder"] = None  # a hook stays for as long as the process


def is_whole(folder: Path) -> bool:
    ft.settings_of(folder)
    with (folder / "adapter_model.safetensors").open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        ends = [
            one["data_offsets"][1]
            for one in json.loads(file.read(size)).values()
            if "data_offsets" in one
        ]
        return 8 + size + max(ends) == os.fstat(file.fileno()).st_size


def test_a_run_that_dies_while_saving_leaves_only_whole_files(
    saving: tuple[Any, ...], phi_folder: Path, tmp_path: Path, stop_at: Any, monkeypatch: Any
) -> None:
    """Stopped at every change to the disk in turn, over an earlier model, and then run again."""
    picture: Any = SimpleNamespace(savefig=lambda path, **_: path.write_bytes(b"picture"))
    for name in ("draw_training_curves", "draw_loss_comparison"):
        monkeypatch.setattr(ft, name, lambda _: picture)
    out = tmp_path / "out"
    out.mkdir()
    cfg = ft.Config(MODEL_NAME=str(phi_folder), OUTPUT_DIR=str(out / "model"))
    ft.save_run(cfg, *saving)
    stops, done = 0, False
    while not done:
        renamed = stop_at(out, stops)
        try:
            ft.save_run(cfg, *saving)
            done = True
        except Killed:
            stops += 1
        stop_at(tmp_path / "nothing", 0)
        for source, target in renamed:
            assert Path(source).parent == Path(target).parent  # never across two disks
        names = ("model", "model.previous", ".model.old")
        models = [out / name for name in names if (out / name).exists()]
        assert models
        assert all(map(is_whole, models))
        with zipfile.ZipFile(out / "fine_tuned_model.zip") as archive:
            assert archive.testzip() is None
            assert "adapter_model.safetensors" in archive.namelist()
    assert stops > 20
    assert sorted(path.name for path in out.iterdir()) == ["fine_tuned_model.zip", "model"]


def test_what_somebody_puts_into_or_beside_a_model_is_never_deleted(
    saving: tuple[Any, ...], private: Run, phi_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    cfg = ft.Config(MODEL_NAME=str(phi_folder), DATASET_PATH=str(private.home / "qa.xlsx"))
    cfg.OUTPUT_DIR = str(out / "model")
    for name in ("model.old", "model.partial"):
        (out / name).mkdir(parents=True)
        (out / name / "mine").write_text("1")
    ft.save_run(cfg, *saving)
    for note in ("one", "two"):
        (out / "model" / note).write_text("mine")
        (out / "model" / ".DS_Store").write_text("of the file manager")
        ft.save_run(cfg, *saving)
    ft.save_run(cfg, *saving)
    notes = {str(p.relative_to(out)) for p in out.rglob("*") if p.name in ("mine", "one", "two")}
    assert notes == {"model.old/mine", "model.partial/mine"} | {
        "model.previous/one",
        "model.previous.2/two",
    }


def test_a_model_that_was_moved_out_of_the_way_comes_back(folder: Path) -> None:
    """The program was killed between the two renames, and now another run saves."""
    (folder / ".model.old").mkdir()
    (folder / ".model.old" / "weights").write_text("the first")
    with ft.staged_folder(folder / "model", folder / "model.previous") as staged:
        (staged / "weights").write_text("the second")
    assert (folder / "model.previous" / "weights").read_text() == "the first"
    assert (folder / "model" / "weights").read_text() == "the second"


def test_names_that_are_no_text_cost_no_result(folder: Path, phi_folder: Path, run: Any) -> None:
    name = os.fsdecode(b"donn\xe9es.csv")
    rows = "\n".join(",".join(pair) for pair in (("question", "answer"), *PAIRS))
    (folder / name).write_text(rows)
    flags = ("--model-name", phi_folder, "--max-steps", 1, "--dataset-path", name)
    assert run(*flags)[0] == 0
    record = json.loads((folder / "model" / "run.json").read_text())
    assert record["settings"]["DATASET_PATH"] == name
    code, printed = run(*flags, "--output-dir", os.fsdecode(b"mod\xe8le"))
    assert code == 2
    assert "cannot be replaced. Use a folder such as ./model" in in_words(printed)


@pytest.fixture
def packed(folder: Path) -> Path:
    """A model with an earlier zip, and what a run that was killed left of one."""
    model = folder / "model"
    model.mkdir()
    (model / "adapter_model.safetensors").write_bytes(os.urandom(3_000_000))
    (folder / "fine_tuned_model.zip").write_bytes(b"earlier")
    (folder / "fine_tuned_model.zip.123.partial").write_bytes(b"cut off")
    return model


def zip_refused(model: Path) -> str:
    with pytest.raises(ft.UserError) as refused:
        ft.write_zip(model)
    assert (model.parent / "fine_tuned_model.zip").read_bytes() == b"earlier"
    assert not list(model.parent.glob("*.partial"))
    assert (model / "adapter_model.safetensors").stat().st_size == 3_000_000
    return in_words(str(refused.value))


def test_a_zip_is_not_begun_without_room_for_it(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room: Any = SimpleNamespace(free=2_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: room)
    monkeypatch.setattr(zipfile.ZipFile, "write", None)
    message = zip_refused(packed)
    assert f"The adapter is safe in {packed}" in message
    assert "Up to 3.0 MB are needed there, 2.0 MB are free" in message


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fills_up_leaves_no_half_of_a_zip(
    number: int, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(archive: zipfile.ZipFile, path: Path, name: Path) -> None:
        archive.writestr("half", b"half")
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(zipfile.ZipFile, "write", fails)
    assert os.strerror(number) in zip_refused(packed)


@pytest.mark.skipif(sys.platform == "win32", reason="limits are set by a shell of Unix")
def test_a_real_limit_leaves_no_half_of_a_zip(packed: Path) -> None:
    code = "import finetune_colab as ft, pathlib; ft.write_zip(pathlib.Path('model').resolve())"
    done = subprocess.run(
        ["bash", "-c", f'ulimit -f 1000; exec {sys.executable} -c "{code}"'],
        cwd=packed.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "UserError: The adapter is safe" in done.stderr
    assert (packed.parent / "fine_tuned_model.zip").read_bytes() == b"earlier"
    assert not list(packed.parent.glob("*.partial"))


def test_a_zip_that_comes_back_damaged_gets_no_name(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda _: "adapter_model.safetensors")
    assert "came back damaged" in zip_refused(packed)


@pytest.mark.parametrize("harm", ["missing", "a full disk"])
def test_pictures_that_cannot_be_made_leave_the_figures_and_no_half(
    harm: str, saving: tuple[Any, ...], phi_folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    from matplotlib.figure import Figure

    def fills_up(_: Figure, path: Path, **__: object) -> None:
        path.write_bytes(b"half of a picture")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if harm == "missing":
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(Figure, "savefig", fills_up)
    cfg = ft.Config(MODEL_NAME=str(phi_folder), OUTPUT_DIR=str(tmp_path / "model"))
    folder, archive = ft.save_run(cfg, *saving)
    assert is_whole(folder)
    assert archive.is_file()
    assert sorted(path.name for path in (folder / "training_visuals").iterdir()) == [
        "training_config.json",
        "training_metrics.csv",
        "training_metrics.json",
    ]


def test_data_that_changes_while_it_is_read_is_read_once(
    workbook: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is taught, what is measured and what is recorded come from the same bytes."""
    reads = []
    real = Path.read_bytes

    def read_and_change(path: Path) -> bytes:
        content = real(path)
        if path.name == workbook.name:
            reads.append(path)
            write_workbook(workbook, [("question", "answer"), ("Other?", "Yes."), ("One?", "No.")])
        return content

    monkeypatch.setattr(Path, "read_bytes", read_and_change)
    data = ft.prepare(ft.Config(MODEL_NAME="demo"))
    assert len(reads) == 1
    assert [(pair.question, pair.answer) for pair in data.pairs.kept] == PAIRS
