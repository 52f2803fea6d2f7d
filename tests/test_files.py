"""Names that stay in their folder, forms read exactly whatever their chunks, ZIPs that hold what stood in a folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast
from urllib.parse import quote, unquote_to_bytes

import pytest
from harness import BOUNDARY, NOBODY_UID, ROOT, disk_bytes, field_part, file_part, form, part, replace
from hypothesis import assume, example, given
from hypothesis import strategies as st
from world import BOUNDED, CONTENTS, NAMES, Trickle, fit, new_folder, on_disk, packed, tried

import joborch
from joborch import ConfigError, DataFolder, FormReader, HttpError, StoredFile, Tree, ZipPacker, check_path
from joborch_base.archives import worthwhile_compression
from joborch_base.data_folder import MEMORY_SPOOL_BYTES, Spool
from joborch_base.files import FIELD_LIMIT_BYTES, SYNC_STEP_BYTES, give_rights, libc, multipart_boundary, opened_folder, write_all

TYPE = f"multipart/form-data; boundary={BOUNDARY}"


# == Names ==

PIECES = st.sampled_from(
    ["a", "b", "..", ".", "", " ", "\0", "\n", "\x7f", "\\", "C:\\x", "é", "👾", "\udcff", "%2e%2e", "x" * 254, "é" * 128]
)
PATHS = st.lists(PIECES | st.text(st.characters(exclude_categories=["Cs"]), max_size=6), min_size=1, max_size=20).map("/".join)


@BOUNDED
@given(PATHS | st.text(max_size=20))
@example("a" * 255)
@example("a" * 256)
@example("é" * 128)
@example("/".join(["d"] * 16 + ["f"]))
@example("/".join(["d"] * 17 + ["f"]))
@example("/".join(["a" * 255] * 4))
@example("/".join(["a" * 204] * 5))
@example("/".join(["a" * 170] * 6))
@example("./././a")
@example("./../a")
@example("a/")
def test_no_accepted_name_leaves_the_folder(path: str) -> None:
    assume(not re.search("[\ud800-\udc7f\udd00-\udfff]", path))  # no bytes of a name decode to these
    name = tried(lambda: check_path(path), HttpError)
    if isinstance(name, HttpError):
        assert (name.status, name.field) == (400, "file")
        assert name.message.isprintable()
        assert len(name.message) < 200
        return
    assert os.path.normpath("/base/" + name) == "/base/" + name, "it stays in its folder, and means what it says"
    assert name == re.sub(r"^(\./)+", "", path)
    parts = os.fsencode(name).split(b"/")
    assert all(part and part not in (b".", b"..") and len(part) <= 255 for part in parts)
    assert len(os.fsencode(name)) <= 1024
    assert len(parts) <= 17
    assert not any(ord(char) < 32 or ord(char) == 127 for char in name)


PLAIN = st.text(st.sampled_from("ab é"), min_size=1, max_size=2)


@BOUNDED
@given(st.lists(PLAIN, min_size=1, max_size=17))
@example(["a"] * 17)
def test_good_names_are_accepted_as_they_are(parts: list[str]) -> None:
    assert check_path("/".join(parts)) == "/".join(parts)


@BOUNDED
@given(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map("/".join), max_size=12))
def test_a_tree_refuses_duplicates_and_file_folder_clashes_and_nothing_else(paths: list[str]) -> None:
    tree, files = Tree(), set[str]()
    for path in paths:
        folders = {str(parent) for file in files for parent in PurePosixPath(file).parents}
        clash = path in files or path in folders or bool({str(parent) for parent in PurePosixPath(path).parents} & files)
        refused = isinstance(tried(lambda: tree.add(path), HttpError), HttpError)  # noqa: B023 - called at once
        assert refused == clash, (path, files)
        files |= set() if clash else {path}
    assert tree.files == files


# == Forms ==


def read_form(folder: Path, body: bytes, sizes: Sequence[int] = (), by_name: bool = False, length: int | None = None) -> joborch.Form:
    """What a form is read as: files below `folder`."""
    return FormReader(folder, by_name).read(Trickle(body, sizes), TYPE, len(body) if length is None else length)


def entries(files: dict[str, bytes]) -> set[StoredFile]:
    """How a form lists these files."""
    return {StoredFile(path, len(content), hashlib.sha256(content).hexdigest()) for path, content in files.items()}


SIZES = st.lists(st.integers(1, 90), max_size=5)
FIELDS = st.dictionaries(
    st.text(st.sampled_from("abc_"), min_size=1, max_size=4), st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
)


def html5(name: str) -> bool:
    """Whether a name means itself between quotes, by the escapes of HTML 5 and the library's rule for Windows paths."""
    return not re.search(r'%22|%0D|%0A|\\"|\\$', name) and name[1:3] != ":\\" and name[:2] != "\\\\"


@BOUNDED
@given(st.dictionaries(NAMES.filter(html5), CONTENTS, max_size=4), FIELDS, SIZES, st.booleans())
def test_files_and_fields_are_read_back_exactly(
    files: dict[str, bytes], fields: dict[str, str], sizes: list[int], fields_first: bool
) -> None:
    assume(fit(list(files)))
    parts = [file_part(name, content) for name, content in files.items()] if not any("\\" in name for name in files) else None
    if parts is None:
        parts = [part(f'form-data; name="file"; filename="{name.replace(chr(34), "%22")}"', content) for name, content in files.items()]
    texts = [field_part(name, value) for name, value in fields.items()]
    with new_folder() as folder:
        read = read_form(folder, form(texts + parts if fields_first else parts + texts), sizes)
        assert on_disk(folder) == files
        assert {(file.path, file.size, file.sha256) for file in read.files} == {(f.path, f.size, f.sha256) for f in entries(files)}
        assert read.fields == fields


@BOUNDED
@given(st.dictionaries(NAMES, CONTENTS, min_size=1, max_size=4), SIZES)
@example({"two words.txt": b"1", "in/put é.txt": b"2", 'quo"te': b"3", "%41": b"4"}, [7])
def test_parts_of_a_22_server(files: dict[str, bytes], sizes: list[int]) -> None:
    """Its parts are named by path: `name*=utf-8''...` alone where a plain name will not do."""
    assume(fit(list(files)))
    parts = []
    for name, content in files.items():
        disposition = f'name="{name}"' if re.fullmatch(r"[\w.-]+", name, re.ASCII) else f"name*=utf-8''{quote(name, safe='')}"
        base = name.rpartition("/")[2].replace("\\", "\\\\").replace('"', '\\"')
        parts.append(part(f'form-data; {disposition}; filename="{base}"', content))
    with new_folder() as folder:
        read = read_form(folder, form(parts), sizes, by_name=True)
        assert on_disk(folder) == files
        assert set(read.files) == entries(files)


@pytest.mark.parametrize(
    ("disposition", "by_name", "path"),
    [
        ('form-data; name="file"; filename="a/b"', False, "a/b"),
        ('form-data; name="x"; filename="./a"', False, "a"),
        ("form-data; name=\"file\"; filename*=UTF-8''%C3%A9%2Fb", False, "é/b"),
        ('form-data; name="file"; filename="C:\\dir\\a.txt"', False, "a.txt"),
        ('form-data; name="a/b"; filename="b"', True, "a/b"),
        ('form-data; name="a/b"', True, "a/b"),
        ('form-data; name="file"; filename="a/b"', True, "a/b"),
        ("form-data; name*=utf-8''a%2Fb%20c; filename=\"b c\"", True, "a/b c"),
        ("form-data; filename*=utf-8''only%20this", True, "only this"),
    ],
)
def test_what_a_part_is_called(disposition: str, by_name: bool, path: str, tmp_path: Path) -> None:
    read = read_form(tmp_path, form([part(disposition, b"x")]), by_name=by_name)
    assert [file.path for file in read.files] == [path]
    assert on_disk(tmp_path) == {path: b"x"}


@pytest.mark.parametrize(
    "disposition",
    [
        'form-data; name="../a"; filename="a"',
        "form-data; name*=utf-8''..%2Fa; filename=\"a\"",
        "form-data; name*=utf-8''%2Fetc%2Fpasswd; filename=\"passwd\"",
        "form-data; name*=utf-8''a%00b; filename=\"a\"",
        'form-data; name="a"; filename="a"\r\nX-Joborch-Path: ..%2Fa',
        'form-data; name="a"; filename="a"\r\nX-Joborch-Path: %2Fa',
        'form-data; name="file"; filename="../a"',
    ],
)
def test_no_spelling_of_a_name_leaves_the_folder(disposition: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(HttpError, match="file name"):
        read_form(tmp_path / "in", form([part(disposition, b"x")]), by_name=True)
    assert on_disk(tmp_path) == {}


def test_a_path_of_our_server_counts_only_between_machines(tmp_path: Path) -> None:
    body = form([part('form-data; name="file"; filename="a"\r\nX-Joborch-Path: b', b"x")])
    assert [file.path for file in read_form(tmp_path, body).files] == ["a"]
    assert [file.path for file in read_form(tmp_path, body, by_name=True).files] == ["b"]


WHOLE = form([field_part("user_id", "1"), file_part("d/run.sh", b"echo\r\n--" + BOUNDARY.encode()[:-2] + b"\r\n"), file_part("b", b"")])


@pytest.mark.parametrize("told", [True, False], ids=["told-the-whole-length", "told-what-comes"])
def test_a_form_cut_off_at_any_byte_is_refused(told: bool, tmp_path: Path) -> None:
    """But at its last two, a line end that nobody needs; with the length told, those too."""
    for cut in range(len(WHOLE) - (0 if told else 2)):
        folder = tmp_path / str(cut)
        folder.mkdir()
        body = WHOLE[:cut]
        refusal = tried(lambda: read_form(folder, body, [11], length=len(WHOLE) if told else None), HttpError)  # noqa: B023 - called at once
        complete = told and cut >= len(WHOLE) - 2  # the closing boundary is there
        assert isinstance(refusal, HttpError) or complete, f"cut at {cut}: {refusal}"
        assert complete or refusal.status == 400


@BOUNDED
@given(st.data())
def test_a_damaged_form_is_read_or_refused_and_nothing_else(data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(WHOLE) - 1))
    body = WHOLE[:at] + data.draw(st.binary(max_size=3)) + WHOLE[at + data.draw(st.integers(0, 20)) :]
    with new_folder() as folder:
        (folder / "in").mkdir()
        read = tried(lambda: read_form(folder / "in", body, data.draw(SIZES)), HttpError)
        if isinstance(read, HttpError):
            assert read.status in (400, 413)
        else:
            assert {file.path: file.size for file in read.files} == {name: len(text) for name, text in on_disk(folder / "in").items()}
        assert list(folder.iterdir()) == [folder / "in"]


def test_fields(tmp_path: Path) -> None:
    big = "x" * FIELD_LIMIT_BYTES
    assert read_form(tmp_path, form([field_part("a", big)]), [1000]).fields == {"a": big}
    for parts, status, word in (
        ([field_part("a", big + "x")], 413, "over 64 KiB"),
        ([field_part("a", "1"), field_part("a", "2")], 400, "is given twice"),
        ([field_part("a", b"\xff")], 400, "not UTF-8"),
    ):
        with pytest.raises(HttpError, match=word) as caught:
            read_form(tmp_path, form(parts))
        assert (caught.value.status, caught.value.field) == (status, "a")


def test_endless_field_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    class Endless(io.RawIOBase):
        taken = 0

        def read(self, size: int = -1) -> bytes:
            self.taken += size
            return (field_part("a", "")[:-2] if self.taken == size else b"").ljust(size, b"x")

    stream = Endless()
    with pytest.raises(HttpError) as caught:
        FormReader(tmp_path).read(stream, TYPE, 1 << 40)
    assert caught.value.status == 413
    assert stream.taken <= 4 * joborch.CHUNK_BYTES


def test_number_of_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace(monkeypatch, "PARTS_LIMIT", 3)
    assert len(read_form(tmp_path, form(file_part(str(number), b"") for number in range(3))).files) == 3
    with pytest.raises(HttpError, match="more than 3 parts") as caught:
        read_form(tmp_path, form(file_part(f"x{number}", b"") for number in range(4)))
    assert caught.value.status == 413


@pytest.mark.parametrize(
    ("kind", "boundary"),
    [
        ("multipart/form-data; boundary=x", "x"),
        ('Multipart/Form-Data; charset=utf-8; boundary="a b;c"', "a b;c"),
        ("multipart/form-data;boundary=" + "x" * 70, "x" * 70),
        ("multipart/form-data", 400),
        ("multipart/form-data; boundary=", 400),
        ("multipart/mixed; boundary=x", 415),
        ("application/x-www-form-urlencoded", 415),
        ("", 415),
    ],
)
def test_boundary(kind: str, boundary: str | int) -> None:
    found = tried(lambda: multipart_boundary(kind), HttpError)
    assert (found.status if isinstance(found, HttpError) else found) == boundary


# == ZIPs ==


@contextlib.contextmanager
def new_packer() -> Iterator[ZipPacker]:
    """A packer that is closed whatever happens."""
    packer = ZipPacker(io.BytesIO())
    yield packer
    packer.abandon()


def member_bytes(name: str) -> bytes:
    """The bytes of the file name that a member stands for, where it is not UTF-8 and so percent-encoded."""
    return unquote_to_bytes(name)


RAW_NAMES = st.binary(min_size=1, max_size=6).map(lambda raw: re.sub(rb"[/\0]", b"_", raw)).filter(lambda raw: raw not in (b".", b".."))
ODD_NAMES = st.sampled_from(
    [b"\xff", b"a\nb", b"a\\b", b"-rf", b" ", b"\xe9.txt", "é".encode(), b"%41", b"a:b", b"con", b"\x1b[31m", b".joborch"]
)
TARGETS = st.sampled_from(
    ["a", "./a", "../a", "../../a", "..", ".", "/etc/passwd", "a/../..", "d/../../x", "d/x", "link/..", "link/../../x"]
)
MODES = st.sampled_from([0o644, 0o755, 0o400, 0o4755])
LEAVES = st.tuples(st.just("file"), st.binary(max_size=300), MODES) | st.tuples(st.just("link"), TARGETS) | st.tuples(st.just("fifo"))
TREE_NAMES = RAW_NAMES | ODD_NAMES | st.sampled_from([b"a", b"d", b"link", b"x"])
TREES = st.dictionaries(
    TREE_NAMES,
    st.recursive(LEAVES, lambda inner: st.tuples(st.just("folder"), st.dictionaries(TREE_NAMES, inner, max_size=4)), max_leaves=8),
    max_size=5,
)


def plant(folder: Path, tree: dict[bytes, Any], path: bytes = b"") -> Iterator[tuple[bytes, str, Any]]:
    """Make `tree` in `folder`; yield path, kind and what there is to say of each thing in it."""
    for name, (kind, *rest) in tree.items():
        place, inner = folder / os.fsdecode(name), path + name
        if kind == "file":
            place.write_bytes(rest[0])
            place.chmod(rest[1])
        elif kind == "link":
            place.symlink_to(rest[0])
        elif kind == "fifo":
            os.mkfifo(place)
        else:
            place.mkdir()
            yield from plant(place, rest[0], inner + b"/")
        yield inner, kind, rest


def is_text(raw: bytes) -> bool:
    """Whether a name is UTF-8."""
    return not isinstance(tried(raw.decode, UnicodeDecodeError), UnicodeDecodeError)


def members(read: zipfile.ZipFile, paths: Sequence[bytes], own: str) -> dict[bytes, list[zipfile.ZipInfo]]:
    """The members of a ZIP by the path that they stand for: as it is, percent-encoded, or with `~` where two became one name."""
    found: dict[bytes, list[zipfile.ZipInfo]] = {path: [] for path in paths}
    for entry in read.infolist():
        names = {entry.filename, entry.filename.rstrip("~")} - {f"{own}/left-out.txt"}
        meant = {raw for name in names for raw in (name.encode(), unquote_to_bytes(name)) if raw in found}
        assert meant or entry.is_dir() or entry.filename == f"{own}/left-out.txt", f"{entry.filename!r} was not there"
        for path in meant:
            found[path].append(entry)
    return found


@BOUNDED
@given(TREES)
@example({b"\xff": ("folder", {b"\xfe": ("file", b"1", 0o644)}), b"%FF": ("folder", {b"%FE": ("file", b"2", 0o644)})})
@example({b"\xff": ("file", b"1", 0o644), b"%FF": ("link", "a"), b"%FF~": ("fifo",)})
@example({b"_": ("link", "a/../.."), b"a": ("link", "d/d"), b"d": ("folder", {b"d": ("folder", {})})})
def test_any_tree_is_packed_as_it_is(tree: dict[bytes, Any]) -> None:
    """Files with content and mode, links that stay inside as links, empty folders; the rest is named as left out."""
    with new_folder() as folder:
        (folder / "work").mkdir()
        things = list(plant(folder / "work", tree))
        _, read = packed(folder / "work")
        own = ".joborch" if b".joborch" not in tree else ".joborch-1"
        left_out = read.read(f"{own}/left-out.txt").decode() if f"{own}/left-out.txt" in read.namelist() else ""
        by_path = members(read, [path for path, _, _ in things], own)
        stored = [entry for entry in read.infolist() if not entry.is_dir() and entry.filename != f"{own}/left-out.txt"]
        missing = 0
        for path, kind, rest in things:
            links = [
                entry for entry in by_path[path] if stat.S_ISLNK(entry.external_attr >> 16) and read.read(entry).decode() == rest[:1][0]
            ]
            if kind == "file":
                same = [entry for entry in by_path[path] if read.read(entry) == rest[0] and entry.external_attr >> 16 & 0o7777 == rest[1]]
                assert same, f"{path!r} is missing"
            elif kind == "fifo":
                missing += 1
                assert "not a file, folder or link" in left_out
            elif kind == "link" and stays_inside(folder / "work", path) and not rest[0].startswith("/"):
                by_letters = os.path.normpath(b"/".join([*path.split(b"/")[:-1], rest[0].encode()]))
                assert links or by_letters.split(b"/")[0] == b"..", f"{path!r} -> {rest[0]} stays inside"
                missing += not links
            elif kind == "link":
                missing += 1
                assert not links, f"{path!r} -> {rest[0]} leads out"
                assert "a link that leads out of the folder" in left_out
        files_and_links = sum(kind in ("file", "link", "fifo") for _, kind, _ in things)
        assert len(stored) == files_and_links - missing
        assert len(left_out.splitlines()) == missing, "one line for each thing left out"


def stays_inside(folder: Path, link: bytes) -> bool:
    """Whether what a link leads to, by way of all other links, lies in `folder`. A link that leads in a circle leads nowhere."""
    path = os.fsencode(folder) + b"/" + link
    try:
        (folder / os.fsdecode(link)).stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return True
    real = os.path.realpath(path)
    return (real + b"/").startswith(os.fsencode(folder.resolve()) + b"/")


@pytest.mark.parametrize(
    "links",
    [
        {"link": ".", "x": "link/../out"},
        {"d/d/link": "../..", "d/d/x": "link/../out"},
        {"a": "b", "b": "c", "c": ".", "x": "a/../../out"},
    ],
)
def test_a_link_that_leads_out_by_way_of_another_is_left_out(links: dict[str, str], tmp_path: Path) -> None:
    """By its letters it stays inside."""
    for name, target in links.items():
        (tmp_path / "work" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "work" / name).symlink_to(target)
    assert not stays_inside(tmp_path / "work", list(links)[-1].encode())
    _, read = packed(tmp_path / "work")
    assert set(read.namelist()) == {*list(links)[:-1], ".joborch/left-out.txt"}
    assert read.read(".joborch/left-out.txt").decode().startswith(list(links)[-1])


def test_what_goes_in_as_a_form_comes_out_of_the_zip(tmp_path: Path) -> None:
    """Names byte for byte, through FormReader, disk and ZipPacker."""

    @BOUNDED
    @given(st.dictionaries(NAMES, CONTENTS, max_size=4), st.sampled_from([b"\xff", b"\xc3(", b"\xed\xa0\x80"]))
    def check(files: dict[str, bytes], raw: bytes) -> None:
        assume(fit([*files, os.fsdecode(raw)]))
        everything = {**{name.encode(): content for name, content in files.items()}, raw: b"not UTF-8"}
        parts = [
            part(f'form-data; name="x"; filename="y"\r\nX-Joborch-Path: {quote(name)}', content) for name, content in everything.items()
        ]
        with new_folder() as folder:
            read_form(folder, form(parts), by_name=True)
            _, read = packed(folder)
            back = {name.encode() if name.encode() in everything else member_bytes(name): read.read(name) for name in read.namelist()}
            assert back == everything

    check()


def test_links_devices_and_fifos_are_named_one_a_line(tmp_path: Path) -> None:
    (tmp_path / "out\nside").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "pipe")
    _, read = packed(tmp_path)
    lines = read.read(".joborch/left-out.txt").decode().splitlines()
    assert len(lines) == 2
    assert read.namelist() == [".joborch/left-out.txt"]


def test_a_file_that_grows_while_it_is_packed_ends(tmp_path: Path) -> None:
    """A payload that writes faster than we read must not hold a thread and fill the disk."""
    growing = tmp_path / "log"
    growing.write_bytes(os.urandom(joborch.CHUNK_BYTES))

    class Spool(io.BytesIO):
        writes = 0

        def write(self, data: Any) -> int:
            self.writes += 1
            if self.writes < 60:
                with growing.open("ab") as more:
                    more.write(os.urandom(joborch.CHUNK_BYTES))
            return super().write(data)

    _, read = packed(tmp_path, Spool())
    assert read.getinfo("log").file_size <= 3 * joborch.CHUNK_BYTES


def test_a_file_that_shrinks_or_goes_while_it_is_packed(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(os.urandom(2 * joborch.CHUNK_BYTES))

    class Spool(io.BytesIO):
        def write(self, data: Any) -> int:
            os.truncate(tmp_path / "a", 10)
            (tmp_path / "b").unlink(missing_ok=True)
            return super().write(data)

    _, read = packed(tmp_path, Spool())
    assert set(read.namelist()) == {"a", "c"}
    assert read.getinfo("c").file_size == 2 * joborch.CHUNK_BYTES


def test_a_fifo_put_in_a_files_place_does_not_hold_us_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/etc/passwd")
    with new_packer() as packer:
        for name, why in (("pipe", "not a file"), ("link", "symbolic links")):
            with pytest.raises(OSError, match=why):
                packer.add_file(os.fsencode(tmp_path / name), name)


@pytest.mark.parametrize("mtime", [-1.0, 0.0, 315532799.0, 4354819200.0, 2.0**40, 2.0**62, 2.0**63])
def test_any_time_of_a_file_can_be_packed(mtime: float, tmp_path: Path) -> None:
    """ZIP knows the years 1980 to 2107; some file systems know many more."""
    with new_packer() as packer:
        packer.zip.add("a", mtime, 0o100644, b"x")
        read = zipfile.ZipFile(packer.finish().file)
        assert 1980 <= read.getinfo("a").date_time[0] <= 2107
        assert read.read("a") == b"x"


def test_inputs_that_were_not_changed_stay_out(tmp_path: Path) -> None:
    unchanged = {}
    for name in ("same", "longer", "touched", "d/same"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
        state = (tmp_path / name).stat()
        unchanged[name] = [state.st_size, state.st_mtime_ns]
    (tmp_path / "longer").write_bytes(b"12")
    os.utime(tmp_path / "touched", ns=(0, 10**18))
    (tmp_path / "new").write_bytes(b"1")
    _, read = packed(tmp_path, unchanged=unchanged)
    assert set(read.namelist()) == {"longer", "touched", "new"}


def test_empty_folders_are_packed_and_an_empty_work_folder_is_fine(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    assert packed(tmp_path)[1].namelist() == ["a/b/"]
    assert packed(tmp_path / "a/b")[1].namelist() == []


def deepest(folder: Path) -> int:
    """Make folders in one another until their path is longer than the kernel takes; return how many."""
    descriptor = os.open(folder, os.O_RDONLY)
    for _ in range(60):
        os.mkdir("d" * 100, dir_fd=descriptor)
        inner = os.open("d" * 100, os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = inner
    os.close(os.open("leaf", os.O_CREAT, dir_fd=descriptor))
    os.close(descriptor)
    return 60


def test_folders_deeper_than_a_path_can_say(tmp_path: Path) -> None:
    """They are packed as far as a path goes, what is left out is named as seen from the folder, and all can be removed."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work/file").write_bytes(b"x")
    deepest(tmp_path / "work")
    _, read = packed(tmp_path / "work")
    assert read.read("file") == b"x"
    assert str(tmp_path) not in read.read(".joborch/left-out.txt").decode(), "a path of this machine"
    assert read.read(".joborch/left-out.txt").decode().startswith("d" * 100 + "/")
    joborch.remove_tree(tmp_path / "work")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("probe", [b"", b"a" * 1000, os.urandom(1000), b"ab"])
def test_compression_only_where_it_helps(probe: bytes) -> None:
    wanted = zipfile.ZIP_DEFLATED if probe == b"a" * 1000 else zipfile.ZIP_STORED
    assert worthwhile_compression(probe) == wanted


# == Output streams ==


@BOUNDED
@given(st.binary(max_size=200), st.integers(0, 120))
@example(b"x" * 10, 10)
@example(b"x" * 11, 10)
@example(b"abc", 1)
def test_kept_output_is_head_line_and_tail(content: bytes, limit: int) -> None:
    with new_folder() as folder:
        (folder / "stdout").write_bytes(content)
        kept = b"".join(joborch.kept_output(folder, "stdout", limit)[1])
    if len(content) <= limit:
        assert kept == content
        return
    half = limit // 2
    line = b"\n[joborch: %d bytes left out]\n" % (len(content) - 2 * half)
    assert kept == content[:half] + line + content[len(content) - half :]


@BOUNDED
@given(st.integers(0, 20 * 4096), st.integers(0, 10 * 4096))
@example(20 * 4096, 4 * 4096)
@example(20 * 4096, 0)
@example(20 * 4096, 4 * 4096 + 1)
@example(20 * 4096 + 1, 8 * 4096 - 1)
def test_punching_the_middle_changes_nothing_that_is_shown(size: int, limit: int) -> None:
    with new_folder() as folder:
        path = folder / "stdout"
        path.write_bytes((b"0123456789abcdef" * (size // 16 + 1))[:size])
        shown = b"".join(joborch.kept_output(path.parent, path.name, limit)[1])
        joborch.punch_middle(path, limit)
        assert path.stat().st_size == size
        assert b"".join(joborch.kept_output(path.parent, path.name, limit)[1]) == shown
        joborch.punch_middle(path, limit)
        assert disk_bytes(folder) <= max(limit + 3 * 4096, 4096) or size <= limit + 2 * 4096


# == Opening, writing, removing ==


def test_what_a_script_may_have_replaced_is_opened_only_as_a_file(tmp_path: Path) -> None:
    """Neither a link is followed, not even to a file, nor a fifo waited for."""
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    with joborch.open_regular(tmp_path / "file") as file:
        assert file.read() == b"x"
    for name in ("link", "folder", "fifo", "none"):
        with pytest.raises(OSError, match=name):
            joborch.open_regular(tmp_path / name)


def test_write_all_goes_on_where_a_write_takes_a_part() -> None:
    taken = []

    class Stingy(io.RawIOBase):
        def write(self, data: Any) -> int:
            taken.append(bytes(data[:3]))
            return min(3, len(data))

    write_all(Stingy(), b"0123456789")
    assert b"".join(taken) == b"0123456789"


@pytest.mark.parametrize("way", ["upload", "transfer", "spool"])
def test_a_large_file_comes_to_the_disk_in_steps(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more than a step of it waits in memory: the fsync of a small file would wait for all of it."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    size, chunk = 3 * SYNC_STEP_BYTES + 5, bytes(joborch.MIB)
    chunks = [chunk] * (size // len(chunk)) + [b"12345"]
    if way == "upload":
        FormReader(tmp_path).file("large", chunks)
    else:
        with contextlib.ExitStack() as stack:
            raw = stack.enter_context((tmp_path / "large").open("wb", buffering=0))
            target = joborch.Transfer(cast(IO[bytes], raw)) if way == "transfer" else Spool(tmp_path)
            for each in chunks:
                target.write(each)
    assert len(synced) == 3
    assert synced == pytest.approx([SYNC_STEP_BYTES, 2 * SYNC_STEP_BYTES, 3 * SYNC_STEP_BYTES], abs=len(chunk))


def test_a_small_file_is_not_synced_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "fdatasync")
    FormReader(tmp_path).file("small", [bytes(joborch.MIB)] * 15)


def test_write_atomic_puts_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    joborch.write_atomic(tmp_path / "a", b"old", 0o600)
    assert (tmp_path / "a").read_bytes() == b"old"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600

    def cut_off(_: int) -> None:
        raise OSError("the power is gone")

    monkeypatch.setattr(os, "fsync", cut_off)
    with pytest.raises(OSError, match="the power is gone"):
        joborch.write_atomic(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"


@pytest.mark.parametrize("count", [1, 5, 32, 33])
def test_fsync_tree_reaches_files_folders_and_parent(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "job"
    paths = [f"d{number % 3}/e/{number}" for number in range(count)]
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"x")
    synced, whole = list[str](), list[str]()
    replace(monkeypatch, "fsync_path", lambda path: synced.append(os.path.relpath(path, tmp_path)))
    replace(monkeypatch, "sync_file_system", lambda path: whole.append(os.path.relpath(path, tmp_path)))
    joborch.fsync_tree(folder, paths)
    if count > 32:
        assert (synced, whole) == ([], ["job"])
        return
    wanted = {"job/" + path for path in paths} | {"job", "."}
    wanted |= {str(parent) for path in paths for parent in PurePosixPath("job/" + path).parents}
    assert set(synced) == wanted
    assert synced[-1] == ".", "the entry of the job's folder comes last"


def test_fsync_of_what_is_there_and_what_is_not(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    joborch.fsync_path(tmp_path)
    joborch.sync_file_system(tmp_path)
    for path in ("none", "link"):
        with pytest.raises(OSError, match=r"No such file|symbolic links"):
            joborch.fsync_path(tmp_path / path)


def test_free_bytes_is_what_df_says(tmp_path: Path) -> None:
    said = int(subprocess.check_output(["df", "--output=avail", "-B1", str(tmp_path)]).split()[1])
    assert abs(joborch.free_bytes(tmp_path) - said) < 2**30


def test_remove_tree_never_follows_a_link(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/kept").write_bytes(b"x")
    inside = tmp_path / "inside"
    (inside / "d").mkdir(parents=True)
    (inside / "d/to-folder").symlink_to(tmp_path / "outside")
    (inside / "to-file").symlink_to(tmp_path / "outside/kept")
    (inside / "dangling").symlink_to("nowhere")
    os.mkfifo(inside / "pipe")
    joborch.remove_tree(inside)
    (tmp_path / "link").symlink_to(tmp_path / "outside")
    joborch.remove_tree(tmp_path / "link")
    joborch.remove_tree(tmp_path / "none")
    (tmp_path / "file").write_bytes(b"x")
    joborch.remove_tree(tmp_path / "file")
    assert list(tmp_path.iterdir()) == [tmp_path / "outside"]
    assert list((tmp_path / "outside").iterdir()) == [tmp_path / "outside/kept"]


def test_rights_that_a_script_took_are_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root rights do not count: there the first removal is made to fail."""
    folder = tmp_path / "job"
    (folder / "d/e").mkdir(parents=True)
    (folder / "d/e/file").write_bytes(b"x")
    (folder / "d/out").symlink_to(tmp_path)
    for name in ("d/e", "d", "."):
        (folder / name).chmod(0)
    real, calls = shutil.rmtree, list[Path]()

    def refuse_once(path: Path, **options: Any) -> None:
        calls.append(path)
        if len(calls) == 1:
            raise PermissionError(13, "not yours")
        assert all(stat.S_IMODE((folder / name).stat().st_mode) == 0o700 for name in ("d/e", "d", "."))
        real(path, **options)

    if os.geteuid() == 0:
        monkeypatch.setattr(shutil, "rmtree", refuse_once)
    mode = tmp_path.stat().st_mode
    joborch.remove_tree(folder)
    assert not folder.exists()
    assert tmp_path.stat().st_mode == mode, "what a link leads to is left alone"


def test_a_plain_user_takes_rights_back(open_folder: Path, root: None) -> None:
    """Rights count for it, and it has the folder open meanwhile: whoever gets the number of a closed descriptor would lose its file."""
    folder = open_folder / "job"
    (folder / "d/e").mkdir(parents=True)
    for name in ("d/e", "d", "."):
        os.chown(folder / name, NOBODY_UID, NOBODY_UID)
        (folder / name).chmod(0)
    open_folder.chmod(0o777)
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(NOBODY_UID, NOBODY_UID, NOBODY_UID)
            os.setresuid(NOBODY_UID, NOBODY_UID, NOBODY_UID)
            libc().prctl(4, 1)  # PR_SET_DUMPABLE: as after the start of a program, /proc/self/fd can be used
            joborch.remove_tree(folder)
        finally:
            os._exit(folder.exists())
    assert os.waitpid(child, 0)[1] == 0
    assert not folder.exists()


def test_a_descriptor_that_is_given_stays_open(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    given = os.open(tmp_path, os.O_PATH)
    try:
        for inner in ((), ("in",)):
            with opened_folder(given, *inner) as folder:
                assert folder != given
                assert os.path.samestat(os.fstat(folder), tmp_path.joinpath(*inner).stat())
            assert os.path.samestat(os.fstat(given), tmp_path.stat())
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(folder)
        give_rights(given)
        assert os.path.samestat(os.fstat(given), tmp_path.stat())
    finally:
        os.close(given)


# == The data folder ==


def test_data_folder_has_its_places_and_begins_with_an_empty_tmp(tmp_path: Path, data: DataFolder) -> None:
    assert {path.name for path in data.path.iterdir()} == {"jobs", "results", "tmp", DataFolder.LOCK}
    assert (data.path / DataFolder.LOCK).read_text() == f"{os.getpid()}\n"
    assert tempfile.gettempdir() == str(data.tmp)
    assert data.job("u.1") == data.jobs / "u.1"
    assert data.result("u.1") == data.results / "u.1.zip"
    (data.tmp / "leftover").mkdir()
    (data.tmp / "leftover/file").write_bytes(b"x")
    (data.jobs / "kept").mkdir()
    data.lock.close()
    data.open()
    assert list(data.tmp.iterdir()) == []
    assert list(data.jobs.iterdir()) == [data.jobs / "kept"]


def test_what_is_stored_is_nobody_elses_business(data: DataFolder) -> None:
    (data.jobs / "u").mkdir()
    (data.jobs / "u/file").write_bytes(b"x")
    assert not stat.S_IMODE((data.jobs / "u").stat().st_mode) & 0o077
    assert not stat.S_IMODE((data.jobs / "u/file").stat().st_mode) & 0o077


def test_a_second_process_is_refused_with_the_pid_of_the_first(data: DataFolder) -> None:
    code = f"import joborch; joborch.DataFolder({str(data.path)!r}).open()"
    second = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert f"is in use by process {os.getpid()}: stop it, or use another folder" in second.stderr
    assert (data.path / DataFolder.LOCK).read_text() == f"{os.getpid()}\n", "the refused one wrote nothing"


def test_a_data_folder_that_cannot_be_made(tmp_path: Path, data: DataFolder) -> None:
    (tmp_path / "file").write_bytes(b"")
    for place, why in (("file", "Not a directory|File exists"), ("file/below", "Not a directory"), ("x" * 256, "too long")):
        with pytest.raises(ConfigError, match=f"DATA_PATH is .*({why}).*; give a folder that joborch may write to"):
            DataFolder(str(tmp_path / place)).open()


def test_a_small_spool_is_in_memory_and_a_large_one_in_tmp_without_a_name(data: DataFolder) -> None:
    with contextlib.closing(data.spool()) as spool:
        before = disk_bytes(data.path)
        spool.write(b"x" * MEMORY_SPOOL_BYTES)
        assert disk_bytes(data.path) == before
        spool.write(b"y" * joborch.CHUNK_BYTES)
        spool.flush()
        for part in (b"x", b"y"):
            with spool.again() as other:  # type: ignore[attr-defined]
                other.seek(MEMORY_SPOOL_BYTES if part == b"y" else 0)
                assert other.read(1) == part
        assert list(data.tmp.iterdir()) == []
        assert str(Path(f"/proc/self/fd/{spool.fileno()}").readlink()).startswith(str(data.tmp))
        assert list(data.tmp.iterdir()) == [], "it has no name: a crash leaves nothing"


def test_file_chunks_gives_what_there_is() -> None:
    chunks: Callable[[int], list[bytes]] = lambda count: list(joborch.file_chunks(io.BytesIO(b"0123456789"), count))  # noqa: E731
    assert chunks(4) == [b"0123"]
    assert chunks(20) == [b"0123456789"]
    assert chunks(0) == chunks(-1) == []
