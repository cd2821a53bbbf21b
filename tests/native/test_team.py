"""Threads of a team beside others who want the processor."""

import json
import subprocess
import sys

from tests.native.compiler import needs_compiler

NUM_PASSES = 200
# The team, and one who takes all he is given, share one processor. A thread that waits and offers the processor gives
# up its turn to him each time; the kernel counts that as involuntary, as the thread could have gone on.
CODE = f"""
import json, os, subprocess, sys, time, torch
from pathlib import Path
from llama4_dist.model.cpu.panels import pack
from llama4_dist.native import threads

threads.set_count(2)
os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})
before = set(os.listdir("/proc/self/task"))
weight, rows = pack(torch.zeros(64, 64)), torch.zeros(2, 64)
weight(rows)
(member,) = set(os.listdir("/proc/self/task")) - before

def num_given_up():
    lines = Path("/proc/self/task", member, "status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("nonvoluntary")))

with subprocess.Popen([sys.executable, "-c", "print(flush=True)\\nwhile True: pass"], stdout=subprocess.PIPE) as other:
    other.stdout.readline()
    first = num_given_up()
    for _ in range({NUM_PASSES}):
        weight(rows)
        time.sleep(0.001)
    print(json.dumps(num_given_up() - first))
    other.kill()
"""


@needs_compiler
def test_a_thread_that_waits_does_not_offer_a_processor_that_others_want_again_and_again() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) < NUM_PASSES / 2
