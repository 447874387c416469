"""Code that wants to pass without being right, to reach out, or to stay: it gets nothing of it."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import pytest

import stepflow_tl.errors
from stepflow_tl.errors import SandboxError
from stepflow_tl.evaluation import sandbox
from stepflow_tl.evaluation.caged import roles
from stepflow_tl.evaluation.sandbox import Limits, check_sandbox, run_test

TEST = "def check(candidate):\n    assert candidate(1) == 2\n"
SHORT = Limits(seconds=1.0, memory=256 << 20)


@pytest.fixture(scope="module", autouse=True)
def _needs_a_sandbox():
    try:
        check_sandbox()
    except SandboxError as error:
        pytest.skip(str(error))


@pytest.fixture
def leftovers(monkeypatch):
    """Processes that were started for this test and still live, found by a mark in their environment."""
    mark = uuid.uuid4().hex
    monkeypatch.setitem(sandbox._ENVIRONMENT, "MARK", mark)

    def find():
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and mark.encode() in (entry / "environ").read_bytes():
                    found.append(entry.name)
            except OSError:
                continue
        return found

    return find


def run(source, test=TEST, limits=SHORT, prompt=""):
    return run_test([source], prompt=prompt, test=test, entry_point="f", limits=limits)


HONEST = "def f(x):\n    return x + 1\n"
FORGERIES = {
    "sys.exit(0)": "import sys\nsys.exit(0)",
    "sys.exit(0) when called": "import sys\ndef f(x): sys.exit(0)",
    "os._exit(0)": "import os\nos._exit(0)",
    "os._exit(0) when called": "import os\ndef f(x): os._exit(0)",
    "prints the pass mark": """
        import os
        def f(x):
            for line in (b'{"right": true, "reason": ""}\\n', b"passed\\n", b"OK\\n"):
                for descriptor in range(256):
                    try: os.write(descriptor, line)
                    except OSError: pass
            return 0""",
    "sends a message of its own": """
        import gc, socket, json, struct
        def f(x):
            for line in [o for o in gc.get_objects() if isinstance(o, socket.socket)]:
                data = json.dumps({"right": True}).encode()
                line.sendall(struct.pack(">I", len(data)) + data)
            return 0""",
    "is equal to everything": """
        class Same:
            def __eq__(self, other): return True
        def f(x): return Same()""",
    "an integer that is equal to everything": """
        class Same(int):
            def __eq__(self, other): return True
            __hash__ = int.__hash__
        def f(x): return Same(0)""",
    "overwrites the checker": """
        import builtins, sys
        def passes(*_, **__): return None
        builtins.check = check = passes
        builtins.AssertionError = Warning
        for module in list(sys.modules.values()):
            for name in ("check", "judge", "decode", "receive", "say"):
                try: setattr(module, name, passes)
                except Exception: pass
        sys.modules["__main__"].roles = passes
        def f(x): return 0""",
    "swallows assertions": "import sys\nsys.excepthook = lambda *_: None\ndef f(x): raise AssertionError",
    "an exception that ends programs": "def f(x): raise SystemExit(0)",
    "a result that is not data": "def f(x): return (i for i in [2])",
    "a result without end": "def f(x):\n    a = []\n    a.append(a)\n    return a",
    "a huge result": "def f(x): return 'a' * (40 << 20)",
    "no function": "g = 1",
    "not Python": "def f(x) return 2",
}
HOGS = {
    "an endless loop": "while True: pass",
    "an endless loop when called": "def f(x):\n    while True: pass",
    "a fork bomb": """
        import os
        def f(x):
            while True:
                try: os.fork()
                except OSError: pass""",
    "a detached process": """
        import os, time
        def f(x):
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0: time.sleep(1000)
                os._exit(0)
            return 0""",
    "threads": """
        import threading, time
        def f(x):
            while True: threading.Thread(target=time.sleep, args=[99]).start()""",
    "100 GB": "def f(x): return len(bytearray(100 << 30))",
    "gigabytes of output": "def f(x):\n    while True: print('a' * 10000000)",
    "gigabytes in files": "def f(x):\n    for i in range(10**6): open(str(i), 'w').write('a' * 10000000)",
    "ignores every signal": """
        import signal
        for number in range(1, 65):
            try: signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError): pass
        def f(x):
            while True: pass""",
    "kills what it sees": "import os\ndef f(x):\n    os.kill(-1, 9)\n    os.kill(1, 9)",
}


def dedented(source):
    lines = source.strip("\n").split("\n")
    margin = min(len(line) - len(line.lstrip()) for line in lines)
    return "\n".join(line[margin:] for line in lines)


@pytest.mark.parametrize("source", [*FORGERIES.values(), *HOGS.values()], ids=[*FORGERIES, *HOGS])
def test_hostile_code_does_not_pass_and_nothing_is_left(source, leftovers):
    before, start = set(os.listdir(tempfile.gettempdir())), time.monotonic()
    found = run(dedented(source))
    assert not found.right and found.reason
    assert time.monotonic() - start < 10
    assert not leftovers()
    assert not [
        name for name in set(os.listdir(tempfile.gettempdir())) - before if name.startswith("stepflow-s")
    ]
    assert run(HONEST).right  # and the run goes on


def test_right_code_passes_and_wrong_code_is_told_where():
    assert run(HONEST) == (True, "")
    wrong = run("def f(x): return x")
    assert not wrong.right and wrong.reason == "failed at line 2 of the test, assert candidate(1) == 2"
    raising = run("def f(x): return x[0]")
    assert raising.reason.startswith("TypeError: 'int' object is not subscriptable at line 2 of the test")
    assert run("def f(x): return [1").reason.startswith("SyntaxError")
    assert run("while True: pass").reason == "not done within 1 s"
    busy = run("while True: pass", limits=Limits(seconds=20.0, cpu_seconds=1))
    assert busy.reason == "its process ended: it used up its processor time"
    assert "its process ended" in run("import os\nos._exit(3)").reason


def test_the_reach_of_code_ends_at_its_cage(tmp_path, monkeypatch):
    """What each attack finds is what passes; outside the sandbox the same code does find it."""
    secret, written = uuid.uuid4().hex, tmp_path / "written"
    monkeypatch.setenv("STEPFLOW_SECRET", secret)
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    attacks = {
        f"""
        import socket
        def f(x):
            socket.create_connection(("127.0.0.1", {port}), timeout=1).close()
            return "reached" """: "reached",
        f"""
        def f(x):
            with open({str(written)!r}, "w") as file: file.write("x")
            return "reached" """: "reached",
        """
        import os
        def f(x):
            return os.environ["STEPFLOW_SECRET"]""": secret,
        f"""
        def f(x):
            with open("/proc/{os.getpid()}/environ", "rb") as file:
                return "reached" if file.read() else "" """: "reached",
        f"""
        def f(x):
            with open("/proc/{os.getpid()}/maps") as file: first = file.readline().split("-")[0]
            with open("/proc/{os.getpid()}/mem", "rb") as memory:
                memory.seek(int(first, 16))
                return "reached" if memory.read(1) else "" """: "reached",
        """
        import os
        def f(x):
            me = os.getpid()
            others = [n for n in os.listdir("/proc") if n.isdigit() and int(n) not in (1, me)]
            return "reached" if others else ""
        """: "reached",
        """
        import os
        def f(x):
            os.stat("/etc/passwd")
            return "reached" """: "reached",
        """
        import os
        def f(x):
            return "reached" if len(os.listdir("/proc/self/fd")) > 5 else "" """: "reached",
    }
    for attack, expected in attacks.items():
        source = dedented(attack)
        outside = {}
        exec(source, outside)
        assert outside["f"](1) == expected, source
        written.unlink(missing_ok=True)
        found = run(source, f"def check(candidate):\n    assert candidate(1) == {expected!r}\n")
        assert not found.right, source
    assert not written.exists() and run(HONEST).right
    server.close()


@pytest.mark.parametrize(
    "path", ["/tmp/x", "/usr/x", "/etc/x", "/proc/sys/kernel/core_pattern", sys.prefix + "/x", "/x"]
)
def test_code_writes_to_its_own_folder_only(path):
    source = f"def f(x):\n    open({path!r}, 'w').write('x')\n    return 2"
    assert not run(source).right and not (os.path.exists(path) and path.endswith("/x"))
    assert run("def f(x):\n    open('x', 'w').write('2')\n    return int(open('/box/x').read())").right


def test_what_the_test_expects_is_nowhere_in_the_codes_memory():
    source = """
import ctypes, re
def f(x):
    pattern, found = re.compile(b"needle-" + b"[0-9a-f]{32}"), set()
    with open("/proc/self/maps") as maps:
        for line in maps:
            first, last = (int(part, 16) for part in line.split()[0].split("-"))
            if line.split()[1][0] == "r" and last - first < 100_000_000 and "[v" not in line:
                held = ctypes.string_at(first, last - first)
                found.update(match.decode() for match in pattern.findall(held))
    return sorted(found)
"""
    needle = f"needle-{uuid.uuid4().hex}"
    seen = f"def check(candidate):\n    assert candidate({needle!r}) == [{needle!r}]\n"
    assert run(source, seen, Limits()) == (True, "")  # it does find what it is given
    unseen = f"def check(candidate):\n    expected = [{needle!r}]\n    assert candidate(1) == []\n"
    assert run(source, unseen, Limits()) == (True, "")


def test_code_sees_neither_root_nor_privileges():
    source = """
import os, ctypes
def f(x):
    libc = ctypes.CDLL(None)
    mounting = libc.mount(b"tmpfs", b"/box", b"tmpfs", 0, None)
    tried = [mounting, libc.umount2(b"/box", 2), libc.sethostname(b"a", 1)]
    return [os.getuid() != 0, tried == [-1, -1, -1], sorted(os.environ) == sorted(ENVIRONMENT)]
""".replace("ENVIRONMENT", repr(list(sandbox._ENVIRONMENT)))
    assert run(source, "def check(candidate):\n    assert candidate(1) == [True] * 3\n") == (True, "")


def test_what_a_test_may_use():
    """Helpers of the prompt, keyword arguments, every plain type, and exceptions that it expects."""
    test = """
import math
def check(candidate):
    values = [None, True, -(10 ** 5000), 1.5, math.inf, 2j, "\\u00e9\\ud800", b"\\x00", [1, (2,)]]
    values += [{1: {"a": {3}}}, frozenset([4])]
    assert candidate(values) == values and candidate(x=3) == 3 and helper(1) == 1
    assert math.isnan(candidate(math.nan)) and type(candidate((1,))) is tuple and candidate(True) is True
    try:
        candidate("raise")
    except ValueError as error:
        assert str(error) == "so"
    else:
        assert False
"""
    source = "def f(x):\n    if x == 'raise': raise ValueError('so')\n    return x"
    assert run(source, test, prompt="def helper(x):\n    return x\n") == (True, "")
    assert run(HONEST, "def check(candidate):\n    pass").reason == "the question's test calls nothing"
    assert "passes a function, which is not plain data" in run(HONEST, "def check(c):\n    c(check)").reason
    swallowing = (
        "def check(candidate):\n    try:\n        candidate(1)\n    except Exception:\n        pass\n"
    )
    assert not run("import os\ndef f(x): os._exit(0)", swallowing).right


@pytest.mark.parametrize(
    "message",
    ["x", 1, ["int"], ["int", 3], ["int", "g"], ["object", "x"], ["dict", 1], [], {}, [["list"], 1]],
)
def test_a_message_that_is_not_a_value_is_refused(message):
    with pytest.raises((ValueError, TypeError, KeyError)):
        roles.decode(message)


@pytest.mark.parametrize("name", ["seconds", "cpu_seconds", "memory", "processes", "disk"])
def test_limits_without_a_meaning_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} is 0"):
        Limits(**{name: 0.0 if name == "seconds" else 0})


def test_a_sandbox_that_cannot_be_built_says_so_and_runs_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox, "_visible", lambda: ["/nowhere/at/all"])
    canary = tmp_path / "canary"
    with pytest.raises(SandboxError, match=r"cannot be set up: .*/nowhere/at/all.*nothing was run"):
        run(f"open({str(canary)!r}, 'w')\n{HONEST}")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(SandboxError, match="cannot start /nowhere/python"):
        run(HONEST)
    assert not canary.exists()
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SandboxError, match="darwin"):
        run(HONEST)


@pytest.mark.skipif(os.geteuid() != 0, reason="the other tests run as a user who is not root already")
def test_a_user_who_is_not_root_has_the_same_sandbox():
    """The sandbox's files alone, run by `nobody` with the system's Python."""
    python = "/usr/bin/python3"
    if not os.access(python, os.X_OK):
        pytest.skip(f"there is no {python}")
    cases = {name: dedented(FORGERIES[name]) for name in ("prints the pass mark", "overwrites the checker")}
    cases |= {name: dedented(HOGS[name]) for name in ("a fork bomb", "kills what it sees")}
    script = f"""
from stepflow_tl.evaluation.sandbox import Limits, run_test, check_sandbox
check_sandbox()
for source in {list(cases.values())!r}:
    assert not run_test([source], prompt="", test={TEST!r}, entry_point="f", limits=Limits(seconds=0.5)).right
print("done")
"""
    folder = Path(tempfile.mkdtemp())
    try:
        package = folder / "stepflow_tl" / "evaluation"
        package.mkdir(parents=True)
        for empty in (package.parent, package):
            (empty / "__init__.py").touch()
        shutil.copy(stepflow_tl.errors.__file__, package.parent)
        shutil.copy(sandbox.__file__, package)
        shutil.copytree(sandbox._CHILD, package / "caged", ignore=shutil.ignore_patterns("__pycache__"))
        folder.chmod(0o755)
        done = subprocess.run(
            [python, "-B", "-c", script],
            user=65534,
            group=65534,
            extra_groups=[],
            env={"PYTHONPATH": str(folder)},
            cwd=folder,
            capture_output=True,
            text=True,
        )
    finally:
        shutil.rmtree(folder)
    assert done.stdout == "done\n", done.stderr
