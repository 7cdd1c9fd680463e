"""Code on the disk is trusted only where nobody but this user and root can have written it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sbert_kernels.native import trust

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="nothing is checked on Windows")
as_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
SOMEBODY = 12345


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file in a folder of its own; both of them, and all above, are trusted."""
    folder = Path(os.path.realpath(tmp_path)) / "folder"
    folder.mkdir(mode=0o755)
    path = folder / "file"
    path.write_text("")
    path.chmod(0o644)
    return path


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o755])
def test_what_others_cannot_write_is_trusted(file: Path, mode: int) -> None:
    file.chmod(mode)
    assert trust.distrust(file) is None
    assert trust.distrust(file.parent) is None
    assert trust.distrust(file.parent / "missing" / "too") is None


@pytest.mark.parametrize("mode", [0o666, 0o602, 0o646])
def test_a_file_that_others_can_write_is_not(file: Path, mode: int) -> None:
    file.chmod(mode)
    assert f"{file} has mode {mode:04o}" in (trust.distrust(file) or "")


@pytest.mark.parametrize("mode", [0o777, 0o757, 0o703])
def test_nor_is_anything_below_a_folder_that_others_can_write(file: Path, mode: int) -> None:
    file.parent.chmod(mode)
    for path in (file, file.parent, file.parent / "missing" / "too"):
        reason = trust.distrust(path) or ""
        assert f"{file.parent} has mode {mode:04o}" in reason
        assert f"chmod go-w {file.parent}" in reason


def test_in_a_sticky_folder_the_owner_of_the_entry_counts(file: Path) -> None:
    file.parent.chmod(0o1777)
    assert trust.distrust(file) is None
    # To write into it is another matter: an entry that is not there yet can be anybody's.
    assert "has mode 1777" in (trust.distrust(file.parent) or "")


@as_root
def test_the_entry_of_somebody_in_a_sticky_folder_is_not_trusted(file: Path) -> None:
    file.parent.chmod(0o1777)
    os.chown(file, SOMEBODY, -1)
    assert f"{file} belongs to user {SOMEBODY}" in (trust.distrust(file) or "")


@as_root
def test_a_folder_of_somebody_is_not_trusted_whatever_its_mode(file: Path) -> None:
    for mode in (0o700, 0o1777):
        file.parent.chmod(mode)
        os.chown(file.parent, SOMEBODY, -1)
        assert f"{file.parent} belongs to user {SOMEBODY}" in (trust.distrust(file) or "")


@as_root
def test_root_s_files_are_trusted_by_every_user(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: SOMEBODY)
    assert trust.distrust(file) is None


def test_a_link_is_no_file(file: Path) -> None:
    link = file.with_name("link")
    link.symlink_to(file)
    assert f"{link} is neither a folder nor a file" in (trust.distrust(link) or "")
    through = file.parent.with_name("through")
    through.symlink_to(file.parent)
    assert f"{through} is not a folder" in (trust.distrust(through / file.name) or "")


@pytest.fixture
def accounts(file: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The users and groups: this user is alice, whose own group may write the folder and the file."""
    import grp
    import pwd

    user, group = os.geteuid(), file.stat().st_gid
    accounts = SimpleNamespace(
        alice=SimpleNamespace(pw_name="alice", pw_uid=user, pw_gid=group),
        bob=SimpleNamespace(pw_name="bob", pw_uid=user + 1, pw_gid=group + 1),
        group=SimpleNamespace(gr_name="alice", gr_mem=[]),
    )
    monkeypatch.setattr(pwd, "getpwuid", lambda _: accounts.alice)
    monkeypatch.setattr(pwd, "getpwall", lambda: [accounts.alice, accounts.bob])
    monkeypatch.setattr(grp, "getgrgid", lambda _: accounts.group)
    trust._is_private.cache_clear()
    file.parent.chmod(0o775)
    file.chmod(0o664)
    yield accounts
    trust._is_private.cache_clear()


def test_the_user_s_own_group_may_write(file: Path, accounts: SimpleNamespace) -> None:
    assert trust.distrust(file) is None


@pytest.mark.parametrize("whose", ["member", "primary", "name", "not mine", "unknown"])
def test_any_other_group_may_not(
    file: Path, accounts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    if whose == "member":
        accounts.group.gr_mem = ["bob"]
    elif whose == "primary":
        accounts.bob.pw_gid = accounts.alice.pw_gid
    elif whose == "name":
        accounts.group.gr_name = "users"
    elif whose == "not mine":
        accounts.alice.pw_gid += 1
    else:
        import grp

        monkeypatch.setattr(grp, "getgrgid", {}.__getitem__)
    assert f"{file} has mode 0664" in (trust.distrust(file) or "")


@pytest.mark.skipif(not hasattr(os, "listxattr"), reason="access lists are looked for on Linux")
def test_an_access_list_may_name_others(file: Path, accounts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "listxattr", lambda *_, **__: ["system.posix_acl_access"])
    assert f"{file} has mode 0664" in (trust.distrust(file) or "")


@pytest.mark.parametrize("umask", [0, 0o022, 0o777])
def test_folders_are_made_for_this_user_alone(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        trust.make_folder(tmp_path / "a" / "b")
        trust.make_folder(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o7777 for name in ("a", "a/b")] == [0o700, 0o700]
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        trust.make_folder(tmp_path / "file")
