"""A run is killed at everything it writes, and the same command ends with the same adapter."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from typing import Any

import pytest
from conftest import PAIRS, ROOT

FLAGS = "--max-steps 3 --save-steps 1 --eval-steps 2 --learning-rate 1e-2".split()
FLAGS += "--eval-answers 1 --max-tokens 2".split()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, Any]:
    """What the rig says: see kill_rig.py."""
    import torch
    from transformers import PhiConfig, PhiForCausalLM

    place = tmp_path_factory.mktemp("kills")
    torch.manual_seed(0)
    shape = {"hidden_size": 80, "intermediate_size": 160, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 1, "vocab_size": 448, "bos_token_id": 0, "eos_token_id": 0}
    PhiForCausalLM(PhiConfig(**shape, partial_rotary_factor=0.4)).save_pretrained(place / "phi")
    tokenizer.save_pretrained(place / "phi")
    with (place / "dataset.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("question", "answer"), *PAIRS[:14]])
    command = [sys.executable, str(ROOT / "tests" / "kill_rig.py"), str(place)]
    command += ["--model-name", str(place / "phi"), "--dataset-path", "dataset.csv", *FLAGS]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_whatever_a_kill_interrupts_the_end_is_the_same(report: dict[str, Any]) -> None:
    assert report["faults"] == []
    assert report["changes"] > 100  # every file of three checkpoints and of the outputs


def test_a_kill_while_it_asks_changes_nothing(report: dict[str, Any]) -> None:
    assert report["asking"]["faults"] == []
    assert report["asking"]["changes"] > 40


def test_twenty_kills_of_one_run_change_nothing(report: dict[str, Any]) -> None:
    assert report["often"] == {"kills": 20, "same": True}
