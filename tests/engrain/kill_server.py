"""Runs `engrain` again and again at the price of a fork, and ends it by a signal at a chosen point.

A process of its own, started by `test_killed.py`: everything is imported once, then each line of JSON on standard
input is one command, played by a forked child through the real command line and answered by one line of JSON. The
child only watches itself: by `sys.setprofile` it counts calls and returns, of C functions too, from the beginning of a
stage of a round, and sends itself a real signal when the count is reached, or when a function has returned. Or this
process, its parent, sends the signal after a time.
"""

from __future__ import annotations

import inspect
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from functools import wraps
from importlib import import_module
from typing import Any

Hook = Callable[[Mapping[str, Any]], None]

STAGES = ("start", "play", "extract", "curate", "select", "consolidate", "judge")
#: What a round needs and would import late.
MODULES = (
    "engrain.cli.improve", "engrain.cli.distill", "engrain.loop", "engrain.forever", "engrain.report",
    "engrain.retention", "engrain.servers", "engrain.console", "engrain.logs", "agent.engines.server",
    "transformers.models.qwen2.modeling_qwen2", "transformers.models.auto.modeling_auto", "peft", "peft.tuners.lora",
    "matplotlib.pyplot", "alembic.command", "sqlalchemy.dialects.sqlite", "logging.config", "torch._dynamo",
)  # fmt: skip


def reached(stage: str, wanted: str) -> bool:
    """Whether a round that is in one stage has come to the other, or is beyond it; its end is no place any more."""
    return stage != "finish" and STAGES.index(stage) >= STAGES.index(wanted)


def hook(path: str, before: Hook | None = None, after: Hook | None = None) -> None:
    """Call `before` and `after` with the arguments of a function, wherever the main thread calls it by this name."""
    module, _, names = path.partition(":")
    *owners, name = names.split(".")
    owner: Any = import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    function = getattr(owner, name)
    signature = inspect.signature(function)

    @wraps(function)
    def hooked(*positional: Any, **named: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            return function(*positional, **named)
        arguments = signature.bind(*positional, **named).arguments
        if before is not None:
            before(arguments)
        value = function(*positional, **named)
        if after is not None:
            after(arguments)
        return value

    setattr(owner, name, hooked)


class Watch:
    """Counts what the main thread does, tells the parent of stages and of work, and sends the signal.

    `plan` names a `stage` and a number of `calls` within it, or a function (`returns`) and how often it returned. A
    stage that ends before is signalled at its very end, and where it was over before, the next one is taken. Counting
    makes a process three times as slow, so it is done in that stage alone, or in all of them where the plan says
    `count`.
    """

    def __init__(self, tell: int, plan: dict[str, Any]) -> None:
        self.tell, self.plan = tell, plan
        self.number = plan.get("signal", signal.SIGKILL)
        self.stage, self.count, self.target, self.returned = "start", 0, -1, 0
        self.calls: dict[str, int] = {}
        hook("engrain.loop:Round._begin", lambda its: self.enter(its["stage"]))
        hook("engrain.loop:Round._finish", lambda its: self.enter("finish"))
        hook(
            "agent.engines.transformers:TransformersEngine.generate",
            lambda its: self.say("prompts", len(its["prompts"])),
        )
        hook("distill.trainer:Trainer.step", lambda its: self.say("step", len(its["self"].history) + 1))
        if "returns" in plan:
            hook(plan["returns"], after=self.ended)
        if plan.get("count"):
            sys.setprofile(self)
        self.arm()

    def say(self, *what: Any) -> None:
        os.write(self.tell, json.dumps(what).encode() + b"\n")

    def arm(self) -> None:
        if "calls" in self.plan and reached(self.stage, self.plan["stage"]):
            self.target = max(1, self.plan["calls"])
            sys.setprofile(self)

    def enter(self, stage: str) -> None:
        if self.target > 0:
            self.fire()  # a signal that can be handled does not end it here
        self.calls[self.stage] = self.count
        self.stage, self.count = stage, 0
        self.say("stage", stage, time.monotonic())
        self.arm()

    def ended(self, its: Mapping[str, Any]) -> None:
        self.returned += 1
        if self.returned == self.plan.get("times", 1):
            self.fire()

    def fire(self) -> None:
        sys.setprofile(None)
        self.target, self.plan = -1, {}
        self.say("signalled", self.stage, self.count)
        os.kill(os.getpid(), self.number)

    def __call__(self, frame: Any, event: str, argument: Any) -> None:
        self.count += 1
        if self.count == self.target:
            self.fire()


def play(job: dict[str, Any], tell: int) -> None:
    """In the child: one command, from `main` to its exit code."""
    os.setsid()
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(job["env"])
    code: Any = 0
    from engrain import cli

    sys.argv = ["engrain", *job["argv"]]
    watch = Watch(tell, job.get("plan", {}))
    try:
        cli.main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 70
    sys.setprofile(None)
    if watch.plan.get("count"):
        watch.say("calls", watch.calls | {watch.stage: watch.count})
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Fork, watch, wait; `code` is that of subprocess: negative for a signal."""
    heard, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(heard)
        play(job, tell)
    os.close(tell)
    plan = job.get("plan", {})
    said: list[Any] = []
    signalled = None
    late = threading.Timer(plan.get("seconds", 0.0), os.kill, (child, plan.get("signal", signal.SIGKILL)))
    beside = None
    with os.fdopen(heard) as lines:
        for line in lines:
            said.append(json.loads(line))
            kind, *about = said[-1]
            if kind == "stage" and "seconds" in plan and late.ident is None and reached(about[0], plan["stage"]):
                late.start()
            if kind == "signalled" and signalled is None:
                signalled = time.monotonic()
                if "beside" in job:  # the child was stopped: another command, and it goes on
                    beside = run(job["beside"])
                    os.kill(child, signal.SIGCONT)
    late.cancel()
    if late.ident is not None:
        late.join()  # before the process id is free for another
    _, status = os.waitpid(child, 0)
    return {
        "code": os.waitstatus_to_exitcode(status),
        "pid": child,
        "said": said,
        "seconds": None if signalled is None else time.monotonic() - signalled,
        "beside": beside,
    }


def serve() -> None:
    """Answer lines until the input ends."""
    for name in MODULES:
        import_module(name)
    trainer = import_module("distill.trainer")
    trainer._SAVING_SHARE = float("inf")  # of the time; a step of this size takes less than saving it
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(run(job)), flush=True)


if __name__ == "__main__":
    serve()
