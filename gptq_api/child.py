"""Our child processes: `python -m gptq_api.child` runs the `main` of one module of ours and ends when its parent does.

    subprocess.Popen(child_command("gptq_api.engine.process", str(fd)), start_new_session=True)

The kernel ends the child (Linux), so that one which is stopped, or hangs on a device, does not stay either. It takes
the thread that forked for the parent: start children from one that lives as long as the program. A session of its own
keeps a terminal's ^C from the child before it can ignore it.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptq_api import logs

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def child_command(module: str, *args: str, style: logs.Style | None = None, heard: bool = True) -> list[str]:
    """What to execute so that `main(*args)` of `module` runs; its result is the exit status. `style` of its log lines:
    ours, unless it is given. One that is not `heard`, whose stderr is /dev/null, does not import what makes lines."""
    from gptq_api import logs

    style = style or logs.style()
    kind = ("json" if style.as_json else "text") if heard else "none"
    return [sys.executable, "-m", __name__, str(os.getpid()), style.level, kind, module, *args]


def main(parent: str, level: str, kind: str, module: str, *args: str) -> int:
    # ^C and a signal to the whole group are for the parent, whose end is ours
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with(int(parent))
    if kind != "none":
        from gptq_api import logs

        logs.configure(level, kind == "json")
    run: Callable[..., int] = importlib.import_module(module).main
    return run(*args)


def end_with(parent: int) -> None:
    """Have the kernel send this process SIGKILL when `parent`, which started us, is gone; leave where it is already."""
    if sys.platform == "linux":
        import ctypes  # 20 ms that only the child needs

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
