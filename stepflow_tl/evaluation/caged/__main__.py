"""`python -I caged ROLE JOB_BYTES REPORT_FD CHANNEL_FD`, the job on standard input: one caged process.

Started as a folder, so that it loads nothing but the standard library and the two files beside it.
"""

import json
import os
import socket
import sys

import cage  # pyright: ignore[reportMissingImports]
import roles  # pyright: ignore[reportMissingImports]


def main() -> int:
    """Read the job, build the cage, play the role in it."""
    role, size, report, channel = sys.argv[1], *map(int, sys.argv[2:])
    data = b""
    while len(data) < size and (piece := os.read(0, size - len(data))):
        data += piece
    job = json.loads(data)
    outside = os.open(os.devnull, os.O_RDWR)

    def play() -> None:
        for standard in (0, 1, 2):
            os.dup2(outside, standard)
        cage.say(report, {"caged": True})
        os.close(outside)
        if role != "judge":
            os.close(report)  # what can be written there is a verdict
        line = socket.socket(fileno=channel)
        if role == "judge":
            cage.say(report, roles.judge(job, line))
        else:
            roles.candidate(job, line)

    with cage.last_words(report):
        return cage.guard(job, report, channel, play)


if __name__ == "__main__":
    sys.exit(main())
