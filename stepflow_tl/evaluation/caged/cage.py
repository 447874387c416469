"""Putting one process behind bars: no network, no other process, nothing to write to but one folder.

A cage is three processes, each the parent of the next:

1. The guard enters new namespaces: network (no interface is up), processes, mounts, IPC, host name. Root has
   the right to; anybody else gets it from a user namespace of their own. It then waits for its child to end
   or for its standard input to close, which says that the sandbox is done with it or has died, and kills the
   child.
2. The keeper is process 1 of the new process namespace: when it ends, by whatever, the kernel kills
   everything in there, however it forked or detached. It builds the file system: an empty read-only root
   with the interpreter and the system's libraries bound into it, read-only, and one folder in memory to
   write to. There is no way back to the old root. Process 1 cannot be killed from inside its namespace.
3. The inmate gives up root (user `nobody`) and all capabilities, takes the limits, and plays its role.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

NOBODY = 65534
WORK = "/box"  # the folder the code may write to, as it sees it

_NEW_USER, _NEW_REST = 0x10000000, 0x00020000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
_MOUNT_SETATTR, _AT_RECURSIVE, _AT_FDCWD, _DETACH = 442, 0x8000, -100, 2
_SET_DEATH_SIGNAL, _DROP_BOUNDING, _NO_NEW_PRIVILEGES = 1, 24, 38

_libc = ctypes.CDLL(None, use_errno=True)


def _call(what: str, result: int) -> None:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    parts = [text.encode() if text else None for text in (source, target, kind)]
    _call(f"mount {kind or 'bind'} on {target}", _libc.mount(*parts, flags, options.encode() or None))


def guard(job: dict[str, Any], report: int, channel: int, play: Callable[[], None]) -> int:
    """Put `play` behind bars and wait; returns the exit code, 128 + signal if one ended it."""
    user, group = os.geteuid(), os.getegid()
    _call("new namespaces", _libc.unshare(_NEW_REST | (_NEW_USER if user else 0)))
    if user:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{user} {user} 1"),
            ("gid_map", f"{group} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    bound, is_bound = os.pipe()
    keeper = os.fork()
    if keeper == 0:
        with last_words(report):
            os.close(bound)
            _call("death signal", _libc.prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0))
            os.write(is_bound, b"!")  # if the guard is gone already, this ends the keeper
            os.close(is_bound)
            _keep(job, report, channel, play)
    for descriptor in (is_bound, report, channel):
        os.close(descriptor)
    os.read(bound, 1)
    ended = os.pidfd_open(keeper)
    select.select([0, ended], [], [])
    os.kill(keeper, signal.SIGKILL)
    return _exit_code(os.waitpid(keeper, 0)[1])  # process 1 is reaped after all the others are gone


def _keep(job: dict[str, Any], report: int, channel: int, play: Callable[[], None]) -> None:
    user = os.geteuid() or NOBODY
    _build_root(job, user)
    inmate = os.fork()
    if inmate == 0:
        with last_words(report):
            _give_up_rights(user)
            _take_limits(job["limits"])
            play()
        os._exit(0)
    os.close(report)
    os.close(channel)
    while True:
        ended, status = os.wait()
        if ended == inmate:
            os._exit(_exit_code(status))


def _build_root(job: dict[str, Any], user: int) -> None:
    root, limits = job["root"], job["limits"]
    for name in ("shmall", "msgmni"):  # shared memory outlives its process and counts against none
        try:
            with open(f"/proc/sys/kernel/{name}", "w") as file:
                file.write("0")
        except OSError:
            pass
    os.umask(0o022)
    _mount("", "/", flags=_REC | _PRIVATE)
    _mount("tmpfs", root, "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    for path in job["visible"]:
        target = root + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(path) and os.path.realpath(path).startswith("/usr/"):
            os.symlink(os.readlink(path), target)
            continue
        os.mkdir(target) if os.path.isdir(path) else os.close(os.open(target, os.O_CREAT))
        _mount(path, target, flags=_BIND | _REC)
        attributes = struct.pack(
            "QQQQ", _RDONLY | _NOSUID | (0 if path.startswith("/dev/") else _NODEV), 0, 0, 0
        )
        _call(
            f"read-only {path}",
            _libc.syscall(
                _MOUNT_SETATTR, _AT_FDCWD, target.encode(), _AT_RECURSIVE, attributes, len(attributes)
            ),
        )
    os.makedirs(root + "/proc", exist_ok=True)
    try:
        _mount("proc", root + "/proc", "proc", _RDONLY | _NOSUID | _NODEV | _NOEXEC)
    except OSError:
        pass  # a container that hides parts of /proc does not let it be mounted anew: then there is none
    os.mkdir(root + WORK)
    _mount(
        "tmpfs",
        root + WORK,
        "tmpfs",
        _NOSUID | _NODEV,
        f"size={limits['disk']},nr_inodes=1024,mode=700,uid={user}",
    )
    os.chdir(root)
    _call("pivot_root", _libc.pivot_root(b".", b"."))
    _call("leaving the old root", _libc.umount2(b".", _DETACH))
    _mount("", "/", flags=_REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)
    os.chdir(WORK)


def _give_up_rights(user: int) -> None:
    os.setsid()
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        _libc.unshare(_NEW_USER)  # so that the limit on processes does not count nobody's others
    for capability in range(64):
        _libc.prctl(_DROP_BOUNDING, capability, 0, 0, 0)
    header, none = struct.pack("II", 0x20080522, 0), struct.pack("6I", *[0] * 6)
    _call("giving up capabilities", _libc.capset(header, none))
    _call("no new privileges", _libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0))


def _take_limits(limits: dict[str, int]) -> None:
    cpu = limits["cpu_seconds"]
    for kind, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_FSIZE, limits["disk"]),
        (resource.RLIMIT_NPROC, limits["processes"] + 2),  # guard and keeper may count
        (resource.RLIMIT_AS, limits["memory"]),
    ):
        resource.setrlimit(kind, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))


@contextmanager
def last_words(report: int) -> Iterator[None]:
    """Say what failed while the cage was built, and end the process: nothing may run outside a whole cage."""
    try:
        yield
    except BaseException as error:
        say(report, {"failed": str(error)[:400]})
        os._exit(70)


def _exit_code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def say(report: int, line: dict[str, Any]) -> None:
    """Write one line to the sandbox."""
    os.write(report, json.dumps(line).encode() + b"\n")
