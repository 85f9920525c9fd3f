"""Runs the tests in the notebooks as nbdev_test does, two at a time, the longest first.

nbdev_test itself has no timeout, so a notebook that hangs would hang everything without saying
which it was: here each has its own. And it loads IPython, matplotlib and astropy anew for each
notebook: here they are loaded once, and each notebook runs in a process forked from this one."""

import argparse
import os
import signal
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from importlib import import_module

from durations import longest_first, remember
from kernels import CAN_FORK, leave, load_libraries
from notebooks import ROOT, environment, notebooks, thread_share

SETTINGS = {
    "STELLAR_LAB_ARCHIVE": str(ROOT / "data" / "archives" / "clusters"),
    "STELLAR_LAB_PROFILE": "quick",
    "MPLBACKEND": "Agg",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def shell(path, make):
    "A shell that draws a figure once, when it is shown, and no finer than needed."
    made = make(path, mpl_format="png")  # nbdev draws twice as fine, which nobody sees here
    import_module("matplotlib.pyplot").uninstall_repl_displayhook()
    return made


class Test:
    "A notebook under test: a process of its own, and a file for what that says."

    def __init__(self, path, timeout):
        self.path = path
        self.timeout = timeout
        self.begin = time.monotonic()
        self.said = tempfile.TemporaryFile()
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            self.run()

    def run(self):
        "In the new process: test, and end it."
        os.setsid()
        with open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), 0)
        for stream in (1, 2):
            os.dup2(self.said.fileno(), stream)
        os.chdir(ROOT)
        sys.path.remove(str(ROOT / "tools"))
        tester = import_module("nbdev.test")
        tester.CaptureShell = partial(shell, make=tester.CaptureShell)
        skipped = tester.get_config().tst_flags.split()
        passed, _ = tester.test_nb(self.path, skip_flags=skipped, basepath=ROOT)
        leave(not passed)

    def problem(self):
        "None while it runs; then what went wrong, or nothing."
        late = time.monotonic() - self.begin > self.timeout
        if late:
            self.kill()
        pid, status = os.waitpid(self.pid, 0 if late else os.WNOHANG)
        if not pid:
            return None
        self.said.seek(0)
        said = self.said.read().decode(errors="replace")
        if late:
            return f"{said}\nstopped after {self.timeout} s, the limit of a notebook"
        return (said or f"it ended with the status {status}") if status else ""

    def kill(self):
        "End it and its workers."
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)


def run_all(paths, workers, timeout):
    "Test notebooks, some at a time; gives (path, seconds, what went wrong or nothing) of each."
    waiting = list(paths)
    running = []
    runner = os.getpid()
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                running.append(Test(waiting.pop(0), timeout))
            time.sleep(0.05)
            for test in list(running):
                problem = test.problem()
                if problem is not None:
                    running.remove(test)
                    yield test.path, time.monotonic() - test.begin, problem
    finally:
        if os.getpid() == runner:  # a test ends by way of this line, too
            for test in running:
                test.kill()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names", nargs="*", help="notebooks, such as 03_normalize or 03 (default: all)"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--timeout", type=float, default=600, help="seconds that one notebook may take"
    )
    options = parser.parse_args()
    paths = notebooks(options.names)
    os.environ.update(environment(**thread_share(options.workers), **SETTINGS))
    if CAN_FORK:
        load_libraries()
        import_module("nbdev.test")
    failed = []
    times = {}
    for path, seconds, problem in run_all(
        longest_first("test", paths), options.workers, options.timeout
    ):
        print(f"{'FAILED' if problem else 'ok    '} {path.name} {seconds:.0f} s", flush=True)
        times[path.name] = seconds
        if problem:
            print(problem, flush=True)
            failed.append(path.name)
    remember("test", times)
    failed = [path.name for path in paths if path.name in failed]  # in the order of reading
    print(f"failed: {', '.join(failed)}" if failed else f"the tests of {len(paths)} notebooks hold")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
