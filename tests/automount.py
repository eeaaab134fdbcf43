"""What systemd does for ``x-systemd.automount``, as the kernel sees it: a directory mounted when somebody looks.

``python -m tests.automount CLIP DIRECTORY``, in a mount namespace of its own: prints what is seen in DIRECTORY by a
process that waits for `mount.clipfs` to mount CLIP there. See autofs(5) in the kernel's documentation: whoever is not
in the process group of who mounts waits.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import subprocess
import sys

# linux/auto_fs.h: struct autofs_v5_packet, whose third number names who waits; and the answers to it.
_PACKET = 304
_READY, _FAIL = 0x9360, 0x9361

_SECONDS = 20


def main() -> int:
    """Exit code of the helper."""
    clip, directory = sys.argv[1:]
    asked, asking = os.pipe()
    options = f"fd={asking},pgrp={os.getpgrp()},minproto=5,maxproto=5,direct"
    subprocess.run(["mount", "-i", "-t", "autofs", "-o", options, "none", directory], check=True, pass_fds=[asking])
    os.close(asking)
    place = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    looking = subprocess.Popen(["ls", f"{directory}/."], process_group=0)
    answer = _FAIL
    try:
        assert select.select([asked], [], [], _SECONDS)[0], "nobody looks"
        token = struct.unpack_from("<iiI", os.read(asked, _PACKET))[2]
        code = subprocess.run(
            [sys.executable, "-m", "clipfs.cli.helper", clip, directory], timeout=_SECONDS, check=False
        ).returncode
        answer = _READY if code == 0 else _FAIL
    finally:
        fcntl.ioctl(place, answer, token)
        os.close(place)
        looking.wait(_SECONDS)
    return code


if __name__ == "__main__":
    sys.exit(main())
