"""Decides whether compiled code on the disk may be run: only if nobody but this user and root can have put it there.

Loading a library runs whatever is in it. The name of a file proves nothing if others can write to its folder, and its
mode proves nothing if they can replace the folder. So a path is trusted if, from the file up to the root folder,

* everything belongs to this user or to root,
* and nobody else can write to any of it. A folder above the file with the sticky bit, such as /tmp, is allowed: in it
  only the owner of an entry can rename or replace that entry, and the owner of each entry is checked.

A group may write if it is the user's private group, which many systems make for every account (mode 0775 is usual
there): it has the user's name, is the user's primary group, and has no other member. An access control list shows as
the mode of the group, so with such a list no group is taken for private.

On Windows nothing is checked, because neither owner nor mode say there who can write. The default cache lies in the
user's profile, which Windows itself protects. Any other folder is trusted as it is.
"""

from __future__ import annotations

import os
import stat
import sys
from functools import cache
from pathlib import Path


def distrust(path: Path) -> str | None:
    """Returns why nothing at ``path`` may be run or written, as one clause, or None if it is trusted.

    Parts of the path that do not exist yet are skipped. The answer stays true, since nobody else can change what was
    checked; but a folder that is made later has to be checked again.

    Args:
        path: Absolute and without links (:func:`os.path.realpath`), so that what is checked is what will be opened.
    """
    if sys.platform == "win32":
        return None
    for entry in (path, *path.parents):
        try:
            status = os.lstat(entry)
        except (FileNotFoundError, NotADirectoryError):  # the check of a parent reports the latter
            continue
        reason = _distrust_entry(entry, status, is_parent=entry is not path)
        if reason is not None:
            return reason
    return None


def make_folder(path: Path) -> None:
    """Makes a folder and its missing parents, each for this user alone (mode 0700), whatever the umask is."""
    for folder in reversed((path, *path.parents)):
        try:
            folder.mkdir(mode=0o700)
            folder.chmod(0o700)  # the umask may have removed some of it
        except OSError:  # it exists; some file systems report that as "read-only"
            if not folder.is_dir():
                raise


def _distrust_entry(entry: Path, status: os.stat_result, is_parent: bool) -> str | None:
    """Returns why one file or folder of a path is not trusted, or None."""
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
    """Returns True if the group of an entry is the private group of this user or of root."""
    return not _has_access_list(entry) and any(_is_private(group, user) for user in {os.geteuid(), 0})


def _has_access_list(entry: Path) -> bool:
    """Returns True if an entry has an access control list; False if the system cannot tell."""
    if not hasattr(os, "listxattr"):  # only Linux has it
        return False
    try:
        return "system.posix_acl_access" in os.listxattr(entry, follow_symlinks=False)
    except OSError:
        return False


@cache
def _is_private(group: int, user: int) -> bool:
    """Returns True if a group has no member but this user, whose primary group it is."""
    import grp
    import pwd

    try:
        account, entry = pwd.getpwuid(user), grp.getgrgid(group)
        accounts = pwd.getpwall()
    except (KeyError, OSError):  # the user or the group has no name, as in some containers
        return False
    return (
        account.pw_gid == group
        and account.pw_name == entry.gr_name
        and set(entry.gr_mem) <= {account.pw_name}
        and not any(other.pw_gid == group and other.pw_uid != user for other in accounts)
    )
