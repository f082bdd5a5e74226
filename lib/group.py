"""
The processes of a run, as torchrun starts them: how they find each other, and what becomes of the others if
one fails, dies, or does not answer.

    join("gloo")      init_process_group, and a heartbeat
    leave(status)     the end of the process

What they tell each other besides goes through torchrun's key-value store, which answers at any time: to those
that wait for a GPU, and to those that never came to join.
"""
from __future__ import annotations

import hashlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Optional

import torch.distributed as dist

BEAT = 5.0  # seconds from one heartbeat to the next
SILENCE = 60.0  # seconds without one, after which a process counts as dead
COMING = 600.0  # seconds until its first one: imports from a slow disk take minutes

heart: Optional[Heartbeat] = None
has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # else the first process makes it


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def attempt() -> int:
    """How often torchrun has started the processes again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def run_id() -> Optional[str]:
    """torchrun's name for the run, the same in all attempts; some have none of their own."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"of process {os.getppid()}" if name == "none" else name


def join(backend: str) -> None:
    """Become part of the group. A process that waits for another one waits as long as that one is alive."""
    global heart, has_store
    shared, has_store = next(dist.rendezvous("env://"))[0], True
    heart = Heartbeat()
    heart.start()
    # a prefix, for the addresses of an attempt's processes stay in the store
    dist.init_process_group(backend, store=dist.PrefixStore(f"group{attempt()}", shared), rank=rank(),
                            world_size=world(), timeout=timedelta(days=1))


def store() -> dist.Store:
    """A connection of one's own to the store. Raises an error of torch.distributed if it does not answer."""
    if rank() == 0 and not has_store:
        raise dist.DistNetworkError("there is none before this process has joined")
    found = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                          wait_for_workers=False, timeout=timedelta(seconds=10))
    return dist.PrefixStore(f"run{attempt()}", found)


def answer(question: Callable, otherwise=None):
    """To a question to the store; if it does not answer, `otherwise`."""
    try:
        return question(store())
    except (RuntimeError, KeyError, ValueError):  # the last two: its address is not in the environment
        return otherwise


class Heartbeat(threading.Thread):
    """Tells the others that this process lives, and ends it if the next one does not, or if any has failed.

    That is no collective's timeout: compiling, evaluating and preparing data are silent for minutes.
    """

    def __init__(self):
        super().__init__(daemon=True)
        self.stop = threading.Event()
        self.store = store()

    def run(self) -> None:
        other, last, beats = (rank() + 1) % world(), None, 0
        since = now = time.monotonic()
        try:
            while not self.stop.wait(BEAT):
                beats, before, now = beats + 1, now, time.monotonic()
                if now > before + 3 * BEAT:
                    since = now  # this one stood still itself, as all do after Ctrl-Z
                self.store.set(f"beat{rank()}", str(beats))
                if self.store.check(["failed"]):
                    time.sleep(BEAT)  # to say what there is to say
                    os._exit(1)
                there = self.store.check([f"beat{other}"])  # not before it has joined
                found = self.store.get(f"beat{other}") if there else None
                if found != last:
                    last, since = found, now
                limit = COMING if found is None else SILENCE
                if found != b"done" and now > since + limit:
                    end(f"process {other} of {world()} has not answered for {limit:.0f} s: "
                        "--init_from=resume goes on with what was saved")
        except RuntimeError:  # the store is gone, and torchrun with it: nobody would see that a process dies
            if not self.stop.is_set():
                os.kill(os.getpid(), signal.SIGTERM)  # save, and end


def end(reason: str) -> None:
    """Of this process and, through their heartbeats, of the others."""
    say_once(reason)
    tell_failure()
    os._exit(1)


def say_once(reason: str) -> None:
    """Print an error, unless another process has printed the same."""
    name = "said " + hashlib.sha256(reason.encode()).hexdigest()
    if world() == 1 or answer(lambda store: store.add(name, 1), otherwise=1) == 1:
        print(f"error: {reason}", file=sys.stderr, flush=True)


def tell_failure() -> None:
    answer(lambda store: store.set("failed", str(rank())))


LOST = "gloo|nccl|connection (closed|reset|refused)|broken pipe|tcpstore|timed out|socket|process group"


def is_lost(error: Exception) -> bool:
    """Is it what torch.distributed raises when another process has gone?"""
    return isinstance(error, RuntimeError) and bool(re.search(LOST, str(error).lower()))


def say_lost() -> None:
    """Another process has gone. If it could still say why, that was enough."""
    if not answer(lambda store: store.check(["failed"])):
        say_once("another process of the run has died, or cannot be reached: --init_from=resume goes on with "
                 "what was saved")


def leave(status: int, failed: bool = False) -> None:
    """The end of this process; failed: the others must end as well.

    The group is not taken down. Its destructor waits for its threads with Python's lock in its hands, and a
    thread that still has a tensor to release waits for that lock.
    """
    if heart:
        heart.stop.set()
        heart.join(BEAT)
    if failed:
        tell_failure()
    elif heart:
        try:
            heart.store.set(f"beat{rank()}", "done")
            heart.store.add("left", 1)
            end = time.monotonic() + 10
            while rank() == 0 and heart.store.add("left", 0) < world() and time.monotonic() < end:
                time.sleep(0.02)  # without torchrun the store lives in this process
        except RuntimeError:
            pass
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)
