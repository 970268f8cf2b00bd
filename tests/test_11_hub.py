"""Section 11: uploads by the Hub's own client, to a stand-in for the Hub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import PAIRS, ROOT, in_words
from hub_stand_in import HubStandIn, Repository

import finetune_colab as ft

TOKEN = "hf_nobodyMayEverReadThis"
PRIVATE = ("answers.xlsx", "sample_rows.json", "base_model_folder.txt")
STARTER = """
import sys, time
time.sleep = lambda _: None  # after a connection broke the client waits, up to 23 seconds in all
sys.path.insert(0, sys.argv.pop(1))
import finetune_colab
sys.exit(finetune_colab.main(sys.argv[1:]))
"""

Upload = Callable[..., tuple[int, str]]


@pytest.fixture
def hub() -> Iterator[HubStandIn]:
    with HubStandIn(TOKEN) as server:
        yield server


@pytest.fixture
def model(tuned_run: Path, folder: Path) -> Path:
    return Path(shutil.copytree(tuned_run / "model", folder / "model"))


@pytest.fixture
def upload(
    hub: HubStandIn, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[int, str]]:
    """Its exit code and all that it printed; the Hub's client reads its address only once."""
    home = tmp_path_factory.mktemp("home")

    def upload(*more: object, **changes: str) -> tuple[int, str]:
        own = {
            "HF_ENDPOINT": hub.address,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",  # the stand-in has the older of the Hub's two storages
            "HF_HOME": str(home / "hub"),  # without the token of whoever runs the tests
            "HF_TOKEN": TOKEN,
            "XDG_CACHE_HOME": str(home),
            "NO_PROXY": "127.0.0.1",
        }
        command = (sys.executable, "-c", STARTER, ROOT, "export", "--to", "hub", *more)
        done = subprocess.run(
            [str(part) for part in command],
            env=os.environ | own | changes,
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        printed = done.stdout + done.stderr
        assert TOKEN not in printed
        assert not [path for path in folder.rglob("*.log") if TOKEN in path.read_text()]
        assert "Traceback" not in printed
        assert printed.count("Stopped  ") == (done.returncode != 0)
        return done.returncode, in_words(printed)

    return upload


def shown_to_others(folder: Path) -> dict[str, bytes]:
    """What of a folder belongs on the Hub."""
    found = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {
        name.as_posix(): path.read_bytes()
        for name, path in found.items()
        if name.name not in PRIVATE and not any(part.startswith(".") for part in name.parts)
    }


def front_matter(card: bytes) -> dict[str, Any]:
    return dict(yaml.safe_load(card.decode().split("---\n")[1]))


# -- What arrives


@pytest.mark.parametrize("name", ["mine", "ada/mine"])
def test_a_model_arrives_whole_without_what_is_private(
    name: str, model: Path, hub: HubStandIn, upload: Upload, tuned_run: Path
) -> None:
    assert all((model / private).is_file() for private in PRIVATE)
    for hidden in (".env", ".cache/note.txt", "training_visuals/.DS_Store", "weights.9.partial"):
        (model / hidden).parent.mkdir(exist_ok=True)
        (model / hidden).write_text("nobody else's business")
    code, printed = upload("--hub-repo", name)
    assert code == 0, printed
    assert f"Upload model to ada/mine, private Saved {hub.address}/ada/mine" in printed
    (model / "weights.9.partial").unlink()
    repository = hub.repositories["model", "ada/mine"]
    assert repository.files == shown_to_others(model)
    assert {"adapter_model.safetensors", "run.json", "README.md"} <= set(repository.files)
    assert (model / "adapter_model.safetensors").read_bytes() in hub.objects.values()
    assert repository.private
    assert repository.commits == ["Uploaded by finetune_colab.py"]
    for told in (str(tuned_run), *(answer for _, answer in PAIRS)):
        assert not [path for path, it in repository.files.items() if told.encode() in it]


def test_a_repository_is_public_only_when_that_is_said(
    model: Path, hub: HubStandIn, upload: Upload
) -> None:
    code, printed = upload("--hub-repo", "mine", "--no-hub-private")
    assert code == 0, printed
    assert "to ada/mine, public" in printed
    assert not hub.repositories["model", "ada/mine"].private


def test_a_public_repository_is_not_written_to_by_mistake(
    model: Path, hub: HubStandIn, upload: Upload
) -> None:
    earlier = {"README.md": b"mine", "notes.txt": b"also mine"}
    repository = hub.repositories["model", "ada/mine"] = Repository(False, files=dict(earlier))
    code, printed = upload("--hub-repo", "mine")
    assert code == 2
    assert "ada/mine is there already, and everybody can see it" in printed
    assert "--no-hub-private" in printed
    assert repository.files == earlier
    assert not [one for one in hub.seen if one.startswith("PUT") or "upload" in one]
    assert upload("--hub-repo", "mine", "--no-hub-private")[0] == 0
    assert repository.files == earlier | shown_to_others(model)


def test_a_private_repository_stays_private_and_that_is_said(
    model: Path, hub: HubStandIn, upload: Upload
) -> None:
    repository = hub.repositories["model", "ada/mine"] = Repository(True)
    code, printed = upload("--hub-repo", "mine", "--no-hub-private")
    assert code == 0, printed
    assert "to ada/mine, private" in printed
    assert repository.private


def test_the_same_model_again_changes_nothing(model: Path, hub: HubStandIn, upload: Upload) -> None:
    assert upload("--hub-repo", "mine")[0] == 0
    sent = hub.bytes_put
    assert upload("--hub-repo", "mine")[0] == 0
    assert (hub.bytes_put, len(hub.repositories["model", "ada/mine"].commits)) == (sent, 1)
    (model / "README.md").write_text("---\nlibrary_name: peft\n---\n")
    assert upload("--hub-repo", "mine")[0] == 0
    assert hub.bytes_put == sent
    assert hub.repositories["model", "ada/mine"].files == shown_to_others(model)


def test_a_space_goes_to_a_space(model: Path, hub: HubStandIn, upload: Upload) -> None:
    record = json.loads((model / "run.json").read_text())
    (model / "run.json").write_text(json.dumps(record | {"export": "space"}))
    for name, text in ft.SPACE_FILES.items():
        (model / name).write_text(text)
    (model / "mine-q8_0.gguf").write_bytes(b"GGUF\0" + bytes(1000))
    ft.write_card(model, card_of("./tiny-phi"), ft.SPACE_CARD)
    code, printed = upload("--hub-repo", "ask")
    assert code == 0, printed
    assert f"{hub.address}/spaces/ada/ask" in printed
    assert list(hub.repositories) == [("space", "ada/ask")]
    space = hub.repositories["space", "ada/ask"]
    assert (space.sdk, space.private) == ("gradio", True)
    assert space.files == shown_to_others(model)
    assert space.files[front_matter(space.files["README.md"])["app_file"]]


def test_the_stand_in_speaks_as_the_hub_does(
    model: Path, hub: HubStandIn, upload: Upload, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the Hub's own client understands it, also in what an upload does not ask."""
    from huggingface_hub import HfApi, constants

    assert upload("--hub-repo", "mine")[0] == 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    api = HfApi(endpoint=hub.address, token=TOKEN)
    assert api.whoami()["name"] == "ada"
    files = hub.repositories["model", "ada/mine"].files
    assert set(api.list_repo_files("ada/mine")) == set(files)
    tree: list[Any] = list(api.list_repo_tree("ada/mine", recursive=True))
    assert {one.path: one.size for one in tree} == {k: len(v) for k, v in files.items()}
    assert {one.lfs.sha256 for one in tree if one.lfs} == set(hub.objects)
    api.delete_file("run.json", "ada/mine")
    assert "run.json" not in hub.repositories["model", "ada/mine"].files


# -- The cards


def card_of(base: str) -> Any:
    cfg = ft.Config(MODEL_NAME=base)
    return SimpleNamespace(cfg=cfg, folder=Path("none"), form="{question}", tokenizer=None)


def test_the_card_that_arrives_names_its_library(
    model: Path, hub: HubStandIn, upload: Upload
) -> None:
    assert upload("--hub-repo", "mine")[0] == 0
    front = front_matter(hub.repositories["model", "ada/mine"].files["README.md"])
    assert front["library_name"] == "peft"
    assert "base_model" not in front  # it is in a folder, not on the Hub


@pytest.mark.parametrize("base", ["microsoft/phi-2", "./tiny-phi", './my "phi": \\ 2 #1'])
@pytest.mark.parametrize("kind", ["merged", "gguf", "space"])
def test_a_card_can_be_read_whatever_the_base_is_called(kind: str, base: str, folder: Path) -> None:
    text = {"merged": ft.MERGED_CARD, "gguf": ft.GGUF_CARD, "space": ft.SPACE_CARD}[kind]
    ft.write_card(folder, card_of(base), text, file="mine.gguf")
    front = front_matter((folder / "README.md").read_bytes())
    on_hub = {"base_model": base, "license": "mit"} if base == "microsoft/phi-2" else {}
    assert {k: v for k, v in front.items() if k in ("base_model", "license")} == on_hub
    if kind == "space":
        assert front["title"] == f"Ask {base.removeprefix('./')}, fine-tuned"
        assert {front["colorFrom"], front["colorTo"]} <= {"blue", "indigo"}  # the Hub knows eight
        assert (front["sdk"], type(front["sdk_version"])) == ("gradio", str)
    else:
        assert front["library_name"] == {"merged": "transformers", "gguf": "gguf"}[kind]


def test_a_card_that_cannot_be_read_is_said_before_anything_is_sent(
    model: Path, hub: HubStandIn, upload: Upload
) -> None:
    (model / "README.md").write_text("---\ntitle: a: b\n---\n")
    code, printed = upload("--hub-repo", "mine")
    assert code == 2
    assert "Invalid metadata in README.md" in printed
    assert hub.bytes_put == 0


# -- What goes wrong


def test_what_had_arrived_before_the_connection_broke_is_not_sent_again(
    model: Path, hub: HubStandIn, upload: Upload
) -> None:
    hub.breaks_after = 2
    code, printed = upload("--hub-repo", "mine")
    assert code == 2
    assert "did not end well" in printed
    assert "files that have arrived are not sent again" in printed
    repository, arrived = hub.repositories["model", "ada/mine"], dict(hub.objects)
    assert (repository.files, repository.commits) == ({}, [])
    assert len(arrived) == 2
    hub.breaks_after, hub.seen[:], before = None, [], hub.bytes_put
    code, printed = upload("--hub-repo", "mine")
    assert code == 0, printed
    assert repository.files == shown_to_others(model)
    again = {request.removeprefix("PUT ") for request in hub.seen if request.startswith("PUT ")}
    assert again == set(hub.objects) - set(arrived)
    assert hub.bytes_put - before == sum(len(hub.objects[one]) for one in again)


@pytest.mark.parametrize(
    "fault",
    [
        (403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request"),
        (500, "Internal Error - We're working hard to fix this as soon as possible!"),
        (400, f"no such header: Bearer {TOKEN}"),  # a proxy that tells too much
    ],
)
def test_a_commit_that_is_refused_leaves_nothing_half(
    fault: tuple[int, str], model: Path, hub: HubStandIn, upload: Upload
) -> None:
    hub.commit_fault = fault
    code, printed = upload("--hub-repo", "mine")
    assert code == 2
    assert fault[1].replace(TOKEN, "…") in printed
    assert hub.repositories["model", "ada/mine"].files == {}
    hub.commit_fault, sent = None, hub.bytes_put
    assert upload("--hub-repo", "mine")[0] == 0
    assert hub.repositories["model", "ada/mine"].files == shown_to_others(model)
    assert hub.bytes_put == sent


@pytest.mark.parametrize(
    "token, told",
    [
        ("", "No token of the Hugging Face Hub was found"),
        ("hf_wrong", "Invalid credentials in Authorization header"),
        (f"{TOKEN}\x0bx", "Illegal header value"),  # which the client's message shows
    ],
)
def test_a_token_that_opens_nothing(
    token: str, told: str, model: Path, hub: HubStandIn, upload: Upload
) -> None:
    code, printed = upload("--hub-repo", "mine", HF_TOKEN=token)
    assert code == 2
    assert told in printed
    assert not token or token not in printed
    assert hub.repositories == {}


def test_a_place_that_is_somebody_elses(model: Path, hub: HubStandIn, upload: Upload) -> None:
    code, printed = upload("--hub-repo", "bob/mine")
    assert code == 2
    assert 'rights to create a model under the namespace "bob"' in printed
    assert hub.repositories == {}


@pytest.mark.parametrize(
    "changes", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}]
)
def test_a_hub_that_is_out_of_reach(
    changes: dict[str, str], model: Path, hub: HubStandIn, upload: Upload
) -> None:
    code, printed = upload("--hub-repo", "mine", **changes)
    assert code == 2
    assert "did not end well" in printed
    assert hub.seen == []


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--hub-repo", "mine", "--output-dir", "nothing"], "no folder nothing to upload"),
        (["--hub-repo", "mine", "--output-dir", "model/run.json"], "no folder model/run.json"),
        (["--hub-repo", "mine", "--output-dir", "other"], "holds no finished run"),
        ([], "Name the repository: --hub-repo"),
        (["--hub-repo", "a b/c/d"], "The upload to a b/c/d did not end well"),
        (["--hub-repo", "https://huggingface.co/ada/mine"], "did not end well"),
        (["--hub-repo", "ada/"], "did not end well"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_asked(
    flags: list[str], told: str, model: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    Path("other").mkdir()
    code, printed = run("export", "--to", "hub", *flags)
    assert code == 2
    assert told in in_words(printed)
    assert "offline" not in printed
    assert printed.count("Stopped  ") == 1
    assert TOKEN not in printed
