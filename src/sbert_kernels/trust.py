"""Whether compiled code that lies on the disk may be run: only if nobody but this user and root can have put it there.

To load a library is to run whatever is in it. A name proves nothing where others can write, and neither does a file's
own mode where they can replace the folder around it. So a path is trusted if, from the file up to the root,

* everything belongs to this user or to root,
* and nothing can be written by anybody else. A folder with the sticky bit (/tmp) may be: there only the owner of an
  entry can rename or replace it, and the owner of each entry is looked at.

A group may write if it is the user's own, which many systems make beside every account (mode 0775 is usual there): it
is named like the user, is his primary group, and has no other member. Access control lists show as the group's mode,
and a group is then not looked at any closer.

On Windows nothing is checked: neither owner nor mode say there who can write. The default cache lies in the user's
profile, which Windows itself protects; another folder is taken as it is.
"""

from __future__ import annotations

import os
import stat
import sys
from functools import cache
from pathlib import Path


def distrust(path: Path) -> str | None:
    """One clause that says why nothing at ``path`` may be run or written to, or ``None`` if it is trusted.

    What does not exist yet is passed over, up to the folder that does. The answer stays true afterwards, because nobody
    else can change what it rests on; a folder that was made since has to be asked about again.

    Args:
        path: Absolute and without links (:func:`os.path.realpath`), so that what is looked at is what will be opened.
    """
    if sys.platform == "win32":
        return None
    for entry in (path, *path.parents):
        try:
            status = os.lstat(entry)
        except (FileNotFoundError, NotADirectoryError):  # of the latter, a parent says more
            continue
        reason = _distrust_entry(entry, status, is_parent=entry is not path)
        if reason is not None:
            return reason
    return None


def make_folder(path: Path) -> None:
    """Make a folder and its missing parents, each for this user alone (mode 0700), whatever the umask."""
    for folder in reversed((path, *path.parents)):
        try:
            folder.mkdir(mode=0o700)
            folder.chmod(0o700)  # the umask may have taken more
        except OSError:  # it exists, which some file systems report as that they cannot be written
            if not folder.is_dir():
                raise


def _distrust_entry(entry: Path, status: os.stat_result, is_parent: bool) -> str | None:
    mode = stat.S_IMODE(status.st_mode)
    is_folder = stat.S_ISDIR(status.st_mode)
    if not is_folder and (is_parent or not stat.S_ISREG(status.st_mode)):
        return f"{entry} is neither a folder nor a file" if not is_parent else f"{entry} is not a folder"
    user = os.geteuid()
    if status.st_uid not in (user, 0):
        return f"{entry} belongs to user {status.st_uid}; wanted is one of this user's ({user}) or of root's"
    others = mode & stat.S_IWOTH or (mode & stat.S_IWGRP and not _is_own_group(entry, status.st_gid))
    if others and not (is_folder and is_parent and mode & stat.S_ISVTX):
        return (
            f"{entry} has mode {mode:04o}, so that others can write it; wanted is one that only this user and root can "
            f"write (chmod go-w {entry})"
        )
    return None


def _is_own_group(entry: Path, group: int) -> bool:
    """Whether a group that may write an entry is the private one of this user or of root."""
    return not _has_access_list(entry) and any(_is_private(group, user) for user in {os.geteuid(), 0})


def _has_access_list(entry: Path) -> bool:
    if not hasattr(os, "listxattr"):  # Linux has it; elsewhere the mode has to do
        return False
    try:
        return "system.posix_acl_access" in os.listxattr(entry, follow_symlinks=False)
    except OSError:
        return False


@cache
def _is_private(group: int, user: int) -> bool:
    import grp
    import pwd

    try:
        account, entry = pwd.getpwuid(user), grp.getgrgid(group)
        accounts = pwd.getpwall()
    except (KeyError, OSError):  # a user or group without a name: in a container, say
        return False
    return (
        account.pw_gid == group
        and account.pw_name == entry.gr_name
        and set(entry.gr_mem) <= {account.pw_name}
        and not any(other.pw_gid == group and other.pw_uid != user for other in accounts)
    )
