"""Which photos an INPUT means and where their results go."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dreamsr_cli.cli.photos import Found, Job, Naming, find_photos, out_is_file, plan_jobs, prepare_target
from dreamsr_cli.errors import InputError, OutputError, UsageError
from dreamsr_cli.images import is_photo_name


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def touch(*names):
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"")


def find(*inputs, out=None):
    return find_photos(list(inputs), Path(out) if out else None, is_photo_name)


def names(found):
    return [item.source.as_posix() for item in found if item.problem is None]


def naming(out=None, is_file=False, format="auto", suffix="_x{scale}", factor=4.0):
    return Naming(Path(out) if out else None, is_file, format, suffix, lambda path: factor)


def targets(found, **settings):
    return [entry.target.as_posix() for entry in plan_jobs(found, naming(**settings)) if isinstance(entry, Job)]


def test_folders_are_walked_in_order_and_only_photos_are_taken():
    touch("p/b.PNG", "p/a.jpg", "p/.hidden.jpg", "p/notes.txt", "p/sub/c.JpEg", "p/.git/d.jpg", "p/a.jpg.dreamsr/e.png")
    assert names(find("p")) == ["p/a.jpg", "p/b.PNG", "p/sub/c.JpEg"]


def test_a_typed_file_is_taken_whatever_its_name():
    touch("scan")
    assert find("scan") == [Found(Path("scan"))]


def test_links_that_loop_end_and_links_to_folders_are_followed():
    touch("p/a.jpg", "other/b.jpg")
    os.symlink("..", "p/up")
    os.symlink("../p", "p/self")
    os.symlink("../other", "p/link")
    os.symlink("gone.jpg", "p/broken.jpg")
    os.symlink("ring.jpg", "p/ring.jpg")
    found = names(find("p"))
    assert "p/a.jpg" in found
    assert [name for name in found if name.endswith("b.jpg")]
    assert len(found) < 6 and not [name for name in found if "broken" in name or "ring" in name]
    assert names(find("p/**/*.jpg")).count("p/a.jpg") == 1
    assert len(names(find("p/**/*.jpg"))) < 6


def test_patterns_are_expanded_even_when_quoted():
    touch("s/a1.jpg", "s/a2.tif", "s/b.jpg", "s/a3.txt", "s/deep/a4.webp")
    assert names(find("s/a*")) == ["s/a1.jpg", "s/a2.tif"]
    found = find("s/**/a*")
    assert names(found) == ["s/a1.jpg", "s/a2.tif", "s/deep/a4.webp"]
    assert names(find("**/deep", "**/b.*")) == ["s/deep/a4.webp", "s/b.jpg"]
    assert names(find("s/*")) == ["s/a1.jpg", "s/a2.tif", "s/b.jpg", "s/deep/a4.webp"]
    assert targets(found, out="o") == ["o/a1_x4.jpg", "o/a2_x4.tif", "o/deep/a4_x4.webp"]


def test_a_file_with_a_bracket_in_its_name_is_no_pattern():
    touch("a[1].jpg")
    assert names(find("a[1].jpg")) == ["a[1].jpg"]


def test_nothing_found_is_a_problem_for_each_input():
    touch("empty/readme.txt")
    os.mkfifo("pipe.jpg")
    found = find("gone.jpg", "empty", "x*.jpg", "pipe.jpg")
    messages = [item.problem.message for item in found if item.problem]
    assert [isinstance(item.problem, InputError) for item in found] == [True] * 4
    assert [str(item.source) for item in found] == ["gone.jpg", "empty", "x*.jpg", "pipe.jpg"]
    assert "doesn't exist" in messages[0] and "no photo" in messages[1] and "no photo" in messages[2]
    assert "not a regular file" in messages[3]


def test_a_photo_meant_twice_is_done_once():
    touch("p/a.jpg", "p/b.jpg")
    assert names(find("p/b.jpg", "p", "p/*.jpg", "./p/b.jpg")) == ["p/b.jpg", "p/a.jpg"]


def test_the_output_folder_is_not_an_input():
    touch("p/a.jpg", "p/out/a_x4.jpg", "p/out/deep/b.jpg")
    assert names(find("p", out="p/out")) == ["p/a.jpg"]
    assert names(find("p/**/*", out="p/out")) == ["p/a.jpg"]


def test_the_tree_is_kept_below_the_output_folder():
    touch("p/a.jpg", "p/x/y/b.png", "c.webp")
    assert targets(find("p", "c.webp"), out="o") == ["o/a_x4.jpg", "o/x/y/b_x4.png", "o/c_x4.webp"]


def test_names_beside_the_photo():
    touch("p/a.JPG", "b.gif", "c.jfif", "d")
    assert targets(find("p", "b.gif", "c.jfif", "d")) == ["p/a_x4.JPG", "b_x4.png", "c_x4.jpg", "d_x4.png"]
    assert targets(find("p/a.JPG"), format="tiff", suffix="-{scale}", factor=2.5) == ["p/a-2.5.tif"]
    assert targets(find("p/a.JPG"), format="jpg", suffix="_big", factor=10 / 3) == ["p/a_big.JPG"]
    assert targets(find("p/a.JPG"), suffix="_{scale}{x}", factor=10 / 3) == ["p/a_3.333{x}.JPG"]


def test_earlier_results_of_a_folder_are_not_upscaled_again():
    touch("p/a.jpg", "p/a_x4.jpg", "p/a_x4_x4.jpg", "p/b_x4.jpg")
    assert targets(find("p")) == ["p/a_x4.jpg", "p/b_x4_x4.jpg"]


def test_a_result_never_replaces_an_input():
    touch("a.jpg", "a_x4.jpg")
    with pytest.raises(UsageError, match="would be replaced"):
        targets(find("a.jpg"), suffix="")
    with pytest.raises(UsageError, match="would be replaced"):
        targets(find("a.jpg", "a_x4.jpg"))
    with pytest.raises(UsageError, match="would be replaced"):
        targets(find("a.jpg"), out="./a.jpg", is_file=True)
    os.symlink("a.jpg", "link.jpg")
    with pytest.raises(UsageError, match="would be replaced"):
        targets(find("a.jpg"), out="link.jpg", is_file=True)


def test_two_photos_never_share_a_result():
    touch("p/a.jpg", "q/a.jpg", "q/b.png", "q/b.jpg")
    with pytest.raises(UsageError, match=r"p/a.jpg and q/a.jpg would both be written to o/a_x4.jpg"):
        targets(find("p/a.jpg", "q/a.jpg"), out="o")
    with pytest.raises(UsageError, match="both"):
        targets(find("q/b.png", "q/b.jpg"), format="webp")
    assert targets(find("q/b.png", "q/b.jpg")) == ["q/b_x4.png", "q/b_x4.jpg"]


def test_a_photo_whose_factor_cannot_be_told_is_a_problem_of_its_own():
    touch("a.jpg", "b.jpg")

    def factor(path):
        if path.name == "a.jpg":
            raise InputError("a.jpg is empty", "copy it again")
        return 2.0

    plan = plan_jobs(find("a.jpg", "b.jpg"), Naming(None, False, "auto", "_x{scale}", factor))
    assert isinstance(plan[0], Found) and plan[0].problem is not None
    assert plan[1] == Job(Path("b.jpg"), Path("b_x2.jpg"))


@pytest.mark.parametrize(
    ("out", "expected"),
    [(None, False), ("o", False), ("o/", False), ("v1.2", False), ("x.png", True), ("x.JPEG", True), ("d.png/", False)],
)
def test_when_out_is_a_file(out, expected):
    touch("a.jpg")
    assert out_is_file(out, find("a.jpg"), is_photo_name) is expected


def test_an_existing_folder_is_a_folder_whatever_its_name():
    touch("a.jpg", "o.png/x")
    assert out_is_file("o.png", find("a.jpg"), is_photo_name) is False


def test_out_that_cannot_be_is_refused():
    touch("a.jpg", "b.jpg", "p/c.jpg", "plain")
    with pytest.raises(UsageError, match="one file"):
        out_is_file("x.png", find("a.jpg", "b.jpg"), is_photo_name)
    with pytest.raises(UsageError, match="one file"):
        out_is_file("x.png", find("p"), is_photo_name)
    with pytest.raises(UsageError, match="can't be written"):
        out_is_file("x.gif", find("a.jpg"), is_photo_name)
    with pytest.raises(UsageError, match="not a folder"):
        out_is_file("plain", find("a.jpg"), is_photo_name)


def test_existing_results_are_refused_replaced_or_kept():
    job = Job(Path("a.jpg"), Path("deep/er/a_x4.jpg"))
    assert prepare_target(job, overwrite=False, skip_existing=False) is True
    assert job.target.parent.is_dir()
    touch(str(job.target))
    with pytest.raises(OutputError, match="exists already") as caught:
        prepare_target(job, overwrite=False, skip_existing=False)
    assert "--overwrite" in caught.value.hint and "--skip-existing" in caught.value.hint
    assert prepare_target(job, overwrite=True, skip_existing=False) is True
    assert prepare_target(job, overwrite=False, skip_existing=True) is False


def test_a_folder_in_the_way_is_an_output_error():
    touch("o/a.png/x", "file")
    with pytest.raises(OutputError, match="is a folder"):
        prepare_target(Job(Path("a.jpg"), Path("o/a.png")), overwrite=True, skip_existing=False)
    with pytest.raises(OutputError, match="can't make the folder"):
        prepare_target(Job(Path("a.jpg"), Path("file/a.png")), overwrite=True, skip_existing=False)
