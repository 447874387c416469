"""Runs that end early: killed at a chosen system call, by Ctrl-C, or losing a replica."""

import itertools
import os
import signal

CALLS = ("open", "write", "fsync", "replace", "chmod", "close", "ftruncate", "unlink")


def in_a_child(run, prepare, is_complete=lambda report: report.is_complete):
    """Run in a forked process after `prepare()`; its exit code, negative if it was killed."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            prepare()
            code = 0 if is_complete(run()) else 3
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at(number):
    """From here on, the process dies at that call of `CALLS`: before it, after it, or half-way in a write.

    Returns the counter of those calls; at number 0 they are only counted.
    """
    count = [0]

    def armed(call, is_write):
        def dying(*arguments, **options):
            count[0] += 1
            if count[0] != number:
                return call(*arguments, **options)
            if is_write:
                call(arguments[0], arguments[1][: len(arguments[1]) // 2])
            elif number % 2:
                call(*arguments, **options)
            os.kill(os.getpid(), signal.SIGKILL)

        return dying

    for name in CALLS:
        setattr(os, name, armed(getattr(os, name), name == "write"))
    return count


def interrupted_at(number, compute):
    """`compute`, but Ctrl-C comes in the call of that number."""
    calls = itertools.count(1)

    def interrupted(*arguments, **options):
        if next(calls) == number:
            raise KeyboardInterrupt
        return compute(*arguments, **options)

    return interrupted


def losing_a_replica(engine, killed):
    """An engine of replicas of which one is killed once two tasks are done; its id goes to `killed`."""

    class Losing(engine):
        def results(self, tasks):
            for n_done, found in enumerate(super().results(tasks)):
                if n_done == 2 and not killed:
                    killed.append(self.process_ids()[0])
                    os.kill(killed[0], signal.SIGKILL)
                yield found

    return Losing
