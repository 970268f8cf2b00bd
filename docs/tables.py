"""The table of times and memory in finetune.md: computed, from phi-2's shape and public figures of GPUs.

python docs/tables.py       prints it
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import finetune_colab as ft  # noqa: E402

PHI_2 = {  # as in its config.json
    "vocab_size": 51200,
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "partial_rotary_factor": 0.4,
}
ROWS = (  # tokens of a pair, half of them the answer's; the preset
    (150, "balanced"),
    (150, "quick"),
    (500, "balanced"),
    (500, "low-memory"),
    (500, "quality"),
)
PAIRS = 500


def main() -> None:
    from transformers import AutoConfig

    model = ft.outline_of(AutoConfig.for_model("phi", **PHI_2))
    print("| pairs of | preset |", *(f"{name} |" for name in ft.GPUS))
    print("|" + " --- |" * (2 + len(ft.GPUS)))
    for length, preset in ROWS:
        _, cfg = ft.read_command_line(["--preset", preset])
        half = length // 2
        example = ft.Example(
            input_ids=[1] * length, labels=[ft.IGNORE] * (length - half) + [1] * half
        )
        cells = []
        for capability, figures in ft.GPUS.values():
            device = ft.choose_device(cfg, "cuda", capability, *figures)
            plan = ft.plan_run(cfg, [example] * PAIRS, device, ft.adapted_outline(cfg, model))
            minutes = max(1, round(((plan.seconds or 0) + plan.asking_seconds) / 60))
            cells.append(f"{minutes} min, {plan.memory_gb:.1f} GB |")
        print(f"| {length} tokens | `{preset}` |", *cells)


if __name__ == "__main__":
    main()
