"""Runs a command as in an ordinary Docker container: `python sandbox.py COMMAND ARGUMENT...`.

Docker's own default: its fourteen capabilities, a seccomp filter that refuses what makes or enters namespaces and
mounts, and as root a /dev without kmsg. Files and network stay the machine's. x86-64 only, as the filter's numbers are.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import subprocess
import sys
from pathlib import Path

CAPABILITIES = [
    "chown",
    "dac_override",
    "fowner",
    "fsetid",
    "kill",
    "setgid",
    "setuid",
    "setpcap",
    "net_bind_service",
    "net_raw",
    "sys_chroot",
    "mknod",
    "audit_write",
    "setfcap",
]

REFUSED = {
    "pivot_root": 155, "mount": 165, "umount2": 166, "add_key": 248, "request_key": 249, "keyctl": 250, "unshare": 272,
    "perf_event_open": 298, "setns": 308, "bpf": 321, "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431,
    "fsmount": 432, "pidfd_getfd": 438, "mount_setattr": 442,
}  # fmt: skip
CLONE, CLONE3 = 56, 435
NEW_NAMESPACES = 0x7E020000
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET."""

DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
FOLDERS = ("pts", "shm")
LINKS = {"ptmx": "pts/ptmx", "fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"}

LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, FILTER_MODE, CLONE_NEWNS = 22, 38, 2, 0x00020000


class Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def call(name: str, *arguments: object) -> None:
    if getattr(LIBC, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def refuse() -> None:
    """Installs the filter: EPERM, and ENOSYS for clone3, whose flags a filter cannot see."""
    load, equal, any_of, give = 0x20, 0x15, 0x45, 0x06
    allow, deny = 0x7FFF0000, 0x00050000
    code = [
        # offset 0 is the number, 16 the first argument's low half
        (load, 0, 0, 0),
        (equal, 0, 1, CLONE3),
        (give, 0, 0, deny | errno.ENOSYS),
        (equal, 0, 3, CLONE),
        (load, 0, 0, 16),
        (any_of, len(REFUSED) + 2, 0, NEW_NAMESPACES),
        (give, 0, 0, allow),
        *((equal, len(REFUSED) - index, 0, number) for index, number in enumerate(REFUSED.values())),
        (give, 0, 0, allow),
        (give, 0, 0, deny | errno.EPERM),
    ]
    packed = b"".join(struct.pack("HBBI", *one) for one in code)
    call("prctl", PR_SET_SECCOMP, FILTER_MODE, ctypes.byref(Program(len(code), packed)), 0, 0)


def small_dev() -> None:
    """A /dev of our own with what Docker puts there."""
    call("unshare", CLONE_NEWNS)

    def mount(*arguments: str) -> None:
        subprocess.run(["mount", *arguments], check=True, timeout=60)

    mount("--make-rprivate", "/")
    mount("--rbind", "/dev", "/mnt")
    mount("-t", "tmpfs", "-o", "mode=755", "none", "/dev")
    for name in (*DEVICES, *FOLDERS):
        place = Path("/dev") / name
        if name in FOLDERS:
            place.mkdir()
        else:
            place.touch()
        mount("--rbind" if name in FOLDERS else "--bind", f"/mnt/{name}", str(place))
    for name, target in LINKS.items():
        (Path("/dev") / name).symlink_to(target)
    subprocess.run(["umount", "-l", "/mnt"], check=True, timeout=60)


def main(command: list[str]) -> None:
    if os.geteuid() == 0:
        small_dev()
        refuse()
        kept = ",".join(f"+{name}" for name in CAPABILITIES)
        command = ["setpriv", f"--bounding-set=-all,{kept}", "--inh-caps=-all", "--", *command]
    else:
        call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        refuse()
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
