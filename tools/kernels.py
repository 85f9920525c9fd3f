"""Kernels that find the large libraries loaded: each is forked from one process that has them.

A kernel of its own loads IPython, matplotlib, astropy and scikit-learn for some six seconds, and
the book has dozens of chapters. The process of this file takes a request a line and answers each
with a line, both in JSON: a kernel to fork gives its pid, a pid its exit status or null. It ends
with the process that started it, and its kernels end with it."""

import atexit
import gc
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from importlib import import_module

# What nearly all notebooks need. Nothing of the project, and nothing that starts threads.
LIBRARIES = (
    "matplotlib.pyplot",
    "astropy.table",
    "scipy.stats",
    "scipy.optimize",
    "sklearn.base",
    "sklearn.decomposition",
    "sklearn.mixture",
    "asdf",
    "seaborn",
    "pytest",
)
CAN_FORK = sys.platform.startswith("linux")  # elsewhere libraries do not survive it
INLINE = "module://matplotlib_inline.backend_inline"


def load_libraries():
    "Load what all notebooks need."
    for name in LIBRARIES:
        import_module(name)
    _ = import_module("asdf").get_config().extensions  # its plugins take two seconds
    gc.freeze()  # nobody need look through a million objects that stay


def leave(status):
    """End a forked process as Python would, threads and exit handlers first, but without taking the
    libraries apart, which takes a second."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


# ---- in the process that has the libraries


def main():
    load_libraries()
    os.environ["JPY_PARENT_PID"] = str(os.getpid())  # a kernel ends with it; read at the import
    kernel = import_module("ipykernel.kernelapp")
    for line in sys.stdin:
        request = json.loads(line)
        if isinstance(request, int):
            answer = exit_status(request)
        else:
            answer = os.fork()
            if not answer:
                become(**request)
                kernel.launch_new_instance(argv=request["arguments"])
                leave(0)
        print(json.dumps(answer), flush=True)


def exit_status(pid):
    "That of a kernel, or nothing while it runs."
    try:
        ended, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:  # forked from a process that ended, and ended with it
        return -signal.SIGKILL
    return os.waitstatus_to_exitcode(status) if ended else None


def become(arguments, folder, environment):
    "In the new process: be as if started there by a command."
    os.setsid()
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[1:] = arguments
    del sys.path[0]  # of the tools
    import_module("numpy.random").seed()  # no two kernels draw the same, unless they ask for it


# ---- in the process that runs notebooks


class Source:
    "The process that has the libraries, started when a kernel is asked for and there is none."

    def __init__(self):
        self.process = None
        self.lock = threading.Lock()

    def ask(self, request):
        "The answer to a request. Where the process has ended, another takes its place."
        with self.lock:
            said = self._said(request)
            if said:
                return json.loads(said)
            if isinstance(request, int):  # a kernel, which has ended with it
                return -signal.SIGKILL
            said = self._said(request)
        if not said:
            raise ChildProcessError("the process that has the libraries ended (out of memory?)")
        return json.loads(said)

    def _said(self, request):
        "The line that answers; nothing where the process has ended."
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | {"MPLBACKEND": INLINE},
                start_new_session=True,  # Ctrl-C is not for it
                text=True,
            )
        with suppress(BrokenPipeError):
            print(json.dumps(request), file=self.process.stdin, flush=True)
        said = self.process.stdout.readline()
        if not said:
            self.process.wait()
            self.process = None
        return said


SOURCE = Source()


class Forked:
    "A kernel as a process that `jupyter_client` can look after."

    stdin = stdout = stderr = None

    def __init__(self, arguments, folder, environment):
        request = {"arguments": arguments, "folder": str(folder), "environment": dict(environment)}
        self.pid = SOURCE.ask(request)
        self.status = None

    def poll(self):
        if self.status is None:
            self.status = SOURCE.ask(self.pid)
        return self.status

    wait = poll  # asked for where it has ended

    def send_signal(self, number):
        os.kill(self.pid, number)


def manager_class():
    "A manager whose kernels are forked; Jupyter's own where that cannot be."
    from jupyter_client import AsyncKernelManager
    from jupyter_client.provisioning import LocalProvisioner

    if not CAN_FORK:
        return AsyncKernelManager

    class Provisioner(LocalProvisioner):
        async def launch_kernel(self, cmd, **kwargs):
            arguments = cmd[cmd.index("-f") :]
            self.cwd = kwargs.get("cwd") or os.getcwd()
            self.process = Forked(arguments, self.cwd, kwargs["env"])
            self.pid = self.pgid = self.process.pid
            return self.connection_info

    class Manager(AsyncKernelManager):
        async def _async_pre_start_kernel(self, **kwargs):
            if self.provisioner is None:
                facts = {"kernel_id": self.kernel_id, "kernel_spec": self.kernel_spec}
                self.provisioner = Provisioner(parent=self, **facts)
            return await super()._async_pre_start_kernel(**kwargs)

        pre_start_kernel = _async_pre_start_kernel

    return Manager


if __name__ == "__main__":
    sys.exit(main())
