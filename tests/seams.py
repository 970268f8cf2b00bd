"""All that the tests know of the script by name: tests/README.md lists it, test_suite.py counts it.

Every other test file goes through these few lines, through the command line, or through files on disk, so
that a rewrite of the script changes this file and no other.
"""

import copy
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import finetune_colab as ft

ROOT = Path(ft.__file__).resolve().parent
SCRIPT = ROOT / "finetune_colab.py"
IGNORE = -100  # the label that torch's cross entropy leaves out

main = ft.main
Config = ft.Config
UserError = ft.UserError
find_pairs = ft.find_pairs
load_tokenizer = ft.load_tokenizer
load_tuned = ft.load_tuned
may_share_rows = ft.may_share_rows
overlap = ft.overlap

Message = dict[str, str]
Example = dict[str, list[int]]


def setting_defaults() -> dict[str, Any]:
    return {name: getattr(Config, name) for name in Config.__annotations__ if name.isupper()}


def settings_of(*argv: object) -> Any:
    """The settings that a command line stands for; UserError with everything wrong in it."""
    return ft.read_command_line([str(part) for part in argv])[1]


def device_for(kind: str, capability: tuple[int, int] = (0, 0), **settings: Any) -> Any:
    """How a "cuda", "mps" or "cpu" would be used: its dtype, four_bit and the reason."""
    return ft.choose_device(Config(**settings), kind, capability)


def plan_for(lengths: Sequence[int], device: Any, model: Any = None, memory_gb: float = 0, **settings: Any) -> Any:
    """How training on pairs of these lengths, half of each learned, is laid out on a T4."""
    halves = [[IGNORE] * (n // 2) + [1] * (n - n // 2) for n in lengths]
    pairs: Any = [{"input_ids": [1] * len(half), "labels": half} for half in halves]
    device = device._replace(flops=22e12, bandwidth=240e9, memory=memory_gb * 1e9)
    return ft.plan_run(Config(**settings), pairs, device, model)


def encode(tokenizer: Any, messages: Sequence[Message], **settings: Any) -> Example:
    """Ids and labels of a conversation, as training and asking see it."""
    return dict(ft.encode(_loaded(tokenizer, **settings), messages))


@functools.cache
def _loaded(tokenizer: Any, **settings: Any) -> Any:
    ft.set_template(Config(**settings), tokenizer := copy.deepcopy(tokenizer))
    return tokenizer


def load_base(folder: Path | str, **settings: Any) -> Any:
    """The frozen model on a processor; LOAD_IN_4BIT=True for 4 bits."""
    cfg = Config(MODEL_NAME=str(folder), **settings)
    return ft.load_base(cfg, ft.choose_device(cfg, "cpu"))


def outline_of(config: Any) -> Any:
    """What a model is made of, from its configuration alone."""
    return ft.outline_of(config)


def add_lora(base: Any, **settings: Any) -> Any:
    return ft.add_lora(Config(**settings), base)


def mean_loss(model: Any, examples: Sequence[Example], tokens_at_once: int = 1000) -> float:
    """As validation measures it: for each token to predict, over all examples together."""
    return ft.mean_loss(model, examples, tokens_at_once)


def summed_loss(model: Any, examples: Sequence[Example]) -> Any:
    """The loss of one row without padding, with its graph: what a training step computes."""
    import torch

    row = ft.flatten(examples)
    labels = row.pop("labels")
    with ft.padding_free(model):
        logits = model(**row).logits[0].float()
    return torch.nn.functional.cross_entropy(logits, labels[labels != IGNORE], reduction="sum")


def ask(tuned: Any, *questions: str, **settings: Any) -> list[Any]:
    """Answers (text, tokens, stopped), asked together, each question alone."""
    cfg = Config(**settings)
    prompts = [ft.prompt_of(tuned, [{"role": "user", "content": one}], cfg) for one in questions]
    return list(ft.answers(tuned.model, tuned.tokenizer, prompts, cfg))


def prompt_of(tuned: Any, messages: Sequence[Message], **settings: Any) -> list[int]:
    """A conversation as the tokens that the model is given."""
    return list(ft.prompt_of(tuned, messages, Config(**settings)))


def stream_answer(tuned: Any, messages: Sequence[Message], **settings: Any) -> Iterator[Any]:
    """One answer, again and again while it grows."""
    return iter(ft.stream_answer(tuned, messages, Config(**settings)))
