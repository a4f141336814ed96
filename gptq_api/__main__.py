"""The `gptq-api` command, which is `python -m gptq_api` as well."""

import gc
import os
import signal
import sys

from gptq_api.exits import DONE, INTERRUPTED, cut_short


def main() -> int:
    """As `cli.main.main`; ^C is a line and an exit status while that is imported, too. The first process of a container
    ends at SIGTERM from here on: without a handler Linux would not let it."""
    if os.getpid() == 1 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        status = DONE if sys.argv[1:2] == ["serve"] else cut_short(signal.SIGTERM)
        signal.signal(signal.SIGTERM, lambda *_: os._exit(status))
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored, as with nohup
        # an exception would come out of any line of any library, and some catch it
        signal.signal(signal.SIGINT, _stopped)
    gc.disable()  # what is imported stays, and the collector would look at it again and again
    from gptq_api.cli import main as command

    gc.enable()
    if signal.getsignal(signal.SIGINT) is _stopped:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return command.main()


def _stopped(number: int, frame: object) -> None:
    sys.stderr.write("gptq-api: stopped\n")
    sys.stderr.flush()
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    raise SystemExit(main())
