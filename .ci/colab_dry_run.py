"""What would `pip install -r requirements-finetune.txt` do on a Google Colab GPU runtime?

It should add bitsandbytes and nothing else, and change nothing of what Colab ships
(colab-packages.txt). Checked without Colab: every listed package gets a
stub (installed metadata, no code) in a throw-away virtual environment, and Colab's own version
of pip makes a dry run there (it fetches the wheels it asks about, 170 MB). Exit status 0 if
all is as it should be, else 1. Arguments: another requirements file, another package list.

What this does not show:
- pip is told to take wheels for CPython 3.13, x86_64 Linux, glibc 2.35, but it judges conditions
  such as `python_version < "3.12"` by the Python that runs this; only 3.13 gives Colab's answer.
- Stubs of the required packages, and of the listed ones these need in turn, carry the real
  requirements of that version, read from the package index pip is configured with. All others
  carry none, nor does torch, whose +cu128 build is not there, nor what only an extra brings in.
- pip does not ask whether other installed packages accept a new one, and nothing is imported.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import urllib.request
import venv
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
EXPECTED = {"bitsandbytes"}
PLATFORMS = ["linux", "manylinux2014", *(f"manylinux_2_{minor}" for minor in range(5, 36))]
TARGET = ["--python-version=3.13", "--implementation=cp", "--only-binary=:all:"]
TARGET += [f"--platform={platform}_x86_64" for platform in PLATFORMS]


def normalised(name: str) -> str:
    """The name in the form PEP 503 compares."""
    return re.sub(r"[-_.]+", "-", name).lower()


def names(requirements: list[str]) -> set[str]:
    """Normalised names of the requirements that no extra has to ask for."""
    found = (re.match(r"\s*([A-Za-z0-9][\w.-]*)", r) for r in requirements if "extra ==" not in r)
    return {normalised(match[1]) for match in found if match}


def changes(
    installed: dict[str, str], report: dict[str, Any]
) -> tuple[dict[str, str], dict[str, tuple[str, str]]]:
    """Packages pip would add (name: version) and replace (name: version now, version then)."""
    have = {normalised(name): version for name, version in installed.items()}
    items = {normalised(i["metadata"]["name"]): i["metadata"]["version"] for i in report["install"]}
    changed = {name: (have[name], version) for name, version in items.items() if name in have}
    return {name: items[name] for name in items if name not in have}, changed


def dry_run(pip: list[str], folder: Path, *arguments: str) -> dict[str, Any]:
    """pip's report on what it would install."""
    command = [*pip, "install", "--dry-run", f"--report={folder / 'report'}", *TARGET, *arguments]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads((folder / "report").read_text("utf-8")))


def add_stub(site: Path, name: str, version: str, known: dict[str, Any]) -> None:
    """What pip reads of an installed package."""
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Provides-Extra: {extra}" for extra in known.get("provides_extra", [])]
    lines += [f"Requires-Dist: {need}" for need in known.get("requires_dist", [])]
    stub = site / f"{name.replace('-', '_')}-{version}.dist-info"
    stub.mkdir()
    for file, text in {"METADATA": "\n".join(lines), "INSTALLER": "pip", "RECORD": ""}.items():
        (stub / file).write_text(text + "\n", "utf-8")


def simulate(requirements: Path, installed: dict[str, str], folder: Path) -> dict[str, Any]:
    """pip's report for the requirements where the listed packages are installed."""
    fetch = [sys.executable, "-m", "pip", "download", "--no-deps", f"--dest={folder}"]
    fetch.append(f"pip=={installed['pip']}")
    subprocess.run(fetch, check=True, capture_output=True, text=True)
    venv.create(folder / "venv", symlinks=True)
    pip = [str(folder / "venv/bin/python"), str(next(folder.glob("pip-*.whl")) / "pip")]
    public = {name for name, version in installed.items() if "+" not in version}
    known: dict[str, dict[str, Any]] = {}
    wanted = names(requirements.read_text("utf-8").splitlines()) & public
    while wanted:
        pins = [f"{name}=={installed[name]}" for name in sorted(wanted)]
        for item in dry_run(pip, folder, "--no-deps", "--ignore-installed", *pins)["install"]:
            known[normalised(item["metadata"]["name"])] = item["metadata"]
        needs = [need for name in wanted for need in known[name].get("requires_dist", [])]
        wanted = names(needs) & public - known.keys()
    for name, version in installed.items():
        add_stub(next(folder.glob("venv/lib/*/site-packages")), name, version, known.get(name, {}))
    print(f"{len(installed)} packages on Colab, real requirements read for {len(known)}")
    return dry_run(pip, folder, "-r", str(requirements))


def size(url: str) -> str:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=20) as head:
            return f"{int(head.headers['Content-Length']) / 1e6:.1f} MB"
    except (OSError, TypeError, ValueError):
        return "size unknown"


def main(requirements: Path, package_list: Path) -> int:
    rows = [row for row in package_list.read_text("utf-8").splitlines() if row[:1] not in ("", "#")]
    installed = {normalised(name): version for name, version in (row.split("==") for row in rows)}
    try:
        with tempfile.TemporaryDirectory() as folder:
            report = simulate(requirements, installed, Path(folder))
    except subprocess.CalledProcessError as error:
        print(error.stderr, "FAIL: pip could not do it", sep="\n")
        return 1
    new, changed = changes(installed, report)
    faults = [f"would change {name}: {old} -> {now}" for name, (old, now) in changed.items()]
    faults += [f"would add {name}" for name in sorted(new.keys() - EXPECTED)]
    for item in report["install"]:
        data, url = item["metadata"], item["download_info"]["url"]
        print(f"install {data['name']} {data['version']}: {size(url)}, {url.rsplit('/', 1)[-1]}")
    verdict = [f"FAIL: {fault}" for fault in faults] or [f"OK: {len(new)} new, none changed"]
    print(*verdict, sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[1:]]
    defaults = [HERE.parent / "requirements-finetune.txt", HERE / "colab-packages.txt"]
    sys.exit(main(*(given + defaults[len(given) :])))
