"""Runs the tests in the notebooks: nbdev_test on each, two at a time, the longest first.

nbdev_test itself has no timeout, so a notebook that hangs would hang everything without saying
which it was: here each has its own."""

import argparse
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed

from durations import longest_first, remember
from notebooks import ROOT, environment, notebooks, thread_share

SETTINGS = {
    "STELLAR_LAB_ARCHIVE": str(ROOT / "data" / "archives" / "clusters"),
    "STELLAR_LAB_PROFILE": "quick",
    "MPLBACKEND": "Agg",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def test(path, timeout, threads):
    "Test one notebook: (its name, seconds, what went wrong or nothing)."
    begin = time.monotonic()
    settings = environment(**threads, **SETTINGS)
    process = subprocess.Popen(
        ["nbdev_test", "--path", str(path)],
        cwd=ROOT,
        env=settings,
        start_new_session=True,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
        problem = output if process.returncode else ""
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # and its workers
        output, _ = process.communicate()
        problem = f"{output}\nstopped after {timeout} s, the limit of a notebook"
    return path.name, time.monotonic() - begin, problem


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
    threads = thread_share(options.workers)
    failed = []
    times = {}
    with ThreadPoolExecutor(options.workers) as pool:
        jobs = [
            pool.submit(test, path, options.timeout, threads)
            for path in longest_first("test", paths)
        ]
        for job in as_completed(jobs):
            name, seconds, problem = job.result()
            print(f"{'FAILED' if problem else 'ok    '} {name} {seconds:.0f} s", flush=True)
            times[name] = seconds
            if problem:
                print(problem, flush=True)
                failed.append(name)
    remember("test", times)
    failed = [path.name for path in paths if path.name in failed]  # in the order of reading
    print(f"failed: {', '.join(failed)}" if failed else f"the tests of {len(paths)} notebooks hold")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
