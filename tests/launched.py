"""finetune_colab.py as a launcher starts it, with an accident on the way: "kill 1 5" in process 1 at step 5."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import finetune_colab as ft

KIND, PROCESS, STEP = os.environ["ACCIDENT"].split()
draw_apart, step_loss = ft.draw_apart, ft.step_loss
now = [0]


def at_step(seed: int, step: int) -> None:
    draw_apart(seed, step)
    now[0] = step
    here = str(ft.process_number()) == PROCESS
    if KIND in ("kill", "term") and step == int(STEP):
        if KIND == "kill" and here:
            os.kill(os.getpid(), signal.SIGKILL)
        if KIND == "term" and here:
            os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(2)  # for the launcher to pass it on


def at_row(*args: Any, **kwargs: Any) -> Any:
    if str(ft.process_number()) == PROCESS and now == [int(STEP)]:
        now.append(0)  # once
        if KIND == "memory":
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if KIND == "error":
            raise ValueError("nobody foresaw this")
    return step_loss(*args, **kwargs)


ft.draw_apart, ft.step_loss = at_step, at_row
if __name__ == "__main__":
    sys.exit(ft.main())
