"""Faults of processes hold, heal, and are refused when they hit somebody else."""

import os
import signal
from contextlib import ExitStack

import pytest

from llama4_dist.chaos.faults.processes import Kill, Process, Stop
from tests.faults.fault import FaultNotVerified, must, offered
from tests.faults.memory import MemoryLimit
from tests.faults.straggler import CpuLimit
from tests.faults.victims import EATS_ON_REQUEST, IDLE_THREADS, SPIN, victim


def test_a_killed_process_is_gone_and_stays_gone() -> None:
    with victim() as process:
        with Kill(process.pid):
            assert Process.of(process.pid).is_dead, "a zombie is dead"
        assert process.wait(60) == -9


def test_a_killed_process_is_healed_by_its_restart() -> None:
    with victim() as process, ExitStack() as later:
        fault = Kill(process.pid, restart=lambda: later.enter_context(victim()).pid)
        with fault:
            pass
        assert fault.restarted is not None
        assert not fault.restarted.is_dead


def test_a_restart_that_dies_at_once_heals_nothing() -> None:
    with victim() as process, victim() as second:
        fault = Kill(process.pid, restart=lambda: second.pid)
        fault.inject()
        fault.verify()
        fault.heal()
        with Kill(second.pid), pytest.raises(FaultNotVerified, match="not replaced by a living one"):
            fault.verify_healed()


def test_killing_the_wrong_process_is_noticed() -> None:
    with victim() as process, victim() as bystander:
        fault = Kill(process.pid, aim=bystander.pid)
        with pytest.raises(FaultNotVerified, match="is dead"), fault:
            pass


def test_all_threads_of_a_stopped_process_stand_still_until_it_is_continued() -> None:
    with victim(IDLE_THREADS) as process:
        fault = Stop(process.pid)
        must(lambda: len(fault.target.thread_states) == 4, "it has four threads")
        with fault:
            assert fault.target.thread_states == "TTTT"
        assert "T" not in fault.target.thread_states


def test_stopping_the_wrong_process_is_noticed_and_undone() -> None:
    with victim() as process, victim() as bystander:
        with pytest.raises(FaultNotVerified, match="stand still"), Stop(process.pid, aim=bystander.pid):
            pass
        assert Process.of(bystander.pid).state != "T"


def test_a_process_that_died_while_stopped_is_not_healed() -> None:
    with victim() as process, pytest.raises(FaultNotVerified, match="it is dead"), Stop(process.pid):
        Kill(process.pid).__enter__()


def test_a_straggler_gets_its_share_of_the_processor_and_all_of_it_afterwards() -> None:
    with victim(SPIN) as process:
        with CpuLimit(process.pid, share=0.1) as fault:
            stopped, used = fault.measure()
            assert stopped > 0.5
            assert used < 0.3
        assert fault.measure()[1] > used


def test_an_idle_straggler_is_known_by_being_stopped() -> None:
    with victim() as process, CpuLimit(process.pid, share=0.2):
        pass


def test_slowing_the_wrong_process_is_noticed() -> None:
    with victim(SPIN) as process, victim(SPIN) as bystander:
        fault = CpuLimit(process.pid, share=0.1, aim=bystander.pid)
        with pytest.raises(FaultNotVerified, match="of a processor"), fault:
            pass
        assert CpuLimit(bystander.pid, share=0.1).measure()[0] == 0, "the bystander runs again"


def test_a_process_that_takes_too_much_memory_is_killed_for_it() -> None:
    with victim(EATS_ON_REQUEST) as process:
        with offered(MemoryLimit, process.pid, num_bytes=50_000_000) as fault:
            assert process.stdin is not None
            process.stdin.write(b"\n")
            fault.verify_killed()
        assert process.wait(60) == -9


def test_a_memory_limit_that_is_lifted_no_longer_kills() -> None:
    with victim(EATS_ON_REQUEST) as process:
        with offered(MemoryLimit, process.pid, num_bytes=50_000_000):
            pass
        assert process.stdin is not None
        process.stdin.write(b"\n\n")
        assert process.wait(60) == 0


def test_limiting_the_wrong_process_is_noticed() -> None:
    with victim() as process, victim() as bystander:
        fault = offered(MemoryLimit, process.pid, num_bytes=50_000_000, aim=bystander.pid)
        with pytest.raises(FaultNotVerified, match="may take"), fault:
            pass
        fault.verify_healed()


@pytest.mark.parametrize("pid", [0, 1, -1, os.getpid(), 2**22 + 1], ids=["0", "1", "-1", "own", "none"])
def test_a_pid_that_no_test_started_is_refused(pid: int) -> None:
    with pytest.raises(ValueError, match="pid="):
        Kill(pid)


def test_a_process_that_took_over_a_pid_is_not_touched() -> None:
    with victim() as process:
        earlier = Process(pid=process.pid, started_ticks=1)
        assert earlier.is_dead
        earlier.send(signal.SIGSTOP)
        earlier.send(signal.SIGKILL)
        assert set(Process.of(process.pid).thread_states) <= set("SR")
