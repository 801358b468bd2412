from __future__ import annotations

from pathlib import Path

import pytest

from fxpath.errors import ImageError
from fxpath.image_labels import ClassNames, folder_labels, read_label_file

CLASSES = ("tench", "golden retriever", "Cardigan", "cardigan")
IDS = ("a.jpg", "b/c.jpg", "d, e.jpg")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("tench", 0),
        ("TENCH", 0),
        ("golden_retriever", 1),
        ("Golden  Retriever", 1),
        ("cardigan", 3),
        ("Cardigan", 2),
        ("CARDIGAN", None),
        ("0", None),
    ],
)
def test_names_are_found_exactly_or_apart_from_case_and_underscores(text: str, number: int | None) -> None:
    assert ClassNames(CLASSES).number(text) == number


@pytest.mark.parametrize(
    ("used", "every", "classes", "labels"),
    [
        (["TENCH", "cardigan"], ["TENCH", "empty", "cardigan"], CLASSES, {"TENCH": 0, "cardigan": 3}),
        (["3", "5"], ["3", "5"], ("5", "3"), {"3": 1, "5": 0}),  # names go before numbers
        (["0", "03", "2"], ["0", "03", "2"], CLASSES, {"0": 0, "03": 3, "2": 2}),
        (["7", "999"], ["7", "999"], (), {"7": 7, "999": 999}),
        (["n1", "n3"], ["n0", "n1", "n2", "n3"], CLASSES, {"n0": 0, "n1": 1, "n2": 2, "n3": 3}),
        (["1", "10", "2", "4"], ["1", "10", "2", "4"], CLASSES, {"1": 0, "10": 1, "2": 2, "4": 3}),  # 10 is too large
    ],
)  # fmt: skip
def test_folders_become_class_numbers(
    used: list[str], every: list[str], classes: tuple[str, ...], labels: dict[str, int]
) -> None:
    assert folder_labels(used, every, classes) == (labels, "")


@pytest.mark.parametrize(
    ("used", "classes", "said"),
    [
        (
            ["dogs", "tench"],
            CLASSES,
            "neither all label names of the network, nor numbers below 4, nor 4 in number (there",
        ),
        (["1", "4"], CLASSES, "nor numbers below 4"),
        (["1", "-1"], (), "label names are not known, and the folders are not class numbers: 1, -1;"),
        (["CARDIGAN"], CLASSES, "(there are 1): CARDIGAN; a label file"),
        (["a", "b", "c", "d", "e"], CLASSES, "a, b, c, …;"),
    ],
)
def test_folders_that_fit_nothing_give_the_reason(used: list[str], classes: tuple[str, ...], said: str) -> None:
    labels, why = folder_labels(used, used, classes)
    assert labels is None
    assert said in why


def written(tmp_path: Path, text: str) -> Path:
    (tmp_path / "labels.csv").write_text(text, encoding="utf-8")
    return tmp_path / "labels.csv"


@pytest.mark.parametrize(
    "text",
    [
        'a.jpg,0\nb/c.jpg,golden_retriever\n"d, e.jpg",3\n',
        'file,label\na.jpg,0\nb/c.jpg,1\n"d, e.jpg",cardigan\n',
        'Path,Class\r\n"d, e.jpg",3\r\n\r\n./a.jpg, TENCH \r\nb\\c.jpg,1',
        '\ufefffile,label\na.jpg,0\nb/c.jpg,1\n"d, e.jpg",3\n',
        '\ufeffa.jpg,0\nb/c.jpg,1\n"d, e.jpg",3\n',
    ],
)
def test_label_files_of_every_usual_form(tmp_path: Path, text: str) -> None:
    assert read_label_file(written(tmp_path, text), IDS, CLASSES) == (0, 1, 3)


def test_numbers_need_no_class_names(tmp_path: Path) -> None:
    assert read_label_file(written(tmp_path, "a.jpg,12345\n"), ("a.jpg",), ()) == (12345,)


@pytest.mark.parametrize(
    ("text", "classes", "said"),
    [
        ("file,label\na.jgp,0\n", CLASSES, r"line 2: there is no image 'a.jgp'; nearest: a.jpg"),
        ("z.jpg,0\n", CLASSES, r"line 1: there is no image 'z.jpg'"),
        ("a.jpg,4\n", CLASSES, r"line 1 \(a.jpg\): expected a label in 0 … 3, found 4"),
        ("a.jpg,-1\n", CLASSES, r"line 1 \(a.jpg\): expected a label in 0 … 3, found -1"),
        ("a.jpg,-1\n", (), r"expected a label in 0 or more, found -1"),
        ("a.jpg,9999999999999999999999\n", (), r"expected a class number"),
        ("a.jpg,tench\n", (), r"line 1 \(a.jpg\): expected a class number, as the network's label names are not known"),
        ("a.jpg,tensh\n", CLASSES, r"line 1 \(a.jpg\): there is no class 'tensh'; nearest: tench"),
        ("a.jpg,CARDIGAN\n", CLASSES, r"line 1 \(a.jpg\): the label 'CARDIGAN' fits more than one class"),
        ("a.jpg,\n", CLASSES, r"line 1 \(a.jpg\): there is no class ''"),
        ("a.jpg,0\n\nb/c.jpg,1\na.jpg,0\n", CLASSES, r"line 4: a.jpg has a label already, in line 1; keep one"),
        ("a.jpg,0\n", CLASSES, r"2 of 3 images have no label: b/c.jpg, d, e.jpg;"),
        ("", CLASSES, r"3 of 3 images have no label: a.jpg, b/c.jpg, d, e.jpg;"),
        ("a.jpg,0\nd, e.jpg,1\n", CLASSES, r"line 2: expected file,label, found 3 columns \(d, e.jpg,1\); put a name"),
        ("a.jpg\n", CLASSES, r"line 1: expected file,label, found 1 columns"),
        ('a.jpg,0\n"b', CLASSES, r"expected a CSV file in UTF-8"),
    ],
)
def test_label_files_that_do_not_fit(tmp_path: Path, text: str, classes: tuple[str, ...], said: str) -> None:
    with pytest.raises(ImageError, match=said) as raised:
        read_label_file(written(tmp_path, text), IDS, classes)
    assert "labels.csv" in str(raised.value)


def test_label_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"absent\.csv: cannot be read \(No such file or directory\)"):
        read_label_file(tmp_path / "absent.csv", IDS, CLASSES)
    with pytest.raises(ImageError, match=r"cannot be read \(Is a directory\)"):
        read_label_file(tmp_path, IDS, CLASSES)
    (tmp_path / "latin.csv").write_bytes("é.jpg,0\n".encode("latin1"))
    with pytest.raises(ImageError, match=r"latin\.csv: expected a CSV file in UTF-8"):
        read_label_file(tmp_path / "latin.csv", IDS, CLASSES)
