"""Starts trainings by forking a process that has imported everything: a start costs milliseconds, not seconds.

A line of JSON on stdin, {"arguments": [...], "output": FILE, "hang": NAME, "slow": SECONDS}, forks one; the answer is
its process id. In it the function of `os` called "hang" never returns in a thread.
"module": the command line, "train" or another. "place": variables that make it one of several ranks.
{"wait": ID} answers its exit code, negative for the signal that killed it; {"command": [...]} that of a command.
"""

import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import one_rank
import torch

from soflow_fast.commands import process
from soflow_fast.runs import samples

HEAVY = ("sklearn.datasets", "sklearn.svm", "scipy.linalg", "torch.utils.tensorboard", "PIL.Image")
for heavy in (*HEAVY, "soflow_fast.train", "soflow_fast.sample", "soflow_fast.runs.drawn"):
    importlib.import_module(heavy)
torch.set_num_threads(1)
samples.EVALUATION_SAMPLES = 100


def slowly(function: Callable[..., Any], seconds: float, *arguments: Any) -> Any:
    time.sleep(seconds)
    return function(*arguments)


def hanging(plain: Callable[..., Any]) -> Callable[..., Any]:
    """A function that does not return, but for the main thread's calls."""
    main = threading.main_thread()
    return lambda *given: plain(*given) if threading.current_thread() is main else time.sleep(3600)


def main() -> None:
    print("ready", flush=True)
    running: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            running.discard(request["wait"])
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        if "command" in request:
            print(subprocess.run(request["command"], stdout=subprocess.DEVNULL).returncode, flush=True)
            continue
        child = os.fork()
        if child == 0:
            output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            if "rank" in request:
                one_rank.as_rank(*request["rank"])
            if request["place"]:
                os.environ |= request["place"]
            if request["hang"]:
                setattr(os, request["hang"], hanging(getattr(os, request["hang"])))
            if request["slow"]:
                os.fsync = functools.partial(slowly, os.fsync, request["slow"])
            try:
                main = importlib.import_module(f"soflow_fast.{request['module']}").main
                process.run(functools.partial(main, request["arguments"]))
            except SystemExit as ended:
                if request["place"] or request["module"] != "train":  # to leave Python as usual takes torch seconds
                    os._exit(int(ended.code or 0))
                raise
        running.add(child)
        print(child, flush=True)
    for child in running:
        os.kill(child, signal.SIGKILL)


if __name__ == "__main__":
    main()
